"""Rows of older code that come out again take today's fingerprint, and no others do."""

import json
import shutil
import pytest
from projects import leave, new_project, notebook
from vqstudy import cells, code, confirm, files, provenance, records, study

PARAMETERS = "method: str = 'a'\nlengths: list = []\nseed: int = 0\nout: str = ''"
WALKS = """
notebook: walk
metric: metric
grid: {method: [a, b]}
seeds: [1, 0, 2]
scales: {desk: {}, gpu: {}}
"""
LONG = WALKS + "fixed: {lengths: [10, 40, 80]}\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, PARAMETERS, "x = 1", walks=WALKS, long=LONG)
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def change(project, line="x = 2", parameters=PARAMETERS):
    "Change the notebook's code, and with it the fingerprint of its cells."
    notebook(project / "nbs/runs/walk.ipynb", parameters, line)


def measure(cell, shift=0.0, loss=0.0, metrics={}, here=None, **options):
    "A run of a cell, whose numbers follow from seed and method; with a shift, others."
    seed = cell.parameters["seed"]
    here = dict(device=here or provenance.device())
    value = seed + ord(cell.parameters["method"]) / 7 + shift

    def history(steps, **at):
        return [dict(step=n, loss=value / n + loss) | at for n in steps]

    if cell.lengths:
        rows = [dict(updates=n, metric=value + n) | metrics for n in cell.lengths]
        trunk = history(n for n in (4, 8, 16, 32, 64) if n <= 0.8 * cell.lengths[-1])
        branches = [x for n in cell.lengths for x in history((n - 1, n), length=n)]
        leave(cell, {}, lengths=rows, history=trunk + branches, **here, **options)
    else:
        measured = dict(metric=value) | metrics
        leave(cell, measured, history=history((1, 2)), **here, **options)


def collected(name, scale="desk", **options):
    "All cells of a sweep, run and collected; no record stays."
    for cell in cells.plan(name, scale):
        measure(cell, **options)
    records.collect(name, scale)
    shutil.rmtree(cells.plan(name, scale)[0].folder.parent)


def settled(name, scale="desk", **options):
    "What confirming says by method, after its representatives have run."
    again = confirm.representatives([name], scale)
    for cell in again:
        measure(confirm.shortened(cell), **options)
    verdicts = confirm.settle([name], again)
    return {verdict.cell.parameters["method"]: verdict.differ for verdict in verdicts}


def states(name, scale="desk"):
    "By method, what is known of its rows."
    known = records.in_results(cells.plan(name, scale))
    found = {}
    for cell in cells.plan(name, scale):
        found.setdefault(cell.parameters["method"], set()).add(known[cell.id])
    return found


def stale_of(name):
    known = records.in_results(cells.plan(name, "desk"))
    return [cell for cell in cells.plan(name, "desk") if known[cell.id] == "stale"]


@pytest.mark.parametrize("name", ["walks", "long"])
def test_rows_that_come_out_again_are_current(project, name):
    collected(name)
    old = code.fingerprint("walk")
    change(project)
    assert states(name) == dict(a={"stale"}, b={"stale"})
    again = confirm.representatives([name], "desk")
    assert [(c.parameters["method"], c.parameters["seed"]) for c in again] == [("a", 0), ("b", 0)]
    assert {tuple(confirm.shortened(c).lengths) for c in again} == {(10,) if name == "long" else ()}
    before = (project / f"data/results/{name}.csv").read_text()
    assert settled(name) == dict(a=[], b=[])
    assert states(name) == dict(a={"current"}, b={"current"})
    after = (project / f"data/results/{name}.csv").read_text()
    assert after == before.replace(old, code.fingerprint("walk"))
    assert confirm.representatives([name], "desk") == []


@pytest.mark.parametrize("name", ["walks", "long"])
def test_a_last_bit_is_a_difference(project, name):
    collected(name)
    change(project)
    differ = settled(name, shift=2**-40)
    assert all(lines[0].startswith("metric metric: ") for lines in differ.values())
    assert states(name) == dict(a={"stale"}, b={"stale"})


@pytest.mark.parametrize("name", ["walks", "long"])
def test_a_history_is_compared(project, name):
    collected(name)
    change(project)
    differ = settled(name, loss=1e-9)
    assert all(lines[0].startswith("history, row 1, loss") for lines in differ.values()), differ
    assert states(name) == dict(a={"stale"}, b={"stale"})


def test_the_branch_of_a_length_is_compared(project):
    collected("long")
    change(project)
    again = confirm.representatives(["long"], "desk")
    for cell in again:
        short = confirm.shortened(cell)
        measure(short)
        path = short.folder / "history.csv"
        lines = path.read_text().splitlines()
        assert lines[-1].startswith("10,") and lines[1].startswith("4,")
        path.write_text("\n".join([*lines[:-1], lines[-1].replace("10,", "10,1", 1)]) + "\n")
    differ = [verdict.differ for verdict in confirm.settle(["long"], again)]
    assert all(lines[0].startswith("history of length 10, row 2, loss") for lines in differ), differ


def test_a_shorter_history_is_a_difference(project):
    collected("walks")
    change(project)
    again = confirm.representatives(["walks"], "desk")
    for cell in again:
        measure(cell)
        path = cell.folder / "history.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    differ = [verdict.differ for verdict in confirm.settle(["walks"], again)]
    assert differ == [["history: 1 rows, was 2"]] * 2


def test_a_method_decides_its_own_rows_alone(project):
    collected("walks")
    change(project)
    again = confirm.representatives(["walks"], "desk")
    measure(again[0])
    measure(again[1], shift=1.0)
    confirm.settle(["walks"], again)
    assert states("walks") == dict(a={"current"}, b={"stale"})


def test_a_new_metric_and_one_that_is_gone_are_differences(project):
    collected("walks")
    change(project)
    assert settled("walks", metrics=dict(usage=0.5))["a"] == ["metric usage: 0.5, was none"]
    for cell in cells.plan("walks", "desk"):
        measure(cell, metrics=dict(usage=0.5))
    records.collect("walks", "desk")
    change(project, "x = 3")
    assert settled("walks")["a"] == ["metric usage: none, was 0.5"]


def test_a_new_parameter_gets_its_neutral_value(project):
    collected("walks")
    change(project, parameters="wind: float = 0.5\nshade: str = 'none'\n" + PARAMETERS)
    assert settled("walks") == dict(a=[], b=[])
    rows = records.results("walks", "desk")
    assert set(rows.wind) == {0.5} and set(rows.shade) == {"none"}
    assert states("walks") == dict(a={"current"}, b={"current"})
    assert study.main(["rename", "--sweep", "walks"]) == 0
    assert states("walks") == dict(a={"current"}, b={"current"})


def test_another_processor_confirms_nothing(project, capsys):
    collected("walks", here="a CPU of old")
    change(project)
    assert study.main(["confirm", "--scale", "desk", "--sweep", "walks"]) == 1
    said = capsys.readouterr().out
    assert f"a · seed 0: its rows are from a CPU of old, this is {provenance.device()}" in said
    assert not (project / "data/runs/desk/.work").exists(), "it ran all the same"
    assert "it ran on" in settled("walks")["a"][0]
    assert states("walks") == dict(a={"stale"}, b={"stale"})


def test_on_a_gpu_the_record_says_where_it_ran(project):
    collected("walks", "gpu", here="NVIDIA A")
    change(project)
    again = confirm.representatives(["walks"], "gpu")
    assert confirm.elsewhere(again) == {}
    measure(again[0], here="NVIDIA A")
    measure(again[1], here="NVIDIA B")
    a, b = confirm.settle(["walks"], again)
    assert a.differ == [] and b.differ == ["it ran on NVIDIA B, and the rows are from NVIDIA A"]
    assert states("walks", "gpu") == dict(a={"current"}, b={"stale"})


def test_rows_of_other_code_or_processors_do_not_follow(project):
    planned = cells.plan("walks", "desk")
    first, lowest, third = planned[:3]
    assert [cell.parameters["seed"] for cell in planned[:3]] == [1, 0, 2]
    measure(first, code="of another time")
    measure(lowest)
    measure(third, here="a CPU of old")
    records.collect("walks", "desk")
    change(project)
    again = confirm.representatives(["walks"], "desk")
    assert {cell.id for cell in again} == {cell.id for cell in planned[:3]}
    assert list(confirm.elsewhere(again)) == [third.id]
    for cell in again:
        measure(cell, shift=float(cell.id == first.id))
    told = {v.cell.id: v.differ for v in confirm.settle(["walks"], again)}
    assert told[first.id][0].startswith("metric metric: ") and told[lowest.id] == []
    known = records.in_results(cells.plan("walks", "desk"))
    assert [known[cell.id] for cell in planned[:3]] == ["stale", "current", "stale"]


def test_a_cell_decides_the_rows_of_other_sweeps_too(project):
    names = ["walks", "long"]
    for name in names:
        collected(name)
    change(project)
    again = confirm.representatives(names, "desk")
    assert [(c.sweep, c.parameters["method"]) for c in again] == [("long", "a"), ("long", "b")]
    measure(confirm.shortened(again[0]))
    measure(confirm.shortened(again[1]), shift=1.0)
    verdicts = confirm.settle(names, again)
    assert [verdict.rows for verdict in verdicts] == [12, 12]
    assert states("walks") == states("long") == dict(a={"current"}, b={"stale"})
    for name in names:
        notes = json.loads((project / f"data/results/{name}.json").read_text())["cells"]["desk"]
        by = {note["confirmed"]["by"] for note in notes.values() if "confirmed" in note}
        assert by == {confirm.shortened(again[0]).id}


@pytest.mark.parametrize("what", ["dataset", "model"])
def test_another_network_or_data_set_does_not_follow(project, what):
    parameters = f"{what}: str = 'first'\n{PARAMETERS}"
    change(project, "x = 1", parameters)
    both = WALKS.replace("{method: [a, b]}", f"{{method: [a, b], {what}: [first, second]}}")
    files.write(project / "nbs/sweeps/walks.yaml", both)
    collected("walks")
    change(project, parameters=parameters)
    again = confirm.representatives(["walks"], "desk")
    assert len(again) == 4
    measure(again[0])
    assert [v.differ for v in confirm.settle(["walks"], again[:1])] == [[]]
    current = [c for c in cells.plan("walks", "desk") if c not in stale_of("walks")]
    assert {(c.parameters["method"], c.parameters[what]) for c in current} == {("a", "first")}


def test_rows_that_are_planned_no_more_stay_as_they_are(project, capsys):
    collected("walks")
    gone = cells.plan("walks", "desk")[2]
    files.write(project / "nbs/sweeps/walks.yaml", WALKS.replace("[1, 0, 2]", "[0, 1]"))
    change(project)
    assert settled("walks") == dict(a=[], b=[])
    table = files.read_table(project / "data/results/walks.csv")
    old = {row["cell"]: row["fingerprint"] for row in table}[gone.id]
    assert old == gone.fingerprint != code.fingerprint("walk")
    assert len(records.unplanned("walks", "desk")) == 2
    assert study.main(["plan", "--scale", "desk", "--sweep", "walks"]) == 0
    assert "walks: 2 cells in the results that the sweep has no more\n" in capsys.readouterr().out


def test_records_here_are_marked_with_the_rows(project):
    collected("long")
    for cell in cells.plan("long", "desk"):
        measure(cell)
    change(project)
    planned = cells.plan("long", "desk")
    assert {records.state(cell) for cell in planned} == {"stale"}
    assert settled("long") == dict(a=[], b=[])
    assert {records.state(cell) for cell in planned} == {"done"}
    table = project / "data/results/long.csv"
    before = table.read_bytes()
    records.collect("long", "desk")
    assert table.read_bytes() == before


def test_a_run_that_failed_confirms_nothing(project):
    collected("walks")
    change(project)
    first, second = confirm.representatives(["walks"], "desk")
    leave(first, {}, "failed")
    a, b = confirm.settle(["walks"], [first, second])
    assert a.differ == ["it did not run to its end: ValueError: no"]
    assert b.differ == ["it did not run to its end: it left no record"]


def test_a_run_that_diverges_now_is_another(project):
    collected("walks")
    change(project)
    first = confirm.representatives(["walks"], "desk")[0]
    leave(first, {}, "diverged", device=provenance.device())
    (verdict,) = confirm.settle(["walks"], [first])
    assert verdict.differ[0] == "status: diverged, was done"


def test_failed_rows_have_nothing_to_confirm(project):
    for cell in cells.plan("walks", "desk"):
        leave(cell, {}, "failed")
    records.collect("walks", "desk")
    change(project)
    assert confirm.representatives(["walks"], "desk") == []
    assert json.loads((project / "data/results/walks.json").read_text())["cells"]["desk"]
