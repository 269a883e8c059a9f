"""Sinkhorn's plan and its codes: marginals, the exact transport, naive iterations in float64.

Also OptVQ's released form with its guard, dtypes, extremes, several processes and bad arguments.
"""

import numpy as np
import pytest
import torch
from processes import in_processes
from scipy.optimize import linear_sum_assignment, linprog
from torch.func import functional_call, grad, stack_module_state, vmap
from vqstudy.lattice import entropies
from vqstudy.search import nearest
from vqstudy.transport import OptVQ, sinkhorn, sinkhorn_codes


def random_cost(n, k, dtype=torch.float64):
    return torch.rand(n, k, dtype=dtype, generator=torch.Generator().manual_seed(n))


def naive(cost, epsilon, iterations):
    "The same iterations by plain products in float64, as in Cuturi 2013."
    K, (n, k) = np.exp(-cost.double().numpy() / epsilon), cost.shape
    u = np.ones(n)
    for _ in range(iterations):
        v = 1 / k / (K.T @ u)
        u = 1 / n / (K @ v)
    return u[:, None] * K * v


def naive_log(cost, epsilon, iterations):
    "The same by loops over logarithms in float64, for costs whose exponential is 0."
    C, (n, k) = cost.double().numpy() / epsilon, cost.shape
    f, g = np.zeros(n), np.zeros(k)
    for _ in range(iterations):
        for j in range(k):
            g[j] = -np.log(k) - np.logaddexp.reduce(f - C[:, j])
        for i in range(n):
            f[i] = -np.log(n) - np.logaddexp.reduce(g - C[i])
    return np.exp(f[:, None] + g - C)


def authors(x, codebook, factor=10, iterations=5, guard=0.0):
    """OptVQ's plan in float64: normalised cost, and a matrix scaled in turn.

    factor: 1 / epsilon. guard: in the released code 1e-8 is added to each sum that divides; the
    paper's algorithm has none.
    """
    C = (x[:, None] - codebook).norm(dim=-1)
    C = (C - C.mean()) / (C.std() + 1e-6)
    Q = torch.exp(-(C - C.min()) * factor)
    Q = Q / (Q.sum() + guard)
    for _ in range(iterations):
        Q = Q / (Q.sum(0, keepdim=True) + guard) / Q.shape[1]
        Q = Q / (Q.sum(1, keepdim=True) + guard) / Q.shape[0]
    return Q


def like_theirs(x, codebook, damping=0.0):
    "Ours, at their standard deviation: of a sample, and 1e-6 more."
    cost = torch.cdist(x, codebook)
    factor = float((cost.std() + 1e-6) / cost.std(correction=0))
    return sinkhorn_codes(x, codebook, 0.1 * factor, 5, damping=damping)


def clear(plan):
    "The rows whose largest entry is not a tie up to rounding."
    top = plan.topk(2, 1).values
    return top[:, 0] > top[:, 1] * (1 + 1e-9)


SIZES = [(1, 1), (1, 5), (6, 1), (30, 7), (7, 30), (64, 64)]


@pytest.mark.parametrize("n,k", SIZES)
@pytest.mark.parametrize("iterations", [1, 5, 50])
@pytest.mark.parametrize("dtype,error", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_plan_is_the_naive_one(n, k, iterations, dtype, error):
    cost = random_cost(n, k, dtype)
    plan = sinkhorn(cost, 0.1, iterations)
    assert plan.dtype == dtype
    for written in (naive, naive_log):
        assert np.abs(plan.double().numpy() - written(cost, 0.1, iterations)).max() < error


@pytest.mark.parametrize("n,k", SIZES)
def test_marginals(n, k):
    cost = random_cost(n, k)
    one, many = sinkhorn(cost, 0.2, 1), sinkhorn(cost, 0.2, 500)
    # the rows are exact after one iteration already
    for plan in (one, many):
        assert (plan.sum(1) * n - 1).abs().max() < 1e-12
    assert (many.sum(0) * k - 1).abs().max() < 1e-8


@pytest.mark.parametrize("n", [5, 12])
def test_a_small_epsilon_gives_the_best_pairing(n):
    cost = random_cost(n, n)
    _, columns = linear_sum_assignment(cost.numpy())
    assert sinkhorn(cost, 1e-3, 3000).argmax(1).tolist() == columns.tolist()


def test_cost_tends_to_the_linear_program():
    n, k = 6, 4
    cost = torch.rand(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    sides, sums = np.vstack([rows, columns]), np.r_[np.full(n, 1 / n), np.full(k, 1 / k)]
    best = linprog(cost.flatten().numpy(), A_eq=sides, b_eq=sums).fun
    plans = (sinkhorn(cost, epsilon, 5000) for epsilon in (0.3, 0.1, 0.03, 0.01))
    gaps = [float((plan * cost).sum()) - best for plan in plans]
    assert all(a > b for a, b in zip(gaps, gaps[1:])) and 0 <= gaps[-1] < 5e-3


def test_costs_beyond_the_range_of_exp():
    cost = 1e4 * torch.rand(40, 9, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost, 0.1, 5)
    # logarithms of 1e5 have 0.008 left in float32
    assert plan.isfinite().all() and (plan.sum(1) * 40 - 1).abs().max() < 0.05
    assert np.abs(sinkhorn(cost.double(), 0.1, 5).numpy() - naive_log(cost, 0.1, 5)).max() < 1e-10


def test_a_constant_changes_no_plan_and_a_factor_goes_with_epsilon():
    cost = random_cost(20, 6)
    assert torch.allclose(sinkhorn(cost, 0.1), sinkhorn(cost + 7, 0.1), atol=1e-12)
    assert torch.allclose(sinkhorn(cost, 0.1), sinkhorn(3 * cost, 0.3), atol=1e-12)


DRAWS = [(8, 4, 2, 1.0), (50, 16, 4, 1.0), (300, 40, 8, 1.0), (200, 64, 2, 4.0)]  # n, k, d, shift


@pytest.mark.parametrize("n,k,d,shift", DRAWS)
@pytest.mark.parametrize("guard", [0.0, 1e-8, 1e-3])
def test_codes_are_those_of_the_papers_algorithm_and_of_its_guarded_form(n, k, d, shift, guard):
    "The paper's divisions have no guard, the released ones 1e-8; 1e-3 shows it in small batches."
    torch.manual_seed(n)
    x, codebook = torch.randn(n, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)
    plan = authors(x + shift, codebook, guard=guard)
    codes = like_theirs(x + shift, codebook, damping=guard)
    assert codes.dtype == torch.int64 and clear(plan).all()
    assert torch.equal(codes, plan.argmax(1))


SHARES = [  # n, k, d, shift, size of the code vectors, share of codes that the guard changes
    (1024, 1024, 8, 0.0, 1.0, 0.019),
    (1024, 256, 8, 1.0, 0.3, 0.020),
    (1024, 512, 2, 1.0, 1.0, 0.001),
    (2048, 1024, 32, 0.0, 1.0, 0.066),
]


@pytest.mark.parametrize("n,k,d,shift,size,share", SHARES)
def test_the_released_guard_changes_few_codes(n, k, d, shift, size, share):
    torch.manual_seed(0)
    codebook, x = size * torch.randn(k, d).double(), torch.randn(n, d).double() + shift
    released = authors(x, codebook, guard=1e-8)
    exact, damped = (like_theirs(x, codebook, damping) for damping in (0.0, 1e-8))
    assert clear(released).all() and torch.equal(damped, released.argmax(1))
    changed = (exact != damped).double().mean().item()
    assert share / 2 < changed < 2 * share, changed


def test_the_guard_holds_far_codes_back():
    "Of 31 codes among the vectors and a far one, which has next to no mass before it is raised."
    x = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None]
    codebook = torch.cat([torch.linspace(0, 1, 31), torch.tensor([4.0])]).double()[:, None]
    exact, guarded = (authors(x, codebook, guard=guard).sum(0) for guard in (0.0, 1e-8))
    assert (guarded / exact).argmin() == 31 and guarded[31] < 0.95 * exact[31]
    assert guarded[0] > exact[0]
    exact, damped = (like_theirs(x, codebook, damping) for damping in (0.0, 1e-8))
    assert (exact == 31).any() and not (damped == 31).any()


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_the_quantizer_trains_on_these_codes_and_evaluates_the_nearest(damping):
    torch.manual_seed(0)
    quantizer, x = OptVQ(8, 100, damping=damping), torch.randn(300, 8)
    codes = quantizer(x).codes
    assert torch.equal(codes, sinkhorn_codes(x, quantizer.codebook, damping=damping))
    assert not torch.equal(codes, sinkhorn_codes(x, quantizer.codebook, damping=1e-8 - damping))
    assert torch.equal(quantizer.eval()(x).codes, nearest(x, quantizer.codebook))


def test_codes_are_the_argmax_of_the_plan():
    torch.manual_seed(0)
    x, codebook = torch.randn(80, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    cost = torch.cdist(x, codebook)
    plan = sinkhorn(cost / cost.std(correction=0), 0.2, 7)
    assert torch.equal(sinkhorn_codes(x, codebook, 0.2, 7), plan.argmax(1))


def test_codes_share_out_what_the_nearest_code_does_not():
    torch.manual_seed(0)
    x, codebook = torch.randn(1024, 4) + 3, 0.1 * torch.randn(32, 4)
    near, sent = nearest(x, codebook), sinkhorn_codes(x, codebook, 0.05, 50)
    assert len(sent.unique()) > 1.5 * len(near.unique())
    assert sent.bincount(minlength=32).max() < 0.5 * near.bincount(minlength=32).max()


def test_one_vector_is_spread_over_all_codes():
    "So its code says nothing: why a quantizer does not encode by the plan in evaluation."
    assert torch.allclose(sinkhorn(torch.rand(1, 7)), torch.full((1, 7), 1 / 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_decided_in_float32(dtype):
    torch.manual_seed(0)
    x, codebook = torch.randn(200, 4).to(dtype), torch.randn(16, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn_codes(x, codebook)
    assert torch.equal(codes, sinkhorn_codes(x.float(), codebook.float()))
    assert sinkhorn(torch.rand(4, 3).to(dtype)).dtype == torch.float32


def test_all_distances_alike():
    codes = sinkhorn_codes(torch.zeros(3, 2), torch.zeros(2, 2))
    assert torch.equal(codes, torch.zeros(3, dtype=torch.int64))


def test_compiles_without_a_break():
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, codebook = torch.randn(60, 4), torch.randn(8, 4)
    compiled = torch.compile(sinkhorn_codes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), sinkhorn_codes(x, codebook))


ZEROS, NUMBER = torch.zeros(2, 2), "must be a finite number"
BAD = [  # make, error, message
    (lambda: sinkhorn(torch.zeros(3)), ValueError, r"cost must be \(n, k\), got shape \(3,\)"),
    (lambda: sinkhorn(torch.zeros(0, 3)), ValueError, "cost must hold at least one"),
    (lambda: sinkhorn(torch.full((2, 2), torch.nan)), ValueError, "cost must be finite"),
    (lambda: sinkhorn([[1.0]]), TypeError, "cost must be a torch.Tensor"),
    (lambda: sinkhorn(ZEROS, epsilon=-1), ValueError, f"epsilon {NUMBER} above 0, got -1"),
    (lambda: sinkhorn(ZEROS, epsilon="a"), TypeError, "epsilon must be a number, got 'a'"),
    (lambda: sinkhorn(ZEROS, iterations=0), ValueError, "iterations must be at least 1, got 0"),
    (lambda: sinkhorn(ZEROS, iterations=2.0), TypeError, "iterations must be an int, got 2.0"),
    (lambda: sinkhorn_codes(ZEROS, ZEROS, damping=-1.0), ValueError, f"damping {NUMBER} at least 0"),
    (lambda: OptVQ(2, 4, damping="a"), TypeError, "damping must be a number, got 'a'"),
    (lambda: sinkhorn_codes(torch.zeros(2, 3), ZEROS), ValueError, "x must have vectors of width 2"),
    (lambda: sinkhorn_codes(ZEROS, torch.zeros(0, 2)), ValueError, "codebook must hold at least one"),
    (lambda: sinkhorn_codes(torch.full((2, 2), torch.inf), ZEROS), ValueError, "x must be finite"),
]


@pytest.mark.parametrize("make,error,words", BAD)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


SPLITS = ([5, 5, 5], [7, 3, 5])  # of 15 vectors over three processes


def batch():
    torch.manual_seed(0)
    shapes = (15, 3), (6, 3), (15, 5)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def results(x, codebook, logits):
    "Plan, codes, entropy of the mean, and its gradient."
    logits = logits.clone().requires_grad_()
    mean = entropies(logits, among=None)[1]
    mean.backward()
    plan = sinkhorn(torch.cdist(x, codebook), among=None)
    codes = sinkhorn_codes(x, codebook, among=None)
    damped = sinkhorn_codes(x, codebook, damping=0.1, among=None)
    return plan, torch.stack([codes, damped], 1), mean.detach(), logits.grad


def parts(rank):
    "The results of one process, for each split."
    x, codebook, logits = batch()
    splits = ((x.split(sizes)[rank], codebook, logits.split(sizes)[rank]) for sizes in SPLITS)
    return [results(*part) for part in splits]


def test_several_processes_are_one_on_the_joined_batch(tmp_path):
    plan, codes, mean, grad = results(*batch())
    for sizes, ranks in zip(SPLITS, zip(*in_processes(3, tmp_path, parts, timeout=120))):
        plans, their_codes, means, grads = zip(*ranks)
        assert torch.allclose(torch.cat(plans), plan, atol=1e-14)
        assert torch.equal(torch.cat(their_codes), codes)
        assert all(abs(own - mean) < 1e-12 for own in means)
        # each gradient is the joint one times (all vectors / its own): averaged over processes of
        # one size, as DistributedDataParallel does, it is the joint one
        joint = torch.cat([own * size / 15 for own, size in zip(grads, sizes)])
        assert torch.allclose(joint, grad, atol=1e-12)


@pytest.mark.parametrize("n", [1, 20])
def test_vmap_equals_a_loop(n):
    "An ensemble in training: the codes, and the gradients to z and to the codebooks."
    torch.manual_seed(0)
    parts = [OptVQ(4, 8, check_finite=False).double() for _ in range(3)]
    parameters, buffers = stack_module_state(parts)
    z = torch.randn(3, n, 4, dtype=torch.float64)

    def outputs(p, b, z):
        return functional_call(parts[0], (p, b), (z,))

    def loss(p, b, z):
        result = outputs(p, b, z)
        return result.z_q.pow(2).sum() + result.loss

    codes = vmap(outputs)(parameters, buffers, z).codes
    to_parameters, to_z = vmap(grad(loss, (0, 2)))(parameters, buffers, z)
    for i, part in enumerate(parts):
        leaf = z[i].clone().requires_grad_()
        result = part(leaf)
        (result.z_q.pow(2).sum() + result.loss).backward()
        assert torch.equal(codes[i], result.codes)
        assert torch.allclose(to_z[i], leaf.grad, atol=1e-12)
        assert torch.allclose(to_parameters["book.weight"][i], part.book.weight.grad, atol=1e-12)
