"""Product, residual and two-level quantizers as their papers have them, in float64 and in the plainest way: what the gradients have to be.

Each is made of what its parts do: `inner(part, x, p) -> (out, codes, loss)` as in the other oracles, p the leaves of that part.
"""

from functools import partial
import torch
import torch.nn.functional as F
from oracles_vector import coded, passed, sphere, vector
from vqstudy.quantizers import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer, recipe
from vqstudy.composed import join_scales


def part(quantizer, p, i):
    "Part i (of a shared one, the only), and its leaves."
    i = i % len(quantizer.parts)
    return quantizer.parts[i], {
        name.removeprefix(f"parts.{i}."): leaf
        for name, leaf in p.items()
        if name.startswith(f"parts.{i}.")
    }


def step(inner, quantizer, p, i, x):
    "What part i makes of x."
    module, leaves = part(quantizer, p, i)
    return inner(module, x, leaves)


def group(quantizer, z, p, inner, groups=2):
    outs, codes, losses = zip(
        *(step(inner, quantizer, p, i, x) for i, x in enumerate(z.split(z.shape[1] // groups, 1)))
    )
    return torch.cat(outs, 1), torch.stack(codes, 1), sum(losses) / groups


def residual(quantizer, z, p, words, levels=4, dropout=False, **keywords):
    "Levels of nearest codes: each takes what the former left of the vectors, held constant; one rule goes from z to the sum."
    shown = (
        torch.randint(1, levels + 1, (len(z), 1)) if dropout else torch.full((len(z), 1), levels)
    )
    x = sphere(z, words)
    whole, q, codes, losses = torch.zeros_like(x), torch.zeros_like(x), [], []
    for i in range(levels):
        module, leaves = part(quantizer, p, i)
        chosen, c, loss = coded(
            module, sphere(x - whole.detach(), words), leaves, words, **keywords
        )
        codes.append(c), losses.append(loss)
        whole, q = whole + chosen, q + chosen * (shown > i)
    out, extra = passed(quantizer, x, q, words, **keywords)
    return out, torch.stack(codes, 1), sum(losses) / levels + extra


def chain(quantizer, z, p, inner, levels=4):
    "Levels with gradients of their own: the chain rule through them, what is left not held constant."
    left, q, codes, losses = z, 0, [], []
    for i in range(levels):
        out, c, loss = step(inner, quantizer, p, i, left)
        left, q = left - out, q + out
        codes.append(c), losses.append(loss)
    return q, torch.stack(codes, 1), sum(losses) / levels


def multiscale(quantizer, z, p, inner):
    "By convolutions over the map, unlike the module's rows."
    d, maps = z.shape[-1], z.movedim(-1, 1)
    rows = lambda m: m.movedim(1, -1).reshape(-1, d)
    as_map = lambda r, like: r.view(like.shape[0], like.shape[2], like.shape[3], d).movedim(-1, 1)
    down = F.conv2d(
        maps, p["down.weight"].view(d, 2, 2, d).permute(0, 3, 1, 2), p["down.bias"], stride=2
    )
    top, coarse, loss_top = step(inner, quantizer, p, 0, rows(down))
    up = F.conv_transpose2d(
        as_map(top, down), p["up.weight"].view(2, 2, d, d).permute(3, 2, 0, 1), stride=2
    )
    up = up + p["up.bias"].view(2, 2, d).permute(2, 0, 1).repeat(1, *down.shape[2:])
    merged = F.conv2d(torch.cat([maps, up], 1), p["merge.weight"][..., None, None], p["merge.bias"])
    bottom, fine, loss = step(inner, quantizer, p, 1, rows(merged))
    coarse, fine = (
        c.view(m.shape[0], *m.shape[2:], *c.shape[1:]) for c, m in ((coarse, down), (fine, maps))
    )
    return (
        (as_map(bottom, maps) + up).movedim(1, -1),
        join_scales(coarse, fine),
        (loss_top + loss) / 2,
    )


def of(kind, inner, **options):
    return partial(_of, kind, recipe_of(inner), options)


def recipe_of(inner):
    return partial(recipe, inner) if isinstance(inner, str) else inner


def _of(kind, make, options, dim, num_codes):
    return kind(dim, num_codes, make=make, **options)


PLAIN = partial(vector, words={"vq"})
ROWS = {  # name: (build, naive); quantizers within quantizers, which no recipe names
    "group of residuals": (
        of(GroupQuantizer, of(ResidualQuantizer, "vq + ema", levels=2)),
        partial(group, inner=partial(residual, words={"vq", "ema"}, levels=2)),
    ),
    "residual of groups": (
        of(ResidualQuantizer, of(GroupQuantizer, "vq"), levels=2),
        partial(chain, inner=partial(group, inner=PLAIN), levels=2),
    ),
}
MAPS = {
    "multiscale of residuals": (
        of(MultiScaleQuantizer, of(ResidualQuantizer, "vq", levels=2)),
        partial(multiscale, inner=partial(residual, words={"vq"}, levels=2)),
    )
}
