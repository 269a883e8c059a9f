"""What `make study` leaves at smoke scale: whole records, a table with a row a method, drawings that come out the same again."""

import subprocess
import sys
import pytest
from vqstudy.cells import plan, root, sweep, sweeps
from vqstudy.records import found, results, results_folder, state
from vqstudy.study import toys

SMOKE = [(name, stem) for name in sweeps("smoke") for stem in sweep(name)["figures"]]
pytestmark = pytest.mark.skipif(
    not results_folder("smoke").is_dir(),
    reason="`make study` has not run here; `make test` runs it first",
)


@pytest.mark.parametrize("name", sorted({name for name, _ in SMOKE}))
def test_every_cell_left_a_whole_record(name):
    cells = plan(name, "smoke")
    assert {state(cell) for cell in cells} == {"done"}
    rows = results(name, "smoke").set_index("cell")
    for cell in cells:
        record = found(cell)
        assert record["parameters"] == cell.parameters and record["status"] == "done"
        assert {p.name for p in cell.folder.iterdir()} >= {
            "record.json",
            "history.csv",
            "notebook.ipynb",
            "log.txt",
        }
        assert (cell.folder / "samples.png").is_file() or cell.notebook != "reconstruct"
        assert rows.loc[cell.id, cell.metric] == pytest.approx(
            record["metrics"][cell.metric], rel=1e-12
        )


TOYS = {
    "huh_a05_p_active",
    "ledger",
}  # one that computes and the one that reads all others; `make figures` draws every one, by the same helpers


@pytest.mark.parametrize("stem", sorted({stem for _, stem in SMOKE} | set(toys()) & TOYS))
def test_a_second_drawing_has_the_same_bytes(stem):
    files = {f: f.read_bytes() for f in (root() / "figures" / "smoke").glob(f"{stem}.*")}
    assert files and {f.suffix for f in files} <= {".md", ".svg"}
    subprocess.run(
        [sys.executable, "-m", "vqstudy.study", "draw", "--scale", "smoke", stem],
        check=True,
        cwd=root(),
        capture_output=True,
    )
    assert all(f.read_bytes() == old for f, old in files.items())


def test_the_table_has_a_row_for_every_method():
    text = (root() / "figures" / "smoke" / "huh_tab03_reconstruction.md").read_text()
    for cell in plan("huh_tab03", "smoke"):
        assert f"| {cell.parameters['method']} " in text
    assert "no finding" in text and "1 seed" in text
