"""Every quantizer of oracles.py: gradients, values, state, shapes, dtypes, graphs, bad input.

A recipe without an oracle fails. Each test takes one quantizer through all its dtypes, shapes or
bad inputs; what failed is named in the message.
"""

import copy
import pickle
import pytest
import torch
import torch.nn.functional as F
from oracles import MAPS, ORACLES, attached, errors, settings, task
from torch._dynamo.testing import CompileCounterWithBackend
from vqstudy.deferred import DeferredQuantizer
from vqstudy.quantizers import NoQuantizer, VectorQuantizer, keywords, recipe, recipes
from vqstudy.upkeep import Replacement

DIM, CODES = 8, 16
LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *LOW)
# option: how VectorQuantizer's docstring says that it is no graph
NOT_A_GRAPH = {"refit": "refit", "exact": '"exact"', "hessian": '"hessian"'}

names = pytest.mark.parametrize("name", ORACLES)
coded = pytest.mark.parametrize("name", [name for name in ORACLES if name != "none"])


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def build(name):
    return attached(ORACLES[name].build(DIM, CODES))


def sample(name, dtype=torch.float32):
    shape = (2, 4, 6, DIM) if ORACLES[name].shapes is MAPS else (40, DIM)
    return torch.randn(shape).to(dtype)


def step(quantizer, z, seed=7):
    "Output, gradient to z, and gradients to all parameters of one training step."
    leaf = z.clone().requires_grad_()
    quantizer.zero_grad()
    torch.manual_seed(seed)
    result = quantizer(leaf)
    (task(result.z_q.float()) + result.loss).backward()
    return result, leaf.grad, [p.grad for p in quantizer.parameters()]


def alike(a, b, **tolerance):
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, **tolerance)


def all_alike(first, second, **tolerance):
    return all(alike(a, b, **tolerance) for a, b in zip(first, second, strict=True))


def finite(grads):
    return all(grad is None or grad.isfinite().all() for grad in grads)


def test_every_recipe_has_an_oracle():
    assert set(recipes()) <= set(ORACLES)


@names
def test_gradients_to_z_and_every_parameter(name):
    for shape, k, warm in settings(name):
        for what, error in errors(ORACLES[name], shape, k, warm).items():
            assert error < 1e-10, f"{what}: z {shape}, {k} codes, after {warm} steps: {error:.1e}"


VARIANTS = {name: {"scale": name} for name in ("unit", "distance")}
VARIANTS["projected"] = {"project": True}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", ["rotation", "reflection"])
def test_a_variant_of_a_rule_is_the_rule_with_that_keyword(rule, variant):
    named, given = f"vq + {rule}-{variant} + ema", f"vq + {rule} + ema"
    torch.manual_seed(0)
    one = recipe(named, DIM, 16).train()
    torch.manual_seed(0)
    other = recipe(given, DIM, 16, **VARIANTS[variant]).train()
    z = torch.randn(32, DIM)
    results = [step(quantizer, z) for quantizer in (one, other)]
    assert torch.equal(results[0][1], results[1][1])
    plain = step(recipe(given, DIM, 16).train(), z)[1]
    assert not torch.allclose(results[0][1], plain)
    with pytest.raises(ValueError, match="contradict each other"):
        recipe(f"vq + {rule} + {rule}-{variant}", DIM, 16)


@names
def test_decode_of_encode_is_the_forward_value(name):
    for dtype in DTYPES:
        torch.manual_seed(0)
        quantizer, z = build(name).to(dtype), sample(name, dtype)
        quantizer.train()(z)
        z_q, codes, _ = quantizer.eval()(z)
        assert (z_q.dtype, codes.dtype) == (dtype, torch.int64)
        assert torch.equal(quantizer.encode(z), codes), dtype
        assert torch.equal(z if name == "none" else quantizer.decode(codes), z_q), dtype


# of the others the decoder gets something else in training, by design
HARD = [name for name, oracle in ORACLES.items() if not (oracle.soft or name == "none")]


@pytest.mark.parametrize("name", HARD)
def test_training_decodes_the_codes_as_they_were_chosen(name):
    for dtype in DTYPES:
        torch.manual_seed(0)
        quantizer, z = build(name).to(dtype).train(), sample(name, dtype)
        before = copy.deepcopy(quantizer)
        z_q, codes, _ = quantizer(z)
        # moving averages write after the choice, moving statistics before it
        decoded = [q.decode(codes) for q in (before, quantizer)]
        assert any(torch.equal(z_q, q) for q in decoded), dtype


@names
def test_evaluation_changes_nothing(name):
    torch.manual_seed(0)
    quantizer, z = build(name).train(), sample(name)
    for _ in range(3):
        quantizer(z)
    before, random = state(quantizer.eval()), torch.get_rng_state()
    for _ in range(25):
        quantizer(z + 3)
    quantizer.train().encode(z)
    assert same(state(quantizer), before)
    assert torch.equal(torch.get_rng_state(), random)


@names
def test_copies_and_reloads_take_the_same_next_step(name):
    torch.manual_seed(0)
    first = build(name).train()
    for _ in range(6):
        first(sample(name))
    first.anneal(0.4)
    loaded, z = build(name).train(), sample(name)
    loaded.load_state_dict(first.state_dict(), strict=True)
    pickled = pickle.loads(pickle.dumps(first))
    copies = [attached(q) for q in (copy.deepcopy(first), pickled, loaded, first)]
    (result, grad, grads), *others = [step(q, z) for q in copies]
    for their_result, their_grad, their_grads in others:
        assert all(torch.equal(a, b) for a, b in zip(result, their_result))
        assert torch.equal(grad, their_grad)
        assert all_alike(grads, their_grads, rtol=0, atol=0)
    assert all(same(state(q), state(first)) for q in copies)


@names
def test_nothing_stays_behind_when_the_module_moves(name):
    quantizer = build(name)
    quantizer.train()(sample(name))
    for module in quantizer.modules():
        hidden = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not hidden, "a tensor that .to() does not see"
    assert all(t.device.type == "meta" for t in quantizer.to("meta").state_dict().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@names
def test_on_a_gpu(name):
    torch.manual_seed(0)
    quantizer, z = build(name).eval(), sample(name)
    on_cpu, on_gpu = quantizer(z), quantizer.cuda()(z.cuda())
    assert (on_gpu.codes.cpu() == on_cpu.codes).double().mean() > 0.99
    assert name == "none" or torch.equal(quantizer.decode(on_gpu.codes), on_gpu.z_q)
    after, grad, _ = step(quantizer.train(), z.cuda())
    assert grad.isfinite().all() and after.loss.isfinite()


@names
def test_any_leading_shape_channel_dim_and_strides(name):
    torch.manual_seed(0)
    flat = build(name).eval()
    maps = attached(copy.deepcopy(flat))
    maps.channel_dim = 1
    z = torch.randn(2, DIM, 4, 6)
    result, rows = maps(z), flat(z.movedim(1, -1))
    assert torch.equal(result.codes, rows.codes)
    assert torch.equal(result.z_q, rows.z_q.movedim(-1, 1))
    assert torch.equal(result.loss, rows.loss)
    assert name == "none" or torch.equal(maps.decode(result.codes), result.z_q)
    assert torch.equal(maps(z.contiguous(memory_format=torch.channels_last)).z_q, result.z_q)
    if ORACLES[name].shapes is MAPS:
        return
    one = flat(z[0, :, 0, 0])
    assert result.codes.shape == (2, 4, 6, *flat.code_shape)
    assert one.codes.shape == flat.code_shape and one.z_q.ndim == 1


@names
def test_strides_of_z_and_of_the_gradient_do_not_matter(name):
    torch.manual_seed(0)
    first = build(name).train()
    second, z = attached(copy.deepcopy(first)), sample(name)
    g, grads = torch.randn(z.shape[-1:] + z.shape[:-1]).movedim(0, -1), []
    strided = z.movedim(-1, 0).contiguous().movedim(0, -1)
    for quantizer, x, wanted in ((first, z, g), (second, strided, g.contiguous())):
        leaf = x.detach().requires_grad_()
        torch.manual_seed(1)
        z_q, _, loss = quantizer(leaf)
        if z_q.shape != g.shape:
            pytest.skip("the router's codes are wider or narrower than z")
        if loss.requires_grad:
            torch.autograd.backward([z_q, loss], [wanted, torch.ones(())])
        else:
            torch.autograd.backward(z_q, wanted)
        grads.append([leaf.grad, *(p.grad for p in quantizer.parameters())])
    assert all_alike(*grads, rtol=1e-4, atol=1e-5)
    assert grads[0][0] is not None


@names
def test_autocast_decides_in_float32(name):
    for dtype in LOW:
        torch.manual_seed(0)
        quantizer = build(name).train()
        other, z = attached(copy.deepcopy(quantizer)), sample(name, dtype)
        plain, _, _ = step(other, z.float())
        with torch.autocast("cpu", dtype):
            result, grad, grads = step(quantizer, z)
        assert (result.codes == plain.codes).double().mean() >= 0.999, dtype
        assert torch.equal(result.z_q, plain.z_q.to(dtype)), dtype
        assert result.loss.dtype == torch.float32 and result.loss.isfinite(), dtype
        assert grad is not None and finite([grad, *grads]), dtype
        assert same(state(quantizer), state(other)), dtype
        if name == "none":
            continue
        with torch.autocast("cpu", dtype):
            decoded = quantizer.eval().decode(result.codes)
        assert torch.equal(decoded, quantizer.decode(result.codes)), dtype


@names
def test_compiles_without_a_break(name):
    if "deferred" in name:
        assert "a break in each pass before the switch" in DeferredQuantizer.__doc__
        pytest.skip("the docstring says why not; test_deferred compiles both sides of the switch")
    if outside := [option for option in NOT_A_GRAPH if option in name]:
        promised = VectorQuantizer.__doc__.split("Compiles with fullgraph=True")[1]
        assert NOT_A_GRAPH[outside[0]] in promised
        pytest.skip("the docstring says why not")
    torch._dynamo.reset()  # each quantizer counts its own recompilations
    torch.manual_seed(0)
    eager, z = build(name).train(), sample(name)
    for m in eager.modules():
        if isinstance(m, Replacement):
            m.life_span = 100  # no code dies here: a graph draws vectors at each step all the same
    compiled = attached(copy.deepcopy(eager))

    def forward(quantizer, z):
        result = quantizer(z)
        return task(result.z_q) + result.loss, result.codes

    graphs = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(forward, fullgraph=True, backend=graphs)
    for i in range(3):
        seen = []
        for function, quantizer in ((forward, eager), (fast, compiled)):
            quantizer.anneal(i / 2)
            leaf = z.clone().requires_grad_()
            torch.manual_seed(i)
            loss, codes = function(quantizer, leaf)
            loss.backward()
            seen.append((loss, codes, leaf.grad))
        (loss, codes, grad), (their_loss, their_codes, their_grad) = seen
        assert torch.equal(codes, their_codes) and torch.allclose(loss, their_loss)
        assert torch.allclose(grad, their_grad, atol=1e-5)
    # annealing makes no new graph; a shared level does, once: its first pass marks it (`Stepping`)
    marked = "residual" in name and "shared=True" in name
    assert graphs.frame_count == 1 + marked
    grads = [[p.grad for p in quantizer.parameters()] for quantizer in (eager, compiled)]
    assert all_alike(*grads, atol=1e-4)
    assert all_alike(state(eager).values(), state(compiled).values(), atol=1e-6)


@names
def test_vectors_at_the_edges_have_finite_gradients(name):
    torch.manual_seed(0)
    quantizer = build(name).train()
    z = sample(name)
    rows = z.view(-1, DIM)
    far = 30.0 if name.startswith("sq") else 1e4  # SQ-VAE takes exp of a linear function of z
    for i, value in enumerate((0, 1e-20, far, -far)):
        rows[i] = value
    if name != "none" and quantizer.codebook.shape[-1] == DIM:
        code = quantizer.codebook.detach().reshape(-1, DIM)[0]
        rows[4:6] = torch.stack([code, -code])
    result, grad, grads = step(quantizer, z)
    assert result.loss.isfinite() and grad is not None and finite([grad, *grads])


BAD_INPUT = [
    (torch.zeros(2, 4, 4, 7), ValueError, "z must have vectors of width 8, got shape"),
    (torch.zeros(0, 4, 4, 8), ValueError, "at least one vector"),
    (torch.full((2, 4, 4, 8), torch.nan), ValueError, "z must be finite"),
    (torch.full((2, 4, 4, 8), torch.inf), ValueError, "z must be finite"),
    (torch.zeros(2, 4, 4, 8, dtype=torch.int64), TypeError, "floating dtype, got torch.int64"),
    ([[0.0] * 8], TypeError, "torch.Tensor, got list"),
    (torch.tensor(1.0), ValueError, "must have a dimension -1"),
]


@names
def test_bad_input_changes_nothing(name):
    quantizer = build(name).train()
    before, random = state(quantizer), torch.get_rng_state()
    for bad, error, words in BAD_INPUT:
        for call in (quantizer, quantizer.encode):
            with pytest.raises(error, match=words):
                call(bad)
    assert same(state(quantizer), before)
    assert torch.equal(torch.get_rng_state(), random)


@coded
def test_bad_codes(name):
    quantizer = build(name)
    good = quantizer.encode(sample(name))
    for bad, error, words in (
        (good + 16, ValueError, r"0\.\.15"),
        (good - 17, ValueError, r"0\.\.15"),
        (good.float(), TypeError, "float32"),
        ([1], TypeError, "list"),
    ):
        with pytest.raises(error, match=words):
            quantizer.decode(bad)
    if not quantizer.code_shape:
        return
    for bad in (torch.cat([good, good], -1), good[..., :0], torch.tensor(1)):
        with pytest.raises(ValueError, match="codes must"):
            quantizer.decode(bad)


# these two work out their levels before they are built
BUILT_AT_ONCE = [name for name in ORACLES if name not in ("fsq, two levels each", "fsq + rotation")]


@pytest.mark.parametrize("name", BUILT_AT_ONCE)
def test_arguments_of_every_class_are_checked(name):
    for dim, k, error, words in (
        (0, 16, ValueError, "dim must be at least 1, got 0"),
        (8, 0, ValueError, "num_codes must be at least 1, got 0"),
        (8, 2.5, TypeError, "num_codes must be an int, got 2.5"),
    ):
        with pytest.raises(error, match=words):
            ORACLES[name].build(dim, k)


PLAIN = [spec for spec in ORACLES if "+" not in spec and spec in recipes()]
TUNED = ["l2", "ema", "affine + replace", "residual", "group", "multiscale"]


@pytest.mark.parametrize("spec", PLAIN + [f"vq + {options}" for options in TUNED])
def test_keywords_of_a_recipe_reach_it(spec):
    assert {"channel_dim", "check_finite"} <= set(keywords(spec))
    quantizer = recipe(spec, DIM, CODES, channel_dim=1, check_finite=False)
    assert quantizer.channel_dim == 1
    assert quantizer(torch.randn(2, DIM, 4, 4)).z_q.shape == (2, DIM, 4, 4)


BEGIN = ["vq", "stochastic", "optvq"]
BEGIN += [f"vq + {option}" for option in ("l2", "ema", "replace", "affine", "moving-affine")]
BEGIN += [f"vq + {option}" for option in ("group", "residual", "multiscale")]


@pytest.mark.parametrize("spec", BEGIN)
@pytest.mark.parametrize("init", ["kmeans", "sample"])
def test_a_codebook_begins_with_the_first_training_batch(spec, init):
    torch.manual_seed(0)
    quantizer = attached(recipe(spec, DIM, CODES, init=init))
    z = 100 + sample(spec)
    waiting = state(quantizer.eval())
    quantizer(z)
    quantizer.encode(z)
    assert same(state(quantizer), waiting)
    with pytest.raises(ValueError):
        quantizer.train()(z * torch.nan)
    assert same(state(quantizer), waiting)
    z_q = quantizer(z).z_q
    # the first output is of the new codebook
    assert (z_q - (F.normalize(z, dim=-1) if "l2" in spec else z)).abs().max() < 15
    fresh = recipe(spec, DIM, CODES, init=init)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(z).codes, quantizer.eval()(z).codes)


@names
def test_the_loss_is_the_same_without_gradients(name):
    torch.manual_seed(0)
    quantizer, z = build(name).eval(), sample(name)
    with torch.no_grad():
        quiet = quantizer(z)
    loud = quantizer(z)
    assert torch.equal(quiet.loss, loud.loss) and torch.equal(quiet.z_q, loud.z_q)


@pytest.mark.parametrize("commit_encoder", [True, False])
def test_the_inner_step_of_alternation_is_the_codebooks_half_of_the_loss(commit_encoder):
    torch.manual_seed(0)
    given = {"alpha": 5.0, "beta": 0.9, "commit_encoder": commit_encoder}
    quantizer = recipe("vq + alt + affine", 4, 9, **given).double()
    z, before = torch.randn(30, 4, dtype=torch.float64), state(quantizer)
    quantizer.inner_loss(z).backward()
    leaves = {name: v.detach().clone().requires_grad_() for name, v in quantizer.named_parameters()}
    c = (1 + leaves["book.map.scale"]) * leaves["book.weight"] + leaves["book.map.shift"]
    (4.5 * (c[(z[:, None] - c).pow(2).sum(-1).argmin(1)] - z).pow(2).mean()).backward()
    for name, p in quantizer.named_parameters():
        assert (p.grad - leaves[name].grad).abs().max() < 1e-12, name
    assert same(state(quantizer), before)


@pytest.mark.parametrize("spec", ["vq + exact", "vq + hessian", "vq + exact + residual"])
def test_rules_that_need_the_decoder_say_so(spec):
    quantizer = recipe(spec, 4, 8).train()
    with pytest.raises(RuntimeError, match="needs the decoder"):
        quantizer(torch.randn(3, 4))
    quantizer.eval()(torch.randn(3, 4))


def test_two_passes_before_one_backward():
    torch.manual_seed(0)
    quantizer = recipe("vq + l2 + replace", 4, 64, life_span=1).train()
    a, b = quantizer(torch.randn(8, 4)), quantizer(torch.randn(8, 4))
    (a.loss + b.loss).backward()
    assert quantizer.book.weight.grad.isfinite().all()


REPLACED = ["", " + ema", " + l2", " + affine", " + moving-affine", " + ema + residual"]


@pytest.mark.parametrize("options", REPLACED)
def test_replacement_brings_every_code_to_the_data(options):
    torch.manual_seed(0)
    quantizer = recipe(f"vq + replace{options}", 4, 32, life_span=3).train()
    z = 20 + torch.randn(256, 4)
    for _ in range(8):
        quantizer(z[torch.randperm(256)])
    codes = quantizer.eval().encode(z).reshape(256, -1)
    assert len(codes[:, 0].unique()) > 24


def test_refit_is_kmeans_again():
    torch.manual_seed(0)
    quantizer = recipe("vq + refit", 4, 8, refit=3).train()
    z, tables = 50 + torch.randn(200, 4), []
    for _ in range(5):
        quantizer(z)
        tables.append(quantizer.codebook.detach().clone())
    assert torch.equal(tables[0], tables[2])
    assert (tables[3] - 50).abs().max() < 5
    assert torch.equal(tables[3], tables[4])
    fresh = recipe("vq + refit", 4, 8, refit=3).train()
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    for each in (fresh, quantizer):  # the sixth and the seventh step
        torch.manual_seed(3)
        each(z)
        each(z)
    assert same(state(fresh), state(quantizer)) and not torch.equal(fresh.codebook, tables[4])


UNKNOWN = "unknown quantizer 'vqq'.*known: none, vq, .*; options of vq: l2, ema, replace"


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: VectorQuantizer(4, 4, beta=1.1), ValueError, "beta"),
        (lambda: VectorQuantizer(4, 4, alpha=-1), ValueError, "alpha"),
        (lambda: VectorQuantizer(4, 4, metric="dot"), ValueError, "'dot'"),
        (lambda: VectorQuantizer(4, 4, rule="ste"), TypeError, "rule"),
        (lambda: VectorQuantizer(4, 4, decay=2.0), ValueError, "decay"),
        (lambda: VectorQuantizer(4, 4, life_span=0), ValueError, "life_span"),
        (lambda: VectorQuantizer(4, 4, refit=0), ValueError, "refit"),
        (lambda: VectorQuantizer(4, 4, decay=0.9, alternate=True), ValueError, "alternate and decay"),
        (lambda: NoQuantizer(4, 4).decode(torch.tensor([0])), ValueError, "does not quantize"),
        (lambda: recipe("vqq", 4, 4), ValueError, UNKNOWN),
        (lambda: recipe("vq + l3", 4, 4), ValueError, "unknown option 'l3'.*known"),
        (lambda: recipe("vq + l2 + l2", 4, 4), ValueError, "twice"),
        (lambda: recipe("none + l2", 4, 4), ValueError, "it takes no options"),
        (lambda: recipe("vq + ema + sync", 4, 4), ValueError, "contradict"),
        (lambda: recipe("vq + group + residual", 4, 4), ValueError, "contradict"),
        (lambda: recipe("vq + opt + residual", 4, 4), ValueError, "contradict"),
        (lambda: recipe("vq + group", 5, 4), ValueError, "groups must divide dim=5, got 2"),
        (lambda: recipe("vq", 4, 4, decay=0.9), ValueError, "decay belongs to option 'ema'"),
        (lambda: recipe("vq", 4, 4, levels=3), ValueError, "levels belongs to option 'residual'"),
        (lambda: recipe("vq", 4, 4, colour="red"), ValueError, "colour is no keyword.*alpha"),
        (lambda: recipe(3, 4, 4), TypeError, "such as 'vq"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_options_in_any_order_and_spacing():
    torch.manual_seed(0)
    a = recipe("vq + l2 + residual + replace", 4, 8)
    torch.manual_seed(0)
    b = recipe(" vq+replace +l2+residual", 4, 8)
    z = torch.randn(9, 4)
    assert torch.equal(a(z).z_q, b(z).z_q) and repr(a) == repr(b)


def test_a_given_keyword_wins_over_what_an_option_sets():
    assert recipe("vq + nsvq", 4, 8).alpha == 0
    assert recipe("vq + nsvq", 4, 8, alpha=2.0).alpha == 2


def test_recipes_say_what_they_are():
    assert {"none", "vq", "vq + rotation"} <= set(recipes())
    assert all(isinstance(line, str) and line for line in recipes().values())
