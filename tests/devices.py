"""A GPU that is not there: tensors without values, on a device that nothing may wait for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vqstudy import kernels

ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_cdist_forward", "linear", "matmul"}


class NoQuestions(TorchDispatchMode):
    "Raises where a value goes to the host, or a shape depends on one."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname in INDEXING:
            # places are asked for nothing, a mask is: how many it holds
            asks = any(x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1]))
        else:
            asks = bool(ASKS & set(function.tags))
        if asks:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


class OnDevice(NoQuestions):
    """Raises, too, where a tensor is elsewhere than on the device, within operators as well.

    What an operator's body gives must look as its fake function says, and products must be of
    float32 or wider.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._check(function, "takes", (args, kwargs))
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self._check(function, "gives", result)
        body = kernels.bodies.get(function)
        if body is not None:
            with self:
                inside = body(*args, **(kwargs or {}))
            wanted, given = looks(result), looks(inside)
            assert given == wanted, f"{function} gives {given}, its fake function {wanted}"
        return result

    def _check(self, function: Callable, verb: str, values: Any) -> None:
        for x in tensors(values):
            if x.device.type != self.device:
                raise AssertionError(f"{function} {verb} a tensor on {x.device}")
            if function._opname in PRODUCTS and x.dtype in (torch.bfloat16, torch.float16):
                raise AssertionError(f"{function} {verb} {x.dtype}")


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def looks(values: Any) -> list[tuple]:
    return [(tuple(x.shape), x.dtype, x.device.type) for x in tensors(values)]


class AnyGrid:
    "Stands in for the search kernel: looks at the devices of what it is launched with."

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*args: Any) -> None:
            elsewhere = [x.device for x in tensors(args) if x.device.type == "cpu"]
            assert not elsewhere, f"the kernel is launched with a tensor on {elsewhere[0]}"

        return launch


REAL_AUTOCAST = torch.autocast


def autocast(device_type: str, *more: Any, **options: Any):
    "torch's, which knows no meta device."
    return nullcontext() if device_type == "meta" else REAL_AUTOCAST(device_type, *more, **options)


@contextmanager
def bfloat16_autocast(device: str) -> Iterator[None]:
    "As torch.autocast has it, which turns itself off where there is no GPU."
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    try:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.bfloat16)
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextmanager
def pretended(device: str, triton: bool = True) -> Iterator[None]:
    "The library takes the device, 'cuda' (fake) or 'meta', for a GPU, with Triton or without."
    spec = object() if triton else None
    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(kernels, "GPU_TYPES", ("cuda", "meta")))
        stack.enter_context(mock.patch.object(kernels, "find_spec", lambda name: spec))
        stack.enter_context(mock.patch.object(kernels, "search_kernel", AnyGrid))
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        yield
