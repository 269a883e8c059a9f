"""Nearest code: against the naive float64 search, at awkward sizes, in every dtype."""

import subprocess
import sys
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.func import vmap
from vqstudy import search
from vqstudy.search import distances, nearest, two_nearest

SIZES = [
    (1, 1, 1),
    (1, 7, 3),
    (5, 1, 3),
    (33, 65, 1),
    (100, 1000, 3),
    (257, 129, 64),
    (64, 50, 511),
]


def squared_distances(z, codebook):
    return (z.double()[:, None] - codebook.double()).pow(2).sum(-1)


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding_of_the_least(n, k, d, dtype):
    torch.manual_seed(n + k + d)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    distance = squared_distances(z, codebook)
    excess = distance.gather(1, nearest(z, codebook)[:, None])[:, 0] - distance.amin(1)
    assert (
        excess <= 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())
    ).all()


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_exact_is_what_float64_chooses(n, k, d, shift):
    torch.manual_seed(n * k * d)
    z, codebook = torch.randn(n, d) + shift, torch.randn(k, d) + shift
    codebook = torch.cat([codebook, codebook.flip(0)])  # exact ties for every code
    assert torch.equal(nearest(z, codebook, exact=True), squared_distances(z, codebook).argmin(1))


def test_exact_ties_go_to_the_lowest_index():
    z = torch.randint(-2, 3, (200, 4)).float()
    codebook = torch.randint(
        -2, 3, (64, 4)
    ).float()  # small integers: many codes at exactly the same distance
    distance = squared_distances(z, codebook)
    lowest = (distance == distance.amin(1, keepdim=True)).double().argmax(1)
    assert torch.equal(nearest(z, codebook, exact=True), lowest)


@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 8),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_never_farther_than_any_other(seed, n, k, d, scale):
    g = torch.Generator().manual_seed(seed)
    z, codebook = scale * torch.randn(n, d, generator=g), scale * torch.randn(k, d, generator=g)
    distance = squared_distances(z, codebook)
    chosen = distance.gather(1, nearest(z, codebook, exact=True)[:, None])
    assert (chosen <= distance).all()


@pytest.mark.parametrize("exact", [False, True])
def test_cosine_is_the_largest_cosine(exact):
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 8) * torch.rand(300, 1), torch.randn(100, 8) * torch.rand(100, 1)
    cosine = torch.nn.functional.cosine_similarity(z.double()[:, None], codebook.double(), dim=-1)
    chosen = cosine.gather(1, nearest(z, codebook, "cosine", exact)[:, None])[:, 0]
    assert (cosine.amax(1) - chosen).max() < 1e-6


def test_tiles_and_layout_do_not_show():
    torch.manual_seed(0)
    z, codebook = torch.randn(16, 90).T, torch.randn(50, 16)
    assert not z.is_contiguous()
    assert torch.equal(nearest(z, codebook, budget=1), nearest(z.contiguous(), codebook))


def test_autocast_does_not_reach_it():
    torch.manual_seed(0)
    z, codebook = torch.randn(2000, 16), torch.randn(500, 16)
    plain = nearest(z, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(z, codebook), plain)


def keeps_the_contract(z, codebook, codes):
    distance = squared_distances(z, codebook)
    excess = distance.gather(1, codes[:, None])[:, 0] - distance.amin(1)
    return (
        excess <= 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())
    ).all()


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 3, 16, 64, 511, 2000]),
    st.integers(-44, 37),
    st.integers(-3, 3),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_contract_at_any_scale_and_offset(seed, d, power, apart, shift, positive):
    "Subnormal to huge, z of another size than the codes, off the origin, rounding errors that all point one way; half of the codes stand twice, some nearly."
    g = torch.Generator().manual_seed(seed)
    z, codebook = torch.randn(20, d, generator=g), torch.randn(30, d, generator=g)
    if positive:
        z, codebook = z.abs(), codebook.abs()
    codebook = (
        torch.cat([codebook, codebook, codebook * (1 + 1e-6 * torch.randn(30, d, generator=g))])
        + shift
    )
    z, codebook = (z + shift) * min(10.0 ** (power + apart), 1e37), codebook * 10.0**power
    for precision in ("float32", "bfloat16"):
        assert keeps_the_contract(z, codebook, nearest(z, codebook, precision=precision))
        assert torch.equal(
            nearest(z, codebook, exact=True, precision=precision),
            squared_distances(z, codebook).argmin(1),
        )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "z,codebook",
    [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1e38, 1e-38), (1e-45, 1e38), (-3e38, 3e38)],
)
def test_collapsed_codebooks(z, codebook, exact):
    assert (
        nearest(torch.full((3000, 2), z), torch.full((40, 2), codebook), exact=exact) == 0
    ).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_error_within_the_bound_breaks_the_contract(metric, monkeypatch):
    "Float32 scores are made as wrong as the bound allows: the second look mends it, and without it the contract breaks."
    torch.manual_seed(0)
    z, codebook = (
        torch.randn(400, 64),
        torch.randn(20, 64).repeat(30, 1) * (1 + 2e-6 * torch.randn(600, 64)),
    )
    tiles, scale = (
        search._tiles,
        1.0 if metric == "cosine" else search._power(codebook, torch.float32).item(),
    )
    size, norm = (
        z.double().norm(dim=1) * scale,
        1.0 if metric == "cosine" else codebook.double().norm(dim=1).max() * scale,
    )
    error = search._error(size, torch.as_tensor(norm), 64, torch.tensor(1.0))

    def wrong(z, codebook, rows, dtype, *rest):
        for part, start, scores in tiles(z, codebook, rows, dtype, *rest):
            if dtype == torch.float32:
                scores += error[rows[part], None, None] * torch.empty_like(scores).bernoulli_().mul(
                    1.8
                ).sub(0.9)
            yield part, start, scores

    monkeypatch.setattr(search, "_tiles", wrong)
    everything = (
        -(search._unit(z) @ search._unit(codebook).T)
        if metric == "cosine"
        else squared_distances(z, codebook)
    )
    allowed = (
        4e-7
        if metric == "cosine"
        else 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())
    )
    excess = lambda codes: everything.gather(1, codes[:, None])[:, 0] - everything.amin(1)
    assert (excess(nearest(z, codebook, metric)) <= allowed).all()
    if metric == "euclidean":
        assert (excess(nearest(z, codebook, metric, exact=True)) == 0).all()
    alone = search._scan(z, codebook, torch.arange(400), torch.float32, metric, None, 2**26)[2]
    assert (excess(alone) > allowed).any()


@pytest.mark.parametrize("d", [1, 3, 64, 511])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_scores_are_within_their_bound(d, shift):
    torch.manual_seed(d)
    z, codebook = (torch.randn(100, d) + shift), torch.randn(65, d) + shift
    scale = search._power(codebook, torch.float32)
    keys, offset = search._keys(codebook, scale, "euclidean")
    true = scale.double() ** 2 * (
        z.double() @ codebook.double().T - codebook.double().pow(2).sum(1) / 2
    )
    error = search._error(
        z.double().norm(dim=1) * scale, codebook.double().norm(dim=1).max() * scale, d, scale
    )
    assert ((torch.addmm(offset, z, keys.T)[:, :65] - true).abs() <= error[:, None]).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n,k,d", [*SIZES, (3000, 2100, 32)])
def test_bfloat16_rules_out_no_nearest_code(metric, n, k, d):
    torch.manual_seed(n + d)
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    everything = (
        search._unit(z) @ search._unit(codebook).T
        if metric == "cosine"
        else -squared_distances(z, codebook)
    )
    pairs = search._candidates(z, codebook, metric, None, 2**26)
    if pairs is not None:  # d 1 may leave too many
        left = torch.zeros(n, k, dtype=torch.bool).index_put(pairs, torch.tensor(True))
        assert (left.gather(1, everything.argmax(1)[:, None])).all()
        assert torch.equal(
            nearest(z, codebook, metric, exact=True, precision="bfloat16"),
            nearest(z, codebook, metric, exact=True),
        )
    if n == 3000:
        assert 1 < len(pairs[0]) / n < 3


def test_too_many_candidates_are_left_to_float32():
    z, codebook = torch.randn(50, 3), torch.ones(100, 3)
    assert search._candidates(z, codebook, "euclidean", None, 2**26) is None
    assert (nearest(z, codebook, precision="bfloat16", exact=True) == 0).all()
    with pytest.raises(
        ValueError, match="precision must be 'auto', 'float32' or 'bfloat16', got 'float16'"
    ):
        nearest(z, codebook, precision="float16")


def test_exact_cosine_is_what_float64_chooses():
    torch.manual_seed(0)
    z, codebook = (
        torch.randint(-2, 3, (300, 3)).float(),
        torch.randint(-2, 3, (80, 3)).float(),
    )  # many parallel vectors, some of them zero
    unit = lambda x: search._unit(x)
    cosine = (unit(z)[:, None] * unit(codebook)).sum(-1)
    assert torch.equal(nearest(z, codebook, "cosine", exact=True), cosine.argmax(1))


def test_cosine_with_zero_vectors():
    z, codebook = (
        torch.tensor([[1.0, 0], [-1, 0], [0, 0], [1e-30, 1e-30]]),
        torch.tensor([[-1.0, 2], [0, 0], [-2, -1]]),
    )
    assert nearest(z, codebook, "cosine").tolist() == [1, 2, 0, 0]
    assert torch.allclose(
        distances(z, codebook, torch.tensor([1, 2, 1, 0]), "cosine"),
        torch.tensor([1, 1 - 2 / 5**0.5, 1, 1 - 10**-0.5]),
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "n,k,d", [(1, 2, 1), (33, 65, 1), (100, 1000, 3), (257, 129, 64), (64, 50, 511)]
)
def test_two_nearest(metric, n, k, d):
    torch.manual_seed(k)
    z, codebook = torch.randint(-2, 3, (n, d)).double(), torch.randint(-2, 3, (k, d)).double()
    if metric == "cosine":
        all_of_them = 1 - (search._unit(z)[:, None] * search._unit(codebook)).sum(-1)
    else:
        all_of_them = squared_distances(z, codebook)
    pair = two_nearest(z, codebook, metric, exact=True)
    assert (
        torch.equal(pair, all_of_them.sort(dim=1, stable=True).indices[:, :2])
        if metric == "euclidean"
        else (pair[:, 0] != pair[:, 1]).all()
    )
    assert torch.allclose(
        distances(z, codebook, pair, metric), all_of_them.sort(dim=1).values[:, :2], atol=1e-12
    )
    assert torch.equal(
        two_nearest(z.float(), codebook.float(), metric, exact=True),
        two_nearest(z.float(), codebook.float(), metric, exact=True, budget=2**16),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_distances_are_those_of_the_difference(dtype):
    torch.manual_seed(0)
    z, codebook = (torch.randn(m, 5).to(dtype) + 100 for m in (30, 7))
    codes = torch.randint(0, 7, (30, 3))
    found = distances(z, codebook, codes)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and torch.allclose(
        found.double(), squared_distances(z, codebook).gather(1, codes)
    )


@pytest.mark.parametrize("exact", [False, True])
def test_one_graph(exact):
    torch.manual_seed(0)
    z, codebook = torch.randn(70, 5, requires_grad=True), torch.randn(33, 5, requires_grad=True)
    compiled = torch.compile(
        lambda z, c: nearest(2 * z, c, exact=exact) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(z, codebook), nearest(2 * z, codebook, exact=exact) + 1)


def test_every_kind_of_search_under_vmap():
    torch.manual_seed(0)
    z, codebooks = torch.randn(3, 20, 4), torch.randn(3, 9, 4)
    look = lambda z, c: two_nearest(z, c, exact=True, check_finite=False)
    assert torch.equal(
        vmap(look)(z, codebooks), torch.stack([look(*pair) for pair in zip(z, codebooks)])
    )


def test_low_precision_of_the_network_does_not_reach_it():
    torch.manual_seed(0)
    z, codebook = torch.randn(2000, 64), torch.randn(500, 64)
    plain, before = nearest(z, codebook), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(z, codebook), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


MEMORY = """
import resource, sys, torch
from vqstudy.search import nearest
n, k, d, dtype, exact = *map(int, sys.argv[1:4]), getattr(torch, sys.argv[4]), sys.argv[5] == "exact"
precision = "bfloat16" if sys.argv[5] == "half" else "auto"
torch.manual_seed(0)
z, codebook = torch.empty(n, d, dtype=dtype), torch.empty(k, d, dtype=dtype)
for x in (z, codebook):
    for part in x.split(1024): part.normal_()
nearest(torch.randn(3000, d), torch.randn(3000, d), exact=exact)  # what the libraries themselves take
out = torch.zeros(n, dtype=torch.int64)
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
with open("/proc/self/clear_refs", "w") as f: f.write("5")
before = peak()
nearest(z, codebook, exact=exact, precision=precision)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "n,k,d,dtype,exact",
    [
        (200_000, 16_384, 4, "float32", ""),
        (300, 65_536, 600, "bfloat16", ""),
        (20_000, 3000, 256, "float32", "exact"),
        (2_000_000, 20, 4, "float32", ""),
        (200_000, 3000, 64, "float32", "half"),
    ],
)
def test_extra_memory(n, k, d, dtype, exact):
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(n), str(k), str(d), dtype, exact],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) <= 64


@pytest.mark.parametrize(
    "z,codebook,metric,error,words",
    [
        (
            torch.zeros(3, 4),
            torch.zeros(5, 3),
            "euclidean",
            ValueError,
            "z must have vectors of width 3",
        ),
        (
            torch.zeros(0, 3),
            torch.zeros(5, 3),
            "euclidean",
            ValueError,
            "z must hold at least one vector",
        ),
        (
            torch.zeros(3, 3),
            torch.zeros(0, 3),
            "euclidean",
            ValueError,
            "codebook must hold at least one vector",
        ),
        (
            torch.full((3, 3), torch.nan),
            torch.zeros(5, 3),
            "euclidean",
            ValueError,
            "z must be finite",
        ),
        (
            torch.zeros(3, 3),
            torch.full((5, 3), torch.inf),
            "euclidean",
            ValueError,
            "codebook must be finite",
        ),
        (torch.zeros(3, 3), torch.zeros(5, 3), "dot", ValueError, "got 'dot'"),
        (torch.zeros(2, 3, 3), torch.zeros(5, 3), "euclidean", ValueError, r"\(2, 3, 3\)"),
        (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(5, 3), "euclidean", TypeError, "int64"),
        ([[0.0]], torch.zeros(5, 1), "euclidean", TypeError, "got list"),
    ],
)
def test_bad_input_is_named(z, codebook, metric, error, words):
    with pytest.raises(error, match=words):
        nearest(z, codebook, metric)
