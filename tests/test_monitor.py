"""The monitor: a run with it is the run without it, bit for bit.

Its rows survive a checkpoint; its numbers are those of the instruments alone.
"""

import functools
import math
import time
import types
import pytest
import torch
from torch import nn
from vqstudy.codebook import Affine
from vqstudy.measure import DIVERGENCES, Monitor, divergence, early, gradient_gap
from vqstudy.models import Autoencoder, Classifier, classification_loss, quantized_task
from vqstudy.models import reconstruction_loss
from vqstudy.quantizers import VectorQuantizer, recipe, recipes
from vqstudy.train import OutOfTime, Settings, fit, load_checkpoint, reproducible


def data(n=32, size=32):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)
    return types.SimpleNamespace(x=x, y=torch.arange(n) % 3)


PROBE = data(6).x.flip(0).float() / 255


def monitor(at=early(3, 4), **options):
    "Looks at steps 0, 1, 2 and 4."
    return Monitor(quantized_task, PROBE, torch.arange(6) % 3, at, **options)


def autoencoder(method="vq", **options):
    return Autoencoder(recipe(method, 8, 32, channel_dim=1, **options), channels=8)


def run(method="vq", watch=None, path=None, deadline=None, loss=reconstruction_loss, **more):
    reproducible(0, threads=1, device="cpu")
    model = autoencoder(method, **({"life_span": 2} if "replace" in method else {}))
    model.decoder.append(nn.Dropout(0.1))  # batch norm is there already
    return fit(
        model,
        loss,
        data(),
        Settings(epochs=2, batch_size=8, **more),
        evaluate=lambda m: {"weight": float(m.encoder[0].weight.sum())},
        monitor=watch,
        checkpoint=path,
        deadline=deadline,
        save_every=0.0 if path else 60.0,
        progress=False,
    )


@functools.cache
def uninterrupted():
    "A watched run from the first to the last step."
    return run("vq + replace", monitor())


def same(a, b):
    assert a.history == b.history
    states = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in states)


@pytest.mark.parametrize("method", recipes())
def test_a_run_with_a_monitor_is_the_run_without(method, tmp_path):
    "Every recipe has it; and the same rows after a stop and a resumption."
    watched = run(method, monitor())
    same(watched, run(method))
    assert [row["step"] for row in watched.observed] == [0, 1, 2, 4]
    for row in watched.observed:
        assert all(type(value) is float for name, value in row.items() if name != "step")
    with pytest.raises(OutOfTime):
        run(method, monitor(), tmp_path / "run.pt", time.time())
    resumed = run(method, monitor(), tmp_path / "run.pt")
    same(resumed, watched)
    torch.testing.assert_close(resumed.observed, watched.observed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "more",
    [
        {"inner": 2, "outer": 2, "fused": False},
        {"inner": 3, "fused": False},
        {"clip": 1.0, "channels_last": True},
        {"autocast": "bfloat16"},
    ],
)
def test_under_other_settings_too(more):
    method = "vq + opt + replace + l2" if "inner" in more else "stochastic + replace"
    watched = run(method, monitor(), **more)
    same(watched, run(method, **more))
    assert len(watched.observed) == 4


@pytest.mark.parametrize("stops", [1, 2, 5, 7])
def test_rows_survive_an_interruption_at_any_step(tmp_path, stops):
    whole = uninterrupted()
    watch = monitor()

    def interrupted(model, step):
        row = watch(model, step)
        if step == stops:
            raise KeyboardInterrupt
        return row

    with pytest.raises(KeyboardInterrupt):
        run("vq + replace", interrupted, tmp_path / "run.pt")
    kept = load_checkpoint(tmp_path / "run.pt")
    resumed = run("vq + replace", monitor(), tmp_path / "run.pt")
    same(resumed, whole)
    assert resumed.observed == whole.observed
    assert kept["observed"] == whole.observed[: len(kept["observed"])]
    if len(kept["observed"]) < 4:
        for name, seconds in kept["instruments"].items():
            assert resumed.cost[f"monitor_{name}_seconds"] > seconds
    finished = run("vq + replace", monitor(), tmp_path / "run.pt")  # nothing is left to do
    assert finished.observed == whole.observed


def test_the_cost_is_kept_apart():
    def slow(model, step):
        time.sleep(0.1)
        return {"a": 1.0}, {"nap": 0.1}

    watched = run(watch=slow)
    plain = run()
    assert watched.cost["monitor_nap_seconds"] == pytest.approx(0.8)
    assert watched.cost["train_seconds"] < 0.8 + plain.cost["train_seconds"]
    assert plain.observed == [] and not any("monitor" in name for name in plain.cost)
    for name in ("pass", "gap", "usage", *DIVERGENCES):
        assert f"monitor_{name}_seconds" in uninterrupted().cost


def test_the_numbers_are_those_of_the_instruments():
    reproducible(0)
    model = autoencoder("vq + l2")
    row, _ = monitor()(model, 0)
    gap = gradient_gap(model, quantized_task, PROBE)
    gaps = (gap.total, gap.relative, gap.cosine)
    assert (row["gap"], row["gap_relative"], row["gap_cosine"]) == gaps
    assert {k.removeprefix("gap:"): v for k, v in row.items() if k.startswith("gap:")} == gap.layers
    z = nn.functional.normalize(model.encoder(PROBE).detach().movedim(1, -1).reshape(-1, 8), dim=1)
    book = model.quantizer.codebook.detach()
    codes = torch.cdist(z, book).argmin(1)
    assert row["active_codes"] == len(codes.unique()) and row["usage"] == len(codes.unique()) / 32
    error = float((z - book[codes]).pow(2).mean())
    assert row["quantization_error"] == pytest.approx(error, rel=1e-5)
    sets = {"p": z, "c": book, "q": book[codes.unique()]}
    both_ways = ("pc", "cp", "cq", "qc", "pq", "qp")
    pairs = dict.fromkeys(("nearest", "gaussian_kl"), both_ways)
    pairs |= dict.fromkeys(("sliced_wasserstein", "energy"), ("pc", "cq", "pq"))
    for kind in DIVERGENCES:
        for a, b in pairs[kind]:
            wanted = divergence(sets[a], sets[b], kind)
            assert row[f"{kind}_{a}{b}"] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    little, _ = monitor(layers=False, kinds=["nearest"])(model, 0)
    assert not any(":" in name or "energy" in name for name in little)


def test_the_exact_rule_asks_the_decoder_about_the_probe():
    reproducible(0)
    model = autoencoder("vq + exact")
    model.quantizer.attach(lambda v: 1e6 * v.sum())  # of another batch
    assert monitor()(model, 0)[0]["gap_relative"] < 1e-5
    assert float(model.quantizer.loss_at(torch.ones(2))) == 2e6


@pytest.mark.parametrize("fused", [True, False])
def test_alternation_is_seen_between_the_inner_and_the_outer_step(fused):
    "The codebook has moved, the network has not."
    reproducible(0)
    model = autoencoder("vq + alt")
    table = model.quantizer.book.weight.detach().clone()
    weight = model.encoder[0].weight.detach().clone()
    unmoved = []

    def look(model, step):
        same_table = torch.equal(model.quantizer.book.weight, table)
        unmoved.append((same_table, torch.equal(model.encoder[0].weight, weight)))

    settings = Settings(epochs=1, batch_size=8, lr=1e-2, fused=fused)
    fit(model, reconstruction_loss, data(8), settings, monitor=look, progress=False)
    assert unmoved == [(False, True)]
    assert not torch.equal(model.encoder[0].weight, weight)


def test_two_quantizers_have_a_row_each_and_fused_alternation_looks_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 4)
            self.second = nn.Linear(4, 12)
            self.a = VectorQuantizer(4, 8, alternate=True)
            self.b = VectorQuantizer(4, 16, alternate=True, map=Affine(4))

        def forward(self, x):
            a = self.a(self.first(x.flatten(1)))
            b = self.b(a.z_q.tanh())
            return self.second(b.z_q), a.loss + b.loss

    def task(model, x, y):
        return (model(x)[0] - x.flatten(1)).pow(2).mean()

    def loss(model, x, y):
        return task(model, x, y) + model(x)[1], {}

    reproducible(0)
    settings = Settings(epochs=1, batch_size=8)
    watch = Monitor(task, data(9, 2).x / 255)
    fitted = fit(Two(), loss, data(16, 2), settings, monitor=watch, progress=False)
    assert [row["step"] for row in fitted.observed] == [0, 1]
    names = {"a:usage", "b:usage", "a:nearest_cq", "b:energy_pq", "gap:first"}
    assert names <= set(fitted.observed[0])


def test_a_collapsed_codebook_and_encoder_leave_finite_numbers():
    reproducible(0)
    model = autoencoder()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.zero_()
        model.quantizer.book.weight.zero_()
    row, _ = monitor()(model, 0)
    assert row["active_codes"] == 1
    assert row["quantization_error"] == row["nearest_cq"] == 0
    for name, value in row.items():
        if name.startswith(("gaussian", "energy", "sliced")):
            assert math.isfinite(value), name


def test_a_classifier_under_sgd_is_watched(tmp_path):
    sgd = dict(optimizer="sgd", momentum=0.9, codebook_optimizer="sgd", lr=0.1)
    settings = Settings(epochs=1, batch_size=16, warmup=0.0, decay="constant", **sgd)
    revived = dict(init="kmeans", life_span=1)

    def train(watch):
        reproducible(0)
        model = Classifier(recipe("vq + replace", 128, 16, channel_dim=1, **revived), 3)
        return fit(model, classification_loss, data(), settings, monitor=watch, progress=False)

    watched = train(monitor(at=range(9)))
    same(watched, train(None))
    assert [row["step"] for row in watched.observed] == [0, 1]
    assert "gap:encoder.6.0.conv1" in watched.observed[0]
    assert not any("decoder" in name for name in watched.observed[0])
