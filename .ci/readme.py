"""Write README.md from nbs/index.ipynb: its prose, its code, and the outputs it was saved with."""

from pathlib import Path
import nbformat
from nbformat import NotebookNode


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


def blocks(notebook: NotebookNode) -> list[str]:
    "The README's blocks; `#| hide` leaves a cell out, `#| output` leaves only what it showed."
    parts = []
    for cell in notebook.cells:
        if cell.source.startswith("#| hide"):
            continue
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.source.startswith("#| output"):
            parts += output(cell)
        else:
            parts += [f"```python\n{cell.source}\n```", *output(cell)]
    return parts


text = "\n\n".join(blocks(nbformat.read("nbs/index.ipynb", as_version=4)))
# the notebook lies one folder deeper than README.md
text = text.replace("](../", "](").replace('src="../', 'src="')
Path("README.md").write_text(text + "\n", encoding="utf-8")
