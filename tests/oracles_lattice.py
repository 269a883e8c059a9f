"""FSQ, LFQ and BSQ as their papers write them: every code written out, n x k matrices.

And as public code has them, by its formulas: `released_lfq`, `released_bsq`.
"""

import itertools
from functools import partial
import torch
import torch.nn.functional as F
from vqstudy.estimators import rotation
from vqstudy.lattice import BSQ, FSQ, LFQ


def inwards(z, p):
    return z @ p["project_in.weight"].T + p["project_in.bias"] if "project_in.weight" in p else z


def outwards(q, p):
    return q @ p["project_out.weight"].T + p["project_out.bias"] if "project_out.weight" in p else q


def corners(values):
    "All combinations of one value per coordinate, the first coordinate the fastest."
    rows = [combination[::-1] for combination in itertools.product(*values[::-1])]
    return torch.tensor(rows, dtype=torch.float64)


def passed(x, q, rotate):
    """q with the straight-through gradient, or the rotated and scaled one by its d x d matrix.

    Straight-through where q is 0, which has no direction.
    """
    through = x + (q - x).detach()
    if not rotate:
        return through
    e, u = F.normalize(x.detach(), dim=1), F.normalize(q, dim=1)
    w = F.normalize(e + u, dim=1)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    R = eye - 2 * w[:, :, None] * w[:, None] + 2 * u[:, :, None] * e[:, None]
    scale = (q.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)).detach()
    turned = scale * (R @ x[..., None])[..., 0]
    return torch.where(q.norm(dim=1, keepdim=True) > 0, turned, through)


def fsq(quantizer, z, p, rotate=False):
    x, columns, values = inwards(z, p), [], []
    for i, size in enumerate(quantizer.levels):
        half = torch.tensor((size - 1) * 0.999 / 2, dtype=torch.float64)
        offset = 0.5 * (size % 2 == 0)
        bounded = torch.tanh(x[:, i] + torch.tan(offset / half)) * half - offset
        columns.append(bounded / (size // 2))
        values.append([(j - size // 2) / (size // 2) for j in range(size)])
    bounded, codebook = torch.stack(columns, 1), corners(values)
    codes = (bounded[:, None] - codebook).pow(2).sum(-1).argmin(1)
    return outwards(passed(bounded, codebook[codes], rotate), p), codes, z.new_zeros(())


def signs(quantizer, z, p, spherical=False, rotate=False):
    x = inwards(z, p)
    width = x.shape[1]
    unit = width**-0.5 if spherical else 1.0
    if spherical:
        x = x / x.norm(dim=1, keepdim=True)
    codebook = corners([[-unit, unit]] * width)
    distance = (x[:, None] - codebook).pow(2).sum(-1)
    codes = distance.argmin(1)
    loss = quantizer.commitment * (x - codebook[codes]).pow(2).mean()
    log_p = (-distance / quantizer.temperature).log_softmax(1)
    probability, each = log_p.exp(), -(log_p.exp() * log_p).sum(1).mean()
    mean = probability.mean(0)
    bits, of_mean = (codebook > 0).long(), 0.0
    for first in range(0, width, quantizer.group):
        part = bits[:, first : first + quantizer.group]
        pattern = (part * 2 ** torch.arange(part.shape[1])).sum(1)
        share = torch.zeros(2 ** part.shape[1], dtype=torch.float64).index_add(0, pattern, mean)
        log = (share.clamp_min(torch.finfo(torch.float64).tiny) + quantizer.eps).log()
        of_mean = of_mean - (share * log).sum()
    loss = loss + quantizer.entropy * (each - quantizer.diversity * of_mean)
    q = passed(x, codebook[codes], rotate)
    if getattr(quantizer, "scale_gradient", False):
        q = q.detach() + unit * (q - q.detach())
    return outwards(q, p), codes, loss


def written_entropy(p, eps):
    return -(p * (p + eps).log()).sum(-1)


def released_lfq(z, weight=0.1, commitment=0.25, temperature=0.01, eps=1e-5):
    "Open-MAGVIT2's LFQ in training: z_q, code, loss. One affinity 2 z.c per vector and code."
    width = z.shape[1]
    codebook = corners([[-1.0, 1.0]] * width)
    p = torch.softmax(2 * z @ codebook.T / temperature, 1)
    each = -(p * p.clamp_min(1e-300).log()).sum(1).mean()
    q = torch.where(z > 0, 1.0, -1.0)
    loss = weight * (each - written_entropy(p.mean(0), eps)) + commitment * (z - q).pow(2).mean()
    code = ((q > 0).long() * 2 ** torch.arange(width)).sum(1)
    return z + (q - z).detach(), code, loss


def released_bsq(
    z, *, beta=0.0, gamma0=1.0, gamma=1.0, zeta=0.1, inv_temperature=1.0, group=1, analytical=False
):
    """The released BSQ with both its normalisations: z_q, code, loss.

    The sign first, straight through, and then the scaling; the entropies over the inverse
    temperature; the squared error summed over the signs; the first sign as the highest bit.
    analytical: both entropies are of single signs.
    """
    u = F.normalize(z, dim=1)
    n, width = u.shape
    sign = torch.where(u > 0, 1.0, -1.0)
    q = (u + (sign - u).detach()) / width**0.5
    commit = beta * (q.detach() - u).pow(2).sum(1).mean()
    size = 1 if analytical else group
    patterns = corners([[-1.0, 1.0]] * size) / width**0.5
    logits = 2 * inv_temperature * u.view(n, width // size, size) @ patterns.T
    p = torch.softmax(logits, -1)
    each = written_entropy(p, 1e-8).sum(1).mean()
    of_mean = written_entropy(p.mean(0), 1e-8).sum()
    loss = commit + zeta * (gamma0 * each - gamma * of_mean) / inv_temperature
    code = ((sign > 0).long() * 2 ** torch.arange(width - 1, -1, -1)).sum(1)
    return q, code, loss


def twos(dim, num_codes, **keywords):
    return FSQ(dim, num_codes, levels=[2] * (num_codes.bit_length() - 1), **keywords)


SOFT = dict(temperature=2.0, diversity=0.7, entropy=0.5, commitment=0.3)
JOINT = dict(commitment=0.25, group=18, temperature=0.3)
spherical = partial(signs, spherical=True)
ORACLES = {
    "fsq": (FSQ, fsq),
    "fsq, two levels each": (twos, fsq),
    "fsq + rotation": (partial(twos, rule=rotation()), partial(fsq, rotate=True)),
    "lfq": (LFQ, signs),
    "lfq, a soft temperature": (partial(LFQ, **SOFT), signs),
    "lfq, in groups of two": (partial(LFQ, temperature=1.0, group=2), signs),
    "lfq, eps": (partial(LFQ, temperature=1.0, eps=0.01), signs),
    "lfq + rotation": (partial(LFQ, rule=rotation()), partial(signs, rotate=True)),
    "bsq": (BSQ, spherical),
    "bsq, committed and joint": (partial(BSQ, **JOINT), spherical),
    "bsq, scaled gradient": (partial(BSQ, scale_gradient=True), spherical),
    "bsq + rotation": (partial(BSQ, rule=rotation()), partial(spherical, rotate=True)),
}
