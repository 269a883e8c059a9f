"""What needs `fit`, or a call for each step, says so once where it is missing."""

import copy
import pickle
import types
import warnings
import pytest
import torch
from vqstudy.measure import gradient_gap
from vqstudy.models import Autoencoder, quantized_task, reconstruction_loss
from vqstudy.quantizers import VectorQuantizer, recipe, recipes
from vqstudy.train import Settings, fit

WARNED = {
    "vq + alt": "the codebook does not learn: with alternate=True",
    "vq + opt": "the codebook does not learn",
    "simvq + alt": "the codebook does not learn",
    "optvq + opt": "the codebook does not learn",
    "stochastic": "the temperature stays 1.0: fit lowers it, or call anneal",
    "stochastic + residual": "the temperature stays 1.0",
    "gumbel": "the temperature stays 1.0",
    "gumbel + group": "the temperature stays",
    "sq": "the temperature stays",
}


def steps(q, number, before=lambda q, z: None):
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for _ in range(number):
        before(q, z)
        quantized = q(z)
        (quantized.z_q.sum() + quantized.loss).backward()


@pytest.mark.parametrize("spec", WARNED)
def test_an_own_loop_is_told_once(spec):
    q = recipe(spec, 8, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(q, 1)  # one pass may be a look
        q.eval()
        steps(q, 3)
        q.train()
        with torch.no_grad():
            q(torch.randn(4, 8))
            q.encode(torch.randn(4, 8))
    with pytest.warns(UserWarning, match=WARNED[spec]):
        steps(q, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(q, 3)
        steps(pickle.loads(pickle.dumps(q)), 3)
        steps(copy.deepcopy(q), 3)


@pytest.mark.parametrize("spec", WARNED)
def test_a_loop_that_calls_is_not_told(spec):
    def calls(q, z):
        q.anneal(0.5)
        if hasattr(q, "inner_loss") and q.alternate:
            q.inner_loss(z).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(recipe(spec, 8, 16), 4, calls)


@pytest.mark.parametrize("spec", recipes())
@pytest.mark.parametrize("fused", [True, False])
def test_fit_is_never_told(spec, fused):
    model = Autoencoder(recipe(spec, 8, 16, channel_dim=1), channels=8)
    data = types.SimpleNamespace(x=torch.zeros(12, 3, 32, 32, dtype=torch.uint8), y=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = Settings(epochs=1, batch_size=4, fused=fused)
        fit(model, reconstruction_loss, data, settings, progress=False)


@pytest.mark.parametrize("spec", ["vq + alt", "stochastic"])
def test_looking_at_the_gradient_is_no_training(spec):
    model = Autoencoder(recipe(spec, 8, 16, channel_dim=1), channels=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gradient_gap(model, quantized_task, torch.rand(4, 3, 32, 32))
        gradient_gap(model, quantized_task, torch.rand(4, 3, 32, 32))


def test_an_own_loop_under_autocast_asks_the_decoder_under_it():
    "Forward under bfloat16, backward outside, as torch advises."
    dtypes = []
    decoder = torch.nn.Linear(8, 4)

    def loss_at(v):
        made = decoder(v)
        dtypes.append(made.dtype)
        return made.float().pow(2).mean()

    for rule in ("exact", "hessian"):
        q = VectorQuantizer(8, 16, rule=rule)
        encoder = torch.nn.Linear(4, 8)
        q.attach(loss_at)
        with torch.autocast("cpu", torch.bfloat16):
            quantized = q(encoder(torch.randn(16, 4)))
            loss = loss_at(quantized.z_q) + quantized.loss
        loss.backward()
        assert encoder.weight.grad.isfinite().all()
    assert dtypes == [torch.bfloat16] * 4
