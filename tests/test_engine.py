"""Faults of the engine: processes killed, cells that raise, wrong sweeps, changed code, time.

Each test has a small project of its own, with this repository's package, Snakefile and Makefile,
and runs the real engine. Importing Snakemake alone takes seconds, so every call has several
purposes.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
import psutil
import pytest
from projects import notebook

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
    child = subprocess.Popen([sys.executable, "-c", beat, f"beats.child.{seed}"])
    Path(f"pids.{seed}").write_text(f"{os.getppid()} {os.getpid()} {child.pid}")
    while Path("hold").exists():
        open(f"beats.{seed}", "a").write(".")
        time.sleep(.1)
if method == "late" and not run.checkpoint.exists():
    while run.deadline and time.time() < run.deadline: time.sleep(.1)
    if run.deadline:
        run.checkpoint.write_text("half way")
        raise OutOfTime("after 3 epochs")
""",
    """
metrics = dict(distance=walk(method, seed), resumed=run.checkpoint.exists())
run.save(metrics, [dict(epoch=1, loss=.5)])
""",
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
rows = results("walks", scale)[["method", "seed", "distance"]]
Path("figures/smoke/walks.md").write_text(rows.to_csv())
""",
]
TOY = """
def walk(method, seed):
    if method == "bad": raise KeyError("no way")
    return seed + .5
"""


def own_venv(folder):
    "A .venv that is ready, with the packages of the Python that runs this test."
    venv.create(folder, symlinks=True)
    library = Path(sysconfig.get_path("purelib", vars=dict(base=str(folder))))
    (library / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (folder / ".ready").touch()


class Project:
    "A small project in a folder, and the commands of its Makefile."

    def __init__(self, folder, **sweeps):
        folder.mkdir(exist_ok=True)
        self.folder, self.venv = folder, "VENV=none"
        for name in ("settings.ini", "Snakefile", "Makefile"):
            shutil.copy(ROOT / name, folder)
        no_cache = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "vqstudy", folder / "vqstudy", ignore=no_cache)
        (folder / "vqstudy/toy.py").write_text(TOY)
        notebook(folder / "nbs/runs/walk.ipynb", *WALK)
        notebook(folder / "nbs/runs/talk.ipynb", *TALK)
        if any("figures: [walks]" in sweep for sweep in sweeps.values()):
            # a figure that no sweep names would be drawn at once
            notebook(folder / "nbs/figs/walks.ipynb", *FIGURE)
        (folder / "nbs/sweeps").mkdir()
        for name, sweep in sweeps.items():
            self.sweep(name, sweep)
        others = ("VQSTUDY_", "MAKE", "SLURM_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env |= dict(PYTHONPATH=str(folder), PATH=path)

    def sweep(self, name, text):
        (self.folder / f"nbs/sweeps/{name}.yaml").write_text(text)

    def make(self, *words):
        "Run one command to its end; returns the exit code and what it printed."
        command = ["make", self.venv, "CORES=2", *words]
        where = dict(cwd=self.folder, env=self.env)
        done = subprocess.run(command, **where, capture_output=True, text=True, timeout=180)
        return done.returncode, done.stdout + done.stderr

    def start(self, cores):
        "Start the engine itself, as `make study` would; the log goes to a file."
        where = dict(cwd=self.folder, env=self.env)
        command = ["make", "-n", self.venv, f"CORES={cores}", "study"]
        shown = subprocess.run(command, **where, capture_output=True, text=True)
        with open(self.folder / "engine.log", "w") as log:
            engine = f"exec {shown.stdout}"
            return subprocess.Popen(engine, shell=True, **where, stdout=log, stderr=log)

    def log(self):
        return (self.folder / "engine.log").read_text()

    def records(self):
        "By cell: bytes and time of every whole record."
        files = (self.folder / RECORDS).glob("*/record.json")
        return {path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def methods(self):
        "The methods of the whole records."
        whole = [json.loads(content) for content, _ in self.records().values()]
        return sorted(record["parameters"].get("method", "talk") for record in whole)

    def rows(self, name="walks"):
        with open(self.folder / RECORDS / f"results/{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def wait_for(condition, seconds=90, what="condition"):
    "Wait until a condition is met, and return its value."
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what} not within {seconds} s")
        time.sleep(0.1)
    return value


def running(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


class SlowProject(Project):
    "Two quick cells, and two slow ones that go on until the file `hold` is gone."

    def __init__(self, folder):
        grid = "grid: {method: [quick, slow]}, seeds: [0, 1], scales: {smoke: {}}"
        walks = f"{{notebook: walk, metric: distance, figures: [walks], {grid}}}"
        super().__init__(folder, walks=walks)
        (folder / "hold").touch()

    def pids(self, seed):
        "Of a slow cell: the ids of its wrapper, its kernel and the kernel's child; none at first."
        path = self.folder / f"pids.{seed}"
        words = path.read_text().split() if path.exists() else []
        begun = len(words) == 3 and (self.folder / f"beats.child.{seed}").exists()
        return [int(word) for word in words] if begun else []

    def start_slow(self):
        "Start the engine and wait until only the slow cells run."
        for seed in (0, 1):
            (self.folder / f"pids.{seed}").unlink(missing_ok=True)
        engine = self.start(cores=3)  # one more than the slow cells take
        wait_for(lambda: self.pids(0) and self.pids(1), what="the slow cells' start")
        wait_for(lambda: self.methods() == ["quick", "quick"], what="two finished cells")
        return engine

    def beats(self):
        return {path.name: path.stat().st_size for path in self.folder.glob("beats.*")}

    def nothing_goes_on(self, processes):
        wait_for(lambda: not running(processes), 10, "the end of all processes")
        before = self.beats()
        time.sleep(1)
        assert before == self.beats(), "an orphan goes on writing"
        assert self.methods() == ["quick", "quick"], "something half-written was taken for whole"


def test_kill_engine_wrapper_kernel(tmp_path):
    project = SlowProject(tmp_path)

    engine = project.start_slow()
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    finished = project.records()
    assert len(family) >= 7  # the engine, and of each slow cell wrapper, kernel, child
    engine.kill()
    engine.wait()
    project.nothing_goes_on(family)

    # of one slow cell the wrapper is killed, of the other the kernel
    engine = project.start_slow()
    wrapper, kernel, child = (psutil.Process(pid) for pid in project.pids(0))
    other_wrapper, other_kernel, _ = (psutil.Process(pid) for pid in project.pids(1))
    others = [other_wrapper, *other_wrapper.children(recursive=True)]
    child.kill()
    wrapper.kill()
    other_kernel.kill()
    assert engine.wait(60) != 0
    project.nothing_goes_on([wrapper, kernel, *others])
    assert "not finished  see data/runs/smoke/.work/" in project.log()
    work = re.search(r"FAILED: (.*)\n  notebook (.*)notebook.ipynb\n", project.log())
    assert "Kernel died" in work[1]
    assert {"notebook.ipynb", "log.txt"} <= set(os.listdir(tmp_path / work[2]))
    slow = [(row["seed"], row["status"]) for row in project.rows() if row["method"] == "slow"]
    assert slow == [("1", "failed")]
    assert project.records() == finished, "a finished cell was run again"

    (tmp_path / "hold").unlink()
    code, shown = project.make("resume")
    assert code == 0 and "4 of 4 cells done" in shown, shown
    assert project.methods() == ["quick", "quick", "slow", "slow"]
    assert finished.items() <= project.records().items()
    assert [row["status"] for row in project.rows()] == ["done"] * 4
    figure = tmp_path / "figures/smoke/walks.md"
    assert figure.read_text().count("\n") == 5
    flags = list((tmp_path / "data/runs/.engine").iterdir())
    assert len(flags) == 1, "only the killed engine leaves its flags"

    before, drawn, begin = project.records(), figure.stat().st_mtime_ns, time.monotonic()
    code, shown = project.make("study")
    assert code == 0 and time.monotonic() - begin < 30
    assert project.records() == before, "a second call ran a cell"
    assert figure.stat().st_mtime_ns == drawn, "a second call drew the figure"


def test_failing_cell_then_changed_module_in_a_folder_with_blanks(tmp_path):
    grid = "grid: {method: [quick, bad]}, scales: {smoke: {}}"
    walks = f"{{notebook: walk, metric: distance, figures: [walks], {grid}}}"
    talks = "{notebook: talk, seeds: [0, 1], scales: {smoke: {}}}"
    # a folder with blanks and a quote, its own .venv, and a home that takes no caches
    tmp_path = tmp_path / "a b's"
    project = Project(tmp_path, walks=walks, talks=talks)
    project.venv = "VENV=.venv"
    project.env["HOME"] = "/dev/null/home"
    for name in ("setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    own_venv(tmp_path / ".venv")
    code, shown = project.make("dry-run")
    assert code == 0 and "4 of 4 cells would run" in shown, shown
    assert "predicted machine time: unknown" in shown and not (tmp_path / "data/runs").exists()

    code, shown = project.make("study")
    assert code != 0 and project.methods() == ["quick", "talk", "talk"], shown
    assert (tmp_path / "data/runs/.cache").is_dir()
    failed = re.search(r"FAILED: KeyError: 'no way'\n  notebook (.*)\n  log      (.*)\n", shown)
    assert failed and all((tmp_path / path).is_file() for path in failed.groups()), shown
    assert "3 of 4 cells done" in shown
    assert re.search(r"bad · seed 0  KeyError: 'no way'  see data/runs/smoke/.work/", shown)
    assert re.search(r"walk-\w{12}  quick · seed 0  distance 0\.5  \d+ s\n", shown)
    status = {row["method"]: row["status"] for row in project.rows()}
    assert status == dict(quick="done", bad="failed")

    before = project.records()
    toy = tmp_path / "vqstudy/toy.py"
    toy.write_text(f'"Walks."\n{TOY}# and no more\n')
    code, shown = project.make("dry-run")
    assert "1 of 4 cells would run" in shown
    assert " stale " not in shown, "a comment made cells stale"
    toy.write_text("def walk(method, seed): return seed + .75\n")
    code, shown = project.make("dry-run")
    assert "2 of 4 cells would run" in shown and " stale " in shown
    span = r"predicted machine time: \d+\.\d min \(\d+\.\d min summed over \d+ cores\)\n"
    assert re.search(span, shown)

    code, shown = project.make("study")
    assert code == 0, shown
    after = project.records()
    for cell in before:
        if cell.startswith("talk"):
            assert after[cell] == before[cell], "a cell ran that does not use the module"
    ends = {row["method"]: (row["status"], row["distance"]) for row in project.rows()}
    assert ends == dict(quick=("done", "0.75"), bad=("done", "0.75"))
    code, shown = project.make("study", "ARGS=--dry-run")
    assert code == 0 and "0 of 4 cells would run" in shown and project.records() == after


REFUSED = {
    "wrong.yaml: walk: unknown parameter 'metod'; known: method, seed": (
        "{notebook: walk, fixed: {metod: slow}, scales: {smoke: {}}}"
    ),
    "wrong.yaml: parameter 'seed' was given '1e-3', of type str; it takes int": (
        "{notebook: walk, seeds: [0, 1e-3], scales: {smoke: {}}}"
    ),
    "wrong.yaml: untagged.ipynb: wants one code cell tagged 'parameters', has 0": (
        "{notebook: untagged, scales: {smoke: {}}}"
    ),
}


def test_refused_before_anything_runs(tmp_path):
    talks = "{notebook: talk, scales: {smoke: {}}}"
    project = Project(tmp_path, talks=talks)
    notebook(tmp_path / "nbs/runs/untagged.ipynb", *TALK, tags=())
    for why, sweep in REFUSED.items():
        project.sweep("wrong", sweep)
        code, shown = project.make("dry-run")
        assert code != 0 and why in shown and "Traceback" not in shown, shown
    # the engine asks the same function
    code, shown = project.make("study")
    assert code != 0 and why in shown and "Traceback" not in shown, shown
    assert "refused, nothing was run" in shown and not (tmp_path / "data").exists()
    # the plan may be made without the images, the study not
    parameters = f"{TALK[0]}\ndataset: str = 'photos'"
    notebook(tmp_path / "nbs/runs/talk.ipynb", parameters, *TALK[1:])
    project.sweep("wrong", "{notebook: talk, fixed: {dataset: cifar10}, scales: {smoke: {}}}")
    code, shown = project.make("dry-run")
    assert code == 0 and "2 of 2 cells would run" in shown, shown
    code, shown = project.make("study")
    assert code != 0 and "nothing was run: 1 of 2 cells need cifar10" in shown, shown
    assert 'Without them: SWEEP="talks"' in shown and "Traceback" not in shown
    assert not (tmp_path / RECORDS).exists()
    code, shown = project.make("study", "BUDGET=10m")
    assert code != 0 and "BUDGET takes seconds" in shown and "Traceback" not in shown, shown


def test_time_budget(tmp_path):
    walks = "{notebook: walk, fixed: {method: late}, seeds: [0, 1, 2], scales: {smoke: {}}}"
    project = Project(tmp_path, walks=walks)
    code, shown = project.make("study", "BUDGET=12", "CORES=1")
    ending = "stopped at the time budget: 0 of 3 cells done; `make resume SCALE=smoke` goes on"
    assert code != 0 and ending in shown, shown
    assert shown.count("paused at the time budget: OutOfTime") <= 1 and "Traceback" not in shown
    work = tmp_path / RECORDS / ".work"
    assert len(list(work.glob("*/checkpoint-*.pt"))) == 1
    assert not list(work.glob("*/failed.json"))
    code, shown = project.make("resume", "CORES=1")
    assert code == 0 and "3 of 3 cells done" in shown, shown
    assert sorted(row["resumed"] for row in project.rows()) == ["False", "False", "True"]


# ---- evidence is from a commit ----


class CommittedProject(Project):
    "A project whose first commit holds everything."

    def __init__(self, folder, **sweeps):
        super().__init__(folder, **sweeps)
        who = dict(NAME="a", EMAIL="a@b.c")
        roles = ("AUTHOR", "COMMITTER")
        self.env |= {f"GIT_{role}_{key}": value for role in roles for key, value in who.items()}
        (folder / ".gitignore").write_text("__pycache__/\n.snakemake/\n/data/*\n!/data/results/\n")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
            self.git(*words)

    def git(self, *words):
        command = ["git", *words]
        where = dict(cwd=self.folder, env=self.env, capture_output=True, text=True)
        done = subprocess.run(command, **where)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def desk(self, name="walks"):
        with open(self.folder / f"data/results/{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def test_desk_is_run_from_a_commit(tmp_path):
    walks = "{notebook: walk, metric: distance, seeds: [0, 1], scales: {desk: {}}}"
    project = CommittedProject(tmp_path, walks=walks)
    (tmp_path / "vqstudy/new.py").write_text("")
    code, shown = project.make("study", "SCALE=desk")
    refused = "refused, nothing was run: the tree has changes that are in no commit: vqstudy/new.py"
    assert code != 0 and refused in shown and "Traceback" not in shown, shown
    assert not (tmp_path / "data/runs/desk").exists()
    code, shown = project.make("study", "SCALE=desk", "DIRTY=1")
    assert code == 0 and [row["status"] for row in project.desk()] == ["done", "done"], shown
    notes = json.loads((tmp_path / "data/results/walks.json").read_text())["cells"]["desk"]
    assert {(note["dirty"], note["collected_dirty"]) for note in notes.values()} == {(True, True)}


def tree(project, name="walks"):
    return project.folder / f"data/runs/.sweeps/{name}-desk"


def swept(project):
    "By cell, when the records of the worktree were written."
    files = tree(project).glob("data/runs/desk/*/record.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


def test_a_sweep_in_its_worktree_while_the_tree_is_edited(tmp_path):
    grid = "grid: {method: [quick, bad]}, seeds: [0, 1], scales: {desk: {}}"
    walks = f"{{notebook: walk, metric: distance, figures: [walks], {grid}}}"
    here = tmp_path / "here"
    project = CommittedProject(here, walks=walks)
    head = project.git("rev-parse", "HEAD")
    # edited beside it, also in a way that would break a run
    (here / "vqstudy/toy.py").write_text("def walk(method, seed): return 7")
    (here / "nbs/runs/walk.ipynb").write_text("")
    notebook(here / "nbs/runs/walk.ipynb", *WALK[:1], "edited")
    code, shown = project.make("sweep", "SWEEP=walks", "COMMIT=1")
    assert code != 0 and "predicted machine time: unknown" in shown, shown
    assert shown.index("predicted machine time") < shown.index("FAILED") and head[:12] in shown
    assert "2 of 4 cells done; `make sweep SCALE=desk SWEEP" in shown
    assert "its rows are taken over by: git merge rows/walks-desk" in shown
    assert not (here / "data").joinpath("results").exists() and not (here / "figures").exists()
    log = project.git("log", "--format=%s", "rows/walks-desk", "--", "data/results").splitlines()
    assert log[0].startswith("Rows of walks at desk: ") and len(log) >= 2, "committed as they come"
    notes = project.git("show", "rows/walks-desk:data/results/walks.json")
    quick = {note["commit"] for note in json.loads(notes)["cells"]["desk"].values()}
    for commit in quick:
        project.git("merge-base", "--is-ancestor", head, commit)

    # it goes on where it stopped, with the code that it began with
    before = swept(project)
    assert len(before) == 2
    code, shown = project.make("sweep", "SWEEP=walks")
    assert code != 0 and "2 of 4 cells would run" in shown and swept(project) == before
    project.git("commit", "-qam", "edited")
    code, shown = project.make("sweep", "SWEEP=walks")
    assert f"its code is that of {head[:12]}" in shown and "FRESH=1 begins again" in shown
    code, shown = project.make("sweep", "SWEEP=walks", "FRESH=1")
    assert code != 0 and "branch rows/walks-desk has rows that are not merged" in shown

    # another machine, which has what is committed: nothing that is there runs again
    there = Project.__new__(CommittedProject)
    there.folder, there.venv = tmp_path / "there", "VENV=none"
    there.env = project.env | dict(PYTHONPATH=str(there.folder))
    command = ["git", "clone", "-q", str(here), str(there.folder)]
    subprocess.run(command, check=True, env=project.env)
    code, shown = there.make("sweep", "SWEEP=walks")
    assert "2 of 4 cells would run" in shown and swept(there) == {}, shown

    project.git("merge", "-q", "rows/walks-desk")
    rows = [(row["method"], row["status"], row["distance"]) for row in project.desk()]
    assert rows.count(("quick", "done", "0.5")) == 1 and len(rows) == 4, rows


def test_two_sweeps_share_a_worktree(tmp_path):
    quick = "notebook: walk, metric: distance, grid: {method: [quick]}, scales: {desk: {}}"
    # the only cell of the first is one of the second's, too: its table waits for it
    sweeps = dict(walks=f"{{{quick}, seeds: [1]}}", strolls=f"{{{quick}, seeds: [0, 1]}}")
    project = CommittedProject(tmp_path, **sweeps)
    code, shown = project.make("sweep", "SWEEP=walks strolls", "COMMIT=1")
    assert code == 0 and "walks, strolls run in" in shown, shown
    assert "its rows are taken over by: git merge rows/walks+strolls-desk" in shown
    project.git("merge", "-q", "rows/walks+strolls-desk")
    rows = [(tmp_path / f"data/results/{name}.csv").read_text() for name in sweeps]
    assert [text.count("done") for text in rows] == [1, 2], rows
    code, shown = project.make("sweep", "SWEEP=walks strolls")
    assert code == 0 and "nothing is left to do" in shown, shown


BFLOAT16 = "autocast: str = 'bfloat16'\n"


def test_bfloat16_is_refused_on_a_processor_without_it(tmp_path):
    talks = "{notebook: talk, scales: {desk: {}}}"
    project = CommittedProject(tmp_path, talks=talks)
    notebook(tmp_path / "nbs/runs/talk.ipynb", BFLOAT16 + TALK[0], *TALK[1:])
    module = tmp_path / "vqstudy/processes.py"
    module.write_text(module.read_text().replace("/proc/cpuinfo", "cpuinfo.txt"))
    (tmp_path / "cpuinfo.txt").write_text("flags : sse avx512f\n")
    project.git("commit", "-qam", "half")
    code, shown = project.make("study", "SCALE=desk")
    refused = "refused, nothing was run: 1 of 1 cells train in bfloat16"
    assert code != 0 and refused in shown and "Traceback" not in shown, shown
    assert not (tmp_path / "data/runs/desk").exists()
    code, shown = project.make("study", "SCALE=desk", "BFLOAT16=1")
    assert code == 0 and "1 of 1 cells done" in shown, shown


def test_a_neutral_change_is_confirmed_and_a_real_one_is_not(tmp_path):
    grid = "grid: {method: [quick, slow]}, seeds: [0, 1], scales: {desk: {}}"
    project = CommittedProject(tmp_path, walks=f"{{notebook: walk, metric: distance, {grid}}}")
    code, shown = project.make("study", "SCALE=desk")
    assert code == 0 and len(project.desk()) == 4, shown
    old, head = project.desk()[0]["fingerprint"], project.git("rev-parse", "HEAD")
    toy, records = tmp_path / "vqstudy/toy.py", tmp_path / "data/runs/desk"
    shutil.rmtree(records)

    toy.write_text(TOY.replace("seed + .5", ".5 + seed"))
    code, shown = project.make("confirm", "SWEEP=walks")
    assert code != 0 and "the tree has changes that are in no commit: vqstudy/toy.py" in shown
    assert not records.exists()
    project.git("commit", "-qam", "neutral")
    code, shown = project.make("confirm", "SWEEP=walks")
    new = {row["fingerprint"] for row in project.desk()}
    assert code == 0 and len(new) == 1 and old not in new, shown
    assert shown.count("the same; 2 rows take the fingerprint") == 2
    ran = [json.loads(path.read_text()) for path in records.glob("*/record.json")]
    assert sorted(record["parameters"]["seed"] for record in ran) == [0, 0]
    notes = json.loads((tmp_path / "data/results/walks.json").read_text())["cells"]["desk"]
    for note in notes.values():
        assert note["commit"] == head and note["confirmed"]["was"] == old
        assert note["confirmed"]["commit"] == project.git("rev-parse", "HEAD")
        assert note["confirmed"]["by"] in {record["cell"] for record in ran}
    code, shown = project.make("dry-run", "SCALE=desk", "MISSING=1")
    assert "0 of 4 cells would run" in shown

    toy.write_text(TOY.replace("seed + .5", "seed + (.5 if method == 'quick' else .75)"))
    project.git("commit", "-qam", "real")
    code, shown = project.make("confirm", "SWEEP=walks")
    assert code != 0 and "slow · seed 0: not the same; 2 rows stay stale\n" in shown, shown
    assert "  metric distance: 0.75, was 0.5\n" in shown and "quick · seed 0: the same" in shown
    known = {row["method"]: row["fingerprint"] for row in project.desk()}
    assert {known["slow"]} == new and {known["quick"]} != new


# ---- weights that one cell keeps and another takes ----

TOKENIZER = [
    "method: str = 'quick'\nseed: int = 0\nout: str = ''",
    "import torch\nfrom vqstudy.study import Run\nrun = Run('tokenizer', globals())",
    "run.save(dict(mse=seed), weights=dict(w=torch.full((2,), 1.5 + seed)))",
]
PRIOR = [
    "tokenizer: str = ''\nmethod: str = ''\nseed: int = 0\nout: str = ''",
    """
import time
from pathlib import Path
from vqstudy.study import Run
run = Run("prior", globals())
Path(f"begun.{seed}").touch()
while Path("hold").exists(): time.sleep(.1)
""",
    "w = run.parent('tokenizer').weights['w']\nrun.save(dict(far=float(w.sum())))",
]


def with_weights(folder, parents, children):
    "A project with tokenizers, and priors that take their weights, of these seeds."
    grid = "grid: {method: [quick]}"
    keeps = f"weights: keep, seeds: {parents}, {grid}, scales: {{smoke: {{}}}}"
    needs = f"needs: {{tokenizer: kept}}, metric: far, seeds: {children}, {grid}"
    kept = f"{{notebook: tokenizer, {keeps}}}"
    priors = f"{{notebook: prior, {needs}, scales: {{smoke: {{}}}}}}"
    project = Project(folder, kept=kept, priors=priors)
    for name, sources in dict(tokenizer=TOKENIZER, prior=PRIOR).items():
        notebook(folder / f"nbs/runs/{name}.ipynb", *sources)
    return project


def test_a_child_goes_before_the_parents_of_others(tmp_path):
    project = with_weights(tmp_path, [0, 1, 2], [0, 1, 2])
    code, shown = project.make("study", "SWEEP=kept priors", "CORES=1")
    assert code == 0, shown
    assert re.findall(r"^(tokenizer|prior)-", shown, re.M) == ["tokenizer", "prior"] * 3


def test_a_parent_runs_first_and_stays_when_the_child_is_killed(tmp_path):
    project = with_weights(tmp_path, [0, 1], [1])
    (tmp_path / "hold").touch()
    command = ["make", "-n", "VENV=none", "CORES=2", "study", "SWEEP=priors"]
    where = dict(cwd=tmp_path, env=project.env)
    shown = subprocess.run(command, **where, capture_output=True, text=True).stdout
    with open(tmp_path / "engine.log", "w") as log:
        engine = subprocess.Popen(f"exec {shown}", shell=True, **where, stdout=log, stderr=log)
    wait_for((tmp_path / "begun.1").exists, what="the child's start")
    family = psutil.Process(engine.pid).children(recursive=True)
    engine.kill()
    engine.wait()
    wait_for(lambda: not running(family), 10, "the end of all processes")

    (tmp_path / "hold").unlink()
    (before,) = project.records().items()
    assert before[0].startswith("tokenizer-"), "of the two parents the one that is needed"
    code, shown = project.make("resume", "SWEEP=priors")
    assert code == 0 and "1 of 1 cells done" in shown and "far 5" in shown, shown
    assert before in project.records().items(), "the parent ran again"
    (row,) = project.rows("priors")
    assert row["far"] == "5.0" and row["tokenizer"] == before[0]
    notes = json.loads((tmp_path / RECORDS / "results/priors.json").read_text())
    (past,) = notes["cells"]["smoke"].values()
    whole = json.loads(before[1][0])["provenance"]
    assert past["parents"]["tokenizer"]["weights"] == whole["weights"]

    # a notebook that does not take them is told so
    notebook(tmp_path / "nbs/runs/prior.ipynb", *PRIOR[:2], "run.save(dict(far=0))")
    code, shown = project.make("study", "SWEEP=priors")
    assert code != 0 and "the notebook did not take the weights of tokenizer" in shown, shown


# ---- which Python ----


@pytest.fixture
def checkout(tmp_path):
    "What `make setup` reads, and a Python of some version, which does nothing but say so."
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def says(path, version):
    "A program that says it is this Python, and notes that it was asked for anything else."
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = f"case $2 in import*) echo {version} at $0;; *) echo $@ >> $0.ran; exit 9;; esac"
    path.write_text(f"#!/bin/sh\n{asked}\n")
    path.chmod(0o755)
    return path


def make(folder, *words, **env):
    "One command of the Makefile: its exit code and what it printed."
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", *words]
    where = dict(cwd=folder, env=kept | env, capture_output=True, text=True)
    done = subprocess.run(command, **where)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["2.7.18", "3.1.1", "3.10.13", "3.14.0"])
def test_another_python_makes_no_venv(checkout, version):
    python = says(checkout / "some where/python3", version)
    code, shown = make(checkout, "setup", f"PYTHON={python}")
    found = f"found {version} at {python}: make setup PYTHON=python3.11"
    wanted = f"Python 3.11 to 3.13 is needed, {found}"
    assert code and wanted in shown and len(shown.splitlines()) == 1, shown
    assert not (checkout / ".venv").exists() and not Path(f"{python}.ran").exists()


def test_no_python_at_all_is_said(checkout):
    code, shown = make(checkout, "setup", "PYTHON=nowhere/python")
    assert code and "found no nowhere/python" in shown and not (checkout / ".venv").exists()


@pytest.mark.parametrize("command", ["setup", "study", "lab", "figures"])
def test_a_venv_of_another_python_is_not_taken_for_ready(checkout, command):
    inside = says(checkout / ".venv/bin/python", "3.10.13")
    code, shown = make(checkout, command)
    assert code and "needed, .venv has 3.10.13 at" in shown and "rm -r .venv" in shown, shown
    assert not (checkout / ".venv/.ready").exists() and not Path(f"{inside}.ran").exists()


def test_another_python_at_hand_is_refused(checkout):
    says(checkout / "bin/python", "3.10.13")
    path = f"{checkout}/bin{os.pathsep}{os.environ['PATH']}"
    code, shown = make(checkout, "study", "VENV=none", PATH=path)
    assert code and "found 3.10.13 at" in shown and "VENV=none" in shown, shown


@pytest.mark.parametrize("version", ["3.11.0", "3.12.4", "3.13.9"])
def test_the_pythons_of_setup_py_are_taken(checkout, version):
    python = says(checkout / "python", version)
    code, shown = make(checkout, "setup", f"PYTHON={python}")
    assert code and Path(f"{python}.ran").read_text() == "-m venv .venv\n", shown
    config = (checkout / "settings.ini").read_text() + (checkout / "setup.py").read_text()
    assert "min_python = 3.11" in config and "<3.14" in config, "the Makefile names these too"


def test_a_venv_folder_with_blanks_is_refused(checkout):
    code, shown = make(checkout, "setup", "VENV=my venv")
    assert code and "VENV takes a path without blanks" in shown


@pytest.mark.parametrize("home, kept", [("/dev/null/home", False), (None, True)])
def test_caches_go_where_files_can_be_written(checkout, home, kept):
    makefile = (checkout / "Makefile").read_text()
    names = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    show = f"\nshow: ; @printenv {' '.join(names)} || true\n"
    (checkout / "Makefile").write_text(makefile + show)
    unset = ["env", *(f"-u{name}" for name in names), f"HOME={home or checkout}"]
    # this test may run under make, which would say where it goes
    quietly = [*unset, "make", "--no-print-directory", "show"]
    done = subprocess.run(quietly, cwd=checkout, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines == [] if kept else len(lines) == 4, done
    assert all(line.startswith(f"{checkout}/data/runs/.cache") for line in lines)
