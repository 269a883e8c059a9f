"""Benchmarks: what they measure is right, what cannot be measured is told, and the notebooks run. No time is asserted but the ratio of two sleeps."""

import json, os, shutil, subprocess, sys, time
from functools import partial
from pathlib import Path
import pytest
import torch
import yaml
from vqstudy import bench, cells, peers
from vqstudy.search import nearest

ROOT = Path(__file__).parents[1]
BENCHES = [path.stem for path in sorted((ROOT / "nbs/sweeps").glob("bench_*.yaml"))]


def test_ratio_of_known_sleeps():
    calls = {"ours": partial(time.sleep, 0.02), "triple": partial(time.sleep, 0.06)}
    run = bench.alternate(calls, rounds=5)
    found = bench.compare(run.times)
    assert (
        found["triple"].ratio == pytest.approx(3, rel=0.2)
        and found["triple"].low <= found["triple"].ratio <= found["triple"].high
    )
    assert found["ours"][1:] == (1, 1, 1) and len(run.times) == 5


def test_order_is_shuffled_and_repeatable():
    def orders(seed):
        seen = []
        bench.alternate({name: partial(seen.append, name) for name in "abcde"}, rounds=6, seed=seed)
        return [tuple(seen[i : i + 5]) for i in range(5, 35, 5)]  # the first five warm up

    assert (
        orders(1) == orders(1) != orders(2)
        and len(set(orders(1))) > 3
        and all(sorted(order) == list("abcde") for order in orders(1))
    )


def test_ratios_are_of_the_same_round():
    times = [{"ours": speed, "b": 2 * speed} for speed in (1, 10, 100)] + [{"ours": 1.0, "b": 50.0}]
    assert bench.compare(times)["b"].ratio == 2  # the median of b over that of ours would be 6.4
    assert bench.compare(times, {"ours": "b", "b": "b"})["ours"].ratio == 0.5
    assert (
        bench.compare([{"b": 1.0}])["b"].ratio != bench.compare([{"b": 1.0}])["b"].ratio
    )  # NaN: nothing to compare to


def test_what_cannot_run_is_told():
    def fail():
        raise ValueError("no")

    run = bench.alternate(
        {"ours": partial(time.sleep, 0.05), "bad": fail, "late": partial(time.sleep, 0.05)},
        rounds=2,
        slow=0.03,
    )  # ours stays: all are compared to it
    assert (
        run.skipped["bad"] == "failed: ValueError: no"
        and run.skipped["late"].startswith("too slow")
        and all(set(r) == {"ours"} for r in run.times)
    )


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
    "Whatever `ready` and `alternate` say begins with one of REASONS, or a record could not keep it."
    calls, skipped = bench.ready("search", peers.inputs("search", (20, 10, 4)), pairs=10**10)
    assert {"vqpytorch", "compiled"} <= set(skipped)
    bench.metrics("search", bench.alternate(calls, 1, slow=0.0), skipped)


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the kernel's mark of the most memory held"
)
def test_peak_sees_64_mb():
    code = "import torch; from vqstudy.bench import peak; print(peak(lambda: torch.ones(2**24)), peak(lambda: None))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    full, empty = map(int, done.stdout.split())
    assert full == pytest.approx(2**26, rel=0.3) and empty < 2**24


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the kernel's mark of the most memory held"
)
def test_peak_memory_of_a_peer_in_its_own_process():
    n = k = 4096
    spent, why = bench.peak_memory("search", "vqpytorch search", (n, k, 8))
    assert why == "" and 2 * 4 * n * k < spent < 5 * 4 * n * k  # several n x k matrices of float32
    spent, why = bench.peak_memory("search", "flash-kmeans", (8, 8, 8))
    assert spent != spent and "cuda" in why


@pytest.mark.parametrize("name", [name for name in peers.SEARCH if name not in peers.LIMITS])
def test_search_peers_agree_but_for_ties(name):
    torch.manual_seed(0)
    z, codebook = torch.randn(300, 16), torch.randn(70, 16)
    calls, skipped = bench.ready("search", (z, codebook), only=[name])
    if skipped:
        pytest.skip(skipped[name])
    codes, exact = torch.as_tensor(calls[name]()), nearest(z, codebook, exact=True)
    distance = lambda codes: (z - codebook[codes]).double().pow(2).sum(1)
    assert (
        codes.shape == exact.shape
        and ((codes == exact) | ((distance(codes) - distance(exact)).abs() < 1e-4)).all()
    )


def test_router_peers_give_the_same_gradients():
    given = peers.inputs("router", (40, 30, 6))
    calls, _ = bench.ready("router", given, only=["ours", "naive"])
    (dz, dkeys), ours, naive = (
        peers.router_gradients(*given, rows=7),
        calls["ours"](),
        calls["naive"](),
    )
    for found in (ours, naive):
        assert torch.allclose(found[0].double(), dz, atol=1e-5) and torch.allclose(
            found[1].double(), dkeys, atol=1e-5
        )
    assert torch.allclose(ours[2], naive[2], atol=1e-4)  # to the chosen code vectors


@pytest.mark.parametrize("kind", ["step", "recipes", "alternation"])
def test_calls_train(kind):
    "Each call of a kind runs twice, whatever it is made of."
    names = {
        "step": (),
        "recipes": ("none", "vq + ema + replace", "router"),
        "alternation": ("fused", "2 inner, equal updates"),
    }[kind]
    calls, skipped = bench.ready(kind, peers.inputs(kind, (16, 12, 4)), only=names)
    run = bench.alternate(calls, 1)
    assert not skipped and not run.skipped and set(run.times[0]) == set(names or peers.STEP)


def tiny(table):
    "A sweep at desk scale that ends in seconds."
    small = {"search": [64, 32, 8], "step": [64, 32, 8], "router": [64, 32, 8]}
    kind = (
        table["fixed"]["method"]
        if "method" in table.get("fixed", {})
        else table["notebook"].removeprefix("bench_")
    )
    few = {"search": ["ours", "ours exact", "cdist", "faiss", "product"], "step": [], "router": []}
    fixed = table.get("fixed", {}) | {"rounds": 2}
    if kind in small:
        return table | dict(
            fixed=fixed | {"peers": few[kind]},
            grid={"shape": [small[kind]]},
            scales={"desk": {}, "gpu": {}},
        )
    return table | dict(
        fixed=fixed | {"shape": [8, 16, 4], "peers": ["none", "vq"]},
        grid={"method": ["recipes", "import"]},
        scales={"desk": {}, "gpu": {}},
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project whose benchmarks are tiny."
    folder = tmp_path_factory.mktemp("bench")
    shutil.copy(ROOT / "settings.ini", folder)
    for name in ("vqstudy", "nbs/runs", "nbs/figs"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    (folder / "nbs/sweeps").mkdir()
    for name in BENCHES:
        (folder / f"nbs/sweeps/{name}.yaml").write_text(
            yaml.safe_dump(tiny(yaml.safe_load((ROOT / f"nbs/sweeps/{name}.yaml").read_text())))
        )
    keep = {key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")}
    return folder, keep | {"VQSTUDY_ROOT": str(folder), "PYTHONPATH": str(folder)}


def study(project, *words):
    folder, env = project
    done = subprocess.run(
        [sys.executable, "-m", "vqstudy.study", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_runs_and_figures_at_a_tiny_scale(project, monkeypatch):
    "Every run notebook through papermill, then the tables, then each figure twice, with the same bytes."
    monkeypatch.setenv("VQSTUDY_ROOT", str(project[0]))
    for name in BENCHES:
        for cell in cells.plan(name, "desk"):
            study(project, "cell", "--scale", "desk", "--sweep", name, "--cell", cell.id)
        study(project, "collect", "--scale", "desk", "--sweep", name)
        rows = bench.measured(name, "desk").set_index(["method", "peer"])
        assert (
            (rows.seconds.dropna() > 0).all()
            and "threads" in bench.machine(name, "desk")
            and bench.measured(name, "gpu").empty
        )
        if name == "bench_search":
            assert (
                rows.loc[("search", "ours"), "equal"] == 1
                and rows.loc[("search", "ours"), "ratio"] == 1
            )
    for stem in sorted({stem for name in BENCHES for stem in cells.sweep(name)["figures"]}):
        drawn = []
        for _ in range(2):
            study(project, "draw", "--scale", "desk", stem)
            drawn.append(
                {
                    path.name: path.read_bytes()
                    for path in (project[0] / "figures").glob(f"{stem}.*")
                }
            )
        assert (
            drawn[0] == drawn[1]
            and set(drawn[0]) == {f"{stem}.md", f"{stem}.svg"}
            and b"not measured" in drawn[0][f"{stem}.md"]
        )


def test_no_benchmark_is_part_of_the_smoke_study():
    assert BENCHES and not set(BENCHES) & set(cells.sweeps("smoke"))
