"""One training step is one step of the codebook, however many passes make it; copies of tensors."""

import copy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from vqstudy.codebook import Codebook
from vqstudy.quantizers import keywords, recipe, recipes
from vqstudy.vector import same_step

DIM, K = 8, 16
# every kind of upkeep, every kind of random choice, and what is made of several parts
UPKEEP = ["vq", "vq + ema", "vq + replace", "vq + ema + replace", "vq + l2 + ema + replace"]
UPKEEP += ["vq + affine + replace", "vq + moving-affine", "vq + moving-affine + replace"]
UPKEEP += ["vq + refit", "vq + ema + refit + replace", "vq + rotation + ema + replace"]
UPKEEP += ["vq + ema + replace + group", "vq + ema + replace + residual"]
UPKEEP += ["vq + ema + replace + multiscale", "stochastic + ema + replace", "vq + nsvq + replace"]
UPKEEP += ["simvq", "optvq + ema + replace", "gumbel", "sq", "router", "router + tied"]
UPKEEP += ["fsq", "lfq", "bsq"]


def built(spec, **given):
    "With a short life and a short time to the next k-means, beginning from the data if it can."
    wanted = {"life_span": 2, "refit": 3, "init": "kmeans"} | given
    torch.manual_seed(0)
    known = {name: value for name, value in wanted.items() if name in keywords(spec)}
    return recipe(spec, DIM, 81 if spec == "fsq" else K, **known).train()


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def maps(seed, n=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 4, DIM, generator=generator) + 0.3 * seed


# ---- a pass that is run again


def gradients(quantizer, again):
    "Of some steps, with the pass plain or run again in backward."
    found = []
    for step in range(7):
        torch.manual_seed(step)
        z = maps(step).requires_grad_()
        scale = 1 + torch.rand(())  # what comes before and after draws too

        def loss(z):
            z_q, _, loss = quantizer(scale * z)
            return (z_q * torch.rand_like(z_q)).sum() + loss

        value = loss(z) if again is None else checkpoint(loss, z, use_reentrant=again)
        value.backward()
        grads = [p.grad for p in quantizer.parameters() if p.grad is not None]
        found.append([z.grad, *(grad.clone() for grad in grads), torch.get_rng_state()])
        torch.optim.SGD([*quantizer.parameters(), nn.Parameter(z)], 1e-3).step()
        quantizer.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("spec", UPKEEP)
@pytest.mark.filterwarnings("ignore:the temperature stays")
def test_a_pass_that_is_run_again_changes_nothing(spec, reentrant):
    plain, again = built(spec), built(spec)
    wanted, found = gradients(plain, None), gradients(again, reentrant)
    for step, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert a[0].isfinite().all()
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), step
    assert same(state(plain), state(again))


def test_several_passes_are_run_again_in_any_order():
    "Two segments of one step: the first is run again last, when the second has been settled."
    plain, again = built("vq + ema + replace"), built("vq + ema + replace")
    for step in range(5):
        z, other = maps(step).requires_grad_(), maps(step + 9).requires_grad_()
        for quantizer, run in ((plain, lambda f, z: f(z)), (again, checkpoint)):
            options = {} if run is not checkpoint else {"use_reentrant": False}
            same_step(quantizer, False)
            loss = run(lambda z: quantizer(z).loss, z, **options)
            same_step(quantizer)
            loss = loss + run(lambda z: quantizer(z).loss, other, **options)
            loss.backward()
        assert same(state(plain), state(again))
        half = z.grad / 2  # both have added theirs
        assert torch.allclose(half * 2, z.grad) and z.grad.abs().max() > 0


def test_fused_alternation_cannot_be_run_again():
    quantizer = recipe("vq + alt", DIM, K).train()
    quantizer.inner_step = lambda loss: None
    loss = checkpoint(lambda z: quantizer(z).loss, maps(0).requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="torch.utils.checkpoint runs again: use Settings"):
        loss.backward()


@pytest.mark.parametrize("spec", ["vq + ema", "vq + replace", "vq + moving-affine"])
def test_compiled_upkeep_refuses_to_be_run_again(spec):
    torch._dynamo.reset()
    quantizer = built(spec, init="normal")
    compiled = torch.compile(quantizer, backend="aot_eager")
    z = maps(0).requires_grad_()
    compiled(z).loss.backward()
    before, z = state(quantizer), maps(3).requires_grad_()
    loss = checkpoint(lambda z: compiled(z).loss, z, use_reentrant=False)
    with pytest.raises(RuntimeError, match="compile the function that calls checkpoint"):
        loss.backward()
    assert not same(before, state(quantizer))  # of the first run


@pytest.mark.parametrize("spec", ["vq", "vq + ema + replace", "vq + moving-affine"])
def test_compiled_around_the_segment_the_pass_is_counted_once(spec):
    torch._dynamo.reset()
    plain, again = built(spec, init="normal"), built(spec, init="normal")
    segment = lambda z: checkpoint(lambda y: again(y).z_q, z, use_reentrant=False)
    compiled = torch.compile(segment, backend="aot_eager")
    for step in range(3):
        a, b = maps(step).requires_grad_(), maps(step).requires_grad_()
        plain(a).z_q.pow(2).sum().backward()
        compiled(b).pow(2).sum().backward()
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    a, b = state(plain), state(again)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


# ---- passes that are one step

ADDED = ["vq + ema", "vq + ema + replace", "vq + l2 + ema", "vq + replace", "optvq + ema"]
ADDED += ["vq + ema + group", "vq + ema + residual", "vq + rotation + ema"]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("spec", ADDED)
def test_the_passes_of_a_step_are_the_pass_of_its_batch(spec, parts):
    "Up to rounding; revival, which takes its vectors from the first pass, does not act here."
    whole = built(spec, life_span=100, init="normal").double()
    accumulated = copy.deepcopy(whole)
    for step in range(4):
        z = maps(step).double()
        whole(z)
        for i, part in enumerate(z.chunk(parts)):
            same_step(accumulated, i > 0)
            accumulated(part)
    a, b = state(whole), state(accumulated)
    if "optvq" not in spec:  # whose codes depend on the whole batch
        assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)
    counts = [value for name, value in b.items() if name.endswith("counts")]
    wanted = 0.99**4 * K + (1 - 0.99**4) * 64 * (1 if "group" not in spec else 1)
    assert all(abs(count.sum() - wanted) < 1e-6 for count in counts)


@pytest.mark.parametrize("spec", ["vq + replace", "vq + moving-affine", "vq + refit"])
def test_what_happens_once_a_step_happens_in_its_first_pass(spec):
    one, several = built(spec), built(spec)
    for step in range(7):
        first, *others = maps(step).chunk(4)
        one(first)
        same_step(several, False)
        several(first)
        codebook = several.codebook.clone()
        same_step(several)
        chosen = torch.cat([several(part).codes.flatten() for part in others])
        assert torch.equal(several.codebook, codebook)
    if spec != "vq + replace":
        assert same(state(one), state(several))
    else:  # idle times count what the other passes choose, too
        several.settle()
        assert not several.alive.idle[chosen].any() and several.alive.idle.max() <= 2


def test_a_codebook_that_waits_begins_in_any_pass():
    quantizer = built("vq + ema + replace", init="kmeans")
    same_step(quantizer)
    quantizer(maps(0) * 1e-3 + 50)
    assert quantizer.codebook.min() > 40


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_same_step_refuses_what_is_not_a_flag(wrong):
    with pytest.raises(TypeError, match="on must be True or False"):
        same_step(built("vq + ema"), wrong)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        same_step(lambda z: z)


# ---- when what is gathered is applied

SETTLE = {
    "eval": lambda q: q.eval(),
    "train(False)": lambda q: nn.Sequential(q).train(False),
    "state_dict": lambda q: nn.Sequential(q).state_dict(),
    "freeze": lambda q: q.freeze(),
    "the next pass": lambda q: q(maps(9)),
}


@pytest.mark.parametrize("by", SETTLE)
@pytest.mark.parametrize("spec", ["vq + ema + replace", "vq + ema + residual"])
def test_a_step_is_applied_when_somebody_looks(spec, by):
    quantizer = built(spec, init="normal")
    before = quantizer.codebook.clone()
    codes = quantizer(maps(0)).codes
    assert torch.equal(quantizer.codebook, before)  # the same until the end of the step
    assert torch.equal(quantizer.encode(maps(0)), codes)
    SETTLE[by](quantizer)
    moved = quantizer.codebook.clone()
    assert not torch.equal(moved, before)
    if by != "the next pass":
        SETTLE[by](quantizer)  # once
        assert torch.equal(quantizer.codebook, moved)


def test_decoding_and_encoding_apply_nothing():
    for spec in ("vq + ema", "vq + ema + residual", "vq + ema + group"):
        quantizer = built(spec, init="normal")
        before = quantizer.codebook.clone()
        quantizer.decode(quantizer(maps(0)).codes)
        quantizer.encode(maps(1))
        assert torch.equal(quantizer.codebook, before)


def test_looking_in_between_changes_no_later_step():
    for spec in UPKEEP:
        plain, looked = built(spec), built(spec)
        for step in range(6):
            for quantizer in (plain, looked):
                torch.manual_seed(step)
                quantizer.anneal(step / 6)
                quantizer(maps(step))
            looked.state_dict()
            looked.eval()(maps(20))
            looked.train()
        assert same(state(plain), state(looked)), spec


def test_what_is_gathered_is_forgotten_where_a_codebook_is_given_or_loaded():
    quantizer, other = built("vq + ema + replace"), built("vq + ema + replace")
    other(maps(3))
    loaded = state(other)
    quantizer(maps(0))
    quantizer.load_state_dict(loaded)
    assert same(state(quantizer), loaded)
    quantizer(maps(0))
    given = torch.randn(K, DIM)
    quantizer.set_codebook(given)
    assert torch.equal(quantizer.eval().codebook, given)


# ---- random choices move no others


def test_upkeep_draws_nothing_from_the_generator():
    for spec in ("vq + ema + replace", "vq + refit", "vq + replace", "vq + ema + residual"):
        torch.manual_seed(0)
        quantizer = built(spec)
        random = torch.get_rng_state()
        for step in range(7):
            quantizer(maps(step))
        assert torch.equal(torch.get_rng_state(), random), spec


def test_upkeep_is_repeatable_under_the_seed_and_differs_without():
    def codebook(seed):
        torch.manual_seed(seed)
        quantizer = recipe("vq + replace", DIM, K, life_span=1).train()
        quantizer.book.weight.data.fill_(100.0)
        for step in range(3):
            quantizer(maps(step))
        return quantizer.eval().codebook

    assert torch.equal(codebook(1), codebook(1))
    assert not torch.equal(codebook(1), codebook(2))


# ---- copies of the tensors are copies of the state


def buffers(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


@pytest.mark.parametrize("spec", recipes())
def test_no_buffer_is_a_truth_value(spec):
    assert all(value.dtype != torch.bool for value in recipe(spec, DIM, K).buffers())


@pytest.mark.parametrize("spec", [s for s in UPKEEP if s != "simvq"])
def test_tensors_that_are_copied_in_place_are_the_state(spec):
    giver, taker = built(spec), built(spec)
    for step in range(5):
        giver(maps(step))
    with torch.no_grad():
        for name, value in buffers(taker).items():
            value.copy_(buffers(giver)[name])
    for quantizer in (giver, taker):
        torch.manual_seed(1)
        quantizer(maps(9))
    assert same(state(giver), state(taker))


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_an_average_of_models_does_not_begin_again(init, use_buffers, average):
    model = nn.Sequential(nn.Linear(DIM, DIM), built("vq", init=init))
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(5):
        model(maps(step)).loss.backward()
        optimizer.step()
        averaged.update_parameters(model)
    before = averaged.module[1].codebook.clone()
    update_bn([maps(7)], averaged)
    assert torch.equal(averaged.module[1].codebook, before)
    assert not averaged.module[1].book.waits()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("spec", UPKEEP)
def test_buffers_can_be_averaged(spec, average):
    model = built(spec)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for step in range(4):
        model(maps(step))
        averaged.update_parameters(model)
    averaged.eval()
    assert all(value.isfinite().all() for value in averaged.module.state_dict().values())
    averaged.module(maps(9))


def test_a_moving_average_that_is_averaged_is_near_the_last_one():
    model = built("vq + ema", init="normal")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(60):
        model(maps(0))
        averaged.update_parameters(model)
    moved = (model.eval().codebook - averaged.module.eval().codebook).abs().max()
    assert moved < 0.02


@pytest.mark.parametrize("init", ["kmeans", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_no_beginning(init, dtype):
    for there_and_back in (False, True):
        book = Codebook(DIM, K, init=init).to(dtype)
        assert (book.float() if there_and_back else book).waits()
        book.weight.data[0, 0] += 1
        assert not book.waits()


def test_a_state_of_before_there_was_a_key_loads():
    quantizer = built("vq + ema + replace")
    old = {name: value for name, value in state(quantizer).items() if name != "key"}
    old["book.started"] = torch.tensor(True)
    other = built("vq + ema + replace")
    other.load_state_dict(old)
    assert not other.book.waits() and torch.equal(other.codebook, quantizer.eval().codebook)
