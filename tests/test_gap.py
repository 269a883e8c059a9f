"""The gradient gap and the divergences: known answers, purity, several quantizers, autocast."""

import copy
import math
import pytest
import torch
from scipy.stats import energy_distance, wasserstein_distance
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from vqstudy.measure import divergence, gradient_gap
from vqstudy.models import Autoencoder
from vqstudy.quantizers import NoQuantizer, RouterQuantizer, VectorQuantizer, recipe, recipes


class Two(nn.Module):
    "Two quantizers, the second behind the first, with batch norm and dropout."

    def __init__(self, *quantizers):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(4, 6)
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x):
        a = self.quantizers[0](self.norm(self.first(x))).z_q
        return self.out(self.drop(self.quantizers[1](torch.tanh(self.second(a))).z_q))


def loss(model, x):
    return (model(x) - x).pow(2).mean()


def reconstruction(model, x):
    return (model(x).x - x).pow(2).mean()


def in_line(model, x):
    "Encoder, quantizer and decoder as a sequence."
    return (model[2](model[1](model[0](x)).z_q) - x).pow(2).mean()


def autoencoder(spec):
    return Autoencoder(recipe(spec, 8, 16, channel_dim=1), channels=8)


def unchanged(model, before):
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("train", [True, False])
def test_nothing_is_changed_and_the_same_comes_again(train):
    torch.manual_seed(0)
    revived = recipe("vq + ema + replace", 4, 16, life_span=1)
    model = Two(revived, recipe("stochastic", 4, 16)).train(train)
    x = torch.randn(20, 6)
    model(x).sum().backward()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gradients = [copy.deepcopy(p.grad) for p in model.parameters()]
    gap = gradient_gap(model, loss, x)
    assert gap == gradient_gap(model, loss, x)
    assert gap.total > 0 and gap.relative > 0
    assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    for p, g in zip(model.parameters(), gradients):
        assert p.grad is None if g is None else torch.equal(p.grad, g)
    assert set(gap.layers) == {"first", "norm", "second"}
    assert gap.total == pytest.approx(sum(gap.layers.values()))
    assert model.training == train


def test_against_two_models_by_hand():
    torch.manual_seed(0)
    quantized = Two(VectorQuantizer(4, 16), VectorQuantizer(4, 16)).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    quantized.drop.p = 0.0
    plain = copy.deepcopy(quantized)
    plain.quantizers = nn.ModuleList([NoQuantizer(4), NoQuantizer(4)])

    def gradient(model):
        loss(model, x).backward()
        layers = (model.first, model.norm, model.second)
        return torch.cat([p.grad.flatten() for layer in layers for p in layer.parameters()])

    g, ghat = gradient(plain), gradient(quantized)
    gap = gradient_gap(quantized, loss, x)
    assert gap.total == pytest.approx(float((g - ghat).pow(2).sum()), rel=1e-10)
    assert gap.relative == pytest.approx(float((g - ghat).norm() / g.norm()), rel=1e-10)
    cosine = float(torch.cosine_similarity(g, ghat, dim=0))
    assert gap.cosine == pytest.approx(1 - cosine, abs=1e-10)


def test_batch_norm_and_dropout_are_the_same_in_both_passes():
    torch.manual_seed(0)
    model, x = Two(NoQuantizer(4), NoQuantizer(4)).train(), torch.randn(20, 6)
    gap = gradient_gap(model, loss, x)
    assert gap.total == 0 and gap.relative == 0 and abs(gap.cosine) < 1e-12
    # It draws noise, and the dropout behind it must not see that.
    noisy = Two(recipe("vq + nsvq", 4, 16), NoQuantizer(4))
    noisy.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        noisy.quantizers[0].book.weight.copy_(noisy.norm(noisy.first(x[:16])))
    assert gradient_gap(noisy, loss, x[:16]).relative < 1e-5


def test_the_gap_is_zero_where_every_vector_lies_on_a_code():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), VectorQuantizer(4, 20), nn.Linear(4, 6)).double()
    x = torch.randn(20, 6, dtype=torch.float64)
    assert gradient_gap(model, in_line, x).total > 1e-6
    with torch.no_grad():
        model[1].book.weight.copy_(model[0](x))
    assert gradient_gap(model, in_line, x).total == 0


def test_the_bound_of_the_gap_holds_for_a_smooth_decoder():
    """Erratum 12: |g - ghat| <= K |z - q| |Jacobian of the encoder|.

    K bounds the curvature of the loss composed with the decoder.
    """
    for seed in range(5):
        torch.manual_seed(seed)
        encode = nn.Linear(6, 4).double()
        decode = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        x = torch.randn(1, 6, dtype=torch.float64)
        model = nn.Sequential(encode, VectorQuantizer(4, 32).double(), decode)
        gap = gradient_gap(model, in_line, x)
        z = encode(x).detach()
        q = model[1].eval()(z).z_q.detach()

        def curvature(v):
            loss = lambda v: (decode(v) - x).pow(2).mean()
            hessian = torch.autograd.functional.hessian(loss, v).view(4, 4)
            return float(torch.linalg.matrix_norm(hessian, 2))

        K = max(curvature(q + t * (z - q)) for t in torch.linspace(0, 1, 50, dtype=torch.float64))
        jacobian = float((x.pow(2).sum() + 1).sqrt())
        assert 0 < gap.total**0.5 <= K * float((z - q).norm()) * jacobian * 1.001


WITHOUT_DECODER = [spec for spec in recipes() if "exact" not in spec and "hessian" not in spec]


@pytest.mark.parametrize("spec", WITHOUT_DECODER)
def test_every_recipe_has_a_gap(spec):
    torch.manual_seed(0)
    model, x = autoencoder(spec), torch.rand(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        gap = gradient_gap(model, reconstruction, x)
    assert math.isfinite(gap.total)
    assert all(name.startswith("encoder") for name in gap.layers)
    # Not 0, since with two threads convolutions differ in the last bit.
    assert (gap.relative < 1e-5) == (spec in ("none", "vq + deferred"))
    assert unchanged(model, before)


def test_under_autocast():
    torch.manual_seed(0)
    model, x = autoencoder("vq"), torch.rand(4, 3, 32, 32)
    plain = gradient_gap(model, reconstruction, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradient_gap(model, reconstruction, x)
    assert low.relative == pytest.approx(plain.relative, rel=0.3)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_cannot_be_measured_is_refused():
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match="model must contain a quantizer, got Linear"):
        gradient_gap(nn.Linear(6, 6), lambda m, x: m(x).sum(), x)
    with pytest.raises(ValueError, match="no encoder"):
        gradient_gap(VectorQuantizer(6, 4), lambda m, x: m(x).z_q.sum(), x)
    wide = nn.Sequential(nn.Linear(6, 6), RouterQuantizer(6, 4, code_dim=3))
    with pytest.raises(ValueError, match="shape to be bypassed"):
        gradient_gap(wide, lambda m, x: m(x).z_q.sum(), x)


@pytest.mark.parametrize("n,k", [(1, 1), (5, 3), (40, 64)])
def test_divergences_on_a_line_are_scipys(n, k):
    torch.manual_seed(n)
    p = torch.randn(n, 1, dtype=torch.float64)
    c = torch.randn(k, 1, dtype=torch.float64) + 1
    energy = energy_distance(p[:, 0], c[:, 0]) ** 2
    assert divergence(p, c, "energy") == pytest.approx(energy, rel=1e-9, abs=1e-12)
    steps = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1] + 2.5e-6
    quantile = lambda x: x[:, 0].sort().values[(steps * len(x)).long().clamp_max(len(x) - 1)]
    sliced = divergence(p, c, "sliced_wasserstein")
    wanted = float((quantile(p) - quantile(c)).pow(2).mean().sqrt())
    assert sliced == pytest.approx(wanted, rel=1e-3)
    assert sliced >= wasserstein_distance(p[:, 0], c[:, 0]) - 1e-9
    assert divergence(p, c) == pytest.approx(float((p - c.T).pow(2).amin(1).mean()))


def test_divergence_of_two_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    A, B = randn(3, 3), randn(3, 3)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    p, c = randn(400_000, 3) @ A, randn(400_000, 3) @ B + shift
    first = MultivariateNormal(torch.zeros_like(shift), A.T @ A)
    second = MultivariateNormal(shift, B.T @ B)
    closed = float(kl_divergence(first, second))
    assert divergence(p, c, "gaussian_kl") == pytest.approx(closed, rel=0.02)
    assert divergence(c[:3], p[:2], "gaussian_kl") < math.inf  # fewer vectors than dimensions


@pytest.mark.parametrize(
    "p,c,words",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "width 3"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "at least one"),
        (torch.full((1, 2), torch.nan), torch.zeros(1, 2), "finite"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 3), r"\(n, d\)"),
    ],
)
def test_bad_vectors_are_named(p, c, words):
    with pytest.raises(ValueError, match=words):
        divergence(p, c)
