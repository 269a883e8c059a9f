"""Run every notebook of nbs/lib and compare it with what is committed: `python .ci/outputs.py`.

A cell that fails is a failure. So is a cell that shows something in one of the two, the run or the
committed notebook, and nothing in the other. As in nbdev_test, cells with `#| eval: false` or a
flag of settings.ini are left out, and the call that exports the notebook. Names of notebooks may
follow the command; none means all. Nothing is written into the tree.
"""

import multiprocessing
import os
import re
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from configparser import ConfigParser
from pathlib import Path
import nbformat
from nbformat import NotebookNode
import form

WORKERS = 2
# imported once, before the processes of the notebooks part from one another
PRELOAD = ["torch", "pandas", "matplotlib.pyplot", "execnb.shell", "nbformat"]


def flags() -> set[str]:
    "The directives of settings.ini whose cells are not tested."
    config = ConfigParser(delimiters=["="])
    config.read("settings.ini", encoding="utf-8")
    return set(config["DEFAULT"].get("tst_flags", "").split())


def is_skipped(cell: NotebookNode, skipped: set[str]) -> bool:
    "Whether a code cell is not run."
    directives = dict(re.findall(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", cell.source, re.M))
    never = directives.get("eval", "").strip().lower() == "false"
    return never or "nbdev_export(" in cell.source or not skipped.isdisjoint(directives)


def as_saved(output: dict) -> NotebookNode:
    "An output of the shell as a notebook has it: its text whole, not in lines."
    if "text" in output:
        output = output | {"text": "".join(output["text"])}
    return nbformat.from_dict(output)


def differences(where: str, committed: NotebookNode, shown: dict[int, bool]) -> list[str]:
    "Cells that show something (by number) and are committed without it, or the other way round."
    found = []
    for number, now in shown.items():
        then = any(map(form.shows, committed.cells[number].outputs))
        if now and not then:
            found.append(f"{where}[{number}]: shows something, and its output is not committed")
        if then and not now:
            found.append(f"{where}[{number}]: has an output, and shows nothing when run")
    return found


def leave_out_updates() -> None:
    "What fills the place of an earlier cell is an output of that cell, as it is in Jupyter."
    from IPython.core.displaypub import CapturingDisplayPublisher

    publish = CapturingDisplayPublisher.publish

    def publish_new(*args, update: bool = False, **options) -> None:
        if not update:
            publish(*args, **options)

    CapturingDisplayPublisher.publish = publish_new


def run(path: Path, skipped: set[str]) -> tuple[list[str], float]:
    "Run one notebook in its folder, in this process; its faults and the seconds it took."
    from execnb.shell import CaptureShell  # turns the process into a shell

    leave_out_updates()
    start = time.perf_counter()
    sys.path.insert(0, os.getcwd())
    committed = nbformat.read(path, as_version=4)
    os.chdir(path.parent)
    shell = CaptureShell(mpl_format="png")
    shown = {}
    for number, cell in form.code_cells(committed):
        if is_skipped(cell, skipped):
            continue
        outputs = [as_saved(output) for output in shell.run(cell.source)]
        if shell.exc is not None:
            text = "".join(traceback.format_exception(shell.exc))
            return [f"{path}[{number}]: fails\n{text}"], time.perf_counter() - start
        shown[number] = any(map(form.shows, outputs))
    return differences(str(path), committed, shown), time.perf_counter() - start


def main(names: list[str]) -> None:
    "Run the notebooks, each in a process of its own, two at a time; all before it fails."
    paths = [Path(name) for name in names] or sorted(Path().glob("nbs/lib/*.ipynb"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    found, begin = [], time.perf_counter()
    with ProcessPoolExecutor(WORKERS, context, max_tasks_per_child=1) as pool:
        # the later chapters take longest: they come first
        runs = {pool.submit(run, path, flags()): path for path in reversed(paths)}
        for done in as_completed(runs):
            try:
                faults, seconds = done.result()
            except Exception as error:  # the process itself was lost
                faults, seconds = [f"{runs[done]}: cannot be run, {error!r}"], 0.0
            print(f"{seconds:6.1f} s  {runs[done]}{'  FAILED' if faults else ''}", flush=True)
            found += faults
    if found:
        sys.exit("\n".join(found) + f"\n{len(found)} faults")
    print(f"{len(paths)} notebooks show what is committed; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
