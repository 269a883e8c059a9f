"""Figures that are drawn in place are left as they are committed."""

import json
import subprocess
import sys
from pathlib import Path
import nbformat
import pytest
from projects import new_project, notebook
from vqstudy import study

DRAWS = """from IPython.display import display
from PIL import Image
print("drawn")
display(Image.new("RGB", (8, 8), "white"))
{"scale": scale}"""


@pytest.fixture
def figure(tmp_path, monkeypatch):
    new_project(tmp_path, 'out: str = ""', "1", walks="{notebook: walk, scales: {desk: {}}}")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    path = tmp_path / "nbs/figs/spiral.ipynb"
    notebook(path, 'scale: str = "desk"', DRAWS)
    return path


def nbdev_clean(path):
    command = [Path(sys.executable).with_name("nbdev_clean"), "--fname", path]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)


def test_a_redrawn_notebook_tells_no_time_and_is_what_nbdev_would_leave(figure):
    assert study.redraw(["spiral"]) == 0
    first = figure.read_bytes()
    book = json.loads(first)
    assert list(book["metadata"]) == ["kernelspec"]
    assert [cell["metadata"] for cell in book["cells"]] == [{"tags": ["parameters"]}, {}]
    kinds = [output["output_type"] for output in book["cells"][1]["outputs"]]
    assert kinds == ["stream", "display_data", "execute_result"]
    nbdev_clean(figure)
    assert figure.read_bytes() == first
    assert study.redraw(["spiral"]) == 0 and figure.read_bytes() == first


def test_what_papermill_and_the_kernel_leave_is_taken_away(figure):
    book = nbformat.read(figure, 4)
    book.metadata |= dict(papermill=dict(duration=3.0), language_info=dict(version="3.11"))
    times = dict(execution={"iopub.execute_input": "2026"}, papermill=dict(duration=2.0))
    for number, cell in enumerate(book.cells):
        cell.metadata |= times
        cell.execution_count = number
    cleaned = study.cleaned(book)
    assert list(cleaned.metadata) == ["kernelspec"]
    assert [cell.metadata for cell in cleaned.cells] == [{"tags": ["parameters"]}, {}]
    assert {cell.execution_count for cell in cleaned.cells} == {None}


def test_a_figure_that_fails_stays_as_it_was(figure, capsys):
    notebook(figure, 'scale: str = "desk"', "1 / 0")
    before = figure.read_bytes()
    assert study.redraw(["spiral"]) == 1 and figure.read_bytes() == before
    assert "spiral  FAILED: " in capsys.readouterr().out
