"""A decoder that samples by flow matching: loss, solvers, codes, sweeps, a resumed training."""

import types
from functools import partial
import pytest
import torch
import torch.nn.functional as F
from resuming import assert_same_training, in_parts
from vqstudy import cells
from vqstudy.autoencoders import Autoencoder
from vqstudy.checkpoint import reproducible
from vqstudy.flow import KINDS, SOLVERS, Block, FlowDecoder, UNet, decode, decoder_loss, flow_loss
from vqstudy.flow import integrate, latents_of, noised
from vqstudy.flow_scores import decoder_scores, image_noise, noise_losses, steps_from
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.train import fit

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_draws_times_and_then_noise(kind):
    "Of images in -1..1."
    model = decoder(kind, tokenizer())
    x, latents = images(4).float() / 255, torch.randn(4, DIM, 8, 8)
    torch.manual_seed(7)
    found = model.task_loss(x, latents)
    torch.manual_seed(7)
    t, eps = torch.rand(4), torch.randn(x.shape)
    if kind == "deterministic":
        wanted = F.mse_loss(model.net(0 * x, 0 * t, latents), 2 * x - 1)
    else:
        seen = 0 * latents if kind == "unconditioned" else latents
        wanted = flow_loss(model.net, 2 * x - 1, seen, t, eps)
    assert torch.equal(found, wanted)


def test_a_table_of_codes_is_for_all_but_end_to_end():
    book, x = tokenizer(), images(4)
    table = latents_of(book, x)
    for kind in KINDS:
        wrong = table if kind == "end-to-end" else None
        with pytest.raises(ValueError, match=f"table must be given .* '{kind}'"):
            decoder_loss(decoder(kind, book), x.float() / 255, torch.arange(4), wrong)


def test_losses_are_taken_at_their_times():
    "A network that says x_t errs by (2 - t) x + (t - 1) eps."
    x, book = images(6), tokenizer()
    model, table = decoder("flow", book), latents_of(book, x)
    model.forward = lambda y, t, latents: y
    found = noise_losses(model, table, x, [1.0, 0.75, 0.3, 0.0])
    real, eps = 2 * (x.double() / 255) - 1, image_noise(range(6), 0, x.shape[1:]).double()
    spread = ((torch.arange(6) + 0.5) / 6).view(-1, 1, 1, 1)
    times = {"velocity_loss": spread, "loss_at_1": 1.0, "loss_at_0.75": 0.75, "loss_at_0.3": 0.3}
    assert found.keys() == times.keys()
    for name, t in times.items():
        wanted = float(((2 - t) * real + (t - 1) * eps).square().mean())
        assert found[name] == pytest.approx(wanted, rel=1e-5), name


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", [1.0, 0.7, 0.3])
def test_along_the_known_velocity_the_image_comes_back(solver, start):
    x = images(3).float() / 255
    eps, latents = torch.randn(x.shape), torch.randn(3, DIM, 8, 8)
    model = decoder("flow", tokenizer())
    model.forward = lambda y, t, given: eps - (2 * x - 1)
    steps = steps_from(10, start)
    torch.testing.assert_close(decode(model, latents, eps, steps, solver, start, x), x)
    if start == 1:
        torch.testing.assert_close(decode(model, latents, eps, steps, solver), x)
    else:
        with pytest.raises(ValueError, match="start must be 1 where there are no images"):
            decode(model, latents, eps, steps, solver, start)


def test_steps_from_a_level_are_no_longer_than_those_from_noise():
    for steps in (1, 4, 20, 50):
        for level in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0):
            count = steps_from(steps, level)
            assert 1 <= count <= steps and level / count <= 1 / steps + 1e-12


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
        for block in (m for m in model.modules() if isinstance(m, Block)):
            torch.nn.init.normal_(block.second.weight, std=0.1)  # it begins without a say
        out = model(x, t, latents)
        sees = dict(
            image=not torch.equal(model(other, t, latents), out),
            codes=not torch.equal(model(x, t, others), out),
            time=not torch.equal(model(x, t / 2, latents), out),
        )
        is_flow = kind != "deterministic"
        wanted = dict(image=is_flow, codes=kind != "unconditioned", time=is_flow)
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
    parts = in_parts(lambda **how: train(kind, **how)[0], tmp_path / "checkpoint.pt")
    assert_same_training(whole, parts)


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


# ---- the sweeps ----


@pytest.mark.parametrize("width", [16, 256])
def test_other_widths_stand_on_the_router_s_own_cells_at_gpu_alone(width):
    codes, decoders = f"kalomaze_flow_codes_{width}", f"kalomaze_flow_decoder_{width}"
    router = {cell.id for cell in cells.plan("kalomaze_router", "gpu")}
    planned = cells.plan(codes, "gpu")
    assert {cell.parameters["code_dim"] for cell in planned} == {width}
    assert {cell.id for cell in planned} <= router
    parents = {cell.parents["tokenizer"].id for cell in cells.plan(decoders, "gpu")}
    assert parents == {cell.id for cell in planned}
    assert all(cells.sweep(name)["scales"].keys() == {"gpu"} for name in (codes, decoders))


def test_the_searches_for_rates_differ_in_their_kind_alone():
    "And in the metric; their seed is none that is reported."
    searches = ("kalomaze_flow_rate", "kalomaze_flow_deterministic_rate")
    flow, once = ([c.parameters | {"kind": ""} for c in cells.plan(n, "desk")] for n in searches)
    assert flow == once and all(setting["validation"] for setting in flow)
    reported = {cell.parameters["seed"] for cell in cells.plan("kalomaze_flow_decoder", "desk")}
    assert not reported & {setting["seed"] for setting in flow}
