"""Programs of torch.export for batches of any size, and one compiled graph for all of them."""

import io
import warnings
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ExportedProgram
from vqstudy.base import Quantized, Quantizer
from vqstudy.composed import GroupQuantizer, ResidualQuantizer
from vqstudy.kernels import operator
from vqstudy.lattice import BSQ, FSQ, LFQ
from vqstudy.logits import scan_logits
from vqstudy.quantizers import recipe, recipes
from vqstudy.router import RouterQuantizer
from vqstudy.upkeep import Replacement

DIM, K = 8, 64
# further members, of each kind of operator and of sum
BUILT = {
    "router, entropy": lambda: RouterQuantizer(DIM, K, bias=True, entropy=0.1),
    "lfq, a sign at a time": lambda: LFQ(DIM, K, group=1),
    "groups of fsq": lambda: GroupQuantizer(DIM, K, make=FSQ),
    "levels of bsq": lambda: ResidualQuantizer(DIM, K, make=BSQ),
    "maps": lambda: recipe("vq + l2", DIM, K, channel_dim=1),
}
# why training is not one graph for all sizes
NOT_ONE_GRAPH = {
    "vq + refit": "k-means is no graph (said by VectorQuantizer)",
    "vq + exact": "runs the decoder inside backward (said by VectorQuantizer)",
    "vq + hessian": "runs the decoder inside backward (said by VectorQuantizer)",
    "vq + deferred": "counts steps outside the graph (said by DeferredQuantizer)",
}
every = pytest.mark.parametrize("name", [*recipes(), *BUILT])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILT[name]() if name in BUILT else recipe(name, DIM, K)


def sample(name: str, batch: int) -> Tensor:
    z = torch.randn(batch, 4, 4, DIM)
    return z.movedim(-1, 1).contiguous() if name == "maps" else z


class Method(nn.Module):
    "A method of a module as its forward, since programs are made of forwards."

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.name)(x)


def exported(module: nn.Module, example: Tensor) -> ExportedProgram:
    "The module's program for batches of any size."
    sizes = ({0: Dim("b", min=1, max=512)},)
    return torch.export.export(module, (example,), dynamic_shapes=sizes)


def loaded(module: nn.Module, example: Tensor) -> nn.Module:
    "The same, saved and loaded again."
    file = io.BytesIO()
    torch.export.save(exported(module, example), file)
    file.seek(0)
    return torch.export.load(file).module()


@every
def test_a_program_for_all_batches_gives_the_same(name):
    quantizer = build(name).eval()
    program = loaded(quantizer, sample(name, 3))
    for batch in (1, 5):
        z = sample(name, batch)
        result, wanted = program(z.clone().requires_grad_()), quantizer(z)
        assert type(result) is Quantized
        assert all(torch.equal(a, b) for a, b in zip(result, wanted))


@every
def test_programs_of_encode_and_decode(name):
    if name == "none":
        pytest.skip("its codes cannot be decoded")
    quantizer = build(name).eval()
    z = sample(name, 3)
    more = sample(name, 7)
    codes = quantizer.encode(z)
    # not loaded: torch 2.15 cannot read a search within both no_grad and autocast
    encode = exported(Method(quantizer, "encode"), z).module()
    decode = loaded(Method(quantizer, "decode"), codes)
    assert torch.equal(encode(more), quantizer.encode(more))
    assert torch.equal(decode(encode(more)), quantizer(more).z_q)


def graphs_of_sizes(quantizer: nn.Module, name: str) -> int:
    "How many graphs batches of three sizes need, forward and backward."
    for module in quantizer.modules():
        if isinstance(module, Replacement):
            module.life_span = 100  # no code dies here

    def step(z: Tensor) -> Tensor:
        result = quantizer(z)
        return result.z_q.sum() + result.loss

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    counts = []
    for batch in (3, 5, 7):
        fast(sample(name, batch).requires_grad_()).backward()
        counts.append(graphs.frame_count)
    # the first call may begin again where it finds a plain float
    return 1 + counts[-1] - counts[0]


# one of each kind of assignment, estimator and upkeep; all recipes would take a minute
GRAPHS = (
    "none", "vq", "vq + l2 + replace", "vq + rotation + ema", "vq + moving-affine", "vq + diveq",
    "stochastic", "gumbel + reinmax", "sq", "router", "router + tied", "fsq", "lfq",
    "vq + residual",
)
GRAPHS_OF_CODES = ("vq + l2", "optvq", "gumbel", "router + switch", "bsq")


@pytest.mark.parametrize("name", [*GRAPHS, *NOT_ONE_GRAPH])
def test_one_training_graph_for_all_batches(name):
    if name in NOT_ONE_GRAPH:
        pytest.skip(NOT_ONE_GRAPH[name])
    # revival has one more for batches of fewer vectors than codes, which make copies
    most = 2 if "replace" in name else 1
    assert graphs_of_sizes(build(name).train(), name) <= most


@pytest.mark.parametrize("name", GRAPHS_OF_CODES)
def test_one_graph_for_all_batches(name):
    assert graphs_of_sizes(build(name).eval(), name) == 1


@pytest.mark.parametrize("name", ["vq", "vq + rotation", "router", "gumbel"])
def test_a_program_gives_z_no_gradient(name):
    "It holds no rules, as the docstring of Quantizer says."
    z = sample(name, 3).requires_grad_()
    loaded(build(name).eval(), sample(name, 2))(z).z_q.sum().backward()
    assert z.grad is None and "a program gives z no gradient" in Quantizer.__doc__


# ---- operators ----


def test_an_operator_runs_where_gradients_are_on():
    x, keys = torch.randn(5, DIM, requires_grad=True), torch.randn(K, DIM, requires_grad=True)
    codes, lse, mixture = scan_logits(x, keys, None, keys, True)
    with torch.no_grad():
        wanted = scan_logits(x, keys, None, keys, True)
    assert all(torch.equal(a, b) for a, b in zip((codes, lse, mixture), wanted))


def test_going_backward_through_an_operator_is_no_silent_zero():
    x, keys = torch.randn(5, DIM, requires_grad=True), torch.randn(K, DIM)
    mixture = scan_logits(x, keys, None, keys, True)[2]
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        (mixture.sum() + x.sum()).backward()


def test_an_operator_of_a_size_left_open():
    @operator("(Tensor x) -> Tensor", like=lambda x: x.new_empty(x.shape[0], 2))
    def _twice_in_a_row(x):
        return torch.stack([x[:, 0], x[:, 0]], 1, out=x.new_empty(len(x), 2))

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _twice_in_a_row(x)

    program, x = loaded(Twice(), torch.randn(3, 4)), torch.randn(9, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(program(x.clone().requires_grad_()), x[:, [0, 0]])
