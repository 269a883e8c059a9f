"""What rules do to measured gradients: against closed forms, finite differences, autograd."""

import copy
import math
import pytest
import torch
from torch import nn
from vqstudy.autoencoders import Autoencoder
from vqstudy.backward import Passage, RuleMonitor, batch_shape, compare_rules, decoder_rules
from vqstudy.backward import passage, rule_effects, spreading
from vqstudy.bottleneck import quantized_task
from vqstudy.estimators import reflection, rotation, straight_through
from vqstudy.quantizers import RouterQuantizer, recipe
from vqstudy.train import reproducible

SPECS = ["vq", "vq + l2", "vq + ema + replace", "vq + affine + opt", "vq + exact"]
SPECS += ["vq + deferred", "router", "fsq"]


def model_of(spec):
    reproducible(0)
    return Autoencoder(recipe(spec, 8, 32, channel_dim=1), channels=8)


def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vectors(n=200, d=5, k=7, seed=0):
    "Vectors, their nearest of k codes, and gradients."
    generator = torch.Generator().manual_seed(seed)
    z, g = torch.randn(2, n, d, dtype=torch.float64, generator=generator)
    book = torch.randn(k, d, dtype=torch.float64, generator=generator)
    codes = torch.cdist(z, book).argmin(1)
    return Passage(z, book[codes], g, codes)


# ---- passage ----


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_leaves_what_the_model_has_at_its_quantizer(spec):
    model, x = model_of(spec), images()
    seen = passage(model, quantized_task, x)
    model.eval()
    out = model.quantizer(model.encoder(x))
    q = out.z_q.detach().requires_grad_()
    [wanted] = torch.autograd.grad(model.decoder_loss(q, x, None), q)
    assert torch.equal(seen.codes, out.codes.reshape(-1))
    assert torch.equal(seen.q, q.detach().movedim(1, -1).reshape(-1, 8))
    assert torch.equal(seen.g, wanted.movedim(1, -1).reshape(-1, 8))
    assert seen.z.shape == seen.q.shape


@pytest.mark.parametrize("spec", SPECS)
def test_the_exact_gradient_is_that_of_the_decoder_on_z(spec):
    model, x = model_of(spec), images()
    seen = passage(model, quantized_task, x)
    model.eval()
    z = seen.z.view(4, 8, 8, 8).movedim(-1, 1).detach().requires_grad_()
    [wanted] = torch.autograd.grad(model.decoder_loss(z, x, None), z)
    assert torch.allclose(seen.exact, wanted.movedim(1, -1).reshape(-1, 8), rtol=1e-5, atol=1e-9)
    assert not torch.equal(seen.exact, seen.g)


def test_codes_of_another_width_have_no_exact_gradient():
    quantizer = RouterQuantizer(4, 8, code_dim=6)
    seen = passage(quantizer, lambda model, x, y: model(x).z_q.square().sum(), torch.randn(3, 4))
    assert seen.exact is None and seen.g.shape == (3, 6)


@pytest.mark.parametrize("spec", SPECS)
def test_measuring_changes_nothing(spec):
    model, x = model_of(spec), images()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    passage(model, quantized_task, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_normalised_vectors_are_those_that_are_compared():
    seen = passage(model_of("vq + l2"), quantized_task, images())
    assert torch.allclose(seen.z.norm(dim=1), torch.ones(len(seen.z)))


def test_a_model_without_one_quantizer_is_refused():
    several = nn.Sequential(recipe("vq", 4, 8), recipe("vq", 4, 8))
    for model in (nn.Linear(4, 4), several, nn.Sequential(recipe("vq + residual", 4, 8))):
        with pytest.raises(ValueError, match="quantizer"):
            passage(model, lambda model, x, y: model(x).z_q.sum(), torch.randn(3, 4))


# ---- spreading ----


def squares(z, codes):
    "The summed squared distances to the means of the cells, in the naive form."
    cells = [z[codes == code] for code in codes.unique()]
    return sum(((cell - cell.mean(0)) ** 2).sum() for cell in cells)


def test_spreading_is_the_rate_of_growth_over_the_largest():
    seen = vectors()
    step, eps = seen.g, 1e-6
    ends = [squares(seen.z + sign * eps * step, seen.codes) for sign in (1, -1)]
    rate = (ends[0] - ends[1]) / (2 * eps)
    largest = 2 * (squares(seen.z, seen.codes) * squares(step, seen.codes)).sqrt()
    assert spreading(seen.z, seen.codes, step) == pytest.approx(float(rate / largest), rel=1e-6)


def test_spreading_has_the_sign_of_the_step_and_knows_no_common_one():
    seen = vectors()
    outward = seen.z - seen.q  # about a point of the cell, as good as about its mean
    assert spreading(seen.z, seen.codes, outward) == pytest.approx(1)
    assert spreading(seen.z, seen.codes, -outward) == pytest.approx(-1)
    assert math.isnan(spreading(seen.z, torch.arange(len(seen.z)), outward))  # a point a cell


# ---- rules ----


def test_a_rotation_turns_a_gradient_in_the_plane_by_the_angle_of_z_and_q():
    z = torch.tensor([[2.0, 0.0, 0.0]])
    for degrees in (0.001, 30.0, 120.0):
        turn = math.radians(degrees)
        q = torch.tensor([[math.cos(turn), math.sin(turn), 0.0]])
        seen = Passage(z, q, torch.tensor([[0.3, -0.4, 0.0]]), torch.tensor([0]))
        found = rule_effects(seen, rotation())
        assert found["angle"] == pytest.approx(degrees, rel=1e-4)
        assert found["length"] == pytest.approx(0.5)
        assert batch_shape(seen)["angle"] == pytest.approx(degrees, rel=1e-3)


def test_each_rule_has_a_row_of_what_its_formula_says():
    seen = vectors()
    rules = {"ste": straight_through, "turn": rotation(scale="unit"), "mirror": reflection()}
    rows = {row["rule"]: row for row in compare_rules(seen, rules)}
    assert rows["ste"]["angle"] == 0 and rows["ste"]["length"] == 1
    assert rows["ste"]["spreading"] == spreading(seen.z, seen.codes, -seen.g)
    assert rows["turn"]["length"] == pytest.approx(1)
    sizes = (seen.q.norm(dim=1) / seen.z.norm(dim=1)).log().mean().exp()
    assert rows["mirror"]["length"] == pytest.approx(float(sizes))
    assert batch_shape(seen)["points"] == 200 / len(seen.codes.unique())


def test_vectors_without_a_gradient_are_left_out():
    seen = vectors()
    half = seen._replace(g=seen.g * (torch.arange(200) % 2)[:, None])
    part = Passage(*(x[1::2] for x in seen[:4]))
    for rule in (straight_through, rotation()):
        whole, alone = rule_effects(half, rule), rule_effects(part, rule)
        assert [whole[x] for x in ("angle", "length")] == pytest.approx(
            [alone[x] for x in ("angle", "length")]
        )
    nothing = rule_effects(seen._replace(g=0 * seen.g), rotation())
    assert all(math.isnan(value) for value in nothing.values())


def test_the_distance_from_the_exact_gradient_is_relative_to_it():
    seen = vectors()
    exact = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = seen._replace(exact=exact)
    found = rule_effects(seen, straight_through)
    assert found["exact_distance"] == pytest.approx(float((seen.g - exact).norm() / exact.norm()))
    degrees = torch.rad2deg(torch.cosine_similarity(seen.g, exact, dim=1).acos()).mean()
    assert found["exact_angle"] == pytest.approx(float(degrees))
    given = rule_effects(seen, lambda z, q, g: (exact, g))
    assert given["exact_distance"] == 0 and given["exact_angle"] == pytest.approx(0)


# ---- over a training ----


@pytest.mark.parametrize("spec", ["vq", "vq + l2", "vq + exact", "router"])
def test_the_exact_rule_is_at_no_distance_from_the_exact_gradient(spec):
    model, x = model_of(spec), images()
    rules = decoder_rules(model, x)
    effects = {r: rule_effects(passage(model, quantized_task, x), rules[r]) for r in rules}
    assert effects["exact"]["exact_distance"] < 1e-4
    assert effects["hessian"]["exact_distance"] > 1e-4


def test_the_second_order_rule_is_a_directional_derivative_of_the_gradient():
    model, x = model_of("vq"), images()
    seen = passage(model, quantized_task, x)
    given, _ = decoder_rules(model, x)["hessian"](*seen[:3])
    model.double().eval()

    def slope(rows):
        v = rows.view(4, 8, 8, 8).movedim(-1, 1).detach().requires_grad_()
        [g] = torch.autograd.grad(model.decoder_loss(v, x.double(), None), v)
        return g.movedim(1, -1).reshape(-1, 8)

    z, q, eps = seen.z.double(), seen.q.double(), 1e-6
    rate = (slope(q + eps * (z - q)) - slope(q - eps * (z - q))) / (2 * eps)
    assert torch.allclose(given.double(), slope(q) + rate, rtol=1e-3, atol=1e-7)


def test_a_monitor_says_of_each_rule_what_is_so_and_moves_nothing():
    model, x = model_of("vq + ema"), images()
    before = copy.deepcopy(model.state_dict())
    watch = RuleMonitor(quantized_task, x, {"turn": rotation()}, at=lambda step: step == 3)
    assert watch(model, 2) is None
    row, seconds = watch(model, 3)
    wanted = rule_effects(passage(model, quantized_task, x), rotation())
    assert {name: row[f"{name}:turn"] for name in wanted} == wanted
    assert row["angle"] == batch_shape(passage(model, quantized_task, x))["angle"]
    assert {name.partition(":")[2] for name in row if ":" in name} == {"turn", "hessian", "exact"}
    assert list(seconds) == ["rules"] and model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_a_monitor_without_rules_is_refused():
    with pytest.raises(ValueError, match="rules must name at least one"):
        RuleMonitor(quantized_task, images(), {})
