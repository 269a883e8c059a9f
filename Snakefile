# The engine. It decides nothing by itself: `todo` names the cells that have no whole, current
# record, the tables to collect and the figures to draw; Snakemake puts them in order and hands them
# to processors, GPUs or a cluster. Its outputs are flags of this call (data/runs/.engine/<call>/),
# so it needs no memory between calls, deletes no record before a better one is there, and may be
# killed at any moment.
#   snakemake --cores 2 --keep-going --nolock --config scale=smoke sweep="huh_tab03"
import os
import shutil
import signal
import sys
import threading
import time
sys.path.insert(0, workflow.basedir)
from vqstudy import study
from snakemake.logging import logger

SCALE = str(config.get("scale", "smoke"))
PYTHON = sys.executable
FLAGS = "data/runs/.engine"
try:
    MISSING = study.option("MISSING", config.get("missing")) != 0
    BUDGET = study.option("BUDGET", config.get("budget"))
    DIRTY = study.option("DIRTY", config.get("dirty")) != 0
    BFLOAT16 = study.option("BFLOAT16", config.get("bfloat16")) != 0
    SWEEPS = study.chosen(config.get("sweep"), SCALE)
    CELLS, TABLES, FIGURES = study.todo(SWEEPS, SCALE, MISSING)
    if os.environ.get("VQSTUDY_ROWS"):
        # a sweep in its worktree leaves rows; figures are drawn where they are merged
        FIGURES = []
except study.REFUSALS as error:
    sys.exit(f"refused, nothing was run: {error}")
if {"-n", "--dry-run", "--dryrun"} & set(sys.argv):
    print(study.overview(SWEEPS, SCALE, MISSING))
if workflow.is_main_process:
    os.environ["VQSTUDY_ENGINE"] = str(os.getpid())
    if BUDGET:
        os.environ["VQSTUDY_DEADLINE"] = str(time.time() + BUDGET)

CALL = f"{FLAGS}/{time.time_ns()}-{os.getpid()}"
BY_ID = {cell.id: cell for cell in CELLS}


def flag(cell):
    "The flag of a cell of this call, by whether it takes the weights of others (rule child)."
    return f"{CALL}/{'child' if cell.parents else 'cell'}/{cell.id}"


# what `report` says at the end
REPORTED = ("CalledProcessError", "Exiting because a job", "At least one job did not complete")


def is_worth_showing(record):
    "Whether a line of the engine is progress, or trouble that `report` does not tell."
    if getattr(getattr(record, "event", None), "value", "") == "progress":
        return True
    return record.levelno >= 30 and not any(text in str(record.msg) for text in REPORTED)


def sweep_cells(wildcards):
    "The cells of this call that a sweep plans, also those that another sweep has too."
    planned = [cell.id for cell in study.plan(wildcards.sweep, SCALE)]
    return [flag(BY_ID[name]) for name in planned if name in BY_ID]


def figure_inputs(wildcards):
    "The tables that a figure reads; the ledger reads them all, and what the other figures leave."
    tables, figures = TABLES, [stem for stem in FIGURES if stem != "ledger"]
    if wildcards.figure != "ledger":
        tables = [name for name in TABLES if wildcards.figure in study.sweep(name)["figures"]]
        figures = []
    inputs = [f"{wildcards.call}/table/{name}" for name in tables]
    return inputs + [f"{wildcards.call}/figure/{stem}" for stem in figures]


if not config.get("verbose"):
    logger.addFilter(is_worth_showing)


wildcard_constraints:
    call=f"{FLAGS}/[^/]+",
    cell="[^/]+",
    sweep="[^/]+",
    figure="[^/]+",


rule study:
    input:
        [flag(cell) for cell in CELLS],
        [f"{CALL}/table/{name}" for name in TABLES],
        [f"{CALL}/figure/{stem}" for stem in FIGURES],


def parents(wildcards):
    "The cells of this call whose weights a cell takes."
    needed = BY_ID[wildcards.cell].parents.values()
    return [flag(cell) for cell in needed if cell.id in BY_ID]


rule cell:
    input: parents
    output: touch("{call}/cell/{cell}")
    threads: lambda wildcards: int(BY_ID[wildcards.cell].parameters.get("threads", 1))
    resources: gpu=lambda wildcards: int(study.wants_gpu(BY_ID[wildcards.cell]))
    params: sweep=lambda wildcards: BY_ID[wildcards.cell].sweep
    shell:
        "{PYTHON:q} -m vqstudy.study cell --scale {SCALE:q}"
        " --sweep {params.sweep:q} --cell {wildcards.cell:q}"


# A cell that takes weights goes before those that take none. Of a sweep that is stopped the rows
# are then those of whole chains: weights stay on their machine, and elsewhere would be made again.
use rule cell as child with:
    output: touch("{call}/child/{cell}")
    priority: 1


rule table:
    input: sweep_cells
    output: touch("{call}/table/{sweep}")
    localrule: True
    params: dirty="--dirty" if DIRTY else ""
    shell:
        "{PYTHON:q} -m vqstudy.study collect --scale {SCALE:q}"
        " --sweep {wildcards.sweep:q} {params.dirty} > /dev/null"


rule figure:
    input: figure_inputs
    output: touch("{call}/figure/{figure}")
    localrule: True
    shell: "{PYTHON:q} -m vqstudy.study draw --scale {SCALE:q} {wildcards.figure:q}"


def leave():
    shutil.rmtree(CALL, ignore_errors=True)
    print(study.report(SWEEPS, SCALE), flush=True)
    if os.environ.get("VQSTUDY_ROWS"):
        print(study.rows_left(SWEEPS, SCALE), flush=True)


onstart:
    # on a cluster the nodes may have what this machine has not
    if workflow.local_exec and (lacks := study.lacking(CELLS)):
        sys.exit(f"refused, nothing was run: {lacks}")
    slow = "" if BFLOAT16 or not workflow.local_exec else study.slow_bfloat16(CELLS)
    if slow:
        sys.exit(f"refused, nothing was run: {slow}")
    if reason := study.commit()["commit_unknown"]:
        print(f"the records will name no commit: {reason}", file=sys.stderr, flush=True)
    if SCALE != "smoke" and CELLS:
        try:
            # or it would be refused when all of them have run
            study.require_clean("refused, nothing was run", DIRTY)
        except ValueError as error:
            sys.exit(str(error))
    if workflow.local_exec and any(map(study.wants_gpu, CELLS)) and not study.gpus():
        reason = f"the cells want a GPU (scale {SCALE}) and there is none"
        sys.exit(f"refused, nothing was run: {reason}")
    # the scheduler takes SIGTERM as: start nothing more, finish what runs
    if "VQSTUDY_DEADLINE" in os.environ:
        left = float(os.environ["VQSTUDY_DEADLINE"]) - time.time()
        clock = threading.Timer(max(0, left), os.kill, (os.getpid(), signal.SIGTERM))
        clock.daemon = True
        clock.start()


onsuccess:
    leave()


# failed cells keep no other from the tables
onerror:
    for name in SWEEPS:
        try:
            study.collect(name, SCALE, DIRTY)
        except study.REFUSALS as error:
            print(error, flush=True)
    leave()
