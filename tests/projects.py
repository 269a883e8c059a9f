"""A small project of its own for a test: settings, notebooks, sweeps, and what runs leave."""

import json
from pathlib import Path
from typing import Any
import nbformat
import numpy as np
from vqstudy import files, records
from vqstudy.cells import Cell

PYTHON = dict(name="python3", display_name="python3", language="python")


def notebook(path: Path, *sources: str, tags=("parameters",), outputs=()) -> None:
    "A notebook of code cells, the first with the tags; its folder is made."
    made = [nbformat.v4.new_code_cell(source, outputs=list(outputs)) for source in sources]
    made[0].metadata.tags = list(tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    book = nbformat.v4.new_notebook(cells=made, metadata=dict(kernelspec=PYTHON))
    nbformat.write(book, path)


def new_project(folder: Path, parameters: str, code: str, **sweeps: str) -> Path:
    "A repository with one run notebook, `walk`, and sweeps as YAML."
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = vqstudy\n")
    notebook(folder / "nbs/runs/walk.ipynb", parameters, code)
    for name, text in sweeps.items():
        files.write(folder / f"nbs/sweeps/{name}.yaml", text)
    return folder


def leave(
    cell: Cell,
    metrics: dict[str, Any],
    status: str = "done",
    code: str | None = None,          # fingerprint, if not the present one
    seconds: float = 1.0,
    history: list[dict] = [],
    samples: bool = False,
    lengths: list[dict] = [],         # instead of metrics
    **provenance: Any,
) -> None:
    "A record, or the note of a failure, as a run leaves it."
    past = dict(fingerprint=code or cell.fingerprint) | provenance
    cost = dict(seconds=seconds)
    if status == "failed":
        error = "ValueError: no"
        note = records.make_record(cell.id, cell.parameters, past, status, {}, cost, error)
        files.write(cell.work / "failed.json", json.dumps(note))
    else:
        given = dict(metrics=metrics, cost=cost, lengths=lengths)
        record = records.make_record(cell.id, cell.parameters, past, status, **given)
        pair = np.zeros((2, 4, 3, 8, 8), "uint8") if samples else None
        records.save_record(cell.folder, record, history, pair)
