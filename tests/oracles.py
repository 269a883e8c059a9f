"""One registry of quantizers: every recipe and further settings, each with an oracle. Whatever stands here is tested by everything in test_quantizers.

An oracle is `naive(quantizer, z, p) -> (out, codes, loss)`: the method as its paper has it, in float64 and in the plainest way. z and p (by name of
parameter) are leaves, `quantizer` is a copy from before the step, and `out` has the method's value and, as an expression of the leaves, its gradient.
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
PICTURES = (*ROWS, ((5, 2, 3, 3), 7))  # SQ-VAE sums over each picture
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
    return (
        tuple(pair for pair in ROWS if pair[0][1] > 1) if "optvq" in spec or "l2" in spec else ROWS
    )  # on a line, codes tie


def table(spec: str, shapes: tuple | None = None, **given) -> Oracle:
    "A recipe of the quantizers with a table of code vectors, alone or several of them."
    names, inner = (
        words(spec),
        {k: v for k, v in given.items() if k not in ("groups", "levels", "shared", "dropout")},
    )
    soft = bool(
        {"nsvq", "diveq"} & names
        or given.get("dropout")
        or ({"residual", "replace"} <= names and given.get("shared"))
    )
    one = partial(vector, words=names, **inner)
    if "group" in names:
        return of_recipe(
            spec,
            partial(composed.group, inner=one, groups=given.get("groups", 2)),
            EVEN,
            soft,
            **given,
        )
    if "multiscale" in names:
        return of_recipe(spec, partial(composed.multiscale, inner=one), MAPS, soft, **given)
    if "residual" in names:
        return of_recipe(
            spec,
            partial(
                composed.residual, words=names, **{k: v for k, v in given.items() if k != "shared"}
            ),
            shapes_of(spec),
            soft,
            **given,
        )
    return of_recipe(spec, one, shapes or shapes_of(spec), soft, **given)


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
ORACLES = {
    **several(
        {name: both for name, both in categorical.ORACLES.items() if not name.startswith("sq")},
        ROWS,
        lambda name: "soft" in name,
    ),
    **several(
        {name: both for name, both in categorical.ORACLES.items() if name.startswith("sq")},
        PICTURES,
        lambda name: True,
    ),
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
    "gumbel + reinmax": of_recipe("gumbel + reinmax", categorical.gumbel, kl=0.3),
    "gumbel + residual": of_recipe(
        "gumbel + residual", partial(composed.chain, inner=categorical.gumbel, levels=2), levels=2
    ),
    "sq": of_recipe("sq", categorical.sq, PICTURES, soft=True),
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
    **{
        spec
        + "".join(f", {name}={value}" for name, value in given.items() if name != "shapes"): table(
            spec, **given
        )
        for spec, given in VARIANTS
    },
}


def task(v: torch.Tensor) -> torch.Tensor:
    "A loss of what the decoder gets, with a gradient and a curvature of its own at every element."
    a, b = (
        torch.linspace(*ends, v.numel(), dtype=v.dtype, device=v.device).view_as(v)
        for ends in ((-1, 2), (1.5, -0.5))
    )
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
    return float(
        ((torch.zeros_like(b) if a is None else a) - (torch.zeros_like(a) if b is None else b))
        .detach()
        .abs()
        .max()
    )


def errors(oracle: Oracle, shape: tuple, k: int, warm: int) -> dict[str, float]:
    "Largest float64 differences of value, loss, and gradients to z and to each parameter in a training step, `warm` steps after the start."
    torch.manual_seed(sum(shape) + k)
    quantizer = attached(oracle.build(shape[-1], k).double().train())
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(
                0.3 * torch.randn_like(parameter)
            )  # away from zeros and identities, where gradients hide
    for _ in range(warm):
        quantizer(torch.randn(shape, dtype=torch.float64))
    before, leaves = (
        attached(copy.deepcopy(quantizer)),
        {name: v.detach().clone().requires_grad_() for name, v in quantizer.named_parameters()},
    )
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaf = z.detach().clone().requires_grad_()
    torch.manual_seed(1)
    out = quantizer(z)
    (task(out.z_q) + out.loss).backward()
    torch.manual_seed(1)
    value, codes, loss = oracle.naive(before, leaf, leaves)
    (task(value) + loss).backward()
    pairs = {
        "value": (out.z_q, value),
        "loss": (out.loss, loss),
        "z": (z.grad, leaf.grad),
        **{name: (v.grad, leaves[name].grad) for name, v in quantizer.named_parameters()},
    }
    return {name: apart(*pair) for name, pair in pairs.items()} | {
        "codes": float((out.codes != codes).sum())
    }


def checks() -> list[tuple[str, tuple, int, int]]:
    return [
        (name, shape, k, warm)
        for name, oracle in ORACLES.items()
        for shape, k in oracle.shapes
        for warm in (0, 2)
    ]


if __name__ == "__main__":
    worst = {
        check: max(errors(ORACLES[check[0]], *check[1:]).items(), key=lambda item: item[1])
        for check in checks()
    }
    for name in ORACLES:
        print(
            f"{name:45} {max(error for check, (_, error) in worst.items() if check[0] == name):.1e}"
        )
    print(
        f"{len(ORACLES)} quantizers, {len(worst)} checks, worst float64 error {max(error for _, error in worst.values()):.1e}"
    )
