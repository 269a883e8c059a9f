"""Measures of usage from summed counts, and scores that no batch size changes."""
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vqstudy.measure import Meter, code_counts, perplexity, usage


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(lambda c: sum(c) > 0))
@settings(max_examples=100, deadline=None)
def test_perplexity_lies_between_one_and_the_used_codes(counts):
    counts = torch.tensor(counts)
    used = usage(counts) * len(counts)
    assert 1 - 1e-9 <= perplexity(counts) <= used + 1e-9


def test_known_perplexities():
    assert perplexity(torch.tensor([3, 3, 3, 3])) == pytest.approx(4)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    assert usage(torch.tensor([1, 0, 5, 0])) == 0.5


def test_large_counts_do_not_overflow():
    assert perplexity(torch.full((10,), 2**60)) == pytest.approx(10)


def test_meter_against_the_whole_set():
    torch.manual_seed(0)
    z, codes = 100 + torch.randn(1000, 6), torch.randint(7, (1000,))
    q = z + 0.1 * torch.randn_like(z)
    meter = Meter(7)
    for i in torch.arange(1000).split(37): meter.update(z[i], q[i], codes[i])
    got = meter.compute()
    assert got["quantization_error"] == pytest.approx(float((z - q).double().pow(2).mean()))
    assert got["relative_error"] == pytest.approx(float((z - q).double().pow(2).sum() / (1000 * torch.cov(z.double().T, correction=0).trace())), rel=1e-6)
    assert got["perplexity"] == pytest.approx(perplexity(code_counts(codes, 7))) and got["usage"] == 1


@pytest.mark.parametrize("counts,error,words", [
    (torch.zeros(3), ValueError, "not all zero"), (torch.tensor([1, -1]), ValueError, "not negative"), (torch.ones(2, 2), ValueError, r"\(2, 2\)"),
    (torch.tensor([1.0, math.nan]), ValueError, "finite"), ([1, 2], TypeError, "list"), (torch.zeros(0), ValueError, r"\(0,\)")])
def test_bad_counts_are_named(counts, error, words):
    for measure in (usage, perplexity):
        with pytest.raises(error, match=words): measure(counts)
    with pytest.raises(ValueError, match="never called"): Meter(3).compute()
