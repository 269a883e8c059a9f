"""Contrasts: against scipy and statsmodels, against chance, and from the rows of a sweep."""

import math
from dataclasses import replace
import demo
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, strategies as st
from scipy import stats as scipy_stats
from vqstudy.stats import UNITS, Claim, bootstrap, contrast, interval
from vqstudy.stats import holds, inner_usage, load_claims, paired, scaled

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))


whole = st.tuples(numbers, numbers)
positive = st.floats(0.01, 99)


@given(st.lists(whole, min_size=2, max_size=9))
def test_difference_is_scipys_paired_t(pairs):
    a, b = map(np.array, zip(*pairs))
    assume(np.ptp(a - b) > 1e-3)
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    expected = scipy_stats.ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose(found[1:3], expected, rtol=1e-6, atol=1e-9)
    assert found.n == len(pairs) and math.isclose(found.effect, (a - b).mean(), abs_tol=1e-9)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=6), positive)
def test_ratio_does_not_know_the_unit_of_measurement(pairs, factor):
    a, b = (dict(enumerate(x)) for x in zip(*pairs))
    in_other_units = ({s: x * factor for s, x in side.items()} for side in (a, b))
    effect = paired(a, b, "ratio")
    np.testing.assert_allclose(effect[:3], paired(*in_other_units, "ratio")[:3], atol=1e-7)
    np.testing.assert_allclose(paired(b, a, "ratio").effect, -effect.effect, atol=1e-9)


def test_order_of_seeds_does_not_matter_and_strangers_are_no_pairs():
    a = {3: 1.5, 1: 2.0, 2: 4.0, 8: 99.0}
    b = {1: 1.0, 2: 1.0, 3: 1.0, 7: -99.0}
    backwards = dict(sorted(b.items(), reverse=True))
    assert paired(a, b) == paired(dict(sorted(a.items())), backwards)
    assert paired(a, b).n == 3


@given(st.lists(st.integers(0, 512), min_size=2, max_size=6), st.integers(0, 512))
def test_log_odds_of_usage_are_those_of_half_a_code_more(active, other):
    "statsmodels' odds ratio of the table of active and idle codes, half a code added to each."
    from statsmodels.stats.contingency_tables import Table2x2

    usage = [inner_usage(count / 512, 512) for count in (*active, other)]
    found = paired(dict(enumerate(usage[:-1])), usage[-1], "logit")
    counts = [[[n + 0.5, 512 - n + 0.5], [other + 0.5, 512 - other + 0.5]] for n in active]
    expected = [Table2x2(np.array(table)).log_oddsratio for table in counts]
    np.testing.assert_allclose(found.effect, np.mean(expected), atol=1e-9)
    assert all(0 < u < 1 for u in usage) and math.isfinite(scaled(usage[0], "logit"))


@pytest.mark.parametrize("unit", UNITS[:2])
def test_every_pair_is_counted(unit):
    kinds = [1.0, 2.0, math.inf, -math.inf, math.nan]
    pairs = [(x, y) for x in kinds for y in kinds]
    a, b = (dict(enumerate(side)) for side in zip(*pairs))
    found = paired(a, b, unit)
    # infinity against minus infinity counts in up
    assert (found.n, found.up, found.down, found.unknown) == (4, 5, 5, 11)
    assert sum(found[5:]) == len(pairs)


@pytest.mark.parametrize("n, t, b", [(3, 0.95, 0.72), (5, 0.95, 0.82)])
def test_coverage_is_why_students_interval_decides(n, t, b):
    x = np.random.default_rng(7).normal(size=(300, n))
    students = [interval(v)[1:3] for v in x]
    boots = [bootstrap(v, draws=999) for v in x]
    held = [np.mean([low < 0 < high for low, high in ends]) for ends in (students, boots)]
    assert abs(held[0] - t) < 0.035 and abs(held[1] - b) < 0.06, held


# ---- from rows to a contrast ----

CLAIM = replace(
    demo.CLAIM,
    metric="usage",
    says="higher",
    better="higher",
    unit="difference",
    about="mechanism",
    a=dict(method="x", tuned=True),
    b=dict(method="y"),
    where=dict(k=64),
    published=None,
    document_updates=None,
)
HIGH, LOW = (0.9, 0.8, 0.85), (0.1, 0.2, 0.12)


def rows(x=HIGH, y=LOW, status=("done",) * 6):
    "Three seeds of each side."
    sides = dict(method=["x"] * 3 + ["y"] * 3, tuned=[True] * 3 + [False] * 3)
    runs = dict(seed=[0, 1, 2] * 2, usage=[*x, *y], status=list(status))
    return pd.DataFrame(sides | dict(k=64) | runs)


def test_a_contrast_from_rows():
    found, metric = contrast(CLAIM, rows())
    expected = scipy_stats.ttest_rel(HIGH, LOW).confidence_interval()
    np.testing.assert_allclose(found[1:3], expected, rtol=1e-9)
    assert (metric, found.n) == ("usage", 3)
    assert contrast(CLAIM, rows(LOW, HIGH))[0].effect == pytest.approx(-found.effect)
    without = [rows()[:0], rows()[:3], rows().assign(k=32)]
    without += [rows().drop(columns="usage"), rows().drop(columns="tuned")]
    assert [contrast(CLAIM, table) for table in without] == [None] * 5


def test_failed_and_diverged_seeds():
    gone = (None, 0.8, 0.85)
    failed, _ = contrast(CLAIM, rows(gone, status=("failed", *["done"] * 5)))
    diverged, _ = contrast(CLAIM, rows(gone, status=("diverged", *["done"] * 5)))
    assert (failed.n, failed.unknown) == (2, 1)
    # more usage is better, so diverging counts as the least
    assert (diverged.n, diverged.down) == (2, 1)
    every, _ = contrast(CLAIM, rows(status=["diverged"] * 6))
    assert (every.n, every.unknown) == (0, 3) and math.isnan(every.effect)


def test_truth_values_read_from_text(tmp_path):
    rows().to_csv(tmp_path / "r.csv", index=False)
    read = pd.read_csv(tmp_path / "r.csv")
    as_text = read.assign(tuned=read.tuned.astype(str), k=64.0)
    assert contrast(CLAIM, read)[0] == contrast(CLAIM, rows())[0]
    assert contrast(CLAIM, as_text)[0] == contrast(CLAIM, rows())[0]


def test_the_stand_in_is_taken_where_the_metric_is_not():
    lpips = Claim(**CLAIM.__dict__ | dict(metric="lpips", stand_in="usage"))
    assert contrast(lpips, rows())[1] == "usage"
    assert contrast(lpips, rows().assign(lpips=1.0))[1] == "lpips"
    assert contrast(lpips, rows().assign(lpips=math.nan))[1] == "usage"


def test_a_list_of_values_means_any_of_them():
    k = rows().assign(k=[64, 64, 128] * 2)
    assert contrast(CLAIM, k)[0].n == 2
    either = Claim(**CLAIM.__dict__ | dict(where=dict(k=[64, 128])))
    assert contrast(either, k)[0] == contrast(CLAIM, rows())[0]
    assert holds(k, dict(method=["z"])) == [False] * 6


def test_rows_that_a_claim_cannot_tell_apart():
    with pytest.raises(ValueError, match="claim demo: 6 rows, two of them with seed 0"):
        contrast(CLAIM, pd.concat([rows(), rows()]))


# ---- the file of claims ----

FILE = """[metrics]
mse = "lower"
[[claim]]
id = "one"
source = "huh2023"
place = "p"
text = "t"
figure = "f"
contrast = "c"
scales = ["toy"]
kind = "toy"
metric = "mse"
says = "equal"
smallest = 1
"""
RUN = 'scales = ["gpu"]\nkind = "run"'
RATIO = 'says = "equal"\nunit = "ratio"\npublished = -1.0'
SLIPS = [
    ('id = "one"', 'id = "One two"', "claim One two: an id is"),
    ('id = "one"\n', "", "claim without an id: wants id"),
    ('text = "t"', "text = 3", "claim one: text has the value 3"),
    ('text = "t"', 'text = ""', "claim one: text has the value ''"),
    ("smallest = 1", "smallest = -1", "claim one: smallest must be .* above 0, got -1"),
    ("smallest = 1", "smallest = true", "claim one: smallest has the value True"),
    ("smallest = 1", "smallest = inf", "claim one: smallest must be a finite number"),
    ("smallest = 1", "smallest = nan", "claim one: smallest must be .* got nan"),
    ('["toy"]', '["toys"]', "claim one: each of scales must be .* got 'toys'"),
    ('["toy"]', "[]", "claim one: scales has the value"),
    ('kind = "toy"\n', "", "claim one: wants kind"),
    ('kind = "toy"', 'kind = "joke"', "claim one: kind must be 'identity', .* got 'joke'"),
    ('["toy"]', '["gpu"]', r"claim one: kind toy and scales \['gpu'\] exclude each other"),
    ('scales = ["toy"]\nkind = "toy"', RUN, "claim one: wants about"),
    ('kind = "toy"', 'kind = "toy"\nabout = "us"', "claim one: about must be 'mechanism' or"),
    ('kind = "toy"', 'kind = "toy"\ndocument_updates = 0', "document_updates must be at least 1, got 0"),
    ('contrast = "c"\n', "", "claim one: wants contrast"),
    ('figure = "f"\n', "", "claim one: wants sweep, a, b"),
    ('figure = "f"', 'figure = "f"\nb = 3', "claim one: a figure decides it, so it takes no b"),
    ('figure = "f"', 'sweep = "s"\na = {k = 1}\nb = 2', "a sweep decides it, so it takes no contrast"),
    ('mse = "lower"', 'mse = "less"', "metric mse: better must be 'lower' or 'higher', got 'less'"),
    ('mse = "lower"', 'rmse = "lower"', "claim one: metric must be 'rmse', got 'mse'"),
    ('says = "equal"', 'says = "less"', "claim one: says must be .* got 'less'"),
    ('says = "equal"', 'says = "equal"\nours = "yes"', "claim one: ours has the value 'yes'"),
    ('says = "equal"', 'says = "equal"\nunit = "percent"', "claim one: unit must be .* got 'percent'"),
    ('says = "equal"', RATIO, "claim one: published, a ratio, must be .* got -1.0"),
    ('says = "equal"', 'says = "equal"\nstandin = "mse"', "claim one: unknown key 'standin'"),
    ("[metrics]", "[metric]", "unknown key 'metric'"),
    ("[metrics]", "[metrics", "is no TOML"),
]


@pytest.mark.parametrize("old, new, why", SLIPS)
def test_slips_in_a_file_of_claims_are_named(tmp_path, old, new, why):
    path = tmp_path / "claims.toml"
    path.write_text(FILE)
    assert [claim.id for claim in load_claims(path)] == ["one"]
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=why):
        load_claims(path)


def test_the_documents_length_is_the_claims_own_or_that_of_its_figure(tmp_path):
    path = tmp_path / "claims.toml"
    run = FILE.replace('scales = ["toy"]\nkind = "toy"', f'{RUN}\nabout = "final"')
    table = "[document_updates]\nf = 900\n"
    for text, updates in ((run, None), (table + run, 900), (table + FILE, None)):
        path.write_text(text)
        assert load_claims(path)[0].document_updates == updates
    path.write_text(table + run + "document_updates = 30\n")
    assert load_claims(path)[0].document_updates == 30


def test_an_id_is_used_once(tmp_path):
    (tmp_path / "claims.toml").write_text(FILE + FILE[FILE.index("[[claim]]") :])
    with pytest.raises(ValueError, match="claim one: the id is used 2 times"):
        load_claims(tmp_path / "claims.toml")
