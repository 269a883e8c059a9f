"""The files of sweeps: what one takes from another and from a protocol, and what is refused."""

import pytest
import yaml
from pathlib import Path
from projects import new_project
from vqstudy import cells, files, grids, records

ROOT = Path(__file__).parents[1]
PARAMETERS = """lr: float = 0.1
width: int = 8
rounds: int = 1
method: str = "a"
dataset: str = "street"
seed: int = 0
out: str = ""
"""
FIRST = """
notebook: walk
figures: [walks]
metric: distance
fixed: {lr: 0.5, width: 16}
grid: {method: [a, b, c]}
seeds: [0, 1]
scales:
  smoke: {fixed: {width: 4}, seeds: [0]}
  desk: {fixed: {rounds: 3}, grid: {lr: [0.5, 0.25]}}
  gpu: {seeds: [7]}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, PARAMETERS, "1", first=FIRST)
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def write(project, name, text):
    files.write(project / f"nbs/sweeps/{name}.yaml", text)


def asked(name, scale):
    "What a sweep asks of its cells, without its own name."
    return [(c.id, c.notebook, c.parameters, c.metric) for c in cells.plan(name, scale)]


# ---- like ----

# by what a sweep says beside `like: first`: the same, written out
WRITTEN_OUT = {
    "": FIRST,
    "metric: mse\nfigures: [others]": FIRST.replace("distance", "mse").replace("walks", "others"),
    "fixed: {width: 32}": FIRST.replace("width: 16", "width: 32"),
    "fixed: {width: null}": FIRST.replace(", width: 16", ""),
    "fixed: {method: b}": FIRST.replace("width: 16}\ngrid: {method: [a, b, c]}", "width: 16, method: b}"),
    "grid: {width: [1, 2]}": FIRST.replace(", width: 16", "").replace("c]}", "c], width: [1, 2]}"),
    "grid: [{method: [a], lr: [1.0]}, {method: [b]}]": FIRST.replace("{lr: 0.5, w", "{w").replace(
        "grid: {method: [a, b, c]}", "grid: [{method: [a], lr: [1.0]}, {method: [b]}]"
    ),
    "seeds: [5]": FIRST.replace("seeds: [0, 1]", "seeds: [5]"),
    "scales: {smoke: null}": FIRST.replace("  smoke: {fixed: {width: 4}, seeds: [0]}\n", ""),
    "scales: {smoke: {seeds: [3]}}": FIRST.replace("seeds: [0]", "seeds: [3]"),
    "scales: {smoke: {fixed: {width: null}}}": FIRST.replace("{fixed: {width: 4}, ", "{"),
    "scales: {desk: {fixed: {lr: 2.0}}}": FIRST.replace(
        "{rounds: 3}, grid: {lr: [0.5, 0.25]}", "{rounds: 3, lr: 2.0}"
    ),
    "scales: {paper: {fixed: {rounds: 9}}}": FIRST + "  paper: {fixed: {rounds: 9}}\n",
}


@pytest.mark.parametrize("own", WRITTEN_OUT)
def test_a_sweep_has_what_another_has_and_it_does_not_say(project, own):
    write(project, "own", f"like: first\n{own}")
    write(project, "whole", WRITTEN_OUT[own])
    one, other = cells.sweep("own"), cells.sweep("whole")
    assert one["figures"] == other["figures"] and one["metric"] == other["metric"]
    assert set(one["scales"]) == set(other["scales"])
    for scale in one["scales"]:
        assert sorted(asked("own", scale), key=str) == sorted(asked("whole", scale), key=str)


def test_the_other_stays_as_it_is(project):
    before = [asked("first", scale) for scale in ("smoke", "desk")]
    write(project, "own", "like: first\nfixed: {width: 32}\nscales: {smoke: null}")
    cells.sweep("own")
    assert [asked("first", scale) for scale in ("smoke", "desk")] == before


def test_a_sweep_that_is_like_one_with_a_search_waits_for_it_too(project):
    write(project, "search", "{notebook: walk, grid: {lr: [0.1, 0.2]}, scales: {desk: {}}}")
    write(project, "first", "{notebook: walk, scales: {desk: {tuned_by: {search: 1}}}}")
    write(project, "own", "like: first\nscales: {desk: {fixed: {rounds: 3}}}")
    write(project, "free", "like: first\nscales: {desk: {tuned_by: null}}")
    assert cells.tuned_by("own", "desk") == {"search": 1} and cells.plan("own", "desk")[0].waits
    assert cells.tuned_by("free", "desk") == {} and not cells.plan("free", "desk")[0].waits


def test_a_grid_of_a_scale_may_have_seeds_of_its_own(project):
    grids = "[{lr: [0.5], seed: [7, 8]}, {lr: [0.25]}]"
    write(project, "own", f"like: first\nscales: {{desk: {{grid: {grids}}}}}")
    given = [cell.parameters for cell in cells.plan("own", "desk")]
    seeds = {(p["lr"], p["seed"]) for p in given}
    assert seeds == {(0.5, 7), (0.5, 8), (0.25, 0), (0.25, 1)}


REFUSED = [
    ("like: first\nscales: {desk: {seeds: [1], grid: {seed: [2]}}}", ValueError, "has seeds, and so has its grid"),
    ("like: own", ValueError, "own.yaml: own is like own, which is like own"),
    ("like: second", ValueError, "own.yaml: own is like second, which is like first"),
    ("like: round", ValueError, "own.yaml: own is like round, which is like own"),
    ("like: frist", FileNotFoundError, "sweep 'frist': there is none; known: first, own"),
    ("like: 3", TypeError, "own.yaml: like must be a sweep, got 3"),
    ("like: first\nfixed: {widht: null}", ValueError, "own.yaml, fixed: widht is left out"),
    ("like: first\nneeds: null", ValueError, "own.yaml: needs is left out"),
    ("like: first\nscales: {paper: null}", ValueError, "own.yaml, scales: paper is left out"),
    ("like: first\ngird: {}", ValueError, "own.yaml: unknown key 'gird'"),
    ("like: first\nfixed: 3", TypeError, "own.yaml: fixed must be dict, got 3"),
    ("like: wrong", ValueError, "wrong.yaml: unknown key 'gird'"),
    ("fixed: {lr: null}\nnotebook: walk\nscales: {desk: {}}", TypeError, "parameter 'lr' was given None"),
]


@pytest.mark.parametrize("text, error, why", REFUSED)
def test_what_is_wrong_is_named(project, text, error, why):
    write(project, "second", "like: first")
    write(project, "round", "like: own")
    write(project, "wrong", "{notebook: walk, gird: {}}")
    write(project, "own", text)
    with pytest.raises(error) as caught:
        cells.plan("own", "desk")
    assert why in str(caught.value)


# ---- protocols ----

PROTOCOL = "{fixed: {lr: 0.5, width: 16}, lists: {few: [a, b], rates: [0.5, 0.25]}}"


@pytest.fixture
def paper(project):
    write(project, "protocols/paper", PROTOCOL)
    return project


def test_a_protocol_gives_values_that_the_sweep_does_not_set_and_lists_by_name(paper):
    write(paper, "own", """
protocol: paper
notebook: walk
fixed: {width: 32}
grid: {method: [$few, c]}
scales: {desk: {}, gpu: {grid: [{method: [$few]}, {method: [c], lr: [$rates, 1.0]}]}}
""")
    planned = [(p["method"], p["lr"], p["width"]) for _, _, p, _ in asked("own", "desk")]
    assert planned == [("a", 0.5, 32), ("b", 0.5, 32), ("c", 0.5, 32)]
    planned = [(p["method"], p["lr"]) for _, _, p, _ in asked("own", "gpu")]
    assert planned == [("a", 0.5), ("b", 0.5), ("c", 0.5), ("c", 0.25), ("c", 1.0)]
    assert cells.sweep("own")["grid"] == {"method": ["a", "b", "c"]}
    assert cells.sweeps() == ["first", "own"]


def test_a_grid_takes_a_value_out_of_the_protocol(paper):
    write(paper, "own", "{protocol: paper, notebook: walk, grid: {lr: [1.0]}, scales: {desk: {}}}")
    (cell,) = cells.plan("own", "desk")
    assert (cell.parameters["lr"], cell.parameters["width"]) == (1.0, 16)


def test_a_protocol_comes_with_the_sweep_that_another_is_like(paper):
    write(paper, "first", "{protocol: paper, notebook: walk, scales: {desk: {}}}")
    write(paper, "own", "{like: first, grid: {method: [$few]}}")
    write(paper, "free", "{like: first, protocol: null}")
    assert [(c.parameters["method"], c.parameters["width"]) for c in cells.plan("own", "desk")] == [
        ("a", 16), ("b", 16)
    ]
    assert cells.plan("free", "desk")[0].parameters["width"] == 8


WRONG_PROTOCOLS = [
    ("protocol: papre", PROTOCOL, ValueError, "no protocol 'papre'; known: paper"),
    ("grid: {method: [$fwe]}", PROTOCOL, ValueError, "no list $fwe; its protocol has: few, rates"),
    ("protocol: null\ngrid: {method: [$few]}", PROTOCOL, ValueError, "its protocol has: none"),
    ("", "{fixd: {}}", ValueError, "protocols/paper.yaml: unknown key 'fixd'; known: fixed, lists"),
    ("", "{lists: {few: a}}", TypeError, "protocols/paper.yaml: lists few must be a list"),
    ("", "{fixed: {wdith: 3}}", ValueError, "own.yaml: walk: unknown parameter 'wdith'"),
    ("", "{fixed: ", ValueError, "paper.yaml is no YAML"),
]


@pytest.mark.parametrize("text, protocol, error, why", WRONG_PROTOCOLS)
def test_a_wrong_protocol_is_named(project, text, protocol, error, why):
    write(project, "protocols/paper", protocol)
    write(project, "first", "{protocol: paper, notebook: walk, scales: {desk: {}}}")
    write(project, "own", f"like: first\n{text}")
    with pytest.raises(error) as caught:
        cells.plan("own", "desk")
    assert why in str(caught.value)


# ---- the study's own ----


def test_four_inner_steps_are_figure_6_but_for_the_steps():
    for scale in ("desk", "gpu"):
        base = {c.parameters["seed"]: c for c in cells.plan("huh_fig06", scale)
                if c.parameters["method"] == "vq + l2 + alt"}
        inner = cells.plan("huh_fig06_inner", scale)
        assert [c.parameters["seed"] for c in inner] == list(base)
        for cell in inner:
            same = base[cell.parameters["seed"]]
            assert cell.parameters == same.parameters | dict(inner=4, fused=False)
            assert cell.metric == same.metric
    assert "smoke" not in cells.sweep("huh_fig06_inner")["scales"]


@pytest.mark.parametrize("name", ["huh_fig06", "huh_fig06_inner"])
def test_committed_rows_are_still_planned(name):
    assert records.unplanned(name, "desk") == []
    states = set(records.in_results(cells.plan(name, "desk")).values())
    assert states <= {"current", "stale"}


def raw(name):
    return yaml.safe_load((ROOT / f"nbs/sweeps/{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in cells.sweeps() if "like" in raw(name)])
def test_nothing_is_said_twice(name):
    own, other = raw(name), cells.sweep(raw(name)["like"])
    pairs = [(own, other)]
    pairs += [(change or {}, other["scales"].get(at, {})) for at, change in own["scales"].items()]
    for mine, theirs in pairs:
        taken = theirs.get("fixed", {})
        again = [key for key, value in mine.get("fixed", {}).items() if taken.get(key) == value]
        assert again == []
        same = ("notebook", "metric", "figures", "seeds", "tuned_by")
        assert [key for key in same if key in mine and mine[key] == theirs.get(key)] == []


def test_the_rows_of_table_3_and_its_protocol_stand_once():
    rows = raw("protocols/huh")["lists"]["table3"]
    assert len(rows) == len(set(rows)) == 14
    for path in (ROOT / "nbs/sweeps").glob("*.yaml"):
        assert ", ".join(rows[:4]) + ", vq + l2 + replace, sq" not in path.read_text()
    for name in cells.sweeps():
        if grids.sweep(name)["protocol"] == "huh":
            own = raw(name).get("fixed", {})
            shared = raw("protocols/huh")["fixed"]
            assert not any(own.get(key) == value for key, value in shared.items())
