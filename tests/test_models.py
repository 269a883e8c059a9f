"""Families of models: what stands around a quantizer, and which run depends on which family."""

import json
import pytest
import torch
from torch import nn
from vqstudy.autoencoders import Autoencoder, reconstruction_loss
from vqstudy.bottleneck import around
from vqstudy.cells import notebook_path
from vqstudy.code import modules
from vqstudy.classifiers import Classifier
from vqstudy.quantizers import recipe


def autoencoder(spec="vq", dim=8, **options):
    torch.manual_seed(0)
    quantizer = recipe(spec, dim, 32, channel_dim=1)
    torch.manual_seed(1)
    return Autoencoder(quantizer, channels=16, **options)


X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_the_network_starts_alike_with_and_without():
    plain = autoencoder(dim=16).state_dict()
    narrow = autoencoder(code_dim=8, batch_norm=True).state_dict()
    encoder = [name for name in plain if name.startswith("encoder.")]
    assert all(torch.equal(plain[name], narrow[name]) for name in encoder)
    # behind the convolution that is the decoder's first layer
    decoder = [name.split(".", 2) for name in plain if name.startswith("decoder.")]
    for _, place, rest in decoder:
        shifted = f"decoder.{int(place) + 1}.{rest}"
        assert torch.equal(plain[f"decoder.{place}.{rest}"], narrow[shifted])


@pytest.mark.parametrize("spec", ["none", "vq", "vq + exact", "router", "gumbel", "sq"])
def test_every_method_has_the_convolutions(spec):
    model = autoencoder(spec, code_dim=8)
    convolutions = model.encoder[-1], model.decoder[0]
    shapes = [tuple(layer.weight.shape) for layer in convolutions]
    assert shapes == [(8, 16, 1, 1), (16, 8, 1, 1)]
    if spec == "vq + exact":
        model.quantizer.attach(lambda v: model.decoder_loss(v, X))
    model.quantizer.anneal(0.5)
    loss, _ = reconstruction_loss(model, X)
    loss.backward()
    assert all(float(layer.weight.grad.abs().sum()) > 0 for layer in convolutions)
    assert model(X).z.shape == (4, 8, 8, 8)


def test_without_a_quantizer_the_convolutions_are_two_linear_maps():
    model = autoencoder("none", code_dim=8).eval()
    before, after = model.encoder[-1], model.decoder[0]
    z = nn.Sequential(*list(model.encoder)[:-1])(X)
    rows = z.movedim(1, -1)
    narrow = rows @ before.weight[:, :, 0, 0].T + before.bias
    wide = narrow @ after.weight[:, :, 0, 0].T + after.bias
    made = nn.Sequential(*list(model.decoder)[1:])(wide.movedim(-1, 1))
    assert torch.allclose(model(X).x, made, atol=1e-5)


@pytest.mark.parametrize("code_dim", [None, 8])
def test_batch_norm_is_the_last_thing_before_the_quantizer(code_dim):
    model = autoencoder("none", code_dim or 16, code_dim=code_dim, batch_norm=True)
    z = model(X).z.movedim(1, -1).reshape(-1, code_dim or 16)
    assert torch.allclose(z.mean(0), torch.zeros(len(z[0])), atol=1e-4)
    assert torch.allclose(z.var(0, correction=0), torch.ones(len(z[0])), atol=0.05)


def test_by_default_nothing_is_added():
    assert around(16) == ([], [])
    names = [name for name, _ in autoencoder(dim=16).named_modules()]
    same = [name for name, _ in autoencoder(dim=16, code_dim=None).named_modules()]
    assert names == same and not isinstance(autoencoder(dim=16).encoder[-1], nn.BatchNorm2d)


@pytest.mark.parametrize("given, words", [
    ({"code_dim": 4}, "quantizer must have dim=4 and channel_dim=1, got dim=8"),
    ({}, "quantizer must have dim=16 and channel_dim=1, got dim=8"),
    ({"code_dim": 0}, "quantizer must have dim=0"),
])
def test_a_quantizer_of_another_width_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        autoencoder(**given)


def test_a_classifier_says_its_classes():
    assert Classifier(recipe("vq", 128, 4, channel_dim=1), 7).num_classes == 7


def test_a_run_depends_on_the_family_that_it_trains():
    "A model of another family, or a new one, is none of its fingerprint's business."
    cells = json.loads(notebook_path("reconstruct").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    used = modules("\n".join(code)).keys()
    assert {"autoencoders", "bottleneck", "train", "lengths"} <= used
    assert not used & {"models", "classifiers"}
