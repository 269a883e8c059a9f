"""Agreement of how a code is chosen: soft assignments, grids, perturbations, transport."""

from collections.abc import Callable
from functools import partial
import math
import torch
import torch.nn.functional as F
from torch import Tensor, nn
import oracles_authors as authors
from beside import COLUMNS, D, K, N, Row, beside, larger, sample, table_of
from oracles_authors import BSQ, DIVEQ, FSQ, NSVQ, OPTVQ, SEED_VOKEN, SIMVQ, SQVAE, TAMING
from vqstudy import lattice
from vqstudy.codebook import LinearMap
from vqstudy.quantizers import recipe
from vqstudy.router import RouterQuantizer
from vqstudy.transport import sinkhorn
from vqstudy.vector import VectorQuantizer

# ---- soft assignment ----


def sqvae(variant: int, as_released: bool = False) -> dict[str, float]:
    "Of four images; the variance away from its start."
    quantizer = recipe("sq", D, K, variant=variant)
    scale = math.log(0.7)
    nn.init.constant_(quantizer.log_scale, scale)
    if quantizer.head is not None:
        for parameter in quantizer.head.parameters():
            nn.init.normal_(parameter, 0, 0.3)

    def theirs(z, p):
        log_var, log_scale = None, p["log_scale"]
        if variant > 1:
            log_var = z @ p["head.weight"].T + p["head.bias"]
        elif not as_released:
            # their 1 + exp(s) as an exp(s) of ours
            log_scale = (log_scale.exp() - 1).log()
        variance = authors.sqvae_variance(variant, log_var, log_scale)
        return authors.sqvae(z, table_of(p), variance)

    if variant == 1 and not as_released:
        nn.init.constant_(quantizer.log_scale, math.log1p(math.exp(scale)))
    return beside(quantizer, theirs, sample().view(4, -1, D))


def ibq(eps: float) -> dict[str, float]:
    options = {"tied": True, "alpha": 1.25, "beta": 0.2, "entropy": 0.05, "init_scale": 0.3}
    theirs = lambda z, p: authors.ibq(z, table_of(p), eps=eps)
    soft = lambda z, z_q: F.mse_loss(z_q, z)
    return beside(RouterQuantizer(D, K, **options), theirs, sample(0.3), soft)


def naive_router() -> dict[str, float]:
    theirs = lambda z, p: (authors.router(z, p["keys"], table_of(p)), 0.0)
    return beside(recipe("router", D, 4096), theirs)


def gumbel() -> dict[str, float]:
    names = ("book.weight", "head.weight", "head.bias")
    theirs = lambda z, p: authors.taming_gumbel(z, *(p[name] for name in names))
    return beside(recipe("gumbel", D, K, kl=5e-4), theirs)


GAUSSIAN = f"{SQVAE}, `GaussianVectorQuantizer`"
DOUBLE = "`RouterQuantizer(tied=True, alpha=1.25, beta=0.2, entropy=0.05)`, and `mse_loss(z_q, z)`"
SOFT = [
    Row(
        "SQ-VAE, Gaussian I",
        f"{GAUSSIAN}, gaussian_1",
        "`sq, variant=1`",
        partial(sqvae, 1, as_released=True),
        "theirs: the variance is 1 + exp(s), as a log-variance of 0 is added; ours: a learned "
        "scalar alone, exp(s), as in the paper",
        dict.fromkeys(COLUMNS, (1e-6, 1e6)),
    ),
    Row(
        "the same, with a log_scale of log(1 + exp(s))",
        f"{GAUSSIAN}, gaussian_1",
        "`sq, variant=1`, `log_scale` set so",
        partial(sqvae, 1),
        "the parameter is another one: there the variance stays above 1",
    ),
    Row(
        "SQ-VAE, Gaussian II",
        f"{GAUSSIAN}, gaussian_2",
        "`sq, variant=2`",
        partial(sqvae, 2),
        "theirs takes latents of 8 x 8 alone. In II to IV its log-variance is an output of the "
        "encoder, ours a linear map of z",
    ),
    Row("SQ-VAE, Gaussian III", f"{GAUSSIAN}, gaussian_3", "`sq, variant=3`", partial(sqvae, 3)),
    Row(
        "SQ-VAE, Gaussian IV",
        f"{GAUSSIAN}, gaussian_4",
        "`sq, variant=4`",
        partial(sqvae, 4),
        "theirs adds 1e-10 where it draws its noise; in these rows both have the same noise",
    ),
    Row(
        "IBQ",
        f"{SEED_VOKEN}, `IndexPropagationQuantize`",
        DOUBLE,
        partial(ibq, eps=1e-5),
        "theirs adds 1e-5 inside the logarithm of the mean probability; its loss has a third "
        "term, of the soft path, which is added here by hand",
        dict.fromkeys(("loss", "z", "codebook"), (1e-9, 1e-2)),
    ),
    Row(
        "the same, without the 1e-5",
        f"{SEED_VOKEN}, `IndexPropagationQuantize`",
        DOUBLE,
        partial(ibq, eps=0.0),
    ),
    Row(
        "Router of 4,096 codes",
        "the naive form, n x k matrices",
        "`router`",
        naive_router,
        "gradients of W included",
    ),
    Row(
        "Gumbel-softmax",
        f"{TAMING}, `GumbelQuantize`",
        "`gumbel, kl=0.0005`",
        gumbel,
        "theirs adds 1e-10 inside the logarithm of the divergence",
    ),
]


# ---- grids ----

WIDTH = 6  # signs


def lfq(eps: float) -> dict[str, float]:
    theirs = lambda z, p: authors.lfq(z, eps=eps)
    return beside(recipe("lfq", D, 2**WIDTH), theirs, sample(0.05))


def over_root(z: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    "Straight-through over the root of the width: the gradient of bsq-vit."
    return g / z.shape[1] ** 0.5, torch.zeros_like(g)


def bsq(eps: float, group: int = 1, **options) -> dict[str, float]:
    "Their gamma0 1, gamma .8, zeta .1, inverse temperature 2, beta .3."
    theirs = lambda z, p: authors.bsq(z, 0.3, 1.0, 0.8, 0.1, 2.0, group, eps)
    settings = {"entropy": 0.05, "diversity": 0.8, "temperature": 0.5, "commitment": 0.3 * WIDTH}
    return beside(lattice.BSQ(D, 2**WIDTH, group=group, **settings, **options), theirs)


def fsq() -> dict[str, float]:
    levels = [8, 5, 5, 4, 3, 2]
    theirs = lambda z, p: (authors.fsq(z, levels), 0.0)
    return beside(recipe("fsq", D, math.prod(levels), levels=levels), theirs)


GRIDS = [
    Row(
        "LFQ",
        f"{SEED_VOKEN}, `LFQ`",
        "`lfq`",
        partial(lfq, eps=1e-5),
        "theirs adds 1e-5 inside the logarithm of the mean probability",
        dict.fromkeys(("loss", "z"), (1e-9, 1e-2)),
    ),
    Row("the same, without the 1e-5", f"{SEED_VOKEN}, `LFQ`", "`lfq`", partial(lfq, eps=0.0)),
    Row(
        "BSQ",
        f"{BSQ}, `BinarySphericalQuantizer`",
        "`bsq`: entropy = zeta gamma0 / t, diversity = gamma / gamma0, temperature = 1 / t, "
        "commitment = w beta",
        partial(bsq, eps=1e-8),
        "t their inv_temperature, w the width. Ours sends sqrt(w) times their gradient: they scale the signs "
        "after straight-through; `rule` takes that factor out. Theirs adds 1e-8 inside logarithms, "
        "and counts the first sign as the highest bit",
        {"z": (1e-3, 10.0), "loss": (1e-11, 1e-6)},
    ),
    Row(
        "the same, the gradient over sqrt(w), without the 1e-8",
        f"{BSQ}, `BinarySphericalQuantizer`",
        "`BSQ(rule=...)`: straight-through over sqrt(w)",
        partial(bsq, eps=0.0, rule=over_root),
    ),
    Row(
        "the same, groups of three signs",
        f"{BSQ}, `BinarySphericalQuantizer(group_size=3)`",
        "`BSQ(group=3, rule=...)`",
        partial(bsq, eps=0.0, group=3, rule=over_root),
    ),
    Row("FSQ", f"{FSQ}, fsq.ipynb (jax)", "`fsq`", fsq),
]


# ---- the rest ----


class Biased(LinearMap):
    "SimVQ's map with the bias that the authors' linear layer has."

    def __init__(self, dim: int):
        super().__init__(dim)
        self.linear = nn.Linear(dim, dim)


def simvq(kind: type[LinearMap]) -> dict[str, float]:
    "The bias away from 0."
    quantizer = VectorQuantizer(D, K, map=kind(D), alpha=1.25, beta=0.2)
    frozen = quantizer.book.weight.double()
    torch.manual_seed(2)
    bias = nn.init.normal_(torch.empty(D, dtype=torch.float64), 0, 0.3)
    if kind is Biased:
        quantizer.book.map.linear.bias.data.copy_(bias)
    name = "book.map.linear"
    theirs = lambda z, p: authors.simvq(z, frozen, p[f"{name}.weight"], p.get(f"{name}.bias", bias))
    return beside(quantizer, theirs)


def simvq_at_zero() -> dict[str, float]:
    "Their bias at 0: what the weight gets."
    quantizer = recipe("simvq", D, K, alpha=1.25, beta=0.2)
    frozen, bias = quantizer.book.weight.double(), torch.zeros(D, dtype=torch.float64)
    theirs = lambda z, p: authors.simvq(z, frozen, p["book.map.linear.weight"], bias)
    return beside(quantizer, theirs)


def perturbed(spec: str, theirs: Callable, **settings) -> dict[str, float]:
    "Their NSVQ and DiVeQ have no loss, as ours."
    return beside(recipe(spec, D, K, **settings), lambda z, p: (theirs(z, table_of(p)), 0.0))


def plans(eps: float) -> dict[str, float]:
    "The plans of one cost; value: of the plans, with rows that sum to 1."
    cost = authors.optvq_cost(sample(), sample(n=K))
    ours, theirs = N * sinkhorn(cost, 0.1, 5), authors.optvq_plan(cost, eps=eps)
    return {"value": larger(ours, theirs)}


def optvq(eps: float, far: float = 0.0) -> dict[str, float]:
    "1,024 vectors and 256 codes, of which one may be far away."
    quantizer = recipe("optvq", D, 256, alpha=1.25, beta=0.2)
    quantizer.book.weight.data[0] += far
    theirs = lambda z, p: authors.optvq(z, table_of(p), eps=eps)
    return beside(quantizer, theirs, sample(n=1024))


SINKHORN = f"{OPTVQ}, `VectorQuantizerSinkhorn`"
LINEAR = f"{SIMVQ}, `SimVQ`"
REST = [
    Row(
        "SimVQ, its bias at 0",
        LINEAR,
        "`simvq, alpha=1.25, beta=0.2`",
        simvq_at_zero,
        "legacy=True, as it comes: 0.25 weighs the codebook's term",
    ),
    Row(
        "SimVQ, its bias trained",
        LINEAR,
        "`simvq, alpha=1.25, beta=0.2`",
        partial(simvq, LinearMap),
        "theirs is a linear layer with a bias, ours (and the paper's) without",
        dict.fromkeys(COLUMNS, (1e-3, 10.0)),
    ),
    Row(
        "the same, a bias here too",
        LINEAR,
        "`VectorQuantizer(map=...)`: a `LinearMap` whose `linear` has a bias",
        partial(simvq, Biased),
    ),
    Row(
        "NSVQ",
        f"{NSVQ}, `NSVQ`",
        "`vq + nsvq`",
        lambda: perturbed("vq + nsvq", authors.nsvq),
        "theirs adds 1e-12 to the noise's length",
        dict.fromkeys(("value", "z", "codebook"), (1e-14, 1e-11)),
    ),
    Row(
        "the same, without the 1e-12",
        f"{NSVQ}, `NSVQ`",
        "`vq + nsvq`",
        lambda: perturbed("vq + nsvq", partial(authors.nsvq, eps=0.0)),
    ),
    Row(
        "DiVeQ",
        f"{DIVEQ}, `DIVEQ`; package diveq 0.1",
        "`vq + diveq`",
        lambda: perturbed("vq + diveq", authors.diveq),
        "theirs takes `noise_var` as the standard deviation: variance=noise_var**2 here",
        dict.fromkeys(("value", "z", "codebook"), (1e-4, 1.0)),
    ),
    Row(
        "the same, with that variance",
        f"{DIVEQ}, `DIVEQ`",
        "`vq + diveq, variance=1e-06`",
        lambda: perturbed("vq + diveq", authors.diveq, variance=1e-6),
    ),
    Row(
        "OptVQ's plan",
        f"{OPTVQ}, `sinkhorn`",
        "`sinkhorn(cost, epsilon=0.1, iterations=5)`",
        partial(plans, eps=1e-8),
        "theirs adds 1e-8 to every sum that it divides by; epsilon=10 there is 1/10 here",
        {"value": (1e-4, 1.0)},
    ),
    Row(
        "the same, without the 1e-8",
        f"{OPTVQ}, `sinkhorn`",
        "`sinkhorn(cost, epsilon=0.1, iterations=5)`",
        partial(plans, eps=0.0),
    ),
    Row(
        "OptVQ, 1,024 vectors and 256 codes",
        f"{SINKHORN}, use_prob=False, loss_q_type='l2'",
        "`optvq, alpha=1.25, beta=0.2`",
        partial(optvq, 1e-8),
        "the settings of their configurations; by itself the class draws codes from the plan, "
        "has a cross-entropy for its loss, and keeps the plan in evaluation, where ours takes the "
        "nearest code. Its codebook is a linear map of a learned table",
        dict.fromkeys(COLUMNS, (1e-6, 10.0)),
    ),
    Row(
        "the same, without the 1e-8",
        f"{SINKHORN}, use_prob=False, loss_q_type='l2'",
        "`optvq, alpha=1.25, beta=0.2`",
        partial(optvq, 0.0),
    ),
    Row(
        "the same, one code far away",
        f"{SINKHORN}, use_prob=False, loss_q_type='l2'",
        "`optvq, alpha=1.25, beta=0.2`",
        partial(optvq, 1e-8, far=20.0),
        "the 1e-8 outweighs what such a code is given, so that theirs leaves it out; ours gives "
        "every code its share",
        dict.fromkeys(COLUMNS, (1e-6, 1e3)),
    ),
]
