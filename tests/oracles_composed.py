"""Product, residual and two-level quantizers as their papers have them, in float64.

What the gradients have to be, in the plainest way. Each is made of what its parts do:
`inner(part, x, p) -> (out, codes, loss)` as in the other oracles, p the leaves of that part.
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
    prefix = f"parts.{i}."
    own = {name: leaf for name, leaf in p.items() if name.startswith(prefix)}
    return quantizer.parts[i], {name.removeprefix(prefix): leaf for name, leaf in own.items()}


def step(inner, quantizer, p, i, x):
    "What part i makes of x."
    module, leaves = part(quantizer, p, i)
    return inner(module, x, leaves)


def group(quantizer, z, p, inner, groups=2):
    pieces = enumerate(z.split(z.shape[1] // groups, 1))
    outs, codes, losses = zip(*(step(inner, quantizer, p, i, x) for i, x in pieces))
    return torch.cat(outs, 1), torch.stack(codes, 1), sum(losses) / groups


def residual(quantizer, z, p, words, levels=4, dropout=False, **keywords):
    """Levels of nearest codes: each takes what the former left of the vectors, held constant.

    One rule goes from z to the sum.
    """
    visible = torch.full((len(z), 1), levels)
    if dropout:
        visible = torch.randint(1, levels + 1, (len(z), 1))
    x = sphere(z, words)
    whole, q, codes, losses = torch.zeros_like(x), torch.zeros_like(x), [], []
    for i in range(levels):
        module, leaves = part(quantizer, p, i)
        rest = sphere(x - whole.detach(), words)
        chosen, c, loss = coded(module, rest, leaves, words, **keywords)
        codes.append(c)
        losses.append(loss)
        whole, q = whole + chosen, q + chosen * (visible > i)
    out, extra = passed(quantizer, x, q, words, **keywords)
    return out, torch.stack(codes, 1), sum(losses) / levels + extra


def deferred(quantizer, z, p, inner):
    "z with its gradient, no loss and the codes, and after so many steps what `inner` makes of z."
    own = {name.removeprefix("inner."): leaf for name, leaf in p.items()}
    value, codes, loss = inner(quantizer.inner, z, own)
    if quantizer.taken < quantizer.steps:
        return z, codes, torch.zeros((), dtype=z.dtype)
    return value, codes, loss


def chain(quantizer, z, p, inner, levels=4):
    "Levels with gradients of their own: the chain rule through what each leaves."
    left, q, codes, losses = z, 0, [], []
    for i in range(levels):
        out, c, loss = step(inner, quantizer, p, i, left)
        left, q = left - out, q + out
        codes.append(c)
        losses.append(loss)
    return q, torch.stack(codes, 1), sum(losses) / levels


def multiscale(quantizer, z, p, inner):
    "By convolutions over the map, unlike the module's rows."
    b, h, w, d = z.shape
    maps, coarse_shape = z.movedim(-1, 1), (b, h // 2, w // 2)

    def rows(m):
        return m.movedim(1, -1).reshape(-1, d)

    def as_map(r, shape):
        return r.view(*shape, d).movedim(-1, 1)

    weight = p["down.weight"].view(d, 2, 2, d).permute(0, 3, 1, 2)
    down = F.conv2d(maps, weight, p["down.bias"], stride=2)
    top, coarse, loss_top = step(inner, quantizer, p, 0, rows(down))
    weight = p["up.weight"].view(2, 2, d, d).permute(3, 2, 0, 1)
    up = F.conv_transpose2d(as_map(top, coarse_shape), weight, stride=2)
    up = up + p["up.bias"].view(2, 2, d).permute(2, 0, 1).repeat(1, *coarse_shape[1:])
    merged = F.conv2d(torch.cat([maps, up], 1), p["merge.weight"][..., None, None], p["merge.bias"])
    bottom, fine, loss = step(inner, quantizer, p, 1, rows(merged))
    codes = join_scales(
        coarse.view(*coarse_shape, *coarse.shape[1:]), fine.view(b, h, w, *fine.shape[1:])
    )
    q = (as_map(bottom, (b, h, w)) + up).movedim(1, -1)
    return q, codes, (loss_top + loss) / 2


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
