"""What the authors' public code computes, from its formulas, in float64 and in the plainest way.

z (n, d) and the tables are leaves. A quantizer returns (value, loss): what the decoder gets, as
an expression with the gradient that their code sends, and the loss as they weigh it. A constant
that their code adds and the formula has not, such as an epsilon in a logarithm, is an argument;
0 leaves it out. `agreement.py` sets each of them beside ours.
"""

import torch
import torch.nn.functional as F

# repository@commit, as read
TAMING = "CompVis/taming-transformers@3ba01b2"
SONNET = "google-deepmind/sonnet@26b0518"
ZALANDO = "zalandoresearch/pytorch-vq-vae@b98fde9"
ROSINALITY = "rosinality/vq-vae-2-pytorch@ef5f67c"
VQTORCH = "minyoungg/vqtorch@02e60a1"
ROTATION = "cfifty/rotation_trick@9910492"
SQVAE = "sony/sqvae@dc88ab1"
SEED_VOKEN = "TencentARC/SEED-Voken@b9a17ea"
BSQ = "zhaoyue-zephyrus/bsq-vit@37d212d"
FSQ = "google-research/google-research@5e78683"
SIMVQ = "youngsheen/SimVQ@d8bd94d"
NSVQ = "MHVali/Noise-Substitution-in-Vector-Quantization@c938291"
DIVEQ = "AaltoML/DiVeQ@9b288d0"
OPTVQ = "zbr17/OptVQ@b71895c"


def mse(a, b):
    return (a - b).pow(2).mean()


def nearest(z, table):
    return (z[:, None] - table).pow(2).sum(2).argmin(1)


def through(z, q):
    "q, with the gradient of z."
    return z + (q - z).detach()


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def xlog(p, eps):
    "p log(p + eps), which is 0 at p = 0."
    return torch.special.xlogy(p, p + eps)


# ---- a table and its losses ----


def vq(z, table, to_z, to_table):
    "mse with the table held constant, weighted by to_z, and with z held constant, by to_table."
    q = table[nearest(z, table)]
    return through(z, q), to_z * mse(q.detach(), z) + to_table * mse(q, z.detach())


def taming(z, table, beta=0.25, legacy=True):
    "taming's `VectorQuantizer` and `VectorQuantizer2`: as it comes, beta is the table's weight."
    return vq(z, table, 1.0, beta) if legacy else vq(z, table, beta, 1.0)


def taming_gumbel(z, table, weight, bias, temperature=1.0, kl=5e-4, eps=1e-10):
    "taming's `GumbelQuantize`; the noise is the generator's next."
    logits = z @ weight.T + bias
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / temperature).softmax(1)
    hard = F.one_hot(soft.argmax(1), len(table)).double()
    p = logits.softmax(1)
    loss = kl * (p * (p * len(table) + eps).log()).sum(1).mean()
    return (hard - soft.detach() + soft) @ table, loss


def vqtorch(z, table, beta=0.95, nu=0.0):
    "vqtorch's `VectorQuant`; nu is `sync_nu`."
    q = table[nearest(z, table)]
    loss = (1 - beta) * mse(z, q.detach()) + beta * mse(z.detach(), q)
    return through(z, q) + nu * (q - q.detach()), loss


def vqtorch_affine(table, scale, shift, lr):
    "vqtorch's `AffineTransform`, learned: scale and shift (groups, d)."
    parts = zip(table.chunk(len(scale)), scale, shift)
    return torch.cat([(1 + lr * s) * part + lr * b for part, s, b in parts])


def vqtorch_moments(table, z, running, momentum=0.1, eps=1e-8):
    "vqtorch's `AffineTransform` by running statistics: the mapped table, and the new statistics."
    now = [z.mean(0), z.var(0, correction=0), table.mean(0), table.var(0, correction=0)]
    now = [x.detach() for x in now]
    if running is not None:
        now = [momentum * new + (1 - momentum) * old for new, old in zip(now, running)]
    mean_z, var_z, mean_c, var_c = now
    scale = (var_z / (var_c + eps)).sqrt()
    return scale * table - scale * mean_c + mean_z, now


def vqtorch_l2(z, table, beta=0.95):
    "vqtorch with norm='l2', cb_norm='l2c': the stored table is normalised, z in the graph."
    return vqtorch(z / z.norm(dim=1, keepdim=True).clamp_min(1e-6), table, beta)


def vqtorch_in_place(z, table, codes, inner, mapped=lambda table: table):
    """The chosen code vectors after a step of the optimiser that vqtorch keeps inside.

    mapped: the affine map, whose graph the inner backward pass frees.
    """
    used = mapped(table)
    mse(used[codes], z.detach()).backward()
    inner.step()
    inner.zero_grad()
    return used[codes]


# ---- moving averages; each returns the new table, counts and sums ----


def batch_sums(z, table):
    hard = F.one_hot(nearest(z, table), len(table)).double()
    return hard.sum(0), hard.T @ z


def smoothed(counts, eps):
    n = counts.sum()
    return (counts + eps) / (n + len(counts) * eps) * n


def ema(z, table, counts, sums, decay=0.99, eps=1e-5):
    "rosinality, taming's `EMAVectorQuantizer`, the layer of the rotation trick's authors."
    new_counts, new_sums = batch_sums(z, table)
    counts = decay * counts + (1 - decay) * new_counts
    sums = decay * sums + (1 - decay) * new_sums
    return sums / smoothed(counts, eps)[:, None], counts, sums


def ema_sonnet(z, table, counts, sums, step, decay=0.99, eps=1e-5):
    "sonnet divides both averages by 1 - decay^step (step 1 for the first) before it smooths."
    new_counts, new_sums = batch_sums(z, table)
    counts = counts - (counts - new_counts) * (1 - decay)
    sums = sums - (sums - new_sums) * (1 - decay)
    bias = 1 - decay**step
    return sums / bias / smoothed(counts / bias, eps)[:, None], counts, sums


def ema_zalando(z, table, counts, sums, decay=0.99, eps=1e-5):
    "zalando keeps the smoothed counts, and averages those on."
    new_counts, new_sums = batch_sums(z, table)
    counts = smoothed(decay * counts + (1 - decay) * new_counts, eps)
    sums = decay * sums + (1 - decay) * new_sums
    return sums / counts[:, None], counts, sums


# ---- the gradient ----


def turned(x, e, u):
    "(I - 2 w w^T + 2 u e^T) x of each row, the matrix held constant."
    e, u = e.detach(), u.detach()
    w = unit(e + u)
    dot = lambda a: (a * x).sum(1, keepdim=True)
    return x - 2 * w * dot(w) + 2 * u * dot(e)


def mirrored(x, e, u):
    "(I - 2 r r^T) x of each row, the matrix held constant."
    r = unit(e - u).detach()
    return x - 2 * r * (r * x).sum(1, keepdim=True)


def rotated(z, q, eps=1e-6):
    "The rotation trick's VQ-VAE, src/models/vq_vae.py."
    e, u = (x / (x.norm(dim=1, keepdim=True) + eps) for x in (z, q))
    ratio = q.norm(dim=1, keepdim=True) / (z.norm(dim=1, keepdim=True) + eps)
    return turned(z, e, u) * ratio.detach()


def rotated_direction(z, q, turn=turned, scaled=True):
    """Its VQGAN and ViT-VQGAN (tables 3, 4): what is turned is z/|z|, which is not held constant.

    turn: `mirrored` for its `ref_trick`. scaled=False: its `no_grad_scale`.
    """
    e, u = unit(z), unit(q)
    if scaled:
        return turn(e, e, u) * q.norm(dim=1, keepdim=True).detach()
    return through(turn(e, e, u), q)


# ---- soft assignment ----


def sqvae_variance(variant, log_var, log_scale):
    "(n, d) or (n, 1) of SQ-VAE's Gaussian I to IV; log_var (images, positions, 1 or d)."
    if variant == 1:
        log_var = torch.zeros(1, dtype=torch.float64)
    elif variant == 2:
        log_var = log_var.mean((1, 2), keepdim=True).expand_as(log_var).flatten(0, 1)
    else:
        log_var = log_var.flatten(0, 1)
    return log_var.exp() + log_scale.exp()


def sqvae(z, table, variance, temperature=1.0):
    "SQ-VAE's `GaussianVectorQuantizer` of images z (images, positions, d); the next noise."
    images, x = len(z), z.flatten(0, 1)
    weight = 0.5 / variance.clamp_min(1e-10)
    logits = -(weight.expand_as(x)[:, None] * (x[:, None] - table).pow(2)).sum(2)
    noise = -torch.empty_like(logits).exponential_().log()
    value = ((logits + noise) / temperature).softmax(1) @ table
    discrete = (logits.softmax(1) * logits.log_softmax(1)).sum() / images
    continuous = ((x - value).pow(2) * weight).sum() / images
    return value.view_as(z), discrete + continuous


def entropy_loss(logits, temperature, eps):
    "Mean entropy minus entropy of the mean, the latter with log(p + eps) (MAGVIT-v2's code)."
    p = (logits / temperature).softmax(1)
    each = -(p * (logits / temperature).log_softmax(1)).sum(1).mean()
    return each + xlog(p.mean(0), eps).sum()


def ibq(z, table, beta=0.25, entropy=0.05, temperature=0.01, eps=1e-5):
    "SEED-Voken's `IndexPropagationQuantize`, with its entropy loss."
    logits = z @ table.T
    soft = logits.softmax(1)
    hard = F.one_hot(soft.argmax(1), len(table)).double()
    value = (hard - soft.detach() + soft) @ table
    q = hard @ table
    loss = mse(value, z) + mse(q.detach(), z) + beta * mse(q, z.detach())
    return value, loss + entropy * entropy_loss(logits, temperature, eps)


def router(z, keys, table):
    "Naive: logits, probabilities and one-hot vectors, each n x k; the table gets the hard code's."
    p = (z @ keys.T).softmax(1)
    hard = F.one_hot(p.argmax(1), len(table)).double()
    return hard @ table + (p - p.detach()) @ table.detach()


# ---- grids ----


def signs(width):
    "All 2^width patterns of -1 and 1, the first coordinate the fastest."
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * width)
    return patterns.double().view(-1, width).flip(1)


def lfq(z, entropy=0.1, commitment=0.25, temperature=0.01, eps=1e-5):
    "SEED-Voken's `LFQ`; its model weighs the two losses."
    q = torch.where(z > 0, 1.0, -1.0).double()
    logits = 2 * z @ signs(z.shape[1]).T
    loss = entropy * entropy_loss(logits, temperature, eps) + commitment * mse(z, q)
    return through(z, q), loss


def bsq(z, beta=0.0, gamma0=1.0, gamma=1.0, zeta=0.1, inverse=1.0, group=1, eps=1e-8):
    "bsq-vit's `BinarySphericalQuantizer` of normalised z: straight-through, and then scaled."
    x, length = unit(z), z.shape[1] ** 0.5
    q = torch.where(x > 0, 1.0, -1.0).double()
    value = through(x, q) / length
    logits = 2 * x.unflatten(1, (-1, group)) @ signs(group).T / length
    p = (logits * inverse).softmax(2)
    each = -xlog(p, eps).sum((1, 2)).mean()
    of_mean = -xlog(p.mean(0), eps).sum()
    penalty = zeta * (gamma0 * each - gamma * of_mean) / inverse
    return value, beta * (value.detach() - x).pow(2).sum(1).mean() + penalty


def fsq(z, levels, eps=1e-3):
    "The notebook of Mentzer et al."
    sizes = torch.tensor(levels, dtype=torch.float64)
    half = (sizes - 1) * (1 - eps) / 2
    offset = torch.where(sizes % 2 == 1, 0.0, 0.5).double()
    bounded = torch.tanh(z + torch.tan(offset / half)) * half - offset
    return through(bounded, bounded.round()) / (sizes // 2)


# ---- the rest ----


def simvq(z, frozen, weight, bias, beta=0.25):
    "youngsheen's `SimVQ`, legacy=True as it comes: a linear layer with a bias over a frozen table."
    return taming(z, frozen @ weight.T + bias, beta)


def nsvq(z, table, eps=1e-12):
    "NSVQ; the noise is the generator's next."
    q = table[nearest(z, table)]
    noise = torch.randn_like(z)
    length = (z - q).norm(dim=1, keepdim=True)
    return z + length / (noise.norm(dim=1, keepdim=True) + eps) * noise


def diveq(z, table, noise_var=1e-3):
    "`DIVEQ`: `noise_var` is what it takes as the standard deviation; the next noise."
    q = table[nearest(z, table)]
    v = noise_var * torch.randn_like(z) + q - z
    direction = v / v.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return z + (q - z).norm(dim=1, keepdim=True) * direction.detach()


def optvq_plan(cost, epsilon=10.0, iterations=5, eps=1e-8):
    "`sinkhorn` of OptVQ: rows sum to 1; epsilon is the factor of the cost."
    plan = torch.exp(-cost * epsilon)
    plan = plan / (plan.sum() + eps)
    for _ in range(iterations):
        plan = plan / (plan.sum(0) + eps) / plan.shape[1]
        plan = plan / (plan.sum(1, keepdim=True) + eps) / len(plan)
    return plan * len(plan)


def optvq_cost(z, table, eps=1e-6):
    "Distances, standardised, from 0 on."
    distance = (z[:, None] - table).pow(2).sum(2).sqrt().detach()
    distance = (distance - distance.mean()) / (distance.std() + eps)
    return distance - distance.min()


def optvq(z, table, beta=0.25, eps=1e-8):
    "`VectorQuantizerSinkhorn` with the settings of its configurations: use_prob=False, 'l2'."
    codes = optvq_plan(optvq_cost(z, table), eps=eps).argmax(1)
    q = table[codes]
    return through(z, q), mse(z, q.detach()) + beta * mse(q, z.detach())
