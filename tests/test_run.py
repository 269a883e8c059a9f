"""A run that diverges late: what it had measured before stands in its record and in the table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from projects import new_project
from vqstudy import cells, files, records, run

ROOT = Path(__file__).parents[1]
PARAMETERS = """diverges: int = 0  # the first step whose loss is not finite
lengths: list[int] = []
seed: int = 0
out: str = ""
"""
# the way of nbs/runs/reconstruct.ipynb: the record adds to what `fit` gives
TRAINS = """import torch
from torch import nn
from vqstudy.settings import Settings
from vqstudy.study import Run
from vqstudy.train import NonFiniteLoss, fit, reproducible
run = Run("walk", globals())
reproducible(seed, 1, "cpu")

def loss_fn(model, x, y):
    model.steps = getattr(model, "steps", 0) + 1
    return (model(x) - x).square().mean() * (float("nan") if model.steps == diverges else 1.0), {}

data = type("Images", (), dict(x=torch.arange(4 * 192).reshape(4, 3, 8, 8).byte(), y=None))
settings = Settings(lengths=tuple(lengths), warmup_updates=2, batch_size=2)
score = lambda model: dict(bias=model.bias.square().sum().item())
saved = dict(score=score, checkpoint=run.checkpoint, progress=False)
fitted = fit(nn.Conv2d(3, 3, 1), loss_fn, data, settings, **saved)
rows = [row | dict(images_seen=2 * row["updates"]) for row in fitted.lengths]
run.save(lengths=rows, history=fitted.history)
"""
# losses: 4 on the trunk, 1 on the branch of length 5, 4 on the trunk, 2 on the branch of 10, ...
SWEEP = """
notebook: walk
metric: bias
fixed: {lengths: [5, 10, 20]}
grid: {diverges: [0, 9, 2]}
scales: {desk: {}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A project in which three runs came to an end: whole, diverged late, and diverged at once."
    folder = new_project(tmp_path_factory.mktemp("late"), PARAMETERS, TRAINS, walks=SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VQSTUDY_ROOT", str(folder))
        shown = [wrapped(cell) for cell in cells.plan("walks", "desk")]
    return folder, shown


def wrapped(cell):
    "Run a cell by the wrapper; the line that it prints."
    words = ["cell", "--scale", "desk", "--sweep", "walks", "--cell", cell.id]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "vqstudy.study", *words]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def project(ran, tmp_path, monkeypatch):
    shutil.copytree(ran[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def test_what_a_run_finished_before_it_diverged_stands(project):
    whole, late, at_once = cells.plan("walks", "desk")
    # each length is the run that it would be alone, so the whole run says what must be there
    expected = records.found(whole)["lengths"][0]
    record = records.found(late)
    assert record["status"] == "diverged" and "NonFiniteLoss" in record["error"]
    assert record["lengths"] == [{k: expected[k] for k in expected if k != "images_seen"}]
    assert "lengths" not in records.found(at_once) and records.found(at_once)["metrics"] == {}
    assert {records.state(cell) for cell in (whole, late, at_once)} == {"done"}


def test_finished_lengths_are_rows_and_the_others_diverged(project):
    whole, late, at_once = cells.plan("walks", "desk")
    table = records.collect("walks", "desk", dirty=True)
    rows = {(row["cell"], row["updates"]): row for row in files.read_table(table)}
    ends = {key: row["status"] for key, row in rows.items()}
    lengths = ("5", "10", "20")
    assert [ends[whole.id, n] for n in lengths] == ["done"] * 3
    assert [ends[late.id, n] for n in lengths] == ["done", "diverged", "diverged"]
    assert [ends[at_once.id, n] for n in lengths] == ["diverged"] * 3
    assert rows[late.id, "5"]["bias"] == rows[whole.id, "5"]["bias"] != ""
    assert rows[late.id, "10"]["bias"] == ""
    # what the notebook adds behind `fit` is not known of a run that did not come there
    assert [rows[cell.id, "5"]["images_seen"] for cell in (whole, late)] == ["10", ""]
    curves = records.histories("walks", "desk").fillna({"length": 0})
    first = [curves[(curves.cell == c.id) & (curves.length == 5)].loss for c in (whole, late)]
    assert len(first[0]) == len(first[1]) > 0 and list(first[0]) == list(first[1])


def test_the_wrapper_says_what_stands(ran):
    _, (whole, late, at_once) = ran
    assert "at 5, " in whole and "at 20" in whole and "diverged" not in whole
    assert "at 5, none at 10, none at 20  diverged" in late
    assert "bias" not in at_once and "  diverged  " in at_once


def test_a_checkpoint_of_other_code_or_weights_is_another_file(monkeypatch):
    monkeypatch.delenv("VQSTUDY_NEEDS", raising=False)
    names = [run.checkpoint_name(*key) for key in (("a-0", "f"), ("a-0", "g"), ("a-1", "f"))]
    monkeypatch.setenv("VQSTUDY_NEEDS", '{"walk": {}}')
    names.append(run.checkpoint_name("a-0", "f"))
    assert len(set(names)) == 4


def test_a_damaged_checkpoint_leaves_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert run.reached(path) == dict(lengths=[], history=[])
    path.write_bytes(b"PK\x03\x04")
    assert run.reached(path) == dict(lengths=[], history=[])
