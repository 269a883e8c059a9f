"""Agreement with vector-quantize-pytorch, which runs here; `test_peers` has what goes wrong."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
import math
from torch import nn
from torch.func import functional_call
from agreement_codes import WIDTH
from agreement_tables import DECAY, STEPS, averaged, with_rule
from beside import D, K, Row, Theirs, beside, sample
from vqstudy.estimators import rotation
from vqstudy.quantizers import recipe
from vqstudy.vector import VectorQuantizer

def package() -> str:
    "Its name and version."
    try:
        return f"vector-quantize-pytorch {version('vector-quantize-pytorch')}"
    except PackageNotFoundError:
        return "vector-quantize-pytorch, not installed"


def called(module: nn.Module, names: dict[str, str]) -> Theirs:
    "A module of theirs, in training, with our parameters under their names."

    def theirs(z, p):
        module.to(z.dtype).train()
        state = {name: p[ours] for name, ours in names.items()}
        embed = state.get("_codebook.embed")
        if embed is not None:
            state["_codebook.embed"] = embed[None]  # a codebook per head
        value, *_, loss = functional_call(module, state, (z[None],))
        return value[0], loss.sum()

    return theirs


def their_table(ours: VectorQuantizer, **options) -> dict[str, float]:
    "Of a codebook that learns by gradient; their module is float32 inside."
    from vector_quantize_pytorch import VectorQuantize

    learned = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False}
    module = VectorQuantize(D, K, **learned, threshold_ema_dead_code=1e-9, **options)
    return beside(ours, called(module, {"_codebook.embed": "book.weight"}), sample().float())


def their_average(z, table, counts, sums, step):
    "One step of their moving averages."
    from vector_quantize_pytorch import VectorQuantize

    module = VectorQuantize(D, K, decay=DECAY, threshold_ema_dead_code=0, rotation_trick=False)
    book = module.train()._codebook
    for name, x in (("embed", table), ("cluster_size", counts), ("embed_avg", sums)):
        getattr(book, name).data.copy_(x[None])
    module(z.float()[None])
    return tuple(x[0].double() for x in (book.embed, book.cluster_size, book.embed_avg))


def their_simvq() -> dict[str, float]:
    from vector_quantize_pytorch import SimVQ

    ours, module = recipe("simvq", D, K), SimVQ(D, K, rotation_trick=False)
    module.frozen_codebook.copy_(ours.book.weight)
    return beside(ours, called(module, {"code_transform.weight": "book.map.linear.weight"}))


def their_rotation() -> dict[str, float]:
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    return with_rule(rotation(), rotate_to)


def their_lfq() -> dict[str, float]:
    from vector_quantize_pytorch import LFQ

    weights = {"entropy_loss_weight": 0.1, "commitment_loss_weight": 0.25}
    module = LFQ(dim=D, codebook_size=2**WIDTH, force_quantization_f32=False, **weights)

    def theirs(z, p):
        value, _, loss = module.double().train()(z[None], inv_temperature=2.0)
        return value[0], loss

    return beside(recipe("lfq", D, 2**WIDTH, temperature=0.5), theirs)


def their_fsq() -> dict[str, float]:
    from vector_quantize_pytorch import FSQ

    levels = [8, 5, 5, 5, 4, 3]
    module = FSQ(levels, force_quantization_f32=False).double()
    theirs = lambda z, p: (module(z[None])[0][0], 0.0)
    return beside(recipe("fsq", D, math.prod(levels), levels=levels), theirs, sample(n=4096))


FLOAT32 = 1e-5  # their modules with a table compute in float32
SYNC = {"alpha": 2.0, "beta": 0.5, "nu": 0.2}
DIRECTION = {"directional_reparam": True, "directional_reparam_variance": 1e-3}
PACKAGE = [
    Row(
        f"Moving averages, {STEPS} steps",
        f"{package()}, `VectorQuantize`",
        "`vq + ema`",
        partial(averaged, their_average),
        "begins as ours does; float32 inside",
        most=FLOAT32,
    ),
    Row(
        "A codebook that learns by gradient",
        f"{package()}, `VectorQuantize(learnable_codebook=True, ema_update=False)`",
        "`vq, alpha=2.0, beta=0.5`",
        lambda: their_table(recipe("vq", D, K, alpha=2.0, beta=0.5)),
        "their one term goes to both ends: the loss shows half of ours, the gradients are the "
        "same; float32 inside",
        {"loss": (1e-2, 10.0)},
        FLOAT32,
    ),
    Row(
        "Synchronized update",
        f"{package()}, `VectorQuantize(sync_update_v=0.2)`",
        "`vq + sync, alpha=2.0, beta=0.5, nu=0.2`",
        lambda: their_table(recipe("vq + sync", D, K, **SYNC), sync_update_v=0.2),
        "theirs adds the term after straight-through: the encoder gets 1.2 g, the codebook "
        "nothing. No setting",
        dict.fromkeys(("loss", "z", "codebook"), (1e-2, 10.0)),
        FLOAT32,
    ),
    Row(
        "DiVeQ",
        f"{package()}, `VectorQuantize(directional_reparam=True)`",
        "`vq + diveq, variance=0.001`",
        lambda: their_table(recipe("vq + diveq", D, K), commitment_weight=0.0, **DIRECTION),
        "there it is a variance, by default 5e-3; float32 inside",
        most=FLOAT32,
    ),
    Row(
        "Rotation",
        f"{package()}, `rotate_to`",
        "`vq + rotation`",
        their_rotation,
        "lengths below 1e-6 are taken for 1e-6 there",
    ),
    Row("SimVQ", f"{package()}, `SimVQ(rotation_trick=False)`", "`simvq`", their_simvq),
    Row(
        "LFQ",
        f"{package()}, `LFQ(entropy_loss_weight=0.1, commitment_loss_weight=0.25)`",
        "`lfq, temperature=0.5`",
        their_lfq,
        "inv_temperature=2. Theirs cuts probabilities off at 1e-5 inside logarithms, and counts "
        "the first sign as the highest bit",
        dict.fromkeys(("loss", "z"), (1e-9, 1e-2)),
    ),
    Row(
        "FSQ",
        f"{package()}, `FSQ`",
        "`fsq`",
        their_fsq,
        "theirs bounds by 1 + 1e-3 and shifts by artanh, the authors by 1 - 1e-3 and tan: a vector "
        "beside a border has the next code",
        {"value": (0.1, 1.1), "z": (1e-3, 1.0)},
    ),
]
