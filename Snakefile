# The engine. It decides nothing by itself: `todo` names the cells that have no whole, current record, the tables to
# collect and the figures to draw; Snakemake puts them in order and hands them to processors, GPUs or a cluster.
# Its outputs are flags of this one call (data/runs/.engine/<call>/), so it needs no memory between calls, deletes no
# record before a better one is there, and may be killed at any moment.
#   snakemake --cores 2 --keep-going --nolock --config scale=smoke sweep="huh_tab03"
import os, shutil, signal, sys, threading, time
sys.path.insert(0, workflow.basedir)
from vqstudy import study
from snakemake.logging import logger

SCALE, PYTHON, FLAGS = str(config.get("scale", "smoke")), sys.executable, "data/runs/.engine"
try:
    SWEEPS = study.chosen(config.get("sweep"), SCALE)
    CELLS, TABLES, FIGURES = study.todo(SWEEPS, SCALE, bool(int(config.get("missing") or 0)))
except (ValueError, TypeError, FileNotFoundError) as error:
    sys.exit(f"refused, nothing was run: {error}")
if {"-n", "--dry-run", "--dryrun"} & set(sys.argv): print(study.overview(SWEEPS, SCALE, bool(int(config.get("missing") or 0))))
if workflow.is_main_process:
    os.environ["VQSTUDY_ENGINE"] = str(os.getpid())
    if config.get("budget"): os.environ["VQSTUDY_DEADLINE"] = str(time.time() + float(config["budget"]))

CALL = f"{FLAGS}/{time.time_ns()}-{os.getpid()}"
BY_ID = {cell.id: cell for cell in CELLS}

# what `report` says at the end
SAID = ("CalledProcessError", "Exiting because a job", "At least one job did not complete")

def quiet(record):
    "Whether a line of the engine is worth showing: progress, and trouble that the wrapper and `report` do not tell."
    progress = getattr(getattr(record, "event", None), "value", "") == "progress"
    return progress or record.levelno >= 30 and not any(text in str(record.msg) for text in SAID)

def sweep_cells(wildcards):
    return [f"{wildcards.call}/cell/{cell.id}" for cell in CELLS if cell.sweep == wildcards.sweep]

def figure_inputs(wildcards):
    "The tables that a figure reads; the ledger reads all of them, and the evidence that other figures leave."
    last = wildcards.figure == "ledger"
    tables = [f"{wildcards.call}/table/{name}" for name in TABLES if last or wildcards.figure in study.sweep(name)["figures"]]
    return tables + [f"{wildcards.call}/figure/{stem}" for stem in FIGURES if last and stem != "ledger"]

if not config.get("verbose"): logger.addFilter(quiet)
wildcard_constraints: call=f"{FLAGS}/[^/]+", cell="[^/]+", sweep="[^/]+", figure="[^/]+"

rule study:
    input: [f"{CALL}/cell/{cell.id}" for cell in CELLS], [f"{CALL}/table/{name}" for name in TABLES], [f"{CALL}/figure/{stem}" for stem in FIGURES]

rule cell:
    output: touch("{call}/cell/{cell}")
    threads: lambda wildcards: int(BY_ID[wildcards.cell].parameters.get("threads", 1))
    resources: gpu=lambda wildcards: int(study.wants_gpu(BY_ID[wildcards.cell]))
    params: sweep=lambda wildcards: BY_ID[wildcards.cell].sweep
    shell: "{PYTHON} -m vqstudy.study cell --scale {SCALE} --sweep {params.sweep} --cell {wildcards.cell}"

rule table:
    input: sweep_cells
    output: touch("{call}/table/{sweep}")
    localrule: True
    shell: "{PYTHON} -m vqstudy.study collect --scale {SCALE} --sweep {wildcards.sweep} > /dev/null"

rule figure:
    input: figure_inputs
    output: touch("{call}/figure/{figure}")
    localrule: True
    shell: "{PYTHON} -m vqstudy.study draw --scale {SCALE} {wildcards.figure}"

def leave():
    shutil.rmtree(CALL, ignore_errors=True)
    print(study.report(SWEEPS, SCALE), flush=True)

onstart:
    if workflow.local_exec and any(map(study.wants_gpu, CELLS)) and not study.gpus():
        sys.exit(f"refused, nothing was run: the cells want a GPU (scale {SCALE}) and there is none")
    # the scheduler takes SIGTERM as: start nothing more, finish what runs
    if "VQSTUDY_DEADLINE" in os.environ:
        clock = threading.Timer(max(0, float(os.environ["VQSTUDY_DEADLINE"]) - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
        clock.daemon = True
        clock.start()

onsuccess: leave()

# failed cells keep no other from the tables
onerror:
    for name in SWEEPS: study.collect(name, SCALE)
    leave()
