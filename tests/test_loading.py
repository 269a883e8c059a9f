"""What a load brings into the grid quantizers, and what they work out again by themselves."""

import copy
import pytest
import torch
from torch import Tensor, nn
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer
from vqstudy.lattice import BSQ, FSQ, LFQ

DIM, K = 8, 256
GRIDS = {
    "fsq": lambda: FSQ(DIM, 1000, levels=[8, 5, 5, 5]),
    "fsq without projections": lambda: FSQ(4, 1000, levels=[8, 5, 5, 5]),
    "lfq": lambda: LFQ(DIM, 64),
    "lfq without projections": lambda: LFQ(DIM, K),
    "bsq": lambda: BSQ(DIM, 64),
    "bsq without projections": lambda: BSQ(DIM, K),
    "groups of fsq": lambda: GroupQuantizer(DIM, 64, make=FSQ),
    "levels of bsq": lambda: ResidualQuantizer(DIM, 64, make=BSQ),
    "scales of lfq": lambda: MultiScaleQuantizer(DIM, 64, make=LFQ),
}
grids = pytest.mark.parametrize("name", GRIDS)


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GRIDS[name]().eval()


def same_results(one: nn.Module, other: nn.Module) -> bool:
    torch.manual_seed(1)
    z = torch.randn(2, 4, 4, one.dim)
    results = one(z), other(z)
    decoded = one.decode(results[0].codes), other.decode(results[1].codes)
    pairs = [*zip(*results), decoded]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def as_rubbish(like: Tensor, **options) -> Tensor:
    "What `empty_like` may find in memory."
    return torch.full_like(like, 77, **options)


def emptied(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    "The module after the meta device, its memory full of rubbish."
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", as_rubbish)
        return module.to("meta").to_empty(device="cpu")


def before_levels_were_kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("sizes")}


@pytest.mark.parametrize("old", [False, True])
@grids
def test_after_to_empty_a_load_is_enough(name, old, monkeypatch):
    first = build(name)
    second = emptied(build(name, 1), monkeypatch)
    state = first.state_dict()
    second.load_state_dict(before_levels_were_kept(state) if old else state)
    assert same_results(first, second)


@pytest.mark.parametrize("old", [False, True])
@grids
def test_assigned_to_a_module_on_the_meta_device(name, old):
    first = build(name)
    with torch.device("meta"):
        second = GRIDS[name]().eval()
    state = first.state_dict()
    if old:
        state = before_levels_were_kept(state)
        if not state:
            pytest.skip("a state without any tensor does not say where to")
    second.load_state_dict(state, assign=True)
    assert same_results(first, second)


@pytest.mark.parametrize("name", ["fsq", "bsq", "groups of fsq"])
def test_assigned_weights_bring_their_dtype(name):
    first, second = build(name).bfloat16(), build(name, 1)
    second.load_state_dict(first.state_dict(), assign=True)
    assert same_results(first, second)


@pytest.mark.parametrize("name", [name for name in GRIDS if "without projections" in name])
def test_built_under_inference_mode_it_moves(name):
    with torch.inference_mode():
        module = build(name)
    assert same_results(module.to("cpu"), build(name))


OTHER_LEVELS = [
    (lambda: FSQ(DIM, 1000, levels=[8, 5, 5, 5]), lambda: FSQ(DIM, 1000, levels=[5, 5, 5, 8])),
    (lambda: FSQ(3, 60, levels=[3, 4, 5]), lambda: FSQ(3, 60, levels=[5, 4, 3])),
    (lambda: FSQ(DIM, 16, levels=[2] * 4), lambda: FSQ(DIM, 256, levels=[4] * 4)),
    (lambda: LFQ(DIM, 16), lambda: FSQ(DIM, 256, levels=[4] * 4)),
    (
        lambda: GroupQuantizer(DIM, 60, make=lambda d, k: FSQ(d, k, [3, 4, 5])),
        lambda: GroupQuantizer(DIM, 60, make=lambda d, k: FSQ(d, k, [4, 3, 5])),
    ),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved,built", OTHER_LEVELS)
def test_a_state_of_other_levels_is_refused(saved, built, assign):
    module = built()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="the state is of levels .* build it with the former"):
        module.load_state_dict(saved().state_dict(), strict=False, assign=assign)
    sizes = {key: value for key, value in before.items() if key.endswith("sizes")}
    after = module.state_dict()
    assert sizes and all(torch.equal(after[key], value) for key, value in sizes.items())
