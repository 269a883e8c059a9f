"""Gumbel, SQ-VAE and router as their papers have them, in float64 and in the plainest way.

Matrices of n x k and n x k x d are welcome here.
"""

from functools import partial
import math
import torch
from vqstudy.gumbel import GumbelQuantizer
from vqstudy.router import RouterQuantizer
from vqstudy.sqvae import SQQuantizer


def onehot(codes, k):
    return torch.eye(k, dtype=torch.float64)[codes]


def noise(logits):
    return -torch.empty_like(logits).exponential_().log()


def kl_to_uniform(p):
    return (p * (p * p.shape[1]).log()).sum(1)


def gumbel(quantizer, z, p):
    "Jang et al. 2017 with taming-transformers' KL term; ReinMax by definition (Liu et al. 2023)."
    E, logits = p["book.weight"], z @ p["head.weight"].T + p["head.bias"]
    probabilities, tau = torch.softmax(logits, 1), float(quantizer.temperature)
    noisy = logits + noise(logits)
    codes = noisy.argmax(1)
    hard, loss = onehot(codes, len(E)), quantizer.kl * kl_to_uniform(probabilities).mean()
    soft = torch.softmax(noisy / tau, 1)
    if quantizer.estimator == "reinmax":
        middle = (hard + torch.softmax(logits / tau, 1)) / 2
        middle = torch.softmax((middle.log() - logits).detach() + logits, 1)
        soft = 2 * middle - probabilities / 2
    y = hard + soft - soft.detach() if quantizer.hard else soft
    return y @ E, codes, loss


def sq(quantizer, z, p):
    """SQ-VAE, Gaussian I to IV (Takida et al. 2022), with its (n, k, d) differences.

    Images are the first dimension of z.
    """
    E, x = p["book.weight"], z.reshape(-1, z.shape[-1])
    v = torch.full((len(x), 1), -torch.inf, dtype=torch.float64)  # variant 1: exp(s) alone
    if quantizer.variant > 1:
        v = x @ p["head.weight"].T + p["head.bias"]
    if quantizer.variant == 2:
        means = v.reshape(len(z), -1).mean(1)
        v = torch.stack([means[i] for i in range(len(z)) for _ in range(len(x) // len(z))])[:, None]
    var = (v.exp() + p["log_scale"].exp()).expand(x.shape)
    logits = -((x[:, None] - E).pow(2) / (2 * var[:, None])).sum(2)
    probabilities = torch.softmax(logits, 1)
    noisy = logits + noise(logits)
    z_q = torch.softmax(noisy / float(quantizer.temperature), 1) @ E
    entropy, distance = (probabilities * probabilities.log()).sum(), (x - z_q).pow(2) / (2 * var)
    loss = quantizer.weight * (entropy + distance.sum()) / len(z)
    return z_q.reshape(z.shape), noisy.argmax(1).reshape(z.shape[:-1]), loss


def router(quantizer, z, p):
    """Top-1 softmax router.

    dense: IBQ's one-hot + p - sg(p) (Shi et al. 2024).
    switch: p_code / sg(p_code) (Fedus et al. 2022).
    """
    E = p["book.weight"]
    keys = E if quantizer.tied else p["keys"]
    logits = z @ keys.T + p.get("bias", 0)
    probabilities, codes = torch.softmax(logits, 1), logits.argmax(1)
    hard = onehot(codes, len(E))
    if quantizer.gate == "dense":
        out = hard @ E + (probabilities - probabilities.detach()) @ E.detach()
    else:
        chosen = (hard * probabilities).sum(1, keepdim=True)
        out = hard @ E * (chosen / chosen.detach())
    loss = z.new_zeros(())
    if quantizer.alpha:
        q = hard @ E
        to_z, to_q = (z - q.detach()).pow(2).mean(), (q - z.detach()).pow(2).mean()
        loss = quantizer.alpha * ((1 - quantizer.beta) * to_z + quantizer.beta * to_q)
    if quantizer.double_loss:
        q = hard @ E
        pulls = (out - z).pow(2) + (z - q.detach()).pow(2) + 0.25 * (q - z.detach()).pow(2)
        loss = loss + quantizer.double_loss * pulls.mean()
    if quantizer.entropy:
        t = torch.softmax(logits / quantizer.entropy_temperature, 1)
        log_mean = (t.mean(0) + quantizer.entropy_eps).log()
        each, joint = (t * t.log()).sum(1).mean(), (t.mean(0) * log_mean).sum()
        loss = loss + quantizer.entropy * (joint - each)
    return out, codes, loss


def released_ibq(z, E, beta=0.25, weight=0.05, temperature=0.01, eps=1e-5):
    """IBQ by its public formulas: z_q, code, loss.

    One-hot + p - sg(p) times the table; the double quantization loss; the entropy term, 1e-5 inside
    the logarithm of its mean.
    """
    logits = z @ E.T
    p, codes = torch.softmax(logits, 1), logits.argmax(1)
    hard = onehot(codes, len(E))
    z_q, q = (hard - p.detach() + p) @ E, hard @ E
    loss = (z_q - z).pow(2).mean() + (q.detach() - z).pow(2).mean()
    loss = loss + beta * (q - z.detach()).pow(2).mean()
    log_t = torch.log_softmax(logits / temperature, 1)
    t = log_t.exp()
    of_mean = -(t.mean(0) * (t.mean(0) + eps).log()).sum()
    return z_q, codes, loss + weight * (-(t * log_t).sum(1).mean() - of_mean)


def sq_started(dim, num_codes, variant, **keywords):
    "SQ-VAE after some training: a head that is not zero and a scale that decides something."
    quantizer = SQQuantizer(dim, num_codes, variant, **keywords)
    with torch.no_grad():
        quantizer.log_scale.fill_(math.log(0.7))
        if quantizer.head is not None:
            for parameter in quantizer.head.parameters():
                parameter.normal_(0, 0.3)
    return quantizer


def built(kind, **keywords):
    return partial(started, kind=kind, keywords=keywords)


def started(dim, num_codes, kind, keywords):
    "As built, but for a router's bias, which starts at 0 and would hide what is done with it."
    quantizer = kind(dim, num_codes, **keywords)
    if getattr(quantizer, "bias", None) is not None:
        torch.nn.init.normal_(quantizer.bias)
    return quantizer


ALL = dict(
    tied=True, bias=True, alpha=1.25, entropy=0.1, entropy_temperature=0.5, init_scale=1.0,
    double_loss=1.0, entropy_eps=1e-5,
)
WIDER = dict(gate="switch", bias=True, code_dim=19)
ORACLES = {
    "gumbel": (built(GumbelQuantizer, kl=0.3), gumbel),
    "gumbel (cold)": (built(GumbelQuantizer, temperature=0.5), gumbel),
    "gumbel (soft)": (built(GumbelQuantizer, kl=0.3, hard=False), gumbel),
    "gumbel (reinmax)": (built(GumbelQuantizer, kl=0.3, estimator="reinmax"), gumbel),
    "gumbel (reinmax, hot)": (built(GumbelQuantizer, estimator="reinmax", temperature=1.5), gumbel),
    **{f"sq ({variant})": (partial(sq_started, variant=variant), sq) for variant in (1, 2, 3, 4)},
    "sq (weighted, cold)": (partial(sq_started, variant=4, weight=0.1, temperature=0.4), sq),
    "router": (built(RouterQuantizer), router),
    "router (bias)": (built(RouterQuantizer, bias=True), router),
    "router (copy)": (built(RouterQuantizer, init="copy", init_scale=2.0), router),
    "router (wider)": (built(RouterQuantizer, code_dim=19, bias=True), router),
    "router (narrower)": (built(RouterQuantizer, code_dim=1), router),
    "router (commitment)": (built(RouterQuantizer, alpha=5.0, beta=0.9), router),
    "router (entropy)": (built(RouterQuantizer, entropy=0.3, entropy_temperature=0.5), router),
    "router + tied": (built(RouterQuantizer, tied=True), router),
    "router (double)": (built(RouterQuantizer, double_loss=0.7), router),
    "router (eps)": (
        built(RouterQuantizer, entropy=0.3, entropy_temperature=0.5, entropy_eps=0.05),
        router,
    ),
    "router + tied (double)": (built(RouterQuantizer, tied=True, double_loss=1.0), router),
    "router + switch (double)": (built(RouterQuantizer, gate="switch", double_loss=1.0), router),
    "router + tied (all)": (built(RouterQuantizer, **ALL), router),
    "router + switch": (built(RouterQuantizer, gate="switch"), router),
    "router + switch (bias, wider)": (built(RouterQuantizer, **WIDER), router),
    "router + switch + tied": (built(RouterQuantizer, gate="switch", tied=True, bias=True), router),
}
