"""A decoder that draws by flow matching: its loss, solvers and codes, and a resumed training."""

import time
import types
from functools import partial
import pytest
import torch
from vqstudy.autoencoders import Autoencoder
from vqstudy.checkpoint import reproducible
from vqstudy.flow import KINDS, SOLVERS, FlowDecoder, UNet, decode, decoder_loss, flow_loss
from vqstudy.flow import integrate, latents_of, noised
from vqstudy.flow_scores import decoder_scores
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.train import OutOfTime, fit

DIM, CODES, SIZE = 8, 16, 32


def images(n=24):
    "Each of one colour of its own, so that a code can tell it."
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 256, (n, 3, 1, 1), dtype=torch.uint8, generator=generator)
    return colours.expand(n, 3, SIZE, SIZE).contiguous()


def tokenizer():
    torch.manual_seed(1)
    return Autoencoder(recipe("router", DIM, CODES, channel_dim=1), SIZE, DIM)


def decoder(kind, book):
    torch.manual_seed(2)
    return FlowDecoder(kind, UNet(DIM, 8), book if kind == "end-to-end" else None)


def train(kind, lengths=(6,), path=None, deadline=None, lr=3e-3):
    "A short training, and the codes of its images."
    reproducible(0)
    x, book = images(), tokenizer()
    model = decoder(kind, book)
    table = None if kind == "end-to-end" else latents_of(book, x)
    data = types.SimpleNamespace(x=x, y=torch.arange(len(x)))
    settings = Settings(lengths=lengths, warmup_updates=2, batch_size=8, lr=lr)
    options = dict(checkpoint=path, save_every=0.0, deadline=deadline, progress=False)
    fitted = fit(model, partial(decoder_loss, table=table), data, settings, **options)
    return fitted, table or latents_of(model, x)


# ---- the loss ----

A, B = -0.8, 1.3  # the two images, of one pixel


def best(x_t, t):
    "The velocity whose loss is least: (x_t - E[x | x_t]) / t."
    far = [-(x_t - (1 - t) * image).square() / (2 * t.square()) for image in (A, B)]
    share = torch.softmax(torch.stack(far), 0)
    return (x_t - share[0] * A - share[1] * B) / t


def two_points(n=200_000):
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(n, generator=generator) < 0.5
    x = torch.where(first, A, B).double().view(-1, 1, 1, 1)
    t = 0.05 + 0.95 * torch.rand(n, generator=generator, dtype=torch.float64)
    return x, t, torch.randn(x.shape, generator=generator, dtype=torch.float64)


BESIDE = {
    "shifted": lambda x, t: 0.3 + 0 * x,
    "wavy": lambda x, t: torch.sin(3 * x),
    "in time": lambda x, t: x * (1 - t),
}


@pytest.mark.parametrize("name", BESIDE)
def test_the_loss_is_least_at_the_closed_form(name):
    "Whatever is added to it costs its own mean square: the gradient there is zero."
    x, t, eps = two_points()
    added = BESIDE[name](noised(x, eps, t), t.view(-1, 1, 1, 1))
    scale = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    net = lambda x_t, at, _: best(x_t, at.view(-1, 1, 1, 1)) + scale * added  # noqa: E731
    loss = flow_loss(net, x, None, t, eps)
    (slope,) = torch.autograd.grad(loss, scale)
    size = added.square().mean()
    spread = 2 * (loss.detach() * size / len(x)).sqrt()  # about the slope's standard error
    assert slope.abs() < 4 * spread
    with torch.no_grad():
        scale.fill_(1.0)
    more = flow_loss(net, x, None, t, eps) - loss
    torch.testing.assert_close(more.detach(), size, rtol=0, atol=float(4 * spread))


def test_noise_and_time_of_the_loss():
    x, eps = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.0, 0.25, 0.75, 1.0])
    seen = []
    zero = flow_loss(lambda *given: seen.append(given) or eps - x, x, x, t, eps)
    assert zero == 0 and seen[0][2] is x
    torch.testing.assert_close(seen[0][0][1], 0.75 * x[1] + 0.25 * eps[1])


# ---- the solvers ----


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("start", [1.0, 0.4])
def test_a_constant_velocity_is_followed_exactly(solver, steps, start):
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    v = torch.randn_like(x)
    found = integrate(lambda x, t: v, x, start, steps, solver)
    torch.testing.assert_close(found, x - start * v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_on_a_gaussian(solver, order):
    "Its flow keeps the distance from the mean in standard deviations."
    m, s = -0.7, 0.4

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    start = torch.linspace(-3, 3, 13, dtype=torch.float64)
    each = [integrate(velocity, start, 1.0, n, solver) for n in (32, 64, 128)]
    errors = [float((found - (m + s * start)).abs().max()) for found in each]
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.85 * 2**order < coarse / fine < 1.15 * 2**order


# ---- the network ----


def test_a_million_parameters_whatever_the_kind():
    counts = set()
    for kind in KINDS:
        model = FlowDecoder(kind, UNet(64, 32), tokenizer() if kind == "end-to-end" else None)
        counts.add(sum(p.numel() for p in model.net.parameters()))
    (count,) = counts
    assert 0.9e6 < count < 1.1e6


def test_what_each_kind_looks_at():
    book = tokenizer()
    x, other = torch.randn(2, 2, 3, SIZE, SIZE)
    latents, others = torch.randn(2, 2, DIM, 8, 8)
    t = torch.tensor([0.3, 0.9])
    for kind in KINDS:
        model = decoder(kind, book)
        out = model(x, t, latents)
        sees = dict(
            image=not torch.equal(model(other, t, latents), out),
            codes=not torch.equal(model(x, t, others), out),
        )
        wanted = dict(image=kind != "deterministic", codes=kind != "unconditioned")
        assert sees == wanted, kind


def test_end_to_end_the_gradient_reaches_encoder_codes_and_keys():
    model = decoder("end-to-end", tokenizer())
    decoder_loss(model, images().float() / 255)[0].backward()
    learns = [model.encoder[0].weight, model.quantizer.book.weight, model.quantizer.keys]
    assert all(p.grad.abs().sum() > 0 for p in learns)
    assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_table_gives_what_the_tokenizer_gives():
    book, x = tokenizer(), images()
    book.train()
    table = latents_of(book, x, batch_size=5)
    assert all(m.training for m in book.modules())
    with torch.no_grad():
        quantized = book.eval()(x.float() / 255).quantized
    assert torch.equal(table.codes, quantized.codes)
    assert torch.equal(table.rows(slice(None)), quantized.z_q)


# ---- trainings ----


def test_permuted_codes_give_other_pictures():
    "And worse ones: after a short training the code says the colour."
    fitted, table = train("flow", (150,))
    model, x = fitted.model.eval(), images().float() / 255
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    order = torch.roll(torch.arange(len(x)), 1)
    with torch.no_grad():
        own, other = (decode(model, table.rows(rows), eps, 8) for rows in (torch.arange(24), order))
    assert (own - other).abs().mean() > 0.02
    # of the mean colours, as noise of single pixels is not what the codes decide;
    # were the codes not looked at, the two would be equal
    far, farther = ((y - x).mean((2, 3)).square().mean() for y in (own, other))
    assert far < 0.8 * farther, (far, farther)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_the_same_bit_for_bit(kind, tmp_path):
    whole, _ = train(kind)
    path = tmp_path / "checkpoint.pt"
    for _ in range(20):
        try:
            parts, _ = train(kind, path=path, deadline=time.time() - 1)
            break
        except OutOfTime:
            assert path.is_file()
    states = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    losses = ([row["task_loss"] for row in fitted.history] for fitted in (whole, parts))
    assert next(losses) == next(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_each_kind(kind):
    fitted, table = train(kind)
    model, x = fitted.model.eval(), images()
    scores = decoder_scores(model, table, x, 2, 3, levels=[1.0, 0.5, 0.0], side=32)
    again = decoder_scores(model, table, x, 2, 3, levels=[1.0, 0.5, 0.0], side=32)
    assert scores == again
    assert scores["sample_mse"] == pytest.approx(scores["mean_mse"] + scores["sample_variance"])
    has = {name for name in scores if name.startswith(("loss_at", "mse_from", "velocity"))}
    wanted = {"velocity_loss", "loss_at_1", "loss_at_0.5"}
    wanted |= {"mse_from_1", "mse_from_0.5", "mse_from_0"}
    assert has == (set() if kind == "deterministic" else wanted)
