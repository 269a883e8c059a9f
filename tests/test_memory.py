"""Memory beyond what goes in.

Each case of memory runs in a process of its own, against a ceiling far below the n x k matrix.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock
import pytest
import torch
from vqstudy.router import RouterQuantizer
from vqstudy.lattice import LFQ
from vqstudy.quantizers import recipe
from vqstudy.search import nearest
from vqstudy.vector import sample_codes

N, K, D = 4096, 32768, 64  # an n x k matrix of float32 takes 512 MiB
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def vectors(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    "Normal vectors, filled a few at a time, so that making them takes no more than they do."
    x = torch.empty(n, d, dtype=dtype)
    for part in x.split(1024):
        part.normal_()
    return x


def looked_up(**options: Any) -> Callable:
    return lambda codebook, z: nearest(z, codebook, **options)


def drawn(codebook: torch.Tensor, z: torch.Tensor) -> None:
    sample_codes(z, codebook, torch.tensor(1.0))


def step(quantizer: torch.nn.Module, z: torch.Tensor) -> None:
    out = quantizer(z.requires_grad_())
    (out.z_q.sum() + out.loss).backward()


def two_steps(quantizer: torch.nn.Module, z: torch.Tensor) -> None:
    for _ in range(2):
        step(quantizer, z)


class Case(NamedTuple):
    build: Callable  # what is searched or trained
    run: Callable  # what is measured, of it and of vectors
    ceiling: float  # MiB
    n: int = N
    d: int = D
    dtype: torch.dtype = torch.float32


CASES = {
    "search": Case(lambda: vectors(16_384, 4), looked_up(), 64, 100_000, 4),
    "search, wide": Case(
        lambda: vectors(65_536, 600, torch.bfloat16), looked_up(), 64, 300, 600, torch.bfloat16
    ),
    "search, exact": Case(lambda: vectors(3000, 256), looked_up(exact=True), 64, 20_000, 256),
    "search, long": Case(lambda: vectors(20, 4), looked_up(), 64, 2_000_000, 4),
    "search, bfloat16": Case(
        lambda: vectors(3000, 64), looked_up(precision="bfloat16"), 64, 200_000, 64
    ),
    "drawn codes": Case(lambda: vectors(K, D), drawn, 160),
    "vq": Case(lambda: recipe("vq + ema + replace", D, K), two_steps, 100),
    "vq by its loss": Case(lambda: recipe("vq + rotation + l2", D, K), step, 130),
    "vq, diversity": Case(lambda: recipe("vq + diversity", D, K), step, 150),
    "stochastic": Case(lambda: recipe("stochastic", D, K), step, 150),
    "router": Case(lambda: RouterQuantizer(D, K, bias=True), step, 120),
    "router, tied": Case(lambda: RouterQuantizer(D, K, tied=True), step, 120),
    "router, switch": Case(lambda: RouterQuantizer(D, K, gate="switch"), step, 120),
    "router, entropy": Case(lambda: RouterQuantizer(D, K, entropy=0.1), step, 120),
    "lfq": Case(lambda: LFQ(D, 2**18), step, 200),
    "matrix": Case(lambda: vectors(K, D), lambda c, z: (z @ c.T).argmax(1), torch.inf),
}


def peak() -> float:
    "MiB of resident memory at its highest, since the start or the last reset."
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def growth(name: str) -> float:
    "MiB by which the peak of this process rises in one case."
    torch.manual_seed(0)
    case = CASES[name]
    z, built = vectors(case.n, case.d, case.dtype), case.build()
    # what the libraries keep after their first call is no call's own memory
    nearest(torch.randn(3000, case.d), torch.randn(3000, case.d), exact=True)
    codes = torch.zeros(case.n, dtype=torch.int64)  # room that is there when the result comes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = peak()
    case.run(built, z)
    return peak() - before


@pytest.fixture(scope="module")
def fresh_process() -> Callable:
    "Runs a function in a new process, forked from one that has imported all and run nothing."
    context = get_context("forkserver")
    context.set_forkserver_preload(["vqstudy.quantizers"])
    # glibc returns what is freed to the system, and so the peak is what is held at once
    returned = mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    with returned, ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=300)


@linux
@pytest.mark.parametrize("name", [name for name in CASES if name != "matrix"])
def test_extra_memory(name, fresh_process):
    assert fresh_process(growth, name) <= CASES[name].ceiling


@linux
def test_the_measure_sees_a_matrix_of_n_by_k(fresh_process):
    assert fresh_process(growth, "matrix") > 500
