"""Every rule against its matrix form or float64 autograd; the forward value; the corners."""

import pytest
import torch
from vqstudy.estimators import estimate, full, none, reflection, rotation, straight_through
from vqstudy.estimators import synchronized

RULES = {
    "straight_through": straight_through,
    "none": none,
    "full": full,
    "synchronized": synchronized(0.3),
    "rotation": rotation(),
    "rotation unit": rotation("unit"),
    "rotation distance": rotation("distance"),
    "rotation projected": rotation(project=True),
    "reflection": reflection(),
    "reflection unit": reflection("unit"),
    "reflection projected": reflection(project=True),
}
SHAPES = [(1, 2), (7, 3), (40, 16), (5, 64)]


def unit(t):
    return t / t.norm(dim=1, keepdim=True)


def turned(z, q, z_leaf, mirror=False):
    "R z_leaf with R as a matrix, constant: the rotation (or the mirror) of z's direction to q's."
    e, u, eye = unit(z), unit(q), torch.eye(z.shape[1], dtype=z.dtype)
    outer = lambda a, b: a[:, :, None] * b[:, None]
    if mirror:
        r = unit(e - u)
        R = eye - 2 * outer(r, r)
    else:
        w = unit(e + u)
        R = eye - 2 * outer(w, w) + 2 * outer(u, e)
    assert torch.allclose((R @ e[..., None])[..., 0], u)
    assert torch.allclose(torch.linalg.det(R), eye.new_tensor(-1.0 if mirror else 1.0))
    return (R @ z_leaf[..., None])[..., 0]


def naive(name, z, q):
    "Each method as its paper writes it: something whose autograd gradient is the rule's."
    ratio = (q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True)).detach()
    zd, qd = z.detach(), q.detach()
    return {
        "straight_through": lambda: z + (q - z).detach(),
        "none": lambda: q,
        "full": lambda: z + q,
        "synchronized": lambda: z + 0.3 * q,
        "rotation": lambda: ratio * turned(zd, qd, z),
        "rotation unit": lambda: turned(zd, qd, z),
        "rotation distance": lambda: (
            turned(zd, qd, z) / (8 * (qd - zd).pow(2).sum(1, keepdim=True))
        ),
        "rotation projected": lambda: (
            ratio * turned(zd, qd, unit(z)) * zd.norm(dim=1, keepdim=True)
        ),
        "reflection": lambda: ratio * turned(zd, qd, z, mirror=True),
        "reflection unit": lambda: turned(zd, qd, z, mirror=True),
        "reflection projected": lambda: (
            ratio * turned(zd, qd, unit(z), mirror=True) * zd.norm(dim=1, keepdim=True)
        ),
    }[name]()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n,d", SHAPES)
def test_gradients_against_float64_autograd(name, n, d):
    torch.manual_seed(n + d)
    z, q = (torch.randn(n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = torch.randn(n, d, dtype=torch.float64)
    ours = torch.autograd.grad(estimate(z, q, RULES[name]), (z, q), g)
    theirs = torch.autograd.grad(naive(name, z, q), (z, q), g, allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a - (torch.zeros_like(a) if b is None else b)).abs().max() < 1e-10


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_q_to_the_last_bit(name, dtype):
    torch.manual_seed(0)
    z, q = (torch.randn(50, 8).to(dtype).requires_grad_() for _ in range(2))
    value = estimate(z, q, RULES[name])
    assert torch.equal(value, q) and value.dtype == dtype
    value.sum().backward()
    for leaf in (z, q):
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "case", ["opposite", "nearly opposite", "z zero", "q zero", "tiny z", "equal", "both zero"]
)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_corners_are_finite(name, case, d):
    torch.manual_seed(1)
    z = torch.randn(6, d)
    q = {
        "opposite": -z,
        "nearly opposite": -z + 1e-7 * torch.randn_like(z),
        "z zero": z,
        "q zero": 0 * z,
        "tiny z": z,
        "equal": z.clone(),
        "both zero": 0 * z,
    }[case]
    z = {"z zero": 0 * z, "tiny z": 1e-12 * z, "both zero": 0 * z}.get(case, z)
    g = torch.randn(6, d)
    for grad in RULES[name](z, q, g):
        assert grad.isfinite().all() and grad.norm() <= 1.01e6 * g.norm()
    if case in ("z zero", "q zero", "both zero") and name.startswith(("rotation", "reflection")):
        assert torch.equal(RULES[name](z, q, g)[0], g)


@pytest.mark.parametrize("d", [2, 3, 64])
def test_a_half_turn_keeps_the_angle(d):
    torch.manual_seed(2)
    z = torch.randn(20, d, dtype=torch.float64)
    g = torch.randn_like(z)
    grad = rotation("unit")(z, -z, g)[0]
    assert torch.allclose((grad * z).sum(1), -(g * z).sum(1))
    assert torch.allclose(grad.norm(dim=1), g.norm(dim=1))


def test_the_factor_is_clamped():
    z, q, g = torch.tensor([[1e-9, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.allclose(rotation()(z, q, g)[0].norm(), torch.tensor(1e6))


@pytest.mark.parametrize("rule", [rotation, reflection])
def test_projected_has_no_radial_part(rule):
    "And nothing else is lost: what is left out lies along z."
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 100, 9, dtype=torch.float64)
    grad, whole = rule(project=True)(z, q, g)[0], rule()(z, q, g)[0]
    assert (grad * z).sum(1).abs().max() < 1e-12
    assert (whole * z).sum(1).abs().max() > 0.1
    e = unit(z)
    assert torch.allclose(whole - grad, e * (whole * e).sum(1, keepdim=True))


def test_projected_where_nothing_is_mirrored():
    "q along z: the identity, without its part along z; z or q zero: straight-through."
    torch.manual_seed(0)
    z, g = torch.randn(2, 20, 5, dtype=torch.float64)
    e = unit(z)
    expected = 3 * (g - e * (g * e).sum(1, keepdim=True))
    assert torch.allclose(reflection(project=True)(z, 3 * z, g)[0], expected)
    assert torch.equal(reflection(project=True)(0 * z, z, g)[0], g)
    assert torch.equal(reflection(project=True)(z, 0 * z, g)[0], g)


def test_on_the_sphere_norm_and_unit_coincide():
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 100, 9, dtype=torch.float64)
    z, q = unit(z), unit(q)
    assert torch.allclose(rotation("norm")(z, q, g)[0], rotation("unit")(z, q, g)[0])
    radial = lambda t: z * (z * t).sum(1, keepdim=True)
    whole = rotation("unit")(z, q, g)[0]
    assert torch.allclose(rotation("unit", project=True)(z, q, g)[0], whole - radial(whole))


@pytest.mark.parametrize("name", RULES)
def test_leading_shapes_and_strides(name):
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 4, 3, 5)
    z, q = z.mT.contiguous().mT.requires_grad_(), q.clone().requires_grad_()
    whole = torch.autograd.grad(estimate(z, q, RULES[name]), (z, q), g)
    flat = RULES[name](z.reshape(-1, 5).detach(), q.reshape(-1, 5).detach(), g.reshape(-1, 5))
    for a, b in zip(whole, flat):
        assert torch.allclose(a.reshape(-1, 5), b)


@pytest.mark.parametrize("name", ["straight_through", "synchronized", "rotation", "reflection"])
def test_compiles_without_a_break(name):
    torch.manual_seed(0)
    z, q = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    step = lambda z, q: (estimate(z, q, RULES[name]) ** 2).sum()
    eager = torch.autograd.grad(step(z, q), (z, q))
    compiled = torch.autograd.grad(
        torch.compile(step, fullgraph=True, backend="aot_eager")(z, q), (z, q)
    )
    for a, b in zip(eager, compiled):
        assert torch.allclose(a, b)


def test_bad_arguments_are_named():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"dtype and device, got \(2, 3\).*\(2, 2\)"):
        estimate(z, z[:, :2])
    with pytest.raises(ValueError, match="float64"):
        estimate(z, z.double())
    with pytest.raises(TypeError, match="rule must be a function"):
        estimate(z, z, "ste")
    with pytest.raises(ValueError, match="got 'length'"):
        rotation("length")
    with pytest.raises(ValueError, match="got 'length'"):
        reflection("length")
