"""A checkpoint goes on only as the run that wrote it; whatever else it is given to says so."""

import math
import types
from functools import partial
import pytest
import torch
from torch import nn
from vqstudy.checkpoint import DamagedCheckpoint, describe, load_checkpoint, save_checkpoint
from vqstudy.estimators import estimate, exact, hessian
from vqstudy.models import Autoencoder, Classifier, classification_loss, reconstruction_loss
from vqstudy.quantizers import recipe, recipes
from vqstudy.train import NonFiniteLoss, Settings, fit, identity, optimizers, reproducible
from vqstudy.train import schedule


def random_images(n=16, seed=3, labels=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return types.SimpleNamespace(x=x, y=labels)


def autoencoder(spec="vq", **options):
    torch.manual_seed(0)
    return Autoencoder(recipe(spec, 8, 32, channel_dim=1, **options), channels=8)


def run(path, model=None, loss=reconstruction_loss, data=None, epochs=1):
    model = model or autoencoder()
    settings = Settings(epochs=epochs, batch_size=8)
    data = data or random_images()
    return fit(model, loss, data, settings, checkpoint=path, progress=False)


def weighted(weight, model, x, y):
    loss, parts = reconstruction_loss(model, x, y)
    return weight * loss, parts


def closed_over(weight):
    def loss(model, x, y):
        return weighted(weight, model, x, y)

    return loss


class Frozen(Autoencoder):
    pass


def with_dropout(p):
    model = autoencoder()
    model.decoder.append(nn.Dropout(p))
    return model


def frozen():
    model = autoencoder()
    model.encoder[0].weight.requires_grad_(False)
    return model


MODELS = {
    "the rule": ("vq", "vq + rotation", "model.quantizer.rule is _rotation"),
    "the rule's options": ("vq + sync", {"spec": "vq + sync", "nu": 0.5}, "nu=0.5.* and was .*nu=0.2"),
    "the decoder's rule": ("vq + exact", "vq + hessian", "rule is 'hessian' and was 'exact'"),
    "a perturbation": ("vq + nsvq", "vq + diveq", "perturb is _directional_noise"),
    "a weight": ("vq", {"spec": "vq", "alpha": 2.0}, "quantizer.alpha is 2.0 and was 1.25"),
    "the metric": ("vq", {"spec": "vq", "metric": "cosine"}, "metric is 'cosine' and was 'euclid"),
    "upkeep": ("vq + replace", {"spec": "vq + replace", "life_span": 3}, "life_span is 3 and was 20"),
    "temperatures": ("stochastic", {"spec": "stochastic", "temperature": 2.0}, "limits is tuple.2.0"),
    "alternation": ("vq", "vq + alt", "alternate is True and was False"),
    "transport": ("optvq", {"spec": "optvq", "epsilon": 0.2}, "epsilon is 0.2 and was 0.1"),
    "levels": ("fsq", {"spec": "fsq", "levels": (4, 8)}, "levels is tuple.4, 8. and was tuple.8, 4"),
    "gumbel": ("gumbel", "gumbel + reinmax", "estimator is 'reinmax' and was 'gumbel'"),
    "the router's gate": ("router", "router + switch", "gate is 'switch' and was 'dense'"),
    "the class": ("vq", lambda: Frozen(autoencoder().quantizer, channels=8), "model is Frozen and"),
    "dropout": (partial(with_dropout, 0.1), partial(with_dropout, 0.2), "Dropout.p=0.2"),
    "what is frozen": ("vq", frozen, "encoder.0.weight is .*, frozen and was"),
}


def made(how):
    if callable(how):
        return how()
    return autoencoder(how) if isinstance(how, str) else autoencoder(**how)


@pytest.mark.parametrize("what", MODELS)
def test_another_model_is_refused(what, tmp_path):
    first, second, words = MODELS[what]
    path = tmp_path / "run.pt"
    run(path, made(first))
    model = made(second)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"run.pt is of another run: .*{words}"):
        run(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    run(path, made(first))  # the run's own goes on


def test_all_recipes_are_told_apart():
    data = random_images()
    seen = {}
    for spec in recipes():
        words = str(identity(autoencoder(spec), reconstruction_loss, data.x, data.y))
        assert words not in seen, f"{spec} is taken for {seen[words]}"
        seen[words] = spec
        assert words == str(identity(autoencoder(spec), reconstruction_loss, data.x, data.y))
        assert " at 0x" not in words


DATA = {
    "other images": random_images(seed=4),
    "more images": random_images(n=32),
    "labels": random_images(labels=torch.arange(16) % 2),
}


@pytest.mark.parametrize("what", DATA)
def test_other_data_is_refused(what, tmp_path):
    run(tmp_path / "run.pt")
    name = "data.y" if what == "labels" else "data.x"
    with pytest.raises(ValueError, match=rf"run.pt is of another run: {name} is \("):
        run(tmp_path / "run.pt", data=DATA[what])


def test_one_pixel_is_enough(tmp_path):
    run(tmp_path / "run.pt")
    data = random_images()
    data.x[7, 1, 5, 5] ^= 1
    with pytest.raises(ValueError, match="data.x is .* and was "):
        run(tmp_path / "run.pt", data=data)


LOSSES = {
    "a function": (reconstruction_loss, partial(weighted, 1.0)),
    "an argument": (partial(weighted, 1.0), partial(weighted, 2.0)),
    "a closure": (closed_over(1.0), closed_over(2.0)),
    "code": (
        lambda m, x, y: reconstruction_loss(m, x, y),
        lambda m, x, y: (2 * reconstruction_loss(m, x, y)[0], {}),
    ),
}


@pytest.mark.parametrize("what", LOSSES)
def test_another_loss_is_refused(what, tmp_path):
    first, second = LOSSES[what]
    run(tmp_path / "run.pt", loss=first)
    with pytest.raises(ValueError, match="run.pt is of another run: loss_fn is .* and was "):
        run(tmp_path / "run.pt", loss=second)


def test_a_model_that_was_trained_may_go_on(tmp_path):
    "Decoder, inner step and begun codebooks that a first call leaves behind are no difference."
    for spec in ("vq + exact", "vq + alt", "vq + refit"):
        model = autoencoder(spec, init="kmeans")
        path = tmp_path / f"{spec}.pt"
        history = run(path, model).history
        assert run(path, model).history == history


def test_descriptions_are_the_same_in_every_process():
    assert describe({"b", "a"}) == "set('a', 'b')"
    assert describe(partial(weighted, 0.5)).endswith("with 0=0.5")
    assert describe(object()) == "object"
    assert describe([[[[[[0]]]]]]) == "list(list(list(list(list))))"
    wide = torch.zeros(1, 4).expand(5, 4)
    assert describe(wide) == describe(wide.contiguous()) != describe(wide + 1)
    assert describe(torch.tensor(1.0)).startswith("() float32")
    assert describe(torch.zeros(2, 0)) != describe(torch.zeros(0, 2))


def described(model):
    return identity(model, calm, random_images().x, None)


def test_what_holds_itself_is_described():
    model = Fragile()  # not one of torch's, whose attributes are not walked
    model.helper = types.SimpleNamespace(model=model, functions=[], torch=torch)
    model.helper.functions.append(lambda: model)
    assert described(model) == described(model)


def test_a_classifier_is_described():
    one, two = (Classifier(recipe("vq", 128, 4, channel_dim=1), n) for n in (3, 4))
    assert described(one) == described(one) != described(two)


def test_an_older_version_did_not_say(tmp_path):
    path = tmp_path / "run.pt"
    run(path)
    state = load_checkpoint(path)
    del state["identity"]
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match="run.pt does not say of which model.*older version"):
        run(path)


# ---- damaged files ----


def cut(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def without(path, key):
    state = load_checkpoint(path)
    del state[key]
    save_checkpoint(path, state)


def lost_moment(path):
    state = load_checkpoint(path)
    del state["model"]["encoder.0.bias"]
    save_checkpoint(path, state)


DAMAGE = {
    "empty": lambda path: cut(path, 0.0),
    "half": lambda path: cut(path, 0.5),
    "last bytes": lambda path: cut(path, 0.99),
    "text": lambda path: path.write_text("hello"),
    "a tensor": lambda path: torch.save(torch.zeros(2), path),
    "weights alone": lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
    "a module": lambda path: torch.save(nn.Linear(2, 2), path),
    "no step": lambda path: without(path, "step"),
    "no random state": lambda path: without(path, "random"),
    "no pending": lambda path: without(path, "pending"),
    "settings": lambda path: save_checkpoint(path, load_checkpoint(path) | {"settings": 3}),
    "optimizers": lambda path: save_checkpoint(path, load_checkpoint(path) | {"optimizers": {}}),
    "a tensor less": lost_moment,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named(what, tmp_path):
    path = tmp_path / "run.pt"
    run(path)
    DAMAGE[what](path)
    words = "run.pt is not a checkpoint, or a damaged one: .*Remove it to begin again"
    with pytest.raises(DamagedCheckpoint, match=f"(?s){words}"):
        run(path)


# ---- what has diverged ----


class Fragile(nn.Module):
    "Its quantizer refuses what is not finite, so the loss is never reached."

    def __init__(self, spec="vq", **options):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.quantizer = recipe(spec, 3, 4, channel_dim=1, **options)

    def forward(self, x):
        return self.quantizer(x * self.scale)


def steep(model, x, y):
    "The gradient at the first step is infinite, or NaN; the loss is finite."
    return model(x).loss + (0 * model.scale).sqrt(), {}


def calm(model, x, y):
    return model(x).loss, {}


def huge(model, x, y):
    loss = model(x).loss.detach() + 0 * model.scale
    model.scale.data.fill_(3e38)
    return loss, {}


@pytest.mark.parametrize("spec", ["vq", "vq + ema", "vq + alt", "stochastic", "vq + group", "fsq"])
def test_weights_that_became_nan_are_divergence(spec):
    torch.manual_seed(0)
    options = {"groups": 3} if "group" in spec else {}
    settings = Settings(epochs=3, batch_size=8)
    words = "scale was not finite after step 1 .*checkpoint: none"
    with pytest.raises(NonFiniteLoss, match=words) as e:
        fit(Fragile(spec, **options), steep, random_images(), settings, progress=False)
    cause = e.value.__cause__
    assert isinstance(cause, ValueError) and "z must be finite" in str(cause)


@pytest.mark.parametrize("inner", [1, 2])
def test_an_inner_step_on_what_is_not_finite_is_divergence(inner):
    settings = Settings(epochs=3, batch_size=8, inner=inner, fused=False)
    with pytest.raises(NonFiniteLoss, match="scale was not finite after step 1") as e:
        fit(Fragile("vq + alt"), steep, random_images(), settings, progress=False)
    assert isinstance(e.value.__cause__, ValueError)


def test_activations_that_overflow_are_divergence():
    "The weight is finite, and so large that what it makes of an image is not."

    class Squared(Fragile):
        def forward(self, x):
            return self.quantizer(x * self.scale * self.scale)

    settings = Settings(epochs=3, batch_size=8, lr=0.0, weight_decay=0.0)
    with pytest.raises(NonFiniteLoss, match="z must be finite.* after step 1 of 6.*: none") as e:
        fit(Squared(), huge, random_images(), settings, progress=False)
    assert isinstance(e.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError])
def test_errors_of_a_healthy_model_stay_what_they_are(kind):
    def breaks(model, x, y):
        raise kind("my own")

    with pytest.raises(kind, match="my own"):
        fit(Fragile(), breaks, random_images(), Settings(batch_size=8), progress=False)


def test_evaluation_may_find_it_too():
    def evaluate(model):
        return {"loss": float(model(torch.full((1, 3, 2, 2), math.inf)).loss)}

    settings = Settings(epochs=1, batch_size=8)
    with pytest.raises(NonFiniteLoss, match="z must be finite"):
        fit(Fragile(), calm, random_images(), settings, evaluate=evaluate, progress=False)


# ---- arguments ----


def data_of(x=None, y=None):
    return types.SimpleNamespace(x=random_images().x if x is None else x, y=y)


class Ten(Fragile):
    num_classes = 10


WRONG = {
    "floats": ({"data": data_of(torch.rand(16, 3, 4, 4))}, TypeError, "data.x .*uint8.*float32"),
    "an array": ({"data": data_of([1, 2])}, TypeError, "data.x .*uint8.*got list"),
    "no data": ({"data": torch.zeros(2)}, TypeError, "data must have x and y .*got a Tensor"),
    "gray": ({"data": data_of(random_images().x[:, :1])}, ValueError, r"data.x .*\(16, 1, 32, 32\)"),
    "flat": ({"data": data_of(random_images().x[0])}, ValueError, r"data.x .*\(3, 32, 32\)"),
    "empty": ({"data": data_of(random_images().x[:0])}, ValueError, r"data.x .*\(0, 3, 32, 32\)"),
    "few": ({"data": random_images(7)}, ValueError, "batch_size must be at most the set's size 7"),
    "fewer labels": ({"data": data_of(y=torch.zeros(15).long())}, ValueError, r"\(16,\).*\(15,\)"),
    "labels 2d": ({"data": data_of(y=torch.zeros(16, 1).long())}, ValueError, r"data.y .*\(16, 1\)"),
    "label dtype": ({"data": data_of(y=torch.zeros(16))}, TypeError, "data.y .*int64.*float32"),
    "label list": ({"data": data_of(y=[0] * 16)}, TypeError, "data.y .*int64.*list"),
    "negative": ({"data": data_of(y=torch.arange(16) - 1)}, ValueError, "at least 0, .*-1..14"),
    "labels above": (
        {"data": data_of(y=torch.arange(16)), "model": Ten()},
        ValueError,
        "below the model's 10 classes, got labels in 0..15",
    ),
    "model": ({"model": steep}, TypeError, "model must be a torch.nn.Module"),
    "no parameter": ({"model": nn.ReLU()}, ValueError, "model must have a parameter that learns"),
    "loss": ({"loss_fn": None}, TypeError, "loss_fn must be a function, got None"),
    "evaluate": ({"evaluate": {}}, TypeError, "evaluate must be a function or None, got {}"),
    "monitor": ({"monitor": 3}, TypeError, "monitor must be a function or None, got 3"),
    "settings": ({"settings": {"epochs": 3}}, TypeError, "settings must be a Settings, got"),
    "save_every": ({"save_every": -1.0}, ValueError, "save_every must be .* at least 0, got -1"),
    "save_every nan": ({"save_every": math.nan}, ValueError, "save_every .*got nan"),
    "save_every str": ({"save_every": "60"}, TypeError, "save_every must be a number"),
    "deadline": ({"deadline": math.nan}, ValueError, "deadline must be a finite number, got nan"),
    "deadline str": ({"deadline": "noon"}, TypeError, "deadline must be a number, got 'noon'"),
    "checkpoint": ({"checkpoint": 3}, TypeError, "checkpoint must be a path or None, got 3"),
    "device": ({"device": "gpu"}, ValueError, "device must be .*got 'gpu'"),
    "device type": ({"device": 0}, TypeError, "device must be a torch.device or its name, got 0"),
    "progress": ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named_before_anything_changes(what):
    wrong, kind, words = WRONG[what]
    model = wrong.get("model", Fragile())
    given = {"model": model, "loss_fn": calm, "data": random_images()}
    given |= {"settings": Settings(batch_size=8), "progress": False} | wrong
    if isinstance(model, nn.Module):
        model.eval()
    with pytest.raises(kind, match=words):
        fit(**given)
    assert not getattr(model, "training", False)


def test_a_checkpoint_is_a_file_in_a_folder(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be a file, got the folder"):
        run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint must lie in a folder, .*file is a file"):
        run(tmp_path / "file" / "run.pt")


def test_a_classifier_says_how_many_classes_it_has():
    model = Classifier(recipe("vq", 128, 4, channel_dim=1), 3)
    data = random_images(labels=torch.arange(16))
    with pytest.raises(ValueError, match="below the model's 3 classes, got labels in 0..15"):
        fit(model, classification_loss, data, Settings(batch_size=8))


ANSWERS = {
    "no pair": (lambda m, x, y: m(x).loss, TypeError, r"must return \(loss, parts\).*Tensor"),
    "nothing": (lambda m, x, y: None, TypeError, r"must return \(loss, parts\).*NoneType"),
    "a float": (lambda m, x, y: (0.5, {}), TypeError, "the loss of loss_fn must be a torch.Tensor"),
    "a vector": (lambda m, x, y: (m(x).z_q, {}), ValueError, "must be a scalar, got shape"),
    "no gradient": (lambda m, x, y: (m(x).loss.detach(), {}), ValueError, "must have a gradient"),
    "parts": (lambda m, x, y: (m(x).loss, None), TypeError, "the parts of loss_fn must be a dict"),
    "a part": (lambda m, x, y: (m(x).loss, {"a": 1.0}), TypeError, "part 'a' of loss_fn must be"),
    "its name": (lambda m, x, y: (m(x).loss, {"loss": m(x).loss}), ValueError, "called 'loss'"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_what_a_loss_returns_is_checked(what):
    loss, kind, words = ANSWERS[what]
    with pytest.raises(kind, match=words):
        fit(Fragile(), loss, random_images(), Settings(batch_size=8), progress=False)


def test_what_callbacks_return_is_checked():
    settings = Settings(epochs=1, batch_size=8)
    with pytest.raises(TypeError, match="result of evaluate must be a dict of numbers, got None"):
        fit(Fragile(), calm, random_images(), settings, evaluate=lambda m: None, progress=False)
    with pytest.raises(TypeError, match=r"monitor must return \(row, seconds\) or None, got 3"):
        fit(Fragile(), calm, random_images(), settings, monitor=lambda m, s: 3, progress=False)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: reproducible(-1), ValueError, "seed must be at least 0, got -1"),
        (lambda: reproducible(2**32), ValueError, "seed must be at most 4294967295"),
        (lambda: reproducible(0.5), TypeError, "seed must be an int, got 0.5"),
        (lambda: reproducible(0, threads=0), ValueError, "threads must be at least 1, got 0"),
        (lambda: reproducible(0, threads="2"), TypeError, "threads must be an int, got '2'"),
        (lambda: schedule(-1, 9), ValueError, "step must be at least 0, got -1"),
        (lambda: schedule(10, 9), ValueError, "step must be at most 9, got 10"),
        (lambda: schedule(0, 0), ValueError, "total must be at least 1, got 0"),
        (lambda: schedule(0, 9, 1.0), ValueError, "warmup must be .* below 1, got 1.0"),
        (lambda: schedule(0, 9, then="linear"), ValueError, "then must be 'cosine' or 'constant'"),
        (lambda: optimizers(3, Settings()), TypeError, "model must be a torch.nn.Module, got 3"),
        (lambda: optimizers(nn.ReLU(), {}), TypeError, "s must be a Settings, got {}"),
    ],
)
def test_wrong_arguments_of_the_parts_are_named(call, kind, words):
    state = torch.get_rng_state()
    with pytest.raises(kind, match=words):
        call()
    assert torch.equal(torch.get_rng_state(), state)


# ---- the decoder inside backward, under autocast ----


def encoder_gradient(spec, autocast, **options):
    "The encoder's first gradient in `fit`, and the dtypes of what the decoder's layers gave."
    torch.manual_seed(0)
    model = autoencoder(spec, **options)
    kept, dtypes = {}, []
    model.encoder[0].weight.register_hook(lambda g: kept.setdefault("g", g.clone()))
    model.decoder[-2].register_forward_hook(lambda layer, args, out: dtypes.append(out.dtype))
    settings = Settings(epochs=1, batch_size=16, autocast=autocast)
    fit(model, reconstruction_loss, random_images(), settings, progress=False)
    return kept["g"], dtypes


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", ["exact", "hessian", "residual + exact", "residual + hessian",
                                  "l2 + exact", "ema + hessian", "alt + exact"])
def test_rules_that_ask_the_decoder_see_the_autocast_of_the_forward(spec, autocast):
    spec = f"vq + {spec}"
    if autocast == "float16" and ("alt" in spec or "hessian" in spec):
        with pytest.raises(ValueError, match="autocast float16 cannot be used with"):
            encoder_gradient(spec, autocast)
        return
    plain, dtypes = encoder_gradient(spec, None)
    assert set(dtypes) == {torch.float32} and len(dtypes) == 2
    lowered, dtypes = encoder_gradient(spec, autocast)
    assert set(dtypes) == {getattr(torch, autocast)} and len(dtypes) == 2
    if autocast == "float16":
        lowered = lowered / 2**16  # the scaler's
    cosine = torch.nn.functional.cosine_similarity(plain.flatten(), lowered.flatten(), dim=0)
    assert cosine > 0.9 and lowered.norm() == pytest.approx(float(plain.norm()), rel=0.2)


@pytest.mark.parametrize("rule", [exact, hessian])
@pytest.mark.parametrize("inside", [True, False])
def test_estimate_keeps_the_autocast_for_backward(rule, inside):
    layer = nn.Linear(4, 4)
    dtypes = []

    def loss_at(v):
        answer = layer(v)
        dtypes.append(answer.dtype)
        return answer.float().pow(2).sum()

    made = rule(loss_at)
    z = torch.randn(8, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        q = estimate(z, z.detach().round(), made)
    q.sum().backward()
    assert dtypes == [torch.bfloat16 if inside else torch.float32]


# without layers whose backward is torch's own
OWN_BACKWARD = ["vq + rotation", "vq + reflection", "vq + sync", "router", "router + switch",
                "router + tied", "vq + residual"]


@pytest.mark.parametrize("spec", OWN_BACKWARD)
def test_backward_inside_autocast_is_backward_outside(spec):
    "What a quantizer computes in backward is computed in float32, as its forward pass."
    grads = []
    for inside in (True, False):
        torch.manual_seed(0)
        q = recipe(spec, 8, 16)
        z = torch.randn(64, 8, requires_grad=True)
        quantized = q(z)
        loss = (quantized.z_q * torch.randn(64, 8)).sum() + quantized.loss
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        grads.append([z.grad, *(p.grad for p in q.parameters() if p.grad is not None)])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
