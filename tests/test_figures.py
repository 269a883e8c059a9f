"""What every figure notebook repeats: verdicts, and rows of a former protocol."""

import math
from dataclasses import replace
import pandas as pd
import pytest
from demo import CLAIM
from vqstudy import figures
from vqstudy.rule import Finding, Measured, compare_sides
from vqstudy.stats import Contrast, Interval, inner_usage

STEM = "huh_fig09_early_collapse"
GROWS = "huh-fig09-divergence-grows"  # decided at desk
HALF = "huh-fig09-half-idle-after-one-step"  # decided at paper alone
CLEAR = Contrast(math.log(2), math.log(1.9), math.log(2.1), n=3)


@pytest.fixture
def kept(monkeypatch):
    "What is handed over as evidence, in place of a file."
    given = []
    monkeypatch.setattr(figures, "evidence", lambda *words: given.append(words))
    return given


def test_a_figure_hands_over_its_evidence_and_gets_a_line_for_each_claim(kept):
    found = {GROWS: CLEAR, HALF: Contrast(-0.3, -0.31, -0.29, n=3)}
    lines = figures.conclude(STEM, found, "desk", {GROWS: 15, HALF: 1}).splitlines()
    assert kept == [(STEM, found, "desk", {GROWS: 15, HALF: 1})]
    assert lines[0].startswith("- **same direction at desk, 15 updates**: ")
    assert lines[0].endswith(" ×2.00 [1.90, 2.10], 3 seeds")
    assert lines[1].startswith("- **not decided at desk, 1 update**: ")


def test_a_claim_that_may_not_be_decided_does_not_weigh_on_the_others(kept):
    "Holm's correction is for the claims that have a word."
    alone = figures.conclude(STEM, {GROWS: CLEAR}, "desk", 15)
    beside = {GROWS: CLEAR, HALF: Contrast(0.0, -0.5, 0.5, n=3)}
    assert figures.conclude(STEM, beside, "desk", 15, shown=[GROWS]) == alone


def test_a_line_names_what_its_interval_is_over(kept):
    line = figures.conclude(STEM, {GROWS: CLEAR}, "desk", 15, sample="simulated batch")
    assert line.endswith(" ×2.00 [1.90, 2.10], 3 simulated batches")


def test_a_scale_that_no_claim_names_decides_nothing(kept):
    line = figures.conclude(STEM, {GROWS: CLEAR}, "smoke")
    assert line.startswith("- **smoke decides nothing**: ")


def test_a_claim_of_another_figure_is_refused_and_nothing_is_kept(kept):
    for name in ("nobody", "huh-fig06-alternation-narrows-gap"):
        with pytest.raises(ValueError, match=f"no claim {name} of the figure {STEM}"):
            figures.conclude(STEM, {name: CLEAR}, "desk")
    assert kept == []


@pytest.mark.parametrize(
    "value, effect", [(0.25, "+0.25 (exact)"), (Interval(0.2, 0.1, 0.3, 4), "+0.20 [+0.10, +0.30]")]
)
def test_exact_numbers_and_intervals_are_contrasts(value, effect):
    assert figures.effect_text(figures._as_contrast(value)) == effect


def test_a_share_is_judged_in_log_odds_and_shown_in_points(kept):
    active = {seed: inner_usage(codes / 256, 256) for seed, codes in enumerate((20, 21, 22))}
    found = {HALF: compare_sides(active, 0.5, "usage", "logit")}
    line = figures.conclude(STEM, found, "paper", 1)
    assert kept == [(STEM, found, "paper", 1)]
    assert line.startswith("- **same direction at paper, 1 update**: ")
    # the mean of the log odds of 20.5, 21.5 and 22.5 of 257, less a half
    assert "-0.4164 [-0.4256, -0.4062], 3 seeds" in line


def test_a_stand_in_is_not_said_to_be_too_short():
    claim = replace(CLAIM, metric="lpips", stand_in="st_lpips", document_updates=100)
    contrast = Contrast(-0.5, -0.6, -0.4, n=3)
    measured = [Measured(contrast, name, "ratio", math.nan, {}) for name in ("st_lpips", "lpips")]
    texts = [figures.word_text(claim, Finding(m, "gpu", 100), "cannot decide") for m in measured]
    assert texts[0] == "cannot decide at gpu, 100 updates"
    assert texts[1] == "cannot decide at gpu, 100 of the document's 100 updates"


def test_a_sweep_that_decides_claims_by_itself():
    runs = [(m, s, e + s / 1e5) for m, e in (("vq", 0.009), ("vq + l2", 0.006)) for s in range(3)]
    rows = pd.DataFrame(runs, columns=["method", "seed", "mse"])
    rows = rows.assign(status="done", dataset="cifar10", updates=780, usage=0.5, num_codes=1024)
    found = figures.verdicts_of("huh_tab03", rows, "desk")
    assert found and all(finding.updates == 780 for _, finding, _ in found.values())
    assert {claim.sweep for claim, _, _ in found.values()} == {"huh_tab03"}
    errors = [verdict.word for claim, _, verdict in found.values() if claim.about == "final"]
    assert set(errors) == {"cannot decide"}  # 780 of 35,156 updates


def test_rows_of_a_former_protocol_are_shown_and_said(monkeypatch):
    former = pd.DataFrame({"method": ["vq"], "dataset": ["photos"], "seed": [0], "updates": [9]})
    nothing = former.iloc[:0]
    monkeypatch.setattr(figures, "results", lambda name, scale: former)
    monkeypatch.setattr(figures, "planned", lambda name, scale: nothing)
    monkeypatch.setattr(figures, "so_far", lambda name, scale: "1 of 2 cells so far")
    monkeypatch.setattr(figures, "left_out", lambda name, scale: "all left out")
    rows = figures.shown_rows(["walks"], "desk")
    assert rows.note.tolist() == [figures.FORMER]
    assert figures.caption_of(rows, "desk").endswith(figures.FORMER)
    monkeypatch.setattr(figures, "planned", lambda name, scale: former)
    notes = figures.shown_rows(["walks"], "desk").note.tolist()
    assert notes == ["1 of 2 cells so far; all left out"]


def test_links_of_a_table_hold_in_the_notebook_that_shows_it(monkeypatch):
    "Both of a table in figures/ and of one in figures/smoke/."
    text = "[a](../nbs/figs/x.ipynb), [b](y.md#z), [c](https://a.b/c), [d](#e) ![f](x.svg)"
    at = figures._as_seen_from_notebooks(text, figures.root() / "figures")
    wanted = "[a](x.ipynb), [b](../../figures/y.md#z), [c](https://a.b/c), [d](#e) "
    assert at == wanted + "![f](../../figures/x.svg)"
    deep = figures._as_seen_from_notebooks("[b](y.md)", figures.root() / "figures/smoke")
    assert deep == "[b](../../figures/smoke/y.md)"
