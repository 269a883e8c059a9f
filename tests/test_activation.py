"""Binomial activation analysis against mpmath, scipy and simulation."""

import math
import mpmath
import numpy as np
import pytest
from scipy import stats
from vqstudy.activation import binomial_pmf, collect_all, collect_all_quantile, draws_for
from vqstudy.activation import expected_active, p_active, positions, rarefied_usage

CODES = (2, 3, 7, 1000, 1024, 8192, 2**16, 2**18)
DRAWS = (1, 2, 5, 100, 8192, 10**5, 10**7, 10**9)
LEAST = 1e-290  # below it float64 has fewer digits


def tail(n, k, j):
    "P(X >= j) to 60 digits: from the side with fewer terms."
    with mpmath.workdps(60):
        p = mpmath.mpf(1) / k
        if j * k <= n:
            term = total = (1 - p) ** n
            for i in range(1, j):
                term = term * (n - i + 1) / i * p / (1 - p)
                total += term
            return 1 - total
        term = total = mpmath.binomial(n, j) * p**j * (1 - p) ** (n - j)
        while term > total * mpmath.mpf(10) ** -30 and j < n:
            term = term * (n - j) / (j + 1) * p / (1 - p)
            j += 1
            total += term
        return total


@pytest.mark.parametrize("k", CODES)
def test_p_active_to_twelve_digits(k):
    for n in DRAWS:
        mean = n / k
        above = [int(mean + t * mean**0.5) + 1 for t in (3, 20)]
        wanted = {1, 2, 3, 10, int(mean) or 1, *above}
        for j in (j for j in wanted if j <= min(n, 5000)):
            exact = tail(n, k, j)
            if exact > LEAST:
                assert abs(mpmath.mpf(float(p_active(n, k, j))) / exact - 1) < 1e-12, (n, j)


@pytest.mark.parametrize(
    "n,num,den", [(10, 1, 3), (1000, 7, 9), (10**6, 1, 1024), (10**9, 3, 2**18), (10**9, 999, 1000)]
)
def test_binomial_terms_to_twelve_digits(n, num, den):
    centre, spread = n * num / den, max(1, (n * num * (den - num)) ** 0.5 / den)
    places = [int(centre + t * spread) for t in (-30, -6, -1, 0, 1, 6, 30)]
    for x in {0, n, *(min(n, max(0, place)) for place in places)}:
        with mpmath.workdps(60):
            exact = mpmath.exp(
                mpmath.loggamma(n + 1)
                - mpmath.loggamma(x + 1)
                - mpmath.loggamma(n - x + 1)
                + x * mpmath.log(mpmath.mpf(num) / den)
                + (n - x) * mpmath.log(1 - mpmath.mpf(num) / den)
            )
        if exact > LEAST:
            assert abs(mpmath.mpf(float(binomial_pmf(x, n, num, den))) / exact - 1) < 1e-12, x


def test_p_active_is_scipys_survival_function_and_broadcasts():
    n = np.arange(0, 3000, 97)[:, None, None]
    k = np.array([1, 2, 64, 1024])[:, None]
    j = np.array([0, 1, 2, 5, 40])
    ours = p_active(n, k, j)
    assert ours.shape == (31, 4, 5)
    assert np.allclose(ours, stats.binom.sf(j - 1, n, 1 / k), rtol=1e-10, atol=1e-300)


def test_simulation_agrees():
    rng = np.random.default_rng(0)
    k, n, runs = 512, 700, 2000
    counts = np.array([np.bincount(rng.integers(k, size=n), minlength=k) for _ in range(runs)])
    for j in (1, 2, 3):
        active = (counts >= j).sum(1)
        assert abs(active.mean() - k * p_active(n, k, j)) < 4 * active.std() / runs**0.5
    p = rng.dirichlet(np.full(k, 0.3))
    seen = (rng.multinomial(n, p, size=runs) > 0).sum(1)
    assert abs(seen.mean() - expected_active(n, p)) < 4 * seen.std() / runs**0.5


def test_unequal_codes_are_never_more_active_than_equal_ones():
    rng = np.random.default_rng(1)
    for n in (1, 10, 1000):
        assert expected_active(n, rng.dirichlet(np.ones(64))) <= expected_active(n, 64) + 1e-12


@pytest.mark.parametrize("n", [1, 7, 50, 199, 200])
def test_rarefaction_is_the_mean_over_all_draws_without_replacement(n):
    counts = np.array([100, 60, 25, 10, 4, 1, 0, 0])
    exact = 1 - np.mean([math.comb(200 - int(c), n) / math.comb(200, n) for c in counts])
    assert abs(rarefied_usage(counts, n) - exact) < 1e-12


def test_rarefaction_of_many_draws():
    counts = np.array([10**8, 3 * 10**7, 50, 2, 1, 0])
    total = int(counts.sum())

    def missed(c, n):
        "C(total - c, n) / C(total, n)"
        if n > total - c:
            return 0
        log = mpmath.loggamma(total - c + 1) - mpmath.loggamma(total - c - n + 1)
        return mpmath.exp(log - mpmath.loggamma(total + 1) + mpmath.loggamma(total - n + 1))

    for n in (1, 1000, 10**7, total - 1, total):
        with mpmath.workdps(50):
            exact = 1 - sum(missed(int(c), n) for c in counts) / 6
        assert abs(rarefied_usage(counts, n) / exact - 1) < 1e-9, n


@pytest.mark.parametrize("k", [1, 2, 1024, 2**18])
def test_draws_for_is_the_fewest(k):
    for usage in (0.0, 1e-9, 0.5, 0.9, 0.999999):
        n = draws_for(usage, k)
        assert p_active(n, k) >= usage
        assert n == 0 or p_active(n - 1, k) < usage


def test_the_coupon_collector():
    assert collect_all(2) == 3
    k = 10**6
    assert collect_all(k) == pytest.approx(k * (math.log(k) + np.euler_gamma + 0.5 / k), rel=1e-12)
    assert collect_all_quantile(0.5, 4096) > 4096


def test_the_coupon_collector_agrees_with_a_simulation():
    rng = np.random.default_rng(0)
    k = 20
    times = []
    for _ in range(4000):
        order = rng.integers(k, size=600)
        times.append(max(np.unique(order, return_index=True)[1]) + 1)
    for q in (0.1, 0.5, 0.9):
        assert np.mean(np.array(times) <= collect_all_quantile(q, k)) >= q - 0.025
    assert abs(np.mean(times) - collect_all(k)) < 1.5


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: p_active(-1, 4), ValueError, "draws must not be negative, got -1"),
        (lambda: p_active(1.0, 4), TypeError, "draws must be whole numbers, got 1.0"),
        (lambda: p_active(1, 0), ValueError, "num_codes must be at least 1, got 0"),
        (lambda: expected_active(3, [[0.5, 0.5]]), ValueError, r"shape \(k,\)"),
        (lambda: expected_active(3, [1.5, -0.5]), ValueError, "add up to 1"),
        (lambda: rarefied_usage([0, 0], 1), ValueError, "not all zero"),
        (lambda: rarefied_usage([1, 2], 0), ValueError, "draws must be at least 1, got 0"),
        (lambda: rarefied_usage([1, 2], 4), ValueError, "draws must be at most 3, got 4"),
        (lambda: draws_for(1.0, 2), ValueError, "below 1"),
        (lambda: draws_for(-0.1, 2), ValueError, "usage must be a finite number at least 0"),
        (lambda: collect_all(0), ValueError, "at least 1"),
        (lambda: collect_all_quantile(1.0, 4), ValueError, "q must be .* below 1, got 1.0"),
        (lambda: positions(1, 5, 4, 1), ValueError, "divisible"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
