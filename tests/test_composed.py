"""Quantizers made of quantizers: levels, scales, upkeep within, bad arguments, peers.

What every quantizer must keep is in test_quantizers.
"""

import copy
import pickle
from functools import partial
import pytest
import torch
from torch import nn
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer, join_scales
from vqstudy.composed import split_scales
from vqstudy.vector import StochasticQuantizer, VectorQuantizer


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_the_encoder_gets_g_once_and_every_levels_commitment(levels, shared):
    torch.manual_seed(0)
    z, g = torch.randn(2, 50, 8, dtype=torch.float64)
    z.requires_grad_()
    bare = ResidualQuantizer(8, 16, levels, partial(VectorQuantizer, alpha=0.0), shared).double()
    bare(z).z_q.backward(g)
    assert torch.equal(z.grad, g)
    quantizer = ResidualQuantizer(8, 16, levels, shared=shared).double()
    out = quantizer(z)
    (grad,) = torch.autograd.grad(out.loss, z)
    sums = [quantizer.decode(out.codes[:, :m]) for m in range(1, levels + 1)]
    left = sum(z.detach() - q for q in sums) / levels
    assert (grad - 1.25 * 0.2 * 2 * left / z.numel()).abs().max() < 1e-12


def test_dropout_decodes_each_image_from_its_first_levels():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 16, 4, dropout=True, channel_dim=1).train()
    z = torch.randn(64, 8, 3, 3)
    out = quantizer(z)
    sums = torch.stack([quantizer.decode(out.codes[..., :m]) for m in range(1, 5)])
    visible = (out.z_q == sums).flatten(2).all(2)  # levels x images
    assert (visible.sum(0) == 1).all() and (visible.sum(1) > 5).all()
    assert torch.equal(out.codes, quantizer.eval()(z).codes)
    assert torch.equal(quantizer(z).z_q, sums[-1])


def test_dropped_levels_go_on_learning():
    torch.manual_seed(0)
    make = partial(VectorQuantizer, decay=0.9)
    dropping = ResidualQuantizer(8, 16, 3, make, dropout=True)
    complete = ResidualQuantizer(8, 16, 3, make)
    complete.load_state_dict(dropping.state_dict())
    z = torch.randn(50, 8)
    assert torch.equal(dropping(z).loss, complete(z).loss)
    assert same(state(dropping), state(complete))


@pytest.mark.parametrize("shared", [False, True])
def test_first_levels(shared):
    torch.manual_seed(0)
    whole = ResidualQuantizer(8, 16, 4, shared=shared, channel_dim=1).eval()
    z, parts = torch.randn(2, 8, 3, 3), 1 if shared else 4
    codes = whole.encode(z)
    for m in (1, 2, 3, 4):
        cut = whole.first(m)
        assert torch.equal(cut.encode(z), codes[..., :m]) and cut.parts[0] is whole.parts[0]
        assert torch.equal(cut(z).z_q, whole.decode(codes[..., :m]))
    assert whole.levels == 4 and whole.codebook.shape == (parts, 16, 8)
    assert len(whole.parts) == len(list(whole.parameters())) == parts


def test_moving_averages_inside_are_those_of_each_levels_residual():
    torch.manual_seed(0)
    make = partial(VectorQuantizer, decay=0.9, life_span=5)
    whole = ResidualQuantizer(8, 16, 3, make).train()
    apart, rest = copy.deepcopy(whole), torch.randn(200, 8)
    out = whole(rest)
    for i, part in enumerate(apart.parts):
        step = part(rest)
        rest = rest - step.z_q
        assert torch.equal(step.codes, out.codes[:, i])
    assert same(state(whole), state(apart))


def test_replacement_inside_brings_codes_to_the_data():
    torch.manual_seed(0)
    make = partial(VectorQuantizer, decay=0.9, life_span=3)
    quantizer, z = ResidualQuantizer(4, 16, 2, make).train(), 20 + torch.randn(256, 4)
    for _ in range(20):
        quantizer(z[torch.randperm(256)])
    codes = quantizer.eval().encode(z)
    assert all(len(codes[:, i].unique()) > 10 for i in range(2))
    assert (quantizer(z).z_q - z).pow(2).mean() < 0.5


def test_an_asking_rule_goes_around_the_whole():
    torch.manual_seed(0)
    make = partial(VectorQuantizer, rule="exact", alpha=0.0)
    quantizer = ResidualQuantizer(3, 16, 3, make).train()
    z, target = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="needs the decoder"):
        quantizer(z)
    quantizer.attach(lambda v: (v - target).pow(2).sum())
    (quantizer(z).z_q - target).pow(2).sum().backward()
    assert torch.allclose(z.grad, 2 * (z - target).detach(), atol=1e-5)
    pickle.dumps(quantizer)
    copy.deepcopy(quantizer)


@pytest.mark.parametrize("kind", [GroupQuantizer, ResidualQuantizer, MultiScaleQuantizer])
def test_annealing_reaches_the_parts(kind):
    quantizer = kind(8, 16, make=StochasticQuantizer)
    quantizer.anneal(1.0)
    assert all(abs(part.temperature - 0.01) < 1e-6 for part in quantizer.parts)


def test_multiscale_cells_stand_alone():
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(8, 16).eval()
    codes = quantizer.encode(torch.randn(2, 4, 6, 8))
    whole = quantizer.decode(codes)
    assert torch.allclose(quantizer.decode(codes[:, 1:, 2:]), whole[:, 2:, 4:], atol=1e-6)
    top, bottom = split_scales(codes)
    assert top.shape == (2, 2, 3) and bottom.shape == (2, 4, 6)
    assert torch.equal(join_scales(top, bottom), codes)
    two = MultiScaleQuantizer(8, 16, partial(ResidualQuantizer, levels=2)).eval()
    codes = two.encode(torch.randn(2, 4, 6, 8))
    assert codes.shape == (2, 2, 3, 5, 2) and torch.equal(join_scales(*split_scales(codes)), codes)


def wider(dim, num_codes):
    return VectorQuantizer(dim + 1, num_codes)


EXACT = partial(VectorQuantizer, rule="exact")
ALTERNATING = partial(VectorQuantizer, alternate=True)
HESSIAN = partial(ResidualQuantizer, make=partial(VectorQuantizer, rule="hessian"))
MAP = torch.zeros(2, 4, 4, 4)
BAD = [  # make, error, message
    (lambda: GroupQuantizer(0, 4), ValueError, "dim must be at least 1, got 0"),
    (lambda: GroupQuantizer(4, 0), ValueError, "num_codes must be at least 1, got 0"),
    (lambda: GroupQuantizer(4, 4, 3), ValueError, "groups must divide dim=4, got 3"),
    (lambda: GroupQuantizer(4, 4, 0), ValueError, "groups must be at least 1, got 0"),
    (lambda: GroupQuantizer(4, 4, 2.0), TypeError, "groups must be an int, got 2.0"),
    (lambda: GroupQuantizer(4, 4, make="vq"), TypeError, "make must be a function .* got 'vq'"),
    (lambda: GroupQuantizer(4, 4, make=nn.Linear), TypeError, "make must return a Quantizer, got Linear"),
    (lambda: GroupQuantizer(4, 4, make=wider), ValueError, "width 2 with 4 codes, got width 3 with 4"),
    (lambda: GroupQuantizer(4, 4, shared=1), TypeError, "shared must be True or False, got 1"),
    (lambda: GroupQuantizer(4, 4, make=EXACT), ValueError, "rule 'exact' needs the decoder's input"),
    (lambda: GroupQuantizer(4, 4, make=ALTERNATING), ValueError, "without alternate"),
    (lambda: GroupQuantizer(4, 4, make=HESSIAN), ValueError, "rule 'hessian'"),
    (lambda: GroupQuantizer(4, 4, channel_dim=1.0), TypeError, "channel_dim"),
    (lambda: ResidualQuantizer(4, 4, 0), ValueError, "levels must be at least 1, got 0"),
    (lambda: ResidualQuantizer(4, 4, 0, shared=True), ValueError, "levels must be at least 1, got 0"),
    (lambda: ResidualQuantizer(4, 4, dropout=0.5), TypeError, "dropout must be True or False, got 0.5"),
    (lambda: ResidualQuantizer(4, 4).first(5), ValueError, r"levels must lie in 1\.\.4, got 5"),
    (lambda: ResidualQuantizer(4, 4).first(0), ValueError, "levels must be at least 1"),
    (lambda: MultiScaleQuantizer(4, 4)(MAP[:, :3]), ValueError, r"even height and width, got shape \(2, 3, 4"),
    (lambda: MultiScaleQuantizer(4, 4)(MAP[:, 0, 0]), ValueError, "must be a batch of maps"),
    (lambda: MultiScaleQuantizer(4, 4).decode(torch.zeros(2, 5).long()), ValueError, "codes must be of shape"),
    (lambda: MultiScaleQuantizer(4, 4, make=EXACT), ValueError, "rule 'exact'"),
]


@pytest.mark.parametrize("make,error,words", BAD)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def peer(levels):
    "vector_quantize_pytorch's residual quantizer, and ours with its codebooks and averages."
    torch.manual_seed(0)
    options = dict(threshold_ema_dead_code=0, commitment_weight=1.0, rotation_trick=False)
    theirs = ResidualVQ(dim=8, num_quantizers=levels, codebook_size=16, decay=0.9, **options)
    make = partial(VectorQuantizer, decay=0.9, alpha=1.0, beta=0.0)
    ours = ResidualQuantizer(8, 16, levels, make)
    for part, layer in zip(ours.parts, theirs.layers):
        share(part, layer)
    return theirs, ours


def share(part, layer):
    book = layer._codebook
    part.book.weight.copy_(book.embed[0])
    part.average.counts.copy_(book.cluster_size[0])
    part.average.sums.copy_(book.embed_avg[0])


def test_agrees_with_vector_quantize_pytorch():
    theirs, ours = peer(4)
    z = torch.randn(1, 300, 8)
    for _ in range(3):
        quantized, codes, losses = theirs(z)
        out = ours(z)
        assert torch.equal(out.codes, codes) and torch.allclose(out.z_q, quantized, atol=1e-5)
        assert torch.allclose(out.loss, losses.mean(), atol=1e-6)
        for part, layer in zip(ours.parts, theirs.layers):
            part.settle()
            assert torch.allclose(part.codebook, layer._codebook.embed[0], atol=1e-4)
    assert torch.equal(theirs.eval()(z)[1], ours.eval()(z).codes)
    decoded = theirs.get_output_from_indices(codes)
    assert torch.allclose(decoded, ours.decode(codes), atol=1e-3)


def test_groups_of_residuals_agree_with_vector_quantize_pytorch():
    torch.manual_seed(0)
    options = dict(codebook_size=16, threshold_ema_dead_code=0)
    theirs = GroupedResidualVQ(dim=8, groups=2, num_quantizers=3, **options).eval()
    make = partial(ResidualQuantizer, levels=3, make=partial(VectorQuantizer, decay=0.8))
    ours = GroupQuantizer(8, 16, 2, make).eval()
    for group, rvq in zip(ours.parts, theirs.rvqs):
        for part, layer in zip(group.parts, rvq.layers):
            share(part, layer)
    z = torch.randn(1, 300, 8)
    quantized, codes, _ = theirs(z)
    out = ours(z)
    assert torch.equal(out.codes, codes.movedim(0, -2))
    assert torch.allclose(out.z_q, quantized, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_vector_quantize_pytorch_multiplies_the_gradient_by_the_levels(levels):
    "It passes straight through at every level, on a detached residual (version 1.32); ours is g."
    theirs, ours = peer(levels)
    g = torch.randn(1, 50, 8)
    a = torch.randn(1, 50, 8).requires_grad_()
    theirs.train()(a)[0].backward(g)
    b = a.detach().clone().requires_grad_()
    ours.train()(b).z_q.backward(g)
    assert torch.allclose(a.grad, levels * g, atol=1e-5) and torch.allclose(b.grad, g, atol=1e-6)


@pytest.mark.parametrize("kind,word", [(GroupQuantizer, "groups"), (ResidualQuantizer, "levels")])
def test_the_state_of_a_shared_part_fits_any_number_of_them(kind, word):
    "It is that of one quantizer; a state of parts of their own is refused elsewhere."
    four, two = (kind(2 * n if kind is GroupQuantizer else 2, 8, n, shared=True) for n in (4, 2))
    two.load_state_dict(four.state_dict(), strict=True)
    assert torch.equal(two.codebook, four.codebook)
    four, two = (kind(2 * n if kind is GroupQuantizer else 2, 8, n) for n in (4, 2))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        two.load_state_dict(four.state_dict(), strict=True)
