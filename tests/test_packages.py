"""Quantizers of vector-quantize-pytorch behind our contract do what ours do, pass by pass."""

import pytest
import torch
from vqstudy.lattice import FSQ
from vqstudy.packages import PackageQuantizer, counterpart, nudge
from vqstudy.quantizers import recipe

DIM, CODES = 6, 64
SAME = ["vq + ema", "vq + rotation + ema", "simvq", "simvq + rotation"]


def pair(spec, **options):
    torch.manual_seed(0)
    ours = recipe(spec, DIM, CODES, channel_dim=1, **options)
    return ours.train(), counterpart(ours).train()


def passed(quantizer, z, g):
    "Vectors, codes, loss, and the gradient to z of <vectors, g> + loss."
    leaf = z.clone().requires_grad_()
    q, codes, loss = quantizer(leaf)
    ((q * g).sum() + loss).backward()
    return q.detach(), codes, loss.detach(), leaf.grad


def maps(steps=5):
    torch.manual_seed(1)
    return [torch.randn(2, 3, DIM, 4, 4) for _ in range(steps)]


@pytest.mark.parametrize("spec", SAME)
@pytest.mark.parametrize("beta", [0.5, 0.95])
def test_passes_agree(spec, beta):
    ours, theirs = pair(spec, alpha=3.0, beta=beta)
    for z, g in maps():
        mine, other = passed(ours, z, g), passed(theirs, z, g)
        assert torch.equal(mine[1], other[1])
        for a, b in zip(mine, other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_codebooks_move_alike(decay):
    ours, theirs = pair("vq + ema", decay=decay)
    begin = ours.codebook.clone()
    for z, g in maps(10):
        passed(ours, z, g)
        passed(theirs, z, g)
    ours.settle()
    assert torch.allclose(ours.codebook, theirs.module._codebook.embed[0], atol=1e-5)
    assert (ours.codebook - begin).abs().max() > 0.01


def test_a_linear_map_gets_the_same_gradient():
    ours, theirs = pair("simvq", alpha=2.0, beta=0.8)
    (z, g), *_ = maps(1)
    passed(ours, z, g)
    passed(theirs, z, g)
    mine, other = ours.book.map.linear.weight.grad, theirs.module.code_transform.weight.grad
    assert torch.allclose(mine, other, atol=1e-6) and mine.abs().max() > 1e-3


class TheirBound(FSQ):
    "Ours with 1 + 1e-3 and the inverse of tanh."

    def bound(self, x):
        sizes = self.sizes.to(x.dtype)
        length, offset = (sizes - 1) * (1 + 1e-3) / 2, (1 - sizes % 2) / 2
        return (torch.tanh(x + torch.atanh(offset / length)) * length - offset) / (self.sizes // 2)


def test_fsq_differs_by_its_bound_alone():
    ours, theirs = pair("fsq")
    z = 3 * torch.randn(8, DIM, 64, 64)
    assert (ours(z).codes != theirs(z).codes).float().mean() > 1e-4
    ours.__class__ = TheirBound
    assert (ours(z).codes != theirs(z).codes).float().mean() < 1e-4
    same = (ours(z).z_q - theirs(z).z_q).abs().amax(1) < 1e-5
    assert same.float().mean() > 1 - 1e-4


@pytest.mark.parametrize("spec", [*SAME[:3], "vq + ema + replace", "fsq"])
def test_looking_changes_nothing(spec):
    _, theirs = pair(spec)
    (z, _), *_ = maps(1)
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    codes = theirs.encode(z)
    found = theirs.decode(codes)
    assert theirs.training and theirs.module.training
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())
    q, again, _ = theirs.eval()(z)
    assert torch.equal(codes, again) and torch.allclose(found, q, atol=1e-6)


def test_theirs_replaces_by_its_own_rule():
    "At once: the average of vectors begins at 1, and what falls below 2 goes."
    ours, theirs = pair("vq + ema + replace")
    (z, g), *_ = maps(1)
    passed(theirs, z, g)
    passed(ours, z, g)
    ours.settle()
    moved = lambda book: (book - before).norm(dim=1) > 0.1
    before = pair("vq + ema + replace")[0].codebook
    assert moved(theirs.module._codebook.embed[0]).float().mean() > 0.6
    assert not moved(ours.codebook).any()


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(TypeError, match="VectorQuantizer, SimVQ, FSQ, got GumbelQuantizer"):
        counterpart(recipe("gumbel", DIM, CODES))
    with pytest.raises(ValueError, match="must have moving averages"):
        counterpart(recipe("vq", DIM, CODES))
    with pytest.raises(TypeError, match="module must be a torch.nn.Module"):
        PackageQuantizer(len, DIM, CODES)


def test_a_nudge_moves_every_weight_by_its_last_place():
    layer = torch.nn.Linear(5, 5)
    before = [p.detach().clone() for p in layer.parameters()]
    assert nudge(layer) is layer
    for p, old in zip(layer.parameters(), before, strict=True):
        assert torch.equal(torch.nextafter(p, old), old) and (p > old).all()
