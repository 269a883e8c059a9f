"""Benchmarks: they measure what they say, tell what they cannot measure, and their notebooks run.

No time is asserted but the ratio of two sleeps. Peak memory of a peer is tested in the notebook.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
import pytest
import torch
import yaml
from vqstudy import bench, cells, files, peers
from vqstudy.search import nearest

ROOT = Path(__file__).parents[1]
BENCHES = [path.stem for path in sorted((ROOT / "nbs/sweeps").glob("bench_*.yaml"))]


def test_ratio_of_known_sleeps():
    calls = {"ours": partial(time.sleep, 0.02), "triple": partial(time.sleep, 0.06)}
    run = bench.alternate(calls, rounds=5)
    ours, triple = (bench.compare(run.times)[name] for name in calls)
    assert triple.ratio == pytest.approx(3, rel=0.2)
    assert triple.low <= triple.ratio <= triple.high
    assert ours[1:] == (1, 1, 1) and len(run.times) == 5


def test_order_is_shuffled_and_repeatable():
    def orders(seed):
        called = []
        calls = {name: partial(called.append, name) for name in "abcde"}
        bench.alternate(calls, rounds=6, seed=seed, pause=0)
        return [tuple(called[i : i + 5]) for i in range(5, 35, 5)]  # the first five warm up

    first = orders(1)
    assert first == orders(1) != orders(2)
    assert len(set(first)) > 3 and all(sorted(order) == list("abcde") for order in first)


def test_ratios_are_of_the_same_round():
    times = [{"ours": speed, "b": 2 * speed} for speed in (1, 10, 100)] + [{"ours": 1.0, "b": 50.0}]
    assert bench.compare(times)["b"].ratio == 2  # the median of b over that of ours would be 6.4
    assert bench.compare(times, {"ours": "b", "b": "b"})["ours"].ratio == 0.5
    alone = bench.compare([{"b": 1.0}])["b"].ratio
    assert alone != alone  # NaN: nothing to compare to


def test_what_cannot_run_is_told():
    def fail():
        raise ValueError("no")

    nap = partial(time.sleep, 0.05)
    run = bench.alternate({"ours": nap, "bad": fail, "late": nap}, rounds=2, slow=0.03)
    assert run.skipped["bad"] == "failed: ValueError: no"
    assert run.skipped["late"].startswith("too slow")
    assert all(set(times) == {"ours"} for times in run.times)  # all are compared to ours: it stays


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    given = peers.inputs("search", (20, 10, 4))
    calls, skipped = bench.ready("search", given, only=["ours", "faiss"])
    assert list(calls) == ["ours"] and skipped["faiss"].startswith("not installed")
    flat = bench.metrics("search", bench.alternate(calls, 1), skipped)
    assert bench.REASONS[flat["skipped faiss"]] == "not installed" and "seconds faiss" not in flat


def test_a_peer_that_is_too_large_is_not_tried():
    def fail(*given):
        raise AssertionError("tried")

    calls, skipped = bench.ready("step", (fail,), pairs=2**30, only=["vqpytorch"])
    assert not calls and skipped["vqpytorch"].startswith("too much memory")


def test_every_reason_has_a_place():
    "What `ready` and `alternate` say begins with one of REASONS, or a record could not keep it."
    given = peers.inputs("search", (20, 10, 4))
    calls, skipped = bench.ready("search", given, pairs=10**10)
    assert {"vqpytorch", "compiled"} <= set(skipped)
    bench.metrics("search", bench.alternate(calls, 1, slow=0.0), skipped)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the Linux kernel's mark of peak memory")
def test_peak_sees_64_mb():
    code = (
        "import torch; from vqstudy.bench import peak; "
        "print(peak(lambda: torch.ones(2**24)), peak(lambda: None))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    full, empty = map(int, done.stdout.split())
    assert full == pytest.approx(2**26, rel=0.3) and empty < 2**24


@pytest.mark.parametrize("name", [name for name in peers.SEARCH if name not in peers.LIMITS])
def test_search_peers_agree_but_for_ties(name, monkeypatch):
    if name == "compiled":  # graph capture is tested, and not the minutes of a C++ compiler
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 16), torch.randn(70, 16)
    calls, skipped = bench.ready("search", (z, codebook), only=[name])
    if skipped:
        pytest.skip(skipped[name])

    def distance(codes):
        return (z - codebook[codes]).double().pow(2).sum(1)

    codes = torch.as_tensor(calls[name]())
    exact = nearest(z, codebook, exact=True)
    tied = (distance(codes) - distance(exact)).abs() < 1e-4
    assert codes.shape == exact.shape and ((codes == exact) | tied).all()


def test_router_peers_give_the_same_gradients():
    given = peers.inputs("router", (40, 30, 6))
    calls, _ = bench.ready("router", given, only=["ours", "naive"])
    dz, dkeys = peers.router_gradients(*given, rows=7)
    ours, naive = calls["ours"](), calls["naive"]()
    for found in (ours, naive):
        assert torch.allclose(found[0].double(), dz, atol=1e-5)
        assert torch.allclose(found[1].double(), dkeys, atol=1e-5)
    assert torch.allclose(ours[2], naive[2], atol=1e-4)  # to the chosen code vectors


@pytest.mark.parametrize(
    "kind, names",
    [
        ("step", ()),
        ("recipes", ("none", "vq + ema + replace", "router")),
        ("alternation", ("fused", "2 inner, equal updates")),
    ],
)
def test_calls_train(kind, names):
    "Each call of a kind runs twice, whatever it is made of."
    calls, skipped = bench.ready(kind, peers.inputs(kind, (16, 12, 4)), only=names)
    run = bench.alternate(calls, 1)
    assert not skipped and not run.skipped and set(run.times[0]) == set(names or peers.STEP)


# What makes a benchmark tiny. Peak memory, which takes a process per peer, is measured twice.
TINY = {
    "bench_search": {"shape": [64, 32, 8], "peers": ["ours", "ours exact", "cdist", "product"]},
    "bench_step": {"shape": [64, 32, 8], "memory": False},
    "bench_router": {"shape": [64, 32, 8]},
    "bench_overhead": {"shape": [8, 16, 4], "peers": ["none", "vq"], "rounds": 1},
}
METHODS = {"bench_overhead": ["recipes", "import"]}


def tiny(name):
    "The text of a sweep at desk scale that ends in seconds."
    table = yaml.safe_load((ROOT / f"nbs/sweeps/{name}.yaml").read_text())
    small = dict(TINY[name])
    grid = {"method": METHODS[name]} if name in METHODS else {"shape": [small.pop("shape")]}
    fixed = table.get("fixed", {}) | {"rounds": 2} | small
    return yaml.safe_dump(table | {"fixed": fixed, "grid": grid, "scales": {"desk": {}, "gpu": {}}})


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project whose benchmarks are tiny, and the environment of its commands."
    folder = tmp_path_factory.mktemp("bench")
    shutil.copy(ROOT / "settings.ini", folder)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("vqstudy", "nbs/runs", "nbs/figs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "nbs/sweeps").mkdir()
    for name in BENCHES:
        (folder / f"nbs/sweeps/{name}.yaml").write_text(tiny(name))
    keep = {key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")}
    return folder, keep | {"VQSTUDY_ROOT": str(folder), "PYTHONPATH": str(folder)}


def study(project, commands):
    "Commands of `vqstudy.study`, all in one process: importing takes longer than most of them."
    folder, env = project
    code = (
        "import sys; from vqstudy import study\n"
        "for words in sys.argv[1:]:\n"
        "    if study.main(words.split()): sys.exit(words)"
    )
    words = [sys.executable, "-c", code, *commands]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_runs_and_figures_at_a_tiny_scale(project, monkeypatch):
    "Every run notebook through papermill, then the tables, then each figure twice, same bytes."
    folder, _ = project
    monkeypatch.setenv("VQSTUDY_ROOT", str(folder))
    run = [
        f"cell --scale desk --sweep {name} --cell {cell.id}"
        for name in BENCHES
        for cell in cells.plan(name, "desk")
    ]
    collect = [f"collect --scale desk --sweep {name}" for name in BENCHES]
    stems = sorted({stem for name in BENCHES for stem in cells.sweep(name)["figures"]})
    draw = [f"draw --scale desk {stem}" for stem in stems]
    study(project, run + collect + draw)
    for name in BENCHES:
        rows = bench.measured(name, "desk")
        assert len(rows) and (rows.seconds.dropna() > 0).all()
        assert "threads" in bench.machine(name, "desk") and bench.measured(name, "gpu").empty
    rows = bench.measured("bench_search", "desk").set_index(["method", "peer"])
    assert rows.loc[("search", "ours"), "equal"] == rows.loc[("search", "ours"), "ratio"] == 1
    first = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert set(first) == {f"{stem}.{kind}" for stem in stems for kind in ("md", "svg")}
    assert all(b"not measured" in first[f"{stem}.md"] for stem in stems)
    study(project, draw)
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == first


def add_former(folder, name):
    "Give a sweep's table a row of a cell that it no longer plans, with where that is from."
    path, notes = (folder / f"data/results/{name}.{kind}" for kind in ("csv", "json"))
    rows, known = files.read_table(path), json.loads(notes.read_text())
    files.write_table(path, [*rows, rows[0] | {"cell": f"{name}-former"}], rows[0])
    of_cells = known["cells"]["desk"]
    of_cells[f"{name}-former"] = of_cells[rows[0]["cell"]]
    notes.write_text(json.dumps(known))


def test_rows_that_are_no_longer_planned_are_counted_in_every_figure(tmp_path):
    "On the committed tables, each with such a row more."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for name in ("nbs/sweeps", "nbs/runs", "nbs/figs", "data/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in BENCHES:
        add_former(tmp_path, name)
    stems = ["bench_overhead", "bench_router", "bench_search"]
    env = dict(os.environ, VQSTUDY_ROOT=str(tmp_path), PYTHONPATH=str(ROOT))
    study((tmp_path, env), [f"draw --scale desk {stem}" for stem in stems])
    for stem in stems:
        places = ["CPU"]
        if stem == "bench_search":
            places = ["CPU, bench_search", "CPU, bench_step"]
        for kind in ("md", "svg"):
            text = (tmp_path / f"figures/{stem}.{kind}").read_text()
            for place in places:
                assert re.search(f"{place}: \\d+ rows? of a former protocol left out", text)
        # what is shown stays as it is
        lines = [(folder / f"figures/{stem}.md").read_text() for folder in (ROOT, tmp_path)]
        committed, shown = ([x for x in text.splitlines() if x[:1] == "|"] for text in lines)
        assert shown == committed


def test_no_benchmark_is_part_of_the_smoke_study():
    assert BENCHES and not set(BENCHES) & set(cells.sweeps("smoke"))
