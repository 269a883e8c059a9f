"""Agreement of what has a table: its losses, its maps, alternation, moving averages, gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
import torch
from torch import Tensor, nn
import oracles_authors as authors
from beside import COLUMNS, D, K, N, Row, beside, larger, of_recipe, sample, table_of, worst
from oracles_authors import ROSINALITY, ROTATION, SONNET, TAMING, VQTORCH, ZALANDO
from vqstudy.estimators import reflection, rotation
from vqstudy.quantizers import recipe
from vqstudy.vector import VectorQuantizer

# ---- a table and its losses ----


def mapped(z: Tensor, p: dict[str, Tensor], lr: float) -> tuple[Tensor, Tensor]:
    parts = p["book.map.scale"], p["book.map.shift"]
    return authors.vqtorch(z, authors.vqtorch_affine(table_of(p), *parts, lr))


def learned_affine() -> dict[str, float]:
    "Away from the identity, where gradients hide."
    quantizer = recipe("vq + affine", D, K, alpha=1.0, beta=0.95, affine_lr=2.0, affine_groups=2)
    for parameter in quantizer.book.map.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return beside(quantizer, partial(mapped, lr=2.0))


def moving_affine(eps: float) -> dict[str, float]:
    "Over three steps, of data that move."
    quantizer = recipe("vq + moving-affine", D, K, alpha=1.0, beta=0.95)
    running, found = None, []

    def theirs(z, p):
        nonlocal running
        table, running = authors.vqtorch_moments(table_of(p), z, running, eps=eps)
        return authors.vqtorch(z, table)

    for i in range(3):
        quantizer.zero_grad()
        found.append(beside(quantizer, theirs, (1 + i) * sample() + i))
    return worst(found)


def on_the_sphere() -> dict[str, float]:
    quantizer = recipe("vq + l2", D, K, alpha=1.0, beta=0.95).double()
    quantizer.set_codebook(quantizer.codebook.detach())  # normalised before the step, as theirs
    return beside(quantizer, lambda z, p: authors.vqtorch_l2(z, table_of(p)))


LOSSES = [
    of_recipe(
        "VQ-VAE, losses as taming has them",
        f"{TAMING}, `VectorQuantizer`; `VectorQuantizer2` as it comes",
        "vq",
        lambda z, p: authors.taming(z, table_of(p)),
        dict(alpha=1.25, beta=0.2),
        note="theirs: beta = 0.25 weighs the codebook's term, not the encoder's",
    ),
    of_recipe(
        "VQ-VAE, losses as published",
        f"{TAMING}, `VectorQuantizer2(legacy=False)`; {SONNET}; {ZALANDO}",
        "vq",
        lambda z, p: authors.taming(z, table_of(p), legacy=False),
        note="the default here: alpha=1.25, beta=0.8",
    ),
    of_recipe(
        "VQ-VAE, losses of Huh et al.",
        f"{VQTORCH}, `VectorQuant`",
        "vq",
        lambda z, p: authors.vqtorch(z, table_of(p)),
        dict(alpha=1.0, beta=0.95),
        note="alpha is a factor of the loss in the training loop there",
    ),
    of_recipe(
        "Synchronized update",
        f"{VQTORCH}, `VectorQuant(sync_nu=0.2)`",
        "vq + sync",
        lambda z, p: authors.vqtorch(z, table_of(p), nu=0.2),
        dict(alpha=1.0, beta=0.95, nu=0.2),
    ),
    Row(
        "Affine codebook, learned",
        f"{VQTORCH}, `VectorQuant(affine_lr=2, affine_groups=2)`",
        "`vq + affine, alpha=1.0, beta=0.95, affine_lr=2.0, affine_groups=2`",
        learned_affine,
        "gradients of scale and shift included",
    ),
    Row(
        "Affine codebook, running moments",
        f"{VQTORCH}, `AffineTransform(use_running_statistics=True)`",
        "`vq + moving-affine, alpha=1.0, beta=0.95`",
        partial(moving_affine, eps=1e-8),
        "theirs adds 1e-8 to the codebook's variance; no option of `VectorQuant` reaches it",
        dict.fromkeys(COLUMNS, (0.0, 1e-7)) | {"value": (1e-11, 1e-6), "z": (0.0, 1e-6)},
    ),
    Row(
        "the same, without the 1e-8",
        f"{VQTORCH}, `AffineTransform(use_running_statistics=True)`",
        "`vq + moving-affine, alpha=1.0, beta=0.95`",
        partial(moving_affine, eps=0.0),
    ),
    Row(
        "Normalised codes",
        f"{VQTORCH}, `VectorQuant(norm='l2', cb_norm='l2c')`",
        "`vq + l2, alpha=1.0, beta=0.95`",
        on_the_sphere,
        "theirs normalises the stored table before each step, ours inside the graph: to the "
        "codebook theirs sends the part along each code as well. Its cb_norm='l2' only caps "
        "lengths at 10. No setting",
        {"codebook": (1e-3, 10.0)},
    ),
]


# ---- alternation ----

LR, MOMENTUM, STEPS = 0.5, 0.9, 12  # of the inner optimiser; steps


def outer_of(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03)


def alternating_start() -> tuple[Tensor, Tensor, list[Tensor]]:
    "Encoder, table and the batches."
    torch.manual_seed(0)
    shapes = [(5, D), (K, D)]
    encoder, table = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes)
    return encoder, table, list(torch.randn(STEPS, N, 5, dtype=torch.float64))


def alternated_there(
    nu: float, holds: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    "After each step: value, task's loss, the encoder's gradient, and the table."
    encoder, table, batches = alternating_start()
    inner = torch.optim.SGD([table], LR, MOMENTUM)
    outer = outer_of([encoder, table] if holds else [encoder])
    for batch in batches:
        outer.zero_grad()
        z = batch @ encoder
        q = authors.vqtorch_in_place(z, table, authors.nearest(z, table), inner)
        value = authors.through(z, q)
        if nu:  # a term of 0 would give the table a gradient of 0, and with it weight decay
            value = value + nu * (q - q.detach())
        loss = (value - 1).pow(2).mean()
        loss.backward()
        yield value.detach(), loss.detach(), encoder.grad.clone(), table.detach().clone()
        outer.step()


def alternated_here(nu: float) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    "The same, by the inner step that `fit` takes under `Settings(fused=True)`."
    encoder, table, batches = alternating_start()
    spec, settings = ("vq + opt", {"nu": nu}) if nu else ("vq + alt", {})
    quantizer = recipe(spec, D, K, alpha=1.0, beta=1.0, **settings).double().train()
    quantizer.book.weight.data.copy_(table.detach())
    inner = torch.optim.SGD([quantizer.book.weight], LR, MOMENTUM)
    outer = outer_of([encoder])

    def inner_step(loss: Tensor) -> None:
        loss.backward(inputs=[quantizer.book.weight])
        inner.step()
        inner.zero_grad()

    quantizer.inner_step = inner_step
    for batch in batches:
        outer.zero_grad()
        value, _, commitment = quantizer(batch @ encoder)
        loss = (value - 1).pow(2).mean()
        (loss + commitment).backward()
        table = quantizer.codebook.detach().clone()
        yield value.detach(), loss.detach(), encoder.grad.clone(), table
        outer.step()


def alternated(nu: float, holds: bool) -> dict[str, float]:
    pairs = zip(alternated_here(nu), alternated_there(nu, holds), strict=True)
    return worst([dict(zip(COLUMNS, map(larger, *pair))) for pair in pairs])


IN_PLACE = f"{VQTORCH}, `VectorQuant(beta=1, inplace_optimizer=SGD)`"
ALTERNATION = [
    Row(
        f"Alternation, {STEPS} steps",
        f"{IN_PLACE}, their example: its loss left out",
        "`vq + alt, alpha=1.0, beta=1.0`",
        partial(alternated, 0.0, holds=True),
        "the outer optimiser of the example is given the codebook, and never finds a gradient "
        "of it. Gradient: the encoder's; codebook: the table",
    ),
    Row(
        f"Alternation with the synchronized update, {STEPS} steps",
        f"{IN_PLACE} and sync_nu=0.2; outer optimiser without the codebook",
        "`vq + opt, alpha=1.0, beta=1.0, nu=0.2`",
        partial(alternated, 0.2, holds=False),
        "in both the task's part waits for the next inner step",
    ),
    Row(
        "the same, the outer optimiser given all parameters",
        f"{IN_PLACE} and sync_nu=0.2; outer optimiser as in their example",
        "`vq + opt, alpha=1.0, beta=1.0, nu=0.2`",
        partial(alternated, 0.2, holds=True),
        "there the outer optimiser, with its own rate, moves the codebook a second time; "
        "give it the other parameters alone",
        dict.fromkeys(COLUMNS, (1e-6, 10.0)),
    ),
    Row(
        "Affine codebook with both",
        f"{IN_PLACE}, sync_nu=0.2 and affine_lr=1",
        "`vq + affine + opt`",
        dict,
        "theirs raises RuntimeError: its inner backward pass has freed the map's graph. Without "
        "sync_nu and with its loss left out it runs, on the code vectors from before the inner step",
    ),
]


# ---- moving averages ----

DECAY = 0.9

def average_of(quantizer: VectorQuantizer, counts: Tensor, sums: Tensor) -> None:
    quantizer.average.counts.copy_(counts)
    quantizer.average.sums.copy_(sums)


def table_and_data(chosen: int) -> tuple[Tensor, list[Tensor]]:
    "A table, and batches that lie about the first of its codes."
    torch.manual_seed(0)
    table = torch.randn(K, D, dtype=torch.float64)
    noise = 0.3 * torch.randn(STEPS, 4 * chosen, D, dtype=torch.float64)
    return table, list(table[:chosen].repeat(4, 1) + noise)


def averaged(
    theirs: Callable,  # (z, table, counts, sums, step) -> table, counts, sums
    start: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,  # their counts and sums
    steps: int = STEPS,
    **options: Any,  # of ours
) -> dict[str, float]:
    "Largest differences over some steps; codebook: the table after them."
    # where one step shows how the averages begin, a part of the codes is left out
    table, batches = table_and_data(K if steps > 1 else 3 * K // 4)
    quantizer = recipe("vq + ema", D, K, decay=DECAY, **options).double().train()
    quantizer.set_codebook(table)
    if start is None:
        counts, sums = 1.0 + torch.rand(K).double(), 2 * table
        average_of(quantizer, counts, sums)
    else:
        counts, sums = start(table)
    found = []
    for step, z in enumerate(batches[:steps], 1):
        found.append(beside(quantizer, lambda x, p: authors.vq(x, table, 0.25, 0.0), z))
        table, counts, sums = theirs(z, table, counts, sums, step)
        quantizer.settle()
        found[-1]["codebook"] = larger(quantizer.codebook, table)
    return worst(found)


def rosinality(z, table, counts, sums, step):
    return authors.ema(z, table, counts, sums, DECAY)


def sonnet(z, table, counts, sums, step):
    return authors.ema_sonnet(z, table, counts, sums, step, DECAY)


def zalando(z, table, counts, sums, step, eps=1e-5):
    return authors.ema_zalando(z, table, counts, sums, DECAY, eps)


def counts_zero(table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(K, dtype=torch.float64), table


def both_zero(table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(K, dtype=torch.float64), torch.zeros_like(table)


def sums_random(table: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(K, dtype=torch.float64), torch.randn_like(table)


EMA = f"{ROSINALITY}, `Quantize`; {TAMING}, `EMAVectorQuantizer`; {ROTATION}, its layer"
BEGINS = {"codebook": (0.1, 1e7)}
AVERAGES = [
    Row(
        f"Moving averages, {STEPS} steps from equal counts and sums",
        EMA,
        "`vq + ema`",
        partial(averaged, rosinality),
        "codebook: the table. (taming's class cannot be made as it stands: it asks for arguments "
        "under other names than its own)",
    ),
    Row(
        "the first step, as each begins",
        EMA,
        "`vq + ema`",
        partial(averaged, rosinality, counts_zero, steps=1),
        "theirs: counts 0, sums the table; a code that the first batch leaves out flies away, to "
        "1e5 times where it was. Ours: counts 1. To begin as theirs: ema_start='uncounted'",
        BEGINS,
    ),
    Row(
        f"{STEPS} steps, begun as theirs",
        EMA,
        "`vq + ema, ema_start='uncounted'`",
        partial(averaged, rosinality, counts_zero, ema_start="uncounted"),
    ),
    Row(
        "the first step, as each begins",
        f"{SONNET}, `VectorQuantizerEMA`",
        "`vq + ema`",
        partial(averaged, sonnet, both_zero, steps=1),
        "theirs: counts 0, sums 0, both divided by 1 - decay^step; a code that the first batch "
        "leaves out goes to the origin. To begin as theirs: ema_start='zero'",
        BEGINS,
    ),
    Row(
        f"{STEPS} steps, begun as theirs",
        f"{SONNET}, `VectorQuantizerEMA`",
        "`vq + ema, ema_start='zero'`",
        partial(averaged, sonnet, both_zero, ema_start="zero"),
    ),
    Row(
        "the first step, as each begins",
        f"{ZALANDO}, `VectorQuantizerEMA`",
        "`vq + ema`",
        partial(averaged, zalando, sums_random, steps=1),
        "theirs: counts 0, sums random and not the table's; a code left out flies away. No setting",
        BEGINS,
    ),
    Row(
        f"{STEPS} steps, both from the table's sums",
        f"{ZALANDO}, `VectorQuantizerEMA`",
        "`vq + ema, ema_start='uncounted'`",
        partial(averaged, zalando, counts_zero, ema_start="uncounted"),
        "theirs keeps the smoothed counts and averages them on",
        {"codebook": (1e-9, 0.1), "value": (0.0, 1e-2), "z": (0.0, 1e-2), "loss": (0.0, 1e-2)},
    ),
    Row(
        "the same without smoothing, on both sides",
        f"{ZALANDO}, `VectorQuantizerEMA(epsilon=0)`",
        "`vq + ema, ema_start='uncounted', smoothing=0.0`",
        partial(
            averaged,
            partial(zalando, eps=0.0),
            counts_zero,
            ema_start="uncounted",
            smoothing=0.0,
        ),
    ),
]


# ---- the gradient ----


def with_rule(rule: Callable, theirs: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    "A rule on the nearest codes; theirs takes z and q and gives what the decoder gets."

    def passed(z, p):
        q = table_of(p)[authors.nearest(z, table_of(p))].detach()
        return theirs(z, q), 0.0

    return beside(VectorQuantizer(D, K, rule=rule, alpha=0.0), passed)


def over_length(z: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    "The rule of their `no_grad_scale`: the projected, turned gradient over |z|."
    to_z, to_q = rotation("unit", project=True)(z, q, g)
    return to_z / z.norm(dim=1, keepdim=True), to_q


VQGAN = f"{ROTATION}, table_3 (VQGAN)"
GRADIENTS = [
    Row(
        "Rotation",
        f"{ROTATION}, src/models/vq_vae.py",
        "`vq + rotation`",
        lambda: with_rule(rotation(), authors.rotated),
        "theirs adds 1e-6 to both lengths, so that its value is not q either",
        {"value": (1e-8, 1e-4), "z": (1e-8, 1e-4)},
    ),
    Row(
        "the same, without the 1e-6",
        f"{ROTATION}, src/models/vq_vae.py",
        "`vq + rotation`",
        lambda: with_rule(rotation(), partial(authors.rotated, eps=0.0)),
    ),
    Row(
        "Rotation, released for VQGAN and ViT-VQGAN",
        f"{VQGAN}, `rot_trick`; table_4 (ViT-VQGAN)",
        "`vq + rotation-projected`",
        lambda: with_rule(rotation(project=True), authors.rotated_direction),
        "theirs turns the unit vector of z, and the gradient passes the division: nothing along z "
        "is left",
    ),
    Row(
        "the same without the scale",
        f"{VQGAN}, `no_grad_scale`",
        "`vq + rotation, project=True, scale=unit`",
        lambda: with_rule(
            rotation("unit", project=True), partial(authors.rotated_direction, scaled=False)
        ),
        "theirs has a factor of one over the length of z, where the paper (A.9) and ours have 1; "
        "`+ l2` makes it 1",
        {"z": (1e-3, 100.0)},
    ),
    Row(
        "the same, its factor in a rule of one's own",
        f"{VQGAN}, `no_grad_scale`",
        "`VectorQuantizer(rule=...)`: that over the length of z",
        lambda: with_rule(over_length, partial(authors.rotated_direction, scaled=False)),
    ),
    Row(
        "Reflection, released for VQGAN",
        f"{VQGAN}, `ref_trick`",
        "`vq + reflection-projected`",
        lambda: with_rule(
            reflection(project=True), partial(authors.rotated_direction, turn=authors.mirrored)
        ),
        "as the rotation: nothing along z is left",
    ),
    Row(
        "Reflection, as the paper has it (A.8)",
        f"{VQGAN}, `ref_trick`",
        "`vq + reflection`",
        lambda: with_rule(reflection(), partial(authors.rotated_direction, turn=authors.mirrored)),
        "project=True removes it",
        {"z": (1e-3, 100.0)},
    ),
]
