"""Several processes: statistics and every shared random choice agree across ranks, and equal those of one process on the joined batch."""
import time
from functools import partial
import pytest
import torch
import torch.distributed as dist
from processes import in_processes, share
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer
from vqstudy.ranks import total
from vqstudy.vector import VectorQuantizer

UNEVEN = {2: [5, 3], 3: [2, 5, 1]}  # pictures of each rank


def add_up(rank): return total(torch.tensor([rank, 1])), torch.get_num_threads(), dist.get_world_size()
def raise_on_one(rank):
    if rank == 1: raise KeyError("the second process fails")
    dist.barrier()
def hang_on_one(rank):
    if rank == 1: time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize("world", [2, 3])
def test_every_process_answers(world, tmp_path):
    for sum_, threads, size in in_processes(world, tmp_path, add_up):
        assert sum_.tolist() == [sum(range(world)), world] and threads == 1 and size == world


def test_a_failure_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"\[1\] failed(.|\n)*the second process fails"): in_processes(2, tmp_path, raise_on_one)


def test_a_hang_is_a_failure(tmp_path):
    with pytest.raises(TimeoutError, match="had not ended after 8 s"): in_processes(2, tmp_path, hang_on_one, timeout=8)


def test_share_refuses_an_empty_part():
    assert [len(part) for part in share(torch.zeros(8, 2), [5, 3])] == [5, 3]
    for sizes in ([4, 0], [8, 0], [3, 3]):
        with pytest.raises(ValueError, match="add up to"): share(torch.zeros(4 if sum(sizes) == 4 else 8, 2), sizes)


BUILD = {
    "vq": VectorQuantizer,
    "vq + ema": partial(VectorQuantizer, decay=0.9),
    "group + ema": partial(GroupQuantizer, make=partial(VectorQuantizer, decay=0.9)),
    "residual + ema": partial(ResidualQuantizer, levels=3, make=partial(VectorQuantizer, decay=0.9)),
    "residual + shared + ema": partial(ResidualQuantizer, levels=3, shared=True, make=partial(VectorQuantizer, decay=0.9)),
    "multiscale + ema": partial(MultiScaleQuantizer, make=partial(VectorQuantizer, decay=0.9)),
}


def steps(rank, name, batches):
    "Training steps on this rank's parts (None: on all of each batch, in one process); outputs of the last step, and the state after it."
    torch.manual_seed(0)
    quantizer = BUILD[name](4, 8).double().train()
    for parts in batches: out = quantizer(torch.cat(parts) if rank is None else parts[rank])
    return out.z_q.detach(), out.codes, quantizer.state_dict()


def all_steps(rank, batches): return {name: steps(rank, name, batches) for name in BUILD}


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    "Batches, and what each rank made of its parts of them: one start of the processes for all quantizers."
    torch.manual_seed(1)
    batches = [share(torch.randn(8, 4, 2, 4, dtype=torch.float64), UNEVEN[request.param]) for _ in range(3)]
    return batches, in_processes(request.param, tmp_path_factory.mktemp("run"), all_steps, batches)


@pytest.mark.parametrize("name", BUILD)
def test_ranks_agree_with_one_process(name, run):
    batches, outs = run
    q, codes, state = steps(None, name, batches)
    assert torch.equal(torch.cat([out[name][1] for out in outs]), codes) and torch.allclose(torch.cat([out[name][0] for out in outs]), q, atol=1e-12)
    for out in outs:
        for key, value in state.items(): assert torch.equal(out[name][2][key], outs[0][name][2][key]) and torch.allclose(out[name][2][key], value, atol=1e-12)


def random_steps(rank, parts):
    "Replacement and dropout inside: random choices that change shared state, and one that does not."
    torch.manual_seed(100 + rank)
    quantizer = ResidualQuantizer(4, 8, 3, partial(VectorQuantizer, decay=0.9, life_span=2), dropout=True).train()
    for _ in range(8): quantizer(parts[rank])
    return quantizer.state_dict()


def test_replacement_inside_is_the_same_on_every_rank(tmp_path):
    torch.manual_seed(1)
    first, *others = in_processes(2, tmp_path, random_steps, share(20 + torch.randn(8, 4, 2, 4), [5, 3]))
    for state in others: assert all(torch.equal(v, first[k]) for k, v in state.items())
