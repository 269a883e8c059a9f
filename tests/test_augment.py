"""Flips and crops: of seed and step alone, on rectangles that an image has."""

import types
import pytest
import torch
from torch import nn
from vqstudy.augment import augmented, cropped, crops
from vqstudy.autoencoders import Autoencoder, reconstruction_loss
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.train import fit, load_checkpoint, reproducible


def data(n=16):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return types.SimpleNamespace(x=x, y=None)


def bilinear(image, size, corner):
    "A rectangle of an image (h, w), sampled at the centres of h x w cells, one by one."
    h, w = image.shape
    made = torch.zeros(h, w)
    for i in range(h):
        for j in range(w):
            y = min(max((corner[0] + size[0] * (i + 0.5) / h) * h - 0.5, 0), h - 1)
            x = min(max((corner[1] + size[1] * (j + 0.5) / w) * w - 0.5, 0), w - 1)
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            dy, dx = y - top, x - left
            upper = (1 - dx) * image[top, left] + dx * image[top, left + 1]
            lower = (1 - dx) * image[top + 1, left] + dx * image[top + 1, left + 1]
            made[i, j] = (1 - dy) * upper + dy * lower
    return made


@pytest.mark.parametrize("size, corner", [((0.5, 0.25), (0.1, 0.7)), ((1.0, 0.6), (0.0, 0.4))])
def test_a_crop_is_its_rectangle(size, corner):
    image = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    made = cropped(image[None, None], torch.tensor([size]), torch.tensor([corner]))
    assert torch.allclose(made[0, 0], bilinear(image, size, corner), atol=1e-5)


def test_the_rectangles_drawn():
    "Areas are uniform where nothing is cut off, ratios are log-uniform and even."
    size, corner = crops(20_000, 0.2, torch.Generator().manual_seed(0))
    areas, ratios = size.prod(1), (size[:, 1] / size[:, 0]).log()
    assert (size <= 1).all() and (corner >= 0).all() and (corner + size <= 1 + 1e-6).all()
    uncut = areas[areas < 0.5]  # 3/4 of the height at most: nothing is cut
    assert float(uncut.min()) == pytest.approx(0.2, abs=0.01)
    assert float((uncut < 0.35).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(ratios.mean()) == pytest.approx(0, abs=0.01)
    assert float(ratios.abs().max()) <= 0.2877


def test_half_of_the_images_are_mirrored():
    x = torch.arange(4.0).expand(1000, 3, 2, 4)
    made = augmented(x, 0, 5, flip=True)
    flipped = (made[:, 0, 0, 0] == 3).float()
    assert torch.equal(made, torch.where(flipped.bool()[:, None, None, None], x.flip(-1), x))
    assert float(flipped.mean()) == pytest.approx(0.5, abs=0.05)


def test_of_seed_and_step_alone():
    x = torch.rand(8, 3, 8, 8)
    first = augmented(x, 0, 5, True, 0.3)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(augmented(x, 0, 5, True, 0.3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augmented(x, 1, 5, True, 0.3), first)
    assert not torch.equal(augmented(x, 0, 6, True, 0.3), first)


def run(path=None, monitor=None, **settings):
    reproducible(0)
    model = Autoencoder(recipe("vq + replace", 8, 32, channel_dim=1, life_span=2), channels=8)
    s = Settings(**{"epochs": 2} | settings, batch_size=4, flip=True, crop=0.3)
    options = {"checkpoint": path, "save_every": 0.0 if path else 60.0, "monitor": monitor}
    return fit(model, reconstruction_loss, data(), s, progress=False, **options)


@pytest.mark.parametrize("settings", [{}, {"lengths": (3, 7)}, {"channels_last": True}])
@pytest.mark.parametrize("stops", [2, 5])
def test_a_resumed_run_sees_the_same_images(settings, stops, tmp_path):
    taken = 0

    def interrupt(model, step):
        nonlocal taken
        taken += 1
        if taken > stops:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path, interrupt, **settings)
    assert 0 < load_checkpoint(path)["step"] <= stops
    resumed, whole = run(path, **settings), run(**settings)
    assert (resumed.history, resumed.lengths) == (whole.history, whole.lengths)


def test_images_of_the_branch_are_those_of_the_trunk():
    assert run(lengths=(3, 7)).lengths[1] == run(lengths=(7,)).lengths[0]


def test_without_it_the_images_are_as_they_were():
    seen = []

    def loss(model, x, y):
        seen.append(x)
        return model(x).loss, {}

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = recipe("vq", 3, 4, channel_dim=1)

        def forward(self, x):
            return self.quantizer(x)

    settings = {"epochs": 1, "batch_size": 16}
    for more in ({}, {"flip": True}, {"crop": 0.3}):
        fit(One(), loss, data(), Settings(**settings, **more), progress=False)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    plain = data().x[order].float() / 255
    assert torch.equal(seen[0], plain)
    assert torch.equal(seen[1], augmented(plain, 0, 0, flip=True)) != torch.equal(seen[1], plain)
    assert torch.equal(seen[2], augmented(plain, 0, 0, crop=0.3))


@pytest.mark.parametrize("bad, words", [
    ({"crop": 1.5}, "crop must be a finite number at least 0 and at most 1, got 1.5"),
    ({"crop": -0.1}, "crop must be .* got -0.1"),
])
def test_a_bad_crop_is_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Settings(**bad)
