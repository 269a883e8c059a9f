"""Tiles of scores, and the search kernel, run by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from unittest import mock
import pytest
import torch
from vqstudy import kernels
from vqstudy.search import distances, nearest, two_nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def contract(z, codebook):
    return 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())


@pytest.mark.parametrize("n,k,tile_n,tile_k", [(1, 1, 5, 5), (7, 9, 3, 4), (8, 6, 4, 2)])
def test_tiles_cover_each_score_once(n, k, tile_n, tile_k):
    seen, starts = torch.zeros(n, k), []
    for rows, codes in kernels.tiles(n, k, tile_n, tile_k):
        assert 0 < rows.stop - rows.start <= tile_n and 0 < codes.stop - codes.start <= tile_k
        seen[rows, codes] += 1
        starts.append((codes.start, rows.start))
    assert (seen == 1).all() and starts == sorted(starts)


# ---- run in the interpreter: `python test_kernels.py DTYPE` ----


def against_torch(n, k, d, dtype):
    torch.manual_seed(n + k + d)
    z, keys = torch.randn(d, n).to(dtype).T, torch.randn(k, d).to(dtype)
    offset = keys.float().pow(2).sum(1) / -2
    best, second, codes = kernels.fused_scan(z, keys, offset)
    scores = torch.addmm(offset.double(), z.double(), keys.double().T)
    radius = keys.double().norm(dim=1).max()
    bound = 1e-6 * (d + 4) * (z.double().norm(dim=1) + radius) * radius
    assert ((scores.gather(1, codes[:, None])[:, 0] - best).abs() <= bound).all()
    assert ((scores.amax(1) - best).abs() <= bound).all()
    if k == 1:
        assert (second == -torch.inf).all()
        return
    assert ((scores.topk(2).values[:, 1] - second).abs() <= bound).all()


def ties(n, k, d, dtype):
    "Of small integers every sum is exact, in each dtype and with wider keys."
    torch.manual_seed(n)
    z, keys = (torch.randint(-2, 3, (m, d)).to(dtype) for m in (n, k))
    offset = keys.float().pow(2).sum(1) / -2
    scores = torch.addmm(offset, z.float(), keys.float().T)
    order = scores.sort(dim=1, descending=True, stable=True)
    for given in (keys, keys.float()):
        best, second, codes = kernels.fused_scan(z, given, offset)
        assert torch.equal(torch.stack([best, second], 1), order.values[:, :2])
        assert torch.equal(codes, order.indices[:, 0])
        others = kernels.fused_scan(z, given, offset, skip=codes)[2]
        assert torch.equal(others, order.indices[:, 1])


def inside_nearest(n, k, d, dtype, metric):
    "The search with the kernel, in one tile of codes and in several, beside the search without."
    torch.manual_seed(n + d)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    near = distances(z, codebook, nearest(z, codebook, metric), metric)
    chosen = nearest(z, codebook, metric, exact=True)
    pair = two_nearest(z, codebook, metric, exact=True)
    for budget in (2**26, 40 * 16 * d):
        with mock.patch.object(kernels, "_fused", lambda z: True):
            codes = nearest(z, codebook, metric, budget=budget)
            assert torch.equal(nearest(z, codebook, metric, exact=True, budget=budget), chosen)
            assert torch.equal(two_nearest(z, codebook, metric, exact=True, budget=budget), pair)
        excess = (distances(z, codebook, codes, metric) - near).abs()
        assert (excess <= 2 * contract(z, codebook).max()).all()


def check_all(dtype):
    torch.set_num_threads(1)
    for size in [(1, 1, 1), (1, 7, 3), (5, 1, 3), (65, 131, 1), (130, 257, 64), (20, 50, 511)]:
        against_torch(*size, dtype)
    ties(70, 200, 3, dtype)
    inside_nearest(70, 131, 16, dtype, "euclidean")
    inside_nearest(70, 131, 5, dtype, "cosine")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_in_the_interpreter(dtype):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, dtype]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---- on a GPU, and without Triton ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(
    "n,k,d",
    [(1, 1, 1), (33, 65, 1), (1000, 1000, 3), (257, 129, 64), (64, 50, 511), (4096, 8192, 64)],
)
def test_gpu_agrees_with_cpu(n, k, d, dtype):
    torch.manual_seed(0)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    exact = nearest(z, codebook, exact=True)
    assert torch.equal(nearest(z.cuda(), codebook.cuda(), exact=True).cpu(), exact)
    codes = nearest(z.cuda(), codebook.cuda()).cpu()
    far, least = (distances(z.double(), codebook.double(), c) for c in (codes, exact))
    assert (far - least <= contract(z, codebook)).all()


WITHOUT_TRITON = """
import sys
sys.modules['triton'] = None
import torch
from vqstudy.search import nearest
nearest(torch.randn(5, 3), torch.randn(4, 3))
"""


def test_search_does_not_import_triton():
    assert subprocess.run([sys.executable, "-c", WITHOUT_TRITON]).returncode == 0


if __name__ == "__main__":
    check_all(DTYPES[sys.argv[1]])
