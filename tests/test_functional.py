"""torch.func over stacked codebooks, and properties that hold for any input."""

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap
from test_estimators import RULES
from vqstudy.estimators import estimate, exact, hessian, rotation, synchronized
from vqstudy.measure import code_counts, perplexity, usage
from vqstudy.quantizers import recipe, recipes
from vqstudy.search import nearest
from vqstudy.vector import VectorQuantizer

rules = pytest.mark.parametrize("name", RULES)


# ---- torch.func ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("budget", [64 * 2**20, 1])
def test_nearest_over_stacked_codebooks(metric, budget):
    torch.manual_seed(0)
    z, codebooks = torch.randn(5, 40, 8), torch.randn(5, 16, 8)
    search = lambda z, codebook: nearest(z, codebook, metric, budget=budget, check_finite=False)
    both = torch.stack([search(*pair) for pair in zip(z, codebooks)])
    assert torch.equal(vmap(search)(z, codebooks), both)
    of_one_batch = torch.stack([search(z[0], c) for c in codebooks])
    assert torch.equal(vmap(search, (None, 0))(z[0], codebooks), of_one_batch)
    in_one_codebook = torch.stack([search(x, codebooks[0]) for x in z])
    assert torch.equal(vmap(search, (0, None))(z, codebooks[0]), in_one_codebook)


def test_what_nearest_cannot_do_under_vmap():
    "A look at values; torch says so."
    z, codebooks = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        vmap(nearest)(z, codebooks)
    exact = lambda z, c: nearest(z, c, exact=True, check_finite=False)
    each = torch.stack([exact(*pair) for pair in zip(z, codebooks)])
    assert torch.equal(vmap(exact)(z, codebooks), each)


@rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_estimate_under_vmap_and_grad_equals_a_loop(name, dtype):
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 4, 6, 5).to(dtype)
    z[0, 0], q[0, 1], q[1, 0] = 0, 0, -z[1, 0]  # the corners too
    task = lambda z, q, g: (estimate(z, q, RULES[name]) * g).sum()
    loop = []
    for a, b, c in zip(z.clone().requires_grad_(), q.clone().requires_grad_(), g):
        loop.append(torch.autograd.grad(task(a, b, c), (a, b)))
    loop = [torch.stack(grads) for grads in zip(*loop)]
    assert torch.equal(vmap(lambda z, q: estimate(z, q, RULES[name]))(z, q), q)
    for ours, theirs in zip(vmap(grad(task, (0, 1)))(z, q, g), loop):
        assert torch.allclose(ours, theirs, rtol=1e-12)
    one_by_one = zip(*(grad(task, (0, 1))(*one) for one in zip(z, q, g)))
    assert all(torch.equal(torch.stack(a), b) for a, b in zip(one_by_one, loop))
    a, b = z.clone().requires_grad_(), q.clone().requires_grad_()
    stacked = vmap(lambda z, q: estimate(z, q, RULES[name]))(a, b)
    around = torch.autograd.grad((stacked * g).sum(), (a, b))
    for ours, theirs in zip(around, loop):
        assert torch.allclose(ours, theirs, rtol=1e-12)


@rules
def test_one_z_for_many_q(name):
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64)
    q, g = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    task = lambda z, q, g: (estimate(z, q, RULES[name]) * g).sum()
    ours = vmap(grad(task, (0, 1)), (None, 0, 0))(z, q, g)
    for i in range(4):
        for a, b in zip(ours, grad(task, (0, 1))(z, q[i], g[i])):
            assert torch.allclose(a[i], b, rtol=1e-12)


@pytest.mark.parametrize("rule", [exact, hessian])
def test_rules_that_ask_the_decoder_stay_outside_torch_func(rule):
    "They run autograd inside the backward pass, which torch.func refuses by name."
    z, q = torch.randn(2, 4, 3)
    with pytest.raises(RuntimeError, match="requires_grad_.*functorch transform"):
        grad(lambda z: estimate(z, q, rule(lambda v: v.pow(3).sum())).sum())(z)


def ensemble(**options):
    torch.manual_seed(0)
    parts = [VectorQuantizer(8, 16, check_finite=False, **options) for _ in range(4)]
    return parts, *stack_module_state(parts), torch.randn(4, 30, 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"l2": True},
        {"decay": 0.9},
        {"metric": "cosine"},
        {"rule": rotation()},
        {"life_span": 5},
    ],
    ids=lambda o: ", ".join(o) or "plain",
)
def test_an_ensemble_evaluates_as_one(options):
    parts, parameters, buffers, z = ensemble(**options)
    for part in parts:
        part.eval()
    stacked = vmap(lambda p, b, z: functional_call(parts[0], (p, b), (z,)))
    for part, x, (z_q, codes, loss) in zip(parts, z, zip(*stacked(parameters, buffers, z))):
        one = part(x)
        assert torch.equal(z_q, one.z_q) and torch.equal(codes, one.codes)
        assert torch.allclose(loss, one.loss)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"l2": True},
        {"rule": rotation()},
        {"rule": synchronized(0.2), "alpha": 5.0, "beta": 0.9},
    ],
    ids=lambda o: ", ".join(o) or "plain",
)
def test_an_ensemble_learns_as_one(options):
    parts, parameters, buffers, z = ensemble(**options)

    def task(p, b, z):
        result = functional_call(parts[0], (p, b), (z,))
        return result.z_q.pow(2).sum() + result.loss

    to_weights, to_z = vmap(grad(task, (0, 2)))(parameters, buffers, z)
    for i, part in enumerate(parts):
        leaf = z[i].clone().requires_grad_()
        result = part(leaf)
        (result.z_q.pow(2).sum() + result.loss).backward()
        weight = part.book.weight
        assert torch.allclose(to_z[i], leaf.grad, atol=1e-6)
        assert torch.allclose(to_weights["book.weight"][i], weight.grad, atol=1e-6)
        assert part.book.weight.grad.abs().max() > 0


# ---- properties ----

seeds, small = st.integers(0, 10**6), st.integers(1, 40)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(
    seeds,
    small,
    small,
    st.integers(1, 20),
    dtypes,
    st.booleans(),
    st.floats(-3, 3),
    st.floats(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_the_nearest_code_is_never_farther_than_any_other(
    seed, n, k, d, dtype, decided, scale, shift
):
    g = torch.Generator().manual_seed(seed)
    z, codebook = ((10**scale * torch.randn(m, d, generator=g) + shift).to(dtype) for m in (n, k))
    distance = (z.double()[:, None] - codebook.double()).pow(2).sum(-1)
    codes = nearest(z, codebook, exact=decided)
    excess = distance.gather(1, codes[:, None])[:, 0] - distance.amin(1)
    assert codes.shape == (n,) and codes.dtype == torch.int64
    size = z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max()
    assert (excess <= (0 if decided else 4e-7 * size)).all()


@given(
    st.integers(1, 60).flatmap(
        lambda k: st.tuples(st.just(k), st.lists(st.integers(0, k - 1), min_size=1, max_size=200))
    )
)
@example((1, [0]))
@example((60, [59]))
@settings(max_examples=100, deadline=None)
def test_perplexity_and_usage_lie_where_they_must(drawn):
    k, codes = drawn
    counts = code_counts(torch.tensor(codes), k)
    assert 1 - 1e-9 <= perplexity(counts) <= k * usage(counts) + 1e-9
    assert 1 / k <= usage(counts) <= min(1, len(codes) / k) + 1e-12


# lfq, bsq and the option reward diversity, and sq's posterior entropy counts against its loss:
# these may be negative. exact and hessian have vq's loss.
OTHERS = {"lfq", "bsq", "diversity", "sq", "exact", "hessian"}
NEVER_NEGATIVE = [spec for spec in recipes() if not OTHERS & set(spec.split(" + "))]


@pytest.mark.parametrize("spec", NEVER_NEGATIVE)
@given(
    seed=seeds,
    n=st.integers(1, 12),
    k=st.sampled_from([1, 2, 4, 8, 64]),
    d=st.sampled_from([2, 4, 8]),
    scale=st.floats(-2, 2),
)
@settings(max_examples=15, deadline=None)
def test_losses_are_never_negative(spec, seed, n, k, d, scale):
    torch.manual_seed(seed)
    quantizer = recipe(spec, d, 64 if spec == "fsq" else k)
    for train in (True, False):
        loss = quantizer.train(train)(10**scale * torch.randn(n, 2, 2, d)).loss
        assert loss.shape == () and loss >= 0
