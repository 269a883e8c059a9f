"""Identity, plans, records and tables: what holds for any parameters, in any order of events."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from projects import leave, new_project, notebook
from vqstudy import cells, code, files, processes, provenance, records, study, tuning

ROOT = Path(__file__).parents[1]
PARAMETERS = """lr: float = 0.1
steps: int = 3
method: str = "a"
tuned: bool = False
taps: list = [1, 2]
seed: int = 0
out: str = ""
"""
USES_TOY = "from vqstudy.toy import walk"
WALKS = """
notebook: walk
grid: {method: [a, b]}
seeds: [0, 1]
scales: {smoke: {}, desk: {}, gpu: {seeds: [7]}}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    new_project(tmp_path, PARAMETERS, USES_TOY, walks=WALKS)
    files.write(tmp_path / "vqstudy/toy.py", "def walk(): pass")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def run(cell, metric, status="done", code=None):
    "A record with a history of two epochs and a picture, or the note of a failure."
    history = [dict(epoch=0, loss=metric), dict(epoch=1, loss=metric, extra=1)]
    leave(cell, dict(metric=metric), status, code, history=history, samples=True)


# ---- identity ----

literals = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=9),
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), literals, max_size=6), st.randoms())
def test_id_depends_on_names_and_values_alone(parameters, random):
    names = list(parameters)
    random.shuffle(names)
    name = cells.cell_id("walk", parameters, {})
    assert name == cells.cell_id("walk", {key: parameters[key] for key in names}, {})
    assert name == cells.cell_id("walk", json.loads(json.dumps(parameters)), {})
    assert len(name) == len("walk-") + 12
    more = parameters | {"new parameter": 0}
    assert name != cells.cell_id("walk", more, {})
    assert name == cells.cell_id("walk", more, {"new parameter": 0})


def test_id_tells_types_apart():
    values = (1, 1.0, "1", True, [1])
    assert len({cells.cell_id("w", dict(x=x), {}) for x in values}) == 5
    assert len({cells.cell_id("w", dict(x=x), dict(x=1)) for x in values}) == 5


# ---- ids and defaults ----


@pytest.fixture
def reconstruct(tmp_path, monkeypatch):
    "The notebook that trains autoencoders, its sweep of Table 3, and no code."
    book = json.loads((ROOT / "nbs/runs/reconstruct.ipynb").read_text())
    (tagged,) = [c for c in book["cells"] if "parameters" in c["metadata"].get("tags", [])]
    sweep = (ROOT / "nbs/sweeps/huh_tab03.yaml").read_text()
    sweep = "".join(line for line in sweep.splitlines(True) if "tuned_by:" not in line)
    new_project(tmp_path, PARAMETERS, "1", table=sweep)
    shutil.copytree(ROOT / "nbs/sweeps/protocols", tmp_path / "nbs/sweeps/protocols")
    notebook(tmp_path / "nbs/runs/reconstruct.ipynb", "".join(tagged["source"]))
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path / "nbs/runs/reconstruct.ipynb", "".join(tagged["source"])


def ids_of(name):
    return {scale: [cell.id for cell in cells.plan(name, scale)] for scale in ("smoke", "desk")}


def test_a_new_parameter_with_a_neutral_default_leaves_every_id(reconstruct):
    path, declared = reconstruct
    before, old = ids_of("table"), code.fingerprint("reconstruct")
    notebook(path, 'moons: int = 0  # of the quantizer\nshades: list = ["none"]\n' + declared)
    assert ids_of("table") == before and code.fingerprint("reconstruct") != old
    assert cells.plan("table", "desk")[0].parameters["shades"] == ["none"]


@pytest.mark.parametrize("collected", [True, False])
def test_a_changed_default_changes_the_ids_of_those_that_relied_on_it(reconstruct, collected):
    path, declared = reconstruct
    old = "watch_limit: int = 2000"
    assert old in declared
    where = path.parents[2] / cells.DEFAULTS
    if collected:
        cell = cells.plan("table", "desk")[0]
        lengths = [dict(updates=n, mse=1.0) for n in cell.lengths]
        leave(cell, {} if lengths else dict(mse=1.0), lengths=lengths)
        records.collect("table", "desk")
        assert json.loads(where.read_text())["reconstruct"]["watch_limit"] == 2000
    says = cells.check("reconstruct", dict(watch_limit=2000))
    before = ids_of("table"), cells.cell_id("reconstruct", says)
    notebook(path, declared.replace(old, "watch_limit: int = 3000"))
    after = ids_of("table"), cells.cell_id("reconstruct", says)
    # at desk the sweep says 500 itself, so only what relied on the default may change
    assert after[0] == before[0]
    unsaid = cells.cell_id("reconstruct", cells.check("reconstruct", {}))
    # a row of 2,000 is there under the old id, or there is none that could be taken for another
    assert (unsaid == before[1]) is not collected
    assert (after[1] == before[1]) is collected


def test_the_first_default_counts_also_where_it_changes_twice(project):
    path = project / "nbs/runs/walk.ipynb"
    leave(cells.plan("walks", "desk")[0], dict(metric=1.0))
    records.collect("walks", "desk")
    first = ids_of("walks")["desk"]
    for lr in (0.2, 0.3):
        notebook(path, PARAMETERS.replace("lr: float = 0.1", f"lr: float = {lr}"), USES_TOY)
        assert not set(first) & set(ids_of("walks")["desk"])
        leave(cells.plan("walks", "desk")[0], dict(metric=lr))
        records.collect("walks", "desk")
    notebook(path, PARAMETERS, USES_TOY)
    assert ids_of("walks")["desk"] == first
    rows = files.read_table(project / "data/results/walks.csv")
    assert sorted(row["lr"] for row in rows) == ["0.1", "0.2", "0.3"]


def test_smoke_results_make_no_neutral_values(project):
    leave(cells.plan("walks", "smoke")[0], dict(metric=1.0))
    records.collect("walks", "smoke")
    assert not (project / cells.DEFAULTS).exists()


def test_ids_are_computed_again_from_the_rows(figured):
    table = figured.parents[2] / "data/results/walks.csv"
    paths = sorted(table.parent.glob("walks.*"))
    known = [path.read_text() for path in paths]
    planned = cells.plan("walks", "desk")
    for path, text in zip(paths, known):
        for number, cell in enumerate(planned):
            text = text.replace(cell.id, f"walk-{number}")
        path.write_text(text)
    assert set(records.in_results(planned).values()) == {"missing"}
    assert study.main(["rename", "--sweep", "walks"]) == 0
    assert [path.read_text() for path in paths] == known
    assert set(records.in_results(planned).values()) == {"current"}


def test_a_row_says_its_parameters(project):
    given = dict(lr=2.0, taps=[3], tuned=True, method="b", seed=4)
    whole = cells.check("walk", given)
    row = {name: files.text(value) for name, value in whole.items()} | dict(old="x", gone="[1]")
    names = [*whole, "old", "gone"]
    assert records.asked(row, names, "walk") == whole | dict(old="x", gone=[1])
    # a parameter that is newer than the row has no field, or an empty one
    newer = {name: "" if name == "taps" else field for name, field in row.items()}
    del newer["lr"]
    told = records.asked(newer, list(whole), "walk")
    assert told == {name: whole[name] for name in whole if name not in ("lr", "taps")}


@pytest.mark.parametrize("name", cells.sweeps())
def test_committed_rows_have_the_ids_of_their_parameters(name):
    path = records.results_folder("desk") / f"{name}.csv"
    if not path.is_file():
        pytest.skip("not measured yet")
    stem = cells.sweep(name)["notebook"]
    names = json.loads(path.with_suffix(".json").read_text())["columns"]["parameters"]
    for row in files.read_table(path):
        assert row["cell"] == cells.cell_id(stem, records.asked(row, names, stem))


@given(value=literals)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_check_takes_the_declared_type_only(project, value):
    takes = dict(lr=(float, int), steps=(int,), method=(str,), tuned=(bool,))
    for name, kinds in takes.items():
        if type(value) in kinds:
            assert cells.check("walk", {name: value})[name] == kinds[0](value)
        else:
            with pytest.raises(TypeError, match=f"parameter '{name}' was given"):
                cells.check("walk", {name: value})


def test_every_type_and_default(project):
    defaults = dict(lr=0.1, steps=3, method="a", tuned=False, taps=[1, 2], seed=0)
    assert cells.check("walk", {}) == defaults
    with pytest.raises(ValueError, match="unknown parameter 'out'"):
        cells.check("walk", dict(out="x"))
    with pytest.raises(ValueError, match="finite"):
        cells.check("walk", dict(lr=float("inf")))
    path = project / "nbs/runs/twice.ipynb"
    notebook(path, PARAMETERS, "1")
    book = json.loads(path.read_text())
    book["cells"][1]["metadata"]["tags"] = ["parameters"]
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match="has 2"):
        cells.parameters("twice")


LINES = ["import os", "x = 1", "x: int", "x: int = os.cpu_count()", "x: Path = 'a'"]
LINES += ["x: int = None", "x: int = 1.5", "for x in []: pass"]


@pytest.mark.parametrize("line", LINES)
def test_parameters_cell_holds_annotated_literals(project, line):
    notebook(project / "nbs/runs/strange.ipynb", line + '\nout: str = ""')
    with pytest.raises((ValueError, TypeError), match="strange.ipynb|parameter 'x'"):
        cells.parameters("strange")


# ---- what counts as the same code ----

MODULE = '''
import math
import os
from pathlib import Path
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Walk:
    steps: int = 3
    drift: float = 0.5

    def far(self, scale: float = 2.0) -> float:
        return scale * math.sqrt(self.steps) + len(os.name)

def start(here=Path("."), wide=True):
    return field(), here, f"{wide} and " "so on"
'''

SAME_CODE = {
    "wrapped": ("self, scale: float = 2.0", "\n        self,\n        scale: float = 2.0,\n    "),
    "commented": ("return scale", "# why\n        return scale"),
    "empty lines": ("\n\n", "\n\n\n\n"),
    "quotes": ('Path(".")', "Path('.')"),
    "parentheses": ("scale * math.sqrt(self.steps)", "(scale * (math.sqrt(self.steps)))"),
    "docstring of the module": ("\nimport math", '"Walks."\nimport math'),
    "docstring of a class": ("    steps: int", '    """A walk."""\n\n    steps: int'),
    "docstring of a function": ("        return", '        "How far."\n        return'),
    "annotations of arguments": ("here=Path", 'here: "Path | None"=Path'),
    "annotation of the result": (" -> float", ' -> "Float[Tensor, \'n\']"'),
    "order of imports": ("import math\nimport os", "import os\nimport math"),
    "one import for two": ("import math\nimport os", "import os, math"),
    "two imports for one": ("import dataclass, field", "import field\nfrom dataclasses import dataclass"),
    "exports": ("import os\n", "import os\n__all__ = ['Walk', 'start']\n"),
    "marks of nbdev": ("@dataclass", "# %% ../nbs/lib/00_walk.ipynb #1f\n@dataclass"),
    "f-string in parts": ('f"{wide} and " "so on"', 'f"{wide}" f" and so" " on"'),
}

OTHER_CODE = {
    "constant": ("scale * math", "3 * math"),
    "type of a constant": ("steps: int = 3", "steps: int = 3.0"),
    "default": ("wide=True", "wide=False"),
    "default that an annotation precedes": ("scale: float = 2.0", "scale: float = 2.5"),
    "decorator": ("(frozen=True)", "(frozen=False)"),
    "no decorator": ("@dataclass(frozen=True)\n", ""),
    "field's annotation": ("drift: float", "drift: int"),
    "field's default": ("drift: float = 0.5", "drift: float = 0.25"),
    "order of fields": ("steps: int = 3\n    drift: float = 0.5", "drift: float = 0.5\n    steps: int = 3"),
    "text": ('"so on"', '"so forth"'),
    "format": ("{wide}", "{wide!r}"),
    "import": ("import math", "import cmath as math"),
    "level of an import": ("from pathlib", "from .pathlib"),
    "operator": ("sqrt(self.steps) +", "sqrt(self.steps) -"),
    "annotation that a decorator may read": ("def start(", "@jit\ndef start("),
}


@pytest.mark.parametrize("change", SAME_CODE)
def test_how_code_is_written_does_not_count(change):
    old, new = SAME_CODE[change]
    assert old in MODULE
    assert code.code_digest(MODULE.replace(old, new)) == code.code_digest(MODULE)


@pytest.mark.parametrize("change", OTHER_CODE)
def test_what_code_does_counts(change):
    old, new = OTHER_CODE[change]
    assert old in MODULE
    assert code.code_digest(MODULE.replace(old, new)) != code.code_digest(MODULE)


def test_annotations_count_where_a_decorator_may_read_them():
    kernel = "@triton.jit\ndef kernel(x, wide: tl.constexpr): pass"
    assert code.code_digest(kernel) != code.code_digest(kernel.replace(": tl.constexpr", ""))
    plain = "@torch.no_grad()\n@property\ndef width(self) -> int: return 1"
    assert code.code_digest(plain) == code.code_digest(plain.replace(" -> int", ""))


GOLDEN = r'''
"""Every kind of syntax that Python 3.10 has."""
from __future__ import annotations
import asyncio, os.path as p
from dataclasses import dataclass
from . import sibling
x, w, a = 1.5, 3, {"k": 2}
numbers = (1, 1.0, 1j, 1e400, 0xFF, 1_000, -0.0, b"\x00\xff" b"a", ..., None, True, 10**3)
texts = f"{x}", f"a{x!r:>{w}}b" "c" f"{w:}{{}}" 'é\N{BULLET}\u200b\U0001fae8', f"" "lit", u"u"
texts += f"{x=} and {w = !s:^10} " f"{a['k']:{w}.{w}f}z" "tail", "x" f"{x}" "y" f"{{{x}}}" ""
texts += rf"\d{x}\n", f"{'a' 'b'}{ {1: 2}[1] }{y if (y := 1) else 0}", f"{x:{'>'}{w}}{x,}"
texts += f"""several
{x
 + 1} lines {x:%H:%M{w}}""",
hint: int = 3
match a:
    case {"k": int(v) as u, **rest} if u > 1: pass
    case [1, *others] | (2, others): pass
    case None | True | -1 | 1+2j | "s" "t": pass
    case p.sep: pass
    case sibling.Point(x=0, y=[]): pass
    case _: pass
@dataclass(frozen=True)
class A(object, metaclass=type):
    "doc"
    f: int = 3
    def m(self, a: int, /, b: str = "x", *c: int, d: bool = False, e, **k: float) -> None:
        "doc"
        found = [*c, *(i async for i in g() if i)] if a else {**k, "x": 1}
        del found[1:2, ::3], a
        return (z := b) or (lambda p, /, q=1, *r, s, **t: p @ q // 2 ** -3 % +4 << ~5)
async def g():
    async with o as p, q: await z
    async for i in y: yield i
    else: pass
    return_ = [i async for i in y]
def h(x, *, y=None):
    global hint
    def inner():
        nonlocal x
        x: "text" = 3
    try: raise ValueError from e
    except (A, B) as e: pass
    except C: ...
    else: assert x, "m"
    finally: x[1] += 1; x.y |= 2
    while not x < 1 <= 2 != 3 is not 4 not in 5 in 6 is 7 == 8 > 9 >= 10: continue
    else: return
    for i, *j in x:
        if i: break
        elif j and x or y: yield i
        else: yield
    with (a as b, c): x = yield from x
    return {i: j for i, j in x if i if j}, {*x}, {i for i in x}, print(*x, **y, k=1), x[..., None]
'''


def pythons():
    "The Python interpreters of this machine, from 3.10 on, one of each version."
    paths = [sys.executable]
    paths += [shutil.which(f"python3.{minor}") for minor in range(10, 16)]
    paths += sorted(Path.home().glob(".pyenv/versions/3.1[0-9].*/bin/python"))
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    versions = {}
    for path in filter(None, paths):
        asked = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        if asked.returncode == 0:  # a shim of pyenv may lead nowhere
            versions.setdefault(asked.stdout.strip(), path)
    return versions


def test_every_python_gives_the_same_digest():
    code = "import sys; from vqstudy.code import code_digest; print(code_digest(sys.stdin.read()))"
    env = dict(os.environ, PYTHONUTF8="1", PYTHONPATH=str(ROOT))
    env.pop("PYTHONHOME", None)
    digests = {}
    for version, path in pythons().items():
        asked = subprocess.run(
            [path, "-c", code], input=GOLDEN, capture_output=True, env=env, encoding="utf-8"
        )
        digests[version] = asked.stdout.strip() or asked.stderr
    golden = "7583b625199ba6176ab32e3646d1de03cc2fe0dc15ab770ce3879f684a7873b3"
    assert digests == dict.fromkeys(digests, golden)


def test_fingerprint_sees_code_and_nothing_else(project):
    path = project / "nbs/runs/walk.ipynb"
    toy = project / "vqstudy/toy.py"
    before = code.fingerprint("walk")
    shown = [nbformat.v4.new_output("stream", text="ran")]
    notebook(path, PARAMETERS, USES_TOY + "  # of a toy", outputs=shown)
    os.utime(toy, (0, 0))
    toy.write_text('"A toy."\n\ndef walk() -> None:\n    pass\n')
    (project / "vqstudy/unused.py").write_text("x = 1")
    assert code.fingerprint("walk") == before
    notebook(path, PARAMETERS, "", USES_TOY)
    assert code.fingerprint("walk") == before, "an empty cell"
    notebook(path, PARAMETERS, "%matplotlib inline", USES_TOY)
    assert code.fingerprint("walk") != before, "a magic"
    notebook(path, PARAMETERS.replace("steps: int = 3", "steps: int = 4"), USES_TOY)
    assert code.fingerprint("walk") != before, "a default"
    notebook(path, PARAMETERS, USES_TOY)
    toy.write_text("def walk(): return 1")
    assert code.fingerprint("walk") != before, "a module"
    toy.write_text("def walk(:")
    with pytest.raises(ValueError, match="does not parse"):
        code.fingerprint("walk")


def test_rows_of_older_code_are_stale_and_stay(project):
    planned = cells.plan("walks", "desk")
    run(planned[0], 0.1)
    run(planned[1], 0.2, code="of a textual hash")
    records.collect("walks", "desk")
    states = ["current", "stale", "missing", "missing"]
    assert list(records.in_results(planned).values()) == states
    lines = study.overview(["walks"], "desk", missing=True).splitlines()[1:5]
    assert [line.split()[2] for line in lines] == states
    assert "3 of 4 cells would run" in study.overview(["walks"], "desk", missing=True)
    assert list(records.results("walks", "desk")["metric"]) == [0.1, 0.2]


@pytest.mark.parametrize("name", cells.sweeps("desk"))
def test_committed_rows_are_read_and_the_dry_run_tells_how_old_they_are(name):
    if not (records.results_folder("desk") / f"{name}.csv").is_file():
        pytest.skip("not measured yet")
    planned = cells.plan(name, "desk")
    rows = records.results(name, "desk")
    states = records.in_results(planned)
    for cell in planned:
        mine = rows[(rows.cell == cell.id) & (rows.status != "failed")]
        if len(mine) < max(1, len(cell.lengths)):
            assert states[cell.id] == "missing"
        else:
            current = (mine.fingerprint == cell.fingerprint).all()
            assert states[cell.id] == ("current" if current else "stale")


# ---- plans ----

SEVERAL = "grid: [{steps: [1]}, {steps: [2]}]"
WRONG_SWEEPS = [
    ("[]", "must be a mapping"),
    ("{notebook: walk", "no YAML"),
    ("{notebook: walk, scales: {tiny: {}}}", "unknown scale tiny"),
    ("{notebook: walk, scales: {desk: {girds: {}}}}", "unknown key 'girds'"),
    ("{notebook: walk, grid: {seed: 1}, scales: {desk: {}}}", "must be a list"),
    ("{notebook: walk, fixed: {seed: 1}, seeds: [1], scales: {desk: {}}}", "name it once"),
    ("{notebook: walk, seeds: 3, scales: {desk: {}}}", "seeds must be list, got 3"),
    ("{notebook: walk, grid: 3, scales: {desk: {}}}", "grid must be dict or list, got 3"),
    ("{notebook: walk, grid: [3], scales: {desk: {}}}", "must be a mapping or a list"),
    ("{notebook: walk, grid: [], scales: {desk: {}}}", "must be a mapping or a list"),
    ("{notebook: walk, scales: {desk: {grid: [{steps: [1]}, [2]]}}}", "desk: grid must be .* mappings"),
    (f"{{notebook: walk, {SEVERAL}, scales: {{desk: {{{SEVERAL}}}}}}}", "both list several grids"),
    ("{notebook: walk, grid: [{lr: [1.0]}, {lr: [1.0]}], scales: {desk: {}}}", "listed twice"),
    ("{notebook: nowhere, scales: {desk: {}}}", "there is no nbs/runs/nowhere.ipynb"),
]


@pytest.mark.parametrize("sweep, why", WRONG_SWEEPS)
def test_wrong_sweeps_are_refused(project, sweep, why):
    (project / "nbs/sweeps/wrong.yaml").write_text(sweep)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match="wrong.yaml.*" + why):
        cells.plan("wrong", "desk")


def values(name, scale, *keys):
    return [tuple(cell.parameters[key] for key in keys) for cell in cells.plan(name, scale)]


def test_several_grids_of_a_scale_follow_one_another(project):
    (project / "nbs/sweeps/grids.yaml").write_text("""
notebook: walk
fixed: {lr: 0.5}
grid: {method: [a, b, c]}
seeds: [0, 1]
scales:
  desk: {grid: [{method: [a]}, {method: [b, c], lr: [2.0]}]}
  gpu: {fixed: {steps: 9}}
""")
    a, b, c = ("a", 0.5), ("b", 2.0), ("c", 2.0)
    desk = [(*each, seed) for each in (a, b, c) for seed in (0, 1)]
    assert values("grids", "desk", "method", "lr", "seed") == desk
    assert values("grids", "gpu", "method", "lr", "steps") == [(m, 0.5, 9) for m in "aabbcc"]


def test_several_grids_of_a_sweep_follow_one_another(project):
    (project / "nbs/sweeps/grids.yaml").write_text("""
notebook: walk
grid: [{method: [a]}, {method: [b], lr: [2.0]}]
scales:
  desk: {grid: {steps: [4, 5]}}
  gpu: {fixed: {lr: 7.0}}
""")
    desk = [("a", 0.1, 4), ("a", 0.1, 5), ("b", 2.0, 4), ("b", 2.0, 5)]
    assert values("grids", "desk", "method", "lr", "steps") == desk
    assert values("grids", "gpu", "method", "lr") == [("a", 7.0), ("b", 7.0)]


# ---- records and tables ----


def test_a_record_is_whole_or_absent(project):
    cell = cells.plan("walks", "desk")[0]
    newer = replace(cell, fingerprint="new")
    path = cell.folder / "record.json"
    assert records.state(cell) == "missing"
    run(cell, 0.5)
    text = path.read_text()
    assert records.state(cell) == "done" and json.loads(text)["metrics"] == dict(metric=0.5)
    for content in (text[:100], "[]", "{}", text.replace(cell.id, "walk-other")):
        path.write_text(content)
        assert records.state(cell) == "missing"
    path.write_text(text)
    assert records.state(newer) == "stale"
    run(cell, 0, "failed")
    assert (records.state(cell), records.state(newer)) == ("done", "failed")


def test_keys_of_a_record_and_of_its_row(project):
    cell = cells.plan("walks", "desk")[0]
    run(cell, 0.5)
    record = json.loads((cell.folder / "record.json").read_text())
    assert list(record) == ["cell", "cost", "metrics", "parameters", "provenance", "status"]
    past = provenance.provenance("walk", provenance.now())
    keys = ["fingerprint", "notebook", "notebook_file", "notebook_hash", "notebook_verified"]
    keys += ["commit", "dirty", "commit_unknown", "versions"]
    place = ["device", "threads", "dataset_hash", "sweep", "scale", "started", "finished"]
    assert list(past) == [*keys, *place]


def test_values_that_are_not_finite(project):
    cell = cells.plan("walks", "desk")[0]
    run(cell, float("nan"), "diverged")
    assert json.loads((cell.folder / "record.json").read_text())["metrics"] == dict(metric=None)
    records.collect("walks", "desk")
    row = records.results("walks", "desk").iloc[0]
    assert np.isnan(row["metric"]) and row["status"] == "diverged"


STATUS = ["done", "failed", "diverged", "older"]
RANK = dict(failed=0, older=1, done=2, diverged=2)
events = st.tuples(st.integers(0, 3), st.sampled_from(STATUS), st.sampled_from(["desk", "gpu"]))
every_change = ("failed", "older", "older", "done", "older", "failed", "diverged")


def contents(table):
    return {path: path.read_bytes() for path in table.parent.rglob("*.*")}


@given(st.lists(events, min_size=1, max_size=8))
@example([(0, status, "desk") for status in every_change])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_collect_loses_nothing_and_is_repeatable(project, events):
    shutil.rmtree(project / "data", ignore_errors=True)
    expected = {}
    for position, (index, status, scale) in enumerate(events):
        planned = cells.plan("walks", scale)
        cell = planned[index % len(planned)]
        if status == "older":
            run(cell, position / 7, code="older")
        else:
            run(cell, position / 7, status)
        table = records.collect("walks", scale)
        shutil.rmtree(cell.folder.parent)
        have = expected.get((scale, cell.id))
        if have is None or RANK[status] >= RANK[have[0]]:
            expected[scale, cell.id] = status, "" if status == "failed" else str(position / 7)
        before = contents(table)
        records.collect("walks", scale)
        assert before == contents(table)
    rows = files.read_table(table)
    known = {}
    for row in rows:
        status = "older" if row["fingerprint"] == "older" else row["status"]
        known[row["scale"], row["cell"]] = status, row.get("metric", "")
    assert known == expected
    notes = json.loads(table.with_suffix(".json").read_text())["cells"]
    assert {(scale, cell) for scale in notes for cell in notes[scale]} == set(expected)
    assert rows[0].keys() >= {*records.IDENTITY, "lr", "steps", "fingerprint"}


def test_columns_and_order(project):
    for cell in cells.plan("walks", "desk"):
        run(cell, 0.1)
    header, *lines = records.collect("walks", "desk").read_text().splitlines()
    identity = "cell,sweep,scale,dataset,method,seed,updates,status"
    assert header == identity + ",lr,steps,taps,tuned,metric,seconds,fingerprint"
    order = [["a", "0"], ["a", "1"], ["b", "0"], ["b", "1"]]
    assert [line.split(",")[4:8] for line in lines] == [[*each, "", "done"] for each in order]
    columns = ["cell", "scale", "epoch", "loss", "extra"]
    assert list(records.histories("walks", "desk").columns) == columns
    assert not records.samples("walks", "desk")  # no figure would show them


def test_rows_of_a_method_and_seed_stand_by_their_parameters(project):
    steps, rates = [65536, 1024, 8192], [0.5, 1e-5, 2.0, 0.1]
    files.write(project / "nbs/sweeps/walks.yaml", f"""
notebook: walk
grid: {{lr: {[f"{x:f}" for x in rates]}, steps: {steps}}}
scales: {{desk: {{}}}}
""".replace("'", ""))
    for cell in cells.plan("walks", "desk"):
        run(cell, 0.1)
    table = records.collect("walks", "desk")
    known = [(float(row["lr"]), int(row["steps"])) for row in files.read_table(table)]
    assert known == [(lr, n) for lr in sorted(rates) for n in sorted(steps)]


@pytest.fixture
def figured(project):
    "The sweep of a figure, its cells run and collected."
    sweep = project / "nbs/sweeps/walks.yaml"
    sweep.write_text(sweep.read_text() + "figures: [walks]\n")
    for cell in cells.plan("walks", "desk"):
        run(cell, 0.1)
    records.collect("walks", "desk")
    return sweep


def test_pictures_are_kept_for_figures(figured):
    pictures = records.samples("walks", "desk")
    assert set(pictures) == {("", "a"), ("", "b")}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures.values())


def test_the_picture_of_a_cell_no_longer_planned_gives_way(figured):
    text = figured.read_text()
    for lr in (0.2, 0.3, 0.4, 0.5):  # some of the new names sort before the old, some after
        figured.write_text(text + f"fixed: {{lr: {lr}}}\n")
        planned = cells.plan("walks", "desk")
        for cell in planned:
            run(cell, 0.2)
        table = records.collect("walks", "desk")
        kept = json.loads(table.with_suffix(".json").read_text())["samples"]
        lowest = sorted(cell.id for cell in planned if cell.parameters["seed"] == 0)
        assert sorted(note["cell"] for note in kept.values()) == lowest


# ---- lengths ----

LONG = PARAMETERS + "lengths: list = []"
BRANCHES = """
notebook: walk
metric: metric
figures: [walks]
fixed: {lengths: [10, 40]}
grid: {method: [a, b]}
seeds: [0, 1]
scales: {desk: {}, gpu: {fixed: {lengths: [10, 20, 40]}}}
"""


@pytest.fixture
def long(project):
    "A sweep whose runs have lengths, and its cells at desk."
    notebook(project / "nbs/runs/walk.ipynb", LONG, USES_TOY)
    files.write(project / "nbs/sweeps/walks.yaml", BRANCHES)
    return cells.plan("walks", "desk")


def by_length(cell, metric, status="done", code=None, reached=None, **options):
    "A run that was measured at the lengths of its cell, or at those that it reached."
    lengths = [dict(updates=n, metric=metric + n) for n in reached or cell.lengths]
    trunk = [dict(step=n, loss=metric) for n in (8, 32)]
    branches = [dict(step=n, loss=metric, length=n) for n in reached or cell.lengths]
    rest = dict(history=[*trunk, *branches], samples=True, **options)
    leave(cell, {}, status, code, lengths=[] if status == "failed" else lengths, **rest)


def rows_of(cell):
    table = files.read_table(records.results_folder(cell.scale) / f"{cell.sweep}.csv")
    mine = [row for row in table if (row["scale"], row["cell"]) == (cell.scale, cell.id)]
    return {row["updates"]: (row["status"], row.get("metric", "")) for row in mine}


def test_a_row_per_cell_and_length(long):
    for cell in long:
        by_length(cell, 0.5)
    table = records.collect("walks", "desk")
    assert rows_of(long[0]) == {"10": ("done", "10.5"), "40": ("done", "40.5")}
    frame = records.results("walks", "desk")
    assert list(frame.updates) == [10, 40] * 4 and len(frame) == 8
    assert list(frame.groupby(["method", "seed"]).cell.nunique()) == [1] * 4
    curves = records.histories("walks", "desk")
    mine = curves[curves.cell == long[0].id]
    assert list(mine.step) == [8, 32, 10, 40]
    assert list(mine.length.fillna(0)) == [0, 0, 10, 40]
    before = contents(table)
    records.collect("walks", "desk")
    assert contents(table) == before
    notes = json.loads(table.with_suffix(".json").read_text())
    assert notes["columns"]["metrics"] == ["metric"]
    assert list(records.in_results(long).values()) == ["current"] * 4


def test_a_length_that_the_table_lacks_makes_the_cell_missing(long):
    for cell in long:
        by_length(cell, 0.5)
    table = records.collect("walks", "desk")
    lines = table.read_text().splitlines()
    first, second, third = (cell.id for cell in long[:3])
    gone = [line for line in lines if not (line.startswith(first) and ",40,done," in line)]
    # one length by older code: the cell is stale
    (other,) = [line for line in gone if second in line and ",10,done" in line]
    older = other.replace(long[1].fingerprint, "older")
    table.write_text("\n".join(gone).replace(other, older) + "\n")
    states = records.in_results(long)
    assert [states[name] for name in (first, second, third)] == ["missing", "stale", "current"]


def test_other_lengths_are_other_cells_and_lose_no_row(long, project):
    by_length(long[0], 0.5)
    records.collect("walks", "desk")
    files.write(project / "nbs/sweeps/walks.yaml", BRANCHES.replace("[10, 40]", "[10, 20]"))
    other = cells.plan("walks", "desk")[0]
    by_length(other, 0.25)
    records.collect("walks", "desk")
    assert rows_of(long[0]) == {"10": ("done", "10.5"), "40": ("done", "40.5")}
    assert rows_of(other) == {"10": ("done", "10.25"), "20": ("done", "20.25")}


ENDS = ["done", "failed", "diverged", "late", "older"]


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(ENDS)), min_size=1, max_size=7))
@example([(0, end) for end in ("failed", "older", "failed", "late", "done", "failed", "diverged")])
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_collect_loses_no_length(long, project, ends):
    shutil.rmtree(project / "data", ignore_errors=True)
    expected = {}
    for position, (index, end) in enumerate(ends):
        cell = long[index]
        whole = {str(n): ("done", str(n + position / 4)) for n in cell.lengths}
        if end in ("done", "older"):
            by_length(cell, position / 4, code="older" if end == "older" else None)
        elif end == "late":
            by_length(cell, position / 4, "diverged", reached=[10])
            whole["40"] = "diverged", ""
        else:
            leave(cell, {}, end)
            whole = {key: (end, "") for key in whole}
        records.collect("walks", "desk")
        shutil.rmtree(cell.folder.parent)
        rank = dict(failed=0, older=1).get(end, 2)
        if rank >= expected.get(cell.id, (-1,))[0]:
            expected[cell.id] = rank, whole
    for cell in long[:2]:
        assert rows_of(cell) == expected.get(cell.id, (0, {}))[1]


def test_a_result_takes_the_place_of_a_failure_whose_length_nobody_knew(project):
    cell = cells.plan("walks", "desk")[0]
    for status, code, metrics, after in (
        ("failed", None, {}, {"": ("failed", "")}),
        ("done", "older", dict(metric=1, updates=7), {"7": ("done", "1")}),
        ("failed", None, {}, {"7": ("done", "1")}),
        ("diverged", None, {}, {"": ("diverged", "")}),
        ("done", None, dict(metric=2, updates=7), {"7": ("done", "2")}),
    ):
        leave(cell, metrics, status, code)
        records.collect("walks", "desk")
        shutil.rmtree(cell.folder.parent)
        assert rows_of(cell) == after


@pytest.mark.parametrize("metrics, cost, updates", [
    (dict(updates=780), dict(steps=5), 780),
    ({}, dict(steps=250), 250),
    (dict(mse=1), {}, None),
])
def test_updates_of_a_run_without_lengths(metrics, cost, updates):
    record = records.make_record("walk-0", {}, {}, "done", metrics, cost)
    (entry,) = records.entries(record)
    assert entry.updates == updates and "updates" not in entry.metrics


WRONG_LENGTHS = [
    ([dict(updates=40), dict(updates=10)], "more than the one before; got [40, 10]"),
    ([dict(updates=10), dict(updates=10)], "more than the one before; got [10, 10]"),
    ([dict(updates=10.0)], "a whole number above 0"),
    ([dict(mse=1)], "got [None]"),
    ([dict(updates=10, mse=1), dict(updates=40)], "metrics of the same names"),
    ([dict(updates=10, mse=1), dict(updates=40, psnr=1)], "metrics of the same names"),
    ([dict(updates=10), dict(updates=20, mse=1), dict(updates=40)], "metrics of the same names"),
    ([dict(updates=10), dict(updates=40, steps=1)], "'steps': parameters, metrics and cost"),
    ([dict(updates=10)], "[40] were asked for, and there are metrics of [10]"),
    ([], "[10, 40] were asked for, and there are metrics of []"),
]


@pytest.mark.parametrize("lengths, why", WRONG_LENGTHS)
def test_wrong_lengths_are_refused(lengths, why):
    with pytest.raises(ValueError) as caught:
        records.make_record("walk-0", dict(lengths=[10, 40], steps=5), {}, lengths=lengths)
    assert why in str(caught.value)


def test_what_is_measured_once_stands_in_the_row_of_the_longest_alone(long):
    lengths = [dict(updates=10, metric=0.5), dict(updates=40, metric=0.25, once=3)]
    leave(long[0], {}, lengths=lengths)
    records.collect("walks", "desk")
    rows = files.read_table(records.results_folder("desk") / "walks.csv")
    assert [(row["updates"], row["metric"], row["once"]) for row in rows] == [
        ("10", "0.5", ""), ("40", "0.25", "3"),
    ]


def test_metrics_or_lengths_and_no_parameter_of_that_name():
    both = dict(metrics=dict(mse=1), lengths=[dict(updates=1)])
    with pytest.raises(ValueError, match="metrics or lengths, got both"):
        records.make_record("walk-0", {}, {}, **both)
    with pytest.raises(ValueError, match="'updates': parameters, metrics and cost"):
        records.make_record("walk-0", dict(updates=3), {})


def test_a_history_of_a_length_that_was_not_measured_is_refused(long):
    with pytest.raises(ValueError, match=r"history: length \[30\] is not in the record"):
        lengths = [dict(updates=n, metric=0.5) for n in (10, 40)]
        leave(long[0], {}, lengths=lengths, history=[dict(step=1, length=30)])
    assert records.state(long[0]) == "missing"


def test_the_picture_of_the_longest_run_is_kept(long, project):
    short = BRANCHES.replace("[10, 40]", "[10]")
    for text, updates in ((short, "10"), (BRANCHES, "40"), (short, "40")):
        files.write(project / "nbs/sweeps/walks.yaml", text + "# planned are all\n")
        for cell in cells.plan("walks", "desk")[::2]:
            by_length(cell, 0.5)
        table = records.collect("walks", "desk")
        notes = json.loads(table.with_suffix(".json").read_text())["samples"]
        # a picture whose cell is planned no longer gives way, whatever its length
        now = "10" if text == short else "40"
        assert [note["updates"] for note in notes.values()] == [now, now]


def test_a_forecast_counts_a_run_of_several_lengths_once(long):
    # .8 of 40 and .2 of 10 and 40 are 42 updates
    by_length(long[0], 0.5, seconds=84)
    assert list(study.predicted(long).values()) == pytest.approx([84] * 4)
    records.collect("walks", "desk")
    shutil.rmtree(long[0].folder)
    assert list(study.predicted(long).values()) == pytest.approx([84] * 4)
    longer = replace(long[1], parameters=long[1].parameters | dict(lengths=[10, 40, 100]))
    assert study.predicted([long[0], longer])[longer.id] == pytest.approx(220)  # 110 updates
    whole = replace(long[1], parameters=long[1].parameters | dict(lengths=[]))
    assert study.predicted([long[0], whole])[whole.id] is None


def test_run_and_wrapper_know_lengths(project, monkeypatch):
    save = "from vqstudy.study import Run\nrun = Run('walk', globals())\n"
    save += "run.save(lengths=[dict(updates=n, metric=n / 2) for n in lengths[:seed + 1]])"
    notebook(project / "nbs/runs/walk.ipynb", LONG, save)
    files.write(project / "nbs/sweeps/walks.yaml", BRANCHES)
    short, whole = cells.plan("walks", "desk")[:2]
    process, line = start(project, *words_for(whole))
    assert process.wait(60) == 0 and "a · seed 1  metric  5 at 10, 20 at 40  " in line
    process, line = start(project, *words_for(short))
    assert process.wait(60) == 1
    assert "FAILED: ValueError: lengths: [40] were asked for, and there are metrics" in line


# ---- which notebook really ran ----

RUNS = [
    "import math",
    "from vqstudy.study import Run\nrun = Run('walk', globals())  # of a walk",
    "far = math.sqrt(run.parameters['steps'])",
    "run.save(dict(far=far))",
]
LATE = [*RUNS[:2], "far = 2 * math.sqrt(run.parameters['steps'])", RUNS[3]]


def papermill(project, path, *sources, api=False, env={}, parameters=PARAMETERS, **given):
    "Run a notebook by plain papermill: what it printed, and the records by their folders' names."
    notebook(project / path, parameters, *sources)
    if api:  # whose command line names no notebook
        code = "import papermill, sys; papermill.execute_notebook(sys.stdin.read(), None, "
        command = [sys.executable, "-c", f"{code}{given!r})"]
    else:
        values = [word for key, value in given.items() for word in ("-p", key, str(value))]
        command = [sys.executable, "-m", "papermill", path, "out.ipynb", *values]
    plain = dict(os.environ, PYTHONPATH=str(ROOT))
    for name in ("VQSTUDY_ROOT", "VQSTUDY_WATCH", "VQSTUDY_NOTEBOOK", "JPY_SESSION_NAME"):
        plain.pop(name, None)
    options = dict(cwd=project, env=plain | env, capture_output=True, text=True, timeout=90)
    done = subprocess.run(command, input=path, **options)
    left = sorted((project / "data/runs/single").glob("*/record.json"))
    return done, {file.parent.name: json.loads(file.read_text()) for file in left}


def kept(record):
    past = record["provenance"]
    return past["notebook_file"], past["notebook_verified"], past["fingerprint"]


def test_the_notebook_itself_is_known(project):
    done, left = papermill(project, "nbs/runs/walk.ipynb", *RUNS, steps=9)
    (name, record), now = *left.items(), code.fingerprint("walk")
    assert name == record["cell"] and record["metrics"] == dict(far=3)
    assert kept(record) == ("nbs/runs/walk.ipynb", True, now)
    whole = (project / "nbs/runs/walk.ipynb").read_bytes()
    assert record["provenance"]["notebook_hash"] == code.digest(whole)
    assert f"the record goes to data/runs/single/{name}" in (project / "out.ipynb").read_text()


EDITED = {
    "a later cell": (LATE, PARAMETERS),
    "an earlier cell": (["import math, os", *RUNS[1:]], PARAMETERS),
    "one cell more": ([*RUNS[:3], "far = 7", RUNS[3]], PARAMETERS),
    "a cell that sets a parameter after Run": ([*RUNS[:2], "seed = 5", *RUNS[2:]], PARAMETERS),
    "one cell less": ([RUNS[0], RUNS[1], "far = 1.", RUNS[3]], PARAMETERS),
}


@pytest.mark.parametrize("edit", EDITED)
@pytest.mark.parametrize("api", [False, True])
def test_an_edited_copy_leaves_the_originals_record_alone(project, edit, api):
    sources, declared = EDITED[edit]
    _, left = papermill(project, "nbs/runs/walk.ipynb", *RUNS)
    (cell, before), now = *left.items(), code.fingerprint("walk")
    done, left = papermill(project, "my_copy.ipynb", *sources, parameters=declared, api=api)
    assert left.pop(cell) == before, done
    (name, copy), = left.items()
    assert copy["cell"] == cell and name.startswith(f"{cell}.")
    file, verified, fingerprint = kept(copy)
    assert verified is False and fingerprint != now
    if api:
        assert (file, copy["provenance"]["notebook_hash"], fingerprint) == (None, None, None)
    else:
        assert file == "my_copy.ipynb" and name == f"{cell}.my_copy-edited"
        assert fingerprint == code.fingerprint(project / "my_copy.ipynb")
        whole = (project / "my_copy.ipynb").read_bytes()
        assert copy["provenance"]["notebook_hash"] == code.digest(whole)


SAME = {
    "unchanged": (RUNS, PARAMETERS),
    "comments": ([*RUNS[:3], "# at last\nrun.save(dict(far=far))"], PARAMETERS),
    "another default": (RUNS, PARAMETERS.replace("steps: int = 3", "steps: int = 4")),
}


@pytest.mark.parametrize("change", SAME)
def test_a_copy_of_the_same_code_is_the_notebook_and_says_its_name(project, change):
    sources, declared = SAME[change]
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS, *RUNS)
    _, left = papermill(project, "my_copy.ipynb", *sources, parameters=declared)
    (name, record), = left.items()
    assert name == record["cell"]
    assert kept(record) == ("my_copy.ipynb", True, code.fingerprint("walk"))
    assert record["parameters"]["steps"] == (4 if change == "another default" else 3)


@pytest.mark.parametrize("name", ["VQSTUDY_NOTEBOOK", "JPY_SESSION_NAME"])
def test_a_name_that_the_environment_tells_wrongly_is_not_taken(project, name):
    notebook(project / "nbs/runs/other.ipynb", PARAMETERS, *LATE)
    env = {name: str(project / "nbs/runs/other.ipynb")}
    _, left = papermill(project, "nbs/runs/walk.ipynb", *RUNS, env=env)
    assert [kept(record)[:2] for record in left.values()] == [("nbs/runs/walk.ipynb", True)]


def test_without_a_kernel_nothing_is_known(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    run = study.Run("walk", dict(seed=1, out=""))
    assert capsys.readouterr().out == f"the record goes to data/runs/single/{run.cell}\n"
    past = run.save({})["provenance"]
    assert (past["notebook_file"], past["notebook_hash"], past["notebook_verified"]) == (None,) * 3
    assert past["fingerprint"] == code.fingerprint("walk")


def test_a_run_outside_the_checkout_says_the_whole_path(
    project, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run = study.Run("walk", {})
    place = project.resolve() / "data/runs/single" / run.cell
    assert capsys.readouterr().out == f"the record goes to {place}\n"


def test_the_wrapper_refuses_a_notebook_of_another_name(project, capfd):
    notebook(project / "nbs/runs/stroll.ipynb", PARAMETERS, *RUNS)
    files.write(project / "nbs/sweeps/strolls.yaml", "{notebook: stroll, scales: {desk: {}}}")
    cell = cells.plan("strolls", "desk")[0]
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS, *RUNS)
    process, line = start(project, *words_for(cell))
    shown = line + process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "stroll.ipynb calls Run('walk', ...): it must name itself, Run('stroll'" in shown


def test_the_wrapper_tells_path_and_hash(project):
    sources = [*RUNS[:3], "if seed: raise ValueError('no')", RUNS[3]]
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS, *sources)
    whole = code.digest((project / "nbs/runs/walk.ipynb").read_bytes())
    for cell in cells.plan("walks", "desk")[:2]:
        process, line = start(project, *words_for(cell))
        process.communicate(timeout=60)
        record = records.found(cell)
        assert kept(record) == ("nbs/runs/walk.ipynb", True, cell.fingerprint), line
        assert record["provenance"]["notebook_hash"] == whole
        assert record["status"] == ("failed" if cell.parameters["seed"] else "done")


def test_code_of_another_checkout_is_refused(project):
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS, "from vqstudy import checks")
    ours = (ROOT / "vqstudy/checks.py").read_bytes()
    files.write(project / "vqstudy/checks.py", ours + b"# x")
    study.Run("walk", {})  # other in a comment alone
    files.write(project / "vqstudy/checks.py", "x = 1")
    with pytest.raises(ValueError, match="imported, and in the checkout .* checks differ: set PY"):
        study.Run("walk", {})


# ---- the commit ----


@pytest.fixture
def git(project, monkeypatch):
    "A repository with one commit; nothing was warned of yet."
    who = dict(NAME="a", EMAIL="a@b.c")
    for role in ("AUTHOR", "COMMITTER"):
        for key, value in who.items():
            monkeypatch.setenv(f"GIT_{role}_{key}", value)
    provenance._warn_of_commit.cache_clear()
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(project), *words], check=True)
    return project


def test_a_commit_is_known(git):
    known = provenance.commit()
    assert len(known["commit"]) == 40
    assert (known["dirty"], known["commit_unknown"]) == (False, None)
    files.write(git / "nbs/sweeps/walks.yaml", WALKS + "# changed\n")
    assert provenance.commit()["dirty"] is True


def in_git(project, *words):
    command = ["git", "-C", str(project), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


CHANGES = {
    "a module": ("vqstudy/toy.py", "def walk(): return 1", True),
    "a new module": ("vqstudy/new.py", "", True),
    "a new notebook": ("nbs/runs/stroll.ipynb", "{}", True),
    "a new sweep in a new folder": ("nbs/more/walks.yaml", "", True),
    "settings": ("settings.ini", "[DEFAULT]\nlib_name = vqstudy\nx = 1\n", True),
    "results": ("data/results/walks.csv", "cell", False),
    "a figure": ("figures/walks.svg", "<svg/>", False),
    "the README": ("README.md", "# Walks", False),
    "a new file elsewhere": ("notes.txt", "", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_a_tree_dirty(git, change):
    name, content, dirty = CHANGES[change]
    for known in ("README.md", "data/results/walks.csv", "figures/walks.svg"):
        files.write(git / known, "before")
    in_git(git, "add", ".")
    in_git(git, "commit", "-qm", "two")
    files.write(git / name, content)
    assert provenance.commit()["dirty"] is dirty
    assert provenance.uncommitted() == ([name] * dirty, "")


def test_a_notebook_that_was_only_run_is_clean(git):
    path = git / "nbs/runs/walk.ipynb"
    shown = [nbformat.v4.new_output("stream", text="ran")]
    book = json.loads(path.read_text())
    book["cells"][1] |= dict(outputs=shown, execution_count=3)
    path.write_text(json.dumps(book))
    assert provenance.commit()["dirty"] is False
    book["cells"][1]["source"] = "from vqstudy.toy import walk  # on"
    path.write_text(json.dumps(book))
    assert provenance.commit()["dirty"] is True
    path.unlink()
    assert provenance.uncommitted() == (["nbs/runs/walk.ipynb"], "")


def from_git(cell, **past):
    "A record that says from which commit it is."
    run(cell, 0.5)
    path = cell.folder / "record.json"
    record = json.loads(path.read_text())
    record["provenance"] |= provenance.commit() | past
    path.write_text(json.dumps(record))


def notes_of(cell):
    path = records.results_folder(cell.scale) / f"{cell.sweep}.json"
    return json.loads(path.read_text())["cells"][cell.scale][cell.id]


def test_nothing_is_collected_from_a_dirty_tree(git, capsys):
    first, second = cells.plan("walks", "desk")[:2]
    from_git(first)
    words = ["collect", "--scale", "desk", "--sweep", "walks"]
    assert study.main(words) == 0
    before = contents(git / "data/results/walks.csv")
    # results alone leave the tree clean
    from_git(second)
    files.write(git / "vqstudy/new.py", "")
    assert study.main(words) == 2
    said = capsys.readouterr().err
    assert "walks is not collected: the tree has changes that are in no commit: vqstudy/new" in said
    assert contents(git / "data/results/walks.csv") == before
    assert study.main([*words, "--dirty"]) == 0
    assert notes_of(second)["collected_dirty"] is True and "collected_dirty" not in notes_of(first)
    # what is in the table is not asked for again, nor does its note change
    before = contents(git / "data/results/walks.csv")
    assert study.main(words) == 0
    (git / "vqstudy/new.py").unlink()
    assert study.main(words) == 0 and contents(git / "data/results/walks.csv") == before


def test_a_record_of_a_dirty_tree_is_not_collected(git):
    first, second = cells.plan("walks", "desk")[:2]
    from_git(first, dirty=True)
    with pytest.raises(ValueError, match=f"not collected: {first.id} made while the tree had"):
        records.collect("walks", "desk")
    records.collect("walks", "desk", dirty=True)
    assert notes_of(first)["dirty"] is True
    assert records.in_results([first]) == {first.id: "current"}
    records.collect("walks", "desk")
    smoke = cells.plan("walks", "smoke")[0]
    from_git(smoke, dirty=True)
    records.collect("walks", "smoke")


def test_evidence_is_from_the_commit_at_which_it_was_found(git):
    notebook(git / "nbs/figs/spiral.ipynb", "1")
    for words in (["add", "."], ["commit", "-qm", "figure"]):
        in_git(git, *words)
    head = in_git(git, "rev-parse", "HEAD").strip()

    def past(value):
        return json.loads(records.evidence("spiral", dict(far=value)).read_text())["provenance"]

    first = past(1.5)
    assert (first["commit"], first["dirty"]) == (head, False)
    assert first["device"] == provenance.device() and first["versions"]["python"]
    in_git(git, "commit", "-qm", "more", "--allow-empty")
    assert past(1.5) == first
    assert past(2.5)["commit"] != head
    # found in a dirty tree, and found again from a commit
    files.write(git / "vqstudy/new.py", "")
    assert past(3.5)["dirty"] is True and past(3.5)["dirty"] is True
    (git / "vqstudy/new.py").unlink()
    assert past(3.5)["dirty"] is False


def test_a_data_set_is_known_by_its_files(project, monkeypatch):
    monkeypatch.setenv("VQSTUDY_DATA", str(project))
    files.write(project / "celeba10k/train.parquet", "faces")
    first = provenance.dataset_hash("celeba")
    assert len(first) == 16
    assert provenance.provenance("walk", "now", "celeba")["dataset_hash"] == first
    monkeypatch.setattr(provenance, "_file_hash", None)  # read once
    assert provenance.dataset_hash("celeba") == first
    monkeypatch.undo()
    monkeypatch.setenv("VQSTUDY_ROOT", str(project))
    monkeypatch.setenv("VQSTUDY_DATA", str(project))
    path = project / "celeba10k/train.parquet"
    path.write_text("FACES")
    os.utime(path, (0, 0))
    assert provenance.dataset_hash("celeba") != first
    assert provenance.dataset_hash("photos") is None is provenance.dataset_hash("")


def nothing_known(reason):
    return dict(commit=None, dirty=None, commit_unknown=reason)


def test_no_git_is_warned_of_once_and_recorded(git, monkeypatch, recwarn):
    monkeypatch.setenv("PATH", str(git))
    assert provenance.commit() == provenance.commit() == nothing_known("git is not installed")
    warned = "the records will name no commit: git is not installed"
    assert [str(warning.message) for warning in recwarn] == [warned]
    past = provenance.provenance("walk", provenance.now())
    assert past["commit_unknown"] == "git is not installed"


def test_a_commit_that_git_refuses_to_tell_is_warned_of(git, monkeypatch, recwarn):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    reason = "fatal: detected dubious ownership in repository"
    assert provenance.commit() == provenance.commit() == nothing_known(reason)
    assert len(recwarn) == 1 and "dubious ownership" in str(recwarn[0].message)


def test_a_repository_without_a_commit_is_warned_of(project, recwarn):
    provenance._warn_of_commit.cache_clear()
    subprocess.run(["git", "-C", str(project), "init", "-q"], check=True)
    known = provenance.commit()
    assert known["commit"] is None and "HEAD" in known["commit_unknown"] and len(recwarn) == 1


def test_no_repository_is_recorded_and_not_warned_of(project, recwarn):
    assert provenance.commit() == nothing_known("fatal: not a git repository")
    assert not recwarn.list


def test_the_commit_of_a_repository_around_the_checkout_is_not_ours(git, monkeypatch, recwarn):
    inner = git / "copy"
    inner.mkdir()
    shutil.copy(git / "settings.ini", inner)
    monkeypatch.setenv("VQSTUDY_ROOT", str(inner))
    assert provenance.commit() == nothing_known("the checkout lies in another git repository")
    assert not recwarn.list


# ---- what a study would do ----


def test_what_a_study_would_do(project):
    planned = cells.plan("walks", "desk")
    for cell in planned[:2]:
        run(cell, 0.1)
    records.collect("walks", "desk")
    (planned[0].folder / "record.json").unlink()
    everything, _, _ = study.todo(["walks"], "desk")
    missing, _, _ = study.todo(["walks"], "desk", missing=True)
    assert [cell.id for cell in everything] == [planned[i].id for i in (0, 2, 3)]
    assert [cell.id for cell in missing] == [planned[i].id for i in (2, 3)]
    with pytest.raises(ValueError, match="scale must be 'smoke', .* or 'paper', got 'tiny'"):
        study.chosen("", "tiny")
    assert study.chosen("", "desk") == ["walks"] and study.chosen("a, b", "desk") == ["a", "b"]


def test_predicted_time_is_that_of_the_method_then_of_the_sweep(project):
    planned = cells.plan("walks", "desk")  # a 0, a 1, b 0, b 1
    assert study.predicted(planned) == {cell.id: None for cell in planned}
    assert study.forecast(planned, ["walks"], "desk") == "predicted machine time: unknown"
    leave(planned[0], {}, code="older", seconds=60)
    leave(planned[2], {}, "diverged", "older", seconds=1)
    assert list(study.predicted(planned).values()) == [60, 60, 60, 60]
    records.collect("walks", "desk")
    leave(planned[2], {}, code="older", seconds=240)
    (planned[0].folder / "record.json").unlink()  # the results remember it
    assert list(study.predicted(planned).values()) == [60, 60, 240, 240]


def test_forecast_adds_up_and_names_what_is_unknown(project):
    planned = cells.plan("walks", "desk")
    leave(planned[0], {}, seconds=60)
    leave(planned[2], {}, seconds=240)
    cores = os.cpu_count()
    expected = f"{9 / cores:.1f} min (9.0 min summed over {cores} cores)"
    shown = study.forecast(planned[1:], ["walks"], "desk")
    assert shown == f"predicted machine time: {expected}"
    others = "{notebook: walk, fixed: {steps: 8}, scales: {desk: {}}}"
    (project / "nbs/sweeps/others.yaml").write_text(others)
    both = planned + cells.plan("others", "desk")
    total, walks, others = study.forecast(both, ["walks", "others"], "desk").splitlines()
    assert "10.0 min summed" in total and total.endswith("and 1 cells unknown")
    assert others == "  others: 1 cells, unknown"


def test_two_holders_of_a_lock(project):
    path = project / "lock"
    code = """import sys
from pathlib import Path
from vqstudy.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()"""
    command = [sys.executable, "-c", code, str(path)]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match="another process holds lock"):
        with files.locked(path, 0.2):
            pass
    holder.kill()
    holder.wait()
    with files.locked(path, 5):
        pass


def test_who_waits_for_a_lock_leaves_its_holders_name(project):
    path = project / "lock"
    with files.locked(path):
        for _ in range(2):
            with pytest.raises(TimeoutError, match=rf"holds lock \(pid {os.getpid()} on "):
                files.locked(path, 0).__enter__()
    with files.locked(path, 0):
        assert path.read_text().count("pid") == 1


# ---- two studies at once ----


def start(project, *words, **env):
    "A command of the study in another process, and the first line that it prints."
    command = [sys.executable, "-m", "vqstudy.study", *words]
    where = dict(cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)) | env)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, **where, **pipes)
    return process, process.stdout.readline()


def words_for(cell):
    return ["cell", "--scale", cell.scale, "--sweep", cell.sweep, "--cell", cell.id]


def test_a_cell_that_another_study_runs_is_waited_for(project):
    cell = cells.plan("walks", "desk")[0]
    with files.locked(cell.work.with_suffix(".lock")):
        process, line = start(project, *words_for(cell))
        assert "waits for another study that runs it" in line and f"pid {os.getpid()}" in line
        run(cell, 0.5)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and shown == f"{cell.id}  a · seed 0  done by another study\n"


def test_waiting_ends_with_the_time_budget(project):
    cell = cells.plan("walks", "desk")[0]
    with files.locked(cell.work.with_suffix(".lock")):
        soon = str(time.time() + 3)
        process, line = start(project, *words_for(cell), VQSTUDY_DEADLINE=soon)
        shown, _ = process.communicate(timeout=30)
    assert "waits for another study" in line
    assert process.returncode == study.OUT_OF_TIME and shown == "" and not cell.work.exists()


HOMES = ["/dev/null/home", "", None]


@pytest.mark.parametrize("home", HOMES)
def test_a_run_without_a_home_folder_keeps_its_caches_in_the_checkout(project, home):
    names = ("XDG_CACHE_HOME", *processes.CACHES)
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", *names)}
    if home is not None:
        env["HOME"] = home
    code = "import os\nfrom vqstudy.processes import keep_caches\nkeep_caches()\nprint("
    code += "*(os.environ[name] for name in " + repr(names) + "), sep='\\n')"
    command = [sys.executable, "-c", code]
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    folders = done.stdout.splitlines()
    assert len(folders) == len(names), done.stderr
    assert all(folder.startswith(f"{project}/data/runs/.cache") for folder in folders)


def test_a_home_that_takes_caches_has_them(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = dict(os.environ)
    processes.keep_caches()
    assert dict(os.environ) == before


def test_a_figure_that_another_study_draws_is_waited_for(project):
    notebook(project / "nbs/figs/walks.ipynb", "scale: str = 'smoke'")
    with files.locked(project / "data/runs/desk/figs/.walks.lock"):
        process, line = start(project, "draw", "--scale", "desk", "walks")
        assert "walks  waits for another study" in line
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and shown.endswith("walks  drawn\n")


def test_a_budget_that_is_no_time_is_said(project, monkeypatch, capsys):
    monkeypatch.setenv("VQSTUDY_DEADLINE", "soon")
    assert study.main(words_for(cells.plan("walks", "desk")[0])) == 2
    assert capsys.readouterr().err == "study: VQSTUDY_DEADLINE must be a Unix time, got 'soon'\n"


@pytest.mark.parametrize("name, given", [("BUDGET", "10m"), ("BUDGET", "-1"), ("MISSING", "yes")])
@pytest.mark.parametrize("worse", ["", "nan", "inf"])
def test_options_of_make_are_numbers(name, given, worse):
    with pytest.raises(ValueError, match=f"{name} takes .*, got {worse or given!r}"):
        study.option(name, worse or given)
    assert [study.option(name, value) for value in (None, "", 0, "1")] == [0, 0, 0, 1]


# ---- errors that a user can cause ----


def broken_notebook(project, content):
    files.write(project / "nbs/runs/walk.ipynb", content)


def damaged_notes(project, content):
    run(cells.plan("walks", "desk")[0], 0.5)
    table = records.collect("walks", "desk")
    table.with_suffix(".json").write_text(content)


def figures_of_walks(project, content):
    files.write(project / "nbs/sweeps/walks.yaml", WALKS + content)


MISTAKES = [
    (broken_notebook, "", "walks.yaml: walk.ipynb is no notebook, or a damaged one"),
    (broken_notebook, "[]", "walks.yaml: walk.ipynb is no notebook, or a damaged one"),
    (broken_notebook, "{}", "walk.ipynb is no notebook, or a damaged one (KeyError: 'cells')"),
    (broken_notebook, '{"cells": [{}]}', "damaged one (KeyError: 'cell_type')"),
    (figures_of_walks, "figures: [strolls]", "walks.yaml: figures: notebook 'strolls': there is no"),
]


@pytest.mark.parametrize("make, content, why", MISTAKES)
def test_a_mistake_is_told_in_one_line(project, capsys, make, content, why):
    make(project, content)
    assert study.main(["plan", "--scale", "desk"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("study: ") and why in said and said.count("\n") == 1


@pytest.mark.parametrize("content", ["", "{", "<<<<<<< HEAD"])
def test_damaged_notes_are_named(project, capsys, content):
    damaged_notes(project, content)
    assert study.main(["collect", "--scale", "desk"]) == 2
    assert "study: data/results/walks.json is damaged (" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["two", "0", "-1", "1.5"])
def test_slots_are_one_or_more(monkeypatch, given):
    monkeypatch.setenv("VQSTUDY_GPU_SLOTS", given)
    with pytest.raises(ValueError, match=f"VQSTUDY_GPU_SLOTS must be 1 or more, got '{given}'"):
        processes.slots()


def test_a_root_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    assert study.main(["plan"]) == 2
    expected = f"study: VQSTUDY_ROOT = {tmp_path} is no vqstudy repository\n"
    assert capsys.readouterr().err == expected


OBSTACLES = [PermissionError(13, "Permission denied", "data/runs"), OSError(28, "No space left")]
OBSTACLES += [ModuleNotFoundError("No module named 'yaml'")]


@pytest.mark.parametrize("error", OBSTACLES)
def test_what_a_machine_lacks_is_told_in_one_line(project, monkeypatch, capsys, error):
    def fails(*args):
        raise error

    monkeypatch.setattr(study, "overview", fails)
    assert study.main(["plan"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"study: {error}")
    assert ("make setup" in said) == isinstance(error, ImportError)


def test_a_metric_that_no_record_has_is_told(project):
    sources = ["from vqstudy.study import Run\nRun('walk', globals()).save(dict(near=1, far=2))"]
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS, *sources)
    figures_of_walks(project, "metric: fa")
    process, line = start(project, *words_for(cells.plan("walks", "desk")[0]))
    assert process.wait(60) == 0
    assert "no value of 'fa' (the sweep's metric); there are: far, near  " in line


# ---- data sets that are not here ----


def wanting(*names):
    "Cells of sweeps a, b, ..., each of which wants a data set; None has no such parameter."
    made = []
    for sweep, name in zip("abcd", names):
        given = {} if name is None else dict(dataset=name)
        made.append(cells.Cell(f"walk-{sweep}", "walk", given, sweep, "desk", ""))
    return made


LACKING = [
    (("cifar10", "photos", None), (), "1 of 3 cells need cifar10,", "images('cifar10', 'train'"),
    (("celeba", "cifar10"), (), "2 of 2 cells need celeba, cifar10,", "images('celeba', 'train'"),
    (("street", None), (), "1 of 2 cells need street,", "put it into $VQSTUDY_DATA/street"),
    (("celeba", "cifar10"), ("cifar10",), "1 of 2 cells need celeba,", 'SWEEP="b"'),
    (("cifar10", "photos"), ("celeba10k",), "1 of 2 cells need cifar10,", 'SWEEP="b"'),
]


@pytest.mark.parametrize("given", ["unset", "no folder", "empty folders", "others"])
@pytest.mark.parametrize("wanted, others, count, how", LACKING)
def test_sets_that_are_missing_are_named(tmp_path, monkeypatch, given, wanted, others, count, how):
    place = tmp_path / "sets"
    monkeypatch.setenv("VQSTUDY_DATA", str(place))
    if given == "unset":
        monkeypatch.delenv("VQSTUDY_DATA")
    if given == "empty folders":
        for name in ("cifar10", "celeba", "street"):
            (place / name).mkdir(parents=True)
    if given == "others":
        for name in others:
            files.write(place / name / "a.parquet", "")
    said = study.lacking(wanting(*wanted))
    if others and given != "others":
        assert "need" in said
    else:
        assert count in said and how in said
    assert ("VQSTUDY_DATA is not set" in said) == (given == "unset")


HERE = [("cifar10", "cifar10"), ("cifar10", "cifar-10-batches-py"), ("celeba", "celeba")]
HERE += [("celeba", "celeba10k"), ("celeba10k", "celeba10k"), ("street", "street")]


@pytest.mark.parametrize("name, folder", HERE)
def test_sets_that_are_here_are_found(tmp_path, monkeypatch, name, folder):
    monkeypatch.setenv("VQSTUDY_DATA", str(tmp_path))
    files.write(tmp_path / folder / "train-00000-of-00001.parquet", "")
    assert study.lacking(wanting(name, "photos", None)) == ""


def test_no_files_are_wanted_by_photos_and_by_cells_without_images(monkeypatch):
    monkeypatch.delenv("VQSTUDY_DATA", raising=False)
    assert study.lacking(wanting("photos", None, "")) == "" == study.lacking([])


def test_sets_are_looked_for_where_data_finds_them():
    from vqstudy import data

    assert set(study.SET_FOLDERS) == set(data.DOWNLOADS)
    assert set(data.FACES) == set(study.SET_FOLDERS["celeba"])


def test_a_cell_without_its_set_does_not_start(project, monkeypatch, capsys):
    monkeypatch.delenv("VQSTUDY_DATA", raising=False)
    notebook(project / "nbs/runs/walk.ipynb", PARAMETERS + 'dataset: str = "cifar10"', USES_TOY)
    cell = cells.plan("walks", "desk")[0]
    assert study.main(words_for(cell)) == 2
    assert "study: 1 of 1 cells need cifar10" in capsys.readouterr().err
    assert not cell.work.exists() and records.state(cell) == "missing"


def test_checkpoint_belongs_to_cell_and_code(project, monkeypatch):
    monkeypatch.chdir(project)
    first = study.Run("walk", dict(seed=1))
    other = study.Run("walk", dict(seed=2, out="elsewhere"))
    assert first.checkpoint.name != other.checkpoint.name
    assert (first.out, other.out) == (Path(f"data/runs/single/{first.cell}"), Path("elsewhere"))
    (project / "vqstudy/toy.py").write_text("def walk(): return 1")
    assert study.Run("walk", dict(seed=1)).checkpoint != first.checkpoint
    assert first.deadline is None and first.parameters["seed"] == 1
    monkeypatch.setenv("VQSTUDY_DEADLINE", "12.5")
    assert study.Run("walk", {}).deadline == 12.5


def test_command_line_starts_light():
    heavy = ("torch", "pandas", "papermill", "numpy", "psutil", "yaml")
    code = f"import sys; import vqstudy.study; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


# ---- tuning ----

TRIES = """
notebook: walk
metric: metric
grid: [{method: [a, b], steps: [1, 2]}, {method: [c], lr: [1.0, 2.0]}]
seeds: [7, 8]
scales: {desk: {}}
"""


def tried(project, runs, sweep=TRIES):
    "What is chosen after runs with these metrics and ends, in the order of the plan."
    (project / "nbs/sweeps/tries.yaml").write_text(sweep)
    for cell, (metric, status) in zip(cells.plan("tries", "desk"), runs):
        run(cell, metric, status)
    records.collect("tries", "desk")
    return tuning.choice("tries", "desk")


def test_choice_takes_the_least_mean_over_seeds_and_nothing_that_diverged(project):
    ok = [(metric, "done") for metric in (1, 9, 4, 4, 3, 3, 2, 2)]
    one_lost = [(1, "diverged"), (1, "done"), (7, "done"), (8, "done")]
    chosen = tried(project, ok + one_lost)
    assert chosen == dict(a=dict(steps=2), b=dict(steps=2), c=dict(lr=2.0))
    a_and_b, c = tuning.declared(chosen).splitlines()
    assert a_and_b == '- {"method": ["a", "b"], "steps": [2]}'
    assert c == '- {"method": ["c"], "lr": [2.0]}'


SEARCH = "notebook: walk\nmetric: metric\nfixed: {lengths: [10, 40]}\n"
SEARCH += "grid: [{method: [a], steps: [1, 2]}, {method: [b], lr: [1.0, 2.0]}]\nscales: {desk: {}}"


def searched(project, values, statuses=("done",) * 4, reached=None):
    "A search measured at two lengths: by trial, the metric at each."
    notebook(project / "nbs/runs/walk.ipynb", LONG, USES_TOY)
    files.write(project / "nbs/sweeps/search.yaml", SEARCH)
    for cell, pair, status in zip(cells.plan("search", "desk"), values, statuses):
        pairs = list(zip(cell.lengths, pair))[: reached if status == "diverged" else None]
        leave(cell, {}, status, lengths=[dict(updates=n, metric=x) for n, x in pairs])
    records.collect("search", "desk")


def test_choice_is_at_one_length(project):
    searched(project, [(1, 9), (2, 8), (1, 8), (2, 9)])
    longest = dict(a=dict(steps=2), b=dict(lr=1.0))
    assert tuning.choice("search", "desk") == tuning.choice("search", "desk", 40) == longest
    assert tuning.choice("search", "desk", 10) == dict(a=dict(steps=1), b=dict(lr=1.0))
    with pytest.raises(ValueError, match="has no row at 20 updates; it has: 10, 40"):
        tuning.choice("search", "desk", 20)


def test_a_trial_that_diverged_late_is_worst_at_the_length_that_it_did_not_reach(project):
    statuses = ("diverged", "done", "done", "done")
    searched(project, [(1, 0), (2, 8), (1, 8), (2, 9)], statuses, reached=1)
    assert tuning.choice("search", "desk")["a"] == dict(steps=2)
    assert tuning.choice("search", "desk", 10)["a"] == dict(steps=1)


def test_choice_refuses_what_is_not_whole_or_not_equal(project):
    with pytest.raises(ValueError, match="7 of 12 trials are not in the results"):
        tried(project, [(1, "done")] * 5)
    with pytest.raises(ValueError, match="no trial ended well of c"):
        tried(project, [(1, "done")] * 8 + [(1, "failed")] * 4)
    grid = "[{method: [a], steps: [1, 2, 3]}, {method: [b], steps: [1, 2]}]"
    sweep = f"{{notebook: walk, metric: metric, grid: {grid}, scales: {{desk: {{}}}}}}"
    with pytest.raises(ValueError, match="different numbers of trials: {'a': 3, 'b': 2}"):
        tried(project, [(n, "done") for n in (1, 2, 3, 1, 2)], sweep)
