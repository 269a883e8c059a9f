"""Classifiers with a quantizer inside: gradients, whole runs, sets never seen, fair comparison."""

import copy
import json
import math
import os
import subprocess
import sys
import types
from functools import cache, partial
from pathlib import Path
import notebooks
import numpy
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from resuming import assert_same_training, in_parts
from vqstudy.architectures import NETWORKS, QuantizedClassifier, network, sizes_of
from vqstudy.cells import parameters, plan, sweep, sweeps
from vqstudy.classes import class_scores, first_classes
from vqstudy.classifiers import classification_loss
from vqstudy.photos import ImageSet
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.stats import load_claims
from vqstudy.train import fit, reproducible
from vqstudy.trials import RANGES, drawn, knobs_of, search_grids

ROOT = Path(__file__).parents[1]
BOOK = json.loads((ROOT / "nbs/runs/classify.ipynb").read_text())
PUBLISHED = ROOT / "data/published"
PRINTED = ("tab01", "tab02", "tab10")
PAPER = {name: pd.read_csv(PUBLISHED / f"huh2023_{name}.csv") for name in PRINTED}
SMALL = {
    "alexnet": dict(width=4, hidden=16, stride=2, pools=2, dropout=0.0),
    "resnet18": dict(width=4, blocks=1),
    "vit": dict(width=12, patch=16, depth=2),
}
K = 16


def classifier(name="resnet18", spec="vq", seed=0, **options):
    cut = network(name, 5, 64, **SMALL[name])
    torch.manual_seed(seed)
    cut = network(name, 5, 64, **SMALL[name])
    return QuantizedClassifier(cut, recipe(spec, cut.channels, K, channel_dim=1, **options))


def pictures(n=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return types.SimpleNamespace(x=x, y=torch.arange(n) % 5)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the gradient reaches both sides of the quantizer ----


def by_hand(model, x, y, nu):
    "Cross-entropy and commitment loss in float64, with the straight-through estimator written out."
    z = model.encoder(x)
    rows = z.movedim(1, -1)
    book = model.quantizer.codebook
    codes = torch.cdist(rows.detach().reshape(-1, book.shape[1]), book.detach()).argmin(1)
    q = book[codes].view_as(rows)
    passed = rows + (q - rows).detach() + nu * (q - q.detach())
    task = F.cross_entropy(model.decoder(passed.movedim(-1, 1)), y)
    alpha, beta = model.quantizer.alpha, model.quantizer.beta
    commit = (1 - beta) * (rows - q.detach()).square().mean()
    return task + alpha * (commit + beta * (rows.detach() - q).square().mean())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec, nu", [("vq", 0.0), ("vq + sync", 0.3), ("vq + affine", 0.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_autograd_in_float64(name, spec, nu):
    options = {"alpha": 5.0, "beta": 0.9, **({"nu": nu} if nu else {})}
    model = classifier(name, spec, init="kmeans", **options).double()
    torch.nn.init.normal_(model.decoder[-1].weight, std=0.1)  # ViT's begins at zero
    data = pictures(6)
    x = data.x.double() / 255
    model(x)  # k-means begins
    loss, _ = classification_loss(model, x, data.y)
    # classification_loss takes the logits in float32
    found = gradients(model, loss)
    wanted = gradients(model, by_hand(model, x, data.y, nu))
    assert found.keys() == wanted.keys()
    sides = {part: 0.0 for part in ("encoder", "quantizer", "decoder")}
    for key, grad in wanted.items():
        scale = float(grad.abs().max())
        assert float((found[key] - grad).abs().max()) <= 1e-5 * scale + 1e-9, key
        sides[key.partition(".")[0]] += scale
    assert min(sides.values()) > 0


def test_a_rule_that_asks_the_decoder_gets_it():
    model = classifier(spec="vq + exact").train()
    settings = Settings(epochs=1, batch_size=8)
    fitted = fit(model, classification_loss, pictures(), settings, progress=False)
    assert math.isfinite(fitted.metrics["loss"])


# ---- measuring, states ----

MOVING = ["none", "vq + replace", "vq + refit", "vq + ema + replace", "vq + moving-affine"]
MOVING.append("stochastic")


@pytest.mark.parametrize("spec", MOVING)
@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_changes_nothing(name, spec):
    model, data = classifier(name, spec), pictures()
    classification_loss(model, data.x.float() / 255, data.y)
    model.quantizer.settle()
    before, random = state(model), torch.get_rng_state()
    first = class_scores(model, data.x, data.y, batch_size=7)
    assert same(state(model), before) and model.training
    assert spec == "stochastic" or torch.equal(torch.get_rng_state(), random)
    assert class_scores(model, data.x, data.y, batch_size=24) == pytest.approx(first, rel=1e-5)
    assert all(not p.grad_fn for p in model.parameters())


@pytest.mark.parametrize("spec", MOVING)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_loads_strictly_into_a_fresh_model(name, spec):
    begins = {} if spec == "none" else {"init": "kmeans"}
    model, data = classifier(name, spec, **begins), pictures()
    classification_loss(model, data.x.float() / 255, data.y)
    kept = copy.deepcopy(state(model))
    fresh = classifier(name, spec, seed=9, **begins)
    fresh.load_state_dict(kept)
    x = data.x.float() / 255
    assert torch.equal(fresh.eval()(x).logits, model.eval()(x).logits)


def test_scores_are_of_all_images_together():
    "Perplexity is no mean over batches, and accuracy none over batches of unequal size."
    model, data = classifier(), pictures(25)
    scores = class_scores(model, data.x, data.y, batch_size=10)
    model.eval()
    made = model(data.x.float() / 255)
    counts = torch.bincount(made.quantized.codes.flatten(), minlength=K)
    shares = counts / counts.sum()
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p)
    assert scores["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert scores["usage"] == float((shares > 0).float().mean())
    right = (made.logits.argmax(1) == data.y).float().mean()
    assert scores["accuracy"] == pytest.approx(float(right))


REFUSED = [
    (lambda: network("resnet18", 5, 0), ValueError, "size must be at least 1"),
    (lambda: network("resnet18", 5, 64, patch=8), TypeError, "patch"),
    (lambda: network("alexnet", 5, 32), ValueError, "size must leave a vector"),
    (lambda: network("alexnet", 5, 64, dropout=1.0), ValueError, "dropout must be"),
    (lambda: network("vit", 5, 64, width=100), ValueError, "width must be a multiple of heads=3"),
    (lambda: network("vit", 5, 64, depth=3), ValueError, "depth must be even"),
    (lambda: network("vit", 5.0, 64), TypeError, "num_classes"),
    (lambda: classifier("vit")(torch.rand(2, 3, 32, 32)), ValueError, "x must have 64 x 64 pixels"),
    (lambda: QuantizedClassifier(network("vit", 5, 64), recipe("vq", 192, 4)), ValueError, "dim=1"),
    (lambda: sizes_of("vgg", {}), ValueError, "name must be"),
    (lambda: class_scores(classifier(), pictures().x, torch.zeros(3)), ValueError, "got 24 and 3"),
]


@pytest.mark.parametrize("call, error, words", REFUSED)
def test_what_is_wrong_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [64, 96, 128])
def test_the_vectors_of_an_image_are_those_declared(name, size):
    cut = network(name, 5, size, **SMALL[name])
    z = torch.nn.Sequential(*cut.encoder)(torch.rand(1, 3, size, size))
    assert z.shape[1] == cut.channels and z.shape[2:].numel() == cut.vectors


# ---- a resumed run ----


RESUMED = [
    ("alexnet", "vq + alt", {}),
    ("resnet18", "vq + replace", {"life_span": 2}),
    ("vit", "vq + refit", {"refit": 3}),
]


def trained(name, spec, own, path=None, deadline=None):
    reproducible(0)
    model = classifier(name, spec, init="kmeans", **own)
    settings = Settings(lengths=(4, 9), warmup_updates=2, batch_size=8, flip=True, crop=0.3)
    options = dict(checkpoint=path, save_every=0.0, deadline=deadline, progress=False)
    return fit(model, classification_loss, pictures(), settings, **options)


@pytest.mark.parametrize("name, spec, own", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name, spec, own, tmp_path):
    whole = trained(name, spec, own)
    # 10 steps, on the trunk and on two branches
    parts = in_parts(partial(trained, name, spec, own), tmp_path / "run.pt", least=8)
    assert_same_training(whole, parts)
    assert same(state(parts.model), state(whole.model))


# ---- the run notebook ----


executed = partial(notebooks.executed, BOOK)


FEW = {"train_limit": 48, "test_limit": 14, "width": 4, "blocks": 1}
FEW |= {"lengths": [5], "warmup_updates": 2}


def test_no_parameter_is_called_as_a_column_of_the_tables():
    own = {"cell", "sweep", "scale", "status", "fingerprint", "commit", "updates", "length", "step"}
    own |= {"epoch", "usage", "perplexity", "accuracy", "seconds", "steps", "chance"}
    own |= {"draws_per_code", "refit_jump", "codebook_travel"}
    assert not own & parameters("classify").keys()


def test_all_methods_start_from_one_network_whatever_their_quantizer_draws():
    names = [executed("some", method=m, **FEW) for m in ("none", "vq", "vq + replace")]
    encoders = [state(each["classifier"].encoder) for each in names]
    assert same(encoders[0], encoders[1]) and same(encoders[0], encoders[2])
    assert not names[1]["quantizer"].book.waits()  # k-means has begun


def test_lengths_are_rows_each_as_it_is_alone():
    given = FEW | {"method": "vq + refit", "refit": 3, "watch_limit": 7}
    both = executed("rows", **given | {"lengths": [5, 10]})["rows"]
    alone = executed("rows", **given | {"lengths": [10]})["rows"]
    assert [row["updates"] for row in both] == [5, 10] and both[1] == alone[0]
    assert both[0]["images_seen"] == 5 * 32 and both[0]["chance"] == 1 / 7
    assert both[0]["draws_per_code"] == 32 * 64 / 64
    assert 0 < both[0]["refit_jump"] < 100


def folders(root, classes, **counts):
    "Class folders of pictures of one colour a class, of several sizes."
    random = numpy.random.RandomState(0)
    for split, count in counts.items():
        for place, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 80, (50 + i, 70, 3), dtype="uint8")
                pixels[..., place] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def test_class_folders_never_seen_train_by_name_and_folder_alone(tmp_path):
    folders(tmp_path / "sets/colours", ["blue", "green", "red"], train=16, valid=6)
    given = {"dataset": "colours", "epochs": "12", "crop": "0.5", "batch_size": "16"}
    given |= {"out": str(tmp_path / "record")}
    options = [word for item in given.items() for word in ("-p", *item)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")}
    env = kept | {"VQSTUDY_DATA": str(tmp_path / "sets"), "VQSTUDY_CACHE": str(tmp_path / "cache")}
    files = ("nbs/runs/classify.ipynb", str(tmp_path / "out.ipynb"))
    command = [sys.executable, "-m", "papermill", *files, *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "record/record.json").read_text())["metrics"]
    assert metrics["chance"] == pytest.approx(1 / 3) and metrics["updates"] == 36
    assert metrics["accuracy"] > 0.6


def test_a_moment_without_an_idle_code_has_no_bifurcation_and_is_kept(tmp_path):
    given = {"method": "vq + affine", "num_codes": 8, "width": 8, "train_limit": 256}
    given |= {"lengths": [12], "looks": [0], "out": str(tmp_path / "record")}
    files = ("nbs/runs/divergence.ipynb", str(tmp_path / "out.ipynb"))
    command = [sys.executable, "-m", "papermill", *files, "-y", json.dumps(given)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "record/record.json").read_text())["lengths"]
    assert row["final_usage"] == 1 and row["final_bifurcation"] is None


def test_a_set_without_labels_is_refused():
    bare = ImageSet(pictures().x, None, (), "faces", "train", "")
    with pytest.raises(ValueError, match="data must have labels, and faces/train has none"):
        first_classes(bare)


# ---- the sweeps: a fair comparison ----

NETWORK = {name: f"huh_tab02_{name}" for name in NETWORKS}
TABLES = [*NETWORK.values(), "huh_tab01", "huh_tab10", "huh_tab10_updates", "huh_tab02_nu"]
SEARCHES = [name for name in sweeps() if name.endswith(("_rate", "_tune"))]
SEARCHES = [name for name in SEARCHES if sweep(name)["notebook"] == "classify"]
OWN = {
    "huh_tab01": {"init", "refit"},
    "huh_tab10": {"inner", "outer"},
    "huh_tab10_updates": {"inner", "batch_size"},
}


@cache
def planned(name, scale):
    return [cell.parameters for cell in plan(name, scale)]


def varied(rows):
    return {key for key in rows[0] if len({json.dumps(row[key]) for row in rows}) > 1}


@pytest.mark.parametrize("name", TABLES)
def test_rows_differ_in_what_the_table_compares_and_in_what_was_tuned_alone(name):
    for scale in sweep(name)["scales"]:
        rows = planned(name, scale)
        assert varied(rows) <= {"method", "seed", *RANGES, *OWN.get(name, ())}
        assert all(row["validation"] == 0 and row["clip"] == 0 for row in rows)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_reads_no_image_and_has_no_seed_that_is_reported(name):
    rows = planned(name, "desk")
    reported = {row["seed"] for table in TABLES for row in planned(table, "desk")}
    assert all(row["validation"] > 0 for row in rows)
    assert not {row["seed"] for row in rows} & reported


@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_has_the_same_trials_in_its_own_knobs(name):
    methods = dict.fromkeys(row["method"] for row in planned(NETWORK[name], "desk"))
    wanted = search_grids([method for method in methods if method != "none"], 8)
    grid = sweep(f"{NETWORK[name]}_tune")["scales"]["desk"]["grid"]
    assert grid == [{"method": ["none"]}, *wanted]


def test_table_10_has_the_trials_of_its_search():
    grid = sweep("huh_tab10_tune")["scales"]["desk"]["grid"]
    for spec in ("vq", "vq + alt", "vq + affine + opt + replace"):
        knobs = [knob for knob in knobs_of(spec) if knob != "beta"]
        mine = [each for each in grid if spec in each["method"]]
        assert [{knob: each[knob][0] for knob in knobs} for each in mine] == drawn(knobs, 8)


def test_methods_that_take_anothers_knobs_have_the_same():
    for name in TABLES:
        for method, other in sweep(name)["tuned_as"].items():
            ours, theirs = set(knobs_of(method)) - {"nu"}, set(knobs_of(other))
            assert ours == theirs, (name, method)


@pytest.mark.parametrize("name", TABLES)
def test_a_code_is_drawn_often_enough_in_a_step_at_desk(name):
    "Inner steps on a part of the batch apart, as in the paper."
    for row in planned(name, "desk"):
        cut = network(row["model"], 40, row["size"], **sizes_of(row["model"], row))
        assert row["batch_size"] * cut.vectors / row["num_codes"] >= 8


def test_the_papers_sizes_are_the_networks_own():
    counts = {"alexnet": 61_100_840, "resnet18": 11_689_512, "vit": 5_717_416}
    for name, stem in NETWORK.items():
        row = planned(stem, "paper")[0]
        assert (row["size"], row["num_codes"], row["epochs"]) == (224, 1024, 90)
        cut = network(name, 1000, 224, **sizes_of(name, row))
        parts = [*cut.encoder, *cut.decoder]
        assert sum(p.numel() for part in parts for p in part.parameters()) == counts[name]
        assert (row["milestones"] == [30, 60]) == (name != "vit")


# ---- the paper's numbers ----


def claims_of(*names):
    every = load_claims(ROOT / "data/claims.toml")
    return [claim for claim in every if claim.sweep in names and claim.published is not None]


def printed(claim, side):
    "The paper's number of a side of a claim."
    table = PAPER[claim.sweep[4:9]]
    named = {key: x for key, x in (claim.where | side).items() if key in table}
    rows = table
    for key, value in named.items():
        rows = rows[rows[key] == value]
    assert len(rows) == 1, (claim.id, named)
    return rows[claim.metric].iloc[0]


@pytest.mark.parametrize("claim", claims_of(*TABLES), ids=lambda claim: claim.id)
def test_a_published_effect_is_one_of_the_papers_numbers(claim):
    a, b = printed(claim, claim.a), printed(claim, claim.b)
    if claim.unit == "ratio":
        assert a / b == pytest.approx(claim.published, rel=2e-3)
    else:
        assert a - b == pytest.approx(claim.published, abs=2e-3)
