"""Deferred quantization: before, at and after the switch, and what may not move the count."""

import copy
import pickle
import pytest
import torch
from devices import NoQuestions
from torch.utils.checkpoint import checkpoint
from vqstudy.composed import GroupQuantizer, ResidualQuantizer
from vqstudy.deferred import DeferredQuantizer
from vqstudy.lattice import FSQ
from vqstudy.quantizers import keywords, recipe
from vqstudy.router import RouterQuantizer
from vqstudy.vector import VectorQuantizer, same_step

DIM, K = 8, 16
SPECS = [
    "vq + deferred",
    "vq + ema + replace + deferred",
    "vq + l2 + refit + deferred",
    "vq + rotation + diversity + deferred",
    "vq + moving-affine + deferred",
    "vq + affine + deferred",
    "stochastic + deferred",
    "simvq + deferred",
    "optvq + deferred",
    "gumbel + deferred",
    "router + tied + deferred",
    "fsq + deferred",
    "lfq + deferred",
    "vq + ema + group + deferred",
    "vq + ema + replace + residual + deferred",
    "vq + multiscale + deferred",
]
every = pytest.mark.parametrize("spec", SPECS)


def build(spec, steps=2):
    torch.manual_seed(0)
    return recipe(spec, DIM, K, deferred_steps=steps).train()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 4, DIM, generator=generator)


def step(quantizer, seed):
    "What a training step gives and leaves behind."
    torch.manual_seed(seed)
    z = batch(seed).requires_grad_()
    quantizer.zero_grad()
    result = quantizer(z)
    (result.z_q * result.z_q.detach().cos()).sum().add(result.loss).backward()
    return [*result, z.grad, *(p.grad for p in quantizer.parameters())]


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def state(quantizer):
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def same_state(a, b):
    a, b = state(a), state(b)
    return a.keys() == b.keys() and same(a.values(), b.values())


@every
def test_before_the_switch_z_passes_and_nothing_of_the_inner_quantizer_moves(spec):
    quantizer = build(spec)
    before = state(quantizer.inner)
    for seed in range(2):
        z_q, codes, loss, grad, *others = step(quantizer, seed)
        assert torch.equal(z_q, batch(seed)) and loss == 0
        assert torch.equal(grad, batch(seed).cos()) and others == [None] * len(others)
        assert torch.equal(codes, quantizer.encode(batch(seed)))
        assert same(before.values(), state(quantizer.inner).values())


@every
def test_from_the_switch_on_it_is_the_inner_quantizer(spec):
    "To the last bit: as if the steps before had not been."
    quantizer = build(spec)
    alone = copy.deepcopy(quantizer.inner)
    for seed in range(2):
        step(quantizer, seed)
    for seed in range(2, 6):
        assert same(step(quantizer, seed), step(alone, seed))
        assert same_state(quantizer.inner, alone)


@pytest.mark.parametrize("init", ["kmeans", "sample", "normal"])
def test_the_codebook_begins_at_the_switch_or_stays(init):
    torch.manual_seed(0)
    quantizer = recipe("vq + ema + deferred", DIM, K, deferred_steps=2, init=init, decay=0.5)
    drawn = quantizer.codebook.clone()
    far = torch.randn(200, DIM) + 9
    for _ in range(2):
        quantizer(far)
        assert torch.equal(quantizer.codebook, drawn)
    _, codes, _ = quantizer(far)
    near = (quantizer.codebook - 9).abs().max() < 5
    assert near == (init != "normal")
    if near:
        assert len(codes.unique()) == K
        # the averages begin with the new table, and one step of theirs is gathered
        assert torch.equal(quantizer.inner.average.sums, quantizer.codebook)
        assert quantizer.inner.average.passes == 1


@every
def test_evaluation_quantizes_at_all_times_and_changes_nothing(spec):
    quantizer = build(spec)
    for seed in range(5):
        before = state(quantizer)
        z_q, codes, _ = quantizer.eval()(batch(seed))
        assert torch.equal(quantizer.encode(batch(seed)), codes)
        assert torch.equal(quantizer.decode(codes), z_q)
        assert same(before.values(), state(quantizer).values())
        step(quantizer.train(), seed)


@every
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_is_resumed_is_the_run(spec, after):
    whole = build(spec)
    for seed in range(after):
        step(whole, seed)
    loaded = build(spec)
    loaded.load_state_dict(whole.state_dict(), strict=True)
    others = [loaded, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    for seed in range(after, 6):
        wanted = step(whole, seed)
        assert all(same(step(other, seed), wanted) for other in others)
        assert all(same_state(other, whole) for other in others)


def test_a_state_of_before_goes_back_over_the_switch():
    quantizer = build("vq + ema + deferred")
    step(quantizer, 0)
    place = copy.deepcopy(quantizer.state_dict())
    first = [step(quantizer, seed) for seed in (1, 2, 3)]
    quantizer.load_state_dict(place)
    assert all(same(step(quantizer, seed), first[seed - 1]) for seed in (1, 2, 3))


@every
def test_a_pass_that_is_run_again_is_the_same_and_is_not_counted(spec):
    plain, again = build(spec), build(spec)
    for seed in range(5):
        wanted = step(plain, seed)
        torch.manual_seed(seed)
        z = batch(seed).requires_grad_()
        again.zero_grad()

        def forward(z):
            result = again(z)
            return (result.z_q * result.z_q.detach().cos()).sum() + result.loss

        checkpoint(forward, z, use_reentrant=False).backward()
        assert torch.equal(z.grad, wanted[3])
        assert same_state(plain, again) and plain.acts == again.acts


def test_passes_of_one_step_are_counted_once():
    quantizer = build("vq + ema + replace + deferred")
    passed = []
    for _ in range(4):
        for i in range(3):
            same_step(quantizer, i > 0)
            passed.append(torch.equal(quantizer(batch(i)).z_q, batch(i)))
    assert passed == [True] * 6 + [False] * 6
    assert quantizer.inner.average.passes == 3


def test_a_frozen_one_stays_on_its_side():
    quantizer = build("vq + deferred")
    with pytest.raises(RuntimeError, match="waits for its first training batch"):
        quantizer.freeze()
    for spec, steps in (("router + deferred", 1), ("vq + deferred", 4)):
        quantizer = build(spec)
        for seed in range(steps):
            step(quantizer, seed)
        quantizer.freeze()
        before = state(quantizer)
        acts = {not torch.equal(quantizer(batch(seed)).z_q, batch(seed)) for seed in range(4)}
        assert acts == {steps == 4} and same(before.values(), state(quantizer).values())


def test_the_count_stops_at_the_switch():
    quantizer = build("vq + deferred")
    for seed in range(6):
        step(quantizer, seed)
    assert quantizer.taken == 3 and quantizer.acts


def test_a_device_is_asked_at_the_switch_alone():
    quantizer = recipe("vq + deferred", DIM, K, init="normal", deferred_steps=3).to("meta")
    with NoQuestions():
        assert not any(quantizer.count() for _ in range(3))
    with pytest.raises(AssertionError, match="waits for the device"), NoQuestions():
        quantizer.count()


@pytest.mark.parametrize("spec", ["vq + deferred", "vq + ema + replace + deferred"])
def test_compiled_it_is_what_it_is_in_eager_mode(spec):
    torch._dynamo.reset()
    eager, compiled = build(spec), build(spec)
    fast = torch.compile(compiled, backend="aot_eager")
    for seed in range(3):
        # the types that are checked here at run time cannot be traced in parts of k-means
        ours = (compiled if seed == 2 else fast)(batch(seed))
        theirs = eager(batch(seed))
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.allclose(ours.z_q, theirs.z_q, atol=1e-6)
    whole = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3, 6):
        ours, theirs = whole(batch(seed)), eager(batch(seed))
        assert torch.allclose(ours.z_q, theirs.z_q, atol=1e-6)
    pairs = zip(state(compiled).values(), state(eager).values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_a_codebook_that_is_given_before_the_switch_stays():
    quantizer, mine = build("vq + deferred"), torch.randn(K, DIM)
    quantizer.set_codebook(mine)
    for seed in range(4):
        quantizer(batch(seed))
    assert torch.equal(quantizer.codebook, mine)


@pytest.mark.parametrize("kind", [GroupQuantizer, ResidualQuantizer])
@pytest.mark.parametrize("shared", [False, True])
def test_it_can_be_a_part(kind, shared):
    make = lambda dim, k: DeferredQuantizer(dim, k, steps=2)
    quantizer = kind(DIM, K, 2, make, shared).train()
    passed = [torch.allclose(quantizer(batch(i)).z_q, batch(i)) for i in range(4)]
    assert passed == [True, True, False, False]


BAD = [
    (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    (dict(steps=2.0), TypeError, "steps must be an int"),
    (dict(make=lambda d, k: VectorQuantizer(d, k, alternate=True)), ValueError, "alternate"),
    (dict(make=lambda d, k: VectorQuantizer(d, k, rule="hessian")), ValueError, "'hessian' needs"),
    (dict(make=lambda d, k: VectorQuantizer(d, 2 * k)), ValueError, "with 16 codes"),
    (dict(make=lambda d, k: RouterQuantizer(d, k, code_dim=3)), ValueError, "code_dim 8, got 3"),
    (dict(make=torch.nn.Linear), TypeError, "must return a Quantizer, got Linear"),
]


@pytest.mark.parametrize("given,error,words", BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be_deferred(given, error, words):
    with pytest.raises(error, match=words):
        DeferredQuantizer(DIM, K, **given)


@pytest.mark.parametrize("option", ["alt", "opt", "exact", "hessian"])
def test_recipes_that_cannot_be_deferred(option):
    with pytest.raises(ValueError, match="contradict each other"):
        recipe(f"vq + {option} + deferred", DIM, K)
    with pytest.raises(ValueError, match="deferred_steps belongs to option 'deferred'"):
        recipe("vq", DIM, K, deferred_steps=3)
    assert "deferred_steps" in keywords("vq + deferred")


def test_a_lattice_takes_no_codebook():
    quantizer = DeferredQuantizer(DIM, 4**8, make=lambda d, k: FSQ(d, k, levels=[4] * 8))
    with pytest.raises(ValueError, match="the codebook of FSQ cannot be given"):
        quantizer.set_codebook(torch.zeros(4**8, DIM))
