"""Gumbel, SQ-VAE and router: known answers, distributions, memory, bad arguments, peers.

What every quantizer must keep is in test_quantizers.
"""

import math
import pytest
import torch
import torch.nn.functional as F
from oracles_categorical import ORACLES, released_ibq, router
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from vqstudy.gumbel import GumbelQuantizer
from vqstudy.logits import route, sharp
from vqstudy.quantizers import keywords, recipe
from vqstudy.router import RouterQuantizer, attend, entropy_term, routed
from vqstudy.sqvae import SQQuantizer

NUMBER = "must be a finite number"
BAD = [  # kind, arguments, error, message
    (GumbelQuantizer, dict(dim=0), ValueError, "dim must be at least 1, got 0"),
    (GumbelQuantizer, dict(num_codes=2.5), TypeError, "num_codes must be an int, got 2.5"),
    (GumbelQuantizer, dict(kl=-1.0), ValueError, f"kl {NUMBER} at least 0, got -1.0"),
    (GumbelQuantizer, dict(kl="much"), TypeError, "kl must be a number, got 'much'"),
    (GumbelQuantizer, dict(hard=1), TypeError, "hard must be True or False, got 1"),
    (GumbelQuantizer, dict(estimator="st"), ValueError, "'gumbel' or 'reinmax', got 'st'"),
    (GumbelQuantizer, dict(estimator=None), TypeError, "estimator must be 'gumbel' or"),
    (GumbelQuantizer, dict(hard=False, estimator="reinmax"), ValueError, "hard must be True"),
    (GumbelQuantizer, dict(temperature=0.0), ValueError, f"temperature {NUMBER} above 0, got 0.0"),
    (GumbelQuantizer, dict(final_temperature=math.inf), ValueError, f"final_temperature {NUMBER}"),
    (SQQuantizer, dict(variant=0), ValueError, "variant must be 1, 2, 3 or 4, got 0"),
    (SQQuantizer, dict(variant="IV"), TypeError, "variant must be 1, 2, 3 or 4, got 'IV'"),
    (SQQuantizer, dict(weight=-1), ValueError, f"weight {NUMBER} at least 0"),
    (SQQuantizer, dict(temperature=True), TypeError, "temperature must be a number, got True"),
    (RouterQuantizer, dict(num_codes=0), ValueError, "num_codes must be at least 1, got 0"),
    (RouterQuantizer, dict(tied=None), TypeError, "tied must be True or False, got None"),
    (RouterQuantizer, dict(gate="moe"), ValueError, "gate must be 'dense' or 'switch', got 'moe'"),
    (RouterQuantizer, dict(init="kmeans"), ValueError, "init must be 'normal' or 'copy', got 'kmeans'"),
    (RouterQuantizer, dict(init_scale=-0.1), ValueError, f"init_scale {NUMBER} above 0, got -0.1"),
    (RouterQuantizer, dict(tied=True, init="copy"), ValueError, "init must be 'normal' for a tied router"),
    (RouterQuantizer, dict(code_dim=0), ValueError, "code_dim must be at least 1, got 0"),
    (RouterQuantizer, dict(code_dim=8, tied=True), ValueError, "code_dim must be dim = 4 .* got 8"),
    (RouterQuantizer, dict(code_dim=8, init="copy"), ValueError, "code_dim must be dim = 4"),
    (RouterQuantizer, dict(code_dim=8, alpha=1.0), ValueError, "code_dim must be dim = 4"),
    (RouterQuantizer, dict(code_dim=8, double_loss=1.0), ValueError, "code_dim must be dim = 4 .* got 8"),
    (RouterQuantizer, dict(double_loss=-1), ValueError, f"double_loss {NUMBER} at least 0, got -1"),
    (RouterQuantizer, dict(entropy_eps=-1e-5), ValueError, f"entropy_eps {NUMBER} at least 0"),
    (RouterQuantizer, dict(beta=1.1), ValueError, f"beta {NUMBER} at least 0 and at most 1, got 1.1"),
    (RouterQuantizer, dict(entropy=-0.1), ValueError, f"entropy {NUMBER} at least 0"),
    (RouterQuantizer, dict(entropy_temperature=0), ValueError, f"entropy_temperature {NUMBER} above 0"),
    (RouterQuantizer, dict(bias=0), TypeError, "bias must be True or False, got 0"),
]


@pytest.mark.parametrize("kind,given,error,words", BAD)
def test_bad_arguments_are_named(kind, given, error, words):
    with pytest.raises(error, match=words):
        kind(**{"dim": 4, "num_codes": 4} | given)


def test_bad_progress_is_named():
    with pytest.raises(ValueError, match=f"progress {NUMBER} at least 0 and at most 1, got 1.5"):
        GumbelQuantizer(4, 4).anneal(1.5)


# --- Known answers


@pytest.mark.parametrize("estimator", ["gumbel", "reinmax"])
def test_training_codes_are_drawn_from_the_softmax(estimator):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(2, 5, estimator=estimator, temperature=3.0)
    z = torch.randn(2).expand(40000, 2)
    drawn = torch.bincount(quantizer(z).codes, minlength=5) / 40000
    assert torch.allclose(drawn, quantizer.head(z[:1]).softmax(1)[0], atol=0.01)


def test_reinmax_is_unbiased_for_a_quadratic_loss_through_the_quantizer():
    """The mean over draws of dL/dz, L = |z_q - t|^2, is the derivative of sum_i p_i |E_i - t|^2.

    Straight-through Gumbel misses it.
    """
    torch.manual_seed(0)
    target, start = torch.randn(2, 3, dtype=torch.float64)
    errors = {}
    for estimator in ("gumbel", "reinmax"):
        torch.manual_seed(1)
        quantizer = GumbelQuantizer(3, 4, kl=0.0, estimator=estimator).double()
        leaf = start.clone().requires_grad_()
        losses = (quantizer.codebook - target).pow(2).sum(1)
        expected = (quantizer.head(leaf).softmax(0) * losses).sum()
        (exact,) = torch.autograd.grad(expected, leaf)
        z = start.expand(400000, 3).clone().requires_grad_()
        (quantizer(z).z_q - target).pow(2).sum().backward()
        error = z.grad.std(0) / 400000**0.5
        errors[estimator] = ((z.grad.mean(0) - exact) / error).abs().max().item()
    assert errors["reinmax"] < 4 < 20 < errors["gumbel"], errors


def test_sq_is_vq_where_the_variance_vanishes():
    torch.manual_seed(0)
    quantizer, z = SQQuantizer(4, 16, 1), torch.randn(100, 4)
    quantizer.head = torch.nn.Linear(4, 1)
    quantizer.head.weight.data.zero_()
    quantizer.head.bias.data.fill_(-9)
    quantizer.log_scale.data.fill_(-9)
    out = quantizer(z)
    assert torch.equal(out.codes, torch.cdist(z, quantizer.codebook).argmin(1))
    assert torch.allclose(out.z_q, quantizer.codebook[out.codes], atol=1e-5)


@pytest.mark.parametrize("log_scale, variance", [(-3.0, math.exp(-3)), (3.0, math.exp(3))])
def test_variant_1_of_sq_has_no_least_variance(log_scale, variance):
    quantizer = SQQuantizer(6, 50, variant=1)
    quantizer.log_scale.data.fill_(log_scale)
    x = torch.randn(5, 6)
    assert quantizer.variance(x).tolist() == [[pytest.approx(variance)] * 6] * 5
    out = quantizer.eval()(x)
    assert torch.equal(out.codes, torch.cdist(x, quantizer.codebook).argmin(1))


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_sq_with_one_variance_takes_the_nearest_code(variant):
    torch.manual_seed(0)
    quantizer = ORACLES[f"sq ({variant})"][0](6, 50)
    z = torch.randn(4, 30, 6)
    assert torch.equal(quantizer.encode(z), torch.cdist(z, quantizer.codebook).argmin(-1))


def test_sq_objective_is_the_bound_of_its_decoder():
    "size/2 log(SSE) and the Gaussian log-likelihood at its best variance differ by a constant."
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
        grads = [p.grad for p in quantizer.parameters() if p.grad is not None]
        assert out.loss.isfinite() and z.grad.isfinite().all(), name
        assert all(grad.isfinite().all() for grad in grads), name


SIZES = [  # n, d, e, k: odd widths, one tile, several tiles
    (37, 1, 1, 1),
    (37, 7, 3, 5),
    (1, 3, 9, 300),
    (37, 64, 64, 129),
    (600, 3, 2, 4100),
    (1500, 2, 5, 2049),
]


def test_route_and_attend_in_tiles_and_at_odd_widths():
    torch.manual_seed(0)
    for n, d, e, k in SIZES:
        shapes = (n, d), (k, d), (k, e), (k,)
        x, W, E, b = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
        logits = x @ W.T + b
        assert torch.equal(route(x, W, b), logits.argmax(1))
        assert torch.equal(route(x, W), (x @ W.T).argmax(1))
        assert torch.allclose(attend(x, W, E, b), logits.softmax(1) @ E, atol=1e-12)


def test_of_equal_logits_the_first_code_is_taken_across_tiles_too():
    x, W = torch.ones(700, 1), torch.zeros(6000, 1)
    W[[31, 2047, 2048, 5000]] = 1.0
    assert (route(x, W) == 31).all() and (route(x, W[32:]) == 2015).all()


OPTIONS = [
    {},
    {"bias": True, "code_dim": 5},
    {"tied": True, "bias": True},
    {"gate": "switch", "bias": True},
    {"gate": "switch", "tied": True},
    {"entropy": 2.0, "entropy_temperature": 0.3, "bias": True},
    {"tied": True, "double_loss": 3.0, "entropy": 2.0, "entropy_temperature": 0.3, "entropy_eps": 1e-5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_over_many_tiles(options):
    "More vectors and codes than a tile has, neither a multiple of it, against the naive float64."
    torch.manual_seed(0)
    quantizer = RouterQuantizer(16, 4500, init_scale=1.0, **options).double()
    if quantizer.bias is not None:
        torch.nn.init.normal_(quantizer.bias)
    z = torch.randn(1100, 16).double().requires_grad_()
    g = torch.randn(1100, quantizer.code_dim).double()
    q, _, loss = router(quantizer, z, dict(quantizer.named_parameters()))
    wanted = torch.autograd.grad((q * g).sum() + loss, (z, *quantizer.parameters()))
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = z.detach().to(dtype).requires_grad_()
        out = quantizer.to(dtype)(x)
        with torch.autocast("cpu", torch.bfloat16):
            objective = (out.z_q * g.to(dtype)).sum() + out.loss
            found = torch.autograd.grad(objective, (x, *quantizer.parameters()))
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
        assert all(error <= bound for error in errors), (dtype, errors)
        assert torch.equal(quantizer.encode(x), out.codes)


ONCE = "the router is differentiable once"


def test_router_cannot_be_differentiated_twice_but_by_plain_matrices():
    quantizer, z = RouterQuantizer(8, 16), torch.randn(5, 8, requires_grad=True)

    def twice():
        value = attend(z, quantizer.keys, quantizer.codebook).pow(2).sum()
        (grad,) = torch.autograd.grad(value, z, create_graph=True)
        return torch.autograd.grad(grad.sum(), z)[0]

    (grad,) = torch.autograd.grad(quantizer(z).z_q.pow(2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="not implemented"):
        twice()
    with sdpa_kernel(SDPBackend.MATH):
        assert twice().isfinite().all()


@pytest.mark.parametrize("options", [{}, {"gate": "switch"}, {"entropy": 1.0}], ids=str)
def test_torch_func_is_refused_a_second_derivative_too(options):
    quantizer, z = RouterQuantizer(8, 16, check_finite=False, **options), torch.randn(5, 8)
    task = lambda z: (lambda out: out.z_q.pow(2).sum() + out.loss)(quantizer(z))
    assert grad(task)(z).abs().sum() > 0
    with pytest.raises(RuntimeError, match=ONCE):
        grad(lambda z: grad(task)(z).sum())(z)
    with pytest.raises(RuntimeError, match=ONCE):
        vmap(grad(lambda z: grad(task)(z).sum()))(z[None])


MAPPED = [(0, 0), (None, 0), (0, None)]  # of the parameters, of z


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("over", MAPPED, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vmap_equals_a_loop(options, over):
    "Values, codes, losses, and the gradients to z and to all parameters."
    torch.manual_seed(0)
    options = {"check_finite": False, "init_scale": 1.0} | options
    parts = [RouterQuantizer(4, 9, **options).double() for _ in range(3)]
    parameters, buffers = stack_module_state(parts)
    z = torch.randn(3, 20, 4, dtype=torch.float64)
    if over[0] is None:
        parameters = {name: stacked[0] for name, stacked in parameters.items()}
    z = z if over[1] == 0 else z[0]

    def outputs(p, z):
        return functional_call(parts[0], (p, {}), (z,))

    def task(p, z):
        out = outputs(p, z)
        return out.z_q.pow(2).sum() + out.loss

    stacked = vmap(outputs, over)(parameters, z)
    to_parameters, to_z = vmap(grad(task, (0, 1)), over)(parameters, z)
    for i in range(3):
        own = {name: t if over[0] is None else t[i] for name, t in parameters.items()}
        own = {name: t.detach().clone().requires_grad_() for name, t in own.items()}
        x = (z if over[1] is None else z[i]).clone().requires_grad_()
        one = outputs(own, x)
        assert torch.equal(stacked.z_q[i], one.z_q) and torch.equal(stacked.codes[i], one.codes)
        assert abs(stacked.loss[i] - one.loss) < 1e-13
        wanted = torch.autograd.grad(one.z_q.pow(2).sum() + one.loss, (x, *own.values()))
        assert torch.allclose(to_z[i], wanted[0], atol=1e-13)
        for name, of_name in zip(own, wanted[1:]):
            assert torch.allclose(to_parameters[name][i], of_name, atol=1e-13), name


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_gradients_pass_through_a_vmap_and_many_at_once(options):
    "Plain autograd around vmap; a Jacobian, whose backward pass is mapped."
    torch.manual_seed(0)
    quantizer = RouterQuantizer(4, 9, check_finite=False, init_scale=1.0, **options).double()
    z = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    leaves = (z, *quantizer.parameters())
    around = vmap(lambda z: quantizer(z).z_q)(z).pow(3).sum()
    wanted = torch.autograd.grad(quantizer(z).z_q.pow(3).sum(), leaves)
    for ours, whole in zip(torch.autograd.grad(around, leaves), wanted):
        assert torch.allclose(ours, whole, atol=1e-12)
    one = z[0, :1].detach()
    jacobian = jacrev(lambda z: quantizer(z).z_q)(one)[0, :, 0]
    leaf = one.clone().requires_grad_()
    q = quantizer(leaf).z_q[0]
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0][0] for value in q]
    assert torch.allclose(jacobian, torch.stack(rows), atol=1e-13)


def test_vmap_within_vmap_and_without_gradients():
    torch.manual_seed(0)
    x, W, E = torch.randn(2, 3, 5, 4), torch.randn(9, 4), torch.randn(9, 3)
    codes = (x @ W.T).argmax(-1)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            q, found = vmap(vmap(lambda x: routed(x, W, None, E)))(x)
        assert torch.equal(found, codes) and torch.equal(q, E[codes])


def test_a_router_without_a_decoder_gradient_learns_nothing():
    quantizer, z = RouterQuantizer(8, 16, bias=True), torch.randn(5, 8, requires_grad=True)
    (quantizer(z).z_q * 0).sum().backward()
    assert not z.grad.any() and not any(p.grad.any() for p in quantizer.parameters())


def test_sharp_takes_any_mixture():
    E, mixture = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    codes, g = torch.tensor([0, 5, 5, 2]), torch.randn(4, 3)
    sharp(mixture, codes, E).backward(g)
    assert torch.equal(mixture.grad, g)
    assert torch.allclose(E.grad, torch.zeros(6, 3).index_add_(0, codes, g))


def test_a_tied_router_and_a_copy_start_alike():
    torch.manual_seed(0)
    tied = RouterQuantizer(8, 16, tied=True, init_scale=1.0)
    copied = RouterQuantizer(8, 16, init="copy", init_scale=1.0)
    with torch.no_grad():
        copied.book.weight.copy_(tied.book.weight)
        copied.keys.copy_(tied.book.weight)
    z = torch.randn(20, 8)
    outputs = [quantizer(z).z_q for quantizer in (tied, copied)]
    for z_q in outputs:
        z_q.pow(2).sum().backward()
    assert torch.equal(*outputs)
    both, of_table = tied.book.weight.grad, copied.book.weight.grad
    assert torch.allclose(both, of_table + copied.keys.grad, atol=1e-5)
    assert F.cosine_similarity(both.flatten(), of_table.flatten(), dim=0) < 1


# --- As released

IBQ = dict(double_loss=1.0, entropy=0.05, entropy_eps=1e-5)


def compared(out, theirs, leaves, g):
    "The largest differences of value, loss, and the gradients of the task and of the loss."
    z_q, codes, loss = theirs
    assert torch.equal(out.codes, codes)
    pairs = [(out.z_q, z_q), (out.loss, loss)]
    for ours, wanted in (((out.z_q * g).sum(), (z_q * g).sum()), (out.loss, loss)):
        found = torch.autograd.grad(ours, leaves, retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(wanted, leaves, retain_graph=True, allow_unused=True)
        pairs += [pair for pair in zip(found, other) if pair[1] is not None]
    return [(a - b).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("n,d,k", [(40, 5, 9), (200, 16, 64)])
def test_a_tied_router_with_ibqs_losses_is_ibq(n, d, k):
    torch.manual_seed(0)
    quantizer = recipe("router + tied", d, k, init_scale=1.0, **IBQ).double()
    z, g = torch.randn(2, n, d, dtype=torch.float64)
    leaves = (z.requires_grad_(), quantizer.book.weight)
    largest = compared(quantizer(z), released_ibq(z, quantizer.book.weight), leaves, g)
    assert max(largest) < 1e-13, largest
    for left_out in IBQ:
        other = recipe("router + tied", d, k, **IBQ | {left_out: 0.0}).double()
        other.load_state_dict(quantizer.state_dict())
        assert abs(other(z).loss - quantizer(z).loss) > 1e-7, left_out


def test_the_double_loss_reaches_every_code_and_the_commitment_the_chosen_ones():
    torch.manual_seed(0)
    z = torch.randn(6, 4)
    for losses, everywhere in (({"double_loss": 1.0}, True), ({"alpha": 1.25}, False)):
        quantizer = RouterQuantizer(4, 32, tied=True, **losses)
        out = quantizer(z)
        out.loss.backward()
        moved = quantizer.book.weight.grad.abs().sum(1) > 0
        assert moved.all() if everywhere else moved.sum() == len(out.codes.unique()) < 32


def test_no_keyword_of_vqs_commitment_loss_reaches_a_router():
    "A notebook hands its alpha and beta to every recipe that takes them."
    assert not {"alpha", "beta"} & set(keywords("router + tied"))


def test_what_1e_5_inside_the_logarithm_does_at_2_18_codes():
    "One vector, k numbers: log k less log(1 / (1/k + 1e-5)), and 0.476 of the push."
    torch.manual_seed(0)
    k, p, eps = 2**18, 2**-18, 1e-5
    zero, nearly = torch.zeros(k, 1, dtype=torch.float64), 1e-3 * torch.randn(k, 1).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    assert entropy_term(one, zero, eps=eps).item() == pytest.approx(math.log(k) + math.log(p + eps))
    assert round(math.log(k), 2) == 12.48 and round(-math.log(p + eps), 2) == 11.19
    keys = nearly.clone().requires_grad_()
    q = keys.T.softmax(1)
    exact = torch.autograd.grad(-(q * q.log()).sum(), keys)[0]
    # of one vector the two exact entropies cancel; with eps the second has only this share
    left = torch.autograd.grad(entropy_term(one, keys, eps=eps), keys)[0]
    share = p * (p + 2 * eps) / (p + eps) ** 2
    assert round(share, 3) == 0.476
    assert torch.allclose(left, (1 - share) * exact, rtol=1e-2, atol=1e-3 * exact.abs().max())


def test_sq_variant_3_with_its_head_frozen_has_the_variance_of_their_variant_1():
    "Their public code adds exp(0) there: 1 + exp(s)."
    quantizer, x = SQQuantizer(6, 50, variant=3), torch.randn(5, 6)
    quantizer.head.requires_grad_(False)
    quantizer.log_scale.data.fill_(-1.0)
    assert torch.allclose(quantizer.variance(x), torch.full((5, 6), 1 + math.exp(-1.0)))
    assert torch.allclose(SQQuantizer(6, 50, variant=1).variance(x), torch.full((5, 6), 20.0))


@pytest.mark.parametrize("hard", [True, False])
def test_agrees_with_torch_gumbel_softmax(hard):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(6, 12, kl=0.0, hard=hard, temperature=0.7)
    z, g = torch.randn(50, 6, requires_grad=True), torch.randn(50, 6)
    torch.manual_seed(1)
    out = quantizer(z)
    torch.manual_seed(1)
    weights = F.gumbel_softmax(quantizer.head(z), tau=0.7, hard=hard)
    theirs = weights @ quantizer.codebook
    assert torch.equal(out.codes, weights.argmax(1))
    assert torch.allclose(out.z_q, theirs, atol=1e-5)
    leaves = (z, *quantizer.parameters())
    grads = (torch.autograd.grad(q, leaves, g) for q in (out.z_q, theirs))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))


# ---- bfloat16 products ----


def in_bfloat16(tensor):
    "Rounded, as the operand of a product whose sums are float32."
    return tensor.bfloat16().float()


def router_written_out(x, keys, codebook, g, operand):
    "Codes, and the gradients to z and W, of a dense router whose five products take `operand`s."
    x, keys, codebook, g = map(operand, (x, keys, codebook, g))
    logits = x @ keys.T
    p = logits.softmax(1)
    s = (g * (operand(p) @ codebook)).sum(1, keepdim=True)
    dlogits = operand(p * (g @ codebook.T - s))
    return logits.argmax(1), dlogits @ keys, dlogits.T @ x


def vectors_and_tables(sharpness):
    "z, W, E and the gradient at the decoder's input; W as a router draws it, times `sharpness`."
    generator = torch.Generator().manual_seed(1)
    x, keys, codebook, g = (torch.randn(n, 64, generator=generator) for n in (512, 4096, 4096, 512))
    return x, keys * sharpness / 8, codebook, g


def cosine(a, b):
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("sharpness, least", [(1.0, 0.9999), (4.0, 0.9999), (8.0, 0.999)])
def test_products_in_bfloat16_would_leave_the_routers_gradient_as_it_is(sharpness, least):
    """Operands rounded to bfloat16, sums in float32: to z and W the cosine is .99999 at the start.

    With keys 8 times as sharp it is .9999; one code in 170 is another at every sharpness. To E g
    goes without a product, so that only those codes change it (cosine .995). By its gradient such
    a router would serve, then. It has no option for it, and the study's cells stay in float32.
    """
    given = vectors_and_tables(sharpness)
    codes, *whole = router_written_out(*given, operand=lambda tensor: tensor)
    other, *rounded = router_written_out(*given, operand=in_bfloat16)
    assert min(map(cosine, whole, rounded)) > least
    assert float((codes != other).double().mean()) < 0.03
    to_codes = (torch.zeros(4096, 64).index_add_(0, c, given[3]) for c in (codes, other))
    assert cosine(*to_codes) > 0.99


def test_with_float32_products_the_bfloat16_form_is_the_router():
    x, keys, codebook, g = vectors_and_tables(1.0)
    codes, *wanted = router_written_out(x, keys, codebook, g, operand=lambda tensor: tensor)
    leaves = x.requires_grad_(), keys.requires_grad_()
    z_q, chosen = routed(*leaves, None, codebook)
    assert torch.equal(chosen, codes)
    for found, grad in zip(torch.autograd.grad(z_q, leaves, g), wanted):
        assert torch.allclose(found, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
