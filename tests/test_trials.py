"""The trials of a search: evenly drawn, each method in its own knobs, and a sweep as they stand."""

import math
import shutil
from pathlib import Path
import pytest
from vqstudy.cells import plan, sweep
from vqstudy.trials import RANGES, TO_ONE, as_yaml, decades_apart, drawn, drawn_as, edges
from vqstudy.trials import knobs_of, search_grids

ROOT = Path(__file__).parents[1]
KNOBS = {
    "none": set(),
    "vq": {"codebook_lr", "beta"},
    "vq + l2 + replace": {"codebook_lr", "beta"},
    "vq + affine": {"codebook_lr", "map_lr", "beta"},
    "vq + opt": {"codebook_lr", "nu", "beta"},
    "vq + affine + opt + replace + l2": {"codebook_lr", "map_lr", "nu", "beta"},
    "vq + rotation + ema + replace": {"ema_decay", "beta"},
    "sq": {"codebook_lr"},
    "gumbel": {"codebook_lr"},
    "router": {"codebook_lr", "keys_lr"},
    "router + tied": {"codebook_lr"},
    "fsq": set(),
}


@pytest.mark.parametrize("method", KNOBS)
def test_a_method_is_tuned_in_its_own_knobs(method):
    assert set(knobs_of(method)) == KNOBS[method]


@pytest.mark.parametrize("knob", RANGES)
@pytest.mark.parametrize("seed", [0, 6])
def test_one_trial_in_each_sixteenth_of_the_range(knob, seed):
    low, high = RANGES[knob]
    values = [trial[knob] for trial in drawn(RANGES, 16, seed)]
    assert all(low <= value <= high for value in values)
    if knob in TO_ONE:
        values, low, high = [1 - value for value in values], 1 - high, 1 - low
    places = [16 * math.log(value / low) / math.log(high / low) for value in values]
    # three digits may take a value over the edge of its sixteenth
    for place, wanted in zip(sorted(places), range(16)):
        assert wanted - 0.05 <= place <= wanted + 1.05


def test_the_seed_decides():
    assert drawn(["nu", "beta"], 8, 3) == drawn(["nu", "beta"], 8, 3) != drawn(["nu", "beta"], 8, 4)


@pytest.mark.parametrize("trials", [2, 8])
def test_more_trials_go_on_where_fewer_ended(trials):
    assert drawn(RANGES, 16, 2)[:trials] == drawn(RANGES, trials, 2)


def test_a_range_of_ones_own():
    own = {"codebook_lr": (1e3, 1e7), "beta": (0.995, 0.9995)}
    trials = drawn(["codebook_lr", "beta", "nu"], 16, 1, own)
    for knob, (low, high) in (RANGES | own).items():
        assert all(low <= trial[knob] <= high for trial in trials if knob in trial)
    # what has no range of its own is drawn as without
    plain = drawn(["codebook_lr", "beta", "nu"], 16, 1)
    assert [trial["nu"] for trial in trials] == [trial["nu"] for trial in plain]


ENDS = [
    ("codebook_lr", 1.5, (0.1, 1.0)),
    ("codebook_lr", 1.51, None),
    ("codebook_lr", 667.0, (1000.0, 10000.0)),
    ("codebook_lr", 666.0, None),
    ("map_lr", 0.1, (0.01, 0.1)),
    ("nu", 2.0, (2.0, 20.0)),
    ("beta", 0.993, (0.995, 0.9995)),
    ("beta", 0.99, None),
    ("beta", 0.9, (0.0, 0.9)),
    ("ema_decay", 0.3, None),  # 0 is nearer than the factor
    ("ema_decay", 0.9988, (0.999, 0.9999)),
]


@pytest.mark.parametrize("knob, value, decade", ENDS)
def test_an_optimum_at_an_end_asks_for_the_decade_beyond(knob, value, decade):
    tried = [*drawn([knob]), {knob: value}]
    assert edges({knob: value}, tried) == ({knob: decade} if decade else {})
    if decade:
        # once the decade is tried, the value lies inside
        assert edges({knob: value}, [*tried, *drawn([knob], 4, ranges={knob: decade})]) == {}


def test_a_range_that_only_a_sweep_has_ends_where_it_was_tried():
    tried = [{"codebook_lr": 10.0**n} for n in range(3, 8)]
    assert edges(tried[-1], tried) == {"codebook_lr": (1e7, 1e8)}
    assert edges(tried[0], tried) == {"codebook_lr": (100.0, 1e3)}
    assert edges(tried[2], tried) == {}


def test_decades_are_of_the_knob_that_differs_most():
    a, b = {"codebook_lr": 1.0, "beta": 0.9}, {"codebook_lr": 50.0, "beta": 0.999}
    assert decades_apart(a, b) == decades_apart(b, a) == pytest.approx(2)
    assert decades_apart(a, a) == decades_apart({}, {}) == 0
    assert [drawn_as(knob, 0.75) for knob in ("beta", "nu")] == [0.25, 0.75]


@pytest.mark.parametrize("bad, words", [
    ({"trials": 12}, "trials must be a power of 2, got 12"),
    ({"trials": 0}, "trials must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
])
def test_what_cannot_be_drawn_is_named(bad, words):
    with pytest.raises(ValueError, match=words):
        drawn(["nu"], **bad)


HEAD = """
notebook: reconstruct
metric: mse
fixed: {dataset: photos}
seeds: [100]
scales:
  desk:
    grid:
"""


def test_the_grids_are_a_sweep(tmp_path, monkeypatch):
    "Every method of Table 3 has 16 cells, whose knobs are the trials."
    for folder in ("nbs/sweeps", "nbs/runs"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("settings.ini", "nbs/runs/reconstruct.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "vqstudy", tmp_path / "vqstudy")
    methods = sweep("huh_tab03")["scales"]["smoke"]["grid"]["method"]
    grids = as_yaml(search_grids(methods, 16, seed=15)).replace("\n", "\n      ")
    (tmp_path / "nbs/sweeps/search.yaml").write_text(f"{HEAD}      {grids}\n")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    cells = plan("search", "desk")
    for method in methods:
        mine = [cell.parameters for cell in cells if cell.parameters["method"] == method]
        knobs = knobs_of(method)
        found = [{knob: given[knob] for knob in knobs} for given in mine]
        assert found == (drawn(knobs, 16, 15) if knobs else [])
