"""What a codebook's upkeep promises: wide statistics, given codebooks, bad vectors, freezing."""

import copy
import pytest
import torch
from processes import in_processes
from vqstudy.codebook import Codebook, MovingAffine, MovingAverage
from vqstudy.quantizers import recipe

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
    assert all(buffer.dtype == torch.float32 for buffer in kept)


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
    return quantizer.state_dict(), mine


def test_every_rank_takes_the_first_ones(tmp_path):
    (first, given), (second, other) = in_processes(2, tmp_path, given_by_each)
    assert same(first, second) and torch.equal(first["book.weight"], given)
    assert torch.equal(second["average.sums"], given) and not torch.equal(given, other)
    _, again = given_by_each(1)
    assert torch.equal(other, again)  # what was handed in is not written to
