"""Records and what becomes of them: evidence with its updates, and tables that are not written."""

import json
import pytest
from projects import leave, new_project, notebook
from vqstudy import cells, records, study
from vqstudy.stats import interval

PARAMETERS = """method: str = "a"
lengths: list = []
seed: int = 0
out: str = ""
"""
WALKS = "{notebook: walk, seeds: [0, 1], scales: {smoke: {}, desk: {}}}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, PARAMETERS, "1", walks=WALKS)
    for stem in ("curve", "toy"):
        notebook(tmp_path / f"nbs/figs/{stem}.ipynb", "x = 1")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


# ---- evidence ----

FOUND = {"early": interval([0.1, 0.2, 0.3]), "late": 0.5}
UPDATES = [
    (None, {"early": None, "late": None}),
    (780, {"early": 780, "late": 780}),
    ({"early": 20, "late": 40}, {"early": 20, "late": 40}),
    ({"late": 40}, {"early": None, "late": 40}),
]


@pytest.mark.parametrize("given, wanted", UPDATES)
def test_evidence_says_after_how_many_updates(project, given, wanted):
    path = records.evidence("curve", FOUND, "desk", given)
    assert json.loads(path.read_text()).get("updates") == given
    first = path.read_bytes()
    assert records.evidence("curve", FOUND, "desk", given).read_bytes() == first
    gathered = records.gathered()
    assert {name: one["updates"] for name, one in gathered.items()} == wanted
    assert gathered["early"]["contrast"].n == 3


def test_evidence_of_before_has_no_updates_and_is_read(project):
    path = records.evidence("curve", FOUND, "desk")
    old = path.read_bytes()
    assert b"updates" not in old
    records.evidence("toy", {"other": 1e-9})
    gathered = records.gathered()
    assert {one["updates"] for one in gathered.values()} == {None} and len(gathered) == 3
    # a file that says nothing of them is that of a call without them, byte for byte
    assert records.evidence("curve", FOUND, "desk").read_bytes() == old


WRONG_UPDATES = [
    (0, ValueError, "updates must be at least 1"),
    ({"late": 2.0}, TypeError, "updates of late must be an int"),
    ({"last": 40}, ValueError, "updates: nothing was found on last"),
]


@pytest.mark.parametrize("given, error, why", WRONG_UPDATES)
def test_wrong_updates_are_refused_and_leave_the_file(project, given, error, why):
    path = records.evidence("curve", FOUND, "desk", 780)
    before = path.read_bytes()
    with pytest.raises(error, match=why):
        records.evidence("curve", FOUND, "desk", given)
    assert path.read_bytes() == before


# ---- tables ----


def data(project):
    "All files below data/, but for locks."
    paths = (project / "data").rglob("*")
    return {path: path.read_bytes() for path in paths if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("scale", ["smoke", "desk"])
def test_where_nothing_has_run_no_table_is_written(project, scale, capsys):
    assert study.main(["collect", "--scale", scale, "--sweep", "walks"]) == 0
    assert capsys.readouterr().out == "walks: there is no record to collect\n"
    assert data(project) == {}


def test_a_failure_is_a_row(project, capsys):
    leave(cells.plan("walks", "desk")[0], {}, "failed")
    assert study.main(["collect", "--scale", "desk", "--sweep", "walks"]) == 0
    assert capsys.readouterr().out == "data/results/walks.csv\n"
    assert len((project / "data/results/walks.csv").read_text().splitlines()) == 2
