"""The loop: same seed same record, a run killed at any moment and resumed is the same run, faults that lose nothing."""

import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
import pytest
import torch
from torch import nn
from vqstudy.models import Autoencoder, reconstruction_loss
from vqstudy.estimators import straight_through, synchronized
from vqstudy.quantizers import StochasticQuantizer, VectorQuantizer, recipe, recipes
from vqstudy.scores import reconstruction_scores
from vqstudy.train import NonFiniteLoss, OutOfTime, Settings, fit, load_checkpoint, optimizers
from vqstudy.train import reproducible, save_checkpoint, schedule

METHOD = "vq + rotation + replace"  # draws random numbers in training, so that a forgotten random state would show


def pictures(n=64):
    g = torch.Generator().manual_seed(3)
    return types.SimpleNamespace(
        x=torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), y=None
    )


def run(path=None, deadline=None, method=METHOD, epochs=3, loss=reconstruction_loss, **more):
    reproducible(0, threads=1, device="cpu")
    model = Autoencoder(
        recipe(method, 8, 32, channel_dim=1, **({"life_span": 2} if "replace" in method else {})),
        channels=8,
    )
    test = pictures(16).x
    return fit(
        model,
        loss,
        pictures(),
        Settings(epochs=epochs, batch_size=8, **more),
        evaluate=lambda m: reconstruction_scores(m, test),
        checkpoint=path,
        deadline=deadline,
        save_every=0.0 if path else 60.0,
        progress=False,
    )


@pytest.fixture(scope="module")
def whole():
    return run()


def test_same_seed_same_record(whole):
    again = run()
    assert again.history == whole.history and len(whole.history) == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values())
    )


@pytest.mark.parametrize("stops", [1, 5, 9])
def test_resumed_is_the_same_run(whole, tmp_path, stops):
    path, seen = tmp_path / "run.pt", 0

    def interrupted(
        model, x, y
    ):  # stops in the middle of an epoch, after the checkpoint of the step before
        nonlocal seen
        seen += 1
        if seen > stops:
            raise KeyboardInterrupt
        return reconstruction_loss(model, x, y)

    with pytest.raises(KeyboardInterrupt):
        run(path, loss=interrupted)
    step = load_checkpoint(path)["step"]
    assert step == stops or step == stops - stops % 8
    resumed = run(path)
    assert resumed.history == whole.history
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    )


@pytest.mark.parametrize("method", recipes())
def test_every_recipe_trains_stops_and_resumes(method, tmp_path):
    whole = run(method=method, epochs=2)
    with pytest.raises(OutOfTime):
        run(
            tmp_path / "run.pt", method=method, epochs=2, deadline=time.time()
        )  # after its first step
    resumed = run(tmp_path / "run.pt", method=method, epochs=2)
    assert len(whole.history) == 2 and all(
        math.isfinite(row["loss"]) and row["mse"] < 0.25 for row in whole.history
    )
    assert resumed.history == whole.history
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    )


def test_killed_at_a_random_moment(whole, tmp_path):
    path = tmp_path / "run.pt"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_train import run\nfrom pathlib import Path\nrun(Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    load_checkpoint(path)  # whole, whatever was being written
    assert run(path).history == whole.history


def test_the_deadline_saves_then_stops(whole, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(
        OutOfTime, match="out of time at step 1 of 24; last good checkpoint: .*run.pt"
    ):
        run(path, deadline=time.time() - 1)
    assert run(path).history == whole.history
    assert (
        run(path, deadline=time.time() - 1).history == whole.history
    )  # a finished run has nothing left to stop


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path, seen = tmp_path / "run.pt", 0

    def explodes(model, x, y):
        nonlocal seen
        seen += 1
        loss, parts = reconstruction_loss(model, x, y)
        return (loss * float("inf") if seen == 12 else loss), parts

    with pytest.raises(
        NonFiniteLoss, match="the loss was inf at step 12 of 24; last good checkpoint: .*run.pt"
    ):
        run(path, loss=explodes)
    state = load_checkpoint(path)
    assert state["step"] == 11 and all(v.isfinite().all() for v in state["model"].values())


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
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2)) and [
        p.name for p in tmp_path.iterdir()
    ] == ["state.pt"]


def test_groups_cover_every_parameter_once():
    model = Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)
    for kind in ("adamw", "sgd"):
        groups = [
            g
            for o in optimizers(model, Settings(codebook_optimizer=kind, codebook_lr=10.0)).values()
            for g in o.param_groups
        ]
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        book = next(g for g in groups if any(p is model.quantizer.book.weight for p in g["params"]))
        assert (
            len(book["params"]) == 1
            and book["weight_decay"] == 0
            and book["base_lr"] == pytest.approx(1e-2)
        )


def test_sgd_on_the_codebook_is_a_plain_step():
    torch.manual_seed(0)
    model = Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)
    before = model.quantizer.book.weight.detach().clone()
    kept = {}

    def loss(m, x, y):
        out = reconstruction_loss(m, x, y)
        m.quantizer.book.weight.register_hook(lambda g: kept.setdefault("g", g.clone()))
        return out

    fit(
        model,
        loss,
        pictures(8),
        Settings(
            epochs=1, batch_size=8, warmup=0.0, lr=1e-2, codebook_optimizer="sgd", codebook_lr=10.0
        ),
        progress=False,
    )
    assert torch.allclose(model.quantizer.book.weight, before - 0.1 * kept["g"], atol=1e-7)


def test_schedule_rises_then_falls():
    values = [schedule(s, 90, 1 / 9) for s in range(90)]
    assert (
        values.index(max(values)) == 10
        and all(a < b for a, b in zip(values[:10], values[1:11]))
        and all(a > b for a, b in zip(values[10:], values[11:]))
        and values[-1] < 1e-3
    )
    assert schedule(0, 10, 0.0) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"autocast": "bfloat16"},
        {"channels_last": True},
        {"clip": 1.0},
        {"compile": True, "epochs": 1},
        {"autocast": "float16", "epochs": 1},
    ],
)
def test_options_train(more, monkeypatch):
    if more.get(
        "compile"
    ):  # the real compiler takes minutes of C++ on a CPU; this keeps its graph capture and leaves the kernels eager
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda m: compile(m, backend="aot_eager"))
    history = run(epochs=more.pop("epochs", 2), method="vq", **more).history
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history)


def test_clipping_bounds_the_step(monkeypatch):
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        norms.append(float(self.param_groups[0]["params"][0].grad.norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip, norm in ((0.5, 0.5), (None, 3**0.5 * 1e6)):
        norms.clear()
        fit(
            Steep(),
            lambda m, x, y: (1e6 * m.w.sum(), {}),
            pictures(16),
            Settings(epochs=3, batch_size=8, clip=clip),
            progress=False,
        )
        assert norms == pytest.approx([norm] * 6, rel=1e-4)


def test_bad_settings_are_named():
    for bad, words in [
        ({"epochs": 0}, "epochs"),
        ({"warmup": 1.0}, "warmup"),
        ({"codebook_optimizer": "lion"}, "'lion'"),
        ({"autocast": "int8"}, "'int8'"),
    ]:
        with pytest.raises(ValueError, match=words):
            Settings(**bad)
    with pytest.raises(ValueError, match="batch_size must be at most the set's size 64, got 65"):
        fit(nn.Linear(1, 1), reconstruction_loss, pictures(), Settings(batch_size=65))


# ---- what quantizers ask of the loop ----


class Linear(nn.Module):
    "An encoder and a decoder that are matrices, so that every gradient has a closed form."

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer, self.decoder = (
            nn.Linear(48, 4, bias=False),
            quantizer,
            nn.Linear(4, 48, bias=False),
        )

    def forward(self, x):
        quantized = self.quantizer(self.encoder(x.flatten(1)))
        return self.decoder(quantized.z_q), quantized

    def decoder_loss(self, v, x, y=None):
        return (self.decoder(v) - x.flatten(1)).pow(2).mean()


def linear_loss(model, x, y):
    out, quantized = model(x)
    return (out - x.flatten(1)).pow(2).mean() + quantized.loss, {}


def small(n=32):
    return types.SimpleNamespace(
        x=torch.randint(
            0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
        ),
        y=None,
    )


def test_inner_and_outer_steps_share_a_batch_that_they_do_not_divide():
    history = run(
        method="vq + alt", epochs=1, inner=4, outer=1, fused=False
    ).history  # 8 pictures in 5 parts
    assert math.isfinite(history[0]["loss"])


@pytest.mark.parametrize("rule", ["exact", "hessian"])
def test_rules_that_ask_the_decoder_get_it_from_fit(rule):
    "The decoder's loss is quadratic in its input, so both rules give the encoder the gradient of the model without a quantizer."
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
    q = model.quantizer.eval()(x @ start[0].T).z_q
    assert torch.allclose(
        kept["decoder"],
        torch.autograd.grad((q @ decoder.T - x).pow(2).mean(), decoder)[0],
        atol=1e-6,
    )  # it learns from q


@pytest.mark.parametrize("rule", ["exact", "hessian"])
def test_asking_the_decoder_moves_no_running_statistics(rule):
    kept = []
    for how in (rule, straight_through):
        reproducible(0)
        model = Autoencoder(VectorQuantizer(8, 32, rule=how, channel_dim=1), channels=8)
        fit(
            model,
            reconstruction_loss,
            pictures(8),
            Settings(epochs=1, batch_size=8, lr=0.0, weight_decay=0.0),
            progress=False,
        )
        kept.append(
            {k: v for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}
        )
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items()) and all(
        v == 1 for k, v in kept[0].items() if "num_batches" in k
    )


def test_a_rule_that_asks_needs_a_model_that_answers():
    with pytest.raises(ValueError, match=r"must have decoder_loss\(v, x, y\)"):
        fit(
            nn.Sequential(VectorQuantizer(4, 8, rule="exact")),
            linear_loss,
            small(),
            Settings(batch_size=8),
            progress=False,
        )


@pytest.mark.parametrize("rule", [straight_through, synchronized(0.5)])
def test_fused_alternation_step_by_step(rule):
    "Inner: SGD on the commitment loss (and what the last outer step left); outer: the task, with the codes where the inner step has put them."
    reproducible(0)
    model = Linear(VectorQuantizer(4, 8, rule=rule, alpha=2.0, beta=0.9, alternate=True))
    encoder, decoder, table = (
        p.detach().clone()
        for p in (model.encoder.weight, model.decoder.weight, model.quantizer.book.weight)
    )
    data, rate, pending = small(24), 0.3, 0.0
    fit(
        model,
        linear_loss,
        data,
        Settings(
            epochs=1,
            batch_size=8,
            lr=1e-12,
            weight_decay=0.0,
            warmup=0.0,
            codebook_optimizer="sgd",
            codebook_lr=rate * 1e12,
        ),
        progress=False,
    )
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for step, rows in enumerate(
        order.split(8)
    ):  # the network hardly moves at this rate, so its first weights do for all steps
        x = data.x[rows].flatten(1).float() / 255
        z = x @ encoder.T
        codes = torch.cdist(z, table).argmin(1)
        leaf = table.clone().requires_grad_()
        grad = torch.autograd.grad(2.0 * 0.9 * (leaf[codes] - z).pow(2).mean(), leaf)[0] + pending
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

    fit(
        model,
        loss,
        small(12),
        Settings(epochs=1, batch_size=12, inner=2, outer=1, fused=False),
        progress=False,
    )
    assert sizes == [("inner", 4), ("inner", 4), ("outer", 4)]


def test_outer_steps_leave_the_codebook_to_the_inner_step():
    reproducible(0)
    model, grads = Linear(VectorQuantizer(4, 8, alternate=True)), []
    model.quantizer.book.weight.register_hook(lambda g: grads.append(g.abs().sum().item()))
    fit(model, linear_loss, small(8), Settings(epochs=1, batch_size=8), progress=False)
    assert grads[0] > 0 and grads[1:] == [
        0.0
    ]  # the inner step's; straight-through sends the codebook nothing in the outer step


def test_alternation_refuses_what_it_cannot_do():
    model = Linear(VectorQuantizer(4, 8, alternate=True))
    with pytest.raises(ValueError, match="float16"):
        fit(model, linear_loss, small(), Settings(batch_size=8, autocast="float16"))
    with pytest.raises(ValueError, match=r"at least inner \+ outer = 9, got 8"):
        fit(model, linear_loss, small(), Settings(batch_size=8, inner=8))


def test_a_resumed_alternated_run_is_the_same_run(tmp_path):
    "Gradients that wait between steps are part of the checkpoint."

    def go(path=None, stop=None):
        reproducible(0)
        seen = 0

        def loss(m, x, y):
            nonlocal seen
            seen += 1
            if stop and seen > stop:
                raise KeyboardInterrupt
            return linear_loss(m, x, y)

        model = Linear(VectorQuantizer(4, 8, rule=synchronized(0.5), alternate=True))
        return fit(
            model,
            loss,
            small(),
            Settings(epochs=2, batch_size=4),
            checkpoint=path,
            save_every=0.0 if path else 60.0,
            progress=False,
        )

    whole = go()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "a.pt", stop=3)
    resumed = go(tmp_path / "a.pt")
    assert resumed.history == whole.history
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values())
    )


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
    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    model, w, v = Weight(), torch.tensor([1.0, -2.0]), torch.zeros(2)
    fit(
        model,
        lambda m, x, y: (m.w.pow(2).sum() / 2, {}),
        pictures(16),
        Settings(
            epochs=2,
            batch_size=8,
            optimizer="sgd",
            momentum=momentum,
            lr=0.1,
            weight_decay=0.5,
            warmup=0.5,
            decay="constant",
        ),
        progress=False,
    )
    for step in range(4):
        v = (
            momentum * v + w + 0.5 * w
        )  # torch's form: the decay joins the gradient, the rate comes after the momentum
        w = w - 0.1 * schedule(step, 4, 0.5, "constant") * v
    assert torch.allclose(model.w, w, atol=1e-6) and schedule(3, 4, 0.5, "constant") == 1


def test_bad_settings_of_sgd_are_named():
    for bad, words in [
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'sgd', got 'adam'"),
        ({"momentum": 1.0}, "momentum must lie in 0..1, got 1.0"),
        ({"decay": "step"}, "'cosine' or 'constant', got 'step'"),
    ]:
        with pytest.raises(ValueError, match=words):
            Settings(**bad)
