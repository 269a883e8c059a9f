"""Priors over codes: what each has to hold, what it refuses, and a training that is resumed."""

import io
import math
import random
import types
from functools import partial
import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from resuming import assert_same_training, in_parts
from vqstudy import cells
from vqstudy.autoencoders import Autoencoder
from vqstudy.checkpoint import reproducible
from vqstudy.coders import FACTORS, codes_of, images_of, levels_of
from vqstudy.files import sample_grid
from vqstudy.prior_scores import BATCH, bits_of, drawn_rows, kept_at, nearest, set_scores
from vqstudy.priors import KINDS, AutoregressivePrior, BestSoFar, Cache, CodeTable, IndependentPrior
from vqstudy.priors import MaskGIT, TwoLevelPrior, draw, halton_ranks, left_masked, prior_loss
from vqstudy.priors import prior_of, restricted
from vqstudy.quantizers import recipe
from vqstudy.settings import Settings
from vqstudy.train import fit

K, SIDE = 11, 4
LENGTH = SIDE * SIDE


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    levels = [4, LENGTH] if kind == "two scales" else [LENGTH]
    name = "autoregressive" if kind == "two scales" else kind
    sizes = dict(width=32, depth=2, heads=2) | options
    prior = prior_of(name, K, levels, 3, **sizes).eval()
    with torch.no_grad():
        for p in prior.parameters():  # an untrained one says nearly the same everywhere
            p.add_(0.2 * torch.randn(p.shape))
    if kind == "independent":
        prior.count(torch.randint(0, K, (40, LENGTH)))
    return prior


def rows_of(prior, n=6, seed=1):
    torch.manual_seed(seed)
    condition = torch.randint(0, 3, (n, 1)) if prior.prefix_codes > 1 else None
    return CodeTable(torch.randint(0, K, (n, prior.length)), condition)


ALL = [*KINDS, "two scales"]
AUTOREGRESSIVE = ["autoregressive", "autoregressive-small", "autoregressive-class"]


# ---- the transformer and its cache ----


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [3, 1, 5, 7], [LENGTH]])
def test_cached_and_uncached_logits_are_equal(kind, pieces):
    prior = make(kind)
    codes, condition = rows_of(prior)
    condition = prior.condition_of(len(codes), condition)
    with torch.no_grad():
        whole = prior.net(codes, condition)
        cache, parts = Cache(prior.net, len(codes)), []
        for piece in (codes[:, :0], *codes.split(pieces, 1)):
            parts.append(prior.net(piece, condition, cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == LENGTH + 1


def test_positions_advance_with_the_cache():
    "The same code twice has other logits the second time, those of its own place."
    prior = make("autoregressive")
    codes, start = torch.full((1, 2), 3), torch.zeros(1, 1, dtype=torch.int64)
    cache = Cache(prior.net, 1)
    with torch.no_grad():
        prior.net(codes[:, :0], start, cache)
        first, second = (prior.net(codes[:, :1], start, cache) for _ in range(2))
        prior.net.places[2] = prior.net.places[1]
        cache = Cache(prior.net, 1)
        prior.net(codes[:, :0], start, cache)
        same = prior.net(codes[:, :1], start, cache), prior.net(codes[:, :1], start, cache)
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(same[0], first)
    assert (same[1] - second).abs().max() > 0.01


def test_a_causal_prior_sees_the_left_alone():
    prior = make("autoregressive")
    codes, _ = rows_of(prior)
    with torch.no_grad():
        before = prior.logits(codes)
        for place in range(LENGTH):
            other = codes.clone()
            other[:, place] = (other[:, place] + 1) % K
            moved = (prior.logits(other) - before).abs().amax((0, 2)) > 1e-5
            assert not moved[: place + 1].any() and moved[place + 1 :].all()


def test_maskgit_sees_everything():
    prior = make("maskgit")
    codes, _ = rows_of(prior)
    other = codes.clone()
    other[:, -1] = (other[:, -1] + 1) % K
    with torch.no_grad():
        moved = (prior.logits(other) - prior.logits(codes)).abs().amax((0, 2))
    assert (moved > 1e-5).all()


def test_the_fine_codes_prior_sees_all_coarse_ones():
    prior = make("two scales")
    top, bottom = rows_of(prior).codes.split(prior.split, 1)
    with torch.no_grad():
        before = prior.bottom.logits(bottom, top)
        for place in range(prior.split[0]):
            other = top.clone()
            other[:, place] = (other[:, place] + 1) % K
            assert ((prior.bottom.logits(bottom, other) - before).abs().amax((0, 2)) > 1e-5).all()


# ---- likelihood and loss ----


@pytest.mark.parametrize("kind", ["independent", *AUTOREGRESSIVE, "two scales"])
def test_probabilities_of_all_rows_sum_to_one(kind):
    torch.manual_seed(2)
    levels = [1, 4] if kind == "two scales" else [4]
    name = "autoregressive" if kind == "two scales" else kind
    prior = prior_of(name, 3, levels, 2, 8, 1, 2).double().eval()
    length = sum(levels)
    rows = torch.cartesian_prod(*[torch.arange(3)] * length)
    classed = kind == "autoregressive-class"
    condition = torch.ones(len(rows), 1, dtype=torch.int64) if classed else None
    with torch.no_grad():
        total = (-prior.nats(rows, condition).double() * length).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_maskgit_s_bits_are_a_bound_that_equals_by_hand():
    "The mean over all numbers and sets of masked places of a row of two codes."
    torch.manual_seed(0)
    prior = MaskGIT(3, 2, 8, 1, 2).eval()
    codes = torch.tensor([[2, 0]])
    with torch.no_grad():
        log_p = lambda tokens: prior.logits(torch.tensor([tokens])).log_softmax(-1)[0]  # noqa: E731
        both = -(log_p([3, 3])[0, 2] + log_p([3, 3])[1, 0]) / 2
        one = -(log_p([3, 0])[0, 2] + log_p([2, 3])[1, 0]) / 2
        torch.manual_seed(1)
        found = torch.cat([prior.nats(codes.expand(500, 2)) for _ in range(4)])
    assert float(found.mean()) == pytest.approx(float(both + one) / 2, abs=2e-3)


def test_the_loss_is_of_masked_codes_alone():
    "By value, by gradient, and over what the other codes are labelled with."
    prior = make("maskgit")
    codes, _ = rows_of(prior)
    masked = prior.masked(codes, torch.tensor([1, 3, 5, 8, 15, 16]))
    assert masked.sum(1).tolist() == [1, 3, 5, 8, 15, 16]
    tokens = codes.masked_fill(masked, K)
    label = 0.9 * F.one_hot(codes, K) + 0.1 / K
    logits = prior.logits(tokens)
    by_hand = -(label * logits.log_softmax(-1)).sum(-1)[masked].mean()
    found = prior.losses(codes, masked, None, 0.1).sum() / masked.sum()
    torch.testing.assert_close(found, by_hand)
    (slope,) = torch.autograd.grad(found, [prior.net.head.bias])
    wrong = (logits.softmax(-1) - label)[masked].mean(0)
    torch.testing.assert_close(slope, wrong.detach(), rtol=1e-4, atol=1e-6)


def test_the_training_loss_masks_by_the_cosine():
    "A share of 2 / pi on average, one code at least."
    prior = make("maskgit")
    seen = []
    prior.losses = lambda codes, masked, *_: seen.append(masked) or masked.float()
    torch.manual_seed(0)
    for _ in range(20):
        prior.loss(torch.zeros(200, LENGTH, dtype=torch.int64))
    counts = torch.cat(seen).sum(1)
    assert counts.min() >= 1 and counts.max() == LENGTH
    # rounded up: half a place more than the share
    assert float(counts.double().mean()) == pytest.approx(LENGTH * 2 / math.pi + 0.5, abs=0.25)
    places = torch.cat(seen).double().mean(0)
    assert float(places.max() - places.min()) < 0.05


@pytest.mark.parametrize("kind", AUTOREGRESSIVE)
def test_the_gradient_of_the_exact_loss(kind):
    prior = make(kind)
    table = rows_of(prior)
    wrong = prior.logits(*table).softmax(-1) - F.one_hot(table.codes, K)
    (slope,) = torch.autograd.grad(prior.loss(*table), [prior.net.head.bias])
    torch.testing.assert_close(slope, wrong.mean((0, 1)).detach(), rtol=1e-4, atol=1e-6)


def test_independent_codes_are_the_smoothed_histograms():
    torch.manual_seed(0)
    codes = torch.randint(0, 5, (30, 3))
    prior = IndependentPrior(5, 3, smoothing=7.0).count(codes)
    every = torch.bincount(codes.flatten(), minlength=5).double() + 1 / 5
    for place in range(3):
        own = torch.bincount(codes[:, place], minlength=5).double()
        wanted = (own + 7 * every / every.sum()) / 37
        torch.testing.assert_close(prior.log_p[place].exp().double(), wanted, rtol=1e-5, atol=1e-7)


# ---- sampling ----


@pytest.mark.parametrize("kind", ["independent", *AUTOREGRESSIVE, "two scales"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}])
def test_sampled_bits_are_the_teacher_forced_ones(kind, options):
    prior = make(kind)
    condition = rows_of(prior, 40).condition
    torch.manual_seed(3)
    found = prior.sample(40, condition, **options)
    with torch.no_grad():
        wanted = prior.nats(found.codes, condition)
    torch.testing.assert_close(-found.log_p.mean(1), wanted, rtol=1e-4, atol=1e-5)


def test_samples_are_as_often_as_they_are_likely():
    torch.manual_seed(0)
    prior = AutoregressivePrior(3, 2, 16, 1, 2).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.5 * torch.randn(p.shape))
        rows = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        wanted = (-2 * prior.nats(rows)).exp()
    codes = prior.sample(20_000).codes
    found = torch.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9) / 20_000
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.015)


@pytest.mark.parametrize("order", ["confidence", "halton"])
@pytest.mark.parametrize("steps", [1, 2, 7, LENGTH])
def test_the_last_state_holds_no_mask(order, steps):
    prior = make("maskgit")
    found = prior.sample(30, steps=steps, order=order)
    assert found.codes.min() >= 0 and found.codes.max() < K
    assert (found.log_p < 0).all() and found.log_p.isfinite().all()


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_masks_become_fewer_at_each_step_and_codes_stay(order):
    prior, seen = make("maskgit"), []
    inner = prior.logits
    prior.logits = lambda tokens, condition: seen.append(tokens.clone()) or inner(tokens, condition)
    last = prior.sample(9, steps=6, order=order).codes
    counts = [(tokens == K).sum(1) for tokens in [*seen, last]]
    assert [int(c[0]) for c in counts] == [LENGTH, *left_masked(LENGTH, 6, order)]
    assert all((c == c[0]).all() for c in counts)
    for before, after in zip(seen, [*seen[1:], last]):
        assert ((before == K) | (before == after)).all()


def test_halton_order_fills_in_by_turn():
    prior, seen = make("maskgit"), []
    inner = prior.logits
    prior.logits = lambda tokens, condition: seen.append(tokens.clone()) or inner(tokens, condition)
    prior.sample(2, steps=4, order="halton")
    ranks = halton_ranks(SIDE)
    for tokens, left in zip(seen[1:], left_masked(LENGTH, 4, "halton")):
        assert torch.equal(tokens[0] == K, ranks >= LENGTH - left)


def test_the_surest_are_filled_in_first_without_noise():
    prior, seen = make("maskgit"), []
    inner = prior.logits
    prior.logits = lambda tokens, condition: seen.append(tokens.clone()) or inner(tokens, condition)
    found = prior.sample(50, steps=2, noise=0.0, top_k=1)
    first = seen[1] != K
    with torch.no_grad():
        sure = inner(seen[0]).log_softmax(-1).amax(-1)
    for row in range(50):
        assert sure[row][first[row]].min() >= sure[row][~first[row]].max()
    torch.testing.assert_close(found.log_p[first], sure[first])


def test_the_mask_is_apart_from_the_codes():
    prior = make("maskgit")
    assert prior.net.codes.num_embeddings == K + 1 and prior.net.head.out_features == K
    assert make("autoregressive").net.codes.num_embeddings == K
    with pytest.raises(ValueError, match="codes must lie in 0..10"):
        prior.loss(torch.full((2, LENGTH), K))


@pytest.mark.parametrize("kind", ALL)
def test_torch_s_seed_governs_all_noise(kind):
    prior, found = make(kind), []
    condition = rows_of(prior, 20).condition
    for seed, others in ((1, 5), (1, 6), (2, 5)):
        numpy.random.seed(others)
        random.seed(others)
        torch.manual_seed(seed)
        found.append(prior.sample(20, condition).codes)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.1}])
def test_restricting_edits_nothing_that_is_used_again(options):
    logits = torch.randn(7, K)
    before = logits.clone()
    assert not torch.equal(restricted(logits, **options), logits)
    assert torch.equal(logits, before)


def test_what_is_left_to_draw_from():
    logits = torch.randn(500, K).double()
    p = logits.softmax(-1)
    for k in (1, 4, K):
        left = restricted(logits, top_k=k).softmax(-1) > 0
        assert (left.sum(1) == k).all()
        assert torch.where(left, p, 1).amin(1).ge(torch.where(left, 0, p).amax(1)).all()
    for share in (0.3, 0.9):
        left = restricted(logits, top_p=share).softmax(-1) > 0
        kept = torch.where(left, p, 0)
        least = torch.where(left, p, 2).amin(1)
        assert (kept.sum(1) >= share).all() and (kept.sum(1) - least < share).all()
    assert (draw(restricted(logits, top_k=1)) == logits.argmax(1)).all()
    assert torch.equal(restricted(logits, top_k=K, top_p=1.0), logits)


# ---- a Markov chain, whose entropy is known ----

STEP = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
FIRST = torch.tensor([0.5, 0.3, 0.2])


def chain(n, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.multinomial(FIRST, n, True, generator=generator)]
    for _ in range(length - 1):
        codes.append(torch.multinomial(STEP[codes[-1]], 1, generator=generator)[:, 0])
    return torch.stack(codes, 1)


def entropy(length):
    "In bits per code."
    share, total = FIRST, -(FIRST * FIRST.log2()).sum()
    for _ in range(length - 1):
        total = total - (share[:, None] * STEP * STEP.log2()).sum()
        share = share @ STEP
    return float(total / length)


def test_a_prior_fitted_to_a_markov_chain_recovers_its_entropy():
    "Within .03 bits; independent codes have those of the single places."
    torch.manual_seed(0)
    codes, unseen = chain(4000, 9, 1), CodeTable(chain(4000, 9, 2))
    prior = AutoregressivePrior(3, 9, 32, 1, 2)
    optimizer = torch.optim.AdamW(prior.parameters(), 1e-2)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 120)
        optimizer.zero_grad()
        prior.loss(codes[torch.randint(0, 4000, (200,))]).backward()
        optimizer.step()
    found = bits_of(prior, unseen)
    assert found == pytest.approx(entropy(9), abs=0.03)
    alone = bits_of(IndependentPrior(3, 9).count(codes), unseen)
    share, single = FIRST, []
    for _ in range(9):
        single.append(-(share * share.log2()).sum())
        share = share @ STEP
    assert alone == pytest.approx(float(sum(single)) / 9, abs=0.03) and alone > found + 0.2
    drawn = prior.eval().sample(4000).codes
    pairs = torch.bincount(3 * drawn[:, 4] + drawn[:, 5], minlength=9).view(3, 3) + 0.0
    torch.testing.assert_close(pairs / pairs.sum(1, keepdim=True), STEP, rtol=0, atol=0.08)


# ---- the house's own ----


@pytest.mark.parametrize("kind", ALL)
def test_a_state_loads_strictly_and_evaluation_changes_nothing(kind):
    prior = make(kind)
    before = {name: x.clone() for name, x in prior.state_dict().items()}
    table = rows_of(prior)
    with torch.no_grad():
        prior.nats(*table)
    prior.sample(3, None if table.condition is None else table.condition[:3])
    after = prior.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    other = make(kind, seed=9)
    other.load_state_dict(before)
    torch.manual_seed(0)
    with torch.no_grad():
        first = prior.nats(*table)
        torch.manual_seed(0)
        second = other.nats(*table)
    # MaskGIT draws its masks anew
    assert kind == "maskgit" or torch.equal(first, second)


@pytest.mark.parametrize("kind", ALL)
def test_bad_codes_are_refused(kind):
    prior = make(kind)
    codes, condition = rows_of(prior)
    bad = {
        "codes must lie in 0..10": codes + 1 + K * (codes == 0),
        "codes must end in": codes[:, :-1],
        "codes must be rows": codes[0],
        "codes must be a tensor of int64": codes.float(),
    }
    for words, wrong in bad.items():
        with pytest.raises((ValueError, TypeError), match=words):
            prior.nats(wrong, condition)
    with pytest.raises(ValueError, match="n must be at least 1"):
        prior.sample(0, condition)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        prior.sample(len(codes), condition, temperature=0.0)


def test_bad_conditions_are_refused():
    prior = make("autoregressive-class")
    codes, condition = rows_of(prior)
    for words, wrong in {
        "condition must be given": None,
        "codes must lie in 0..2": condition + 3,
        "condition must have shape": condition[:2],
    }.items():
        with pytest.raises(ValueError, match=words):
            prior.nats(codes, wrong)


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_every_schedule_falls_to_nothing(order):
    for length in (1, 2, 16, 64, 81):
        for steps in {1, min(2, length), max(1, length // 3), length}:
            left = [length, *left_masked(length, steps, order)]
            assert left[-1] == 0 and all(a > b for a, b in zip(left, left[1:]))


def train(kind, path=None, deadline=None, lengths=(8, 16)):
    "A short training with early stopping, by `fit`."
    reproducible(0)
    prior = make(kind)
    table, aside = rows_of(prior, 24), rows_of(prior, 8, seed=5)
    model = BestSoFar(prior)
    x = torch.zeros(24, 3, 1, 1, dtype=torch.uint8)
    data = types.SimpleNamespace(x=x, y=torch.arange(24))

    def watch(model):
        found = bits_of(model.model, aside)
        model.offer(found)
        return {"validation_bits": found}

    options = dict(lengths=lengths, warmup_updates=2, batch_size=8, lr=2e-2, watch_updates=2)
    more = dict(checkpoint=path, save_every=0.0, deadline=deadline, progress=False)
    score = lambda model: {"best_bits": bits_of(model.kept, aside)}  # noqa: E731
    loss = partial(prior_loss, table=table)
    return fit(model, loss, data, Settings(**options), evaluate=watch, score=score, **more)


RESUMED = ["autoregressive", "autoregressive-class", "maskgit", "two scales"]


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_training_is_the_same_bit_for_bit(kind, tmp_path):
    "With the state that it keeps."
    whole = train(kind)
    parts = in_parts(partial(train, kind), tmp_path / "checkpoint.pt")
    assert_same_training(whole, parts)


def test_of_each_length_the_best_state_is_kept():
    "Random codes have nothing to learn: what is kept comes early, and is no later length's."
    fitted = train("autoregressive")
    for row in fitted.lengths:
        at = kept_at(fitted.history, row["updates"])
        bits = [r["validation_bits"] for r in fitted.history if r["updates"] == at]
        assert row["best_bits"] in bits and row["best_bits"] <= row["validation_bits"]
    assert fitted.lengths[-1]["best_bits"] < fitted.lengths[-1]["validation_bits"]
    assert fitted.lengths[0] == train("autoregressive", lengths=(8,)).lengths[0]


# ---- coders and scores ----


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("method", ["vq", "vq + multiscale", "vq + affine + opt + replace"])
def test_codes_go_to_rows_and_back(factor, method):
    torch.manual_seed(0)
    coder = FACTORS[factor](recipe(method, 16, K, channel_dim=1), 64, 16)
    x = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    coder(x.float() / 255)  # batch norm has seen something
    state = {name: value.clone() for name, value in coder.state_dict().items()}
    rows = codes_of(coder, x, 2)
    side = 64 // factor
    coarse = side * side // 4 if "multiscale" in method else 0
    assert rows.shape == (5, side * side + coarse)
    assert sum(levels_of(coder.quantizer, rows.shape[1])) == rows.shape[1]
    made = images_of(coder, rows, 3)
    assert coder.training and all(torch.equal(v, state[n]) for n, v in coder.state_dict().items())
    with torch.no_grad():
        wanted = coder.eval()(x.float() / 255).x
    assert (made - wanted * 255).abs().max() <= 0.51


def test_the_eightfold_autoencoder_has_one_stage_more():
    quantizer = partial(recipe, "vq", 32, K, channel_dim=1)
    four, eight = (FACTORS[f](quantizer(), 64, 32) for f in (4, 8))
    more = len(list(eight.modules())) - len(list(four.modules()))
    assert more == 6 and isinstance(eight, Autoencoder)
    with pytest.raises(ValueError, match="size must be 32 or 64"):
        FACTORS[8](quantizer(), 128, 32)


@pytest.mark.parametrize("kind", ALL)
def test_bits_are_means_over_all_rows_and_the_same_again(kind):
    prior = make(kind).train()
    table = rows_of(prior, BATCH + 30)
    state = torch.get_rng_state()
    found = bits_of(prior, table)
    assert found == bits_of(prior, table) and prior.training
    assert torch.equal(state, torch.get_rng_state())
    if kind != "maskgit":
        with torch.no_grad():
            wanted = prior.nats(*table).double().mean() / math.log(2)
        assert found == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", ["autoregressive-class", "maskgit"])
def test_the_first_rows_are_the_same_however_many_are_drawn(kind):
    prior = make(kind)
    condition = rows_of(prior, BATCH + 20).condition
    few, many = (drawn_rows(prior, n, 7, condition) for n in (5, BATCH + 20))
    assert torch.equal(few.codes, many.codes[:5]) and len(many.codes) == BATCH + 20


def test_the_nearest_image_by_brute_force():
    torch.manual_seed(0)
    made, train_x = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8) for n in (9, 41))
    train_x[17] = made[4]
    far = (made[:, None].double() - train_x.double()).square().mean((2, 3, 4)) / 255**2
    rows, found = nearest(made, train_x, 10)
    assert torch.equal(rows, far.argmin(1)) and rows[4] == 17 and found[4] == 0
    torch.testing.assert_close(found.double(), far.amin(1), rtol=1e-5, atol=1e-8)


def test_a_distance_of_a_set_to_itself_is_nothing():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    found = set_scores(x, x.roll(1, 0), 32)
    name = next(name for name in found if not name.endswith("_se"))
    other = set_scores(255 - x // 4, x, 32)
    assert abs(found[name]) < 0.1 * other[name]


# ---- the sweeps ----

PRIORS = [name for name in cells.sweeps() if cells.sweep(name)["notebook"] == "prior"]


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("scale", ["smoke", "desk", "gpu"])
def test_a_prior_has_its_tokenizer_s_codes_and_sets_images_aside(name, scale):
    if scale not in cells.sweep(name)["scales"]:
        return
    for cell in cells.plan(name, scale):
        coder = cell.parents["tokenizer"].parameters
        shared = ("method", "dataset", "num_codes", "seed")
        assert all(coder[name] == cell.parameters[name] for name in shared)
        assert coder["validation"] > 0


CODERS = [name for name in cells.sweeps() if cells.sweep(name)["notebook"] == "codes"]


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("scale", ["desk", "gpu"])
def test_a_tuned_beta_is_a_share_of_the_weight_that_it_was_tuned_with(name, scale):
    "Under another alpha the same beta holds the encoder to its codes with another weight."
    if scale not in cells.sweep(name)["scales"]:
        return
    searched = {cell.parameters["alpha"] for cell in cells.plan("huh_tab03_best", scale)}
    for cell in cells.plan(name, scale):
        assert "huh_tab03_best" in cells.tuned_by(name, scale)
        assert {cell.parameters["alpha"]} == searched


@pytest.mark.parametrize("name", PRIORS)
def test_no_sheet_of_samples_is_made_smaller(name):
    "Or its cell would fail at its very end: not even noise, of which nothing can be packed."
    sizes = set()
    for scale in cells.sweep(name)["scales"]:
        for cell in cells.plan(name, scale):
            sizes.add((cell.parameters["shown"], cell.parents["tokenizer"].parameters["size"]))
    for shown, size in sizes:
        noise = torch.randint(0, 256, (2, 2 * shown, 3, size, size), dtype=torch.uint8)
        assert Image.open(io.BytesIO(sample_grid(noise))).height == 2 * size


def test_two_scales_have_as_many_bits():
    planned = cells.plan("vqvae_prior_tokenizers", "desk")
    bits = {}
    for cell in planned:
        codes = 80 if "multiscale" in cell.parameters["method"] else 64
        bits[cell.parameters["method"]] = codes * math.log2(cell.parameters["num_codes"])
    assert len(bits) == 2 and len(set(bits.values())) == 1


def test_the_temperature_is_chosen_on_what_is_not_reported():
    tried = cells.plan("huh_tab09_temperature", "desk")
    reported = {cell.parameters["seed"] for cell in cells.plan("huh_tab09", "desk")}
    assert all(cell.parameters["choice"] for cell in tried)
    assert not reported & {cell.parameters["seed"] for cell in tried}
    counts = {}
    for cell in tried:
        counts.setdefault(cell.parameters["method"], set()).add(cell.parameters["temperature"])
    methods = {cell.parameters["method"] for cell in cells.plan("huh_tab09", "desk")}
    assert counts.keys() == methods and len({frozenset(x) for x in counts.values()}) == 1
    for cell in tried:
        drawn_from = cell.parents["weights_of"].parameters
        for name in ("method", "width", "depth", "heads", "num_codes", "seed"):
            assert drawn_from[name] == cell.parameters[name], name
