"""Posterior collapse: likelihood, masks, latents and their scores against oracles; resuming."""

import json
import math
import types
from functools import partial
import notebooks
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence
from resuming import assert_same_training, in_parts
from vqstudy import cells
from vqstudy.checkpoint import reproducible
from vqstudy.collapse import DECODERS, MODELS, CodeLatents, GaussianLatents, MaskedConv2d, NoLatents
from vqstudy.collapse import PatchModel, PixelDecoder, collapse_loss, drawn_image, drawn_level
from vqstudy.collapse import grey_patches, kl_nats, logistic_nats, patch_model, receptive_field
from vqstudy.data import photos
from vqstudy.latent_scores import BATCH, active_units, code_bits, latent_scores, latents_of
from vqstudy.latent_scores import picture_scores, pictures_of, pixel_bits, posterior_bits
from vqstudy.latent_scores import priced_bits
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.stats import load_claims
from vqstudy.train import fit

NAMES = dict(decoder="weak", latent_dim=3, width=8, kl_weight=1.0, anneal_updates=6, free_bits=0.5)
NAMES |= dict(quantizer="vq + ema + replace", num_codes=6, alpha=1.25, beta=0.8)
PATCHES = grey_patches(photos("test"))


def make(kind="vae", decoder="weak", seed=0, **changes):
    torch.manual_seed(seed)
    return patch_model(NAMES | {"model": kind, "decoder": decoder} | changes)


def grey(n=4, side=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, side, side), generator=generator) / 255


# ---- patches ----


def test_a_patch_is_a_square_of_its_image_in_grey():
    data = photos("test")
    luma = (data.x[:40].double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    for image, patch in zip(luma, PATCHES.x[:40, 0].double()):
        windows = image.unfold(0, 16, 1).unfold(1, 16, 1)
        far = (windows - patch).abs().amax((2, 3))
        assert far.min() <= 0.5 + 1e-6
    again = grey_patches(photos("test"))
    assert torch.equal(again.x, PATCHES.x) and again.y is None


def test_patches_lie_at_different_places():
    row = torch.arange(32, dtype=torch.uint8)
    x = row[:, None].expand(300, 3, 32, 32).contiguous()
    data = types.SimpleNamespace(x=x)
    cut = grey_patches(photos("test")).x.shape
    assert cut == (448, 3, 16, 16)
    tops = grey_patches_of(data.x)[:, 0, 0, 0]
    assert set(tops.tolist()) == set(range(17))


def grey_patches_of(x):
    "Of images that are not in a set."
    data = photos("test")
    return grey_patches(type(data)(x, None, ())).x


# ---- the likelihood of a pixel ----


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_a_pixel_s_likelihood_is_the_logistic_distribution_in_bins(levels):
    x = torch.arange(levels, dtype=torch.float64)[:, None] / (levels - 1)
    mean = torch.tensor([-0.2, 0.31, 0.5, 1.1], dtype=torch.float64)
    half = 0.5 / (levels - 1)
    for log_scale in (-4.0, -2.0, 0.3):
        cdf = stats.logistic(loc=mean.numpy(), scale=math.exp(log_scale)).cdf
        ends = cdf((x + half).numpy()), cdf((x - half).numpy())
        ends[0][-1], ends[1][0] = 1, 0
        found = (-logistic_nats(x, mean, torch.full_like(mean, log_scale), levels)).exp()
        torch.testing.assert_close(found, torch.from_numpy(ends[0] - ends[1]), rtol=1e-6, atol=1e-9)


def test_a_pixel_far_from_its_mean_has_a_finite_loss_and_gradient():
    mean = torch.tensor([0.0, 0.0, 5.0, -5.0], requires_grad=True)
    x = torch.tensor([1.0, 0.5, 0.0, 1.0])
    nats = logistic_nats(x, mean, torch.full((4,), -7.0))
    nats.sum().backward()
    assert nats.isfinite().all() and mean.grad.isfinite().all() and (mean.grad != 0).all()


def test_levels_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    mean, log_scale = torch.tensor(0.6), torch.tensor(-1.0)
    x = torch.arange(5) / 4
    p = (-logistic_nats(x, mean, log_scale, 5)).exp().double()
    drawn = (drawn_level(mean.expand(20_000), log_scale, 5) * 4).round().long()
    counts = torch.bincount(drawn, minlength=5).numpy()
    assert stats.chisquare(counts, (p / p.sum() * 20_000).numpy()).pvalue > 1e-3


# ---- masks and receptive fields ----


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("place", [(0, 0), (2, 14), (9, 8), (15, 15)])
def test_a_pixel_s_distribution_has_a_gradient_by_its_receptive_field_alone(layers, place):
    torch.manual_seed(layers)
    decoder = PixelDecoder(2, 8, layers).double()
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    told = sum(part[0, 0, place[0], place[1]] for part in decoder(z, x))
    (grad,) = torch.autograd.grad(told, x, allow_unused=True)
    seen = torch.zeros(16, 16, dtype=torch.bool) if grad is None else grad[0, 0] != 0
    field, wanted = receptive_field(layers), torch.zeros(16, 16, dtype=torch.bool)
    for up in range(layers + 1):
        for right in range(-layers, layers + 1):
            row, column = place[0] - up, place[1] + right
            if 0 <= row and 0 <= column < 16:
                wanted[row, column] = field[layers - up, layers + right]
    # at the edges a path may leave the image, where there is no pixel to go through
    inside = place[0] >= layers and layers <= place[1] < 16 - layers
    assert not (seen & ~wanted).any()
    assert not inside or torch.equal(seen, wanted)
    flat = place[0] * 16 + place[1]
    assert not seen.flatten()[flat:].any()


def test_a_mask_with_the_pixel_itself_would_be_found():
    first, later = (MaskedConv2d(1, 1, first) for first in (True, False))
    x = torch.rand(1, 1, 5, 5, requires_grad=True)
    for layer, own in ((first, 0), (later, 1)):
        (grad,) = torch.autograd.grad(layer(x)[0, 0, 2, 2], x)
        seen = (grad[0, 0] != 0).flatten()
        assert seen[12] == own and not seen[13:].any() and seen.sum() == 4 + own


@pytest.mark.parametrize("decoder", DECODERS)
def test_all_decoders_see_their_latents(decoder):
    model = make(decoder=decoder)
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    told = sum(part[0, 0, 7, 7] for part in model.decoder(z, grey(1)))
    (grad,) = torch.autograd.grad(told, z)
    assert (grad[0, :, 1, 1] != 0).all()


# ---- images that are drawn ----


def tiny(layers):
    "A decoder of images of 4 x 4 pixels in black and white, all 65,536 of them, and latents."
    torch.manual_seed(0)
    decoder = PixelDecoder(2, 4, layers)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(1.5)
        for layer in decoder.masked:
            layer.weight.mul_(4.0)
        decoder.head[-1].bias.zero_()
    bits = torch.arange(2**16)[:, None] >> torch.arange(15, -1, -1) & 1
    return decoder, torch.randn(1, 2, 1, 1), bits.float().view(-1, 1, 4, 4)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_drawing_agrees_with_the_likelihood_where_all_images_can_be_listed(layers):
    "Their probabilities sum to one; what is drawn has their entropy, and each pixel its share."
    decoder, z, every = tiny(layers)
    with torch.no_grad():
        each = logistic_nats(every, *decoder(z.expand(len(every), -1, -1, -1), every), 2)
        nats = each.double().sum((1, 2, 3))
        torch.manual_seed(4)
        n = 4000
        made = drawn_image(decoder, z.expand(n, -1, -1, -1), 2)
        own = logistic_nats(made, *decoder(z.expand(n, -1, -1, -1), made), 2).double()
        own = own.sum((1, 2, 3))
    p = (-nats).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    entropy = float((p * nats).sum())
    assert float(own.mean()) == pytest.approx(entropy, abs=4 * float(own.std()) / n**0.5)
    share = (p[:, None, None, None] * every).sum(0)
    assert (made.mean(0) - share).abs().max() < 4 * 0.5 / n**0.5
    # two pixels at once, which masks that let too much through would get wrong
    pair = (p[:, None] * every.flatten(1) * every.flatten(1).roll(1, 1)).sum(0)
    both = (made.flatten(1) * made.flatten(1).roll(1, 1)).mean(0)
    assert (both - pair).abs().max() < 4 * 0.5 / n**0.5


def test_layers_make_pixels_depend_on_one_another():
    "Or the test above would say nothing of masked layers."
    for layers, least, most in ((0, 0, 1e-6), (3, 0.1, 2)):
        decoder, z, every = tiny(layers)
        with torch.no_grad():
            means = decoder(z.expand(64, -1, -1, -1), every[::1024])[0]
        assert least <= float(means[:, 0, 3, 3].std()) <= most


# ---- latents: gradients, price, free bits ----


def test_the_kl_is_torch_s():
    torch.manual_seed(0)
    mean, log_var = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    theirs = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl_nats(mean, log_var), theirs)
    assert float(kl_nats(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))) == 0


@pytest.mark.parametrize("decoder", ["plain", "weak", "strong"])
def test_the_gradient_of_a_vae_is_that_of_float64_differences(decoder):
    "Through the sample, the decoder, the likelihood and the KL, to the encoder's output."
    model = make(decoder=decoder).double()
    x = grey(2, 8).double()
    h = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)

    def bound(h):
        torch.manual_seed(5)  # the same noise each time
        latents = model.latents(h)
        return model.pixel_nats(latents.z, x).mean() + latents.cost / 64

    assert torch.autograd.gradcheck(bound, h, eps=1e-6, atol=1e-7)


def test_the_gradient_of_the_kl_by_its_closed_form():
    torch.manual_seed(0)
    h = torch.randn(7, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(GaussianLatents(3, beta=0.5)(h).cost, h)
    mean, log_var = h.detach().chunk(2, 1)
    wanted = 0.5 * torch.cat([mean, 0.5 * (log_var.exp() - 1)], 1) / 7
    torch.testing.assert_close(grad, wanted)


def test_the_sample_has_the_posterior_s_moments():
    torch.manual_seed(0)
    h = torch.cat([torch.full((20_000, 2, 1, 1), 1.5), torch.full((20_000, 2, 1, 1), -1.0)], 1)
    z = GaussianLatents(2)(h).z
    assert float(z.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(z.var()) == pytest.approx(math.exp(-1), abs=0.02)


def test_free_bits_have_no_gradient_under_the_floor_and_the_full_one_above():
    "The floor is of the batch's mean at each place, not of each image."
    torch.manual_seed(0)
    h = 0.5 * torch.randn(6, 4, 1, 3)
    h[:, :2, :, 1] += 3.0
    h[0, :2, :, 2] += 1.5  # one image alone is above
    h.requires_grad_()
    floor = 1.0
    below = kl_nats(*h.chunk(2, 1)).detach()
    assert (below.mean(0)[0] < floor).tolist() == [True, False, True] and below[0, 0, 2] > floor
    (grad,) = torch.autograd.grad(GaussianLatents(2, free_nats=floor)(h).cost, h)
    (full,) = torch.autograd.grad(GaussianLatents(2)(h).cost, h)
    assert (grad[..., 0] == 0).all() and (grad[..., 2] == 0).all()
    assert torch.equal(grad[..., 1], full[..., 1]) and (full[..., 0] != 0).any()
    cost = GaussianLatents(2, free_nats=floor)(h.detach()).cost
    assert float(cost) == pytest.approx(2 * floor + float(below.mean(0)[0, 1]), rel=1e-6)


def test_the_price_rises_linearly_and_measuring_does_not_count():
    model = make("vae + annealing", kl_weight=2.0)
    prices = []
    for _ in range(8):
        prices.append(float(model.latents.price()))
        collapse_loss(model, grey().expand(-1, 3, -1, -1))
        latent_scores(model, PATCHES.x[:3])
    assert prices == pytest.approx([2 * min(1, i / 6) for i in range(8)])
    assert [float(make().latents.price()), float(make("vae + free bits").latents.price())] == [1, 1]


def test_the_loss_by_hand():
    for kind in MODELS:
        model = make(kind).eval()
        x = grey()
        torch.manual_seed(2)
        loss, parts = collapse_loss(model, x.expand(-1, 3, -1, -1))
        torch.manual_seed(2)
        nats, latents = model(x)
        wanted = nats.mean() + latents.loss
        if latents.mean is not None:
            floor = 0.5 * math.log(2) if kind == "vae + free bits" else 0
            kl = kl_nats(latents.mean, latents.log_var).mean(0)
            price = 0 if kind == "vae + annealing" else 1
            wanted = wanted + price * kl.clamp(min=floor).sum() / 256
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(parts["task_loss"], nats.mean())
        # what is charged, not what it would cost: nothing for a code, nothing while the price is 0
        charged = (loss - nats.mean() - latents.loss) * 256 / 16 / math.log(2)
        torch.testing.assert_close(parts["charged_bits"], charged, atol=1e-4, rtol=1e-4)
        assert (float(parts["charged_bits"]) == 0) == (kind in ("vae + annealing", "vqvae", "none"))


def test_a_code_costs_the_same_whatever_it_says():
    model = make("vqvae")
    latents = model.encode(grey())
    torch.testing.assert_close(latents.nats, torch.full((4, 4, 4), math.log(6)))
    assert float(latents.cost) == 0 and not latents.cost.requires_grad
    loss, _ = collapse_loss(model, grey().expand(-1, 3, -1, -1))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())


def test_no_latents_say_nothing():
    model = make("none")
    x = grey()
    with torch.no_grad():
        torch.testing.assert_close(model(x).nats, model.pixel_nats(torch.zeros(4, 3, 4, 4), x))


# ---- scores ----


@pytest.mark.parametrize("s, sigma", [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.4)])
def test_the_information_of_a_gaussian_lies_between_its_bounds(s, sigma):
    "Within what 1,500 images vary; d numbers say d times as much."
    for d in (1, 3):
        torch.manual_seed(d)
        mean = s * torch.randn(1500, d, 2, 1)
        log_var = torch.full_like(mean, 2 * math.log(sigma))
        z = mean + sigma * torch.randn_like(mean)
        lower, upper = posterior_bits(z, mean, log_var)
        truth = d * 0.5 * math.log2(1 + (s / sigma) ** 2)
        assert lower - 0.1 < truth < upper + 0.1 and upper - lower < 0.25
        assert lower <= upper + 1e-9


def test_the_lower_bound_never_exceeds_what_so_many_images_can_tell():
    for n in (2, 16, 100):
        mean = 100.0 * torch.arange(n)[:, None, None, None]
        lower, upper = posterior_bits(mean, mean, torch.zeros_like(mean))
        assert lower == pytest.approx(math.log2(n)) and upper > lower


def test_the_kl_is_more_than_the_information():
    "By the divergence of the aggregate posterior, in closed form."
    torch.manual_seed(0)
    mean = 2 + 0.5 * torch.randn(1500, 1, 1, 1)
    log_var = torch.full_like(mean, math.log(0.5))
    lower, upper = posterior_bits(mean + 0.5**0.5 * torch.randn_like(mean), mean, log_var)
    kl = float(kl_nats(mean, log_var).mean()) / math.log(2)
    # of N(2, .25 + .5) from N(0, 1)
    rest = 0.5 * (4 + 0.75 - 1 - math.log(0.75)) / math.log(2)
    assert kl - rest == pytest.approx((lower + upper) / 2, abs=0.06)


def test_code_bits_are_the_entropy_of_each_place():
    torch.manual_seed(0)
    codes = torch.stack([torch.zeros(400).long(), torch.arange(400) % 4, torch.arange(400) % 8], 1)
    assert code_bits(codes, 8) == pytest.approx((0 + 2 + 3) / 3, abs=1e-6)
    one_hot = torch.nn.functional.one_hot(codes[:, 2]).double()
    by_bound = -(one_hot @ one_hot.mean(0)).log2().mean()
    assert float(by_bound) == pytest.approx(code_bits(codes[:, 2:], 8), abs=1e-9)


def test_codes_cost_what_a_prior_of_other_images_makes_them_cost():
    "By hand; never less than the entropy, as counted, nor more than a uniform prior asks."
    codes, others = torch.tensor([[0], [1], [1], [3]]), torch.tensor([[0], [0], [1]])
    p = [2.5 / 5, 1.5 / 5, 0.5 / 5, 0.5 / 5]
    wanted = -sum(math.log2(p[code]) for code in codes.flatten()) / 4
    assert priced_bits(codes, others, 4) == pytest.approx(min(2, wanted)) and wanted < 2.1
    assert priced_bits(codes[:3], others, 4) == pytest.approx(
        -(math.log2(p[0]) + 2 * math.log2(p[1])) / 3
    )
    assert priced_bits(codes[3:], others.expand(3, 1), 4) == 2  # log2(10) by these counts
    for seed in range(5):
        torch.manual_seed(seed)
        codes, others = (20 * torch.rand(2, 60, 4, 4) ** 2).long()
        assert code_bits(codes, 20) < priced_bits(codes, others, 20) <= math.log2(20)


def test_the_price_of_codes_is_right_where_an_entropy_of_few_images_is_too_low():
    torch.manual_seed(0)
    codes, others = torch.randint(0, 256, (400, 4)), torch.randint(0, 256, (20_000, 4))
    codes[:, 0], others[:, 0] = codes[:, 0] // 2, others[:, 0] // 2  # one place needs a bit less
    truth = 8 - 1 / 4
    assert truth - code_bits(codes, 256) > 0.2
    assert priced_bits(codes, others, 256) == pytest.approx(truth, abs=0.02)


def test_codes_are_priced_by_the_other_images_alone():
    model, x = make("vqvae"), PATCHES.x
    found, plain = latent_scores(model, x[:60], others=x[60:]), latent_scores(model, x[:60])
    codes, others = (latents_of(model, part).codes for part in (x[:60], x[60:]))
    bits = priced_bits(codes, others, 6)
    assert found["rate_bits"] == found["latent_bits_upper"] == bits
    assert found["bits_per_dim"] == pytest.approx(found["pixel_bits"] + bits * 16 / 256, rel=1e-9)
    same = ("pixel_bits", "latent_bits", "permuted_bits", "usage", "perplexity")
    assert all(found[name] == plain[name] for name in same) and bits > found["latent_bits"]
    for kind in ("vae", "none"):
        model = make(kind)
        assert latent_scores(model, x[:60], others=x[60:]) == latent_scores(model, x[:60])


def test_active_units_by_the_stated_threshold():
    torch.manual_seed(0)
    mean = torch.randn(4000, 4, 1, 1) * torch.tensor([1, 0.11, 0.09, 0.0]).view(4, 1, 1)
    assert active_units(mean) == 0.5
    assert active_units(mean + 5.0) == 0.5


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
@pytest.mark.parametrize("decoder", ["plain", "strong"])
def test_the_latents_of_another_image_cost_nothing_where_they_are_ignored(kind, decoder):
    model = make(kind, decoder)
    x = PATCHES.x[: BATCH + 20]
    with torch.no_grad():
        model.decoder.spread[0].weight.mul_(30)
    z = torch.randn(len(x), 3, 4, 4)
    assert pixel_bits(model, x, z, 1) != pixel_bits(model, x, z)
    with torch.no_grad():
        model.decoder.spread[0].weight.zero_()
    assert pixel_bits(model, x, z, 1) == pixel_bits(model, x, z)
    assert latent_scores(model, x)["permuted_bits"] == 0


def test_moved_latents_are_those_of_the_image_before():
    model, x = make(), PATCHES.x[:5]
    z = torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        nats = model.pixel_nats(z[[4, 0, 1, 2, 3]], x[:, :1].float() / 255)
    bits = float(nats.double().sum()) / 5 / math.log(2)
    assert pixel_bits(model, x, z, 1) == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_of_one_accounting(kind):
    model, x = make(kind), PATCHES.x[:60]
    found = latent_scores(model, x)
    total = found["pixel_bits"] + found["rate_bits"] * 16 / 256
    assert found["bits_per_dim"] == pytest.approx(total, rel=1e-9)
    assert found["latent_bits"] <= found["latent_bits_upper"] + 1e-9
    own = latents_of(model, x)
    if kind.startswith("vae"):
        kl = float(kl_nats(own.mean, own.log_var).double().mean()) / math.log(2)
        assert found["rate_bits"] == pytest.approx(kl, rel=1e-5)
    if kind == "vqvae":
        assert found["rate_bits"] == code_bits(own.codes, 6) == found["latent_bits"]
    if kind == "none":
        assert found["rate_bits"] == found["permuted_bits"] == 0


@pytest.mark.parametrize("kind", MODELS)
def test_measuring_changes_nothing_and_gives_the_same_again(kind):
    model, x = make(kind, "middle").train(), PATCHES.x[:30]
    collapse_loss(model, x.float() / 255)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = latent_scores(model, x), pictures_of(model, latents_of(model, x[:2]).z)
    second = latent_scores(model, x), pictures_of(model, latents_of(model, x[:2]).z)
    assert first[0] == second[0] and torch.equal(first[1], second[1])
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_do_not_depend_on_the_batches():
    model, x = make("vqvae").eval(), PATCHES.x
    whole = latents_of(model, x)
    with torch.no_grad():
        codes = model.encode(x[:, :1].float() / 255).codes
    assert len(x) > BATCH and torch.equal(whole.codes, codes)


def test_sharpness_is_one_for_the_images_and_less_for_blurred_ones():
    x = PATCHES.x[:50]
    real = x[:, :1].float() / 255
    assert picture_scores(real, x) == {"mse": 0.0, "sharpness": 1.0}
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1, count_include_pad=False)
    found = picture_scores(blurred, x)
    wanted = float((blurred - real).double().square().mean())
    assert found["sharpness"] < 0.3 and found["mse"] == pytest.approx(wanted)


# ---- what it is for: a decoder that needs no latents, and one that does ----


def trained(kind, x):
    "The scores of a plain decoder's model after a short training on images of one plane."
    model = make(kind, "plain", width=16)
    data = types.SimpleNamespace(x=x.expand(-1, 3, -1, -1).contiguous(), y=None)
    s = Settings(lengths=(120,), warmup_updates=10, batch_size=64, lr=4e-3, watch_updates=120)
    fit(model, collapse_loss, data, s, progress=False)
    return latent_scores(model, data.x[:200])


def test_latents_that_save_nothing_are_ignored_and_those_that_save_much_are_not():
    "Patches of one grey each have something to tell, noise has not."
    torch.manual_seed(0)
    told = torch.randint(0, 256, (512, 1, 1, 1), dtype=torch.uint8).expand(-1, -1, 8, 8)
    noise = torch.randint(96, 160, (512, 1, 8, 8), dtype=torch.uint8)
    found = trained("vae", told)
    assert found["latent_bits"] > 0.5 and found["permuted_bits"] > 5
    found = trained("vae", noise)
    assert found["rate_bits"] < 0.1 and abs(found["permuted_bits"]) < 0.1
    found = trained("vqvae", noise)  # nothing takes the codes away: they vary, and say nothing
    assert found["latent_bits"] > 0.5 and abs(found["permuted_bits"]) < 0.3


# ---- the house's own ----


def train(kind, path=None, deadline=None, lengths=(10, 20)):
    reproducible(0)
    model, x = make(kind, lr=0.01), PATCHES.x[:64]
    s = Settings(lengths=lengths, warmup_updates=2, batch_size=16, lr=5e-3, watch_updates=4)
    more = dict(checkpoint=path, save_every=0.0, deadline=deadline, progress=False)
    measured = lambda model: latent_scores(model, x[:20])  # noqa: E731
    data = types.SimpleNamespace(x=x, y=None)
    return fit(model, collapse_loss, data, s, evaluate=measured, score=measured, **more)


@pytest.mark.parametrize("kind", ["vae", "vae + annealing", "vqvae"])
def test_a_resumed_training_is_the_same_bit_for_bit(kind, tmp_path):
    whole = train(kind)
    parts = in_parts(partial(train, kind), tmp_path / "checkpoint.pt")
    assert_same_training(whole, parts)
    if kind == "vae + annealing":
        # the branch of the first length does not count
        assert int(parts.model.latents.updates) == 20


def test_a_length_gives_what_it_would_alone():
    assert train("vae + annealing").lengths[0] == train("vae + annealing", lengths=(10,)).lengths[0]


@pytest.mark.parametrize("kind", MODELS)
def test_a_state_loads_strictly(kind):
    model = make(kind)
    collapse_loss(model, grey().expand(-1, 3, -1, -1))
    other = make(kind, seed=9)
    other.load_state_dict(model.state_dict())
    x = PATCHES.x[:8]
    assert latent_scores(model, x) == latent_scores(other, x)


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_under_bfloat16_latents_and_likelihood_are_float32(kind):
    model = make(kind, "middle")
    with torch.autocast("cpu", torch.bfloat16):
        nats, latents = model(grey())
    assert nats.dtype == latents.z.dtype == torch.float32
    (nats.mean() + latents.cost + latents.loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


BAD = {
    "model must be 'vae'": {"model": "gan"},
    "decoder must be 'plain'": {"decoder": "deep"},
    "kl_weight|beta must be": {"kl_weight": -1.0},
    "anneal_updates must be at least 1": {"anneal_updates": 0},
    "free_bits must be a finite number above 0": {"free_bits": 0.0},
    "dim must be at least 1": {"latent_dim": 0},
    "width must be at least 1": {"width": 0},
}


@pytest.mark.parametrize("words", BAD)
def test_a_wrong_parameter_is_named(words):
    with pytest.raises(ValueError, match=words):
        patch_model(NAMES | {"model": "vae"} | BAD[words])


def test_bad_input_is_refused():
    model = make()
    for wrong in (torch.rand(2, 3, 16, 16), torch.rand(2, 1, 18, 16), torch.rand(0, 1, 16, 16)):
        with pytest.raises(ValueError, match="x must be grey images"):
            model(wrong)
    with pytest.raises(ValueError, match="channel_dim=1"):
        PatchModel(CodeLatents(recipe("vq", 4, 8)))
    with pytest.raises(ValueError, match="at least 2"):
        latent_scores(model, PATCHES.x[:1])
    with pytest.raises(ValueError, match="layers must be at least 0"):
        PixelDecoder(4, 8, -1)
    with pytest.raises(ValueError, match="free_nats must be"):
        GaussianLatents(3, free_nats=math.inf)
    with pytest.raises(TypeError, match="dim must be an int"):
        NoLatents(2.0)
    with pytest.raises(ValueError, match="a picture of each image"):
        picture_scores(torch.rand(3, 1, 16, 16), PATCHES.x[:4])


# ---- the sweeps ----

SWEEPS = [name for name in cells.sweeps() if cells.sweep(name)["notebook"] == "collapse"]
PLACES = [(name, place) for name in SWEEPS for place in cells.sweep(name)["scales"]]


@pytest.mark.parametrize("name, place", PLACES)
def test_a_row_is_called_what_it_is_and_can_be_made(name, place):
    for cell in cells.plan(name, place):
        given = cell.parameters
        assert given["method"] == f"{given['model']} + {given['decoder']}"
        model = patch_model(given)
        assert len(model.decoder.masked) == DECODERS[given["decoder"]]
        anneals = given["model"] == "vae + annealing"
        # the price has risen before the rate falls in the shortest length
        assert not anneals or model.latents.anneal_updates <= min(given["lengths"]) * 4 // 5


@pytest.mark.parametrize("place", ["desk", "gpu"])
def test_both_kinds_have_as_many_rates(place):
    tried = {}
    for cell in cells.plan("vqvae_posterior_rates", place):
        knobs = cell.parameters["kl_weight"], cell.parameters["num_codes"]
        tried.setdefault(cell.parameters["model"], set()).add(knobs)
    assert {name: len(knobs) for name, knobs in tried.items()} == {"vae": 4, "vqvae": 4}
    shared = {cell.id for cell in cells.plan("vqvae_posterior_collapse", place)}
    planned = cells.plan("vqvae_posterior_rates", place)
    seeds = {cell.parameters["seed"] for cell in planned}
    assert len([cell for cell in planned if cell.id in shared]) == 2 * len(seeds)


@pytest.mark.parametrize("place", ["desk", "gpu"])
def test_every_model_meets_every_decoder(place):
    planned = cells.plan("vqvae_posterior_collapse", place)
    met = [(c.parameters["model"], c.parameters["decoder"], c.parameters["seed"]) for c in planned]
    seeds = {seed for _, _, seed in met}
    assert len(met) == len(set(met)) == len(MODELS) * len(DECODERS) * len(seeds) and len(seeds) >= 3


@pytest.mark.parametrize("place", ["desk", "gpu"])
def test_codes_are_priced_by_many_images_that_were_trained_on(place):
    "A prior of few would make them dear, by some (k - 1) / 2n nats."
    for name in SWEEPS:
        for cell in cells.plan(name, place):
            n, k = cell.parameters["prior_limit"], cell.parameters["num_codes"]
            assert n and (k - 1) / (2 * n * math.log(2)) < 0.05


def test_a_claim_on_information_is_judged_by_the_bound_that_can_show_it():
    "That it is less than a number by the upper one, that it is more by the lower one."
    claims = [c for c in load_claims(cells.root() / "data/claims.toml") if c.sweep in SWEEPS]
    stated = {c.id: c for c in claims if isinstance(c.b, float) and "latent_bits" in c.metric}
    assert "primer-vae-collapses" in stated
    for claim in stated.values():
        assert claim.metric == "latent_bits" + "_upper" * (claim.says == "lower")


# ---- the figure ----


def test_the_figure_counts_runs_that_diverged(monkeypatch):
    metrics = ("latent_bits", "latent_bits_upper", "rate_bits", "permuted_bits", "pixel_bits")
    numbers = dict.fromkeys((*metrics, "bits_per_dim", "mse", "sharpness"), 1.0)
    numbers |= dict(receptive_field=69.0, side=16.0)
    lost = {("vae", 2), ("none", 0), ("none", 1), ("none", 2)}
    rows = [
        dict(model=model, decoder="strong", seed=seed, updates=9, status="diverged")
        if (model, seed) in lost
        else dict(model=model, decoder="strong", seed=seed, updates=9, status="done") | numbers
        for model in ("vae", "vqvae", "none")
        for seed in range(3)
    ]
    monkeypatch.setattr("vqstudy.figures.planned", lambda name, scale: pd.DataFrame(rows))
    monkeypatch.setattr("vqstudy.figures.shown_scale", lambda name, scale: "desk")
    path = cells.root() / "nbs/figs/vqvae_posterior_collapse.ipynb"
    names = notebooks.executed(json.loads(path.read_text(encoding="utf-8")), until="table")
    table = names["table"].set_index("model")
    assert table.seeds.to_dict() == {"VAE": "2, 1 lost", "VQ-VAE": "3", "no latents": "0, 3 lost"}
    assert table["a latent says"].tolist() == ["1.00 ± 0.00", "1.00 ± 0.00", ""]
