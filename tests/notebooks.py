"""Runs notebooks, or parts of them, without a kernel."""

import contextlib
import io
import json
import multiprocessing
from typing import Any
from vqstudy.code import root

# a process that has the imports already; each drawing is a process that parts from it
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch", "pandas", "seaborn"])


def executed(book: dict[str, Any], until: str = "", **given: Any) -> dict[str, Any]:
    """The names that a notebook (its JSON) has at its end, or once it has the name `until`.

    given: parameters.
    """
    names = {"display": print}
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= given
        if until in names:
            return names
    if until:
        raise AssertionError(f"no cell of the notebook makes {until}")
    return names


def _draw(stem: str, scale: str) -> None:
    book = json.loads((root() / f"nbs/figs/{stem}.ipynb").read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):
        executed(book, scale=scale)


def drawn(stem: str, scale: str) -> bool:
    "Draw a figure in a process of its own; whether its notebook ran to the end."
    process = FRESH.Process(target=_draw, args=(stem, scale))
    process.start()
    process.join()
    return process.exitcode == 0
