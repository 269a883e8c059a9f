"""Gumbel, SQ-VAE and router: known answers, distributions, memory, bad arguments, peers. What every quantizer must keep is in test_quantizers."""

import math
import pytest
import torch
import torch.nn.functional as F
from oracles_categorical import ORACLES, router
from vqstudy.gumbel import GumbelQuantizer
from vqstudy.logits import route, sharp
from vqstudy.router import RouterQuantizer, attend
from vqstudy.sqvae import SQQuantizer


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: GumbelQuantizer(0, 4), ValueError, "dim must be at least 1, got 0"),
        (lambda: GumbelQuantizer(4, 2.5), TypeError, "num_codes must be an int, got 2.5"),
        (
            lambda: GumbelQuantizer(4, 4, kl=-1.0),
            ValueError,
            "kl must be finite and at least 0, got -1.0",
        ),
        (lambda: GumbelQuantizer(4, 4, kl="much"), TypeError, "kl must be a number, got 'much'"),
        (
            lambda: GumbelQuantizer(4, 4, hard=1),
            TypeError,
            "hard must be one of True, False, got 1",
        ),
        (
            lambda: GumbelQuantizer(4, 4, estimator="st"),
            ValueError,
            "'gumbel', 'reinmax', got 'st'",
        ),
        (lambda: GumbelQuantizer(4, 4, estimator=None), TypeError, "estimator must be one of"),
        (
            lambda: GumbelQuantizer(4, 4, hard=False, estimator="reinmax"),
            ValueError,
            "hard must be True",
        ),
        (
            lambda: GumbelQuantizer(4, 4, temperature=0.0),
            ValueError,
            "temperature must be finite and above 0, got 0.0",
        ),
        (
            lambda: GumbelQuantizer(4, 4, final_temperature=math.inf),
            ValueError,
            "final_temperature must be finite",
        ),
        (
            lambda: GumbelQuantizer(4, 4).anneal(1.5),
            ValueError,
            r"progress must lie in 0\.\.1, got 1.5",
        ),
        (
            lambda: SQQuantizer(4, 4, variant=0),
            ValueError,
            "variant must be one of 1, 2, 3, 4, got 0",
        ),
        (
            lambda: SQQuantizer(4, 4, variant="IV"),
            TypeError,
            "variant must be one of 1, 2, 3, 4, got 'IV'",
        ),
        (lambda: SQQuantizer(4, 4, weight=-1), ValueError, "weight must be finite and at least 0"),
        (
            lambda: SQQuantizer(4, 4, temperature=True),
            TypeError,
            "temperature must be a number, got True",
        ),
        (lambda: RouterQuantizer(4, 0), ValueError, "num_codes must be at least 1, got 0"),
        (
            lambda: RouterQuantizer(4, 4, tied=None),
            TypeError,
            "tied must be one of True, False, got None",
        ),
        (
            lambda: RouterQuantizer(4, 4, gate="moe"),
            ValueError,
            "gate must be one of 'dense', 'switch', got 'moe'",
        ),
        (
            lambda: RouterQuantizer(4, 4, init="kmeans"),
            ValueError,
            "init must be one of 'normal', 'copy', got 'kmeans'",
        ),
        (
            lambda: RouterQuantizer(4, 4, init_scale=-0.1),
            ValueError,
            "init_scale must be finite and above 0, got -0.1",
        ),
        (
            lambda: RouterQuantizer(4, 4, tied=True, init="copy"),
            ValueError,
            "init must be 'normal' for a tied router",
        ),
        (
            lambda: RouterQuantizer(4, 4, code_dim=0),
            ValueError,
            "code_dim must be at least 1, got 0",
        ),
        (
            lambda: RouterQuantizer(4, 4, code_dim=8, tied=True),
            ValueError,
            "code_dim must be dim = 4 .* got 8",
        ),
        (
            lambda: RouterQuantizer(4, 4, code_dim=8, init="copy"),
            ValueError,
            "code_dim must be dim = 4",
        ),
        (
            lambda: RouterQuantizer(4, 4, code_dim=8, alpha=1.0),
            ValueError,
            "code_dim must be dim = 4",
        ),
        (lambda: RouterQuantizer(4, 4, beta=1.1), ValueError, r"beta must lie in 0\.\.1, got 1.1"),
        (
            lambda: RouterQuantizer(4, 4, entropy=-0.1),
            ValueError,
            "entropy must be finite and at least 0",
        ),
        (
            lambda: RouterQuantizer(4, 4, entropy_temperature=0),
            ValueError,
            "entropy_temperature must be finite and above 0",
        ),
        (
            lambda: RouterQuantizer(4, 4, bias=0),
            TypeError,
            "bias must be one of True, False, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


# --- Known answers


@pytest.mark.parametrize("estimator", ["gumbel", "reinmax"])
def test_training_codes_are_drawn_from_the_softmax(estimator):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(2, 5, estimator=estimator, temperature=3.0)
    z = torch.randn(2).expand(40000, 2)
    drawn = torch.bincount(quantizer(z).codes, minlength=5) / 40000
    assert torch.allclose(drawn, quantizer.head(z[:1]).softmax(1)[0], atol=0.01)


def test_reinmax_is_unbiased_for_a_quadratic_loss_through_the_quantizer():
    "The mean over draws of dL/dz, L = |z_q - t|^2, against the derivative of sum_i p_i |E_i - t|^2; straight-through Gumbel misses it."
    torch.manual_seed(0)
    target, start = torch.randn(2, 3, dtype=torch.float64)
    errors = {}
    for estimator in ("gumbel", "reinmax"):
        torch.manual_seed(1)
        quantizer = GumbelQuantizer(3, 4, kl=0.0, estimator=estimator).double()
        leaf = start.clone().requires_grad_()
        (exact,) = torch.autograd.grad(
            (quantizer.head(leaf).softmax(0) * (quantizer.codebook - target).pow(2).sum(1)).sum(),
            leaf,
        )
        z = start.expand(400000, 3).clone().requires_grad_()
        (quantizer(z).z_q - target).pow(2).sum().backward()
        error = z.grad.std(0) / 400000**0.5
        errors[estimator] = ((z.grad.mean(0) - exact) / error).abs().max().item()
    assert errors["reinmax"] < 4 < 20 < errors["gumbel"], errors


def test_sq_is_vq_where_the_variance_vanishes():
    torch.manual_seed(0)
    quantizer, z = SQQuantizer(4, 16, 1), torch.randn(100, 4)
    quantizer.head = torch.nn.Linear(4, 1)
    (
        quantizer.head.weight.data.zero_(),
        quantizer.head.bias.data.fill_(-9),
        quantizer.log_scale.data.fill_(-9),
    )
    out = quantizer(z)
    assert torch.equal(out.codes, torch.cdist(z, quantizer.codebook).argmin(1)) and torch.allclose(
        out.z_q, quantizer.codebook[out.codes], atol=1e-5
    )


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_sq_with_one_variance_takes_the_nearest_code(variant):
    torch.manual_seed(0)
    quantizer = ORACLES[f"sq ({variant})"][0](6, 50)
    z = torch.randn(4, 30, 6)
    assert torch.equal(quantizer.encode(z), torch.cdist(z, quantizer.codebook).argmin(-1))


def test_sq_objective_is_the_bound_of_its_decoder():
    "size/2 log(SSE) differs by a constant from the Gaussian log-likelihood with its variance at the best value, SSE / size."
    size, sse = 3072, torch.tensor([3.0, 40.0], dtype=torch.float64)
    likelihood = size / 2 * (2 * math.pi * sse / size).log() + size / 2
    ours = SQQuantizer(4, 4).objective(sse / size, size)
    assert torch.allclose(ours[1] - ours[0], likelihood[1] - likelihood[0])


def test_ties_and_far_vectors_stay_finite():
    for name in ORACLES:
        quantizer = ORACLES[name][0](8, 16)
        z = torch.cat([torch.zeros(2, 8), 20 * torch.randn(6, 8)]).requires_grad_()
        out = quantizer(z)
        (out.z_q.sum() + out.loss).backward()
        assert (
            out.loss.isfinite()
            and z.grad.isfinite().all()
            and all(p.grad.isfinite().all() for p in quantizer.parameters() if p.grad is not None)
        ), name


def test_route_and_attend_in_tiles_and_at_odd_widths():
    torch.manual_seed(0)
    for n, d, e, k in (
        (37, 1, 1, 1),
        (37, 7, 3, 5),
        (1, 3, 9, 300),
        (37, 64, 64, 129),
        (600, 3, 2, 4100),
        (1500, 2, 5, 2049),
    ):
        x, W, E, b = (
            torch.randn(n, d).double(),
            torch.randn(k, d).double(),
            torch.randn(k, e).double(),
            torch.randn(k).double(),
        )
        assert torch.equal(route(x, W, b), (x @ W.T + b).argmax(1)) and torch.equal(
            route(x, W), (x @ W.T).argmax(1)
        )
        assert torch.allclose(attend(x, W, E, b), (x @ W.T + b).softmax(1) @ E, atol=1e-12)


def test_of_equal_logits_the_first_code_is_taken_across_tiles_too():
    x, W = torch.ones(700, 1), torch.zeros(6000, 1)
    W[[31, 2047, 2048, 5000]] = 1.0
    assert (route(x, W) == 31).all() and (route(x, W[32:]) == 2015).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "code_dim": 5},
        {"tied": True, "bias": True},
        {"gate": "switch", "bias": True},
        {"gate": "switch", "tied": True},
        {"entropy": 2.0, "entropy_temperature": 0.3, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_over_many_tiles(options, dtype, bound):
    "More vectors and codes than a tile has, neither a multiple of it; relative to the naive form in float64."
    torch.manual_seed(0)
    quantizer = RouterQuantizer(16, 4500, init_scale=1.0, **options).double()
    if quantizer.bias is not None:
        torch.nn.init.normal_(quantizer.bias)
    z, g = (
        torch.randn(1100, 16).double().requires_grad_(),
        torch.randn(1100, quantizer.code_dim).double(),
    )
    out, _, loss = router(quantizer, z, dict(quantizer.named_parameters()))
    wanted = torch.autograd.grad((out * g).sum() + loss, (z, *quantizer.parameters()))
    z = z.detach().to(dtype).requires_grad_()
    ours = quantizer.to(dtype)(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(
            (ours.z_q * g.to(dtype)).sum() + ours.loss, (z, *quantizer.parameters())
        )
    assert all((a - b).norm() <= bound * b.norm() for a, b in zip(found, wanted)), [
        ((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted)
    ]
    assert torch.equal(quantizer.encode(z), ours.codes)


def test_router_cannot_be_differentiated_twice_but_by_plain_matrices():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    quantizer, z = RouterQuantizer(8, 16), torch.randn(5, 8, requires_grad=True)

    def twice():
        (grad,) = torch.autograd.grad(
            (attend(z, quantizer.keys, quantizer.codebook) ** 2).sum(), z, create_graph=True
        )
        return torch.autograd.grad(grad.sum(), z)[0]

    (grad,) = torch.autograd.grad(quantizer(z).z_q.pow(2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="not implemented"):
        twice()
    with sdpa_kernel(SDPBackend.MATH):
        assert twice().isfinite().all()


def test_a_router_without_a_decoder_gradient_learns_nothing():
    quantizer, z = RouterQuantizer(8, 16, bias=True), torch.randn(5, 8, requires_grad=True)
    (quantizer(z).z_q * 0).sum().backward()
    assert not z.grad.any() and not any(p.grad.any() for p in quantizer.parameters())


def test_sharp_takes_any_mixture():
    E = torch.randn(6, 3, requires_grad=True)
    mixture, codes, g = (
        torch.randn(4, 3, requires_grad=True),
        torch.tensor([0, 5, 5, 2]),
        torch.randn(4, 3),
    )
    sharp(mixture, codes, E).backward(g)
    assert torch.equal(mixture.grad, g) and torch.allclose(
        E.grad, torch.zeros(6, 3).index_add_(0, codes, g)
    )


def test_a_tied_router_and_a_copy_start_alike():
    torch.manual_seed(0)
    tied, copied = (
        RouterQuantizer(8, 16, tied=True, init_scale=1.0),
        RouterQuantizer(8, 16, init="copy", init_scale=1.0),
    )
    with torch.no_grad():
        copied.book.weight.copy_(tied.book.weight), copied.keys.copy_(tied.book.weight)
    z = torch.randn(20, 8)
    a, b = tied(z), copied(z)
    a.z_q.pow(2).sum().backward(), b.z_q.pow(2).sum().backward()
    assert torch.equal(a.z_q, b.z_q) and torch.allclose(
        tied.book.weight.grad, copied.book.weight.grad + copied.keys.grad, atol=1e-5
    )
    assert (
        F.cosine_similarity(
            tied.book.weight.grad.flatten(), copied.book.weight.grad.flatten(), dim=0
        )
        < 1
    )


@pytest.mark.parametrize("hard", [True, False])
def test_agrees_with_torch_gumbel_softmax(hard):
    torch.manual_seed(0)
    quantizer, z, g = (
        GumbelQuantizer(6, 12, kl=0.0, hard=hard, temperature=0.7),
        torch.randn(50, 6, requires_grad=True),
        torch.randn(50, 6),
    )
    torch.manual_seed(1)
    out = quantizer(z)
    torch.manual_seed(1)
    weights = F.gumbel_softmax(quantizer.head(z), tau=0.7, hard=hard)
    assert torch.equal(out.codes, weights.argmax(1)) and torch.allclose(
        out.z_q, weights @ quantizer.codebook, atol=1e-5
    )
    leaves = (z, *quantizer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(out.z_q, leaves, g),
        torch.autograd.grad(weights @ quantizer.codebook, leaves, g),
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)
