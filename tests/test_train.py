"""The loop: same seed same record; a run that is killed and resumed is the same run."""

import math
import os
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
import pytest
import torch
from torch import nn
from vqstudy.models import Autoencoder, reconstruction_loss
from vqstudy.codebook import Affine
from vqstudy.estimators import straight_through, synchronized
from vqstudy.quantizers import StochasticQuantizer, VectorQuantizer, recipe, recipes
from vqstudy.scores import reconstruction_scores
from vqstudy.train import NonFiniteLoss, OutOfTime, Settings, fit, load_checkpoint, optimizers
from vqstudy.settings import travel
from vqstudy.train import reproducible, save_checkpoint, schedule

METHOD = "vq + rotation + replace"  # draws random numbers in training: a lost state would show


def random_images(n=64, size=32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return types.SimpleNamespace(x=x, y=None)


def run(
    path=None,  # of the checkpoint, then written after every step
    deadline=None,
    method=METHOD,
    epochs=3,
    loss=reconstruction_loss,
    n=64,
    monitor=None,
    **settings,
):
    reproducible(0, threads=1, device="cpu")
    options = {"life_span": 2} if "replace" in method else {}
    model = Autoencoder(recipe(method, 8, 32, channel_dim=1, **options), channels=8)
    test = random_images(16).x
    return fit(
        model,
        loss,
        random_images(n),
        Settings(epochs=epochs, batch_size=8, **settings),
        evaluate=lambda m: reconstruction_scores(m, test),
        checkpoint=path,
        deadline=deadline,
        save_every=0.0 if path else 60.0,
        monitor=monitor,
        progress=False,
    )


def interrupt_after(stops):
    "A monitor that interrupts the run after so many steps, in the middle of an epoch."

    def monitor(model, step):
        if step == stops:
            raise KeyboardInterrupt

    return monitor


def same_run(a, b):
    weights = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return a.history == b.history and all(torch.equal(v, w) for v, w in weights)


@pytest.fixture(scope="module")
def whole():
    return run()


def test_same_seed_same_record(whole):
    assert same_run(run(), whole) and len(whole.history) == 3


@pytest.mark.parametrize("stops", [1, 5, 9])
def test_resumed_is_the_same_run(whole, tmp_path, stops):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path, monitor=interrupt_after(stops))
    assert load_checkpoint(path)["step"] in (stops, stops - stops % 8)
    assert same_run(run(path), whole)


@pytest.mark.parametrize("method", recipes())
def test_every_recipe_trains_stops_and_resumes(method, tmp_path):
    "Two epochs of three steps, uninterrupted, and resumed after the first step."
    path = tmp_path / "run.pt"
    whole = run(method=method, epochs=2, n=24)
    with pytest.raises(OutOfTime):
        run(path, method=method, epochs=2, n=24, deadline=time.time())
    assert same_run(run(path, method=method, epochs=2, n=24), whole)
    assert len(whole.history) == 2
    assert all(math.isfinite(row["loss"]) and row["mse"] < 0.25 for row in whole.history)


def test_killed_at_a_random_moment(whole, tmp_path):
    path = tmp_path / "run.pt"
    code = f"from pathlib import Path; from test_train import run; run(Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    load_checkpoint(path)  # whole, whatever was being written
    assert run(path).history == whole.history


def test_the_deadline_saves_then_stops(whole, tmp_path):
    path = tmp_path / "run.pt"
    message = "out of time at step 1 of 24; last good checkpoint: .*run.pt"
    with pytest.raises(OutOfTime, match=message):
        run(path, deadline=time.time() - 1)
    assert run(path).history == whole.history
    # a finished run has nothing left to stop
    assert run(path, deadline=time.time() - 1).history == whole.history


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    calls = 0

    def explodes(model, x, y):
        nonlocal calls
        calls += 1
        loss, parts = reconstruction_loss(model, x, y)
        return (loss * float("inf") if calls == 12 else loss), parts

    message = "the loss was inf at step 12 of 24; last good checkpoint: .*run.pt"
    with pytest.raises(NonFiniteLoss, match=message):
        run(path, loss=explodes)
    state = load_checkpoint(path)
    assert state["step"] == 11 and all(v.isfinite().all() for v in state["model"].values())


def test_weights_that_are_not_finite_stop_and_keep_the_checkpoint(tmp_path):
    "The norm of a vector at 0 is finite, and its gradient is not."
    path = tmp_path / "run.pt"
    calls = 0

    def breaks(model, x, y):
        nonlocal calls
        calls += 1
        loss, parts = reconstruction_loss(model, x, y)
        if calls == 12:
            loss = loss + (0 * model.encoder[0].weight).pow(2).sum().sqrt()
        return loss, parts

    message = "encoder.0.weight was not finite after step 12 of 24; .*checkpoint: .*run.pt"
    with pytest.raises(NonFiniteLoss, match=message):
        run(path, loss=breaks)
    state = load_checkpoint(path)
    assert state["step"] == 11 and all(v.isfinite().all() for v in state["model"].values())


def test_the_last_step_may_not_spoil_the_weights():
    def breaks(model, x, y):
        return (0 * model.w).pow(2).sum().sqrt(), {}

    settings = Settings(epochs=1, batch_size=16)
    with pytest.raises(NonFiniteLoss, match="w was not finite after step 1 of 1; .*: none"):
        fit(Weight(1.0), breaks, random_images(16), settings, progress=False)


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(path, epochs=1)
    with pytest.raises(ValueError, match="lr is 0.5 and was 0.001"):
        run(path, epochs=1, lr=0.5)


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"a": torch.ones(2)})
    with pytest.raises(Exception):
        save_checkpoint(path, {"a": lambda: None})  # cannot be pickled
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# the names of a quantizer's parameters that are not the network's, by kind
KINDS = {
    "vq": {"codebook": {"book.weight"}},
    "vq + ema": {},
    "vq + affine + opt": {"codebook": {"book.weight"}, "map": {"book.map.scale", "book.map.shift"}},
    "simvq": {"map": {"book.map.linear.weight"}},
    "gumbel": {"codebook": {"book.weight"}},
    "router": {"codebook": {"book.weight"}, "keys": {"keys"}},
    "router + tied": {"codebook": {"book.weight"}},
    "vq + affine + residual": {
        "codebook": {f"parts.{i}.book.weight" for i in range(4)},
        "map": {f"parts.{i}.book.map.{name}" for i in range(4) for name in ("scale", "shift")},
    },
}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("spec", KINDS)
def test_groups_cover_every_parameter_once_at_the_rate_of_its_kind(spec, kind):
    model = Autoencoder(recipe(spec, 8, 16, channel_dim=1), channels=8)
    s = Settings(codebook_optimizer=kind, codebook_lr=10.0, map_lr=3.0, keys_lr=5.0)
    groups = [group for each in optimizers(model, s).values() for group in each.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    name_of = {id(p): name for name, p in model.quantizer.named_parameters()}
    found = {group["name"]: {name_of.get(id(p)) for p in group["params"]} for group in groups}
    network = found.pop("network")
    assert found == KINDS[spec] and None in network
    rates = {"network": (1e-3, 1e-4), "keys": (5e-3, 1e-4), "codebook": (1e-2, 0), "map": (3e-3, 0)}
    for group in groups:
        rate, decay = rates[group["name"]]
        assert group["base_lr"] == group["lr"] == pytest.approx(rate)
        assert group["weight_decay"] == decay


@pytest.mark.parametrize("inner", [1, 2])
def test_a_map_steps_at_its_own_rate(inner):
    "SGD, one batch: codebook and map each take their own multiple of their gradient."
    reproducible(0)
    model = Linear(VectorQuantizer(4, 8, map=Affine(4), alternate=inner > 1))
    book = model.quantizer.book
    parameters = book.weight, book.map.scale, book.map.shift
    kept = [[] for _ in parameters]
    for p, gradients in zip(parameters, kept):
        p.register_hook(gradients.append)
    before = [p.detach().clone() for p in parameters]
    sgd = {"codebook_optimizer": "sgd", "codebook_lr": 7.0, "map_lr": 0.5, "inner": inner}
    settings = Settings(epochs=1, batch_size=8, warmup=0.0, lr=1e-2, fused=False, **sgd)
    fit(model, linear_loss, small(8), settings, progress=False)
    for p, start, gradients, factor in zip(parameters, before, kept, (7.0, 0.5, 0.5)):
        moved = sum(g for g in gradients[:inner])
        assert moved.abs().sum() > 0
        assert torch.allclose(p, start - 1e-2 * factor * moved, atol=1e-7)


@pytest.mark.parametrize("decay", ["cosine", "constant"])
@pytest.mark.parametrize("spec", ["vq", "vq + affine", "vq + affine + alt"])
def test_travel_is_how_far_adamw_goes(spec, decay):
    "Under a gradient that stays the same, AdamW moves each number by its rate in each step."
    reproducible(0)
    model = Linear(recipe(spec, 4, 8))
    parts = {"codebook": model.quantizer.book.weight}
    if "affine" in spec:
        parts["map"] = model.quantizer.book.map.shift
    before = {kind: p.detach().clone() for kind, p in parts.items()}

    def slope():
        return -sum(p.sum() for p in parts.values())

    def loss(m, x, y):
        m.quantizer(m.encoder(x.flatten(1)))  # where an inner step reads what reaches it
        nothing = 0 * m.encoder.weight.sum()
        return nothing if "alt" in spec else nothing + slope(), {}

    own = model.quantizer.inner_loss
    model.quantizer.inner_loss = lambda z: 0 * own(z) + slope()
    options = {"inner": 3, "fused": False} if "alt" in spec else {}
    rates = {"lr": 1e-3, "codebook_lr": 20.0, "map_lr": 4.0, "decay": decay}
    s = Settings(epochs=3, batch_size=8, weight_decay=0.0, **rates, **options)
    fit(model, loss, small(), s, progress=False)
    for kind, p in parts.items():
        far = (p.detach() - before[kind]).mean()
        assert far == pytest.approx(travel(model, s, 12)[kind], rel=1e-4)


def test_a_run_starts_from_given_weights(tmp_path):
    "Two epochs are one epoch, and another from its weights, where nothing else is kept."

    def go(epochs, weights=None, path=None, monitor=None):
        reproducible(0)
        model = Autoencoder(recipe("vq + ema", 8, 32, channel_dim=1), channels=8)
        sgd = {"optimizer": "sgd", "warmup": 0.0, "decay": "constant", "lr": 0.1}
        settings = Settings(epochs=epochs, batch_size=32, **sgd)
        given = {"weights": weights, "checkpoint": path, "monitor": monitor, "save_every": 0.0}
        data = random_images(32)
        return fit(model, reconstruction_loss, data, settings, progress=False, **given)

    first = go(1)
    # the order within a batch does not matter but for rounding
    weights = {name: x.clone() for name, x in first.model.state_dict().items()}
    second = go(1, weights)
    assert second.history[0]["loss"] == pytest.approx(go(2).history[1]["loss"], rel=1e-5)
    assert second.history[0]["loss"] < first.history[0]["loss"]
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        go(2, weights, path, interrupt_after(1))
    with pytest.raises(ValueError, match="run.pt is of another run: weights.decoder"):
        go(2, None, path)
    assert same_run(go(2, weights, path), go(2, weights))


@pytest.mark.parametrize("wrong, kind, words", [
    ([], TypeError, "weights must be a state_dict"),
    ({"w": [1.0]}, TypeError, r"weights\['w'\] must be a torch.Tensor"),
    ({}, ValueError, r"weights must be the model's: w is \(1,\) float32, got nothing"),
    ({"w": torch.ones(2)}, ValueError, r"w is \(1,\) float32, got \(2,\) float32"),
    ({"w": torch.ones(1), "v": torch.ones(1)}, ValueError, "v is nothing, got"),
])
def test_weights_of_another_model_are_named(wrong, kind, words):
    model = Weight(1.0)
    settings = Settings(batch_size=8)
    with pytest.raises(kind, match=words):
        fit(model, lambda m, x, y: (m.w.sum(), {}), random_images(8), settings, weights=wrong)
    assert float(model.w.detach()) == 1.0


def test_sgd_on_the_codebook_is_a_plain_step():
    torch.manual_seed(0)
    model = Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)
    before = model.quantizer.book.weight.detach().clone()
    kept = {}

    def loss(m, x, y):
        result = reconstruction_loss(m, x, y)
        m.quantizer.book.weight.register_hook(lambda g: kept.setdefault("g", g.clone()))
        return result

    sgd = {"codebook_optimizer": "sgd", "codebook_lr": 10.0}
    settings = Settings(epochs=1, batch_size=8, warmup=0.0, lr=1e-2, **sgd)
    fit(model, loss, random_images(8), settings, progress=False)
    assert torch.allclose(model.quantizer.book.weight, before - 0.1 * kept["g"], atol=1e-7)


def test_schedule_rises_then_falls():
    values = [schedule(s, 90, 1 / 9) for s in range(90)]
    assert values.index(max(values)) == 10
    assert all(a < b for a, b in zip(values[:10], values[1:11]))
    assert all(a > b for a, b in zip(values[10:], values[11:])) and values[-1] < 1e-3
    assert schedule(0, 10, 0.0) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"autocast": "bfloat16"},
        {"channels_last": True},
        {"clip": 1.0},
        {"compile": True, "epochs": 1},
        {"autocast": "float16", "epochs": 1},
    ],
)
def test_options_train(settings, monkeypatch):
    if settings.get("compile"):
        # The real compiler takes minutes of C++ on a CPU. This keeps its graph capture.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    history = run(**{"epochs": 2, "method": "vq", "n": 24} | settings).history
    assert all(math.isfinite(row["loss"]) for row in history)


class Weight(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize("clip, norm", [(0.5, 0.5), (None, 3**0.5 * 1e6)])
def test_clipping_bounds_the_step(clip, norm, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        norms.append(float(optimizer.param_groups[0]["params"][0].grad.norm()))
        return step(optimizer, *args, **kwargs)

    def steep(m, x, y):
        return 1e6 * m.w.sum(), {}

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    settings = Settings(epochs=3, batch_size=8, clip=clip)
    fit(Weight(0.0, 0.0, 0.0), steep, random_images(16), settings, progress=False)
    assert norms == pytest.approx([norm] * 6, rel=1e-4)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"warmup": 1.0}, "warmup must be a finite number at least 0 and below 1, got 1.0"),
        ({"momentum": 1.0}, "momentum must be a finite number at least 0 and below 1, got 1.0"),
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'sgd', got 'adam'"),
        ({"codebook_optimizer": "lion"}, "'lion'"),
        ({"decay": "linear"}, "'cosine', 'constant' or 'step', got 'linear'"),
        ({"decay": "step"}, "milestones must be given with decay 'step', .* and milestones="),
        ({"milestones": (3,)}, "milestones must be given .* got decay='cosine' and milestones=.3"),
        ({"decay": "step", "milestones": (5, 3)}, r"milestones must rise, got \(5, 3\)"),
        ({"decay": "step", "milestones": (11,)}, "milestones must be at most 10, got 11"),
        ({"map_lr": -1.0}, "map_lr must be a finite number at least 0, got -1.0"),
        ({"keys_lr": math.nan}, "keys_lr must be a finite number at least 0, got nan"),
        ({"lengths": (0, 3)}, "lengths must be at least 1, got 0"),
        ({"lengths": (8, 4)}, r"lengths must rise, got \(8, 4\)"),
        ({"lengths": (4, 4)}, r"lengths must rise, got \(4, 4\)"),
        ({"warmup_updates": -1}, "warmup_updates must be at least 0, got -1"),
        ({"lengths": (10,), "warmup_updates": 9}, "at most 8, where the length 10 .*, got 9"),
        ({"autocast": "int8"}, "'int8'"),
        ({"lr": -1e-3}, "lr must be a finite number at least 0, got -0.001"),
        ({"lr": math.nan}, "lr must be a finite number at least 0, got nan"),
        ({"codebook_lr": math.inf}, "codebook_lr must be a finite number at least 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be a finite number at least 0 and below 1, got 1.0"),
        ({"betas": (-0.1, 0.9)}, "betas must be a finite number at least 0 and below 1, got -0.1"),
        ({"betas": (0.9,)}, r"betas must be two numbers, got \(0.9,\)"),
        ({"clip": 0.0}, "clip must be a finite number above 0, got 0.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        Settings(**bad)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, None)}, "betas must be a number, got None"),
        ({"clip": True}, "clip must be a number, got True"),
        ({"seed": 0.5}, "seed must be an int, got 0.5"),
        ({"channels_last": 1}, "channels_last must be True or False, got 1"),
        ({"compile": "no"}, "compile must be True or False, got 'no'"),
        ({"fused": None}, "fused must be True or False, got None"),
        ({"lengths": 390}, "lengths must be a tuple of updates, got 390"),
        ({"lengths": (390.0,)}, "lengths must be an int, got 390.0"),
        ({"milestones": "30"}, "milestones must be a tuple of epochs, got '30'"),
    ],
)
def test_settings_of_another_type_are_named(bad, words):
    with pytest.raises(TypeError, match=words):
        Settings(**bad)


def test_settings_at_their_bounds():
    Settings(lr=0.0, codebook_lr=0, weight_decay=0.0, betas=(0.0, 0.999), clip=1e-9, seed=0)


def test_a_batch_is_no_larger_than_the_set():
    with pytest.raises(ValueError, match="batch_size must be at most the set's size 64, got 65"):
        fit(nn.Linear(1, 1), reconstruction_loss, random_images(), Settings(batch_size=65))


# ---- what quantizers ask of the loop ----


class Linear(nn.Module):
    "An encoder and a decoder that are matrices, so that every gradient has a closed form."

    def __init__(self, quantizer):
        super().__init__()
        self.encoder = nn.Linear(48, 4, bias=False)
        self.quantizer = quantizer
        self.decoder = nn.Linear(4, 48, bias=False)

    def forward(self, x):
        quantized = self.quantizer(self.encoder(x.flatten(1)))
        return self.decoder(quantized.z_q), quantized

    def decoder_loss(self, v, x, y=None):
        return (self.decoder(v) - x.flatten(1)).pow(2).mean()


def linear_loss(model, x, y):
    made, quantized = model(x)
    return (made - x.flatten(1)).pow(2).mean() + quantized.loss, {}


def small(n=32):
    return random_images(n, size=4, seed=5)


def test_inner_and_outer_steps_share_a_batch_that_they_do_not_divide():
    "8 images in 5 parts."
    history = run(method="vq + alt", epochs=1, n=8, inner=4, outer=1, fused=False).history
    assert math.isfinite(history[0]["loss"])


@pytest.mark.parametrize("rule", ["exact", "hessian"])
def test_rules_that_ask_the_decoder_get_it_from_fit(rule):
    """The decoder's loss is quadratic in its input.

    So both rules give the encoder the gradient of the model without a quantizer.
    """
    reproducible(0)
    model, kept = Linear(VectorQuantizer(4, 8, rule=rule, alpha=0.0)), {}
    start = [p.detach().clone() for p in (model.encoder.weight, model.decoder.weight)]
    model.encoder.weight.register_hook(lambda g: kept.setdefault("encoder", g.clone()))
    model.decoder.weight.register_hook(lambda g: kept.setdefault("decoder", g.clone()))
    data = small(8)
    fit(model, linear_loss, data, Settings(epochs=1, batch_size=8, lr=1e-9), progress=False)
    x = data.x.flatten(1).float() / 255
    encoder, decoder = (w.clone().requires_grad_() for w in start)
    loss = ((x @ encoder.T) @ decoder.detach().T - x).pow(2).mean()
    assert torch.allclose(kept["encoder"], torch.autograd.grad(loss, encoder)[0], atol=1e-7)
    q = model.quantizer.eval()(x @ start[0].T).z_q  # which the decoder learns from
    (grad,) = torch.autograd.grad((q @ decoder.T - x).pow(2).mean(), decoder)
    assert torch.allclose(kept["decoder"], grad, atol=1e-6)


@pytest.mark.parametrize("rule", ["exact", "hessian"])
def test_asking_the_decoder_moves_no_running_statistics(rule):
    settings = Settings(epochs=1, batch_size=8, lr=0.0, weight_decay=0.0)
    kept = []
    for each in (rule, straight_through):
        reproducible(0)
        model = Autoencoder(VectorQuantizer(8, 32, rule=each, channel_dim=1), channels=8)
        fit(model, reconstruction_loss, random_images(8), settings, progress=False)
        state = model.state_dict()
        kept.append({k: v for k, v in state.items() if "running" in k or "num_batches" in k})
    asked, plain = kept
    assert all(torch.equal(v, plain[k]) for k, v in asked.items())
    assert all(v == 1 for k, v in asked.items() if "num_batches" in k)


def test_a_rule_that_asks_needs_a_model_that_answers():
    model = nn.Sequential(VectorQuantizer(4, 8, rule="exact"))
    with pytest.raises(ValueError, match=r"must have decoder_loss\(v, x, y\)"):
        fit(model, linear_loss, small(), Settings(batch_size=8), progress=False)


@pytest.mark.parametrize("rule", [straight_through, synchronized(0.5)])
def test_fused_alternation_step_by_step(rule):
    """Inner: SGD on the commitment loss, and on what the last outer step left.

    Outer: the task, with the codes where the inner step has put them.
    """
    reproducible(0)
    model = Linear(VectorQuantizer(4, 8, rule=rule, alpha=2.0, beta=0.9, alternate=True))
    weights = model.encoder.weight, model.decoder.weight, model.quantizer.book.weight
    encoder, decoder, table = (p.detach().clone() for p in weights)
    data, rate, pending = small(24), 0.3, 0.0
    # the network hardly moves at this rate, so its first weights do for all steps
    settings = Settings(
        epochs=1,
        batch_size=8,
        lr=1e-12,
        weight_decay=0.0,
        warmup=0.0,
        codebook_optimizer="sgd",
        codebook_lr=rate * 1e12,
    )
    fit(model, linear_loss, data, settings, progress=False)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for step, rows in enumerate(order.split(8)):
        x = data.x[rows].flatten(1).float() / 255
        z = x @ encoder.T
        codes = torch.cdist(z, table).argmin(1)
        leaf = table.clone().requires_grad_()
        commitment = 2.0 * 0.9 * (leaf[codes] - z).pow(2).mean()
        grad = torch.autograd.grad(commitment, leaf)[0] + pending
        table = table - rate * schedule(step, 3, 0.0) * grad
        if rule is not straight_through:
            q = table[codes].requires_grad_()
            g = torch.autograd.grad((q @ decoder.T - x).pow(2).mean(), q)[0]
            pending = torch.zeros_like(table).index_add_(0, codes, 0.5 * g)
    assert torch.allclose(model.quantizer.book.weight, table, atol=1e-6)


def test_alternation_divides_the_batch():
    reproducible(0)
    model, sizes = Linear(VectorQuantizer(4, 8, alternate=True)), []
    inner = model.quantizer.inner_loss

    def watched(z):
        sizes.append(("inner", len(z)))
        return inner(z)

    model.quantizer.inner_loss = watched

    def loss(m, x, y):
        sizes.append(("outer", len(x)))
        return linear_loss(m, x, y)

    settings = Settings(epochs=1, batch_size=12, inner=2, outer=1, fused=False)
    fit(model, loss, small(12), settings, progress=False)
    assert sizes == [("inner", 4), ("inner", 4), ("outer", 4)]


def test_outer_steps_leave_the_codebook_to_the_inner_step():
    reproducible(0)
    model, grads = Linear(VectorQuantizer(4, 8, alternate=True)), []
    model.quantizer.book.weight.register_hook(lambda g: grads.append(g.abs().sum().item()))
    fit(model, linear_loss, small(8), Settings(epochs=1, batch_size=8), progress=False)
    inner, outer = grads
    assert inner > 0 and outer == 0.0  # straight-through sends the codebook nothing


def test_alternation_refuses_what_it_cannot_do():
    model = Linear(VectorQuantizer(4, 8, alternate=True))
    with pytest.raises(ValueError, match="float16"):
        fit(model, linear_loss, small(), Settings(batch_size=8, autocast="float16"))
    with pytest.raises(ValueError, match=r"at least inner \+ outer = 9, got 8"):
        fit(model, linear_loss, small(), Settings(batch_size=8, inner=8))


def test_a_resumed_alternated_run_is_the_same_run(tmp_path):
    "Gradients that wait between steps are part of the checkpoint."

    def go(path=None, monitor=None):
        reproducible(0)
        model = Linear(VectorQuantizer(4, 8, rule=synchronized(0.5), alternate=True))
        settings = Settings(epochs=2, batch_size=4)
        every = 0.0 if path else 60.0
        options = {"checkpoint": path, "save_every": every, "progress": False}
        return fit(model, linear_loss, small(), settings, monitor=monitor, **options)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "a.pt", interrupt_after(3))
    assert same_run(go(tmp_path / "a.pt"), go())


def test_temperatures_are_annealed():
    reproducible(0)
    model, seen = Linear(StochasticQuantizer(4, 8, temperature=1.0, final_temperature=0.01)), []

    def loss(m, x, y):
        seen.append(float(m.quantizer.temperature))
        return linear_loss(m, x, y)

    fit(model, loss, small(16), Settings(epochs=1, batch_size=4), progress=False)
    assert seen == pytest.approx([0.01 ** (t / 4) for t in range(4)])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_on_the_network_with_momentum_at_a_constant_rate(momentum):
    def loss(m, x, y):
        return m.w.pow(2).sum() / 2, {}

    model = Weight(1.0, -2.0)
    w, v = torch.tensor([1.0, -2.0]), torch.zeros(2)
    sgd = {"optimizer": "sgd", "momentum": momentum, "lr": 0.1, "weight_decay": 0.5}
    settings = Settings(epochs=2, batch_size=8, warmup=0.5, decay="constant", **sgd)
    fit(model, loss, random_images(16), settings, progress=False)
    for step in range(4):
        # torch's form: the decay joins the gradient, the rate comes after the momentum
        v = momentum * v + w + 0.5 * w
        w = w - 0.1 * schedule(step, 4, 0.5, "constant") * v
    assert torch.allclose(model.w, w, atol=1e-6) and schedule(3, 4, 0.5, "constant") == 1
