"""Tables say where they are from, in links that lead there from where the table lies."""

import re
import subprocess
from pathlib import Path
import pandas as pd
import pytest
from projects import leave, new_project, notebook
from vqstudy import cells, plots, records

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)\)")
TABLE = pd.DataFrame({"method": ["vq", "vq + l2"], "mse": ["0.010", "0.0100"]})
WALK = 'method: str = "a"\nseed: int = 0\nout: str = ""'
WALKS = """notebook: walk
figures: [walks]
grid: {method: [a, b]}
scales: {smoke: {}, desk: {}}
"""
OTHER = "like: walks\nscales: {smoke: null}\n"  # of the same figure, and not measured
SEARCH = WALKS.replace("figures: [walks]\n", "")


def links_of(text):
    "The last line's links, by text; the targets of some texts are several."
    found = {}
    for word, target in LINK.findall(text.splitlines()[-1]):
        found.setdefault(word, []).append(target)
    return found


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with results of two of its three sweeps, and with evidence."
    new_project(tmp_path, WALK, "x = 1", walks=WALKS, walks_other=OTHER, search=SEARCH)
    notebook(tmp_path / "nbs/figs/walks.ipynb", "x = 1")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    for name, scale in (("walks", "desk"), ("walks", "smoke"), ("search", "desk")):
        for cell in cells.plan(name, scale):
            leave(cell, dict(mse=1.0))
        records.collect(name, scale, dirty=True)
    records.evidence("walks", {"some-claim": 0.0})
    return tmp_path


def test_a_table_leads_to_its_notebook_its_sweeps_and_the_commits_of_its_rows(project):
    path = plots.save_table(TABLE, "walks", "desk", "A caption.")
    text = path.read_text()
    assert text.startswith("A caption.\n\n| method | mse |\n") and "| 0.0100 |\n\nFrom" in text
    assert text.splitlines()[-1] == (
        "From: [notebook](../nbs/figs/walks.ipynb), [walks](../nbs/sweeps/walks.yaml) "
        "([rows](../data/results/walks.csv), [commits](../data/results/walks.json)), "
        "[walks_other](../nbs/sweeps/walks_other.yaml), "
        "[evidence](../data/results/toys/walks.json)"
    )
    for target in sum(links_of(text).values(), []):
        assert (path.parent / target).is_file()
    again = path.read_bytes()
    assert plots.save_table(TABLE, "walks", "desk", "A caption.").read_bytes() == again


def test_a_table_of_smoke_lies_deeper_and_leads_to_the_rows_of_smoke(project):
    path = plots.save_table(TABLE, "walks", "smoke", "A caption.")
    links = links_of(path.read_text())
    assert path.parent == project / "figures/smoke"
    assert links["notebook"] == ["../../nbs/figs/walks.ipynb"] and "evidence" not in links
    assert links["rows"] == ["../../data/runs/smoke/results/walks.csv"]
    assert all((path.parent / target).is_file() for each in links.values() for target in each)


def test_a_table_may_show_rows_of_sweeps_that_do_not_name_its_figure(project):
    links = links_of(plots.way_back("walks", names=["search", "walks"]))
    assert set(links) == {*"notebook walks walks_other search rows commits evidence".split()}
    assert [Path(target).stem for target in links["commits"]] == ["walks", "search"]


def test_a_table_of_no_notebook_ends_with_the_table(project, tmp_path):
    path = plots.save_table(TABLE, "nobody", folder=tmp_path / "elsewhere")
    assert path.read_text() == f"{plots.as_markdown(TABLE)}\n"


# ---- what is committed ----


def git_files(*patterns):
    command = ["git", "ls-files", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


TABLES = [Path(name) for name in git_files("figures/*.md")]
# each claim of the ledger has links of its own (tests/test_ledger.py)
OF_ONE_FIGURE = [path for path in TABLES if path.stem != "ledger"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_link_of_a_committed_table_leads_to_a_file_of_the_repository(path):
    known = set(git_files())
    targets = [target for _, target in LINK.findall((ROOT / path).read_text(encoding="utf-8"))]
    targets = [target for target in targets if not target.startswith("http")]
    found = {str((ROOT / path.parent / t).resolve().relative_to(ROOT)) for t in targets}
    assert targets and found <= known, found - known


@pytest.mark.parametrize("path", OF_ONE_FIGURE, ids=lambda path: path.stem)
def test_a_committed_table_leads_to_its_notebook_and_to_the_commits_of_its_rows(path):
    targets = {target for _, target in LINK.findall((ROOT / path).read_text(encoding="utf-8"))}
    wanted = {f"nbs/figs/{path.stem}.ipynb"}
    for name in cells.sweeps():
        results = {f"data/results/{name}.csv", f"data/results/{name}.json"}
        if path.stem in cells.sweep(name)["figures"]:
            wanted |= {f"nbs/sweeps/{name}.yaml"} | results & set(git_files("data/results"))
    assert {f"../{file}" for file in wanted} <= targets
