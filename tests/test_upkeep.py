"""What a codebook's upkeep promises: wide statistics, given codebooks, bad vectors, freezing."""

import copy
import pytest
import torch
from vqstudy.codebook import MovingAffine, MovingAverage
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
