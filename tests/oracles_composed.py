"""Product, residual and two-level quantizers as their papers have them, in float64 and in the plainest way: what the gradients have to be.

`build(dim, num_codes)` makes the quantizer; `naive(quantizer, z, p) -> (out, codes, loss)` is the method, z (n, d) (MAPS: (b, h, w, d)) and p the leaves.
"""
from functools import partial
import torch
import torch.nn.functional as F
from vqstudy.codebook import Affine
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer, join_scales
from vqstudy.estimators import rotation, synchronized
from vqstudy.vector import SimVQ, VectorQuantizer

ALPHA, BETA = 5.0, 0.9
VQ = partial(VectorQuantizer, alpha=ALPHA, beta=BETA)
ROTATED, SYNCED = partial(VQ, rule=rotation()), partial(VQ, rule=synchronized(0.3))


def affine(dim, num_codes): return VQ(dim, num_codes, map=Affine(dim))


def table(p, i):
    "The code vectors of part i as used: plain, shared affine, or a linear map of a frozen table."
    weight = p[f"parts.{i}.book.weight"]
    if f"parts.{i}.book.map.scale" in p: weight = weight * (1 + p[f"parts.{i}.book.map.scale"]) + p[f"parts.{i}.book.map.shift"]
    return weight


def nearest(x, book): return (x.detach()[:, None] - book.detach()).pow(2).sum(-1).argmin(1)


def committed(x, q): return ALPHA * ((1 - BETA) * (x - q.detach()).pow(2).mean() + BETA * (q - x.detach()).pow(2).mean())


def turned(x, q):
    "q, with the gradient of |q|/|x| R x, R and the factor held; on a line there is nothing to turn about."
    e, u = (F.normalize(t.detach(), dim=1) for t in (x, q))
    w = F.normalize(e + u, dim=1)
    R = torch.eye(x.shape[1], dtype=x.dtype)
    if x.shape[1] > 1: R = R - 2 * w[:, :, None] * w[:, None] + 2 * u[:, :, None] * e[:, None]
    out = (q.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)).detach() * (R @ x[..., None])[..., 0]
    return out + (q - out).detach()


def passed(x, q, rule):
    if rule == "rotation": return turned(x, q)
    out = x + (q - x).detach()
    return out + 0.3 * (q - q.detach()) if rule == "sync" else out


def plain(x, book, rule):
    codes = nearest(x, book)
    return passed(x, book[codes], rule), codes, committed(x, book[codes])


def group(quantizer, z, p, groups=2, rule="", shared=False):
    pieces = z.split(z.shape[1] // groups, 1)
    outs, codes, losses = zip(*(plain(x, table(p, 0 if shared else i), rule) for i, x in enumerate(pieces)))
    return torch.cat(outs, 1), torch.stack(codes, 1), sum(losses) / groups


def residual(quantizer, z, p, levels=3, rule="", shared=False, dropout=False, l2=False, prefix="parts."):
    shown = torch.randint(1, levels + 1, (len(z), 1)) if dropout else torch.full((len(z), 1), levels)
    x = F.normalize(z, dim=1) if l2 else z
    whole, q, codes, losses = torch.zeros_like(x), torch.zeros_like(x), [], []
    for i in range(levels):
        book, left = table({k.replace(prefix, "parts."): v for k, v in p.items()}, 0 if shared else i), x - whole.detach()
        if l2: book, left = F.normalize(book, dim=1), F.normalize(left, dim=1)
        codes.append(nearest(left, book))
        chosen = book[codes[-1]]
        losses.append(committed(left, chosen))
        whole, q = whole + chosen, q + chosen * (shown > i)
    return passed(x, q, rule), torch.stack(codes, 1), sum(losses) / levels


def simvq(quantizer, z, p):
    mapped = {f"parts.{i}.book.weight": part.book.weight @ p[f"parts.{i}.book.map.linear.weight"].T for i, part in enumerate(quantizer.parts)}
    return residual(quantizer, z, mapped)


def group_of_residuals(quantizer, z, p):
    outs, codes, losses = zip(*(residual(quantizer, x, {k: v for k, v in p.items() if k.startswith(f"parts.{i}.")}, 2, prefix=f"parts.{i}.parts.")
                                for i, x in enumerate(z.split(z.shape[1] // 2, 1))))
    return torch.cat(outs, 1), torch.stack(codes, 1), sum(losses) / 2


def residual_of_groups(quantizer, z, p):
    "Parts without a rule of their own: the chain rule through straight-through parts, the residual not detached."
    left, q, codes, losses = z, 0, [], []
    for i in range(2):
        out, c, loss = group(None, left, {f"parts.{j}.book.weight": p[f"parts.{i}.parts.{j}.book.weight"] for j in range(2)})
        left, q = left - out, q + out
        codes.append(c), losses.append(loss)
    return q, torch.stack(codes, 1), sum(losses) / 2


def multiscale(quantizer, z, p, rule=""):
    "By convolutions over the map, unlike the module's rows."
    d, maps = z.shape[-1], z.movedim(-1, 1)
    rows = lambda m: m.movedim(1, -1).reshape(-1, d)
    as_map = lambda r, like: r.view(like.shape[0], like.shape[2], like.shape[3], d).movedim(-1, 1)
    down = F.conv2d(maps, p["down.weight"].view(d, 2, 2, d).permute(0, 3, 1, 2), p["down.bias"], stride=2)
    top, coarse, loss_top = plain(rows(down), table(p, 0), rule)
    up = F.conv_transpose2d(as_map(top, down), p["up.weight"].view(2, 2, d, d).permute(3, 2, 0, 1), stride=2)
    up = up + p["up.bias"].view(2, 2, d).permute(2, 0, 1).repeat(1, *down.shape[2:])
    merged = F.conv2d(torch.cat([maps, up], 1), p["merge.weight"][..., None, None], p["merge.bias"])
    bottom, fine, loss = plain(rows(merged), table(p, 1), rule)
    codes = join_scales(coarse.view(down.shape[0], *down.shape[2:]), fine.view(maps.shape[0], *maps.shape[2:]))
    return (as_map(bottom, maps) + up).movedim(1, -1), codes, (loss_top + loss) / 2


def unsettled(dim, num_codes, make=VQ):
    "Its layers away from the pyramid that they start as, where gradients cancel."
    quantizer = MultiScaleQuantizer(dim, num_codes, make)
    for layer in (quantizer.down, quantizer.up, quantizer.merge): torch.nn.init.normal_(layer.weight, 0, 0.3), torch.nn.init.normal_(layer.bias, 0, 0.3)
    return quantizer


def build(kind, make=VQ, **options): return partial(_build, kind, make, options)
def _build(kind, make, options, dim, num_codes): return kind(dim, num_codes, make=make, **options)


ORACLES = {
    "group": (build(GroupQuantizer), group),
    "group + shared": (build(GroupQuantizer, shared=True), partial(group, shared=True)),
    "group + rotation": (build(GroupQuantizer, ROTATED), partial(group, rule="rotation")),
    "group + shared + sync": (build(GroupQuantizer, SYNCED, shared=True), partial(group, shared=True, rule="sync")),
    "residual": (build(ResidualQuantizer, levels=3), residual),
    "residual + shared": (build(ResidualQuantizer, levels=3, shared=True), partial(residual, shared=True)),
    "residual + rotation": (build(ResidualQuantizer, ROTATED, levels=3), partial(residual, rule="rotation")),
    "residual + sync": (build(ResidualQuantizer, SYNCED, levels=3), partial(residual, rule="sync")),
    "residual + affine": (build(ResidualQuantizer, affine, levels=3), residual),
    "residual + l2": (build(ResidualQuantizer, partial(VQ, l2=True), levels=3), partial(residual, l2=True)),
    "residual + simvq": (build(ResidualQuantizer, partial(SimVQ, alpha=ALPHA, beta=BETA), levels=3), simvq),
    "residual + dropout": (build(ResidualQuantizer, levels=3, dropout=True), partial(residual, dropout=True)),
    "residual + dropout + shared + sync": (build(ResidualQuantizer, SYNCED, levels=5, dropout=True, shared=True), partial(residual, levels=5, rule="sync", shared=True, dropout=True)),
    "group of residuals": (build(GroupQuantizer, build(ResidualQuantizer, levels=2)), group_of_residuals),
    "residual of groups": (build(ResidualQuantizer, build(GroupQuantizer), levels=2), residual_of_groups),
}
MAPS = {
    "multiscale": (unsettled, multiscale),
    "multiscale + rotation": (partial(unsettled, make=ROTATED), partial(multiscale, rule="rotation")),
    "multiscale + sync": (partial(unsettled, make=SYNCED), partial(multiscale, rule="sync")),
}
