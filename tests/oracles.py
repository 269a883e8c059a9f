"""One registry of quantizers: every recipe and further settings, each with an oracle.

Whatever stands here is tested by everything in test_quantizers. An oracle is

    naive(quantizer, z, p) -> (value, codes, loss)

the method as its paper has it, in float64 and in the plainest way. z and p (by name of parameter)
are leaves, `quantizer` is a copy from before the step, and `value`, what the decoder gets, has as
an expression of the leaves the method's gradient.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import torch
import oracles_categorical as categorical
import oracles_composed as composed
import oracles_lattice as lattice
from oracles_vector import vector
from vqstudy.quantizers import Quantizer, ResidualQuantizer, recipe

ROWS = (((1, 2), 1), ((5, 1), 3), ((30, 3), 7), ((64, 16), 33))  # shape of z, number of codes
EVEN = (((1, 2), 1), ((30, 4), 7), ((64, 16), 33))  # of an even width, for two groups
POWERS = (((1, 2), 4), ((30, 3), 16), ((30, 3), 8), ((64, 16), 64))
IMAGES = (*ROWS, ((5, 2, 3, 3), 7))  # SQ-VAE sums over each image
MAPS = (((1, 2, 2, 2), 1), ((2, 4, 6, 3), 7), ((3, 8, 2, 16), 16))


@dataclass(frozen=True)
class Oracle:
    build: Callable[[int, int], Quantizer]
    naive: Callable
    shapes: tuple = ROWS
    soft: bool = False  # in training the decoder gets a mixture of codes, or a perturbed one


def words(spec: str) -> set[str]:
    return {word.strip() for word in spec.split("+")}


def of_recipe(
    spec: str, naive: Callable, shapes: tuple = ROWS, soft: bool = False, **given
) -> Oracle:
    "The recipe with these keywords."
    return Oracle(partial(recipe, spec, **given), naive, shapes, soft)


def shapes_of(spec: str) -> tuple:
    "The shapes of rows; on a line, codes tie where lengths or a plan decide."
    if "optvq" in spec or "l2" in spec:
        return tuple(pair for pair in ROWS if pair[0][1] > 1)
    return ROWS


# keywords of what is made of other quantizers
AROUND = ("groups", "levels", "shared", "dropout", "deferred_steps")


def table(spec: str, shapes: tuple | None = None, **given) -> Oracle:
    "A recipe of the quantizers with a table of code vectors, alone or several of them."
    names = words(spec)
    one = partial(vector, words=names, **{k: v for k, v in given.items() if k not in AROUND})
    if "deferred" in names:
        naive = partial(composed.deferred, inner=one)
        return of_recipe(spec, naive, shapes_of(spec), True, **given)
    if "group" in names:
        naive = partial(composed.group, inner=one, groups=given.get("groups", 2))
        return of_recipe(spec, naive, EVEN, perturbed(names), **given)
    if "multiscale" in names:
        naive = partial(composed.multiscale, inner=one)
        return of_recipe(spec, naive, MAPS, perturbed(names), **given)
    if "residual" in names:
        kept = {k: v for k, v in given.items() if k != "shared"}
        naive = partial(composed.residual, words=names, **kept)
        # codes of a shared codebook may be replaced between two levels
        soft = given.get("dropout") or ("replace" in names and given.get("shared"))
        return of_recipe(spec, naive, shapes_of(spec), bool(soft or perturbed(names)), **given)
    return of_recipe(spec, one, shapes or shapes_of(spec), perturbed(names), **given)


def perturbed(names: set[str]) -> bool:
    return bool({"nsvq", "diveq"} & names)


def none(quantizer, z, p):
    return z, torch.zeros(len(z), dtype=torch.int64), torch.zeros((), dtype=z.dtype)


def several(
    build_naive: dict, shapes: tuple, soft: Callable[[str], bool] = lambda name: False
) -> dict[str, Oracle]:
    return {
        name: Oracle(build, naive, shapes, soft(name))
        for name, (build, naive) in build_naive.items()
    }


TABLES = [
    "vq",
    "vq + l2",
    "vq + replace",
    "vq + l2 + replace",
    "vq + ema",
    "vq + ema + replace",
    "vq + rotation",
    "vq + rotation + ema",
    "vq + rotation + ema + replace",
    "vq + sync",
    "vq + reflection",
    "vq + affine",
    "vq + moving-affine",
    "vq + alt",
    "vq + opt",
    "vq + affine + opt",
    "vq + affine + opt + replace",
    "vq + affine + opt + replace + l2",
    "vq + refit",
    "vq + diversity",
    "vq + exact",
    "vq + hessian",
    "vq + nsvq",
    "vq + diveq",
    "stochastic",
    "simvq",
    "optvq",
    "vq + group",
    "vq + residual",
    "vq + ema + residual",
    "vq + multiscale",
    "vq + deferred",
]
VARIANTS = [  # further settings of them; life_span 1: codes come back to life within the tested step
    ("vq", dict(alpha=5.0, beta=0.9)),
    ("vq", dict(metric="cosine")),
    ("vq", dict(alpha=5.0, beta=1.0)),
    ("vq + replace", dict(life_span=1)),
    ("vq + l2 + replace", dict(life_span=1)),
    ("vq + affine", dict(affine_lr=3.0, max_norm=0.5)),
    ("vq + affine + replace", dict(life_span=1)),
    ("vq + affine + l2", {}),
    ("vq + affine", dict(affine_groups=2, shapes=(((5, 2), 4), ((30, 3), 8), ((64, 16), 34)))),
    ("vq + moving-affine", dict(of="chosen", momentum=0.3)),
    ("vq + moving-affine + l2", dict(of="chosen")),
    ("vq + moving-affine + replace", dict(life_span=1)),
    ("vq + l2 + rotation", {}),
    ("vq + l2 + ema + replace", dict(life_span=1)),
    ("vq + rotation", dict(scale="unit")),
    ("vq + rotation", dict(scale="distance")),
    ("vq + rotation", dict(project=True)),
    ("vq + rotation", dict(scale="unit", project=True)),
    ("vq + reflection", dict(scale="unit")),
    ("vq + reflection + ema", dict(scale="distance")),
    ("vq + sync", dict(nu=1.5)),
    ("vq + sync + l2", dict(nu=0.7, alpha=5.0)),
    ("vq + alt", dict(commit_encoder=False)),
    ("vq + opt", dict(nu=0.5, alpha=5.0, beta=0.995)),
    ("vq + affine + sync + alt + replace + l2", dict(life_span=1)),
    ("vq + exact + l2", {}),
    ("vq + hessian + l2", {}),
    ("vq + diversity", dict(diversity=2.0, diversity_temperature=0.3)),
    ("vq + diversity + l2", dict(diversity=1.0)),
    ("vq + ema + diversity", {}),
    ("vq + rotation + replace + diversity", dict(life_span=1)),
    ("vq + affine + opt + diversity", dict(diversity=0.5)),
    ("stochastic + diversity", dict(temperature=0.2)),
    ("simvq + diversity", dict(diversity=0.5)),
    ("optvq + diversity", {}),
    ("vq + diversity + group", {}),
    ("vq + diversity + residual", dict(levels=3)),
    ("vq + deferred", dict(deferred_steps=1, init="normal")),
    ("vq + deferred", dict(deferred_steps=1)),
    ("vq + rotation + ema + replace + deferred", dict(deferred_steps=1)),
    ("vq + l2 + diversity + deferred", dict(deferred_steps=1, init="normal")),
    ("simvq + deferred", dict(deferred_steps=1)),
    ("vq + nsvq", dict(alpha=1.0)),
    ("vq + diveq + l2", dict(variance=0.1)),
    ("stochastic", dict(temperature=0.2)),
    ("stochastic + rotation + replace", dict(life_span=1)),
    ("stochastic + ema", {}),
    ("simvq + rotation", {}),
    ("simvq + l2 + sync", dict(alpha=5.0)),
    ("optvq + replace", dict(life_span=1)),
    ("optvq + ema + rotation", dict(epsilon=0.5, iterations=20)),
    ("vq + group", dict(shared=True)),
    ("vq + rotation + ema + group", {}),
    ("vq + sync + group", dict(shared=True)),
    ("vq + affine + replace + group", dict(life_span=1)),
    ("vq + residual", dict(shared=True, levels=3)),
    ("vq + rotation + ema + replace + residual", {}),
    ("vq + affine + residual", {}),
    ("vq + l2 + residual", dict(alpha=5.0)),
    ("vq + residual", dict(dropout=True)),
    ("vq + sync + residual", dict(dropout=True, shared=True, levels=5)),
    ("vq + replace + residual", dict(shared=True, levels=2)),
    ("vq + nsvq + residual", {}),
    ("vq + exact + residual", {}),
    ("vq + hessian + residual", {}),
    ("simvq + residual", {}),
    ("stochastic + residual", dict(levels=2)),
    ("optvq + residual", dict(levels=2)),
    ("vq + rotation + ema + multiscale", {}),
    ("vq + sync + multiscale", {}),
]
def setting(spec: str, given: dict) -> str:
    "The name of a recipe with these keywords."
    shown = [f"{name}={value}" for name, value in given.items() if name != "shapes"]
    return ", ".join([spec, *shown])


ROUTED = [name for name in categorical.ORACLES if not name.startswith("sq")]
ANNEALED = [name for name in categorical.ORACLES if name.startswith("sq")]
ORACLES = {
    **several({n: categorical.ORACLES[n] for n in ROUTED}, ROWS, lambda name: "soft" in name),
    **several({n: categorical.ORACLES[n] for n in ANNEALED}, IMAGES, lambda name: True),
    **several(lattice.ORACLES, POWERS),
    **several(composed.ROWS, EVEN),
    **several(composed.MAPS, MAPS),
    "residual of fsq": Oracle(
        composed.of(ResidualQuantizer, "fsq", levels=2),
        partial(composed.chain, inner=lattice.fsq, levels=2),
        POWERS,
    ),
    "none": of_recipe("none", none),
    "gumbel": of_recipe("gumbel", categorical.gumbel, kl=0.3),
    "router + deferred": of_recipe(
        "router + deferred", partial(composed.deferred, inner=categorical.router), soft=True,
        deferred_steps=1,
    ),
    "fsq + deferred": of_recipe(
        "fsq + deferred", partial(composed.deferred, inner=lattice.fsq), POWERS, True,
        deferred_steps=1,
    ),
    "gumbel + reinmax": of_recipe("gumbel + reinmax", categorical.gumbel, kl=0.3),
    "gumbel + residual": of_recipe(
        "gumbel + residual", partial(composed.chain, inner=categorical.gumbel, levels=2), levels=2
    ),
    "sq": of_recipe("sq", categorical.sq, IMAGES, soft=True),
    "router": of_recipe("router", categorical.router),
    "router + tied": of_recipe(
        "router + tied", categorical.router, bias=True, entropy=0.1, entropy_temperature=0.5
    ),
    "router + switch": of_recipe("router + switch", categorical.router),
    "router + group": of_recipe(
        "router + group", partial(composed.group, inner=categorical.router), EVEN
    ),
    "router + residual": of_recipe(
        "router + residual", partial(composed.chain, inner=categorical.router, levels=3), levels=3
    ),
    "fsq": of_recipe("fsq", lattice.fsq, POWERS),
    "lfq": of_recipe("lfq", lattice.signs, POWERS),
    "bsq": of_recipe("bsq", partial(lattice.signs, spherical=True), POWERS),
    **{spec: table(spec) for spec in TABLES},
    **{setting(spec, given): table(spec, **given) for spec, given in VARIANTS},
}


def task(v: torch.Tensor) -> torch.Tensor:
    "A loss of the decoder's input, with a gradient and a curvature of its own at every element."
    ends = ((-1, 2), (1.5, -0.5))
    a, b = (torch.linspace(*e, v.numel(), dtype=v.dtype, device=v.device).view_as(v) for e in ends)
    return (a * v + b * v * v / 2).sum()


def attached(quantizer: Quantizer) -> Quantizer:
    "With the task's loss, where the rule asks for it."
    if hasattr(quantizer, "attach"):
        quantizer.attach(task)
    return quantizer


def apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    "The largest difference, where no gradient is a gradient of 0."
    if a is None and b is None:
        return 0.0
    a, b = (torch.zeros_like(other) if t is None else t for t, other in ((a, b), (b, a)))
    return float((a - b).detach().abs().max())


def warmed(oracle: Oracle, shape: tuple, k: int, warm: int) -> Quantizer:
    "The quantizer in float64, away from its start, after `warm` training steps."
    quantizer = attached(oracle.build(shape[-1], k).double().train())
    with torch.no_grad():
        for parameter in quantizer.parameters():
            # away from zeros and identities, where gradients hide
            parameter.add_(0.3 * torch.randn_like(parameter))
    for _ in range(warm):
        quantizer(torch.randn(shape, dtype=torch.float64))
    quantizer.state_dict()  # applies what the last step has gathered
    return quantizer


def errors(oracle: Oracle, shape: tuple, k: int, warm: int) -> dict[str, float]:
    "Largest differences of value, loss, codes, and gradients to z and to each parameter."
    torch.manual_seed(sum(shape) + k)
    quantizer = warmed(oracle, shape, k, warm)
    before = attached(copy.deepcopy(quantizer))
    parameters = dict(quantizer.named_parameters())
    leaves = {name: v.detach().clone().requires_grad_() for name, v in parameters.items()}
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaf = z.detach().clone().requires_grad_()
    torch.manual_seed(1)
    z_q, codes, loss = quantizer(z)
    (task(z_q) + loss).backward()
    torch.manual_seed(1)
    value, their_codes, their_loss = oracle.naive(before, leaf, leaves)
    (task(value) + their_loss).backward()
    return {
        "value": apart(z_q, value),
        "loss": apart(loss, their_loss),
        "codes": float((codes != their_codes).sum()),
        "z": apart(z.grad, leaf.grad),
        **{name: apart(v.grad, leaves[name].grad) for name, v in parameters.items()},
    }


def settings(name: str) -> list[tuple[tuple, int, int]]:
    "Shapes of z, numbers of codes and of steps before, at which a quantizer is checked."
    return [(shape, k, warm) for shape, k in ORACLES[name].shapes for warm in (0, 2)]


if __name__ == "__main__":
    worst = {}
    for name, oracle in ORACLES.items():
        found = [max(errors(oracle, *setting).values()) for setting in settings(name)]
        worst[name] = max(found)
        print(f"{name:45} {worst[name]:.1e}")
    print(f"{len(worst)} quantizers, worst float64 error {max(worst.values()):.1e}")
