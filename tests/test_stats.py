"""Contrasts and verdicts: against scipy, against the rule said in other words, and against chance."""

import math
import numpy as np, pandas as pd, pytest
from hypothesis import assume, given, strategies as st
from scipy import stats as scipy_stats
from vqstudy.stats import SAYS, UNITS, VERDICTS, Claim, Contrast, bootstrap, contrast, interval
from vqstudy.stats import load_claims, paired, verdict

numbers = st.floats(-50, 50).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9))
def test_difference_is_scipys_paired_t(pairs):
    a, b = map(np.array, zip(*pairs))
    assume(np.ptp(a - b) > 1e-3)
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    np.testing.assert_allclose(
        found[1:3], scipy_stats.ttest_rel(a, b).confidence_interval(), rtol=1e-6, atol=1e-9
    )
    assert found.n == len(pairs) and math.isclose(found.effect, (a - b).mean(), abs_tol=1e-9)


@given(
    st.lists(st.tuples(st.floats(0.01, 99), st.floats(0.01, 99)), min_size=2, max_size=6),
    st.floats(0.01, 99),
)
def test_ratio_does_not_know_the_unit_of_measurement(pairs, factor):
    a, b = (dict(enumerate(x)) for x in zip(*pairs))
    one, other = (
        paired(a, b, "ratio"),
        paired(
            {s: x * factor for s, x in a.items()}, {s: x * factor for s, x in b.items()}, "ratio"
        ),
    )
    np.testing.assert_allclose(one[:3], other[:3], atol=1e-7)
    np.testing.assert_allclose(paired(b, a, "ratio").effect, -one.effect, atol=1e-9)


def test_order_of_seeds_does_not_matter_and_strangers_are_no_pairs():
    a, b = {3: 1.5, 1: 2.0, 2: 4.0, 8: 99.0}, {1: 1.0, 2: 1.0, 3: 1.0, 7: -99.0}
    assert (
        paired(a, b) == paired(dict(sorted(a.items())), dict(sorted(b.items(), reverse=True)))
        and paired(a, b).n == 3
    )


@pytest.mark.parametrize("unit", UNITS)
def test_every_pair_is_counted(unit):
    kinds = [1.0, 2.0, math.inf, -math.inf, math.nan]
    a, b = (
        {i: x for i, x in enumerate(side)} for side in zip(*[(x, y) for x in kinds for y in kinds])
    )
    found = paired(a, b, unit)
    assert (found.n, found.up, found.down, found.unknown) == (4, 5, 5, 11) and sum(
        found[5:]
    ) == 25  # inf against -inf counts in up


@pytest.mark.parametrize("n, t, b", [(3, 0.95, 0.72), (5, 0.95, 0.82)])
def test_coverage_is_why_students_interval_decides(n, t, b):
    x = np.random.default_rng(7).normal(size=(300, n))
    held = [
        np.mean([low < 0 < high for low, high in ends])
        for ends in ([interval(v)[1:3] for v in x], [bootstrap(v, draws=999) for v in x])
    ]
    assert abs(held[0] - t) < 0.035 and abs(held[1] - b) < 0.06, held


def said_again(low, high, says, s):
    "The rule in other words: where can the true effect be?"
    if says == "lower":
        low, high, says = -high, -low, "higher"
    shown = {
        "higher": lambda x: x > s,
        "equal": lambda x: -s < x < s,
        "not higher": lambda x: x < s,
        "not lower": lambda x: x > -s,
    }[says]
    inside = np.array([shown(x) for x in np.linspace(low, high, 4001)])
    return "reproduced" if inside.all() else "contradicted" if not inside.any() else "undecided"


@given(st.tuples(numbers, numbers).map(sorted), st.sampled_from(SAYS), st.floats(0.05, 30))
def test_verdict_is_the_rule(ends, says, smallest):
    low, high = ends
    assume(all(abs(abs(x) - smallest) > 0.02 for x in ends) and high - low > 0.01)
    assert verdict(Contrast((low + high) / 2, low, high, n=3), says, smallest) == said_again(
        low, high, says, smallest
    )


@given(
    st.tuples(numbers, numbers).map(sorted),
    st.sampled_from(SAYS),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_a_lost_run_never_makes_a_verdict(ends, says, up, down, unknown):
    "More diverged or failed runs can take a verdict away, never give or turn one."
    whole = Contrast(sum(ends) / 2, *ends, n=4)
    before, after = (
        verdict(c, says, 1.0) for c in (whole, whole._replace(up=up, down=down, unknown=unknown))
    )
    assert after in (before, "undecided")
    if unknown:
        assert after == "undecided"


def test_a_run_that_diverged_is_never_in_its_own_favour():
    good = Contrast(-3, -4, -2, n=3)
    assert (
        verdict(good._replace(up=1), "lower", 1) == "undecided"
        and verdict(good._replace(down=1), "lower", 1) == "reproduced"
    )
    assert (
        verdict(good._replace(up=1), "higher", 1) == "undecided"
        and verdict(good._replace(down=1), "higher", 1) == "contradicted"
    )
    assert verdict(Contrast(*[math.nan] * 3, up=5), "lower", 1) == "undecided"


def test_no_worse_takes_a_better_result_and_refuses_a_diverged_one():
    better, worse = Contrast(-3, -4, -2, n=3), Contrast(3, 2, 4, n=3)
    assert [
        verdict(c, "not higher", 1)
        for c in (better, worse, Contrast(0, -0.5, 0.5, n=3), Contrast(0, -0.5, 1.5, n=3))
    ] == ["reproduced", "contradicted", "reproduced", "undecided"]
    assert [verdict(c, "not lower", 1) for c in (better, worse)] == ["contradicted", "reproduced"]
    assert (
        verdict(better._replace(up=1), "not higher", 1) == "undecided"
        and verdict(better._replace(down=1), "not higher", 1) == "reproduced"
        and verdict(None, "not lower", 1) == "not measured"
    )


def test_false_verdicts_are_as_rare_as_said():
    draws = np.random.default_rng(3).normal(1, 1, size=(3000, 5))
    out = pd.Series(
        [verdict(Contrast(*interval(d)[:3], n=5), "higher", 1.0) for d in draws]
    ).value_counts(normalize=True)
    assert abs(out["reproduced"] - 0.025) < 0.01 and abs(out["contradicted"] - 0.025) < 0.01


CLAIM = Claim(
    "demo",
    "huh2023",
    "Table 3",
    "text",
    "usage",
    "higher",
    0.05,
    ["desk"],
    "higher",
    sweep="s",
    a=dict(method="x", tuned=True),
    b=dict(method="y"),
    where=dict(k=64),
)


def rows(x=(0.9, 0.8, 0.85), y=(0.1, 0.2, 0.12), status=("done",) * 6):
    one = lambda method, tuned, seed, usage, status: dict(
        method=method, tuned=tuned, k=64, seed=seed, usage=usage, status=status
    )
    return pd.DataFrame(
        [one("x", True, s, u, e) for s, u, e in zip(range(3), x, status)]
        + [one("y", False, s, u, e) for s, u, e in zip(range(3), y, status[3:])]
    )


def test_four_outcomes_from_rows():
    outcome = lambda table: verdict(
        (found := contrast(CLAIM, table)) and found[0], CLAIM.says, CLAIM.limit
    )
    assert (
        outcome(rows()) == "reproduced"
        and outcome(rows((0.1, 0.2, 0.12), (0.9, 0.8, 0.85))) == "contradicted"
        and outcome(rows((0.9, 0.1, 0.5))) == "undecided"
    )
    assert (
        outcome(rows()[:0])
        == outcome(rows()[:3])
        == outcome(rows().drop(columns="usage"))
        == outcome(rows().drop(columns="tuned"))
        == outcome(rows().assign(k=32))
        == "not measured"
    )
    assert set(VERDICTS) == {"reproduced", "contradicted", "undecided", "not measured"}


def test_failed_and_diverged_seeds():
    gone = rows(x=(None, 0.8, 0.85))
    failed, diverged = (
        contrast(CLAIM, gone.assign(status=[status] + ["done"] * 5))[0]
        for status in ("failed", "diverged")
    )
    assert (failed.n, failed.unknown, diverged.n, diverged.down) == (
        2,
        1,
        2,
        1,
    )  # more usage is better, so diverging counts as the least
    assert verdict(failed, "higher", 0.05) == verdict(diverged, "higher", 0.05) == "undecided"
    every = contrast(CLAIM, rows().assign(status="diverged"))[0]
    assert (every.n, every.unknown) == (0, 3) and verdict(every, "higher", 0.05) == "undecided"


def test_truth_values_read_from_text_and_stand_in(tmp_path):
    rows().to_csv(tmp_path / "r.csv", index=False)
    read = pd.read_csv(tmp_path / "r.csv")
    assert (
        contrast(CLAIM, read)[0]
        == contrast(CLAIM, read.assign(tuned=read.tuned.astype(str), k=64.0))[0]
        == contrast(CLAIM, rows())[0]
    )
    lpips = Claim(**{**CLAIM.__dict__, "metric": "lpips", "stand_in": "usage"})
    assert (
        contrast(lpips, read)[1] == "usage"
        and contrast(lpips, read.assign(lpips=1.0))[1] == "lpips"
        and contrast(lpips, read.assign(lpips=math.nan))[1] == "usage"
    )


def test_rows_that_a_claim_cannot_tell_apart():
    with pytest.raises(ValueError, match="claim demo: 6 rows, two of them with seed 0"):
        contrast(CLAIM, pd.concat([rows(), rows()]))


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
metric = "mse"
says = "equal"
smallest = 1
"""


@pytest.mark.parametrize(
    "old, new, why",
    [
        ('id = "one"', 'id = "One two"', "claim One two: an id is"),
        ('id = "one"\n', "", "claim without an id: wants id"),
        ('text = "t"', "text = 3", "claim one: text has the value 3"),
        ('text = "t"', 'text = ""', "claim one: text has the value ''"),
        ("smallest = 1", "smallest = -1", "claim one: smallest is -1"),
        ("smallest = 1", "smallest = true", "claim one: smallest has the value True"),
        ("smallest = 1", "smallest = inf", "claim one: smallest is inf"),
        ("smallest = 1", "smallest = nan", "claim one: smallest is nan"),
        ('["toy"]', '["toys"]', "claim one: scales has 'toys'"),
        ('["toy"]', "[]", "claim one: scales has the value"),
        ('contrast = "c"\n', "", "claim one: wants contrast"),
        ('figure = "f"\n', "", "claim one: wants sweep, a, b"),
        ('figure = "f"', 'figure = "f"\nb = 3', "claim one: a figure decides it, so it takes no b"),
        ('mse = "lower"', 'mse = "less"', "metric mse: better is 'less'"),
        ('mse = "lower"', 'rmse = "lower"', "claim one: metric is 'mse'"),
        ('says = "equal"', 'says = "less"', "claim one: says is 'less'"),
        ('says = "equal"', 'says = "equal"\nours = "yes"', "claim one: ours has the value 'yes'"),
        ('says = "equal"', 'says = "equal"\nunit = "percent"', "claim one: unit is 'percent'"),
        (
            'says = "equal"',
            'says = "equal"\nunit = "ratio"\npublished = -1.0',
            "claim one: published is -1.0",
        ),
        ('says = "equal"', 'says = "equal"\nstandin = "mse"', "claim one: unknown key 'standin'"),
        ("[metrics]", "[metric]", "unknown key 'metric'"),
        ("[metrics]", "[metrics", "is no TOML"),
    ],
)
def test_slips_in_a_file_of_claims_are_named(tmp_path, old, new, why):
    (tmp_path / "claims.toml").write_text(FILE)
    assert [claim.id for claim in load_claims(tmp_path / "claims.toml")] == ["one"]
    (tmp_path / "claims.toml").write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=why):
        load_claims(tmp_path / "claims.toml")


def test_an_id_is_used_once(tmp_path):
    (tmp_path / "claims.toml").write_text(FILE + FILE[FILE.index("[[claim]]") :])
    with pytest.raises(ValueError, match="claim one: the id is used 2 times"):
        load_claims(tmp_path / "claims.toml")
