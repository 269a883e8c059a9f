"""Memory beyond what goes in: each piece in a process of its own, against ceilings far below the n x k matrix; and no step asks the device for a value."""

import subprocess
import sys
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from vqstudy.quantizers import recipe, recipes

FRAME = """
import torch
from vqstudy.router import RouterQuantizer
from vqstudy.lattice import LFQ
from vqstudy.quantizers import recipe
from vqstudy.search import nearest
from vqstudy.vector import StochasticQuantizer, sample_codes
def high(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
def step(q, z):
    out = q(z)
    (out.z_q.sum() + out.loss).backward()
torch.manual_seed(0)
n, k, d = {shape}
z = torch.randn(n, d, requires_grad=True)
{build}
nearest(torch.randn(300, 300), torch.randn(300, 300))  # what the first call of all loads is no call's own memory
before = high()
{run}
print(high() - before)
"""
N, K = 4096, 32768  # an n x k matrix of float32 takes 512 MiB
CASES = {  # what is built, what is measured, MiB
    "search": ("c = torch.randn(k, d)", "nearest(z.detach(), c)", 100),
    "search, exact": ("c = torch.randn(k, d)", "nearest(z.detach(), c, exact=True)", 160),
    "drawn codes": ("c = torch.randn(k, d)", "sample_codes(z.detach(), c, torch.tensor(1.0))", 160),
    "vq": ("q = recipe('vq + ema + replace', d, k)", "step(q, z), step(q, z)", 100),
    "vq by its loss": ("q = recipe('vq + rotation + l2', d, k)", "step(q, z)", 130),
    "stochastic": ("q = recipe('stochastic', d, k)", "step(q, z)", 150),
    "router": ("q = RouterQuantizer(d, k, bias=True)", "step(q, z)", 120),
    "router, tied": ("q = RouterQuantizer(d, k, tied=True)", "step(q, z)", 120),
    "router, switch": ("q = RouterQuantizer(d, k, gate='switch')", "step(q, z)", 120),
    "router, entropy": ("q = RouterQuantizer(d, k, entropy=0.1)", "step(q, z)", 120),
    "lfq": ("q = LFQ(d, 2**18)", "step(q, z)", 200),
}


def growth(build: str, run: str, shape=(N, K, 64)) -> float:
    "MiB by which the peak of resident memory rises in `run`."
    done = subprocess.run(
        [sys.executable, "-c", FRAME.format(shape=shape, build=build, run=run)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", CASES)
def test_extra_memory(name):
    build, run, ceiling = CASES[name]
    assert growth(build, run) < ceiling


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_measure_sees_a_matrix_of_n_by_k():
    assert growth("c = torch.randn(k, d)", "(z @ c.T).argmax(1)") > 500


# ---- a training step on a GPU waits for nothing ----

ASKS = {
    "vq + refit": "k-means runs on the host",
    "vq + exact": "needs a decoder",
    "vq + hessian": "needs a decoder",
}
steps = pytest.mark.parametrize("spec", [spec for spec in recipes() if spec not in ASKS])
QUESTIONS = [
    lambda x: x.sum().item(),
    lambda x: bool((x > 0).any()),
    lambda x: (x > 0).nonzero(),
    lambda x: x[x > 0],
]


@steps
def test_forward_and_upkeep_ask_for_no_value(spec):
    "On a device that is not there, with tensors that have no values, so that every question for one is an error."
    with FakeTensorMode(), torch.device("cuda"):
        quantizer, z = recipe(spec, 8, 64), torch.empty(2, 4, 4, 8, requires_grad=True)
        for _ in range(2):
            out = quantizer(z)
    assert out.z_q.shape == z.shape and out.z_q.device.type == out.loss.device.type == "cuda"


class NoQuestions(TorchDispatchMode):
    "Raises where a value goes to the host, or a shape depends on one."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@steps
def test_backward_asks_for_no_value(spec):
    quantizer, z = recipe(spec, 8, 64), torch.randn(2, 4, 4, 8, requires_grad=True)
    out = quantizer(z)
    with NoQuestions():
        (out.z_q.sum() + out.loss).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("ask", QUESTIONS)
def test_such_questions_are_seen(ask):
    with (
        FakeTensorMode(),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        ask(torch.empty(4, device="cuda"))
    with NoQuestions(), pytest.raises(AssertionError, match="waits for the device"):
        ask(torch.ones(4))
