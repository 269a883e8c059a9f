"""The diversity loss against its n x k form in float64, and what it does at the edges."""

import copy
import math
import pickle
import pytest
import torch
from torch.func import grad, vmap
from vqstudy.diversity import diversity
from vqstudy.quantizers import keywords, recipe
from vqstudy.vector import SimVQ, StochasticQuantizer, VectorQuantizer


def written(z, c, weight=1.0, temperature=1.0):
    "The formula, from all n x k distances."
    square = (z[:, None] - c).pow(2).sum(2)
    m = square.min(1).values.mean().detach()
    mean = (-square / (temperature * m)).softmax(1).mean(0)
    return weight * torch.xlogy(mean, mean).sum()


def with_gradients(loss, z, c):
    leaves = z.detach().clone().requires_grad_(), c.detach().clone().requires_grad_()
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def off(a, b):
    "The relative difference; of what is nearly 0, where a choice is sure, the difference."
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-2))


# beyond a tile of 2048 codes, and of 466 rows of them; neither a multiple of it
SIZES = [(1, 2, 3), (40, 7, 3), (7, 40, 3), (1100, 4500, 4), (3000, 5, 1)]


@pytest.mark.parametrize("n,k,d", SIZES)
def test_value_and_both_gradients_are_those_of_the_formula(n, k, d):
    torch.manual_seed(n)
    z, c = torch.randn(n, d).double(), torch.randn(k, d).double() + 0.5
    for weight, temperature in ((1.0, 1.0), (0.3, 0.1), (2.0, 20.0)):
        wanted = with_gradients(lambda z, c: written(z, c, weight, temperature), z, c)
        # float32 loses what |z|^2 is larger than the temperature, here up to 10^4 times
        for dtype, most in ((torch.float64, 1e-11), (torch.float32, 5e-3)):
            loss = diversity(weight, temperature)
            found = with_gradients(loss, z.to(dtype), c.to(dtype))
            errors = [off(a, b) for a, b in zip(found, wanted)]
            assert all(a.dtype == dtype for a in found) and max(errors) < most, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    torch.manual_seed(0)
    z, c = torch.randn(60, 4).to(dtype), torch.randn(9, 4).to(dtype)
    wide = with_gradients(diversity(1.0), z.float(), c.float())
    found = with_gradients(diversity(1.0), z, c)
    assert torch.equal(found[0], wide[0])
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found[1:], wide[1:]))


def test_ties_share_and_codes_that_nobody_is_near_get_a_finite_gradient():
    z, c = torch.randn(50, 2).double(), torch.randn(3, 2).double()
    twice = with_gradients(diversity(1.0), z, torch.cat([c, c]))
    once = with_gradients(diversity(1.0), z, c)
    assert twice[0].item() == pytest.approx(once[0].item() - math.log(2), abs=1e-12)
    assert torch.allclose(twice[2][:3], twice[2][3:], atol=1e-14)
    assert torch.allclose(twice[2][:3] * 2, once[2], atol=1e-14)
    for place in (20.0, 1e4, 1e12):
        found = with_gradients(diversity(1.0), z, torch.cat([c, c + place]))
        assert all(part.isfinite().all() for part in found)


def test_vectors_on_their_codes_are_sure_and_one_code_leaves_nothing_to_choose():
    for dtype in (torch.float32, torch.float64):
        c = torch.randn(16, 4, dtype=dtype)
        value, to_z, to_c = with_gradients(diversity(1.0), c, c)  # m is 0
        assert value.item() == pytest.approx(-math.log(16), abs=1e-5)
        assert to_z.isfinite().all() and to_c.isfinite().all()
        for z in (c, c[:1], torch.zeros_like(c)):
            found = with_gradients(diversity(1.0), z, c[:1])
            assert not any(part.any() for part in found)
        assert with_gradients(diversity(1.0), 0 * c, 0 * c)[0].isfinite()


def test_the_unit_of_the_vectors_does_not_matter():
    torch.manual_seed(0)
    z, c = torch.randn(50, 4), torch.randn(9, 4)
    value, to_z, to_c = with_gradients(diversity(1.0), z, c)
    for power in (-60, -10, 10, 50):
        unit = 2.0**power
        found = with_gradients(diversity(1.0), unit * z, unit * c)
        assert found[0].item() == pytest.approx(value.item(), rel=1e-6)
        assert off(found[1] * unit, to_z) < 1e-5
        assert off(found[2] * unit, to_c) < 1e-5


def test_what_is_not_finite_reaches_the_loss_and_no_upkeep():
    "As with a router's entropy: the loss is NaN, for fit to stop or a scaler to skip."
    quantizer = recipe("vq + ema + replace + diversity", 4, 8, check_finite=False).train()
    z = torch.randn(20, 4)
    z[3] = torch.nan
    assert quantizer(z).loss.isnan()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("over", [(0, 0), (None, 0), (0, None)], ids=str)
def test_vmap_equals_a_loop(over):
    z, c = torch.randn(3, 20, 4).double(), torch.randn(3, 9, 4).double()
    z, c = z if over[0] == 0 else z[0], c if over[1] == 0 else c[0]
    of = grad(diversity(1.0), (0, 1))
    to_z, to_c = vmap(of, over)(z, c)
    for i in range(3):
        one = of(z[i] if over[0] == 0 else z, c[i] if over[1] == 0 else c)
        assert torch.allclose(to_z[i], one[0], atol=1e-13)
        assert torch.allclose(to_c[i], one[1], atol=1e-13)


def test_the_term_belongs_to_training():
    torch.manual_seed(0)
    given = dict(diversity=0.7, diversity_temperature=2.0)
    plain = VectorQuantizer(4, 8)
    quantizer = recipe("vq + diversity", 4, 8, **given)
    quantizer.load_state_dict(plain.state_dict(), strict=True)
    z = torch.randn(30, 4)
    assert torch.equal(quantizer.eval()(z).loss, plain.eval()(z).loss)
    more = quantizer.train()(z).loss - plain.train()(z).loss
    assert more.item() == pytest.approx(written(z, plain.codebook, 0.7, 2.0).item(), rel=1e-4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(quantizer)))
    assert torch.equal(again(z).loss, quantizer(z).loss)


def test_moving_averages_leave_it_to_the_encoder():
    quantizer, z = recipe("vq + ema + diversity", 4, 8, alpha=0.0), torch.randn(30, 4)
    z.requires_grad_()
    quantizer(z).loss.backward()
    assert z.grad.abs().sum() > 0 and not list(quantizer.parameters())


@pytest.mark.parametrize("kind", [VectorQuantizer, StochasticQuantizer, SimVQ])
def test_any_function_can_be_a_penalty(kind):
    of_size = lambda z, codebook, processes: codebook.square().sum()
    quantizer, z = kind(4, 8, alpha=0.0, penalty=of_size), torch.randn(30, 4)
    assert torch.equal(quantizer(z).loss, quantizer.codebook.square().sum())
    with pytest.raises(TypeError, match="penalty must be a function or None, got 0.1"):
        kind(4, 8, penalty=0.1)


@pytest.mark.parametrize("given", [dict(weight=-0.1), dict(temperature=0), dict(temperature=-1.0)])
def test_bad_values(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        diversity(**given)
    word = "diversity" if name == "weight" else f"diversity_{name}"
    with pytest.raises(ValueError):
        recipe("vq + diversity", 4, 8, **{word: given[name]})
    assert word in keywords("vq + diversity")
