"""Faults of the engine: processes killed with -9, cells that raise, wrong sweeps, changed code, a time budget.
Each test has a small project of its own, with this repository's package, Snakefile and Makefile, and runs the real engine."""

import json, os, re, shutil, subprocess, sys, time
from pathlib import Path
import psutil, pytest

ROOT = Path(__file__).parents[1]
RECORDS = "data/runs/smoke"

WALK = [
    "method: str = 'quick'  # how the cell behaves\nseed: int = 0\nout: str = ''",
    """
import os, subprocess, sys, time
from pathlib import Path
from vqstudy.study import Run
from vqstudy.toy import walk
run = Run("walk", globals())
class OutOfTime(Exception): pass
beat = "import time, sys\\nwhile True: open(sys.argv[1], 'a').write('.'); time.sleep(.1)"
""",
    """
if method == "slow":
    child = subprocess.Popen([sys.executable, "-c", beat, "beats.child"])
    Path("pids").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
    while Path("hold").exists(): open("beats", "a").write("."); time.sleep(.1)
if method == "late" and not run.checkpoint.exists():
    while run.deadline and time.time() < run.deadline: time.sleep(.1)
    if run.deadline: run.checkpoint.write_text("half way"); raise OutOfTime("after 3 epochs")
""",
    "run.save(dict(distance=walk(method, seed), resumed=run.checkpoint.exists()), [dict(epoch=1, loss=.5)])",
]
TALK = [
    "seed: int = 0\nout: str = ''",
    "from vqstudy.study import Run\nrun = Run('talk', globals())",
    "run.save(dict(words=seed))",
]
FIGURE = [
    "scale: str = 'smoke'",
    """
from pathlib import Path
from vqstudy.records import results
Path("figures/smoke").mkdir(parents=True, exist_ok=True)
Path("figures/smoke/walks.md").write_text(results("walks", scale)[["method", "seed", "distance"]].to_csv())
""",
]


def notebook(path, cells, tags=("parameters",)):
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata=dict(tags=[] if i else list(tags)),
            source=source,
            outputs=[],
            execution_count=None,
        )
        for i, source in enumerate(cells)
    ]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))


class Project:
    "A small project in a folder, and the commands of its Makefile."

    def __init__(self, folder, **sweeps):
        self.folder = folder
        for name in ("settings.ini", "Snakefile", "Makefile"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(
            ROOT / "vqstudy", folder / "vqstudy", ignore=shutil.ignore_patterns("__pycache__")
        )
        (folder / "vqstudy/toy.py").write_text(
            "def walk(method, seed):\n    if method == 'bad': raise KeyError('no way')\n    return seed + .5\n"
        )
        notebook(folder / "nbs/runs/walk.ipynb", WALK)
        notebook(folder / "nbs/runs/talk.ipynb", TALK)
        if any("figures: [walks]" in sweep for sweep in sweeps.values()):
            notebook(
                folder / "nbs/figs/walks.ipynb", FIGURE
            )  # one that no sweep names would be drawn at once
        (folder / "nbs/sweeps").mkdir()
        for name, sweep in sweeps.items():
            (folder / f"nbs/sweeps/{name}.yaml").write_text(sweep)
        keep = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("VQSTUDY_", "MAKE", "SLURM_"))
        }
        self.env = keep | dict(
            PYTHONPATH=str(folder),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

    def make(self, *words):
        "Run one command to its end; returns the exit code and what it printed."
        done = subprocess.run(
            ["make", "VENV=none", "CORES=2", *words],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        return done.returncode, done.stdout + done.stderr

    def start(self):
        "Start the engine itself, as `make study` would; the log goes to a file."
        shown = subprocess.run(
            ["make", "-n", "VENV=none", "CORES=2", "study"],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        with open(self.folder / "engine.log", "w") as log:
            return subprocess.Popen(
                f"exec {shown.stdout}",
                shell=True,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
            )

    def records(self):
        "By cell: bytes and time of every whole record."
        files = (self.folder / RECORDS).glob("*/record.json")
        return {path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def methods(self):
        return sorted(
            json.loads(content)["parameters"].get("method", "talk")
            for content, _ in self.records().values()
        )

    def rows(self, name="walks"):
        import csv

        with open(self.folder / RECORDS / f"results/{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def wait_for(condition, seconds=90, what="condition"):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} not within {seconds} s")
        time.sleep(0.1)
    return value


def family(pid):
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def running(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_kill_engine_wrapper_kernel(tmp_path):
    project = Project(
        tmp_path,
        walks="{notebook: walk, metric: distance, figures: [walks], grid: {method: [quick, brisk, slow]}, scales: {smoke: {}}}",
    )
    hold, pids, beats = tmp_path / "hold", tmp_path / "pids", tmp_path / "beats"
    hold.touch()

    def started():
        "Start the engine and wait until only the slow cell runs: its engine, and the ids of wrapper, kernel and the kernel's child."
        pids.unlink(missing_ok=True)
        engine = project.start()
        wait_for(
            lambda: (
                pids.exists()
                and len(pids.read_text().split()) == 3
                and (tmp_path / "beats.child").exists()
            ),
            what="the slow cell's start",
        )
        wait_for(lambda: project.methods() == ["brisk", "quick"], what="two finished cells")
        return engine, *map(int, pids.read_text().split())

    def nothing_goes_on(processes):
        wait_for(lambda: not running(processes), 10, "the end of all processes")
        before = beats.stat().st_size, (tmp_path / "beats.child").stat().st_size
        time.sleep(1)
        assert before == (beats.stat().st_size, (tmp_path / "beats.child").stat().st_size), (
            "an orphan goes on writing"
        )
        assert project.methods() == ["brisk", "quick"], "something half-written was taken for whole"

    engine, *_ = started()
    processes, finished = family(engine.pid), project.records()
    assert len(processes) >= 4
    engine.kill()
    engine.wait()
    nothing_goes_on(processes)

    engine, wrapper, kernel, child = started()
    processes = [psutil.Process(pid) for pid in (wrapper, kernel)]
    psutil.Process(child).kill()
    psutil.Process(wrapper).kill()
    assert engine.wait(60) != 0
    nothing_goes_on(processes)
    assert "not finished  see data/runs/smoke/.work/" in (tmp_path / "engine.log").read_text()

    engine, wrapper, kernel, child = started()
    processes = family(wrapper)
    psutil.Process(kernel).kill()
    assert engine.wait(60) != 0
    nothing_goes_on(processes)
    work = re.search(
        r"FAILED: (.*)\n  notebook (.*)notebook.ipynb\n", (tmp_path / "engine.log").read_text()
    )
    assert "Kernel died" in work[1] and {"notebook.ipynb", "log.txt"} <= set(
        os.listdir(tmp_path / work[2])
    )
    assert [row["status"] for row in project.rows() if row["method"] == "slow"] == ["failed"]
    assert project.records() == finished, "a finished cell was run again"

    hold.unlink()
    code, said = project.make("resume")
    assert code == 0 and "3 of 3 cells done" in said, said
    assert (
        project.methods() == ["brisk", "quick", "slow"]
        and finished.items() <= project.records().items()
    )
    assert [row["status"] for row in project.rows()] == ["done"] * 3
    figure = tmp_path / "figures/smoke/walks.md"
    assert figure.read_text().count("\n") == 4
    assert len(list((tmp_path / "data/runs/.engine").iterdir())) == 1, (
        "only the killed engine leaves its flags"
    )

    before, drawn, begin = project.records(), figure.stat().st_mtime_ns, time.monotonic()
    code, said = project.make("study")
    assert code == 0 and time.monotonic() - begin < 30
    assert (project.records(), figure.stat().st_mtime_ns) == (before, drawn), (
        "a second call did something"
    )


def test_failing_cell_then_changed_module(tmp_path):
    project = Project(
        tmp_path,
        walks="{notebook: walk, metric: distance, figures: [walks], grid: {method: [quick, bad]}, scales: {smoke: {}}}",
        talks="{notebook: talk, seeds: [0, 1], scales: {smoke: {}}}",
    )
    code, said = project.make("dry-run")
    assert (
        code == 0
        and "4 of 4 cells would run" in said
        and "predicted machine time: unknown" in said
        and not (tmp_path / "data/runs").exists()
    )
    code, said = project.make("study")
    assert code != 0 and project.methods() == ["quick", "talk", "talk"]
    failed = re.search(r"FAILED: KeyError: 'no way'\n  notebook (.*)\n  log      (.*)\n", said)
    assert failed and all((tmp_path / path).is_file() for path in failed.groups()), said
    assert "3 of 4 cells done" in said and re.search(
        r"bad · seed 0  KeyError: 'no way'  see data/runs/smoke/.work/", said
    )
    assert {row["method"]: row["status"] for row in project.rows()} == dict(
        quick="done", bad="failed"
    )
    assert re.search(r"walk-\w{12}  quick · seed 0  distance 0\.5  \d+ s\n", said)

    before = project.records()
    (tmp_path / "vqstudy/toy.py").write_text("def walk(method, seed): return seed + .75\n")
    code, said = project.make("dry-run")
    assert (
        "2 of 4 cells would run" in said
        and " stale " in said
        and re.search(
            r"predicted machine time: \d+\.\d min \(\d+\.\d min summed over \d+ cores\)\n", said
        )
    )
    code, said = project.make("study")
    assert code == 0, said
    after = project.records()
    talks = {cell for cell in before if cell.startswith("talk")}
    assert {cell: after[cell] for cell in talks} == {cell: before[cell] for cell in talks}, (
        "a cell ran that does not use the module"
    )
    assert {row["method"]: (row["status"], row["distance"]) for row in project.rows()} == dict(
        quick=("done", "0.75"), bad=("done", "0.75")
    )
    code, said = project.make("study", "ARGS=--dry-run")
    assert code == 0 and "0 of 4 cells would run" in said and project.records() == after


@pytest.mark.parametrize(
    "sweep, why",
    [
        (
            "{notebook: walk, fixed: {metod: slow}, scales: {smoke: {}}}",
            "wrong.yaml: walk: unknown parameter 'metod'; known: method, seed",
        ),
        (
            "{notebook: walk, seeds: [0, 1e-3], scales: {smoke: {}}}",
            "wrong.yaml: parameter 'seed' was given '1e-3', of type str; it takes int",
        ),
        (
            "{notebook: untagged, scales: {smoke: {}}}",
            "wrong.yaml: untagged.ipynb: wants one code cell tagged 'parameters', has 0",
        ),
    ],
)
def test_refused_before_anything_runs(tmp_path, sweep, why):
    project = Project(tmp_path, talks="{notebook: talk, scales: {smoke: {}}}", wrong=sweep)
    notebook(tmp_path / "nbs/runs/untagged.ipynb", TALK, tags=())
    code, said = project.make("study")
    assert code != 0 and why in said and "Traceback" not in said, said
    assert not (tmp_path / "data").exists()


def test_time_budget(tmp_path):
    project = Project(
        tmp_path,
        walks="{notebook: walk, fixed: {method: late}, seeds: [0, 1, 2], scales: {smoke: {}}}",
    )
    code, said = project.make("study", "BUDGET=12", "CORES=1")
    assert (
        code != 0
        and "stopped at the time budget: 0 of 3 cells done; `make resume SCALE=smoke` goes on"
        in said
    ), said
    assert said.count("paused at the time budget: OutOfTime") <= 1 and "Traceback" not in said
    paused = list((tmp_path / RECORDS).glob(".work/*/checkpoint-*.pt"))
    assert len(paused) == 1 and not list((tmp_path / RECORDS).glob(".work/*/failed.json"))
    code, said = project.make("resume", "CORES=1")
    assert code == 0 and "3 of 3 cells done" in said, said
    assert sorted(row["resumed"] for row in project.rows()) == ["False", "False", "True"]
