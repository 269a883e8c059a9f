"""What `make study` leaves at smoke scale: whole records, full tables, drawings that repeat."""

import pytest
from notebooks import drawn
from vqstudy.cells import plan, root, sweep, sweeps
from vqstudy.records import entries, found, results, results_folder, state
from vqstudy.study import toys

SMOKE = [(name, stem) for name in sweeps("smoke") for stem in sweep(name)["figures"]]
DRAWN = root() / "figures" / "smoke"
FILES = {"record.json", "history.csv", "notebook.ipynb", "log.txt"}
pytestmark = pytest.mark.skipif(
    not results_folder("smoke").is_dir(),
    reason="`make study` has not run here; `make test` runs it first",
)


@pytest.mark.parametrize("name", sorted({name for name, _ in SMOKE}))
def test_every_cell_left_a_whole_record(name):
    cells = plan(name, "smoke")
    assert {state(cell) for cell in cells} == {"done"}
    rows = results(name, "smoke").groupby("cell").last()
    for cell in cells:
        record = found(cell)
        assert record["status"] == "done" and record["parameters"] == cell.parameters
        files = {path.name for path in cell.folder.iterdir()}
        assert files >= FILES
        assert "samples.png" in files or cell.notebook != "reconstruct"
        value = entries(record)[-1].metrics[cell.metric]
        assert rows.loc[cell.id, cell.metric] == pytest.approx(value, rel=1e-12)


# of the toys one that computes, and the one that reads all others: the same helpers draw the rest
REDRAWN = {stem for _, stem in SMOKE} | set(toys()) & {"huh_a05_p_active", "ledger"}


@pytest.mark.parametrize("stem", sorted(REDRAWN))
def test_a_second_drawing_has_the_same_bytes(stem):
    files = {path: path.read_bytes() for path in DRAWN.glob(f"{stem}.*")}
    assert files and {path.suffix for path in files} <= {".md", ".svg"}
    assert drawn(stem, "smoke")
    assert all(path.read_bytes() == old for path, old in files.items())


def test_the_table_has_a_row_for_every_method():
    text = (DRAWN / "huh_tab03_reconstruction.md").read_text()
    for cell in plan("huh_tab03", "smoke"):
        assert f"| {cell.parameters['method']} " in text
    assert "no finding" in text and "1 seed" in text
