"""The reconstruction study: fair comparison, choices without test images, new sets, divergence."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
import notebooks
import numpy
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from vqstudy import data
from vqstudy.cells import parameters, plan, sweep
from vqstudy.checkpoint import describe_module
from vqstudy.configure import in_steps, quantizer_for, settings_for
from vqstudy.quantizers import recipes
from vqstudy.records import collect, results_folder
from vqstudy.train import NonFiniteLoss, Settings, optimizers
from vqstudy.trials import RANGES, knobs_of

ROOT = Path(__file__).parents[1]
BOOK = json.loads((ROOT / "nbs/runs/reconstruct.ipynb").read_text())
TABLES = ("huh_tab03", "huh_tab03_celeba")
REPORTED = [(name, scale) for name in TABLES for scale in sweep(name)["scales"]]
MEASURED = [(name, scale) for name, scale in REPORTED if scale != "smoke"]
TUNED = [scale for scale in sweep("huh_tab03_tune")["scales"] if scale != "smoke"]


executed = partial(notebooks.executed, BOOK)


def prepared(**given):
    "The names that the notebook has just before it trains."
    return executed("parameter_count", **given)


@cache
def untrained(method, seed=0):
    "The same for a method on a few images; nobody may change it."
    return prepared(method=method, train_limit=32, seed=seed)


@cache
def planned(name, scale):
    return plan(name, scale)


def seeds_of(name, scale):
    return {cell.parameters["seed"] for cell in planned(name, scale)}


def settings_of(name, scale):
    "By method: the settings of its cells without the seed, each with the seeds that it has."
    found = {}
    for cell in planned(name, scale):
        rest = {key: v for key, v in cell.parameters.items() if key not in ("seed", "method")}
        group = found.setdefault(cell.parameters["method"], {})
        group.setdefault(json.dumps(rest), []).append(cell.parameters["seed"])
    return {
        method: [(json.loads(rest), seeds) for rest, seeds in group.items()]
        for method, group in found.items()
    }


def varied(settings):
    "The keys in which some of these settings differ."
    return {key for key in settings[0] if len({json.dumps(each[key]) for each in settings}) > 1}


# ---- a fair comparison ----


@pytest.mark.parametrize("name, scale", REPORTED)
def test_rows_differ_in_what_was_tuned_and_in_their_lengths_alone(name, scale):
    rows = settings_of(name, scale)
    seeds = [[seed for _, own in group for seed in own] for group in rows.values()]
    assert all(len(set(own)) == len(own) for own in seeds), "a method stands there twice"
    assert all(set(own) >= {0, 1, 2} for own in seeds) or all(own == seeds[0] for own in seeds)
    settings = [each for group in rows.values() for each, _ in group]
    assert all(s["clip"] == 0 and s["validation"] == 0 and s["init"] == "normal" for s in settings)
    assert varied(settings) <= {*RANGES, "lengths"}
    for group in rows.values():
        assert varied([each for each, _ in group]) <= {"lengths"}


@pytest.mark.parametrize("scale", TUNED)
def test_every_method_that_is_reported_is_tuned_on_images_set_aside(scale):
    rows = settings_of("huh_tab03_tune", scale)
    for name, other in REPORTED:
        stands_for = sweep(name)["tuned_as"]  # a method with the same knobs
        assert all(knobs_of(each) == knobs_of(its) for each, its in stands_for.items())
        methods = {stands_for.get(method, method) for method in settings_of(name, other)}
        assert other != scale or methods <= set(rows)
    for method, group in rows.items():
        assert len(group) == 1 if method == "none" else len(group) >= 16, method
        assert all(each["validation"] > 0 for each, _ in group)


def test_no_seed_is_tuned_and_reported():
    searches = ("huh_tab03_tune", "huh_tab03_best")
    tuned = set().union(*(seeds_of(name, scale) for name in searches for scale in TUNED))
    assert all(tuned.isdisjoint(seeds_of(name, scale)) for name, scale in REPORTED)


def same_images(first, second):
    "Whether two sets have the same images with the same labels in the same order."
    return torch.equal(first.x, second.x) and torch.equal(first.y, second.y)


def sums(*sets):
    "The sum of each image's bytes, sorted."
    return torch.cat([each.x for each in sets]).flatten(1).sum(1).sort().values


def test_held_out_images(monkeypatch):
    read = []
    real = data.images

    def images(name, split, **options):
        read.append(split)
        return real(name, split, **options)

    monkeypatch.setattr(data, "images", images)
    first = prepared(validation=240)
    other = prepared(validation=240, seed=5, method="router")
    assert set(read) == {"train"}, "a tuning run read test images"
    assert len(first["measured"]) == 240 and len(first["train"]) == 2000
    assert same_images(first["measured"], other["measured"])
    assert same_images(first["train"], other["train"])
    whole = real("photos", "train", size=32)
    assert torch.equal(sums(first["train"], first["measured"]), sums(whole))
    untuned = prepared()
    assert same_images(untuned["measured"], real("photos", "test", size=32)) and "test" in read
    assert same_images(untuned["train"], whole)
    with pytest.raises(ValueError, match="validation must be at most 2239, got 2240"):
        prepared(validation=2240)


def test_methods_start_alike():
    def start(method, seed=0):
        return untrained(method, seed)["model"].state_dict()

    plain, reseeded = start("vq"), start("vq", seed=4)
    network = [key for key in plain if not key.startswith("quantizer.")]
    assert len(network) > 20
    for method in ("none", "sq", "gumbel", "router", "vq + affine + opt"):
        state = start(method)
        assert all(torch.equal(plain[key], state[key]) for key in network), method
    for method in ("vq + ema", "vq + affine + opt + replace"):
        assert torch.equal(start(method)["quantizer.book.weight"], plain["quantizer.book.weight"])
    assert not all(torch.equal(plain[key], reseeded[key]) for key in network)


def test_parameter_count_has_the_codebook_whoever_moves_it():
    methods = ("none", "vq", "vq + ema", "vq + affine")
    none, vq, ema, affine = (untrained(method)["parameter_count"] for method in methods)
    # 64 codes of width 32; scale and shift
    assert (vq - none, ema - none, affine - vq) == (64 * 32, 64 * 32, 2 * 32)


# ---- parameters ----


def declared():
    "The parameters' defaults."
    return {name: p.default for name, p in parameters("reconstruct").items()}


# what the notebook had before the others came, whose defaults must mean what was done then
FORMER = {"init", "alpha", "beta", "ema_decay"}


@pytest.mark.parametrize("spec", recipes())
def test_a_parameter_that_came_later_changes_nothing_by_its_default(spec):
    given = declared() | {"method": spec}
    few = {name: given[name] for name in {"method", "num_codes"} | FORMER}
    torch.manual_seed(0)
    then = quantizer_for(few, 8)
    torch.manual_seed(0)
    now = quantizer_for(in_steps(given, 4096), 8)
    assert describe_module("q", now) == describe_module("q", then)
    assert all(torch.equal(v, now.state_dict()[k]) for k, v in then.state_dict().items())
    settings = {name: given[name] for name in ("lr", "epochs", "batch_size", "channels_last")}
    assert settings_for(given) == settings_for(settings)


# a parameter's other value, a method that has it, and where it arrives
ARRIVES = {
    "metric": ("vq", "cosine", lambda q: q.metric),
    "nu": ("vq + sync", 0.7, lambda q: q.rule.keywords["nu"]),
    "affine_lr": ("vq + affine", 2.0, lambda q: q.book.map.lr),
    "affine_groups": ("vq + affine", 4, lambda q: q.book.map.groups),
    "affine_max_norm": ("vq + affine", 0.5, lambda q: q.book.map.max_norm),
    "affine_momentum": ("vq + moving-affine", 0.3, lambda q: q.book.map.momentum),
    "affine_of": ("vq + moving-affine", "chosen", lambda q: q.book.map.of),
    "ema_decay": ("vq + ema", 0.5, lambda q: q.average.decay),
    "life_span": ("vq + replace", 7, lambda q: q.alive.life_span),
    "refit": ("vq + refit", 9, lambda q: q.refit),
    "init": ("vq", "kmeans", lambda q: q.book.init),
    "temperature": ("gumbel", 0.7, lambda q: q.limits[0]),
    "final_temperature": ("sq", 0.3, lambda q: q.limits[1]),
}


@pytest.mark.parametrize("name", ARRIVES)
def test_a_parameter_arrives_at_the_quantizer(name):
    spec, value, found = ARRIVES[name]
    made = quantizer_for(declared() | {"method": spec, "num_codes": 32, name: value}, 8)
    assert found(made) == value
    assert found(quantizer_for(declared() | {"method": spec}, 8)) != value


def test_life_spans_in_draws():
    "20 draws of each of 65,536 codes are 320 steps of 4,096 vectors; a mean age of 10 is 160."
    given = declared() | {"num_codes": 65_536, "life_draws": 20.0, "ema_draws": 10.0}
    made = in_steps(given, 4096)
    assert made["life_span"] == 320
    ages = torch.arange(20_000, dtype=torch.float64)
    weights = (1 - made["ema_decay"]) * made["ema_decay"] ** ages
    assert float((weights * ages).sum()) == pytest.approx(160, rel=1e-6)
    assert in_steps(given | {"life_draws": 1e-9}, 4096)["life_span"] == 1
    with pytest.raises(ValueError, match="life_draws must be a finite number at least 0, got -1"):
        in_steps(given | {"life_draws": -1.0}, 4096)


def test_the_notebook_counts_draws_by_its_own_vectors():
    "32 images of 8 x 8 vectors a step: 96 draws of each of 64 codes are 3 steps."
    given = {"method": "vq + ema + replace", "life_draws": 96.0, "ema_draws": 96.0}
    quantizer = prepared(train_limit=32, **given)["quantizer"]
    assert (quantizer.alive.life_span, quantizer.average.decay) == (3, 0.75)


def test_narrow_codes_and_batch_norm():
    names = prepared(train_limit=32, method="none", code_dim=4, batch_norm=True)
    model = names["model"]
    assert names["quantizer"].dim == 4 and model(torch.rand(2, 3, 32, 32)).z.shape[1] == 4
    assert type(model.encoder[-1]).__name__ == "BatchNorm2d"


@pytest.mark.parametrize("notebook", ["reconstruct", "monitor"])
def test_no_parameter_is_called_as_a_column_of_the_tables(notebook):
    "A table has the cell, its place and what it gave beside its parameters."
    own = {"cell", "sweep", "scale", "status", "fingerprint", "commit", "updates", "length", "step"}
    own |= {"epoch", "usage", "perplexity", "mse", "seconds", "steps", "codebook_travel"}
    assert not own & parameters(notebook).keys()


def test_lengths_are_rows_each_as_it_is_alone():
    given = {"method": "vq + replace", "train_limit": 96, "test_limit": 8, "draws": 100}
    given |= {"warmup_updates": 2, "perceptual_limit": 4, "watch_limit": 4}
    both = executed("rows", lengths=[5, 10], **given)
    assert [row["updates"] for row in both["rows"]] == [5, 10]
    alone = executed("rows", lengths=[10], **given)
    assert both["rows"][1] == alone["rows"][0]
    wanted = {"mse", "psnr", "loss", "rarefied_usage", "bits_per_image", "parameter_count"}
    wanted |= {"images_seen", "codebook_travel", "map_travel", "keys_travel", "updates"}
    first = both["rows"][0]
    assert wanted <= first.keys() and first["images_seen"] == 5 * 32
    # the sum of the rates at 3e-3: 1/3 + 2/3, two more, and the last fifth's one
    assert first["codebook_travel"] == pytest.approx(3e-3 * 4)
    assert first["map_travel"] is None


# ---- sets that the code has never seen ----


def png(random):
    "An image of noise, 48 by 40 pixels, as the hub's tables have it."
    file = io.BytesIO()
    Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype="uint8")).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def hub(folder, **splits):
    "A set in the hub's layout: so many images a split, no labels."
    random = numpy.random.RandomState(0)
    folder.mkdir(parents=True)
    for split, count in splits.items():
        table = pyarrow.table({"image": [png(random) for _ in range(count)]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def sets(tmp_path, monkeypatch):
    "An empty folder where image sets are looked for."
    monkeypatch.setenv("VQSTUDY_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "sets"


def environment(**given):
    "This process's, without what is the project's, and with what is given."
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")}
    return kept | given


def run(*words, cwd, env):
    "Run a module of Python."
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_a_set_never_seen_runs_by_name_and_folder_alone(tmp_path):
    hub(tmp_path / "sets/never_seen", train=16, validation=4)
    given = {"dataset": "never_seen", "epochs": "2", "out": str(tmp_path / "record")}
    options = [word for item in given.items() for word in ("-p", *item)]
    folders = {"VQSTUDY_DATA": str(tmp_path / "sets"), "VQSTUDY_CACHE": str(tmp_path / "cache")}
    files = ("nbs/runs/reconstruct.ipynb", str(tmp_path / "out.ipynb"))
    done = run("papermill", *files, *options, cwd=ROOT, env=environment(**folders))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record/record.json").read_text())
    metrics = record["metrics"]
    assert record["status"] == "done" and 0 < metrics["mse"] < 1
    assert metrics["rarefied_usage"] is None  # 4 images are 256 draws
    assert (metrics["updates"], metrics["images_seen"]) == (2, 32)
    assert metrics["bits_per_image"] == 64 * 6
    assert (tmp_path / "record/samples.png").is_file()


def test_a_choice_needs_no_test_images(sets):
    hub(sets / "train_alone", train=20)
    names = prepared(dataset="train_alone", validation=5)
    assert (len(names["train"]), len(names["measured"]), names["pixels"]) == (15, 5, 32)
    assert names["settings"].batch_size == 15
    with pytest.raises(FileNotFoundError, match="train_alone/test"):
        prepared(dataset="train_alone")


def test_larger_images_have_the_network_of_the_largest_size(sets):
    hub(sets / "large", train=4, test=2)
    large, known = (
        prepared(dataset="large", method="vq", size=size)["model"] for size in (128, 64)
    )
    decoded = large(torch.rand(2, 3, 128, 128))
    assert decoded.x.shape == (2, 3, 128, 128)
    assert decoded.quantized.codes.shape == (2, 32, 32)
    large_shapes, known_shapes = (
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (large, known)
    )
    assert large_shapes == known_shapes


# ---- divergence ----

TWO = """
notebook: reconstruct
metric: mse
fixed: {method: vq, test_limit: 8, draws: 100}
grid: {train_limit: [64], lr: [0.001, 1.0e+30], epochs: [2]}
scales: {desk: {}}
"""


def test_a_diverged_run_keeps_its_row(tmp_path, monkeypatch):
    "Of two runs, the second diverges in its second update."
    (tmp_path / "nbs/sweeps").mkdir(parents=True)
    (tmp_path / "nbs/runs").mkdir()
    (tmp_path / "nbs/sweeps/two.yaml").write_text(TWO)
    for name in ("settings.ini", "nbs/runs/reconstruct.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "vqstudy", tmp_path / "vqstudy")
    monkeypatch.setenv("VQSTUDY_ROOT", str(tmp_path))
    env, where = environment(PYTHONPATH=str(tmp_path)), ("--scale", "desk", "--sweep", "two")
    printed = [
        run("vqstudy.study", "cell", *where, "--cell", cell.id, cwd=tmp_path, env=env).stdout
        for cell in plan("two", "desk")
    ]
    with collect("two", "desk").open(newline="") as file:
        done, lost = sorted(csv.DictReader(file), key=lambda row: float(row["lr"]))
    columns = ["mse", "rarefied_usage", "bits_per_image"]
    columns += ["updates", "images_seen", "parameter_count"]
    assert done["status"] == "done", printed
    assert all(float(done[name]) > 0 for name in columns), printed
    assert lost["status"] == "diverged", printed
    assert not any(lost[name] for name in columns)
    assert lost["batch_size"] == "32" and float(lost["seconds"]) > 0


def test_a_run_that_the_last_update_spoils_has_diverged(tmp_path):
    spoiled = {"train_limit": 32, "test_limit": 8, "epochs": 1, "lr": 1e30, "out": str(tmp_path)}
    with pytest.raises(NonFiniteLoss, match="the last update made the mse nan"):
        executed("rows", method="vq", **spoiled)
