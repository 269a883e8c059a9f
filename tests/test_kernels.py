"""The fused search kernel, run by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
import pytest
import torch

pytest.importorskip("triton")

CHECK = """
import sys, torch
from vqstudy import search
from vqstudy.kernels import fused_scan
from vqstudy.search import nearest, two_nearest
torch.set_num_threads(1)

def against_torch(n, k, d, dtype):
    torch.manual_seed(n + k + d)
    z, keys = torch.randn(d, n).to(dtype).T, torch.randn(k, d).to(dtype)
    offset = keys.float().pow(2).sum(1) / -2
    best, second, codes = fused_scan(z, keys, offset)
    scores = torch.addmm(offset.double(), z.double(), keys.double().T)
    bound = 1e-6 * (d + 4) * (z.double().norm(dim=1) + keys.double().norm(dim=1).max()) * keys.double().norm(dim=1).max()
    assert ((scores.gather(1, codes[:, None])[:, 0] - best).abs() <= bound).all() and ((scores.amax(1) - best).abs() <= bound).all()
    if k > 1: assert ((scores.topk(2).values[:, 1] - second).abs() <= bound).all()
    else: assert (second == -torch.inf).all()
    if dtype != torch.float32: assert torch.equal(fused_scan(z, keys.float(), offset)[2], codes)

def ties(n, k, d):
    z, keys = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (k, d)).float()  # every sum is exact
    offset = keys.pow(2).sum(1) / -2
    best, second, codes = fused_scan(z, keys, offset)
    order = torch.addmm(offset, z, keys.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(codes, order.indices[:, 0]) and torch.equal(second, order.values[:, 1])
    assert torch.equal(fused_scan(z, keys, offset, skip=codes)[2], order.indices[:, 1])

def inside_nearest(n, k, d, dtype, metric):
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    found = [(nearest(z, codebook, metric), nearest(z, codebook, metric, exact=True), two_nearest(z, codebook, metric, exact=True))]
    search._fused = lambda z: True
    for budget in (2**26, 40 * 16 * d): found.append((nearest(z, codebook, metric, budget=budget), nearest(z, codebook, metric, exact=True), two_nearest(z, codebook, metric, exact=True, budget=budget)))
    for other in found[1:]: assert all(torch.equal(a, b) for a, b in zip(found[0][1:], other[1:]))
    chosen = [search.distances(z, codebook, codes, metric) for codes, *_ in found]
    for other in chosen[1:]: assert (other - chosen[0]).abs().max() <= 8e-7 * (z.float().pow(2).sum(1).max() + codebook.float().pow(2).sum(1).max())

for name in ("float32", "bfloat16", "float16"): exec(sys.argv[1].replace("DTYPE", "torch." + name))
"""


@pytest.mark.parametrize(
    "call",
    [
        *(
            f"against_torch({n}, {k}, {d}, DTYPE)"
            for n, k, d in [
                (1, 1, 1),
                (1, 7, 3),
                (5, 1, 3),
                (65, 131, 1),
                (130, 257, 64),
                (20, 50, 511),
            ]
        ),
        "ties(70, 200, 3)",
        "inside_nearest(70, 131, 16, DTYPE, 'euclidean')",
        "inside_nearest(70, 131, 5, DTYPE, 'cosine')",
    ],
)
def test_kernel_in_the_interpreter(call):
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, call],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "n,k,d",
    [(1, 1, 1), (33, 65, 1), (1000, 1000, 3), (257, 129, 64), (64, 50, 511), (4096, 8192, 64)],
)
def test_gpu_agrees_with_cpu(n, k, d, dtype):
    from vqstudy.search import distances, nearest

    torch.manual_seed(0)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    exact = nearest(z, codebook, exact=True)
    assert torch.equal(nearest(z.cuda(), codebook.cuda(), exact=True).cpu(), exact)
    excess = distances(
        z.double(), codebook.double(), nearest(z.cuda(), codebook.cuda()).cpu()
    ) - distances(z.double(), codebook.double(), exact)
    assert (
        excess <= 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())
    ).all()


def test_search_does_not_import_triton():
    code = "import sys; sys.modules['triton'] = None; import torch\nfrom vqstudy.search import nearest\nnearest(torch.randn(5, 3), torch.randn(4, 3)); assert 'vqstudy.kernels' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
