"""Nearest code: against the naive float64 search, at awkward sizes, in every dtype."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.func import vmap
from vqstudy import certificate, kernels
from vqstudy.search import TrueFloat32, distances, nearest, two_nearest

SIZES = [
    (1, 1, 1),
    (1, 7, 3),
    (5, 1, 3),
    (33, 65, 1),
    (100, 1000, 3),
    (257, 129, 64),
    (64, 50, 511),
]
MIB_64 = 2**26


def squared_distances(z, codebook):
    return (z.double()[:, None] - codebook.double()).pow(2).sum(-1)


def compared(z, codebook, metric):
    "What float64 compares, the least wins, by one matrix or (squared distances) one difference."
    if metric == "cosine":
        return -(kernels.unit(z) @ kernels.unit(codebook).T)
    return squared_distances(z, codebook)


def above_least(everything, codes):
    return everything.gather(1, codes[:, None])[:, 0] - everything.amin(1)


def contract(z, codebook):
    "Squared distance above the least that `nearest` allows itself."
    return 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())


def keeps_the_contract(z, codebook, codes):
    excess = above_least(squared_distances(z, codebook), codes)
    return (excess <= contract(z, codebook)).all()


def integers(n, d):
    "Small integers: sums are exact, and many distances are the same."
    return torch.randint(-2, 3, (n, d)).float()


# ---- the contract ----


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding_of_the_least(n, k, d, dtype):
    torch.manual_seed(n + k + d)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    assert keeps_the_contract(z, codebook, nearest(z, codebook))


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_exact_is_what_float64_chooses(n, k, d, shift):
    torch.manual_seed(n * k * d)
    z, codebook = torch.randn(n, d) + shift, torch.randn(k, d) + shift
    codebook = torch.cat([codebook, codebook.flip(0)])  # exact ties for every code
    assert torch.equal(nearest(z, codebook, exact=True), squared_distances(z, codebook).argmin(1))


def test_exact_ties_go_to_the_lowest_index():
    z, codebook = integers(200, 4), integers(64, 4)
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
    excess = above_least(squared_distances(z, codebook), nearest(z, codebook, exact=True))
    assert (excess == 0).all()


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
    """Subnormal to huge, z of another size than the codes, off the origin.

    Rounding errors that all point one way; half of the codes stand twice, some nearly.
    """
    g = torch.Generator().manual_seed(seed)
    z, codebook = torch.randn(20, d, generator=g), torch.randn(30, d, generator=g)
    if positive:
        z, codebook = z.abs(), codebook.abs()
    nearly = codebook * (1 + 1e-6 * torch.randn(30, d, generator=g))
    largest = 3e38 / (shift + 10)  # no number is past the end of float32
    codebook = (torch.cat([codebook, codebook, nearly]) + shift) * min(10.0**power, largest)
    z = (z + shift) * min(10.0 ** (power + apart), largest)
    chosen = squared_distances(z, codebook).argmin(1)
    for precision in ("float32", "bfloat16"):
        assert keeps_the_contract(z, codebook, nearest(z, codebook, precision=precision))
        assert torch.equal(nearest(z, codebook, exact=True, precision=precision), chosen)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "z,codebook",
    [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1e38, 1e-38), (1e-45, 1e38), (-3e38, 3e38)],
)
def test_collapsed_codebooks(z, codebook, exact):
    z, codebook = torch.full((3000, 2), z), torch.full((40, 2), codebook)
    assert (nearest(z, codebook, exact=exact) == 0).all()


def test_tiles_and_layout_do_not_show():
    torch.manual_seed(0)
    z, codebook = torch.randn(16, 90).T, torch.randn(50, 16)
    assert not z.is_contiguous()
    chosen = nearest(z.contiguous(), codebook, exact=True)
    assert torch.equal(nearest(z, codebook, exact=True, budget=1), chosen)
    assert keeps_the_contract(z, codebook, nearest(z, codebook, budget=1))


# ---- the cosine ----


@pytest.mark.parametrize("exact", [False, True])
def test_cosine_is_the_largest_cosine(exact):
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 8) * torch.rand(300, 1), torch.randn(100, 8) * torch.rand(100, 1)
    cosine = torch.nn.functional.cosine_similarity(z.double()[:, None], codebook.double(), dim=-1)
    assert above_least(-cosine, nearest(z, codebook, "cosine", exact)).max() < 1e-6


def test_exact_cosine_is_what_float64_chooses():
    torch.manual_seed(0)
    z, codebook = integers(300, 3), integers(80, 3)  # many parallel vectors, some of them zero
    cosine = (kernels.unit(z)[:, None] * kernels.unit(codebook)).sum(-1)
    assert torch.equal(nearest(z, codebook, "cosine", exact=True), cosine.argmax(1))


def test_cosine_with_zero_vectors():
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 0], [1e-30, 1e-30]])
    codebook = torch.tensor([[-1.0, 2], [0, 0], [-2, -1]])
    assert nearest(z, codebook, "cosine").tolist() == [1, 2, 0, 0]
    found = distances(z, codebook, torch.tensor([1, 2, 1, 0]), "cosine")
    assert torch.allclose(found, torch.tensor([1, 1 - 2 / 5**0.5, 1, 1 - 10**-0.5]))


# ---- the certificate ----


@pytest.mark.parametrize("d", [1, 3, 64, 511])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_scores_are_within_their_bound(d, shift):
    torch.manual_seed(d)
    z, codebook = torch.randn(100, d) + shift, torch.randn(65, d) + shift
    scale = kernels.power_of_two(codebook, torch.float32)
    keys, offsets = kernels.keys_and_offsets(codebook, scale, "euclidean")
    true = z.double() @ codebook.double().T - codebook.double().pow(2).sum(1) / 2
    length, radius = z.double().norm(dim=1), codebook.double().norm(dim=1).max()
    bound = certificate.error_bound(length * scale, radius * scale, d, scale)
    error = (torch.addmm(offsets, z, keys.T) - scale.double() ** 2 * true).abs()
    assert (error <= bound[:, None]).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_error_within_the_bound_breaks_the_contract(metric, monkeypatch):
    """Float32 scores are made as wrong as the bound allows.

    The second look mends it, and without it the contract breaks.
    """
    torch.manual_seed(0)
    z, codebook = torch.randn(400, 64), torch.randn(20, 64).repeat(30, 1)
    codebook = codebook * (1 + 2e-6 * torch.randn(600, 64))
    everything, allowed = compared(z, codebook, metric), contract(z, codebook)
    scale = kernels.power_of_two(codebook, torch.float32)
    radius = codebook.double().norm(dim=1).max()
    if metric == "cosine":
        scale, radius, allowed = torch.ones(()), torch.ones(()), 4e-7
    length = z.double().norm(dim=1)
    bound = certificate.error_bound(length * scale, radius * scale, 64, torch.tensor(1.0))
    score_tiles = kernels.score_tiles

    def wrong(z, codebook, rows, dtype, *rest):
        for part, start, scores in score_tiles(z, codebook, rows, dtype, *rest):
            if dtype == torch.float32:
                sign = torch.empty_like(scores).bernoulli_().mul(1.8).sub(0.9)
                scores += bound[rows[part], None, None] * sign
            yield part, start, scores

    monkeypatch.setattr(kernels, "score_tiles", wrong)
    assert (above_least(everything, nearest(z, codebook, metric)) <= allowed).all()
    if metric == "euclidean":
        assert (above_least(everything, nearest(z, codebook, metric, exact=True)) == 0).all()
    rows = torch.arange(400)
    alone = kernels.scan_codes(z, codebook, rows, torch.float32, metric, None, MIB_64)[2]
    assert (above_least(everything, alone) > allowed).any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n,k,d", [*SIZES, (3000, 2100, 32)])
def test_bfloat16_rules_out_no_nearest_code(metric, n, k, d):
    torch.manual_seed(n + d)
    z, codebook = torch.randn(n, d), torch.randn(k, d)
    pairs = certificate.candidates(z, codebook, metric, None, MIB_64)
    if pairs is not None:  # d 1 may leave too many
        left = torch.zeros(n, k, dtype=torch.bool).index_put(pairs, torch.tensor(True))
        assert left.gather(1, compared(z, codebook, metric).argmin(1)[:, None]).all()
        chosen = nearest(z, codebook, metric, exact=True)
        assert torch.equal(nearest(z, codebook, metric, exact=True, precision="bfloat16"), chosen)
    if n == 3000:
        assert 1 < len(pairs[0]) / n < 3


def test_too_many_candidates_are_left_to_float32():
    z, codebook = torch.randn(50, 3), torch.ones(100, 3)
    assert certificate.candidates(z, codebook, "euclidean", None, MIB_64) is None
    assert (nearest(z, codebook, precision="bfloat16", exact=True) == 0).all()


# ---- distances and two_nearest ----


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n,k,d", [(1, 2, 1), *(size for size in SIZES if size[0] > 5)])
def test_two_nearest(metric, n, k, d):
    torch.manual_seed(k)
    z, codebook = integers(n, d), integers(k, d)
    if metric == "cosine":
        everything = 1 - (kernels.unit(z)[:, None] * kernels.unit(codebook)).sum(-1)
    else:
        everything = squared_distances(z, codebook)
    pair = two_nearest(z.double(), codebook.double(), metric, exact=True)
    ordered = everything.sort(dim=1, stable=True)
    if metric == "euclidean":
        assert torch.equal(pair, ordered.indices[:, :2])
    assert (pair[:, 0] != pair[:, 1]).all()
    found = distances(z.double(), codebook.double(), pair, metric)
    assert torch.allclose(found, ordered.values[:, :2], atol=1e-12)
    pair, other = (
        two_nearest(z, codebook, metric, exact=True, budget=budget) for budget in (MIB_64, 2**16)
    )
    assert torch.equal(pair, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_distances_are_those_of_the_difference(dtype):
    torch.manual_seed(0)
    z, codebook = (torch.randn(m, 5).to(dtype) + 100 for m in (30, 7))
    codes = torch.randint(0, 7, (30, 3))
    found = distances(z, codebook, codes)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(found.double(), squared_distances(z, codebook).gather(1, codes))


# ---- inside other machinery of torch ----


def test_low_precision_of_the_network_does_not_reach_it():
    torch.manual_seed(0)
    z, codebook = torch.randn(2000, 64), torch.randn(500, 64)
    plain, before = nearest(z, codebook), torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(z, codebook), plain)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest(z, codebook), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("exact", [False, True])
def test_one_graph(exact):
    torch.manual_seed(0)
    z, codebook = torch.randn(70, 5, requires_grad=True), torch.randn(33, 5, requires_grad=True)

    def look(z, codebook):
        return nearest(2 * z, codebook, exact=exact) + 1

    compiled = torch.compile(look, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, codebook), look(z, codebook))


def test_every_kind_of_search_under_vmap():
    torch.manual_seed(0)
    z, codebooks = torch.randn(3, 20, 4), torch.randn(3, 9, 4)

    def look(z, codebook):
        return two_nearest(z, codebook, exact=True, check_finite=False)

    one_by_one = torch.stack([look(*pair) for pair in zip(z, codebooks)])
    assert torch.equal(vmap(look)(z, codebooks), one_by_one)


# ---- what is refused ----

ZEROS = torch.zeros(5, 3)


@pytest.mark.parametrize(
    "z,codebook,options,error,words",
    [
        (torch.zeros(3, 4), ZEROS, {}, ValueError, "z must have vectors of width 3"),
        (torch.zeros(0, 3), ZEROS, {}, ValueError, "z must hold at least one vector"),
        (ZEROS, torch.zeros(0, 3), {}, ValueError, "codebook must hold at least one vector"),
        (torch.full((3, 3), torch.nan), ZEROS, {}, ValueError, "z must be finite"),
        (ZEROS, torch.full((5, 3), torch.inf), {}, ValueError, "codebook must be finite"),
        (ZEROS, ZEROS, {"metric": "dot"}, ValueError, "got 'dot'"),
        (ZEROS, ZEROS, {"metric": 2}, TypeError, "metric must be 'euclidean' or 'cosine', got 2"),
        (ZEROS, ZEROS, {"precision": "float16"}, ValueError,
         "precision must be 'auto', 'float32' or 'bfloat16', got 'float16'"),
        (torch.zeros(2, 3, 3), ZEROS, {}, ValueError, r"\(2, 3, 3\)"),
        (torch.zeros(3, 3, dtype=torch.int64), ZEROS, {}, TypeError, "int64"),
        ([[0.0]], torch.zeros(5, 1), {}, TypeError, "got list"),
    ],
)  # fmt: skip
def test_bad_input_is_named(z, codebook, options, error, words):
    with pytest.raises(error, match=words):
        nearest(z, codebook, **options)


class Switch:
    "What torch's switches have."

    def __init__(self, precision: str):
        self.fp32_precision = precision


@pytest.mark.parametrize("precision", ["tf32", "bf16", "ieee", "none"])
def test_precision_is_full_while_any_thread_is_inside_and_as_before_after_the_last(precision):
    switch = Switch(precision)
    full = TrueFloat32(switch)
    inside = "ieee" if precision in ("tf32", "bf16") else precision
    for order in ([0, 1], [1, 0]):  # who leaves first
        held = [full, full]
        for one in held:
            one.__enter__()
            assert switch.fp32_precision == inside
        for which in order:
            assert switch.fp32_precision == inside
            held[which].__exit__(None, None, None)
        assert switch.fp32_precision == precision


def test_an_error_inside_puts_the_precision_back():
    switch = Switch("tf32")
    with pytest.raises(ValueError, match="inside"), TrueFloat32(switch):
        raise ValueError("inside")
    assert switch.fp32_precision == "tf32"
