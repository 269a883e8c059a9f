"""The quantizers with a table of code vectors as their papers have them, in float64.

    vector(quantizer, z, p, words, **keywords) -> (value, codes, loss)

z (n, d) and p are leaves, words the parts of a recipe, keywords those given to it, quantizer a copy
from before the step (for buffers). `value` has the method's value and, as an expression of the
leaves, its gradient.
"""

import torch
import torch.nn.functional as F
from vqstudy.ranks import keyed_normal, random_bits


def kept(new, old):
    return old + (new - old).detach()  # the value of `new` with the gradient of `old`


def distances(x, c):
    return (x[:, None] - c).pow(2).sum(-1)


def affine(quantizer, table, p, affine_lr=1.0, affine_groups=1, max_norm=None, **_):
    "Factor and shift (k, d): 1 + eta s and eta b of a code's group, cut to their largest norm."
    group = torch.arange(len(table)) * affine_groups // len(table)
    s, b = (affine_lr * p[f"book.map.{name}"] for name in ("scale", "shift"))
    if max_norm is not None:
        s, b = (t * (max_norm / t.norm(dim=1, keepdim=True)).clamp(max=1.0) for t in (s, b))
    return (1 + s)[group], b[group]


def moving(quantizer, table, x, momentum=0.1, of="codebook", **_):
    "Factor and shift (d,) from running moments of x and of the table, or its chosen codes."
    old = quantizer.book.map
    if of == "chosen":
        factor, shift = old.parts()
        mapped = factor * table + shift
        if quantizer.book.l2:
            mapped = F.normalize(mapped, dim=1)
        table = table[distances(x, mapped).argmin(1)]
    rate = momentum if old.started else 1.0
    mean_z, var_z, mean_c, var_c = (
        (1 - rate) * was + rate * new
        for was, new in (
            (old.mean_z, x.mean(0)),
            (old.var_z, x.var(0, correction=0)),
            (old.mean_c, table.mean(0)),
            (old.var_c, table.var(0, correction=0)),
        )
    )
    factor = torch.where(var_c > 1e-12, (var_z / var_c.clamp_min(1e-12)).sqrt(), 1.0)
    return factor, mean_z - factor * mean_c


def used(quantizer, x, p, words, life_span=20, **keywords):
    "The code vectors of this step: idle codes replaced by vectors of x, the map, the unit sphere."
    table, factor, shift = p.get("book.weight", quantizer.book.weight.detach()), 1.0, 0.0
    if "simvq" in words:
        return sphere(table @ p["book.map.linear.weight"].T, words)
    if "affine" in words:
        factor, shift = affine(quantizer, table, p, **keywords)
    if "moving-affine" in words:
        factor, shift = moving(quantizer, table.detach(), x, **keywords)
    dead = quantizer.alive.idle >= life_span if "replace" in words else torch.tensor(False)
    if dead.any():
        drawn = revived(x, dead, quantizer.key + 1)
        table = kept(torch.where(dead[:, None], (drawn - shift) / factor, table), table)
    return sphere(factor * table + shift, words)


def revived(x, dead, key):
    "The vectors of dead codes, each another one while there are enough, then copies a little off."
    n, k = len(x), len(dead)
    drawn = x[random_bits(key, n).argsort()[torch.arange(k) % n]]
    if k > n:
        noise = keyed_normal(~key, k - n, x.shape[1]).to(x.dtype)
        drawn[n:] += 0.01 * drawn.std(0, correction=0) * noise
    return drawn[(dead.cumsum(0) - 1).clamp_min(0)]


def sphere(x, words):
    return x / x.norm(dim=1, keepdim=True) if "l2" in words else x


def choose(x, c, words, metric="euclidean", temperature=1.0, epsilon=0.1, iterations=5, **_):
    "Codes: nearest, drawn (Huh et al. 2023, Eq. 12), or by a transport plan (Cuturi 2013)."
    if "stochastic" in words:
        scores = -distances(x, c) / temperature
        return (scores - torch.empty_like(scores).exponential_().log()).argmax(1)
    if "optvq" in words:
        plan = cost = distances(x, c).sqrt()
        if cost.numel() > 1:
            deviation = cost.std(correction=0).nan_to_num(1.0).clamp_min(1e-300)
            plan = torch.exp(-(cost - cost.min()) / deviation / epsilon)
        for _ in range(iterations):
            plan = plan / plan.sum(0, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        return plan.argmax(1)
    if metric == "cosine":
        x, c = F.normalize(x, dim=1), F.normalize(c, dim=1)
    return distances(x, c).argmin(1)


def matrix(x, q, words):
    "I - 2ww^T + 2ue^T, or the reflection I - 2rr^T, of each row, (n, d, d) (Fifty et al. 2024)."
    e, u, eye = F.normalize(x, dim=1), F.normalize(q, dim=1), torch.eye(x.shape[1], dtype=x.dtype)
    outer = lambda a, b: a[:, :, None] * b[:, None]
    if "reflection" in words:
        r = F.normalize(e - u, dim=1)
        return eye - 2 * outer(r, r)
    if x.shape[1] == 1:
        return eye.expand(len(x), 1, 1)  # on a line there is nothing to turn about
    w = F.normalize(e + u, dim=1)
    return eye - 2 * outer(w, w) + 2 * outer(u, e)


def turned(x, q, words, scale="norm", project=False, **_):
    """gamma R x, gamma and R held constant.

    Projected: of x's direction, which is not held constant, in place of its part along x.
    """
    x0, q0 = x.detach(), q.detach()
    gamma = {
        "norm": q0.norm(dim=1) / x0.norm(dim=1),
        "unit": torch.ones(len(x), dtype=x.dtype),
        "distance": 1 / (8 * (q0 - x0).pow(2).sum(1)),
    }[scale]
    if project:
        x = x0.norm(dim=1, keepdim=True) * F.normalize(x, dim=1)
    return gamma.clamp(max=1e6)[:, None] * (matrix(x0, q0, words) @ x[..., None])[..., 0]


def passed(quantizer, x, q, words, nu=0.2, variance=1e-3, **keywords):
    "What the decoder gets, and what else the loss needs for the rule's gradient to z."
    if "nsvq" in words or "diveq" in words:
        noise = torch.randn_like(x)
        v = noise if "nsvq" in words else (q - x).detach() + variance**0.5 * noise
        direction = (v / v.norm(dim=1, keepdim=True)).detach()
        return x + (q - x).norm(dim=1, keepdim=True) * direction, 0.0
    if "rotation" in words or "reflection" in words:
        return kept(q.detach(), turned(x, q, words, **keywords)), 0.0
    value = kept(q, x)
    if "sync" in words or "opt" in words:
        value = value + nu * (q - q.detach())
    extra = torch.zeros_like(x)
    if "exact" in words or "hessian" in words:
        slope = lambda v: torch.autograd.functional.jacobian(quantizer.loss_at, v.detach())
        if "exact" in words:
            extra = slope(x) - slope(q)
        else:
            error = (x - q).detach()
            extra = torch.autograd.functional.hvp(quantizer.loss_at, q.detach(), error)[1]
    return value, (extra * (x - x.detach())).sum()


def uneven(x, c, diversity=0.1, diversity_temperature=1.0, **_):
    "Weight times minus the entropy of the mean soft choice of codes."
    square = distances(x, c)
    # a batch of which each vector lies on its code
    m = square.min(1).values.mean().detach().clamp_min(1e-300)
    mean = (-square / (diversity_temperature * m)).softmax(1).mean(0)
    return diversity * torch.xlogy(mean, mean).sum()


def coded(quantizer, x, p, words, alpha=None, beta=0.8, commit_encoder=True, **keywords):
    "The chosen code vectors of prepared x, their codes, and the loss (Huh et al. 2023, Eq. 8-9)."
    c = used(quantizer, x.detach(), p, words, **keywords)
    codes = choose(x.detach(), c.detach(), words, **keywords)
    q, alternate = c[codes], "alt" in words or "opt" in words
    if alpha is None:
        alpha = 0.0 if {"nsvq", "diveq"} & words else 1.25
    encoders_share = 0.0 if alternate and not commit_encoder else 1 - beta
    loss = alpha * encoders_share * (x - q.detach()).pow(2).mean()
    if not (alternate or "ema" in words):
        loss = loss + alpha * beta * (q - x.detach()).pow(2).mean()
    if "diversity" in words:
        loss = loss + uneven(x, c, **keywords)
    return q, codes, loss


def vector(quantizer, z, p, words, **keywords):
    x = sphere(z, words)
    q, codes, loss = coded(quantizer, x, p, words, **keywords)
    value, extra = passed(quantizer, x, q, words, **keywords)
    return value, codes, loss + extra
