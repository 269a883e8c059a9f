"""Runs a part of a run notebook inside a test."""

from typing import Any


def executed(book: dict[str, Any], until: str, **given: Any) -> dict[str, Any]:
    "The names that a notebook (its JSON) has once it has the name `until`; given: parameters."
    names = {}
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= given
        if until in names:
            return names
    raise AssertionError(f"no cell of the notebook makes {until}")
