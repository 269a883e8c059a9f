"""A quantizer of ours beside a transcription of the authors': the largest differences.

A `Row` is a method: whose code it is, what to write here, and how far the two are apart. Where
they agree, every difference is rounding. Where they do not, the row says in which columns and
between which bounds, and what removes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
import torch
from torch import Tensor
from vqstudy.quantizers import Quantizer, recipe

# the last two are gradients; of moving averages, the last is the table itself
COLUMNS = ("value", "loss", "z", "codebook")
N, D, K = 64, 6, 16  # vectors, width, codes


@dataclass(frozen=True)
class Row:
    "A method of ours and of theirs, side by side."

    method: str
    theirs: str  # repository@commit or package, and the class
    here: str    # what to write here
    compare: Callable[[], dict[str, float]]
    note: str = ""  # what differs, and what removes it
    # of the columns in which they differ: the least and the largest difference
    apart: dict[str, tuple[float, float]] = field(default_factory=dict)
    most: float = 1e-12  # of every other column

    def differences(self) -> dict[str, float]:
        "The largest difference of each column, the same each time; none where theirs cannot run."
        torch.manual_seed(0)  # of what is drawn when a quantizer is made
        return self.compare()


def sample(scale: float = 1.0, n: int = N) -> Tensor:
    "Vectors (n, D)."
    torch.manual_seed(2)
    return scale * torch.randn(n, D, dtype=torch.float64)


def larger(a: Tensor | None, b: Tensor | None) -> float:
    "The largest difference, where no gradient is a gradient of 0."
    if a is None and b is None:
        return 0.0
    a, b = (torch.zeros_like(other) if t is None else t for t, other in ((a, b), (b, a)))
    return float((a - b).detach().abs().max())


Theirs = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor | float]]


def beside(
    quantizer: Quantizer,
    theirs: Theirs,  # takes z and our parameters by name, as leaves
    z: Tensor | None = None,
    added: Callable[[Tensor, Tensor], Tensor] | None = None,  # to our loss, of z and z_q
) -> dict[str, float]:
    "Differences of value, loss, and the gradients of <value, g> + loss."
    z = sample() if z is None else z
    quantizer = quantizer.to(z.dtype).train()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in quantizer.named_parameters()}
    ours, leaf, g = z.clone().requires_grad_(), z.clone().requires_grad_(), torch.randn_like(z)
    torch.manual_seed(1)
    z_q, _, loss = quantizer(ours)
    if added is not None:
        loss = loss + added(ours, z_q)
    ((z_q * g).sum() + loss).backward()
    torch.manual_seed(1)  # the same noise
    value, their_loss = theirs(leaf, leaves)
    ((value * g).sum() + their_loss).backward()
    found = {"value": larger(z_q, value), "loss": larger(loss, torch.as_tensor(their_loss))}
    found["z"] = larger(ours.grad, leaf.grad)
    if leaves:
        pairs = [(p.grad, leaves[name].grad) for name, p in quantizer.named_parameters()]
        found["codebook"] = max(larger(*pair) for pair in pairs)
    return found


def of_recipe(
    method: str, code: str, spec: str, theirs: Theirs, settings: dict | None = None, **options
) -> Row:
    "The row of a recipe with these settings."
    keywords = settings or {}
    here = ", ".join([spec, *(f"{name}={value}" for name, value in keywords.items())])
    compare = lambda: beside(recipe(spec, D, K, **keywords), theirs)
    return Row(method, code, f"`{here}`", compare, **options)


def table_of(p: dict[str, Tensor]) -> Tensor:
    return p["book.weight"]


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(each[name] for each in found) for name in found[0]}
