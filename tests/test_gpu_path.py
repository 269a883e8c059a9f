"""The GPU's own path without a GPU: nothing is left on the CPU, and no step waits for the device.

Forward on fake CUDA tensors; backward on the meta device, since autograd's engine wants a real
device. The library's operators are looked into.
"""

from collections.abc import Callable
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensorMode
from devices import AnyGrid, NoQuestions, OnDevice, bfloat16_autocast, pretended
from vqstudy import kernels
from vqstudy.base import Quantized
from vqstudy.composed import GroupQuantizer, ResidualQuantizer
from vqstudy.kernels import on_gpu, operator
from vqstudy.lattice import BSQ, FSQ
from vqstudy.quantizers import recipe, recipes
from vqstudy.router import RouterQuantizer
from vqstudy.vector import VectorQuantizer

DIM, K = 8, 64
BUILT = {
    "router, entropy": lambda: RouterQuantizer(DIM, K, bias=True, entropy=0.1, alpha=1.0),
    "groups of fsq": lambda: GroupQuantizer(DIM, K, make=FSQ),
    "levels of bsq": lambda: ResidualQuantizer(DIM, K, make=BSQ, dropout=True),
    "cosine": lambda: VectorQuantizer(DIM, K, metric="cosine"),
}
every = pytest.mark.parametrize("name", [*recipes(), *BUILT])


def build(name: str, device: str) -> nn.Module:
    with torch.device(device):
        quantizer = BUILT[name]() if name in BUILT else recipe(name, DIM, K)
    if "exact" in name or "hessian" in name:
        quantizer.attach(lambda q: q.square().mean())
    return quantizer


def step(quantizer: nn.Module, z: Tensor) -> Quantized:
    result = quantizer(z)
    (result.z_q.sum() + result.loss).backward()
    return result


@pytest.mark.parametrize("dtype,triton", [(torch.float32, True), (torch.bfloat16, False)])
@every
def test_forward(name, dtype, triton):
    "Two training steps and an evaluation; built on the device, run without naming it."
    with pretended("cuda", triton):
        quantizer, z = build(name, "cuda"), torch.empty(2, 4, 4, DIM, device="cuda", dtype=dtype)
        with bfloat16_autocast("cuda"), OnDevice("cuda"):
            torch.set_autocast_enabled("cuda", dtype == torch.bfloat16)
            for _ in range(2):
                result = quantizer(z)
            quantizer.eval()
            evaluated = quantizer(z)
            codes = quantizer.encode(z)
            decoded = evaluated.z_q if name == "none" else quantizer.decode(codes)
    for seen in (result, evaluated):
        assert seen.z_q.dtype == dtype and seen.loss.dtype == torch.float32
        assert {x.device.type for x in seen} == {"cuda"}
    assert codes.shape == evaluated.codes.shape and decoded.shape == evaluated.z_q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_backward(name, dtype):
    with pretended("meta"):
        quantizer = build(name, "meta")
        z = torch.empty(2, 4, 4, DIM, device="meta", dtype=dtype, requires_grad=True)
        with OnDevice("meta"):
            step(quantizer, z)
    grads = [p.grad for p in quantizer.parameters() if p.grad is not None]
    assert {x.device.type for x in (z.grad, *grads)} == {"meta"}


@every
def test_backward_of_values_asks_for_none(name):
    quantizer, z = build(name, "cpu"), torch.randn(2, 4, 4, DIM, requires_grad=True)
    result = quantizer(z)
    with NoQuestions():
        (result.z_q.sum() + result.loss).backward()
    assert z.grad.isfinite().all()


# ---- what is planted is found ----

CPU_FAULTS = {
    "made on the CPU": lambda x: torch.zeros(len(x)),
    "a number made on the CPU": lambda x: x * torch.tensor(2.0),
    "moved to the CPU": lambda x: x.cpu(),
    "copied from a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "places on the CPU": lambda x: x[torch.arange(2)],
}
QUESTIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x[0, 0]),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "write through a mask": lambda x: x.clone().index_put_((x > 0,), x.sum()),
    "unique": lambda x: x.unique(),
    "list": lambda x: x.sum(1).tolist(),
}
FAULTS = (AssertionError, DataDependentOutputException, DynamicOutputShapeException)


class Planted(VectorQuantizer):
    fault: Callable[[Tensor], object]

    def nearest(self, x: Tensor, table: Tensor) -> Tensor:
        type(self).fault(x)
        return super().nearest(x, table)


def planted(fault: Callable[[Tensor], object], device: str) -> nn.Module:
    with torch.device(device):
        return type("Faulty", (Planted,), {"fault": staticmethod(fault)})(DIM, K)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fault", [*CPU_FAULTS, *QUESTIONS])
def test_a_fault_of_the_forward_is_seen(fault, training):
    wrong = (CPU_FAULTS | QUESTIONS)[fault]
    with pretended("cuda"), pytest.raises(FAULTS):
        quantizer, z = planted(wrong, "cuda").train(training), torch.empty(2, DIM, device="cuda")
        with OnDevice("cuda"):
            quantizer(z)


# a list comes to the meta device without a copy: the forward sees that one
@pytest.mark.parametrize("fault", sorted({*CPU_FAULTS, *QUESTIONS} - {"copied from a list"}))
def test_a_fault_of_the_backward_is_seen(fault):
    wrong = (CPU_FAULTS | QUESTIONS)[fault]

    def rule(z: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        wrong(g)
        return g, torch.zeros_like(q)

    with pretended("meta"):
        with torch.device("meta"):
            quantizer = VectorQuantizer(DIM, K, rule=rule)
        z = torch.empty(2, DIM, device="meta", requires_grad=True)
        with OnDevice("meta"), pytest.raises((*FAULTS, NotImplementedError)):
            step(quantizer, z)


@operator("(Tensor x, str fault) -> Tensor", like=lambda x, fault: torch.empty_like(x))
def _faulty(x, fault):
    (CPU_FAULTS | QUESTIONS | {"none": lambda x: None, "shape": lambda x: None})[fault](x)
    return x.clone() if fault != "shape" else x[:1].clone()


@pytest.mark.parametrize("fault", [*CPU_FAULTS, *QUESTIONS, "shape"])
def test_a_fault_inside_an_operator_is_seen(fault):
    with pretended("cuda"), OnDevice("cuda"):
        x = torch.empty(2, DIM, device="cuda")
        _faulty(x, "none")
        with pytest.raises(FAULTS):
            _faulty(x, fault)


def test_a_product_in_bfloat16_is_seen():
    with pretended("cuda"), bfloat16_autocast("cuda"), OnDevice("cuda"):
        x = torch.empty(2, DIM, device="cuda")
        with pytest.raises(AssertionError, match="bfloat16"):
            x @ x.T


def test_a_kernel_launched_with_a_tensor_on_the_cpu_is_seen():
    with FakeTensorMode(), pytest.raises(AssertionError, match="tensor on cpu"):
        AnyGrid()[(1,)](torch.empty(2, device="cuda"), torch.empty(2), 3)


def test_the_library_asks_one_function_for_the_gpu(monkeypatch):
    x = torch.empty(2, device="meta")
    assert not on_gpu(x) and not on_gpu(torch.empty(2))
    monkeypatch.setattr(kernels, "GPU_TYPES", ("cuda", "meta"))
    assert on_gpu(x) and not on_gpu(torch.empty(2))
