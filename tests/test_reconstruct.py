"""The reconstruction study: a fair comparison, a choice that is made without test pictures, a set that the code has never seen, and a run that diverges."""

import csv, io, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from vqstudy import data
from vqstudy.cells import plan, sweep
from vqstudy.records import results_folder
from vqstudy.tuning import choice
from vqstudy.train import Settings, optimizers

ROOT = Path(__file__).parents[1]
BOOK = json.loads((ROOT / "nbs/runs/reconstruct.ipynb").read_text())
REPORTED = [
    (name, scale) for name in ("huh_tab03", "huh_tab03_celeba") for scale in sweep(name)["scales"]
]
TUNED = [scale for scale in sweep("huh_tab03_tune")["scales"] if scale != "smoke"]


def prepared(**given):
    "The names that the notebook has just before it trains."
    names = {}
    for cell in BOOK["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= given
        if "settings" in names:
            return names


def settings_of(name, scale):
    "By method: the settings of its cells without the seed, and the seeds of each."
    found = {}
    for cell in plan(name, scale):
        rest = {
            key: value for key, value in cell.parameters.items() if key not in ("seed", "method")
        }
        found.setdefault(cell.parameters["method"], {}).setdefault(json.dumps(rest), []).append(
            cell.parameters["seed"]
        )
    return {
        method: [(json.loads(rest), seeds) for rest, seeds in group.items()]
        for method, group in found.items()
    }


@pytest.mark.parametrize("name, scale", REPORTED)
def test_rows_differ_in_what_was_tuned_alone(name, scale):
    rows = settings_of(name, scale)
    assert all(len(group) == 1 for group in rows.values()), "a method stands there twice"
    settings, seeds = zip(*(group[0] for group in rows.values()))
    assert all(each == seeds[0] for each in seeds)
    assert all(s["clip"] == 0 and s["validation"] == 0 and s["init"] == "normal" for s in settings)
    varies = {key for key in settings[0] if len({json.dumps(s[key]) for s in settings}) > 1}
    assert varies <= {"codebook_optimizer", "codebook_lr", "ema_decay", "lr"}
    assert len({group[0][0]["lr"] for method, group in rows.items() if method != "none"}) == 1, (
        "only `none`, without a codebook to tune, has a learning rate of its own"
    )


@pytest.mark.parametrize("scale", TUNED)
def test_every_method_has_as_many_trials_of_what_moves_its_codebook(scale):
    rows = settings_of("huh_tab03_tune", scale)
    assert {
        method for name, other in REPORTED if other == scale for method in settings_of(name, other)
    } <= set(rows)
    assert {len(group) for group in rows.values()} == {6}
    for method, group in rows.items():
        model = prepared(method=method, train_limit=32)["model"]
        factors = (
            {"codebook_optimizer", "codebook_lr"}
            if "codebook" in optimizers(model, Settings())
            else {"lr"}
            if method == "none"
            else {"ema_decay"}
        )
        assert {
            key for key in group[0][0] if len({json.dumps(s[key]) for s, _ in group}) > 1
        } == factors, method
        assert all(s["validation"] > 0 for s, _ in group)


def test_no_seed_is_tuned_and_reported():
    reported = {cell.parameters["seed"] for name, scale in REPORTED for cell in plan(name, scale)}
    assert reported.isdisjoint(
        cell.parameters["seed"] for scale in TUNED for cell in plan("huh_tab03_tune", scale)
    )


def measured(scale):
    table = results_folder(scale) / "huh_tab03_tune.csv"
    rows = (
        {
            row["cell"]
            for row in csv.DictReader(io.StringIO(table.read_text()))
            if row["scale"] == scale
        }
        if table.is_file()
        else set()
    )
    return {cell.id for cell in plan("huh_tab03_tune", scale)} <= rows


@pytest.mark.skipif(not measured("desk"), reason="huh_tab03_tune has not run at desk")
@pytest.mark.parametrize(
    "name, scale", [(name, scale) for name, scale in REPORTED if scale != "smoke"]
)
def test_what_is_declared_was_chosen(name, scale):
    "At gpu and paper the trials of gpu decide once they are there; until then desk's do, but for the learning rate."
    source = "gpu" if scale != "desk" and measured("gpu") else "desk"
    chosen = choice("huh_tab03_tune", source)
    for method, [(settings, _)] in settings_of(name, scale).items():
        for key, value in chosen[method].items():
            if key != "lr" or source == scale:
                assert settings[key] == value, (method, key)


def test_held_out_pictures(monkeypatch):
    read = []

    def images(name, split, **how):
        read.append(split)
        return real(name, split, **how)

    real = data.images
    monkeypatch.setattr(data, "images", images)
    first, other = prepared(validation=240), prepared(validation=240, seed=5, method="router")
    assert set(read) == {"train"}, "a tuning run read test pictures"
    assert torch.equal(first["measured"].x, other["measured"].x) and torch.equal(
        first["train"].x, other["train"].x
    )
    assert (
        torch.equal(first["measured"].y, other["measured"].y)
        and len(first["measured"]) == 240
        and len(first["train"]) == 2000
    )
    whole = torch.cat([first["train"].x, first["measured"].x]).flatten(1).sum(1).sort().values
    assert torch.equal(whole, real("photos", "train", size=32).x.flatten(1).sum(1).sort().values)
    assert (
        torch.equal(prepared()["measured"].x, real("photos", "test", size=32).x) and "test" in read
    )
    with pytest.raises(ValueError, match="validation must lie in 0..2239, .*, got 2240"):
        prepared(validation=2240)


def test_methods_start_alike():
    def start(method, seed=3):
        return {
            key: value.clone()
            for key, value in prepared(method=method, train_limit=32, seed=seed)["model"]
            .state_dict()
            .items()
        }

    plain = start("vq")
    network = [key for key in plain if not key.startswith("quantizer.")]
    assert len(network) > 20
    for method in ("none", "sq", "gumbel", "router", "vq + affine + opt"):
        assert all(
            torch.equal(plain[key], value) for key, value in start(method).items() if key in network
        ), method
    for method in ("vq + ema", "vq + affine + opt + replace"):
        assert torch.equal(start(method)["quantizer.book.weight"], plain["quantizer.book.weight"])
    assert any(
        not torch.equal(plain[key], value)
        for key, value in start("vq", 4).items()
        if key in network
    )


def test_parameter_count_has_the_codebook_whoever_moves_it():
    count = {
        method: prepared(method=method, train_limit=32, channels=16, num_codes=8)["parameter_count"]
        for method in ("none", "vq", "vq + ema", "vq + affine")
    }
    assert (
        count["vq"] - count["none"],
        count["vq + ema"] - count["none"],
        count["vq + affine"] - count["vq"],
    ) == (8 * 16, 8 * 16, 2 * 16)


def hub(folder, **splits):
    "A set in the hub's layout: so many pictures of 48x40 pixels a split, no labels."
    import numpy, pyarrow
    from PIL import Image
    from pyarrow import parquet

    random = numpy.random.RandomState(0)

    def encoded():
        file = io.BytesIO()
        Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype="uint8")).save(file, "PNG")
        return dict(bytes=file.getvalue(), path=None)

    folder.mkdir(parents=True)
    for split, count in splits.items():
        parquet.write_table(
            pyarrow.table(dict(image=[encoded() for _ in range(count)])),
            folder / f"{split}-00000-of-00001.parquet",
        )


def test_a_set_never_seen_runs_by_name_and_folder_alone(tmp_path):
    hub(tmp_path / "sets/never_seen", train=16, validation=4)
    env = {
        key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")
    } | dict(VQSTUDY_DATA=str(tmp_path / "sets"), VQSTUDY_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "nbs/runs/reconstruct.ipynb",
            str(tmp_path / "out.ipynb"),
            "-p",
            "dataset",
            "never_seen",
            "-p",
            "epochs",
            "2",
            "-p",
            "out",
            str(tmp_path / "record"),
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record/record.json").read_text())
    assert (
        record["status"] == "done"
        and 0 < record["metrics"]["mse"] < 1
        and record["metrics"]["rarefied_usage"] is None
    )  # 4 pictures are 256 draws
    assert {
        key: record["metrics"][key] for key in ("updates", "images_seen", "bits_per_image")
    } == dict(updates=2, images_seen=32, bits_per_image=64 * 6)
    assert (tmp_path / "record/samples.png").is_file()


def test_a_choice_needs_no_test_pictures(tmp_path, monkeypatch):
    hub(tmp_path / "sets/train_alone", train=20)
    monkeypatch.setenv("VQSTUDY_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    names = prepared(dataset="train_alone", validation=5)
    assert (
        len(names["train"]),
        len(names["measured"]),
        names["pixels"],
        names["settings"].batch_size,
    ) == (15, 5, 32, 15)
    with pytest.raises(FileNotFoundError, match="train_alone/test"):
        prepared(dataset="train_alone")


def test_larger_pictures_have_the_network_of_the_largest_size(tmp_path, monkeypatch):
    hub(tmp_path / "sets/large", train=4, test=2)
    monkeypatch.setenv("VQSTUDY_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    model, known = (
        prepared(dataset="large", method="vq", size=size)["model"] for size in (128, 64)
    )
    out = model(torch.rand(2, 3, 128, 128))
    assert out.x.shape == (2, 3, 128, 128) and out.quantized.codes.shape == (2, 32, 32)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in known.state_dict().items()
    }


def test_a_diverged_run_keeps_its_row(tmp_path):
    for name in ("settings.ini", "vqstudy", "nbs/runs/reconstruct.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "nbs/sweeps").mkdir()
    (tmp_path / "nbs/sweeps/two.yaml").write_text(
        "{notebook: reconstruct, metric: mse, fixed: {method: vq, test_limit: 8, draws: 100}, "
        "grid: [{train_limit: [64], lr: [0.001, 1.0e+30], epochs: [2]}, {train_limit: [32], lr: [1.0e+30], epochs: [1]}], scales: {desk: {}}}"
    )
    env = {
        key: value for key, value in os.environ.items() if not key.startswith("VQSTUDY_")
    } | dict(PYTHONPATH=str(tmp_path))

    def study(*words):
        return subprocess.run(
            [sys.executable, "-m", "vqstudy.study", *words, "--scale", "desk", "--sweep", "two"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
        )

    listed = study("plan").stdout
    said = [
        study("cell", "--cell", word).stdout
        for word in listed.split()
        if word.startswith("reconstruct-")
    ]
    assert len(said) == 3 and study("collect").returncode == 0, said
    done, *lost = sorted(
        csv.DictReader((tmp_path / "data/results/two.csv").open(newline="")),
        key=lambda row: float(row["lr"]),
    )
    columns = (
        "mse",
        "rarefied_usage",
        "bits_per_image",
        "updates",
        "images_seen",
        "parameter_count",
    )
    assert done["status"] == "done" and all(float(done[name]) > 0 for name in columns), said
    for row in lost:  # in a step's loss, and by the very last update
        assert (
            row["status"] == "diverged"
            and not any(row[name] for name in columns)
            and row["batch_size"] == "32"
            and float(row["seconds"]) > 0
        ), said
