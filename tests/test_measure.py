"""Measures of usage from summed counts, and scores that no batch size changes."""

import math
from functools import partial
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer
from vqstudy.measure import Meter, code_counts, perplexity, usage
from vqstudy.models import Autoencoder
from vqstudy.photos import photos
from vqstudy.scores import reconstruction_scores, ssim
from vqstudy.vector import VectorQuantizer


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(lambda c: sum(c) > 0))
@settings(max_examples=100, deadline=None)
def test_perplexity_lies_between_one_and_the_used_codes(counts):
    counts = torch.tensor(counts)
    used = usage(counts) * len(counts)
    assert 1 - 1e-9 <= perplexity(counts) <= used + 1e-9


def test_known_perplexities():
    assert perplexity(torch.tensor([3, 3, 3, 3])) == pytest.approx(4)
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(math.exp(entropy))
    assert usage(torch.tensor([1, 0, 5, 0])) == 0.5


def test_large_counts_do_not_overflow():
    assert perplexity(torch.full((10,), 2**60)) == pytest.approx(10)


def test_meter_against_the_whole_set():
    torch.manual_seed(0)
    z, codes = 100 + torch.randn(1000, 6), torch.randint(7, (1000,))
    q = z + 0.1 * torch.randn_like(z)
    meter = Meter(7)
    for i in torch.arange(1000).split(37):
        meter.update(z[i], q[i], codes[i])
    got = meter.compute()
    assert got["quantization_error"] == pytest.approx(float((z - q).double().pow(2).mean()))
    spread = 1000 * torch.cov(z.double().T, correction=0).trace()
    relative = float((z - q).double().pow(2).sum() / spread)
    assert got["relative_error"] == pytest.approx(relative, rel=1e-6)
    assert got["perplexity"] == perplexity(code_counts(codes, 7))
    assert got["usage"] == 1
    assert meter.counts.shape == (1, 7)


def by_position(codes, k):
    "usage and perplexity of each position, codes (..., positions)."
    counts = [code_counts(c, k) for c in codes.reshape(-1, codes.shape[-1]).unbind(1)]
    return [usage(c) for c in counts], [perplexity(c) for c in counts]


def means(codes, k):
    "Arithmetic of the usages, geometric of the perplexities."
    usages, perplexities = by_position(codes, k)
    return sum(usages) / len(usages), math.prod(perplexities) ** (1 / len(perplexities))


@pytest.mark.parametrize("code_shape", [(1,), (3,), (2, 3)])
def test_each_position_is_counted_by_itself(code_shape):
    torch.manual_seed(0)
    positions = math.prod(code_shape)
    limits = torch.arange(2, 2 + positions)  # position i uses 2 + i of the 9 codes
    codes = (torch.rand(500, 4, positions) * limits).long()
    meter = Meter(9, code_shape)
    z, q = torch.randn(500, 6), torch.randn(500, 6)
    for i in torch.arange(500).split(70):
        meter.update(z[i], q[i], codes[i].view(-1, 4, *code_shape))
    got = meter.compute()
    used, perplexed = means(codes, 9)
    assert meter.counts.shape == (positions, 9)
    assert meter.counts.sum(1).tolist() == [2000] * positions
    assert got["usage"] == pytest.approx(used)
    assert used == pytest.approx(float(limits.double().mean() / 9))
    assert got["perplexity"] == pytest.approx(perplexed)
    if positions > 1:  # pooled over the positions both look better than they are
        pooled = code_counts(codes, 9)
        assert usage(pooled) > got["usage"]
        assert perplexity(pooled) > got["perplexity"]


def noisy_photos(height, width):
    "Eight photographs, each with more noise than the one before it, and without."
    torch.manual_seed(0)
    x = photos("test", 64).x[:8, :, :height, :width].float() / 255
    levels = torch.linspace(0.01, 0.2, 8)[:, None, None, None]
    return (x + levels * torch.randn_like(x)).clamp(0, 1), x


@pytest.mark.parametrize("height,width", [(64, 64), (32, 32), (11, 11), (40, 13)])
def test_structural_similarity_is_that_of_scikit_image(height, width):
    from skimage.metrics import structural_similarity

    y, x = noisy_photos(height, width)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(y.double().numpy(), x.double().numpy())
    theirs = [structural_similarity(*p, channel_axis=0, data_range=1.0, **options) for p in pairs]
    assert ssim(y, x).tolist() == pytest.approx(theirs, abs=1e-10)
    # in half precision y is rounded, and nothing else
    assert torch.equal(ssim(y.bfloat16(), x), ssim(y.bfloat16().double(), x))


def test_structural_similarity_leaves_the_border_out():
    "torchmetrics goes on over a reflection of the image: other windows, another mean."
    from torchmetrics.functional.image import structural_similarity_index_measure

    y, x = noisy_photos(32, 32)
    theirs = structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    assert (theirs - ssim(y, x)).abs().max() > 3e-3
    _, inside = structural_similarity_index_measure(
        y, x, data_range=1.0, reduction="none", return_full_image=True
    )
    within = inside[..., 5:-5, 5:-5].double().mean((1, 2, 3))
    assert ssim(y, x).tolist() == pytest.approx(within.tolist(), abs=1e-4)


def test_structural_similarity_of_a_flat_image():
    "In float32 the variances of a bright flat image would be of the size of the constants."
    flat = torch.full((1, 3, 32, 32), 0.9)
    assert float(ssim(flat, flat)) == pytest.approx(1, abs=1e-12)
    dark = torch.full((1, 3, 32, 32), 0.3)
    means = (2 * 0.9 * 0.3 + 1e-4) / (0.9**2 + 0.3**2 + 1e-4)
    assert float(ssim(flat, dark)) == pytest.approx(means, abs=1e-6)
    narrow = flat[..., :10]
    for pair in ((narrow, narrow), (flat, flat[:, :1])):
        with pytest.raises(ValueError, match=r"one shape, at least 11 pixels, got \(1, 3, 32, "):
            ssim(*pair)


# Codes where the data are, or an untrained encoder uses one of them.
START = partial(VectorQuantizer, init="sample")


@pytest.mark.parametrize(
    "make,positions",
    [
        (partial(GroupQuantizer, make=START), 2),
        (partial(GroupQuantizer, make=START, shared=True), 2),
        (partial(ResidualQuantizer, make=START, levels=3), 3),
        (partial(ResidualQuantizer, make=START, levels=3, shared=True), 3),
        (partial(MultiScaleQuantizer, make=START), 5),
        (partial(GroupQuantizer, make=partial(ResidualQuantizer, make=START, levels=2)), 4),
    ],
)
def test_scores_of_composed_quantizers_are_means_over_positions(make, positions):
    torch.manual_seed(0)
    model = Autoencoder(make(8, 16, channel_dim=1), channels=8)
    x = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    model.eval().quantizer.train()
    model(x.float() / 255)
    with torch.no_grad():
        codes = model.eval()(x.float() / 255).quantized.codes
    codes = codes.reshape(-1, positions)
    got = reconstruction_scores(model, x, batch_size=4)
    used, perplexed = means(codes, 16)
    assert got["usage"] == pytest.approx(used)
    assert got["perplexity"] == pytest.approx(perplexed)
    _, perplexities = by_position(codes, 16)
    assert max(perplexities) > min(perplexities)  # or a mean would be no better than any position


@pytest.mark.parametrize(
    "counts,error,words",
    [
        (torch.zeros(3), ValueError, "not all zero"),
        (torch.tensor([1, -1]), ValueError, "not negative"),
        (torch.ones(2, 2), ValueError, r"\(2, 2\)"),
        (torch.tensor([1.0, math.nan]), ValueError, "finite"),
        ([1, 2], TypeError, "list"),
        (torch.zeros(0), ValueError, r"\(0,\)"),
    ],
)
def test_bad_counts_are_named(counts, error, words):
    for measure in (usage, perplexity):
        with pytest.raises(error, match=words):
            measure(counts)
    with pytest.raises(ValueError, match="never called"):
        Meter(3).compute()


@pytest.mark.parametrize(
    "code_shape,codes,words",
    [
        ((), torch.tensor([0, 3, 1]), r"codes must lie in 0\.\.2, got 0\.\.3"),
        ((), torch.tensor([0, -1, 1]), r"codes must lie in 0\.\.2, got -1\.\.1"),
        ((2,), torch.zeros(3, 2, dtype=torch.int64) + 3, r"codes must lie in 0\.\.2"),
        ((2,), torch.zeros(4, 3, dtype=torch.int64), r"end in \(2,\), got shape \(4, 3\)"),
        ((2, 2), torch.zeros(4, 2, dtype=torch.int64), r"codes must end in \(2, 2\)"),
        ((2, 2), torch.zeros(4, dtype=torch.int64), r"codes must end in \(2, 2\)"),
    ],
)
def test_bad_codes_are_named_and_not_counted(code_shape, codes, words):
    meter = Meter(3, code_shape)
    with pytest.raises(ValueError, match=words):
        meter.update(torch.zeros(3, 4), torch.zeros(3, 4), codes)
    with pytest.raises(ValueError, match="never called"):
        meter.compute()
