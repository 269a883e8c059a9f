"""Write README.md from nbs/index.ipynb: its prose, its code, and the outputs it was saved with.

A slot such as `{{relative_gap}}` in its Markdown is filled from one dictionary, which the cell that
begins with `#| slots` shows. A slot without a value, and a value without a slot, are errors.
"""

import ast
import re
import sys
from pathlib import Path
import nbformat
from nbformat import NotebookNode

SLOT = re.compile(r"\{\{([\w.+ -]+)\}\}")


def output(cell: NotebookNode) -> list[str]:
    "What a code cell showed: Markdown as it is, everything else as plain text."
    parts = []
    for shown in cell.outputs:
        data = shown.get("data", {})
        text = data.get("text/markdown") or shown.get("text") or data.get("text/plain") or ""
        text = "".join(text).strip()
        if text:
            parts.append(text if "text/markdown" in data else f"```\n{text}\n```")
    return parts


def slots(notebook: NotebookNode) -> dict[str, str]:
    "The values of the slots, as the notebook was saved with them; none without such a cell."
    found = [cell for cell in notebook.cells if cell.source.startswith("#| slots")]
    if not found:
        return {}
    (cell,) = found
    return ast.literal_eval("".join(cell.outputs[-1]["data"]["text/plain"]))


def filled(text: str, values: dict[str, str]) -> str:
    "A text with its slots filled. Raises ValueError for a slot without a value."
    unknown = [name for name in SLOT.findall(text) if name not in values]
    if unknown:
        raise ValueError(f"the slot {unknown[0]} has no value; known: {', '.join(values)}")
    return SLOT.sub(lambda slot: values[slot[1]], text)


def blocks(notebook: NotebookNode) -> list[str]:
    "The README's blocks; `#| hide` and `#| slots` leave a cell out."
    values, parts = slots(notebook), []
    for cell in notebook.cells:
        if cell.source.startswith(("#| hide", "#| slots")):
            continue
        if cell.cell_type == "markdown":
            parts.append(filled(cell.source, values))
        else:
            parts += [f"```python\n{cell.source}\n```", *output(cell)]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    if unused := values.keys() - set(SLOT.findall(prose)):
        raise ValueError(f"no slot takes the value {sorted(unused)[0]}")
    return parts


def readme(notebook: NotebookNode) -> str:
    "The text of README.md. Raises ValueError as `filled` does."
    text = "\n\n".join(blocks(notebook))
    # the notebook lies one folder deeper than README.md
    return re.sub(r'(\]\(|src="|href=")\.\./', r"\1", text) + "\n"


if __name__ == "__main__":
    try:
        written = readme(nbformat.read("nbs/index.ipynb", as_version=4))
    except ValueError as error:
        sys.exit(f"nbs/index.ipynb: {error}")
    Path("README.md").write_text(written, encoding="utf-8")
