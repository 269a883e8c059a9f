"""Identity, plans, records and tables: what must hold for any parameters and in any order of events."""

import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from vqstudy import cells, records, study, tuning

ROOT = Path(__file__).parents[1]
PARAMETERS = 'lr: float = 0.1\nsteps: int = 3\nmethod: str = "a"\ntuned: bool = False\ntaps: list = [1, 2]\nseed: int = 0\nout: str = ""'


def notebook(path, *sources, outputs=(), tag="parameters"):
    made = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata=dict(tags=[] if i else [tag]),
            source=source,
            outputs=list(outputs),
            execution_count=None,
        )
        for i, source in enumerate(sources)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = vqstudy\n")
    notebook(tmp_path / "nbs/runs/walk.ipynb", PARAMETERS, "from vqstudy.toy import walk")
    (tmp_path / "vqstudy").mkdir()
    (tmp_path / "vqstudy/toy.py").write_text("def walk(): pass")
    (tmp_path / "nbs/sweeps").mkdir()
    (tmp_path / "nbs/sweeps/walks.yaml").write_text(
        "{notebook: walk, grid: {method: [a, b]}, seeds: [0, 1], scales: {smoke: {}, desk: {}, gpu: {seeds: [7]}}}"
    )
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    return tmp_path


def leave(cell, metric, status="done", code=None):
    "A record, or the note of a failure, as a run leaves it."
    record = records.make_record(
        cell.id,
        cell.parameters,
        dict(fingerprint=code or cell.fingerprint),
        status,
        {} if status == "failed" else dict(metric=metric),
        dict(seconds=1.0),
        "ValueError: no" if status == "failed" else "",
    )
    if status == "failed":
        records.write(cell.work / "failed.json", json.dumps(record))
    else:
        records.save_record(
            cell.folder,
            record,
            [dict(epoch=0, loss=metric), dict(epoch=1, loss=metric, extra=1)],
            np.zeros((2, 4, 3, 8, 8), "uint8"),
        )


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
    name = cells.cell_id("walk", parameters)
    assert (
        name
        == cells.cell_id("walk", {key: parameters[key] for key in names})
        == cells.cell_id("walk", json.loads(json.dumps(parameters)))
    )
    assert len(name) == len("walk-") + 12
    assert name != cells.cell_id("walk", parameters | {"new parameter": 0})


def test_id_tells_types_apart():
    assert len({cells.cell_id("w", dict(x=x)) for x in (1, 1.0, "1", True, [1])}) == 5


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
    assert cells.check("walk", {}) == dict(
        lr=0.1, steps=3, method="a", tuned=False, taps=[1, 2], seed=0
    )
    with pytest.raises(ValueError, match="unknown parameter 'out'"):
        cells.check("walk", dict(out="x"))
    with pytest.raises(ValueError, match="finite"):
        cells.check("walk", dict(lr=float("inf")))
    notebook(project / "nbs/runs/twice.ipynb", PARAMETERS, "1")
    book = json.loads((project / "nbs/runs/twice.ipynb").read_text())
    book["cells"][1]["metadata"]["tags"] = ["parameters"]
    (project / "nbs/runs/twice.ipynb").write_text(json.dumps(book))
    with pytest.raises(ValueError, match="has 2"):
        cells.parameters("twice")


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = 1",
        "x: int",
        "x: int = os.cpu_count()",
        "x: Path = 'a'",
        "x: int = None",
        "x: int = 1.5",
        "for x in []: pass",
    ],
)
def test_parameters_cell_holds_annotated_literals(project, line):
    notebook(project / "nbs/runs/odd.ipynb", line + '\nout: str = ""')
    with pytest.raises((ValueError, TypeError), match="odd.ipynb|parameter 'x'"):
        cells.parameters("odd")


def test_fingerprint_sees_code_and_nothing_else(project):
    path, before = project / "nbs/runs/walk.ipynb", cells.fingerprint("walk")
    notebook(
        path,
        PARAMETERS,
        "from vqstudy.toy import walk",
        outputs=[dict(output_type="stream", name="stdout", text="ran")],
    )
    os.utime(project / "vqstudy/toy.py", (0, 0))
    (project / "vqstudy/unused.py").write_text("x = 1")
    assert cells.fingerprint("walk") == before
    notebook(path, PARAMETERS, "from vqstudy.toy import walk  # changed")
    assert cells.fingerprint("walk") != before
    (project / "vqstudy/toy.py").write_text("def walk(:")
    with pytest.raises(ValueError, match="does not parse"):
        cells.fingerprint("walk")


@pytest.mark.parametrize(
    "sweep, why",
    [
        ("[]", "wants a mapping"),
        ("{notebook: walk", "no YAML"),
        ("{notebook: walk, scales: {tiny: {}}}", "unknown scale tiny"),
        ("{notebook: walk, scales: {desk: {girds: {}}}}", "unknown key 'girds'"),
        ("{notebook: walk, grid: {seed: 1}, scales: {desk: {}}}", "wants a list"),
        ("{notebook: walk, fixed: {seed: 1}, seeds: [1], scales: {desk: {}}}", "name it once"),
        ("{notebook: walk, seeds: 3, scales: {desk: {}}}", "wants list"),
        ("{notebook: walk, grid: 3, scales: {desk: {}}}", "grid is 3, wants dict or list"),
        ("{notebook: walk, grid: [3], scales: {desk: {}}}", "wants a mapping or a list"),
        ("{notebook: walk, grid: [], scales: {desk: {}}}", "wants a mapping or a list"),
        (
            "{notebook: walk, scales: {desk: {grid: [{steps: [1]}, [2]]}}}",
            "scale desk: grid is .* list of mappings",
        ),
        (
            "{notebook: walk, grid: [{steps: [1]}, {steps: [2]}], scales: {desk: {grid: [{lr: [0.5]}, {lr: [1.5]}]}}}",
            "both list several grids",
        ),
        (
            "{notebook: walk, grid: [{steps: [1]}, {steps: [1]}], scales: {desk: {}}}",
            "listed twice",
        ),
        ("{notebook: nowhere, scales: {desk: {}}}", "there is no nbs/runs/nowhere.ipynb"),
    ],
)
def test_wrong_sweeps_are_refused(project, sweep, why):
    (project / "nbs/sweeps/wrong.yaml").write_text(sweep)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match="wrong.yaml.*" + why):
        cells.plan("wrong", "desk")


def test_a_record_is_whole_or_absent(project):
    cell = cells.plan("walks", "desk")[0]
    assert records.state(cell) == "missing"
    leave(cell, 0.5)
    text = (cell.folder / "record.json").read_text()
    assert records.state(cell) == "done" and json.loads(text)["metrics"] == dict(metric=0.5)
    for content in (text[:100], "[]", "{}", text.replace(cell.id, "walk-other")):
        (cell.folder / "record.json").write_text(content)
        assert records.state(cell) == "missing"
    (cell.folder / "record.json").write_text(text)
    assert records.state(replace(cell, fingerprint="new")) == "stale"
    leave(cell, 0, "failed")
    assert (
        records.state(cell) == "done"
        and records.state(replace(cell, fingerprint="new")) == "failed"
    )


def test_values_that_are_not_finite(project):
    cell = cells.plan("walks", "desk")[0]
    leave(cell, float("nan"), "diverged")
    assert json.loads((cell.folder / "record.json").read_text())["metrics"] == dict(metric=None)
    records.collect("walks", "desk")
    row = records.results("walks", "desk").iloc[0]
    assert np.isnan(row["metric"]) and row["status"] == "diverged"


events = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(["done", "failed", "diverged", "older"]),
        st.sampled_from(["desk", "gpu"]),
    ),
    min_size=1,
    max_size=8,
)


@given(events)
@example(
    [
        (0, status, "desk")
        for status in ("failed", "older", "older", "done", "older", "failed", "diverged")
    ]
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_collect_loses_nothing_and_is_repeatable(project, events):
    import shutil

    shutil.rmtree(project / "data", ignore_errors=True)
    expected = {}
    for position, (index, status, scale) in enumerate(events):
        planned = cells.plan("walks", scale)
        cell = planned[index % len(planned)]
        leave(
            cell,
            position / 7,
            "done" if status == "older" else status,
            "older" if status == "older" else None,
        )
        table = records.collect("walks", scale)
        shutil.rmtree(cell.folder.parent)
        have = expected.get((scale, cell.id))
        rank = dict(failed=0, older=1, done=2, diverged=2)
        if have is None or rank[status] >= rank[have[0]]:
            expected[scale, cell.id] = status, "" if status == "failed" else str(position / 7)
        files = {path: path.read_bytes() for path in table.parent.rglob("*.*")}
        records.collect("walks", scale)
        assert files == {path: path.read_bytes() for path in table.parent.rglob("*.*")}
    rows = {(row["scale"], row["cell"]): row for row in records.read_table(table)}
    assert {
        key: (row["status"] if row["fingerprint"] != "older" else "older", row.get("metric", ""))
        for key, row in rows.items()
    } == expected
    provenance = json.loads(table.with_suffix(".json").read_text())["cells"]
    assert {(scale, cell) for scale, known in provenance.items() for cell in known} == set(expected)
    assert records.read_table(table)[0].keys() >= {*records.IDENTITY, "lr", "steps", "fingerprint"}


def test_columns_and_order(project):
    for cell in cells.plan("walks", "desk"):
        leave(cell, 0.1)
    header, *lines = records.collect("walks", "desk").read_text().splitlines()
    assert (
        header
        == "cell,sweep,scale,dataset,method,seed,status,lr,steps,taps,tuned,metric,seconds,fingerprint"
    )
    assert [line.split(",")[4:7] for line in lines] == [
        ["a", "0", "done"],
        ["a", "1", "done"],
        ["b", "0", "done"],
        ["b", "1", "done"],
    ]
    assert list(records.histories("walks", "desk").columns) == [
        "cell",
        "scale",
        "epoch",
        "loss",
        "extra",
    ]
    assert not records.samples("walks", "desk")  # no figure would show them


def test_pictures_are_kept_for_figures(project):
    sweep = project / "nbs/sweeps/walks.yaml"
    sweep.write_text(sweep.read_text().replace("grid: {", "figures: [walks], grid: {"))
    for cell in cells.plan("walks", "desk"):
        leave(cell, 0.1)
    records.collect("walks", "desk")
    pictures = records.samples("walks", "desk")
    assert set(pictures) == {("", "a"), ("", "b")} and all(
        path.read_bytes()[:4] == b"\x89PNG" for path in pictures.values()
    )


@pytest.mark.parametrize(
    "lr", [0.2, 0.3, 0.4, 0.5]
)  # some of the new names sort before the old, some after
def test_the_picture_of_a_cell_no_longer_planned_gives_way(project, lr):
    sweep = project / "nbs/sweeps/walks.yaml"
    sweep.write_text(sweep.read_text().replace("grid: {", "figures: [walks], grid: {"))
    for cell in cells.plan("walks", "desk"):
        leave(cell, 0.1)
    records.collect("walks", "desk")
    sweep.write_text(sweep.read_text().replace("grid: {", f"fixed: {{lr: {lr}}}, grid: {{"))
    planned = cells.plan("walks", "desk")
    for cell in planned:
        leave(cell, 0.2)
    kept = json.loads(records.collect("walks", "desk").with_suffix(".json").read_text())["samples"]
    assert sorted(note["rank"][1] for note in kept.values()) == sorted(
        cell.id for cell in planned if cell.parameters["seed"] == 0
    )


def test_what_a_study_would_do(project):
    planned = cells.plan("walks", "desk")
    for cell in planned[:2]:
        leave(cell, 0.1)
    records.collect("walks", "desk")
    (planned[0].folder / "record.json").unlink()
    assert [cell.id for cell in study.todo(["walks"], "desk")[0]] == [
        planned[i].id for i in (0, 2, 3)
    ]
    assert [cell.id for cell in study.todo(["walks"], "desk", missing=True)[0]] == [
        planned[i].id for i in (2, 3)
    ]
    with pytest.raises(ValueError, match="allowed: smoke, desk, gpu, paper"):
        study.chosen("", "tiny")
    assert study.chosen("", "desk") == ["walks"] and study.chosen("a, b", "desk") == ["a", "b"]


def test_two_holders_of_a_lock(project):
    path = project / "lock"
    code = "import sys; from pathlib import Path; from vqstudy.records import locked\nwith locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=-1, stdout=-1, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match="another process holds lock"):
        with records.locked(path, 0.2):
            pass
    holder.kill()
    holder.wait()
    with records.locked(path, 5):
        pass


def test_checkpoint_belongs_to_cell_and_code(project, monkeypatch):
    monkeypatch.chdir(project)
    first, other = study.Run("walk", dict(seed=1)), study.Run("walk", dict(seed=2, out="here"))
    assert (
        first.checkpoint.name != other.checkpoint.name
        and other.out == Path("here")
        and first.out == Path(f"data/runs/single/{first.cell}")
    )
    (project / "vqstudy/toy.py").write_text("def walk(): return 1")
    assert study.Run("walk", dict(seed=1)).checkpoint != first.checkpoint
    assert first.deadline is None and first.parameters["seed"] == 1
    monkeypatch.setenv("VQSTUDY_DEADLINE", "12.5")
    assert study.Run("walk", {}).deadline == 12.5


def test_command_line_starts_light():
    code = "import sys; import vqstudy.study; print([m for m in ('torch', 'pandas', 'papermill', 'numpy', 'psutil', 'yaml') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout
        == "[]\n"
    )


def values(name, scale, *keys):
    return [tuple(cell.parameters[key] for key in keys) for cell in cells.plan(name, scale)]


def test_several_grids_follow_one_another(project):
    write = lambda text: (project / "nbs/sweeps/grids.yaml").write_text(text)
    write(
        "{notebook: walk, fixed: {lr: 0.5}, grid: {method: [a, b, c]}, seeds: [0, 1], scales: {desk: {grid: [{method: [a]}, {method: [b, c], lr: [2.0]}]}, gpu: {fixed: {steps: 9}}}}"
    )
    assert values("grids", "desk", "method", "lr", "seed") == [
        ("a", 0.5, 0),
        ("a", 0.5, 1),
        ("b", 2.0, 0),
        ("b", 2.0, 1),
        ("c", 2.0, 0),
        ("c", 2.0, 1),
    ]
    assert values("grids", "gpu", "method", "lr", "steps") == [
        (method, 0.5, 9) for method in "aabbcc"
    ]
    write(
        "{notebook: walk, grid: [{method: [a]}, {method: [b], lr: [2.0]}], scales: {desk: {grid: {steps: [4, 5]}}, gpu: {fixed: {lr: 7.0}}}}"
    )
    assert values("grids", "desk", "method", "lr", "steps") == [
        ("a", 0.1, 4),
        ("a", 0.1, 5),
        ("b", 2.0, 4),
        ("b", 2.0, 5),
    ]
    assert values("grids", "gpu", "method", "lr") == [("a", 7.0), ("b", 7.0)]


def test_predicted_time_is_that_of_the_method_then_of_the_sweep(project):
    def leave_seconds(cell, seconds, status="done"):
        records.save_record(
            cell.folder,
            records.make_record(
                cell.id,
                cell.parameters,
                dict(fingerprint="older"),
                status,
                cost=dict(seconds=seconds),
            ),
        )

    planned = cells.plan("walks", "desk")  # a 0, a 1, b 0, b 1
    assert study.predicted(planned) == {cell.id: None for cell in planned}
    assert study.forecast(planned, ["walks"], "desk") == "predicted machine time: unknown"
    leave_seconds(planned[0], 60)
    leave_seconds(planned[2], 1, "diverged")
    assert list(study.predicted(planned).values()) == [60, 60, 60, 60]
    records.collect("walks", "desk")
    leave_seconds(planned[2], 240)
    (planned[0].folder / "record.json").unlink()  # the results remember it
    assert list(study.predicted(planned).values()) == [60, 60, 240, 240]
    cores = os.cpu_count()
    assert (
        study.forecast(planned[1:], ["walks"], "desk")
        == f"predicted machine time: {9 / cores:.1f} min (9.0 min summed over {cores} cores)"
    )
    (project / "nbs/sweeps/others.yaml").write_text(
        "{notebook: walk, fixed: {steps: 8}, scales: {desk: {}}}"
    )
    said = study.forecast(
        planned + cells.plan("others", "desk"), ["walks", "others"], "desk"
    ).splitlines()
    assert (
        "10.0 min summed" in said[0]
        and said[0].endswith("and 1 cells unknown")
        and said[2] == "  others: 1 cells, unknown"
    )


def trials(
    project,
    found,
    sweep="{notebook: walk, metric: metric, grid: [{method: [a, b], steps: [1, 2]}, {method: [c], lr: [1.0, 2.0]}], seeds: [7, 8], scales: {desk: {}}}",
):
    (project / "nbs/sweeps/tries.yaml").write_text(sweep)
    for cell, (metric, status) in zip(cells.plan("tries", "desk"), found):
        leave(cell, metric, status)
    records.collect("tries", "desk")
    return tuning.choice("tries", "desk")


def test_choice_takes_the_least_mean_over_seeds_and_nothing_that_diverged(project):
    ok = [(metric, "done") for metric in (1, 9, 4, 4, 3, 3, 2, 2)]
    assert trials(project, [*ok, (1, "diverged"), (1, "done"), (7, "done"), (8, "done")]) == dict(
        a=dict(steps=2), b=dict(steps=2), c=dict(lr=2.0)
    )
    assert (
        tuning.declared(tuning.choice("tries", "desk"))
        == '- {"method": ["a", "b"], "steps": [2]}\n- {"method": ["c"], "lr": [2.0]}'
    )


def test_choice_refuses_what_is_not_whole_or_not_equal(project):
    with pytest.raises(ValueError, match="7 of 12 trials are not in the results"):
        trials(project, [(1, "done")] * 5)
    with pytest.raises(ValueError, match="no trial ended well of c"):
        trials(project, [(1, "done")] * 8 + [(1, "failed")] * 4)
    with pytest.raises(ValueError, match="different numbers of trials: {'a': 2, 'b': 1}"):
        trials(
            project,
            [(1, "done")] * 3,
            "{notebook: walk, metric: metric, grid: [{method: [a], steps: [1, 2]}, {method: [b]}], scales: {desk: {}}}",
        )
