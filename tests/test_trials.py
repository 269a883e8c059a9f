"""The trials of a search: evenly drawn, each method in its own knobs, and a sweep as they stand."""

import math
import shutil
from pathlib import Path
import pytest
from vqstudy.cells import plan, sweep
from vqstudy.trials import RANGES, TO_ONE, as_yaml, drawn, knobs_of, search_grids

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
