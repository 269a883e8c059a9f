"""vector_quantize_pytorch 1.32: agreement where it is right, a test for each place where it is not.

Lattices and residuals: test_lattice, test_composed. Its orthogonal and diversity losses have no
counterpart here, and it has no optimal transport.
"""

from functools import partial
import pytest
import torch
from torch import nn
from vector_quantize_pytorch import SimVQ as PeerSimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to
from vqstudy.codebook import MovingAffine
from vqstudy.composed import GroupQuantizer
from vqstudy.estimators import directional_noise, estimate, rotation, straight_through, synchronized
from vqstudy.vector import SimVQ, StochasticQuantizer, VectorQuantizer

LEARNED = {"learnable_codebook": True, "ema_update": False}


def peer(**options):
    plain = {"rotation_trick": False, "threshold_ema_dead_code": 0}
    return VectorQuantize(dim=8, codebook_size=16, **plain | options)


@torch.no_grad()
def share(ours, book, i=0):
    "Their codebook (of head i) and its averages, into ours."
    ours.book.weight.copy_(book.embed[i])
    if ours.average is not None:
        ours.average.counts.copy_(book.cluster_size[i])
        ours.average.sums.copy_(book.embed_avg[i])


def pair(given, **options):
    "Theirs, and ours with the same codebook."
    torch.manual_seed(0)
    theirs = peer(**given)
    ours = VectorQuantizer(8, 16, **options)
    share(ours, theirs._codebook)
    return theirs.train(), ours.train()


def step(quantizer, z, g):
    "Outputs, and the gradient to z of <output, g> + loss."
    leaf = z.clone().requires_grad_()
    q, codes, loss = quantizer(leaf)
    ((q * g).sum() + loss).backward()
    return q.detach(), codes, loss.detach(), leaf.grad


def batch(n=200, scale=1.0):
    return scale * torch.randn(1, n, 8), torch.randn(1, n, 8)


def agree(ours, theirs, atol=1e-5):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(ours, theirs, strict=True))


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def rule(turned):
    return rotation() if turned else straight_through


# ---- where it is right ----


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_moving_averages_agree(l2, turned):
    theirs, ours = pair(
        {"decay": 0.9, "commitment_weight": 0.5, "use_cosine_sim": l2, "rotation_trick": turned},
        l2=l2,
        decay=0.9,
        alpha=0.5,
        beta=0.0,
        rule=rule(turned),
    )
    begin = ours.codebook.clone()
    for _ in range(10):
        z, g = batch(scale=1 if l2 else 0.5)
        assert agree(step(ours, z, g), step(theirs, z, g))
        ours.settle()
        book = theirs._codebook
        mine = ours.average.counts, ours.average.sums, ours.codebook
        assert agree(mine, (book.cluster_size[0], book.embed_avg[0], book.embed[0]), 1e-4)
    assert (ours.codebook - begin).abs().max() > 0.1
    z, _ = batch()
    assert torch.equal(ours.eval().encode(z), theirs.eval()(z)[1])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_learned_codebook_agrees(turned, weight):
    """Their one commitment term goes to both ends.

    So alpha = 2 weight, beta = 1/2, and theirs is half of our loss's value.
    """
    theirs, ours = pair(
        {**LEARNED, "commitment_weight": weight, "rotation_trick": turned},
        alpha=2 * weight,
        beta=0.5,
        rule=rule(turned),
    )
    z, g = batch()
    q, codes, loss, grad = step(ours, z, g)
    their_q, their_codes, their_loss, their_grad = step(theirs, z, g)
    assert agree((q, loss, grad), (their_q, 2 * their_loss, their_grad))
    assert torch.equal(codes, their_codes)
    learned = ours.book.weight.grad
    assert torch.allclose(learned, theirs._codebook.embed.grad[0], atol=1e-6)
    assert learned.abs().max() > 1e-3


@pytest.mark.parametrize("d", [2, 8, 64])
def test_the_rotated_gradient_agrees_in_float32(d):
    torch.manual_seed(0)
    z, q, g = torch.randn(3, 500, d)
    leaf = z.clone().requires_grad_()
    (ours,) = torch.autograd.grad(estimate(leaf, q, rotation()), leaf, g)
    (theirs,) = torch.autograd.grad(rotate_to(leaf, q), leaf, g)
    # nearly opposite ones: see test_their_rotation_at_its_corners
    directions = z / z.norm(dim=1, keepdim=True) + q / q.norm(dim=1, keepdim=True)
    opened = directions.norm(dim=1) > 0.1
    assert opened.sum() > 450
    assert torch.allclose(ours[opened], theirs[opened], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_simvq_agrees(turned):
    torch.manual_seed(0)
    theirs = PeerSimVQ(
        dim=8,
        codebook_size=16,
        rotation_trick=turned,
        input_to_quantize_commit_loss_weight=0.25,
        commitment_weight=2.0,
    )
    ours = SimVQ(8, 16, alpha=2 * 1.25, beta=0.8, rule=rule(turned)).train()
    weight = ours.book.map.linear.weight
    with torch.no_grad():
        ours.book.weight.copy_(theirs.frozen_codebook)
        weight.copy_(theirs.code_transform.weight)
    z, g = batch()
    mine, their = step(ours, z, g), step(theirs, z, g)
    assert agree(mine, their) and torch.equal(mine[1], their[1])
    assert torch.allclose(ours.codebook, theirs.codebook)
    assert torch.allclose(weight.grad, theirs.code_transform.weight.grad, atol=1e-5)
    assert weight.grad.abs().max() > 1e-2
    assert agree([ours.decode(mine[1])], [theirs.indices_to_codes(their[1])])


@pytest.mark.parametrize("shared", [False, True])
def test_heads_are_groups(shared):
    torch.manual_seed(0)
    theirs = VectorQuantize(
        dim=8,
        codebook_dim=4,
        heads=2,
        separate_codebook_per_head=not shared,
        codebook_size=16,
        decay=0.9,
        rotation_trick=False,
    ).train()
    part = partial(VectorQuantizer, decay=0.9, alpha=1.0, beta=0.0)
    ours = GroupQuantizer(8, 16, 2, part, shared).train()
    for i, part in enumerate(ours.parts):
        share(part, theirs._codebook, i)
    for _ in range(5):
        z, g = batch()
        assert agree(step(ours, z, g), step(theirs, z, g))
        ours.state_dict()  # applies what the step has gathered
        assert agree(ours.codebook, theirs._codebook.embed, 1e-4)


def test_directional_noise_agrees():
    theirs, ours = pair(
        {
            "directional_reparam": True,
            "directional_reparam_variance": 1e-3,
            "threshold_ema_dead_code": 1e-9,
        },
        alpha=0.0,
        perturb=directional_noise(1e-3),
    )
    z, g = batch()
    torch.manual_seed(1)
    mine = step(ours, z, g)
    torch.manual_seed(1)
    their = step(theirs, z, g)
    assert agree(mine, their, 1e-4)
    assert torch.allclose(ours.book.weight.grad, theirs._codebook.embed.grad[0], atol=1e-4)


def test_moving_affine_agrees_in_training():
    "With one momentum for both moments; they mean the decay, we the weight of what is new."
    theirs, ours = pair(
        {
            **LEARNED,
            "affine_param": True,
            "affine_param_batch_decay": 0.9,
            "affine_param_codebook_decay": 0.9,
        },
        alpha=2.0,
        beta=0.5,
        map=MovingAffine(8, momentum=0.1),
    )
    for i in range(5):
        z, g = batch(scale=1.0 + i)
        q, codes, loss, grad = step(ours, z + i, g)
        their_q, their_codes, their_loss, their_grad = step(theirs, z + i, g)
        assert torch.equal(codes, their_codes)
        assert agree((q, loss / 2, grad), (their_q, their_loss, their_grad), 1e-4)
    learned, their_learned = ours.book.weight.grad, theirs._codebook.embed.grad[0]
    assert torch.allclose(learned, their_learned, rtol=1e-4, atol=1e-4)


def test_stochastic_codes_are_drawn_as_each_says():
    """Theirs by the distance, ours by its square.

    With two radii r < s about z, our temperature is theirs times r + s.
    """
    torch.manual_seed(0)
    radii, tau, n = torch.tensor([1.0] * 3 + [1.8] * 5), 0.7, 40000
    points = nn.functional.normalize(torch.randn(8, 4), dim=1) * radii[:, None]
    theirs = VectorQuantize(
        dim=4,
        codebook_size=8,
        stochastic_sample_codes=True,
        sample_codebook_temp=tau,
        rotation_trick=False,
        freeze_codebook=True,
    ).train()
    theirs._codebook.embed.copy_(points[None])

    def drawn(codes):
        return torch.bincount(codes.flatten(), minlength=8) / n

    def ours(temperature):
        quantizer = StochasticQuantizer(4, 8, temperature=temperature).train()
        quantizer.book.weight.data.copy_(points)
        return drawn(quantizer(torch.zeros(n, 4)).codes)

    spread = 5 * (0.25 / n) ** 0.5  # five deviations of a frequency
    by_distance = (-radii / tau).softmax(0)
    by_square = (-radii.square() / tau).softmax(0)
    assert (drawn(theirs(torch.zeros(1, n, 4))[1]) - by_distance).abs().max() < spread
    assert (ours(tau) - by_square).abs().max() < spread
    assert (by_square - by_distance).abs().max() > 2 * spread
    assert (ours(tau * (1.0 + 1.8)) - by_distance).abs().max() < spread


# ---- where it is not ----


def test_their_sync_term_goes_to_the_encoder():
    """Added after the straight-through pass: the encoder has (1 + nu) g and the codebook nothing.

    Ours: g and nu g (Huh et al. 2023, section 4.3).
    """
    given = {**LEARNED, "sync_update_v": 0.3, "commitment_weight": 0.0}
    theirs, ours = pair(given, rule=synchronized(0.3), alpha=0.0)
    z, g = batch()
    _, codes, _, grad = step(ours, z, g)
    their_grad = step(theirs, z, g)[-1]
    assert torch.allclose(their_grad, 1.3 * g, atol=1e-5) and theirs._codebook.embed.grad is None
    sent = torch.zeros(16, 8).index_add(0, codes[0], 0.3 * g[0])
    assert torch.equal(grad, g) and torch.allclose(ours.book.weight.grad, sent, atol=1e-5)


def test_their_affine_statistics_move_in_evaluation():
    theirs, ours = pair({**LEARNED, "affine_param": True}, map=MovingAffine(8))
    z, g = batch()
    for module in (theirs, ours):
        step(module, z, g)
    before, kept = state(theirs.eval()), state(ours.eval())
    first, mine = theirs(z)[0], ours(z).z_q
    for _ in range(50):
        theirs(2 * z + 3)
        ours(2 * z + 3)
    moved = [k for k, v in theirs.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["_codebook.batch_mean", "_codebook.batch_variance"]
    assert (theirs(z)[0] - first).abs().max() > 0.1
    assert unchanged(ours, kept) and torch.equal(ours(z).z_q, mine)


def test_their_affine_state_does_not_load_strictly():
    "The batch's moments are made at the first batch, so that a fresh module has no place for them."
    theirs, ours = pair({**LEARNED, "affine_param": True}, map=MovingAffine(8))
    z, g = batch()
    for module in (theirs, ours):
        step(module, z, g)
    with pytest.raises(RuntimeError, match="Unexpected key.*batch_mean.*batch_variance"):
        peer(**LEARNED, affine_param=True).load_state_dict(theirs.state_dict())
    fresh = VectorQuantizer(8, 16, map=MovingAffine(8))
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.eval()(z).z_q, ours.eval()(z).z_q)


def test_their_revived_codes_miss_the_data_under_an_affine_map():
    """A vector of the batch goes into the table as it is, and the map then takes it elsewhere.

    Ours is mapped back first.
    """
    given = {"affine_param": True, "threshold_ema_dead_code": 2}
    theirs, ours = pair(given, map=MovingAffine(8), life_span=1)
    z, book = 50 + batch(12)[0], theirs._codebook
    theirs(z)
    ours(z)
    ours.settle()
    revived, idle = book.cluster_size[0] == 2, ours.alive.idle == 1
    ours(z)
    scale = (book.batch_variance / book.codebook_variance).sqrt()
    used = (book.embed - book.codebook_mean) * scale + book.batch_mean
    off, ours_off = (torch.cdist(codes, z[0]).amin(1) for codes in (used[0], ours.codebook))
    assert revived.any() and off[revived].min() > 100
    assert idle.any() and ours_off[idle].max() < 0.1  # copies of the vectors are moved a little


def test_their_k_means_begins_in_evaluation():
    torch.manual_seed(0)
    theirs = peer(kmeans_init=True).eval()
    ours = VectorQuantizer(8, 16, init="kmeans").eval()
    z, _ = batch()
    before = state(ours)
    theirs(z)
    ours(z)
    assert theirs._codebook.initted and theirs.codebook.abs().max() > 0
    assert not ours.book.started and unchanged(ours, before)


def test_their_k_means_of_few_samples_leaves_codes_at_zero():
    """A sample drawn twice makes a centre that nothing chooses, and its average of nothing is 0.

    Ours stay among the data.
    """
    torch.manual_seed(0)
    theirs = peer(kmeans_init=True).train()
    ours = VectorQuantizer(8, 16, init="kmeans").train()
    z = 10 + batch(4)[0]
    theirs(z)
    ours(z)
    norms = theirs.codebook.norm(dim=1)
    assert (norms < 1e-3).sum() >= 12 and (norms > 20).sum() <= 4
    assert torch.cdist(ours.codebook, z[0]).amin(1).max() < 0.5
    assert len(ours.codebook.unique(dim=0)) == 16


@pytest.mark.parametrize(
    "dtype,least,most",
    [(torch.float32, 1e-8, 2e-6), (torch.float16, 5e-4, 1e-2), (torch.bfloat16, 4e-3, 8e-2)],
)
def test_their_rotated_value_is_not_the_code_vector(dtype, least, most):
    "They rotate z onto q and so round; evaluation gives q itself. Ours is q."
    torch.manual_seed(0)
    z, q = torch.randn(2, 1000, 8).to(dtype)
    off = (rotate_to(z, q) - q).double().norm(dim=1) / q.double().norm(dim=1)
    assert off.median() > least and off.max() < most
    assert torch.equal(estimate(z, q, rotation()), q)


def test_their_rotation_at_its_corners():
    """z = 0: the value is 0 and the gradient a million. q near -z: value and angle are off.

    (q = -z itself is finite in 1.32, and a mirror.)
    """
    torch.manual_seed(0)
    q, g = torch.randn(2, 50, 8)

    def both(z):
        found = []
        for turn in (rotate_to, lambda z, q: estimate(z, q, rotation())):
            leaf = z.clone().requires_grad_()
            value = turn(leaf, q)
            value.backward(g)
            found.append((value.detach(), leaf.grad))
        return found

    (value, grad), (ours, our_grad) = both(torch.zeros(50, 8))
    assert not value.any() and (grad.norm(dim=1) > 1e5 * g.norm(dim=1)).all()
    assert torch.equal(ours, q) and torch.equal(our_grad, g)
    z = -q + 1e-7 * torch.randn(50, 8)
    (value, grad), (ours, our_grad) = both(z)

    def angle(grad):  # Re = u: what g has along q, the gradient has along z
        return ((grad * z).sum(1) - (g * q).sum(1)).div(z.norm(dim=1)).abs().max()

    assert (value - q).abs().max() > 1e-3 and angle(grad) > 1e-3
    assert torch.equal(ours, q) and angle(our_grad) < 1e-4


def test_their_own_optimizer_needs_gradients_in_training_mode():
    """With the codebook's optimiser inside, a training forward under no_grad is an error.

    Ours goes through: alternation is the loop's.
    """
    given = {**LEARNED, "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1)}
    theirs, ours = pair(given, alternate=True)
    z, _ = batch()
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        theirs(z)
    with torch.no_grad():
        assert torch.equal(ours(z).codes, ours.encode(z))
