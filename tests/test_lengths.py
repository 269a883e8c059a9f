"""Several lengths from one trunk: each is the run that it would be alone, bit for bit."""

import functools
import math
import time
import types
import pytest
import torch
from torch import nn
from vqstudy import train
from vqstudy.checkpoint import DamagedCheckpoint, load_checkpoint, reproducible, save_checkpoint
from vqstudy.lengths import Course, Stage, is_annealed, stages
from vqstudy.models import Autoencoder, reconstruction_loss
from vqstudy.quantizers import StochasticQuantizer, recipe, recipes
from vqstudy.settings import Settings, branch_start, rate_factor, travel
from vqstudy.train import Loop, OutOfTime, fit

LENGTHS = (5, 10, 20)  # which leave the trunk at 4, 8 and 16, in the middle of an epoch of 3
STEPS = 16 + 1 + 2 + 4
OPTIONS = {"replace": {"life_span": 2}, "refit": {"refit": 3}, "ema": {"decay": 0.7}}
OPTIONS |= {"deferred": {"deferred_steps": 9}}  # in the branch to 10, which leaves the trunk at 8
ANNEALED = [spec for spec in recipes() if is_annealed(recipe(spec, 8, 32))]


def data(n=24):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return types.SimpleNamespace(x=x, y=None)


def autoencoder(spec, **options):
    for option, keywords in OPTIONS.items():
        if option in spec.split(" + "):
            options |= keywords
    return Autoencoder(recipe(spec, 8, 32, channel_dim=1, **options), channels=8)


def score(model):
    "Draws a random number, in no other mode than it should find, and changes the modes."
    assert not any(m.training for m in model.modules())
    model.train()
    return {"drawn": float(torch.rand(())), "weight": float(model.encoder[0].weight.sum())}


def watch(model, step):
    book = getattr(model.quantizer, "codebook", None)
    watched = model.encoder[0].weight if book is None else book
    return {"watched": float(watched.detach().sum())}, {"look": 1.0}


def run(lengths, spec="vq + opt + replace", path=None, monitor=watch, init=None, **more):
    options = {key: more.pop(key) for key in ("deadline",) if key in more}
    reproducible(0)
    model = autoencoder(spec, **({"init": init} if init else {}))
    settings = Settings(lengths=lengths, warmup_updates=3, batch_size=8, lr=3e-3, **more)
    options |= {"checkpoint": path, "save_every": 0.0 if path else 60.0, "progress": False}
    options |= {"monitor": monitor, "score": score}
    options["evaluate"] = lambda m: {"drawn_too": float(torch.rand(()))}
    return fit(model, reconstruction_loss, data(), settings, **options)


def of_length(rows, length):
    return [row for row in rows if row.get("length") == length]


def same(a, b):
    "Whether two runs have left the same record and weights."
    states = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    records = [(run.lengths, run.history, run.observed) for run in (a, b)]
    return records[0] == records[1] and all(torch.equal(x, y) for x, y in states)


def agrees(together, alone):
    "Whether the longest of several lengths is that length alone, and the others are in order."
    [row] = alone.lengths
    length = row["updates"]
    if together.lengths[-1] != row:
        return False
    states = zip(together.model.state_dict().values(), alone.model.state_dict().values())
    rows = []
    for each in (together, alone):
        recorded = each.history + each.observed
        rows.append(of_length(recorded, None) + of_length(recorded, length))
    return rows[0] == rows[1] and all(torch.equal(x, y) for x, y in states)


@functools.cache
def together(spec="vq + opt + replace"):
    return run(LENGTHS, spec)


# ---- a length is the run that it would be alone ----

METHODS = [
    ("vq", {}),
    ("vq", {"init": "kmeans"}),
    ("vq + ema", {"init": "kmeans"}),
    ("vq + ema + replace", {}),
    ("vq + refit", {}),
    ("vq + deferred", {}),
    ("vq + deferred", {"autocast": "float16", "clip": 1.0}),
    ("vq + ema + replace + deferred", {}),
    ("vq + ema + refit", {}),
    ("vq + moving-affine + replace", {}),
    ("vq + affine + opt + replace + l2", {}),
    ("vq + affine + opt", {"inner": 2, "fused": False}),
    ("vq + alt", {"inner": 2, "outer": 2, "fused": False}),
    ("vq + rotation", {"autocast": "bfloat16", "channels_last": True}),
    ("vq + replace", {"autocast": "float16"}),
    ("vq + exact", {"clip": 0.5}),
    ("vq + replace", {"codebook_optimizer": "sgd", "optimizer": "sgd", "momentum": 0.9}),
    ("vq + ema + residual", {}),
    ("vq + nsvq", {}),
    ("router", {}),
    ("simvq", {}),
    ("optvq", {}),
    ("none", {}),
    *((spec, {}) for spec in ANNEALED),
]


@pytest.mark.parametrize("spec, settings", METHODS)
def test_a_length_is_what_it_is_alone(spec, settings):
    all_lengths = run(LENGTHS, spec, **settings)
    assert [row["updates"] for row in all_lengths.lengths] == [*LENGTHS]
    assert agrees(all_lengths, run((20,), spec, **settings))
    middle = run((10,), spec, **settings)
    assert middle.lengths[0] == all_lengths.lengths[1]
    assert of_length(middle.history, 10) == of_length(all_lengths.history, 10)
    assert of_length(middle.observed, 10) == of_length(all_lengths.observed, 10)
    assert all(math.isfinite(row["loss"]) for row in all_lengths.lengths)


def test_rows_of_a_branch_have_its_length_and_those_of_the_trunk_none():
    fitted = together()
    places = [(row["epoch"], row["updates"], row.get("length")) for row in fitted.history]
    trunk = [(1, 3), (2, 6), (3, 9), (4, 12), (5, 15)]
    wanted = [(*place, None) for place in trunk]
    wanted[1:1] = [(5 / 3, 5, 5)]
    wanted[3:3] = [(10 / 3, 10, 10)]
    assert places == [*wanted, (20 / 3, 20, 20)]
    steps = [(row["step"], row.get("length")) for row in fitted.observed]
    assert steps == [
        *((s, None) for s in range(4)), (4, 5), *((s, None) for s in range(4, 8)),
        (8, 10), (9, 10), *((s, None) for s in range(8, 16)), *((s, 20) for s in range(16, 20)),
    ]
    assert fitted.cost["steps"] == STEPS == len(steps)
    assert fitted.cost["monitor_look_seconds"] == STEPS
    assert fitted.metrics.keys() == {"loss", "task_loss", "quantizer_loss", "drawn_too"}


def test_rows_in_between_change_nothing():
    "Of a length, or of a run of epochs, whose end is no multiple of them."
    finer = run(LENGTHS, watch_updates=2)
    assert finer.lengths == together().lengths
    trunk = [row["updates"] for row in of_length(finer.history, None)]
    assert trunk == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [len(of_length(finer.history, length)) for length in LENGTHS] == [1, 1, 1]
    states = zip(finer.model.state_dict().values(), together().model.state_dict().values())
    assert all(torch.equal(x, y) for x, y in states)
    ends = [run((), epochs=3, watch_updates=n).history for n in (0, 4)]
    assert [[row["epoch"] for row in rows] for rows in ends] == [[1, 2, 3], [4 / 3, 8 / 3, 3]]


def test_a_run_killed_between_its_rows_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(OutOfTime):
        run(LENGTHS, path=path, watch_updates=2, deadline=time.time() + 0.05)
    assert same(run(LENGTHS, path=path, watch_updates=2), run(LENGTHS, watch_updates=2))


def test_the_loss_of_a_length_is_the_mean_of_its_last_fifth():
    losses = []

    def kept(model, x, y):
        loss, parts = reconstruction_loss(model, x, y)
        losses.append(loss.item())
        return loss, parts

    reproducible(0)
    settings = Settings(lengths=(20,), batch_size=8)
    fitted = fit(autoencoder("vq"), kept, data(), settings, progress=False)
    assert fitted.lengths[0]["loss"] == pytest.approx(sum(losses[16:]) / 4)
    assert [row["loss"] for row in fitted.history[:5]] == pytest.approx(
        [sum(losses[i : i + 3]) / 3 for i in range(0, 15, 3)]
    )


def test_without_lengths_there_is_one_row_of_scores():
    reproducible(0)
    model, settings = autoencoder("vq"), Settings(epochs=2, batch_size=8)
    fitted = fit(model, reconstruction_loss, data(), settings, score=score, progress=False)
    [row] = fitted.lengths
    assert row.keys() == {"updates", *fitted.metrics, "drawn", "weight"} and row["updates"] == 6
    assert "updates" not in fitted.history[0]


# ---- an annealed temperature ----


@pytest.mark.parametrize("spec", ANNEALED)
def test_what_anneals_runs_each_length_from_the_start(spec):
    assert stages(Settings(lengths=LENGTHS), 3, True) == [Stage(0, n, n) for n in LENGTHS]
    fitted = run(LENGTHS, spec)
    assert fitted.cost["steps"] == sum(LENGTHS) == len(fitted.observed)
    assert [row["step"] for row in of_length(fitted.observed, 20)] == [*range(20)]
    ends = [row["updates"] for row in of_length(fitted.history, 20)]
    assert ends == [3, 6, 9, 12, 15, 20]


def test_each_length_has_all_temperatures():
    reproducible(0)
    quantizer = StochasticQuantizer(8, 32, temperature=1.0, final_temperature=0.01, channel_dim=1)
    seen = []

    def loss(m, x, y):
        seen.append(float(m.quantizer.temperature))
        return reconstruction_loss(m, x, y)

    settings = Settings(lengths=(4, 8), batch_size=8)
    fit(Autoencoder(quantizer, channels=8), loss, data(), settings, progress=False)
    wanted = [0.01 ** (t / 4) for t in range(4)] + [0.01 ** (t / 8) for t in range(8)]
    assert seen == pytest.approx(wanted)


# ---- killed and resumed ----


def interrupted_at(count):
    "A monitor that interrupts the run after so many steps, counted through all stages."
    calls = 0

    def monitor(model, step):
        nonlocal calls
        calls += 1
        if calls > count:
            raise KeyboardInterrupt
        return watch(model, step)

    return monitor


@pytest.mark.parametrize("count", [2, 4, 5, 6, 9, 10, 11, 12, 15, 19, 21, 22])
def test_killed_and_resumed_is_the_same_record(count, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(LENGTHS, path=path, monitor=interrupted_at(count))
    assert same(run(LENGTHS, path=path), together())
    assert same(run(LENGTHS, path=path), together())  # nothing is left to do


@pytest.mark.parametrize("spec", ["vq + ema + replace", "vq + refit", "gumbel", "sq"])
def test_stopped_at_every_step(spec, tmp_path):
    stops = 0
    while True:
        try:
            resumed = run(LENGTHS, spec, tmp_path / "run.pt", deadline=time.time())
            break
        except OutOfTime:
            stops += 1
    assert same(resumed, together(spec))
    # three ends of stages, or beginnings of a last fifth, within an epoch; and the end
    assert stops == together(spec).cost["steps"] - 4


def test_a_checkpoint_is_of_its_lengths(tmp_path):
    run((5,), path=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"lengths is \(5, 10\) and was \(5,\)"):
        run((5, 10), path=tmp_path / "run.pt")


@pytest.mark.parametrize("part", ["model", "optimizers", "random", "pending"])
def test_a_trunk_that_is_not_whole_is_damage(part, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(LENGTHS, path=path, monitor=interrupted_at(10))
    state = load_checkpoint(path)
    assert state["trunk"]["step"] == 8 and state["step"] == 9
    del state["trunk"][part]
    save_checkpoint(path, state)
    with pytest.raises(DamagedCheckpoint, match=f"it has no {part} of its trunk"):
        run(LENGTHS, path=path)


# ---- planted faults: what must come back to the trunk, each alone left as the branch had it ----


def forget(monkeypatch, part, keep=lambda name: False):
    "Let the way back to the trunk leave a part, or all of it but what `keep` names, as it is."
    go_to = Loop.go_to

    def faulty(loop, place):
        now = loop.place()[part]
        if part == "model":
            now = {name: place[part][name] if keep(name) else x for name, x in now.items()}
        go_to(loop, place | {part: now})

    monkeypatch.setattr(Loop, "go_to", faulty)


FORGOTTEN = {
    "model": "vq",
    "optimizers": "vq",
    "random": "vq + nsvq",
    "pending": "vq + affine + opt",
    "sums": "vq",
    "steps": "vq",
    "step": "vq",
}


@pytest.mark.parametrize("part", FORGOTTEN)
def test_a_part_that_is_forgotten_shows(part, monkeypatch):
    spec = FORGOTTEN[part]
    alone = run((20,), spec)
    assert agrees(run(LENGTHS, spec), alone)
    forget(monkeypatch, part)
    assert not agrees(run(LENGTHS, spec), alone)


UPKEEP = ["vq + ema", "vq + ema + replace", "vq + replace", "vq + refit", "vq + moving-affine"]


@pytest.mark.parametrize("spec", UPKEEP)
def test_upkeep_that_is_forgotten_shows(spec, monkeypatch):
    "The quantizer's buffers alone."
    learned = {name for name, _ in autoencoder(spec).named_parameters()}
    alone = run((20,), spec)
    forget(monkeypatch, "model", lambda name: name in learned or "quantizer" not in name)
    assert not agrees(run(LENGTHS, spec), alone)


def test_a_kmeans_start_that_is_forgotten_shows(monkeypatch):
    "Where each length begins at the start: a codebook that has begun must wait again."

    def trained(*lengths):
        reproducible(0)
        quantizer = StochasticQuantizer(8, 32, init="kmeans", channel_dim=1)
        model = Autoencoder(quantizer, channels=8)
        settings = Settings(lengths=lengths, batch_size=8)
        return fit(model, reconstruction_loss, data(), settings, progress=False).lengths[-1]

    alone = trained(8)
    assert trained(4, 8) == alone
    forget(monkeypatch, "model", lambda name: name != "quantizer.book.started")
    assert trained(4, 8) != alone


def test_the_scaler_comes_back():
    reproducible(0)
    settings = Settings(lengths=(5, 10), batch_size=8, autocast="float16")
    model, cpu = autoencoder("vq"), torch.device("cpu")
    loop = Loop(model, reconstruction_loss, data().x, None, settings, cpu)
    loop.advance(*loop.batches.read(slice(8)))
    loop.step = 4
    loop.leave()
    loop.enter()
    before = loop.updates.scaler.state_dict()
    loop.updates.scaler.load_state_dict(before | {"scale": 2.0, "_growth_tracker": 7})
    loop.leave()
    assert loop.updates.scaler.state_dict() == before and before["scale"] > 2


def test_a_score_that_is_not_put_right_shows(monkeypatch):
    alone = run((20,), "vq + replace")

    class Bare:
        def __init__(self, model):
            model.eval()
            self.model = model

        def __enter__(self):
            self.grad = torch.no_grad()
            self.grad.__enter__()

        def __exit__(self, *error):
            self.grad.__exit__(*error)
            self.model.train()

    assert agrees(together("vq + replace"), alone)
    monkeypatch.setattr(train, "measuring", Bare)
    assert not same(run(LENGTHS, "vq + replace"), together("vq + replace"))


def test_modes_of_a_part_stay():
    "A part that its owner keeps in eval mode is in eval mode after a score."
    reproducible(0)
    model = autoencoder("vq")
    seen = []

    def loss(m, x, y):
        m.encoder[1].eval()
        seen.append([m.encoder[1].training, m.encoder[4].training, torch.is_grad_enabled()])
        return reconstruction_loss(m, x, y)

    settings = Settings(lengths=LENGTHS, batch_size=8)
    fit(model, loss, data(), settings, score=score, progress=False)
    assert not model.encoder[1].training and model.encoder[4].training
    assert seen == [[False, True, True]] * STEPS


# ---- rates, by hand ----


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


def test_the_sum_of_the_rates_by_hand():
    "Under SGD and a gradient of -1 the weight is that sum; its travel is the same."

    def loss(m, x, y):
        return -m.w, {}

    s = {"optimizer": "sgd", "lr": 0.125, "weight_decay": 0.0, "batch_size": 8}
    settings = Settings(lengths=(10, 20), warmup_updates=3, **s)
    scored = {"score": lambda m: {"w": float(m.w)}, "progress": False}
    fitted = fit(Weight(), loss, data(), settings, **scored)
    # warm-up 1/4 + 2/4 + 3/4; constant; 1 + 1/2, or 1 + 3/4 + 1/2 + 1/4
    sums = [1.5 + 5 + 1.5, 1.5 + 13 + 2.5]
    assert [row["w"] for row in fitted.lengths] == pytest.approx([0.125 * x for x in sums])
    for length, total in zip((10, 20), sums):
        assert travel(Weight(), settings, length)["network"] == pytest.approx(0.125 * total)


def test_desk_lengths():
    assert [branch_start(n) for n in (390, 780, 1560)] == [312, 624, 1248]
    s = Settings(lengths=(390, 780, 1560), warmup_updates=87)
    course = Course(s, 156)
    assert course.steps == 1248 + 78 + 156 + 312
    assert rate_factor(s, 86, 390) < 1 == rate_factor(s, 87, 390) == rate_factor(s, 312, 390)
    assert rate_factor(s, 1559, 1560) == pytest.approx(1 / 312)
    assert rate_factor(s, 1559, 1560, trunk=True) == 1


def test_a_warmup_in_updates_without_lengths():
    share, updates = Settings(epochs=9, warmup=1 / 3), Settings(epochs=9, warmup_updates=6)
    factors = [[rate_factor(s, step, 18) for step in range(18)] for s in (share, updates)]
    assert factors[0] == factors[1]


def test_rates_that_fall_by_steps():
    "Half a warm-up, then 1, .1 and .01 from the milestones on (Huh et al. 2023, Table 5)."
    s = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "batch_size": 8, "epochs": 9}
    falls = {"decay": "step", "milestones": (3, 6), "warmup_updates": 1}
    settings = Settings(**s, **falls)
    seen = []

    def loss(m, x, y):
        seen.append(float(m.w.detach()))
        return -m.w, {}

    fitted = fit(Weight(), loss, data(), settings, progress=False)
    steps = [b - a for a, b in zip(seen, [*seen[1:], float(fitted.model.w.detach())])]
    assert steps == pytest.approx([0.5] + [1.0] * 8 + [0.1] * 9 + [0.01] * 9, rel=1e-3)
