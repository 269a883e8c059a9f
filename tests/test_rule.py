"""Words, p-values and the rule of what desk decides: against statsmodels, against chance."""

import math
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.weightstats import ttost_paired
from demo import CLAIM
from vqstudy.rule import AS_CLAIMED, WORDS, Finding, Margin, Measured, as_claimed, carried_on
from vqstudy.rule import compare_sides, find, handed_over, in_size, judge, load_changes
from vqstudy.rule import margin_of, may_decide, measure, off_scale, on_scale, pooled, region_p
from vqstudy.rule import stands_in, word_of
from vqstudy.stats import SAYS, Contrast, inner_usage, interval, over_seeds, paired
from vqstudy.tables import Prior, common_variance, holm, moderated, rank_correlation
from vqstudy.tables import over_settings, seeds_for, variance_of

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))
ends = st.tuples(numbers, numbers).map(sorted)
few = st.integers(0, 2)


def contrast_of(low, high, n=3, **lost):
    return Contrast((low + high) / 2, low, high, n=n, **lost)


# ---- words ----


def by_possible_effects(low, high, says, m):
    "The rule in other words: the word is what all effects in the interval have in common."
    if says in ("lower", "not higher"):
        low, high = -high, -low
    effects = np.linspace(low, high, 4001)
    regions = {"same direction": effects > m, "no effect": abs(effects) < m}
    regions["opposite"] = effects < -m
    if says == "equal":
        regions = {"no effect": abs(effects) < m, "opposite": effects > m}
        regions["opposite"] = regions["opposite"] if low > 0 else effects < -m
    elif says.startswith("not"):
        regions = {"not opposite": effects > -m, "opposite": effects < -m}
    whole = [name for name, inside in regions.items() if inside.all()]
    return whole[0] if whole else "undecided"


@given(ends, st.sampled_from(SAYS), st.floats(0.05, 30))
def test_the_word_is_what_all_effects_of_the_interval_share(ends, says, m):
    low, high = ends
    assume(all(abs(abs(x) - m) > 0.02 for x in ends) and high - low > 0.01)
    found = word_of(contrast_of(low, high), says, Margin(-m, m))
    word, _, side = found.word.partition(", ")
    assert word == by_possible_effects(low, high, says, m)
    assert (found.p < 0.05) == (word != "undecided")
    positive = (-high, -low) if says in ("lower", "not higher") else (low, high)
    sided = word == "no effect" and says != "equal"
    expected = "same side" if positive[0] > 0 else "other side" if positive[1] < 0 else ""
    assert side == (expected if sided else "")


@given(ends, st.sampled_from(SAYS), few, few, few)
def test_a_lost_run_never_makes_a_word(ends, says, up, down, unknown):
    before = contrast_of(*ends, n=4)
    margin = Margin(-1.0, 1.0)
    after = word_of(before._replace(up=up, down=down, unknown=unknown), says, margin).word
    assert after in (word_of(before, says, margin).word, "undecided")
    assert after == "undecided" or not unknown


def test_a_diverged_run_is_never_in_its_own_favour():
    better, worse = contrast_of(-4, -2), contrast_of(2, 4)  # where less is better
    margin = Margin(-1, 1)
    words = [word_of(c._replace(**lost), "lower", margin).word
             for c in (better, worse) for lost in (dict(up=1), dict(down=1))]
    assert words == ["undecided", "same direction", "opposite", "undecided"]
    within = contrast_of(-0.5, 0.5)._replace(up=1)
    assert {word_of(within, says, margin).word for says in ("equal", "lower")} == {"undecided"}
    three = better._replace(down=1), better, worse
    no_worse = [word_of(c, "not higher", margin).word for c in three]
    assert no_worse == ["not opposite", "not opposite", "opposite"]


def test_words_are_disjoint_and_known():
    assert len(set(WORDS)) == len(WORDS) and set(AS_CLAIMED) < set(SAYS)
    decided = [w for w in WORDS if as_claimed(w, "lower") is not None]
    assert decided == list(WORDS[:6])
    assert [as_claimed("no effect", says) for says in SAYS] == [False, False, True, False, False]


def test_an_asymmetric_margin_is_taken_side_by_side():
    margin = Margin(-1.0, math.inf)  # of usage near 1: no more can be gained
    assert word_of(contrast_of(5, 6), "higher", margin).word == "no effect, same side"
    assert word_of(contrast_of(-6, -5), "higher", margin).word == "opposite"
    assert word_of(contrast_of(-6, -5), "lower", margin).word == "same direction"


# ---- p-values ----


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=8), st.floats(0.1, 20))
def test_p_of_a_word_is_that_of_known_tests(pairs, m):
    a, b = map(np.array, zip(*pairs))
    assume(np.ptp(a - b) > 1e-3)
    p = region_p(paired(dict(enumerate(a)), dict(enumerate(b))), Margin(-m, m))
    twice_tost = min(1, 2 * ttost_paired(a, b, -m, m)[0])
    assert math.isclose(p["no effect"], twice_tost, rel_tol=1e-6, abs_tol=1e-9)
    for name, border, side in (("same direction", m, "greater"), ("opposite", -m, "less")):
        test = scipy_stats.ttest_1samp(a - b, border, alternative=side)
        assert math.isclose(p[name], min(1, 2 * test.pvalue), rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("n", [3, 5])
def test_at_a_border_a_word_is_wrong_in_one_of_twenty(n):
    draws = np.random.default_rng(n).normal(1, 0.2, size=(3000, n))
    words = [word_of(Contrast(*interval(d)[:3], n=n), "higher", Margin(-1, 1)).word for d in draws]
    share = pd.Series(words).str.partition(",")[0].value_counts(normalize=True)
    assert abs(share["same direction"] - 0.025) < 0.01 and abs(share["no effect"] - 0.025) < 0.01


# few: statsmodels collects garbage in each call, which takes long where much is loaded
@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_step_by_step(p):
    adjusted = holm(dict(enumerate(p)))
    order, least = sorted(range(len(p)), key=p.__getitem__), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        assert math.isclose(adjusted[i], least, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("freedom, variance", [(2.0, 0.3), (8.0, 4.0), (30.0, 1e-4)])
def test_the_common_variance_is_found_again_from_its_own_distribution(freedom, variance):
    "Smyth 2004: sample variances of d degrees of freedom over s0^2 follow F(d, d0)."
    levels = (np.arange(20_000) + 0.5) / 20_000
    d = 3
    prior = common_variance(variance * scipy_stats.f.ppf(levels, d, freedom), [d] * len(levels))
    assert prior.variance == pytest.approx(variance, rel=0.02)
    assert prior.freedom == pytest.approx(freedom, rel=0.05)


def test_moderated_interval_by_hand():
    effects = [0.1, 0.3, 0.2]
    found = Contrast(*interval(effects)[:3], n=3)
    own, prior = np.var(effects, ddof=1), Prior(0.05, 6.0)
    assert variance_of(found) == pytest.approx(own)
    half = scipy_stats.t.ppf(0.975, 8) * ((6 * 0.05 + 2 * own) / 8 / 3) ** 0.5
    assert moderated(found, prior)[1:3] == pytest.approx((0.2 - half, 0.2 + half))
    assert moderated(found, Prior(math.nan, 0.0)) is found


@given(st.floats(0.01, 5), st.floats(0.05, 2))
def test_so_many_seeds_are_enough_and_one_fewer_is_not(deviation, half):
    assume(deviation / half < 10)
    n = seeds_for(deviation, half)
    widths = [scipy_stats.t.ppf(0.975, k - 1) * deviation / k**0.5 for k in (n, n - 1) if k > 1]
    assert widths[0] <= half and all(width > half for width in widths[1:])


@given(st.lists(ends, min_size=1, max_size=4), st.sampled_from(SAYS), st.floats(0.5, 20))
def test_settings_earn_a_word_together_only_where_each_does(several, says, m):
    each = [contrast_of(*pair, n=4) for pair in several]
    margin = Margin(-m, m)
    together = word_of(over_settings(each), says, margin).word.partition(",")[0]
    alone = {word_of(c, says, margin).word.partition(",")[0] for c in each}
    assert together == "undecided" or alone == {together}
    # an equality is denied by effects on either side, which have no interval in common
    assert together != "undecided" or len(alone) > 1 or alone <= {"undecided", "opposite"}


def test_rank_correlation_is_scipys_with_a_wider_interval():
    x, y = np.random.default_rng(0).normal(size=(2, 11))
    y += x
    found = rank_correlation(x, y)
    ranks = [scipy_stats.rankdata(v) for v in (x, y)]
    fisher = scipy_stats.pearsonr(*ranks).confidence_interval()
    assert found.mean == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert found.low < fisher.low < fisher.high < found.high and found.n == 11
    assert rank_correlation(range(4), range(4)).low < 0  # a perfect order of four shows nothing


# ---- from rows to a finding ----

NOISE = (0.01, -0.01, 0.0, 0.004)


def rows(by_length, seeds=3):
    "Rows of both methods at each length, where their errors have this ratio; with all columns."
    table = []
    for updates, ratio in by_length.items():
        for seed in range(seeds):
            table.append(("a", seed, updates, ratio * math.exp(NOISE[seed]), "done"))
            table.append(("b", seed, updates, 1.0, "done"))
    return pd.DataFrame(table, columns=["method", "seed", "updates", "mse", "status"])


def word(by_length, claim=CLAIM, scale="desk"):
    found = find(claim, rows(by_length), scale)
    return judge([claim], {claim.id: found})["demo"].word


def test_the_longest_length_with_three_seeds_decides():
    table = pd.concat([rows({100: 0.9, 400: 0.8}), rows({1600: 0.7}, seeds=2)])
    found = find(CLAIM, table, "desk")
    assert found.updates == 400 and sorted(found.by_length) == [100, 400, 1600]
    assert math.exp(found.contrast.effect) == pytest.approx(0.8)
    one_side = table[(table.method == "a") | (table.updates == 100)]
    assert find(CLAIM, one_side, "desk").updates == 100
    assert find(CLAIM, rows({100: 0.9, 400: 0.8}, seeds=2), "desk").updates == 400
    assert find(CLAIM, table[table.method == "a"], "desk") is None


def test_rows_without_a_length_are_one_length_and_a_failed_row_counts_at_all():
    found = find(CLAIM, rows({780: 0.8}).drop(columns="updates"), "desk")
    assert found.updates is None and found.contrast.n == 3
    table = rows({100: 0.9, 400: 0.8})
    table = table[~((table.method == "a") & (table.seed == 2))]
    lost = dict(method="a", seed=2, updates=math.nan, mse=math.nan, status="failed")
    found = find(CLAIM, pd.concat([table, pd.DataFrame([lost])]), "desk")
    assert found.updates == 400 and found.contrast.unknown == 1
    assert found.by_length[100].contrast.unknown == 1


DESK = [
    ({1000: 0.8}, {}, "same direction"),                             # a tenth of the document's
    ({999: 0.8}, {}, "cannot decide"),
    ({999: 0.8}, dict(about="mechanism"), "same direction"),
    ({999: 0.8}, dict(document_updates=None), "cannot decide"),
    ({100: 0.9, 400: 0.8}, {}, "same direction"),                    # the effect grows
    ({101: 0.9, 400: 0.8}, {}, "cannot decide"),                     # less than a factor of four
    ({100: 0.7, 400: 0.8}, {}, "cannot decide"),                     # it shrinks, and would be gone
    ({100: 0.7, 400: 0.701}, {}, "same direction"),                  # it stays
    ({100: 0.97, 400: 0.995}, {}, "cannot decide"),                  # none now, one on the other side then
    ({100: 0.95, 400: 0.97}, dict(says="equal"), "cannot decide"),   # the spread carried on is too wide
    ({100: 1.0, 1000: 1.2}, {}, "opposite"),
]


@pytest.mark.parametrize("by_length, keys, expected", DESK)
def test_what_desk_decides_about_a_final_error(by_length, keys, expected):
    assert word(by_length, replace(CLAIM, **keys)) == expected
    assert word(by_length, replace(CLAIM, **keys), "gpu") != "cannot decide"


def test_the_effect_is_carried_on_along_the_logarithm_of_the_length():
    found = find(CLAIM, rows({50: 0.3, 100: 0.9, 400: 0.8}), "desk")
    late = carried_on(found, 1600)
    assert math.exp(late.effect) == pytest.approx(0.8 * 0.8 / 0.9)
    assert not may_decide(CLAIM, replace(found, by_length={400: found.measured}))


def test_a_figure_says_at_how_many_updates():
    keys = dict(sweep="", figure="f", contrast="c", a={}, b=None)
    claim, found = replace(CLAIM, **keys), contrast_of(-0.3, -0.2)
    updates = (None, 999, 1000)
    allowed = [may_decide(claim, handed_over(claim, found, "desk", u)) for u in updates]
    assert allowed == [False, False, True]


def usage_rows(a, b, k=256):
    runs = [("a", s, u) for s, u in enumerate(a)] + [("b", s, u) for s, u in enumerate(b)]
    table = pd.DataFrame(runs, columns=["method", "seed", "usage"])
    return table.assign(status="done", num_codes=k)


COUNTED = dict(metric="usage", better="higher", says="higher", unit="difference")
USAGE = replace(CLAIM, **COUNTED, published=0.3, about="mechanism")


def test_usage_is_compared_in_log_odds_and_shown_in_points():
    table = usage_rows((1.0, 1.0, 1.0), (0.5, 0.4, 0.6))
    found = measure(USAGE, table)
    assert found.unit == "logit" and found.base == pytest.approx(0.5)
    assert math.isfinite(found.contrast.high)  # all codes in use, and yet finite odds
    low, high = (off_scale(x, "logit", found.base) for x in found.contrast[1:3])
    assert 0.5 + low < 1 and 0.5 + high < 1 and low > 0.4
    margin = margin_of(USAGE, found.base)
    assert margin.above == pytest.approx(math.log(0.55 / 0.45)) == -margin.below
    assert word_of(found.contrast, "higher", margin).word == "same direction"
    assert in_size(USAGE, Finding(found, "desk")) is False
    assert in_size(replace(USAGE, published=0.498), Finding(found, "desk")) is True


def test_usage_against_a_stated_share_and_near_its_end():
    table = usage_rows((0.31, 0.3, 0.32), ())
    found = measure(replace(USAGE, b=0.1), table)
    assert found.base == pytest.approx(0.1)
    assert off_scale(found.contrast.effect, "logit", 0.1) == pytest.approx(0.21, abs=0.002)
    near = measure(USAGE, usage_rows((0.999,) * 3, (0.98, 0.98, 0.981)))
    assert margin_of(USAGE, near.base).above == math.inf
    decision = word_of(near.contrast, "higher", margin_of(USAGE, near.base))
    assert decision.word == "no effect, same side"


@given(st.floats(0.02, 0.98), st.floats(-0.9, 0.9))
def test_points_to_log_odds_and_back(base, points):
    assume(0.001 < base + points < 0.999)
    assert off_scale(on_scale(points, "logit", base), "logit", base) == pytest.approx(points)


def test_only_claims_of_one_table_that_may_be_decided_share_a_correction():
    values = {f"c{i}": over_seeds({0: -0.3 - s, 1: -0.3, 2: -0.3 + s})
              for i, s in enumerate((0.001, 0.08, 0.081, 0.3))}
    claims = [replace(CLAIM, id=name, about="mechanism") for name in values]
    measured = {n: Measured(c, "mse", "ratio", math.nan, {}) for n, c in values.items()}
    found = {n: Finding(m, "desk") for n, m in measured.items()}
    verdicts = judge(claims, found)
    assert [v.alone for v in verdicts.values()] == ["same direction"] * 3 + ["undecided"]
    assert [v.word for v in verdicts.values()] == ["same direction"] + ["undecided"] * 3
    apart = [replace(c, sweep=c.id) for c in claims]
    assert [v.word for v in judge(apart, found).values()] == [v.alone for v in verdicts.values()]
    barred = [claims[0], claims[1], *(replace(c, about="final") for c in claims[2:])]
    words = [v.word for v in judge(barred, found).values()]
    assert words == ["same direction"] * 2 + ["cannot decide"] * 2
    assert set(pooled(claims, found)) == set(values)


PERCEPTUAL = replace(CLAIM, id="lpips", metric="lpips", stand_in="st_lpips", about="mechanism")


@pytest.mark.parametrize("scale", ["desk", "gpu", "paper"])
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.2])
def test_a_stand_in_suggests_and_decides_nothing(ratio, scale):
    table = rows({10_000: ratio}).rename(columns={"mse": "st_lpips"})
    found = find(PERCEPTUAL, table, scale)
    assert found.measured.metric == "st_lpips" and stands_in(PERCEPTUAL, found)
    verdict = judge([PERCEPTUAL], {"lpips": found})["lpips"]
    assert verdict.word == "cannot decide" and as_claimed(verdict.word, "lower") is None
    # the effect and what it would say stay to be shown
    assert math.exp(found.contrast.effect) == pytest.approx(ratio, rel=0.02)
    own = find(PERCEPTUAL, table.assign(lpips=table.st_lpips), scale)
    assert not stands_in(PERCEPTUAL, own)
    assert judge([PERCEPTUAL], {"lpips": own})["lpips"].word == verdict.alone != "cannot decide"


def test_a_stand_in_takes_no_part_in_the_correction_of_its_table():
    weak = over_seeds({0: -0.38, 1: -0.3, 2: -0.22})  # p .03: too much for a table of two
    claims = [replace(CLAIM, about="mechanism"), PERCEPTUAL]
    measured = [Measured(weak, metric, "ratio", math.nan, {}) for metric in ("mse", "st_lpips")]
    found = {claim.id: Finding(one, "gpu") for claim, one in zip(claims, measured)}
    verdicts = judge(claims, found)
    assert verdicts["demo"].word == "same direction"
    assert verdicts["demo"].adjusted == verdicts["demo"].p > 0.025
    assert math.isnan(verdicts["lpips"].adjusted)


def test_a_share_of_a_figure_is_judged_in_log_odds_about_its_base():
    active = {seed: inner_usage(codes / 256, 256) for seed, codes in enumerate((7, 8, 7))}
    claim = replace(USAGE, sweep="", figure="f", contrast="c", a={}, b=None, published=-0.04)
    claim = replace(claim, says="lower", smallest=0.01)
    one = compare_sides(active, 0.05, "usage", "logit")
    found = handed_over(claim, one.contrast, "paper", 15, one.base)
    assert found.measured.unit == "logit" and found.measured.base == pytest.approx(0.05)
    odds = np.log([x / (1 - x) for x in active.values()])
    test = scipy_stats.ttest_1samp(odds, math.log(0.04 / 0.96), alternative="less")
    verdict = judge([claim], {"demo": found})["demo"]
    assert verdict.word == "same direction" and verdict.p == pytest.approx(2 * test.pvalue)
    assert in_size(claim, found) is False  # the document's 1% is less than any of these
    assert in_size(replace(claim, published=-0.02), found) is True


# ---- the log of changes ----


def test_a_log_of_changes_is_read_and_its_slips_are_named(tmp_path):
    path = tmp_path / "claims.toml"
    entry = '[[change]]\ncommit = "abc"\ndate = "2026-01-0{}T00:00:00+00:00"\nwhat = "w"\n'
    path.write_text(entry.format(1) + entry.format(2) + 'claims = ["x"]\n')
    assert [c.claims for c in load_changes(path)] == [(), ("x",)]
    slips = {"order": entry.format(2) + entry.format(1), "commit, date, what": entry.format(1)[:26]}
    for why, text in slips.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            load_changes(path)
