"""Weights that one cell keeps and another takes: plans, states, and what is refused."""

import json
import shutil
import pytest
import torch
from projects import leave, new_project, notebook
from vqstudy import cells, code, confirm, files, provenance, records, study, weights

WALK = "method: str = 'a'\nseed: int = 0\nlr: float = 0.5\nout: str = ''"
PRIOR = "tokenizer: str = ''\nmethod: str = 'a'\nseed: int = 0\ndepth: int = 2\nout: str = ''"
KEPT = """
notebook: walk
weights: keep
grid: {method: [a, b]}
seeds: [0, 1]
scales: {desk: {}, gpu: {}}
"""
NEEDY = """
notebook: prior
metric: metric
needs: {tokenizer: kept}
grid: {method: [b, a]}
seeds: [1]
scales: {desk: {}, smoke: {}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, WALK, "x = 1", kept=KEPT, needy=NEEDY)
    notebook(tmp_path / "nbs/runs/prior.ipynb", PRIOR, "y = 1")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def keep(cell, value=1.0):
    "The record of a cell with its weights, as a run leaves it."
    kept = weights.save_weights(cell.folder, dict(w=torch.full((2,), value)))
    leave(cell, dict(metric=value), weights=kept)
    return kept


def needy(scale="desk"):
    return cells.plan("needy", scale)


def test_the_parent_has_the_method_and_seed(project):
    for cell in needy():
        (parent,) = cell.parents.values()
        assert parent.sweep == "kept" and parent.keeps and not cell.keeps
        assert parent.parameters["method"] == cell.parameters["method"]
        assert parent.parameters["seed"] == cell.parameters["seed"] == 1
        assert cell.parameters["tokenizer"] == parent.id
        assert parent in cells.plan("kept", "desk")
        told = {"tokenizer": parent.fingerprint}
        assert cell.fingerprint == cells.combined(code.fingerprint("prior"), told)


def test_parent_code_changes_the_childs_fingerprint_and_parameters_its_id(project):
    before = needy()
    notebook(project / "nbs/runs/walk.ipynb", WALK, "x = 2")
    after = needy()
    assert [cell.id for cell in after] == [cell.id for cell in before]
    assert not {cell.fingerprint for cell in after} & {cell.fingerprint for cell in before}
    files.write(project / "nbs/sweeps/kept.yaml", KEPT + "fixed: {lr: 0.25}\n")
    assert not {cell.id for cell in needy()} & {cell.id for cell in before}
    assert [cell.fingerprint for cell in needy()] == [cell.fingerprint for cell in after]


def test_a_changed_parent_makes_the_child_stale(project):
    for cell in needy():
        keep(cell.parents["tokenizer"])
        leave(cell, dict(metric=2.0))
    records.collect("needy", "desk")
    assert study.todo(["needy"], "desk")[0] == []
    notebook(project / "nbs/runs/walk.ipynb", WALK, "x = 2")
    assert {records.state(cell) for cell in needy()} == {"stale"}
    assert set(records.in_results(needy()).values()) == {"stale"}
    names = [(cell.sweep, cell.parameters["method"]) for cell in study.todo(["needy"], "desk")[0]]
    assert names == [("kept", "b"), ("kept", "a"), ("needy", "b"), ("needy", "a")]


ITSELF = NEEDY.replace("kept}", "needy}") + "weights: keep\n"
TWO_RATES = KEPT.replace("{method: [a, b]}", "{method: [a, b], lr: [0.1, 0.2]}")
OTHER_SEED = "needs tokenizer: kept has no cell of method 'b', seed 5 at scale desk"
BY_BOTH = "parameter 'tokenizer' is set by the sweep, and by its needs"
WRONG = [
    ("needy", NEEDY.replace("seeds: [1]", "seeds: [5]"), OTHER_SEED),
    ("kept", KEPT.replace("weights: keep\n", ""), "needs tokenizer: kept keeps no weights"),
    ("kept", KEPT.replace("keep", "kept"), "weights must be '' or 'keep', got 'kept'"),
    ("kept", TWO_RATES, "kept has 2 cells of method 'b', seed 1"),
    ("kept", KEPT.replace("desk: {}, ", ""), "kept.yaml: no scale 'desk'"),
    ("needy", NEEDY.replace("kept}", "gone}"), "sweep 'gone': there is none"),
    ("needy", NEEDY.replace("tokenizer:", "encoder:"), "unknown parameter 'encoder'"),
    ("needy", NEEDY + "fixed: {tokenizer: walk-1}\n", BY_BOTH),
    ("needy", ITSELF, "needs tokenizer: needy needs needy"),
]


@pytest.mark.parametrize("name, text, why", WRONG)
def test_wrong_needs_are_refused_by_name(project, name, text, why):
    files.write(project / f"nbs/sweeps/{name}.yaml", text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        needy()
    assert str(caught.value).startswith("needy.yaml: ") and why in str(caught.value)


def test_parents_that_are_missing_run_first(project):
    b, a = needy()
    todo = [cell.id for cell in study.todo(["needy"], "desk")[0]]
    assert todo == [b.parents["tokenizer"].id, a.parents["tokenizer"].id, b.id, a.id]
    keep(b.parents["tokenizer"])
    todo = [cell.id for cell in study.todo(["needy"], "desk")[0]]
    assert todo == [a.parents["tokenizer"].id, b.id, a.id]
    # the parents' own sweep names each of them once
    both = [cell.id for cell in study.todo(["kept", "needy"], "desk")[0]]
    assert len(both) == len(set(both)) == 5


def test_in_a_fresh_clone_a_parent_with_a_current_row_runs_again_for_its_weights(project):
    b, a = needy()
    for cell in cells.plan("kept", "desk"):
        keep(cell)
    leave(b, dict(metric=2.0))
    for name in ("kept", "needy"):
        records.collect(name, "desk")
    shutil.rmtree(project / "data/runs")
    assert set(records.in_results(cells.plan("kept", "desk")).values()) == {"current"}
    todo = [cell.id for cell in study.todo(["kept", "needy"], "desk", missing=True)[0]]
    assert todo == [a.parents["tokenizer"].id, a.id]


FAULTS = ["no weights", "no record", "stale", "failed", "never kept"]


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_are_as_good_as_their_record(project, fault):
    cell = cells.plan("kept", "desk")[0]
    keep(cell)
    assert weights.has_weights(cell)
    if fault == "no weights":
        (cell.folder / weights.WEIGHTS).unlink()
    elif fault == "no record":
        (cell.folder / "record.json").unlink()
    elif fault == "stale":
        leave(cell, dict(metric=1.0), code="older", weights="w")
    elif fault == "failed":
        leave(cell, {}, "diverged", weights="w")
    else:
        leave(cell, dict(metric=1.0))
    assert not weights.has_weights(cell)


def test_a_cell_without_its_parents_weights_is_refused_by_name(project, capsys):
    cell = needy()[0]
    parent = cell.parents["tokenizer"]
    words = ["cell", "--scale", "desk", "--sweep", "needy", "--cell", cell.id]
    assert study.main(words) == 2
    said = capsys.readouterr().err
    whose = f"tokenizer, the weights of {parent.id} (kept: b · seed 1), and they are not here"
    assert f"{cell.id} needs {whose}; `make study SCALE=desk SWEEP=needy`" in said
    assert not cell.work.exists()


def test_a_run_takes_the_weights_of_its_parent(project, monkeypatch):
    monkeypatch.chdir(project)
    cell = needy()[0]
    kept = keep(cell.parents["tokenizer"], 3.0)
    run = study.Run("prior", cell.parameters)
    assert run.cell == cell.id
    parent = run.parent("tokenizer")
    assert parent.weights["w"].tolist() == [3.0, 3.0] and parent.parameters["method"] == "b"
    past = run.save(dict(metric=1.0))["provenance"]
    assert past["fingerprint"] == cell.fingerprint
    told = dict(cell=parent.told["cell"], weights=kept)
    assert past["parents"]["tokenizer"].items() >= told.items()
    # without its weights it is another run
    past = study.Run("prior", cell.parameters).save({})["provenance"]
    assert past["fingerprint"] != cell.fingerprint


def test_a_parent_that_is_stale_makes_a_stale_record(project, monkeypatch):
    monkeypatch.chdir(project)
    keep(needy()[0].parents["tokenizer"])
    notebook(project / "nbs/runs/walk.ipynb", WALK, "x = 2")
    cell = needy()[0]
    run = study.Run("prior", cell.parameters)
    run.parent("tokenizer")
    assert run.save({})["provenance"]["fingerprint"] != cell.fingerprint


def test_a_run_by_hand_without_a_parent_is_told(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match="parameter 'tokenizer' names the cell .* it is empty"):
        study.Run("prior", {}).parent("tokenizer")
    run = study.Run("prior", dict(tokenizer="walk-gone"))
    with pytest.raises(FileNotFoundError, match="tokenizer: the weights of cell walk-gone are not"):
        run.parent("tokenizer")


def test_damaged_weights_are_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    cell = needy()[0]
    parent = cell.parents["tokenizer"]
    keep(parent)
    path = parent.folder / weights.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="are not those of its record"):
        study.Run("prior", cell.parameters).parent("tokenizer")


def test_weights_are_kept_where_the_sweep_says_so(project, monkeypatch):
    monkeypatch.chdir(project)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    plain = study.Run("walk", {}).save({}, weights=module)
    assert "weights" not in plain["provenance"]
    monkeypatch.setenv("VQSTUDY_WEIGHTS", "keep")
    with pytest.raises(ValueError, match="the sweep keeps weights: run.save takes them"):
        study.Run("walk", {}).save({})
    run = study.Run("walk", dict(seed=1))
    record = run.save({}, weights=module)
    told = weights.parent_of("walk", run.cell)
    assert told.told["weights"] == record["provenance"]["weights"]
    fresh = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    fresh.load_state_dict(told.weights)
    pairs = zip(module.state_dict().values(), fresh.state_dict().values())
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_belongs_to_the_weights_that_were_taken(project, monkeypatch):
    monkeypatch.chdir(project)
    names = set()
    for told in ("", "1", "2"):
        monkeypatch.setenv("VQSTUDY_NEEDS", told)
        names.add(study.Run("prior", {}).checkpoint.name)
    assert len(names) == 3


def test_a_confirmed_parent_needs_no_new_weights(project):
    for cell in cells.plan("kept", "desk"):
        keep(cell)
        path = cell.folder / "record.json"
        record = json.loads(path.read_text())
        record["provenance"]["device"] = provenance.device()
        path.write_text(json.dumps(record))
    records.collect("kept", "desk")
    notebook(project / "nbs/runs/walk.ipynb", WALK, "x = 2")
    parent = needy()[0].parents["tokenizer"]
    assert not weights.has_weights(parent)
    again = confirm.representatives(["kept"], "desk")
    for cell in again:
        kept = weights.save_weights(cell.folder, dict(w=torch.ones(2)))
        leave(cell, dict(metric=1.0), weights=kept, device=provenance.device())
    assert [verdict.differ for verdict in confirm.settle(["kept"], again)] == [[], []]
    assert weights.has_weights(parent)
