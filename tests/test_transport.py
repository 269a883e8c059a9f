"""Sinkhorn's plan and its codes: marginals, the exact transport, the naive iterations in float64, dtypes, extremes, several processes, bad arguments."""

import os
import subprocess
import sys
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from vqstudy.search import nearest
from vqstudy.transport import sinkhorn, sinkhorn_codes


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


def authors(cost, factor, iterations):
    "The released OptVQ's plan: factor in the place of 1 / epsilon, normalised cost, a matrix that is scaled in turn."
    C = cost.double()
    C = (C - C.mean()) / (C.std() + 1e-6)
    Q = torch.exp(-(C - C.min()) * factor)
    for _ in range(iterations):
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
    return Q


SIZES = [(1, 1), (1, 5), (6, 1), (30, 7), (7, 30), (64, 64)]


@pytest.mark.parametrize("n,k", SIZES)
@pytest.mark.parametrize("iterations", [1, 5, 50])
@pytest.mark.parametrize("dtype,error", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_plan_is_the_naive_one(n, k, iterations, dtype, error):
    cost = torch.rand(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    plan = sinkhorn(cost, 0.1, iterations)
    assert (
        plan.dtype == dtype
        and np.abs(plan.double().numpy() - naive(cost, 0.1, iterations)).max() < error
    )
    assert np.abs(plan.double().numpy() - naive_log(cost, 0.1, iterations)).max() < error


@pytest.mark.parametrize("n,k", SIZES)
def test_marginals(n, k):
    plan = sinkhorn(
        torch.rand(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), 0.2, 500
    )
    assert (plan.sum(1) * n - 1).abs().max() < 1e-12 and (plan.sum(0) * k - 1).abs().max() < 1e-8
    one = sinkhorn(torch.rand(n, k, dtype=torch.float64), 0.2, 1)
    assert (one.sum(1) * n - 1).abs().max() < 1e-12  # the rows are exact at every length


@pytest.mark.parametrize("n", [5, 12])
def test_a_small_epsilon_gives_the_best_pairing(n):
    cost = torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    rows, columns = linear_sum_assignment(cost.numpy())
    assert sinkhorn(cost, 1e-3, 3000).argmax(1).tolist() == columns.tolist()


def test_cost_tends_to_the_linear_program():
    n, k = 6, 4
    cost = torch.rand(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    best = linprog(
        cost.flatten().numpy(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.r_[np.full(n, 1 / n), np.full(k, 1 / k)],
    ).fun
    gaps = [
        float((sinkhorn(cost, epsilon, 5000) * cost).sum()) - best
        for epsilon in (0.3, 0.1, 0.03, 0.01)
    ]
    assert all(a > b for a, b in zip(gaps, gaps[1:])) and 0 <= gaps[-1] < 5e-3


def test_costs_beyond_the_range_of_exp():
    cost = 1e4 * torch.rand(40, 9, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost, 0.1, 5)
    assert (
        plan.isfinite().all() and (plan.sum(1) * 40 - 1).abs().max() < 0.05
    )  # logarithms of 1e5 have 0.008 left in float32
    assert np.abs(sinkhorn(cost.double(), 0.1, 5).numpy() - naive_log(cost, 0.1, 5)).max() < 1e-10


def test_a_constant_changes_no_plan_and_a_factor_goes_with_epsilon():
    cost = torch.rand(20, 6, dtype=torch.float64)
    assert torch.allclose(
        sinkhorn(cost, 0.1), sinkhorn(cost + 7, 0.1), atol=1e-12
    ) and torch.allclose(sinkhorn(cost, 0.1), sinkhorn(3 * cost, 0.3), atol=1e-12)


@pytest.mark.parametrize("n,k,d", [(8, 4, 2), (50, 16, 4), (300, 40, 8)])
def test_codes_are_those_of_the_released_method(n, k, d):
    torch.manual_seed(n)
    x, codebook = torch.randn(n, d, dtype=torch.float64) + 1, torch.randn(k, d, dtype=torch.float64)
    cost = (x[:, None] - codebook).norm(dim=-1)
    cost_scale = cost.std(correction=0) / cost.std()  # theirs divides by the sample deviation
    plan = authors(cost, 10, 5)
    codes = sinkhorn_codes(x, codebook, 0.1 / float(cost_scale), 5)
    top = plan.topk(2, 1).values
    clear = top[:, 0] > top[:, 1] * (1 + 1e-4)  # 1e-6 is added to their deviation
    assert (
        codes.dtype == torch.int64
        and torch.equal(codes[clear], plan.argmax(1)[clear])
        and clear.double().mean() > 0.9
    )


def test_codes_are_the_argmax_of_the_plan():
    torch.manual_seed(0)
    x, codebook = torch.randn(80, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    cost = torch.cdist(x, codebook)
    assert torch.equal(
        sinkhorn_codes(x, codebook, 0.2, 7),
        sinkhorn(cost / cost.std(correction=0), 0.2, 7).argmax(1),
    )


def test_codes_share_out_what_the_nearest_code_does_not():
    torch.manual_seed(0)
    x, codebook = torch.randn(1024, 4) + 3, 0.1 * torch.randn(32, 4)
    near, sent = nearest(x, codebook), sinkhorn_codes(x, codebook, 0.05, 50)
    assert (
        len(sent.unique()) > 1.5 * len(near.unique())
        and sent.bincount(minlength=32).max() < 0.5 * near.bincount(minlength=32).max()
    )


def test_one_vector_is_spread_over_all_codes():
    "So its code says nothing: why a quantizer does not encode by the plan in evaluation."
    assert torch.allclose(sinkhorn(torch.rand(1, 7)), torch.full((1, 7), 1 / 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_decided_in_float32(dtype):
    torch.manual_seed(0)
    x, codebook = torch.randn(200, 4).to(dtype), torch.randn(16, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn_codes(x, codebook)
    assert (
        torch.equal(codes, sinkhorn_codes(x.float(), codebook.float()))
        and sinkhorn(torch.rand(4, 3).to(dtype)).dtype == torch.float32
    )


def test_all_distances_alike():
    assert torch.equal(
        sinkhorn_codes(torch.zeros(3, 2), torch.zeros(2, 2)), torch.zeros(3, dtype=torch.int64)
    )


def test_compiles_without_a_break():
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, codebook = torch.randn(60, 4), torch.randn(8, 4)
    assert torch.equal(
        torch.compile(sinkhorn_codes, fullgraph=True, backend="aot_eager")(x, codebook),
        sinkhorn_codes(x, codebook),
    )


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: sinkhorn(torch.zeros(3)), ValueError, r"cost must be \(n, k\), got shape \(3,\)"),
        (lambda: sinkhorn(torch.zeros(0, 3)), ValueError, "cost must hold at least one"),
        (lambda: sinkhorn(torch.full((2, 2), torch.nan)), ValueError, "cost must be finite"),
        (lambda: sinkhorn([[1.0]]), TypeError, "cost must be a torch.Tensor"),
        (
            lambda: sinkhorn(torch.zeros(2, 2), epsilon=-1),
            ValueError,
            "epsilon must be a positive number, got -1",
        ),
        (
            lambda: sinkhorn(torch.zeros(2, 2), epsilon="a"),
            ValueError,
            "epsilon must be a positive number, got 'a'",
        ),
        (
            lambda: sinkhorn(torch.zeros(2, 2), iterations=0),
            ValueError,
            "iterations must be at least 1, got 0",
        ),
        (
            lambda: sinkhorn(torch.zeros(2, 2), iterations=2.0),
            TypeError,
            "iterations must be an int, got 2.0",
        ),
        (
            lambda: sinkhorn_codes(torch.zeros(2, 3), torch.zeros(2, 2)),
            ValueError,
            "x must have vectors of width 2",
        ),
        (
            lambda: sinkhorn_codes(torch.zeros(2, 2), torch.zeros(0, 2)),
            ValueError,
            "codebook must hold at least one",
        ),
        (
            lambda: sinkhorn_codes(torch.full((2, 2), torch.inf), torch.zeros(2, 2)),
            ValueError,
            "x must be finite",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


RANK = """
import sys, torch, torch.distributed as dist
from vqstudy.lattice import LFQ, entropies
from vqstudy.transport import sinkhorn, sinkhorn_codes
rank, path, sizes = int(sys.argv[1]), sys.argv[2], [int(s) for s in sys.argv[3].split(",")]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(sizes))
torch.manual_seed(0)
x, codebook, logits = torch.randn(sum(sizes), 3).double(), torch.randn(6, 3).double(), torch.randn(sum(sizes), 5).double()
mine = [part[rank] for part in (x.split(sizes), logits.split(sizes))]
own = mine[1].clone().requires_grad_()
mean = entropies(own)[1]
mean.backward()
torch.save((sinkhorn(torch.cdist(mine[0], codebook)), sinkhorn_codes(mine[0], codebook), mean.detach(), own.grad * sizes[rank]), f"{path}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sizes", [[8, 8], [7, 3, 5]])
def test_several_processes_are_one_on_the_joined_batch(tmp_path, sizes):
    from vqstudy.lattice import entropies

    path, env = str(tmp_path), os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), path, ",".join(map(str, sizes))],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(sizes))
    ]
    try:
        for process in started:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    torch.manual_seed(0)
    x, codebook, logits = (
        torch.randn(sum(sizes), 3).double(),
        torch.randn(6, 3).double(),
        torch.randn(sum(sizes), 5).double().requires_grad_(),
    )
    plans, codes, means, grads = zip(
        *(torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes)))
    )
    assert torch.allclose(
        torch.cat(plans), sinkhorn(torch.cdist(x, codebook)), atol=1e-14
    ) and torch.equal(torch.cat(codes), sinkhorn_codes(x, codebook))
    mean = entropies(logits)[1]
    mean.backward()
    # each process's gradient is the joint one times (all vectors / its own): averaged over processes of one size, as DistributedDataParallel does, it is the joint one
    assert all(abs(own - mean) < 1e-12 for own in means) and torch.allclose(
        torch.cat(grads), logits.grad * sum(sizes), atol=1e-12
    )
