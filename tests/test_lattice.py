"""FSQ, LFQ and BSQ: exact values, widths, dtypes, entropies, bad arguments, released forms, peers.

What every quantizer must keep is in test_quantizers.
"""

import math
import pytest
import torch
from oracles_lattice import ORACLES, released_bsq, released_lfq
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import FSQ as PeerFSQ
from vector_quantize_pytorch import LFQ as PeerLFQ
from vqstudy.lattice import BSQ, FSQ, LFQ, entropies, levels_for

KINDS = [FSQ, LFQ, BSQ]
WIDTHS = [(8, 16), (4, 16), (1, 16)]  # projected, as wide as the signs, one coordinate wide
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MIXED = [  # of the module, of z
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
WITH_LOSS = [name for name in ORACLES if "fsq" not in name]


@pytest.mark.parametrize("name", WITH_LOSS)
def test_gradient_of_the_loss_by_differences(name):
    torch.manual_seed(0)
    quantizer = ORACLES[name][0](3, 16).double()
    quantizer.temperature = 1.0
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: quantizer(z).loss, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim,k", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_stands_for_the_same_bits_everywhere(kind, dim, k, dtype):
    torch.manual_seed(0)
    quantizer = kind(dim, k).to(dtype)
    z = torch.randn(50, dim).to(dtype)
    trained, out = quantizer.train()(z), quantizer.eval()(z)
    assert out.z_q.dtype == dtype and out.codes.dtype == torch.int64
    assert torch.equal(quantizer.encode(z), out.codes)
    assert torch.equal(trained.z_q, out.z_q) and torch.equal(trained.codes, out.codes)
    assert quantizer.codebook.shape == (k, dim) and quantizer.codebook.dtype == dtype
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    assert torch.equal(quantizer.codebook[out.codes], out.z_q)
    for i in range(3):
        alone, some = out.codes[i], out.codes[i : i + 7]
        assert torch.equal(quantizer.decode(alone), out.z_q[i])
        assert torch.equal(quantizer.decode(some), out.z_q[i : i + 7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module,given", MIXED)
def test_dtypes_may_differ(kind, module, given):
    torch.manual_seed(0)
    quantizer, z = kind(8, 16).to(module), torch.randn(50, 8).to(given).requires_grad_()
    out = quantizer(z)
    (out.z_q.sum() + out.loss).backward()
    assert out.z_q.dtype == given and z.grad.isfinite().all()
    assert torch.equal(out.z_q, quantizer.decode(out.codes).to(given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim,k", WIDTHS)
def test_every_code_is_its_own_nearest(kind, dim, k):
    quantizer = kind(dim, k).double()
    codes = torch.arange(k)
    grid = quantizer.points(codes)
    assert len(grid.unique(dim=0)) == k
    assert torch.equal((quantizer.digits(grid) * quantizer.basis).sum(1), codes)


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_extreme_and_zero_vectors_have_finite_gradients(kind):
    for dim in (4, 8):
        quantizer = kind(dim, 16)
        for scale in (0.0, 1e-30, 1e-3, 1.0, 1e4):
            z = (scale * torch.randn(20, dim)).requires_grad_()
            out = quantizer(z)
            (out.z_q.sum() + out.loss).backward()
            assert out.loss.isfinite() and z.grad.isfinite().all(), (dim, scale)


# ---- entropies ----


@pytest.mark.parametrize("width,group", [(1, 18), (2, 18), (5, 18), (7, 18), (5, 2), (6, 1)])
def test_entropies_against_all_patterns(width, group):
    torch.manual_seed(width)
    logits = (3 * torch.randn(40, width, dtype=torch.float64)).requires_grad_()
    patterns = torch.cartesian_prod(*[torch.tensor([0, 1])] * width).view(-1, width)
    p = torch.where(patterns > 0, logits.sigmoid()[:, None], (-logits).sigmoid()[:, None]).prod(-1)
    each, mean = entropies(logits, group)
    assert abs(each + (p * p.log()).sum(1).mean()) < 1e-12
    exact = -(p.mean(0) * p.mean(0).log()).sum()
    assert abs(mean - exact) < 1e-12 if group >= width else mean > exact
    assert 0 <= each <= mean + 1e-12 and mean <= width * math.log(2) + 1e-12
    assert torch.autograd.gradcheck(lambda x: entropies(x, group), logits)


def test_entropies_never_hold_vectors_times_codes():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    z = torch.randn(1000, 16, requires_grad=True)
    with Largest() as largest:
        LFQ(16, 2**16)(z).loss.backward()
    assert largest.size <= 1000 * 2**8  # of 1000 * 2^16


def test_entropy_loss_spreads_the_codes():
    torch.manual_seed(0)
    z = (torch.randn(256, 4) * 0.05 + 0.2).requires_grad_()  # all of one code
    quantizer, used = LFQ(4, 16, temperature=0.5, commitment=0.0), []
    optimizer = torch.optim.Adam([z], lr=0.01)
    for _ in range(150):
        out = quantizer(z)
        used.append(len(out.codes.unique()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert used[0] == 1 and used[-1] == 16, used


# ---- which num_codes ----


PAPER = {
    240: (8, 6, 5),
    1000: (8, 5, 5, 5),
    4375: (7, 5, 5, 5, 5),
    15360: (8, 8, 8, 6, 5),
    64000: (8, 8, 8, 5, 5, 5),
}


def test_levels_follow_the_papers_table():
    assert {k: levels_for(k) for k in PAPER} == PAPER


def badness(levels):
    "Octaves outside of 5..8, then the number of levels."
    octaves = (max(math.log2(5 / level), math.log2(level / 8), 0) for level in levels)
    return round(sum(octaves), 9), len(levels)


def test_levels_multiply_and_are_the_best():
    for k in range(2, 700):
        products = list(factorizations(k, 16))
        if products:
            levels = levels_for(k)
            assert math.prod(levels) == k and levels in products
            assert badness(levels) == min(badness(other) for other in products)
        else:
            with pytest.raises(ValueError, match=f"got {k}; the nearest is"):
                levels_for(k)


def factorizations(k, largest):
    if k == 1:
        yield ()
    for level in range(min(k, largest), 1, -1):
        if k % level == 0:
            yield from ((level, *rest) for rest in factorizations(k // level, level))


NEAREST_PRODUCT = [
    (1, "2"),
    (17, "16 or 18"),
    (1023, "1024"),
    (7919, "7920"),
    (2**20 + 7, "1048320|1048576|104"),
    (2**31 - 1, r"214\d+"),
]
NEAREST_POWER = [(1, "2"), (3, "2 or 4"), (1000, "1024"), (1400, "1024"), (96, "64 or 128")]


@pytest.mark.parametrize("k,nearest", NEAREST_PRODUCT)
def test_fsq_names_the_nearest_size(k, nearest):
    words = f"FSQ must be a product of levels from 2 to 16 .*got {k}; the nearest is ({nearest})"
    with pytest.raises(ValueError, match=f"num_codes of {words}"):
        FSQ(8, k)


@pytest.mark.parametrize("kind", [LFQ, BSQ])
@pytest.mark.parametrize("k,nearest", NEAREST_POWER)
def test_signs_need_a_power_of_two(kind, k, nearest):
    words = f"must be a power of two, at least 2, got {k}; the nearest is {nearest}$"
    with pytest.raises(ValueError, match=f"num_codes of {kind.__name__} {words}"):
        kind(8, k)


def test_sixty_bits():
    quantizer = BSQ(60, 2**60)
    z = torch.randn(9, 60)
    out = quantizer(z)
    assert torch.equal(out.z_q > 0, z > 0) and out.codes.max() > 2**50
    assert torch.equal(quantizer.decode(out.codes), out.z_q)
    with pytest.raises(ValueError, match="too large: decode the codes"):
        quantizer.codebook
    with pytest.raises(ValueError, match=f"num_codes must be at most {2**62}"):
        LFQ(8, 2**63)


NUMBER = "must be a finite number"
BAD = [  # make, error, message
    (lambda: FSQ(0, 4), ValueError, "dim must be at least 1, got 0"),
    (lambda: FSQ(4, 0), ValueError, "num_codes must be at least 1, got 0"),
    (lambda: FSQ(4, 2.5), TypeError, "num_codes must be an int, got 2.5"),
    (lambda: FSQ(4, 8, [2, 2]), ValueError, r"the product num_codes, 8, got \[2, 2\] with product 4"),
    (lambda: FSQ(4, 8, levels=[]), ValueError, "levels must have the product"),
    (lambda: FSQ(4, 8, levels=[8, 1]), ValueError, "levels must be at least 2, got 1"),
    (lambda: FSQ(4, 8, levels=[4.0, 2]), TypeError, "levels must be an int, got 4.0"),
    (lambda: FSQ(4, 8, levels=8), TypeError, "levels must be a list of ints, got 8"),
    (lambda: FSQ(4, 8, levels="8"), TypeError, "levels must be a list of ints, got '8'"),
    (lambda: FSQ(4, 8, rule="ste"), TypeError, "rule must be a function"),
    (lambda: LFQ(4, 8, entropy=-1), ValueError, f"entropy {NUMBER} at least 0, got -1"),
    (lambda: LFQ(4, 8, diversity=math.nan), ValueError, f"diversity {NUMBER} at least 0, got nan"),
    (lambda: BSQ(4, 8, commitment=-0.1), ValueError, f"commitment {NUMBER} at least 0"),
    (lambda: BSQ(4, 8, temperature=0.0), ValueError, f"temperature {NUMBER} above 0, got 0.0"),
    (lambda: LFQ(4, 8, eps=-1e-5), ValueError, f"eps {NUMBER} at least 0, got -1e-05"),
    (lambda: BSQ(4, 8, scale_gradient=1), TypeError, "scale_gradient must be True or False, got 1"),
    (lambda: LFQ(4, 8, group=0), ValueError, "group must be at least 1, got 0"),
    (lambda: LFQ(4, 8, group=25), ValueError, "group must be at most 24, got 25"),
    (lambda: LFQ(4, True), TypeError, "num_codes must be an int, got True"),
    (lambda: LFQ(4, 8, channel_dim=1.0), TypeError, "channel_dim must be an int"),
    (lambda: FSQ(4, 8)(torch.zeros(3, 5)), ValueError, "z must have vectors of width 4"),
    (lambda: BSQ(4, 8)(torch.full((3, 4), torch.nan)), ValueError, "z must be finite"),
    (lambda: LFQ(4, 8).decode(torch.tensor([8])), ValueError, r"0\.\.7, got 8\.\.8"),
]


@pytest.mark.parametrize("make,error,words", BAD)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- as released ----


def flipped(codes, width):
    return sum((codes >> i & 1) << (width - 1 - i) for i in range(width))


def gradients(output, z, g):
    "Of the task (z_q g) and of the loss, to z."
    z_q, _, loss = output
    (of_task,) = torch.autograd.grad((z_q * g).sum(), z, retain_graph=True)
    return of_task, torch.autograd.grad(loss, z)[0]


def drawn(n, width, size=1.0):
    torch.manual_seed(width)
    z, g = torch.randn(2, n, width, dtype=torch.float64)
    return (size * z).requires_grad_(), g


@pytest.mark.parametrize("width", [3, 8])
def test_lfq_with_their_eps_is_open_magvit2s(width):
    z, g = drawn(60, width, 0.02)
    theirs = released_lfq(z)
    released = gradients(theirs, z, g)
    out = LFQ(width, 2**width, eps=1e-5).double()(z)
    assert torch.equal(out.codes, theirs[1]) and torch.allclose(out.z_q, theirs[0], atol=1e-15)
    assert abs(out.loss - theirs[2]) < 1e-14
    for ours, wanted in zip(gradients(out, z, g), released):
        assert torch.allclose(ours, wanted, atol=1e-14)
    exact = LFQ(width, 2**width).double()(z)
    assert 1e-6 < theirs[2] - exact.loss < 1e-5 * 2**width


SETTINGS = [  # theirs, ours
    (dict(analytical=True), dict()),
    (dict(analytical=True, group=3), dict()),
    (dict(group=3), dict(group=3)),
    (dict(inv_temperature=4.0), dict(temperature=0.25, entropy=0.1 / 4)),
    (dict(gamma0=0.5, gamma=0.4), dict(entropy=0.05, diversity=0.8)),
    (dict(beta=0.3, zeta=0.0), dict(entropy=0.0, commitment=0.3)),  # times the width
]


@pytest.mark.parametrize("width", [6, 18])
@pytest.mark.parametrize("theirs,ours", SETTINGS)
def test_bsq_with_a_scaled_gradient_is_the_released_one(width, theirs, ours):
    z, g = drawn(40, width)
    released = released_bsq(z, **theirs)
    wanted = gradients(released, z, g)
    ours = ours | {"commitment": width * ours.get("commitment", 0.0)}
    out = BSQ(width, 2**width, scale_gradient=True, **ours).double()(z)
    assert torch.equal(flipped(out.codes, width), released[1])
    assert torch.allclose(out.z_q, released[0], atol=1e-15)
    # 1e-8 inside each of their logarithms
    assert abs(out.loss - released[2]) < 1e-7
    for grad, their_grad in zip(gradients(out, z, g), wanted):
        assert torch.allclose(grad, their_grad, atol=1e-14)


@pytest.mark.parametrize("width,times", [(6, 2.45), (18, 4.24)])
def test_the_gradient_of_bsq_is_so_many_times_the_released_one(width, times):
    z, g = drawn(40, width)
    of_task, of_loss = gradients(released_bsq(z, beta=0.3), z, g)
    root = width**0.5
    out = BSQ(width, 2**width, commitment=0.3 * width).double()(z)
    ours = gradients(out, z, g)
    assert round(float(ours[0].norm() / of_task.norm()), 2) == times
    assert torch.allclose(ours[0], root * of_task) and torch.allclose(ours[1], of_loss)
    # the other way: both weights times the root, and the sum is the released one times the root
    out = BSQ(width, 2**width, entropy=0.1 * root, commitment=0.3 * width * root).double()(z)
    assert torch.allclose(sum(gradients(out, z, g)), root * (of_task + of_loss))


def test_a_vector_of_zero_passes_its_gradient_whole():
    "The released normalisation divides by at least 1e-12 there, and multiplies the gradient."
    z, g = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True), torch.ones(1, 4)
    q, code, _ = released_bsq(z)
    out = BSQ(4, 16).double()(z)
    assert out.codes == code == 0 and torch.equal(out.z_q, q)
    assert torch.equal(torch.autograd.grad(out.z_q, z, g.double())[0], g.double())
    assert torch.allclose(torch.autograd.grad(q, z, g.double())[0], 1e12 / 2 * g.double())


# ---- entropies of 2^18 codes ----


def push(logits, entropy):
    "The gradient of an entropy of the mean."
    return torch.autograd.grad(entropy, logits)[0]


def test_what_1e_5_inside_the_logarithm_does_at_2_18_codes():
    even = torch.zeros(1, 18, dtype=torch.float64)
    exact, theirs = (entropies(even, eps=eps)[1].item() for eps in (0.0, 1e-5))
    assert exact == pytest.approx(12.4766, abs=1e-4) and theirs == pytest.approx(11.1898, abs=1e-4)
    assert exact == pytest.approx(math.log(2**18))
    assert theirs == pytest.approx(-math.log(2**-18 + 1e-5))
    torch.manual_seed(0)
    nearly = (1e-3 * torch.randn(1, 18, dtype=torch.float64)).requires_grad_()
    pushes = [push(nearly, entropies(nearly, eps=eps)[1]) for eps in (0.0, 1e-5)]
    p, eps = 2**-18, 1e-5
    share = p * (p + 2 * eps) / (p + eps) ** 2
    assert round(share, 3) == 0.476 and round(1 / share, 1) == 2.1
    assert torch.allclose(pushes[1], share * pushes[0], rtol=1e-4, atol=0)


def test_what_1e_5_does_on_a_batch_at_2_18_codes():
    "A mean that is nearly, not quite even: entropies 12.4 and 11.2, a push of 0.53."
    torch.manual_seed(0)
    logits = (2 * torch.randn(4096, 18)).requires_grad_()
    means = [entropies(logits, eps=eps)[1] for eps in (0.0, 1e-5)]
    sizes = [push(logits, mean).norm().item() for mean in means]
    assert [round(mean.item(), 1) for mean in means] == [12.4, 11.2]
    assert sizes[1] / sizes[0] == pytest.approx(0.53, abs=0.01)


def test_a_logarithm_cut_off_at_1e_5_does_not_push_at_all_at_2_18_codes():
    "As vector-quantize-pytorch has it: every code's share is below, and the shares sum to 1."
    torch.manual_seed(0)
    logits = (1e-3 * torch.randn(2**18, dtype=torch.float64)).requires_grad_()
    cut, exact = (
        push(logits, -(p * p.clamp_min(least).log()).sum())
        for p, least in ((logits.softmax(0), 1e-5), (logits.softmax(0), 0.0))
    )
    assert cut.norm() < 1e-9 * exact.norm()


# ---- a peer ----


def shared(ours, theirs):
    "The peer, with our layers."
    state = {k: v for k, v in ours.state_dict().items() if k.startswith("project")}
    theirs.load_state_dict(state, strict=False)
    return theirs


@pytest.mark.parametrize("dim", [4, 16])
def test_fsq_agrees_with_vector_quantize_pytorch(dim):
    """On all but about one vector in a hundred, which lies beside a border.

    Theirs bounds by 1 + eps and shifts by artanh, the authors by 1 - eps and tan.
    """
    torch.manual_seed(0)
    ours = FSQ(dim, 1000)
    theirs = shared(ours, PeerFSQ([8, 5, 5, 5], dim=dim))
    z = torch.randn(1, 4000, dim)
    out, (q, codes) = ours(z), theirs(z)
    agree = out.codes == codes
    assert agree.double().mean() > 0.98 and (out.z_q - q)[agree].abs().max() < 1e-6


@pytest.mark.parametrize("dim", [6, 16])
@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_signs_agree_with_vector_quantize_pytorch(dim, kind):
    torch.manual_seed(0)
    ours = kind(dim, 64, entropy=0.1, temperature=0.5, diversity=0.8, commitment=0.25, group=18)
    weights = dict(entropy_loss_weight=0.1, diversity_gamma=0.8, commitment_loss_weight=0.25)
    peer = PeerLFQ(dim=dim, codebook_size=64, spherical=kind is BSQ, **weights)
    theirs = shared(ours, peer.train())
    a = torch.randn(1, 500, dim).requires_grad_()
    b = a.detach().clone().requires_grad_()
    out, (q, codes, loss) = ours(a), theirs(b, inv_temperature=2.0)
    (out.z_q.pow(2).sum() + out.loss).backward()
    (q.pow(2).sum() + loss).backward()
    # the paper counts the first sign as the lowest bit, the peer as the highest
    assert torch.equal(flipped(out.codes, 6), codes.long())
    assert torch.allclose(out.z_q, q, atol=1e-6)
    # the peer cuts logarithms off at 1e-5
    assert abs(out.loss - loss) < 1e-3 and torch.allclose(a.grad, b.grad, atol=2e-3)
