"""Nearest code: against the naive float64 search, at awkward sizes, in every dtype."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vqstudy.search import nearest

SIZES = [(1, 1, 1), (1, 7, 3), (5, 1, 3), (33, 65, 1), (100, 1000, 3), (257, 129, 64), (64, 50, 511)]


def squared_distances(z, codebook):
    return (z.double()[:, None] - codebook.double()).pow(2).sum(-1)


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_within_rounding_of_the_least(n, k, d, dtype):
    torch.manual_seed(n + k + d)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    distance = squared_distances(z, codebook)
    excess = distance.gather(1, nearest(z, codebook)[:, None])[:, 0] - distance.amin(1)
    assert (excess <= 4e-7 * (z.double().pow(2).sum(1) + codebook.double().pow(2).sum(1).max())).all()


@pytest.mark.parametrize("n,k,d", SIZES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_exact_is_what_float64_chooses(n, k, d, shift):
    torch.manual_seed(n * k * d)
    z, codebook = torch.randn(n, d) + shift, torch.randn(k, d) + shift
    codebook = torch.cat([codebook, codebook.flip(0)])  # exact ties for every code
    assert torch.equal(nearest(z, codebook, exact=True), squared_distances(z, codebook).argmin(1))


def test_exact_ties_go_to_the_lowest_index():
    z = torch.randint(-2, 3, (200, 4)).float()
    codebook = torch.randint(-2, 3, (64, 4)).float()  # small integers: many codes at exactly the same distance
    distance = squared_distances(z, codebook)
    lowest = (distance == distance.amin(1, keepdim=True)).double().argmax(1)
    assert torch.equal(nearest(z, codebook, exact=True), lowest)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.floats(1e-3, 1e3))
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


@pytest.mark.parametrize("z,codebook,metric,error,words", [
    (torch.zeros(3, 4), torch.zeros(5, 3), "euclidean", ValueError, "z must have vectors of width 3"),
    (torch.zeros(0, 3), torch.zeros(5, 3), "euclidean", ValueError, "z must hold at least one vector"),
    (torch.zeros(3, 3), torch.zeros(0, 3), "euclidean", ValueError, "codebook must hold at least one vector"),
    (torch.full((3, 3), torch.nan), torch.zeros(5, 3), "euclidean", ValueError, "z must be finite"),
    (torch.zeros(3, 3), torch.full((5, 3), torch.inf), "euclidean", ValueError, "codebook must be finite"),
    (torch.zeros(3, 3), torch.zeros(5, 3), "dot", ValueError, "got 'dot'"),
    (torch.zeros(2, 3, 3), torch.zeros(5, 3), "euclidean", ValueError, r"\(2, 3, 3\)"),
    (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(5, 3), "euclidean", TypeError, "int64"),
    ([[0.0]], torch.zeros(5, 1), "euclidean", TypeError, "got list"),
])
def test_bad_input_is_named(z, codebook, metric, error, words):
    with pytest.raises(error, match=words):
        nearest(z, codebook, metric)
