"""What a codebook's upkeep promises: wide statistics, given codebooks, bad vectors, freezing."""

import copy
import pickle
import pytest
import torch
from processes import in_processes
from vqstudy.codebook import Codebook, MovingAffine
from vqstudy.codebook import kmeans, sample
from vqstudy.quantizers import recipe
from vqstudy.ranks import draw, finite_rows, random_bits
from vqstudy.transport import sinkhorn_codes
from vqstudy.upkeep import MovingAverage

LOW = (torch.bfloat16, torch.float16)


def trained(quantizer, steps=5, n=64, scale=1.0, seed=0):
    "After some training batches, in the dtype of its codebook."
    torch.manual_seed(seed)
    dtype = next(t.dtype for t in quantizer.state_dict().values() if t.is_floating_point())
    for _ in range(steps):
        quantizer.train()(scale * torch.randn(n, quantizer.dim).to(dtype))
    return quantizer


def error(quantizer, z):
    "Mean squared distance to the nearest code."
    with torch.no_grad():
        return (quantizer.eval()(z).z_q - z).float().pow(2).mean().item()


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- statistics in a narrow dtype

NARROW = ["vq + ema", "vq + ema + replace", "vq + l2 + ema", "vq + ema + residual", "optvq + ema"]
NARROW += ["vq + moving-affine", "vq + ema + group"]


@pytest.mark.parametrize("spec", NARROW)
@pytest.mark.parametrize("dtype", LOW)
def test_a_narrow_model_learns_as_well_as_a_wide_one(spec, dtype):
    torch.manual_seed(0)
    given = {"levels": 2} if "residual" in spec else {}
    wide = recipe(spec, 8, 16, **given)
    narrow = copy.deepcopy(wide).to(dtype)
    for step in range(120):
        z = (torch.randn(8192, 8) + 1).to(dtype)
        for quantizer, batch in ((wide, z.float()), (narrow, z)):
            torch.manual_seed(step)
            quantizer.train()(batch)
    assert error(narrow, z) < 1.05 * error(wide, z.float()) + 0.01


def test_values_of_40_in_float16():
    quantizer = trained(recipe("vq + ema", 8, 4).half(), 20, 16384, 40.0)
    assert quantizer.average.sums.isfinite().all() and quantizer.codebook.isfinite().all()


STATISTICS = {
    "vq + ema + replace": ("average.counts", "average.sums"),
    "vq + moving-affine": tuple(f"book.map.{m}_{of}" for m in ("mean", "var") for of in "zc"),
    "stochastic": ("temperature",),
    "gumbel": ("temperature",),
    "sq": ("temperature",),
}


@pytest.mark.parametrize("spec", STATISTICS)
@pytest.mark.parametrize("dtype", LOW)
def test_casts_keep_the_statistics(spec, dtype):
    quantizer = trained(recipe(spec, 8, 16), 7)
    quantizer.anneal(1 / 3)
    before = state(quantizer)
    casts = (
        lambda q: q.to(dtype),
        lambda q: q.to("cpu", dtype),
        lambda q: q.to(torch.zeros(1, dtype=dtype)),
        lambda q: q.type(dtype),
        lambda q: copy.deepcopy(q).to(dtype).float(),
        lambda q: q.half().bfloat16(),
        lambda q: copy.deepcopy(q).double().to(dtype),
    )
    for cast in casts:
        after = cast(copy.deepcopy(quantizer)).state_dict()
        for name in STATISTICS[spec]:
            assert after[name].dtype in (torch.float32, torch.float64), name
            assert torch.equal(after[name].float(), before[name]), name
    assert quantizer.to(dtype).state_dict()["book.weight"].dtype == dtype
    assert quantizer.double().state_dict()[STATISTICS[spec][0]].dtype == torch.float64


@pytest.mark.parametrize("spec", STATISTICS)
def test_states_of_a_narrow_dtype_load(spec):
    quantizer = trained(recipe(spec, 8, 16), 7)
    old = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in quantizer.state_dict().items()
    }
    for assign in (False, True):
        loaded = recipe(spec, 8, 16).bfloat16()
        loaded.load_state_dict(old, strict=True, assign=assign)
        for name in STATISTICS[spec]:
            value = loaded.state_dict()[name]
            assert value.dtype == torch.float32 and torch.equal(value, old[name].float())
        trained(loaded, 2)


@pytest.mark.parametrize("spec", STATISTICS)
def test_meta_and_to_empty(spec):
    quantizer = trained(recipe(spec, 8, 16), 7).bfloat16()
    empty = copy.deepcopy(quantizer).to("meta", torch.float16).to_empty(device="cpu")
    empty.load_state_dict(quantizer.state_dict())
    for name in STATISTICS[spec]:
        value = empty.state_dict()[name]
        assert value.dtype == torch.float32
        assert torch.equal(value, quantizer.state_dict()[name])
    trained(empty, 2)


def test_statistics_begin_wide_where_the_default_dtype_is_narrow():
    torch.set_default_dtype(torch.bfloat16)
    try:
        average, moving = MovingAverage(torch.randn(4, 2)), MovingAffine(2)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = [*average.buffers(), *moving.buffers()]
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in kept)


@pytest.mark.parametrize("dtype", LOW)
def test_moments_of_a_narrow_table_are_wide(dtype):
    torch.manual_seed(0)
    table, moving = (10 + torch.randn(4096, 2)).to(dtype), MovingAffine(2).to(dtype)
    moving.update(table.float(), table)
    assert torch.allclose(moving.mean_c, table.float().mean(0), rtol=1e-6)
    assert torch.allclose(moving.var_c, table.float().var(0, correction=0), rtol=1e-5)
    assert moving(table).dtype == dtype


# ---- a codebook that is given

GIVEN = ["vq", "vq + ema", "vq + ema + replace", "vq + l2", "vq + l2 + ema", "vq + affine"]
GIVEN += ["vq + moving-affine", "vq + moving-affine + replace", "simvq", "vq + refit", "stochastic"]
GIVEN += ["optvq + ema", "router", "router + tied", "gumbel", "sq"]


def vectors(spec, k=16, d=8):
    torch.manual_seed(3)
    wanted = torch.randn(k, d) + 2
    return torch.nn.functional.normalize(wanted, dim=1) if "l2" in spec else wanted


@pytest.mark.parametrize("spec", GIVEN)
def test_a_given_codebook_is_the_codebook(spec):
    quantizer, wanted = trained(recipe(spec, 8, 16)), vectors(spec)
    if "+ affine" in spec:
        quantizer.book.map.scale.data.fill_(0.5)
    quantizer.set_codebook(wanted)
    assert torch.allclose(quantizer.codebook, wanted, atol=1e-4)
    decoded = quantizer.eval().decode(torch.arange(16))
    assert torch.allclose(decoded, wanted, atol=1e-4)
    if "+" not in spec and spec != "simvq":
        assert torch.equal(quantizer.codebook, wanted)


@pytest.mark.parametrize("spec", ["vq + ema", "vq + ema + replace", "vq + l2 + ema", "optvq + ema"])
def test_averages_go_on_from_a_given_codebook(spec):
    quantizer, wanted = trained(recipe(spec, 8, 16), 30), vectors(spec)
    fresh = recipe(spec, 8, 16)
    if fresh.key is not None:
        fresh.key.copy_(quantizer.key)  # random choices go on
    for q in (quantizer, fresh):
        q.set_codebook(wanted)
        trained(q, 1)
    assert same(state(quantizer), state(fresh))
    quantizer.set_codebook(wanted)
    quantizer.train()(wanted)
    assert (quantizer.codebook - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("spec", ["vq", "vq + ema", "vq + affine", "vq + residual"])
@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_a_given_codebook_has_begun(spec, init):
    quantizer = recipe(spec, 8, 16, init=init)
    parts = quantizer.parts if "residual" in spec else [quantizer]
    for part in parts:
        part.set_codebook(vectors(spec))
        assert part.book.started and not part.book.waiting
    quantizer.train()(100 + torch.randn(64, 8))
    for part in parts:
        assert part.codebook.max() < 50


def test_steps_and_idle_times_begin_again():
    quantizer = trained(recipe("vq + refit + replace", 8, 16, refit=4), 3, n=2)
    assert quantizer.alive.idle.any()
    quantizer.set_codebook(vectors("vq"))
    assert not quantizer.alive.idle.any()
    for _ in range(4):
        quantizer.train()(vectors("vq"))
    assert torch.equal(quantizer.codebook, vectors("vq"))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("spec", ["vq", "vq + ema", "vq + affine", "vq + moving-affine", "router"])
def test_given_in_any_dtype(spec, dtype):
    for own in (dtype, torch.float32):
        quantizer, wanted = recipe(spec, 8, 16).to(dtype), vectors(spec).to(own)
        quantizer.set_codebook(wanted)
        assert quantizer.book.weight.dtype == dtype
        assert torch.allclose(quantizer.codebook.float(), wanted.float(), rtol=0.02, atol=0.02)
        trained(quantizer, 1)


@pytest.mark.parametrize("spec", GIVEN)
def test_what_cannot_be_given_changes_nothing(spec):
    quantizer, good = trained(recipe(spec, 8, 16)), vectors(spec)
    before = state(quantizer)
    poisoned = good.clone()
    poisoned[3, 3] = torch.nan
    for bad, kind, words in (
        (good[:15], ValueError, r"vectors must be \(k, d\) = \(16, 8\), got shape \(15, 8\)"),
        (good[:, :7], ValueError, r"got shape \(16, 7\)"),
        (good[None], ValueError, r"got shape \(1, 16, 8\)"),
        (good.tolist(), TypeError, "vectors must be a torch.Tensor, got list"),
        (good.long(), TypeError, "floating dtype, got torch.int64"),
        (poisoned, ValueError, "vectors must be finite"),
        (good / 0, ValueError, "vectors must be finite"),
    ):
        for call in (quantizer.set_codebook, quantizer.check_codebook):
            with pytest.raises(kind, match=words):
                call(bad)
    quantizer.check_codebook(good)
    assert same(state(quantizer), before)


def test_what_is_out_of_reach_is_refused():
    flat = recipe("vq + affine", 8, 16)
    flat.book.map.scale.data[0, 2] = -1.0
    flat_moving = trained(recipe("vq + moving-affine", 8, 16))
    flat_moving.book.map.var_z[1] = 0.0
    singular = recipe("simvq", 8, 16)
    singular.book.map.linear.weight.data[3] = 0.0
    narrow = recipe("vq", 8, 16).half()
    for quantizer, scale in ((flat, 1), (flat_moving, 1), (singular, 1), (narrow, 1e6)):
        before = state(quantizer)
        with pytest.raises(ValueError, match="within reach of the codebook's map"):
            quantizer.set_codebook(scale * vectors("vq"))
        assert same(state(quantizer), before)
    with pytest.raises(ValueError, match="must have a direction"):
        recipe("vq + l2", 8, 16).set_codebook(torch.zeros(16, 8))


def test_giving_leaves_the_givers_tensor_and_the_parameter_alone():
    quantizer, wanted = recipe("vq", 8, 16), vectors("vq").requires_grad_()
    parameter = quantizer.book.weight
    quantizer.set_codebook(wanted)
    quantizer.book.weight.data.add_(1)
    assert quantizer.book.weight is parameter and parameter.grad is None
    assert torch.equal(wanted, vectors("vq"))
    quantizer.set_codebook(quantizer.codebook)  # its own
    assert torch.equal(quantizer.codebook, wanted + 1)


LOADED = ["vq + ema", "vq + ema + replace", "optvq + ema", "vq + ema + residual"]
LOADED += ["vq + moving-affine"]


@pytest.mark.parametrize("spec", LOADED)
@pytest.mark.parametrize("used", [False, True])
def test_averages_that_a_state_lacks_are_made_of_its_table(spec, used):
    around = " + residual" if "residual" in spec else ""
    giver = trained(recipe("vq" + around, 8, 16))
    quantizer = trained(recipe(spec, 8, 16), 30 if used else 0, n=8)
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(quantizer).load_state_dict(giver.state_dict())
    quantizer.load_state_dict(giver.state_dict(), strict=False)
    assert torch.equal(quantizer.codebook, giver.codebook)
    for part in getattr(quantizer, "parts", [quantizer]):
        if part.alive is not None:
            assert not part.alive.idle.any()
        if part.average is not None:
            assert torch.equal(part.average.sums, part.book.weight)
            assert torch.equal(part.average.counts, torch.ones(16))


@pytest.mark.parametrize("missing", ["counts", "sums"])
def test_half_of_the_averages_is_none(missing):
    giver = trained(recipe("vq + ema", 8, 16), 30)
    partial = state(giver)
    del partial[f"average.{missing}"]
    quantizer = recipe("vq + ema", 8, 16)
    quantizer.load_state_dict(partial, strict=False)
    quantizer.train()(giver.codebook)
    assert (quantizer.codebook - giver.codebook).abs().max() < 0.02 * giver.codebook.abs().max()
    assert f"average.{missing}" not in partial and len(partial) == len(state(giver)) - 1


@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_a_table_that_is_loaded_alone_has_begun(init):
    book = Codebook(8, 16, init=init)
    book.load_state_dict({"weight": vectors("vq")}, strict=False)
    quantizer = recipe("vq + ema", 8, 16, init=init)
    quantizer.load_state_dict({"book.weight": vectors("vq")}, strict=False)
    assert not book.waiting and not quantizer.book.waiting
    quantizer.train()(vectors("vq"))
    assert (quantizer.codebook - vectors("vq")).abs().max() < 1e-3


def given_by_each(rank):
    torch.manual_seed(rank)
    quantizer = recipe("vq + ema + replace", 8, 16, init="sample")
    mine = torch.randn(16, 8)
    quantizer.set_codebook(mine)
    given = quantizer.codebook.detach().clone()
    quantizer.train().before_training()
    return quantizer.state_dict(), mine, given


def test_every_rank_takes_the_first_ones(tmp_path):
    (first, given, _), (second, other, before) = in_processes(2, tmp_path, given_by_each)
    assert same(first, second) and torch.equal(first["book.weight"], given)
    assert torch.equal(second["average.sums"], given) and not torch.equal(given, other)
    assert torch.equal(before, other)  # to give one waits for nobody; the next pass does
    _, again, _ = given_by_each(1)
    assert torch.equal(other, again)  # what was handed in is not written to


# ---- vectors that are not finite

BAD = (torch.nan, torch.inf, -torch.inf)
KEPT = ["vq + ema", "vq + ema + replace", "vq + l2 + ema + replace", "vq + replace"]
KEPT += ["vq + moving-affine", "vq + moving-affine + replace", "stochastic + ema + replace"]
KEPT += ["optvq + ema + replace", "vq + ema + residual + replace", "vq + ema + group + replace"]
KEPT += ["vq + ema + multiscale + replace", "vq + refit", "vq + ema + refit"]


def built(spec, **given):
    "Values are not looked at, as on a GPU."
    given |= {"life_span": 2} if "replace" in spec else {}
    given |= {"refit": 2} if "refit" in spec else {}
    torch.manual_seed(0)
    return recipe(spec, 8, 16, check_finite=False, **given).train()


def maps(seed):
    return torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(seed))


def poisoned(z, value, *rows):
    "z with that value in one coordinate of these rows."
    z = z.clone()
    for row in rows:
        z.view(-1, z.shape[-1])[row, row % 8] = value
    return z


def all_finite(module):
    return all(v.isfinite().all() for v in module.state_dict().values())


@pytest.mark.parametrize("spec", KEPT)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_vector_leaves_the_state_finite(spec, value):
    quantizer = built(spec)
    for step in range(8):
        quantizer(poisoned(maps(step), value, step, 31 - step))
        assert all_finite(quantizer), step
    used = quantizer.eval().encode(maps(99))
    assert len(used.unique()) > 4
    assert quantizer(maps(99)).loss.isfinite()


@pytest.mark.parametrize("spec", [spec for spec in KEPT if "refit" not in spec])
def test_a_batch_of_bad_vectors_alone(spec):
    quantizer = built(spec)
    for step in range(6):
        quantizer(maps(step) * (torch.nan if step > 2 else 1))
    assert all_finite(quantizer)
    moved = [name for name in state(quantizer) if "mean" in name or "var" in name]
    before = state(quantizer)
    quantizer(maps(0) * torch.inf)
    assert all(torch.equal(before[name], state(quantizer)[name]) for name in moved)


ROWWISE = ["vq + ema", "vq + ema + replace", "vq + l2 + ema", "vq + moving-affine", "optvq + ema"]
ROWWISE += ["vq + ema + residual"]


@pytest.mark.parametrize("spec", ROWWISE)
def test_upkeep_is_that_of_the_good_vectors(spec):
    first = built(spec)
    second = copy.deepcopy(first)
    for step in range(2):
        z = maps(step).view(-1, 8)
        without = torch.cat([z[:3], z[4:30], z[31:]])
        results = first(poisoned(z, torch.nan, 3, 30)), second(without)
        good = torch.ones(32, dtype=torch.bool).index_fill(0, torch.tensor([3, 30]), False)
        assert torch.equal(results[0].codes[good], results[1].codes)
    for name, value in state(first).items():
        assert torch.allclose(value, state(second)[name], atol=1e-5), name


@pytest.mark.parametrize("life_span", [1, 3])
def test_a_code_that_only_bad_vectors_choose_is_idle(life_span):
    quantizer = built("vq + ema + replace").eval()
    quantizer.alive.life_span = 100
    bad = torch.full((4, 8), torch.nan)
    chosen = quantizer.encode(bad).unique()
    for _ in range(life_span):
        quantizer.train()(bad)
    quantizer.settle()
    assert (quantizer.alive.idle[chosen] == life_span).all()


@pytest.mark.parametrize("init", ["kmeans", "sample"])
@pytest.mark.parametrize("spec", ["vq", "vq + ema", "vq + l2", "vq + affine"])
def test_starts_leave_bad_vectors_out(spec, init):
    quantizer = built(spec, init=init)
    waiting = state(quantizer)
    quantizer(maps(0) * torch.nan)  # no vector to begin with
    assert quantizer.book.waiting and not quantizer.book.started
    assert torch.allclose(quantizer.book.weight, waiting["book.weight"], atol=1e-4)
    z = poisoned(50 + maps(0), torch.nan, *range(0, 32, 3))
    quantizer(z)
    assert all_finite(quantizer) and not quantizer.book.waiting
    assert "l2" in spec or quantizer.codebook.min() > 40


@pytest.mark.parametrize("n,num", [(7, 4), (7, 7), (7, 20), (40, 12)])
def test_draws_of_bad_batches(n, num):
    z = torch.arange(float(n))[:, None].repeat(1, 3)
    bad = torch.arange(0, n, 3)
    torch.manual_seed(5)
    drawn = draw(z.index_fill(0, bad, torch.nan), num)[:, 0]
    good = n - len(bad)
    counts = drawn.round().unique(return_counts=True)[1]
    assert drawn.isfinite().all() and not torch.isin(drawn.round(), bad.float()).any()
    assert len(counts) == min(num, good) and counts.max() - counts.min() <= 1
    torch.manual_seed(5)
    order = draw(z, n)[:, 0].long()  # the good ones come in the order that all would have
    left = order[~torch.isin(order, bad)]
    assert torch.equal(drawn.round(), left[torch.arange(num) % good].float())
    assert draw(z * torch.nan, num).shape == (num, 3)


def test_draws_of_good_batches_come_in_the_order_of_the_key():
    z, key = torch.randn(50, 3), torch.tensor(12345)
    order = random_bits(key, 50).argsort()
    for num in (7, 50):
        assert torch.equal(draw(z, num, key), z[order[:num]])
    assert torch.equal(draw(z, 120, key)[:50], z[order])


def always_a_mask(z):
    return z.abs().amax(1).isfinite()


def test_the_mask_changes_nothing_where_all_is_finite(monkeypatch):
    "What a GPU and a compiled step do, which cannot ask, gives the same bits."
    for spec in KEPT:
        results = []
        for asks in (True, False):
            with monkeypatch.context() as patch:
                for module in () if asks else ("ranks", "codebook", "vector", "transport"):
                    patch.setattr(f"vqstudy.{module}.finite_rows", always_a_mask)
                quantizer = built(spec)
                for step in range(6):
                    torch.manual_seed(step)
                    quantizer(maps(step))
                results.append(state(quantizer))
        assert same(*results), spec


def test_kmeans_and_sample_of_bad_batches():
    z = poisoned(torch.randn(300, 8), torch.inf, *range(0, 300, 7))
    for k in (4, 280):
        assert kmeans(z, k).isfinite().all() and sample(z, k).isfinite().all()
    with pytest.raises(ValueError, match="z must be finite in one vector at least"):
        kmeans(z * torch.nan, 4)


def test_the_largest_numbers_are_finite():
    z = torch.full((3, 4), 3.0e38)
    z[1, 2] = -torch.inf
    assert finite_rows(z).tolist() == [True, False, True]
    assert finite_rows(z[:1]) is None


def test_a_transport_plan_without_the_bad_vectors():
    torch.manual_seed(0)
    x, codebook = torch.randn(64, 4) + 3, torch.randn(8, 4)
    bad = torch.cat([x, torch.full((9, 4), torch.nan)])
    codes = sinkhorn_codes(bad, codebook, check_finite=False)
    assert torch.equal(codes[:64], sinkhorn_codes(x, codebook))
    with pytest.raises(ValueError, match="x must be finite"):
        sinkhorn_codes(bad, codebook)


def one_rank_is_bad(rank, world, spec, init):
    quantizer = built(spec, init=init)
    for step in range(5):
        z = poisoned(maps(step).view(-1, 8), torch.nan, 2, 9, 12, 17)
        if world > 1:
            z = z.split([12, 20])[rank]
        torch.manual_seed(step)
        quantizer(z)
    return quantizer.state_dict()


@pytest.mark.parametrize("spec", ["vq + ema + replace", "vq + moving-affine", "optvq + ema"])
@pytest.mark.parametrize("init", ["normal", "sample", "kmeans"])
def test_bad_vectors_on_some_ranks(tmp_path, spec, init):
    alone = one_rank_is_bad(0, 1, spec, init)
    first, second = in_processes(2, tmp_path, one_rank_is_bad, 2, spec, init)
    assert same(first, second)
    for name, value in alone.items():
        assert torch.allclose(value, first[name], atol=1e-4), name


@pytest.mark.parametrize("spec", ["vq + ema + replace", "vq + moving-affine", "optvq + ema"])
def test_a_compiled_step_leaves_bad_vectors_out(spec):
    torch._dynamo.reset()
    eager = built(spec)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for i in range(3):
        z = poisoned(maps(i), torch.nan, 3)
        eager(z)
        step(z)
    assert all_finite(compiled)
    for name, value in state(eager).items():
        assert torch.allclose(value, state(compiled)[name], atol=1e-5), name


# ---- a codebook that is frozen

FROZEN = ["vq", "vq + ema", "vq + ema + replace", "vq + l2 + replace", "vq + affine"]
FROZEN += ["vq + moving-affine + replace", "vq + refit", "simvq", "stochastic + ema", "optvq + ema"]
FROZEN += ["vq + sync", "vq + alt", "vq + nsvq", "vq + rotation", "router", "router + tied"]
FROZEN += ["gumbel", "sq", "fsq", "lfq", "bsq"]


def train_step(quantizer, optimizer, z):
    leaf = z.clone().requires_grad_()
    result = quantizer.train()(leaf)
    (result.z_q.pow(2).sum() + result.loss).backward()
    optimizer.step()
    return leaf.grad


@pytest.mark.parametrize("spec", FROZEN)
def test_nothing_of_a_frozen_quantizer_moves(spec):
    quantizer = built(spec)
    others = torch.nn.Parameter(torch.zeros(1))  # moving averages leave no parameter at all
    optimizer = torch.optim.AdamW([*quantizer.parameters(), others], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        train_step(quantizer, optimizer, maps(seed) + 3)  # the last gradients are left behind
    assert not quantizer.frozen and quantizer.freeze() is quantizer and quantizer.frozen
    before = state(quantizer)
    for seed in range(5):
        grad = train_step(quantizer, optimizer, maps(seed) - 3)
        assert grad is not None and grad.abs().max() > 0
        optimizer.zero_grad(set_to_none=False)
    assert same(state(quantizer), before)
    assert all(p.grad is None and not p.requires_grad for p in quantizer.parameters())
    assert quantizer.unfreeze() is quantizer and not quantizer.frozen
    train_step(quantizer, optimizer, maps(9))
    assert not same(state(quantizer), before)


def test_unfreezing_restores_what_learned():
    quantizer = built("gumbel")
    quantizer.head.weight.requires_grad_(False)
    for _ in range(2):
        quantizer.freeze().freeze()
        quantizer.unfreeze().unfreeze()
        learned = {name: p.requires_grad for name, p in quantizer.named_parameters()}
        assert learned == {"book.weight": True, "head.weight": False, "head.bias": True}


def test_requires_grad_alone_stops_the_gradients_alone():
    quantizer = built("vq + ema + replace").requires_grad_(False)
    before = state(quantizer)
    quantizer(maps(0))
    assert not quantizer.frozen and not same(state(quantizer), before)


def test_copies_are_frozen_and_states_are_not():
    quantizer = built("vq + ema")
    keys = list(quantizer.state_dict())
    quantizer.freeze()
    assert copy.deepcopy(quantizer).frozen
    assert pickle.loads(pickle.dumps(quantizer)).frozen
    assert list(quantizer.state_dict()) == keys
    fresh = built("vq + ema")
    fresh.load_state_dict(quantizer.state_dict())
    assert not fresh.frozen
    quantizer.load_state_dict(fresh.state_dict())
    assert quantizer.frozen


@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_a_codebook_that_waits_is_not_frozen(init):
    quantizer = built("vq + ema", init=init)
    with pytest.raises(RuntimeError, match="waits for its first training batch"):
        quantizer.freeze()
    assert not quantizer.frozen
    quantizer.set_codebook(vectors("vq"))
    quantizer.freeze()(maps(0))
    assert torch.equal(quantizer.codebook, vectors("vq"))
    quantizer.set_codebook(vectors("vq") + 1)  # what the user gives is taken all the same
    assert torch.equal(quantizer.codebook, vectors("vq") + 1)


def test_a_frozen_quantizer_takes_no_inner_step():
    quantizer = built("vq + alt").freeze()
    quantizer.inner_step = lambda loss: pytest.fail("an inner step")
    quantizer(maps(0))


@pytest.mark.parametrize("spec", ["vq + ema + replace", "vq + moving-affine", "vq + affine"])
def test_a_frozen_step_compiles(spec):
    torch._dynamo.reset()
    quantizer = built(spec).freeze()
    before = state(quantizer)
    step = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    z = maps(0).requires_grad_()
    result = step(z)
    result.loss.backward()
    assert z.grad.abs().max() > 0 and same(state(quantizer), before)
    assert torch.equal(result.z_q, quantizer(z).z_q)
