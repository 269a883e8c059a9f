"""The loop: same seed same record, a run killed at any moment and resumed is the same run, faults that lose nothing."""
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
from vqstudy.quantizers import recipe
from vqstudy.scores import reconstruction_scores
from vqstudy.train import NonFiniteLoss, OutOfTime, Settings, fit, load_checkpoint, optimizers, reproducible, save_checkpoint, schedule

METHOD = "vq + rotation + replace"  # draws random numbers in training, so that a forgotten random state would show


def pictures(n=64):
    g = torch.Generator().manual_seed(3)
    return types.SimpleNamespace(x=torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), y=None)


def run(path=None, deadline=None, method=METHOD, epochs=3, loss=reconstruction_loss, **more):
    reproducible(0, threads=1, device="cpu")
    model = Autoencoder(recipe(method, 8, 32, channel_dim=1, **({"life_span": 2} if "replace" in method else {})), channels=8)
    test = pictures(16).x
    return fit(model, loss, pictures(), Settings(epochs=epochs, batch_size=8, **more), evaluate=lambda m: reconstruction_scores(m, test),
               checkpoint=path, deadline=deadline, save_every=0.0 if path else 60.0, progress=False)


@pytest.fixture(scope="module")
def whole(): return run()


def test_same_seed_same_record(whole):
    again = run()
    assert again.history == whole.history and len(whole.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values()))


@pytest.mark.parametrize("stops", [1, 5, 9])
def test_resumed_is_the_same_run(whole, tmp_path, stops):
    path, seen = tmp_path / "run.pt", 0
    def interrupted(model, x, y):  # stops in the middle of an epoch, after the checkpoint of the step before
        nonlocal seen
        seen += 1
        if seen > stops: raise KeyboardInterrupt
        return reconstruction_loss(model, x, y)
    with pytest.raises(KeyboardInterrupt): run(path, loss=interrupted)
    step = load_checkpoint(path)["step"]
    assert step == stops or step == stops - stops % 8
    resumed = run(path)
    assert resumed.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()))


def test_killed_at_a_random_moment(whole, tmp_path):
    path = tmp_path / "run.pt"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_train import run\nfrom pathlib import Path\nrun(Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() and process.poll() is None: time.sleep(0.01)
    time.sleep(0.15)
    process.send_signal(signal.SIGKILL); process.wait()
    load_checkpoint(path)  # whole, whatever was being written
    assert run(path).history == whole.history


def test_the_deadline_saves_then_stops(whole, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(OutOfTime, match="out of time at step 1 of 24; last good checkpoint: .*run.pt"): run(path, deadline=time.time() - 1)
    assert run(path).history == whole.history
    assert run(path, deadline=time.time() - 1).history == whole.history  # a finished run has nothing left to stop


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path, seen = tmp_path / "run.pt", 0
    def explodes(model, x, y):
        nonlocal seen
        seen += 1
        loss, parts = reconstruction_loss(model, x, y)
        return (loss * float("inf") if seen == 12 else loss), parts
    with pytest.raises(NonFiniteLoss, match="the loss was inf at step 12 of 24; last good checkpoint: .*run.pt"): run(path, loss=explodes)
    state = load_checkpoint(path)
    assert state["step"] == 11 and all(v.isfinite().all() for v in state["model"].values())


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(path, epochs=1)
    with pytest.raises(ValueError, match="lr is 0.5 and was 0.001"): run(path, epochs=1, lr=0.5)


def test_a_torn_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"a": torch.ones(2)})
    with pytest.raises(Exception): save_checkpoint(path, {"a": lambda: None})  # cannot be pickled
    assert torch.equal(load_checkpoint(path)["a"], torch.ones(2)) and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_groups_cover_every_parameter_once():
    model = Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)
    for kind in ("adamw", "sgd"):
        groups = [g for o in optimizers(model, Settings(codebook_optimizer=kind, codebook_lr=10.0)) for g in o.param_groups]
        ids = [id(p) for g in groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())
        book = next(g for g in groups if any(p is model.quantizer.book.weight for p in g["params"]))
        assert len(book["params"]) == 1 and book["weight_decay"] == 0 and book["base_lr"] == pytest.approx(1e-2)


def test_sgd_on_the_codebook_is_a_plain_step():
    torch.manual_seed(0)
    model = Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)
    before = model.quantizer.book.weight.detach().clone()
    kept = {}
    def loss(m, x, y):
        out = reconstruction_loss(m, x, y)
        m.quantizer.book.weight.register_hook(lambda g: kept.setdefault("g", g.clone()))
        return out
    fit(model, loss, pictures(8), Settings(epochs=1, batch_size=8, warmup=0.0, lr=1e-2, codebook_optimizer="sgd", codebook_lr=10.0), progress=False)
    assert torch.allclose(model.quantizer.book.weight, before - 0.1 * kept["g"], atol=1e-7)


def test_schedule_rises_then_falls():
    values = [schedule(s, 90, 1 / 9) for s in range(90)]
    assert values.index(max(values)) == 10 and all(a < b for a, b in zip(values[:10], values[1:11])) and all(a > b for a, b in zip(values[10:], values[11:])) and values[-1] < 1e-3
    assert schedule(0, 10, 0.0) == 1


@pytest.mark.parametrize("more", [{"autocast": "bfloat16"}, {"channels_last": True}, {"clip": 1.0}, {"compile": True, "epochs": 1}, {"autocast": "float16", "epochs": 1}])
def test_options_train(more, monkeypatch):
    if more.get("compile"):  # the real compiler takes minutes of C++ on a CPU; this keeps its graph capture and leaves the kernels eager
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda m: compile(m, backend="aot_eager"))
    history = run(epochs=more.pop("epochs", 2), method="vq", **more).history
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in history)


def test_clipping_bounds_the_step():
    class Steep(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(3))
    norms = []
    def loss(m, x, y):
        if m.w.grad is not None: norms.append(float(m.w.grad.norm()))
        return 1e6 * m.w.sum(), {}
    fit(Steep(), loss, pictures(16), Settings(epochs=3, batch_size=8, clip=0.5), progress=False)
    assert norms == pytest.approx([0.5] * 5, rel=1e-4)


def test_bad_settings_are_named():
    for bad, words in [({"epochs": 0}, "epochs"), ({"warmup": 1.0}, "warmup"), ({"codebook_optimizer": "lion"}, "'lion'"), ({"autocast": "int8"}, "'int8'")]:
        with pytest.raises(ValueError, match=words): Settings(**bad)
    with pytest.raises(ValueError, match="batch_size must be at most the set's size 64, got 65"):
        fit(nn.Linear(1, 1), reconstruction_loss, pictures(), Settings(batch_size=65))
