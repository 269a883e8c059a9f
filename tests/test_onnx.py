"""`encode` and `decode` as ONNX files, run by onnxruntime, against the library's own."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
import pytest
import torch
from torch import Tensor, nn
from vqstudy.base import NoQuantizer, Quantizer
from vqstudy.composed import GroupQuantizer, ResidualQuantizer
from vqstudy.export import to_onnx
from vqstudy.lattice import BSQ, FSQ
from vqstudy.logits import scan_logits
from vqstudy.quantizers import recipe, recipes
from vqstudy.router import RouterQuantizer
from vqstudy.search import nearest, two_nearest
from vqstudy.sqvae import SQQuantizer

onnx = pytest.importorskip("onnx", reason="to_onnx needs it (pip install onnx)")
pytest.importorskip("onnxscript", reason="to_onnx needs it (pip install onnxscript)")
runtime = pytest.importorskip("onnxruntime", reason="runs the files (pip install onnxruntime)")

DIM, K = 8, 64
FLOAT = torch.float32
UNIT = 2.0**-24  # a rounding of float32, relative
# further quantizers of vectors of width DIM
ROWS = {
    "affine, l2": lambda: recipe("vq + affine + l2", DIM, K),
    "affine, two groups": lambda: recipe("vq + affine", DIM, K, affine_groups=2),
    "cosine": lambda: recipe("vq", DIM, K, metric="cosine"),
    "simvq, cosine, l2": lambda: recipe("simvq + l2", DIM, K, metric="cosine"),
    "one code": lambda: recipe("vq", DIM, 1),
    "sq, per image": lambda: SQQuantizer(DIM, K, variant=2),
    "groups of fsq": lambda: GroupQuantizer(DIM, K, make=FSQ),
    "gumbel, one for all groups": lambda: recipe("gumbel + group", DIM, K, shared=True),
    "one book for all levels": lambda: ResidualQuantizer(DIM, K, 2, shared=True),
    "the first levels": lambda: ResidualQuantizer(DIM, K, 3).first(2),
}
# a file costs a second, most of it the exporter's own start: most quantizers share one
ON_MAPS = ("none", "vq", "vq + multiscale")
# options that change training alone
TRAINING = {
    "ema", "replace", "refit", "rotation", "reflection", "sync", "exact", "hessian", "nsvq",
    "diveq", "alt", "opt", "diversity", "deferred", "reinmax", "switch",
}
IN_TRAINING = [name for name in recipes() if set(name.split(" + ")[1:]) & TRAINING]
OTHERS = [name for name in recipes() if name not in (*ON_MAPS, *IN_TRAINING)] + list(ROWS)
# quantizers of other shapes: (quantizer, shape of an example, shape of what is run)
SHAPES = {
    "maps": (lambda: recipe("vq + l2", DIM, K, channel_dim=1), (1, 8, 4, 4), (3, 8, 5, 7)),
    "one vector": (lambda: recipe("vq", DIM, K), (8,), (8,)),
    "router, bias": (lambda: RouterQuantizer(DIM, K, bias=True, code_dim=5), (1, 8), (40, 8)),
    "fsq, its own width": (lambda: FSQ(3, K, levels=(4, 4, 4)), (1, 3), (40, 3)),
}


class Together(Quantizer):
    "Quantizers of the same vectors; their codes, and their code vectors, stand side by side."

    def __init__(self, members: Iterable[Quantizer]):
        super().__init__(DIM, K)
        self.members = nn.ModuleList(members)
        self.columns = [math.prod(member.code_shape) for member in self.members]
        self.code_shape = (sum(self.columns),)

    def assign(self, x: Tensor) -> Tensor:
        codes = [member.encode(x) for member in self.members]
        return torch.cat([c.reshape(-1, m) for c, m in zip(codes, self.columns)], 1)

    def lookup(self, codes: Tensor) -> Tensor:
        pairs = zip(self.members, self.apart(codes))
        return torch.cat([member.decode(piece) for member, piece in pairs], 1)

    def apart(self, codes: Tensor) -> list[Tensor]:
        "The codes of each member, as it takes them."
        pieces = zip(self.members, codes.split(self.columns, -1))
        return [piece.reshape(-1, *member.code_shape) for member, piece in pieces]

    def _unflat(self, q: Tensor, shape: torch.Size) -> Tensor:
        return q.view(*shape, -1)


def run(path: Path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(path)
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    "Export into a file of this test."

    def export(quantizer: Quantizer, z: Tensor, part: str = "encode") -> Path:
        path = tmp_path / f"{part}.onnx"
        to_onnx(quantizer, z, path, part)
        return path

    return export


# ---- every quantizer, at sizes that are not the example's ----


def built(name: str) -> Quantizer:
    "With state that has moved, where it has any: maps, averages and moments of a training step."
    torch.manual_seed(0)
    if name in ROWS:
        return ROWS[name]().eval()
    fewer = {"levels": 2} if "residual" in name else {}  # each level costs time
    quantizer = recipe(name, DIM, K, **fewer)
    if name not in ("vq + exact", "vq + hessian"):  # they want a decoder
        quantizer(torch.randn(4, 4, 4, DIM) + 1)
    for parameter in quantizer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return quantizer.eval()


@pytest.mark.parametrize("name", ON_MAPS)
def test_a_recipe_on_maps(name, file):
    quantizer, example = built(name), torch.zeros(3, 4, 4, DIM)
    encode = file(quantizer, example)
    decode = None if name == "none" else file(quantizer, example, "decode")
    for shape in ((1, 2, 2), (5, 6, 2)):
        z = torch.randn(*shape, DIM)
        codes = run(encode, z)
        assert codes.dtype == torch.int64
        assert codes.equal(quantizer.encode(z))
        if name == "vq":
            assert run(decode, codes).equal(quantizer.decode(codes))
        if name == "vq + multiscale":
            z_q = quantizer.decode(codes)
            torch.testing.assert_close(run(decode, codes), z_q, rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(encode, torch.zeros(1, 4, 4, DIM + 1))
    if name == "vq + multiscale":
        with pytest.raises(Exception, match="cannot be reshaped"):
            run(encode, torch.zeros(1, 3, 4, DIM))


def assert_alike(
    names: list[str], file: Callable[..., Path], decode: bool = True, dtype: torch.dtype = FLOAT
) -> None:
    "A file of all these quantizers, at two sizes, against what each of them gives."
    together = Together(built(name) for name in names).to(dtype).eval()
    example, members = torch.zeros(3, DIM, dtype=dtype), together.members
    for name, member in zip(names, members):
        if "deferred" in name:  # before its switch the codebook waits for data
            member.set_codebook(torch.randn(K, DIM))
    encoder = file(together, example)
    decoder = file(together, example, "decode") if decode else None
    for n in (1, 50):
        z = torch.randn(n, DIM).to(dtype)
        codes = [member.encode(z) for member in members]
        found = together.apart(run(encoder, z))
        assert [i for i, c, w in zip(names, found, codes) if not c.equal(w)] == []
        if decoder is None:
            continue
        z_q = [member.decode(c) for member, c in zip(members, codes)]
        found = run(decoder, together.encode(z)).split(DIM, -1)
        assert [i for i, q, w in zip(names, found, z_q) if not q.equal(w)] == []
        assert {q.dtype for q in found} == {dtype}


@pytest.mark.parametrize("first", range(0, len(OTHERS), 9))
def test_every_other_recipe(first, file):
    assert_alike(OTHERS[first : first + 9], file)


def test_recipes_that_differ_in_training_are_encoded_alike(file):
    assert_alike(IN_TRAINING, file, decode=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype, file):
    assert_alike(["vq + l2", "cosine", "sq", "fsq"], file, dtype=dtype)


def test_the_corners_of_a_float64_bsq_are_those_of_float32(file):
    "As the docstring says; the exporter of torch 2.15 rounds the numbers of a program."
    quantizer, codes = BSQ(6, K).double(), torch.arange(K)
    found = run(file(quantizer, torch.zeros(1, 6, dtype=torch.float64), "decode"), codes)
    torch.testing.assert_close(found, quantizer.decode(codes), rtol=2 * UNIT, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_further_shapes(name, file):
    build, example, shape = SHAPES[name]
    quantizer, z = build(), torch.randn(shape)
    wanted = quantizer.encode(z)
    assert run(file(quantizer, torch.zeros(example)), z).equal(wanted)
    if name in ("one vector", "fsq, its own width"):
        return  # nothing new to decode
    z_q = run(file(quantizer, torch.zeros(example), "decode"), wanted)
    assert z_q.equal(quantizer.decode(wanted))


def test_codes_whose_squares_float32_has_not(file):
    quantizer = recipe("vq", DIM, K)
    quantizer.book.weight.data.mul_(1e-25)
    z = 1e-25 * torch.randn(500, DIM)
    assert run(file(quantizer, z), z).equal(quantizer.encode(z))


# ---- what is promised where rounding decides ----


def between_two_codes(codebook: Tensor, n: int) -> Tensor:
    "Vectors of lengths from 1e-2 to 1e4, whose two nearest codes are equally far."
    c = codebook.double()
    z = torch.randn(n, c.shape[1]).double() * torch.logspace(-2, 4, n)[:, None]
    first, second = c[two_nearest(z, c)].unbind(1)
    step = first - second
    off = ((z - (first + second) / 2) * step).sum(1, keepdim=True)
    return (z - off / step.pow(2).sum(1, keepdim=True) * step).float()


def excess(z: Tensor, c: Tensor, codes: Tensor) -> Tensor:
    "By how much the chosen squared distance is above the least, in float64."
    squares = torch.cdist(z, c, compute_mode="donot_use_mm_for_euclid_dist").pow(2)
    return squares.gather(1, codes[:, None])[:, 0] - squares.amin(1)


def bound(z: Tensor, c: Tensor, unit: float = UNIT) -> Tensor:
    "4 (d + 4) u (|z| + C) C: a score is off by a quarter of it at most."
    longest = c.norm(dim=1).max()
    return 4 * (z.shape[1] + 4) * unit * (z.norm(dim=1) + longest) * longest


def test_a_tie_is_decided_within_rounding(file):
    quantizer = recipe("vq", 16, 512)
    c = quantizer.codebook.detach().double()
    z = between_two_codes(c, 4096)
    codes = run(file(quantizer, z), z)
    found = excess(z.double(), c, codes)
    assert (found <= bound(z.double(), c)).all()
    # and there is something to decide
    assert (found > 0).sum() > 1000


def test_a_tie_of_directions_is_decided_within_rounding(file):
    quantizer = recipe("vq + l2", 16, 512)
    c = quantizer.codebook.detach().double()
    z = between_two_codes(c, 4096)
    codes = run(file(quantizer, z), z)
    direction = nn.functional.normalize(z.double(), dim=1)
    # twice: the normalisation of z is rounded, too
    assert (excess(direction, c, codes) <= 2 * bound(direction, c)).all()


def test_a_cosine_is_within_rounding_of_the_largest(file):
    quantizer = recipe("vq", 16, 512, metric="cosine")
    c = nn.functional.normalize(quantizer.codebook.detach().double(), dim=1)
    z = between_two_codes(c, 4096)
    codes = run(file(quantizer, z), z)
    cosines = nn.functional.normalize(z.double(), dim=1) @ c.T
    found = cosines.amax(1) - cosines.gather(1, codes[:, None])[:, 0]
    assert (found <= 2 * (16 + 4) * UNIT).all() and (found > 0).any()


def test_a_float64_input_is_searched_in_float64(file):
    quantizer = recipe("vq", 16, 512).double()
    c = quantizer.codebook.detach()
    z = between_two_codes(c, 4096).double()
    codes = run(file(quantizer, z), z)
    assert (excess(z, c, codes) <= 2 * bound(z, c, 2.0**-53)).all()


def test_a_logit_is_within_rounding_of_the_largest(file):
    quantizer = RouterQuantizer(16, 512, bias=True)
    keys = quantizer.keys.detach().double()
    # the logits of the two codes of largest products are equal, or nearly
    quantizer.bias.data.copy_(-keys.pow(2).sum(1) / 2)
    z = between_two_codes(keys, 4096)
    codes = run(file(quantizer, z), z)
    logits = z.double() @ keys.T + quantizer.bias.detach().double()
    found = logits.amax(1) - logits.gather(1, codes[:, None])[:, 0]
    assert (found <= bound(z.double(), keys) / 2).all() and (found > 0).any()


def test_a_bounded_coordinate_is_rounded_to_a_level_beside_it(file):
    quantizer = FSQ(3, 240, levels=(8, 6, 5))
    z = 2 * torch.randn(20000, 3)
    codes, wanted = run(file(quantizer, z), z), quantizer.encode(z)
    half = quantizer.sizes // 2
    place = quantizer.double().prepare(z.double()) * half
    off_middle = (place - place.floor() - 0.5).abs()
    differ = quantizer.decode(codes) != quantizer.decode(wanted)
    assert (off_middle[differ] < 1e-5).all() and differ.float().mean() < 1e-3


# ---- memory ----


PEAK = """
import re, sys, numpy, onnxruntime

def peak():  # KiB; getrusage would count the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))

session = onnxruntime.InferenceSession(sys.argv[1])
z = numpy.random.default_rng(0).standard_normal((2**16, 8), numpy.float32)
before = peak()
codes = session.run(None, {"z": z})[0]
print(peak() - before, len(set(codes)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_matrix_of_scores_is_never_held(file):
    path = file(recipe("vq", 8, 2048), torch.zeros(1, 8))
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kib, used = map(int, done.stdout.split())
    assert kib < 64 * 1024  # the whole matrix takes 512 MiB
    assert used > 1000


def test_several_tiles_of_which_the_last_is_not_full(file, monkeypatch):
    monkeypatch.setattr("vqstudy.export._LOGITS", 16 * K)
    quantizer = recipe("vq", DIM, K)
    path = file(quantizer, torch.zeros(1, DIM))
    for n in (1, 15, 16, 17, 48, 50):
        z = torch.randn(n, DIM)
        assert run(path, z).equal(quantizer.encode(z))


# ---- the file ----


def test_the_file_is_whole_and_open_in_its_sizes(file):
    quantizer = recipe("vq + l2", DIM, K, channel_dim=1)
    path = file(quantizer, torch.zeros(1, DIM, 4, 4))
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [(used.domain, used.version) for used in model.opset_import] == [("", 18)]
    (given,), (result,) = model.graph.input, model.graph.output
    sizes = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert (given.name, sizes) == ("z", [0, DIM, 0, 0])
    sizes = [dim.dim_value for dim in result.type.tensor_type.shape.dim]
    assert (result.name, sizes) == ("codes", [0, 0, 0])


def test_the_quantizer_stays_as_it_was(file):
    quantizer = recipe("vq + moving-affine", DIM, K).train()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    names = [name for name, _ in quantizer.named_parameters()]
    file(quantizer, torch.randn(3, DIM))
    assert quantizer.training and names == [name for name, _ in quantizer.named_parameters()]
    assert all(value.equal(before[name]) for name, value in quantizer.state_dict().items())


# ---- errors ----


class Other(Quantizer):
    "A quantizer of someone else, with a search or a softmax that a file has not."

    def __init__(self, search: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(DIM, K)
        self.register_buffer("codebook", torch.randn(K, DIM))
        self.search = search

    def assign(self, x: Tensor) -> Tensor:
        return self.search(x, self.codebook)


REFUSED = {
    "exact=True cannot be exported": lambda x, c: nearest(x, c, exact=True, check_finite=False),
    "a code left out cannot be": lambda x, c: two_nearest(x, c, check_finite=False)[:, 1],
    "a softmax over the codes cannot be": lambda x, c: scan_logits(x, c, None, None, True)[0],
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_search_that_cannot_be_exported(words, file):
    with pytest.raises(ValueError, match=words):
        file(Other(REFUSED[words]), torch.zeros(3, DIM))


@pytest.mark.parametrize("none", [NoQuantizer(DIM), ResidualQuantizer(DIM, K, make=NoQuantizer)])
def test_codes_that_hold_nothing_cannot_be_decoded(none, file, tmp_path):
    with pytest.raises(ValueError, match="decode of `none` cannot be exported: its codes hold"):
        file(none, torch.zeros(3, DIM), "decode")
    assert not list(tmp_path.iterdir())


def test_a_codebook_that_has_not_begun(file):
    quantizer = recipe("vq + residual", DIM, K, levels=2, init="kmeans")
    for part in ("encode", "decode"):
        with pytest.raises(ValueError, match=f"{part} cannot be exported while a codebook waits"):
            file(quantizer, torch.zeros(3, DIM), part)
    quantizer(torch.randn(200, DIM))
    z = torch.randn(30, DIM)
    assert run(file(quantizer, z), z).equal(quantizer.encode(z))


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(name, file, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"to_onnx needs {name}: pip install .*vqstudy\[onnx\]"):
        file(recipe("vq", DIM, K), torch.zeros(3, DIM))


def test_wrong_arguments(file):
    quantizer = recipe("vq", DIM, K)
    with pytest.raises(TypeError, match="quantizer must be a vqstudy.base.Quantizer, got Linear"):
        file(nn.Linear(DIM, K), torch.zeros(3, DIM))
    with pytest.raises(TypeError, match="z must be a torch.Tensor, got"):
        file(quantizer, [1.0] * DIM)
    with pytest.raises(TypeError, match="z must be of a floating dtype, got torch.int64"):
        file(quantizer, torch.zeros(3, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"z must have vectors of width {DIM}, got shape"):
        file(quantizer, torch.zeros(3, DIM + 1))
    with pytest.raises(ValueError, match="part must be 'encode' or 'decode', got 'forward'"):
        file(quantizer, torch.zeros(3, DIM), "forward")
