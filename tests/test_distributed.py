"""Several processes: statistics and shared random choices agree across ranks.

They equal those of one process on the joined batch.
"""

import copy
import pickle
import time
from dataclasses import dataclass, field
from functools import cache, partial
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from processes import in_processes, share
from vqstudy.codebook import Affine, MovingAffine
from vqstudy.composed import GroupQuantizer, MultiScaleQuantizer, ResidualQuantizer
from vqstudy.deferred import DeferredQuantizer
from vqstudy.diversity import diversity
from vqstudy.lattice import BSQ, FSQ, LFQ
from vqstudy.measure import Monitor, gradient_gap
from vqstudy.quantizers import keywords, recipe, recipes
from vqstudy.ranks import from_first, total
from vqstudy.router import RouterQuantizer
from vqstudy.transport import OptVQ
from vqstudy.vector import SimVQ, StochasticQuantizer, VectorQuantizer

SIZES = {  # vectors of each rank, others at each step
    2: [[9, 1], [1, 12], [1, 1], [5, 5], [3, 4], [17, 2]],
    3: [[2, 20, 1], [7, 1, 1], [1, 1, 1], [3, 3, 3], [4, 9, 2], [1, 1, 15]],
}
IMAGES = {2: [[5, 3], [1, 7], [7, 1]], 3: [[2, 5, 1], [1, 1, 6], [3, 3, 2]]}


def learned_affine(dim, num_codes, **options):
    "With a map that has learned something."
    quantizer = VectorQuantizer(dim, num_codes, map=Affine(dim, groups=2), **options)
    with torch.no_grad():
        quantizer.book.map.scale.copy_(torch.linspace(-0.5, 0.5, 2 * dim).view(2, dim))
        quantizer.book.map.shift.copy_(torch.linspace(1, -1, 2 * dim).view(2, dim))
    return quantizer


def moving_affine(dim, num_codes, of="codebook", **options):
    return VectorQuantizer(dim, num_codes, map=MovingAffine(dim, of=of), **options)


@dataclass(frozen=True)
class Case:
    kind: object  # (dim, num_codes) -> quantizer
    # the case without the upkeep that this one is about: its table must come out different
    without: str = ""
    data: str = "vectors"
    codes: int = 8
    options: dict = field(default_factory=dict)

    def build(self):
        return self.kind(4, self.codes, **self.options)


def case(kind, without="", data="vectors", codes=8, **options):
    return Case(kind, without, data, codes, options)


KEPT = partial(VectorQuantizer, decay=0.9, life_span=2)
CASES = {
    "plain": case(VectorQuantizer),
    "kmeans": case(VectorQuantizer, "plain", init="kmeans"),
    "kmeans, few samples": case(VectorQuantizer, init="kmeans", codes=64),
    "sample": case(VectorQuantizer, "plain", init="sample"),
    "kmeans + affine": case(learned_affine, "affine", init="kmeans"),
    "kmeans + l2 + ema": case(VectorQuantizer, "l2 + ema", init="kmeans", l2=True, decay=0.9),
    "orthogonal": case(VectorQuantizer, init="orthogonal"),
    "replace": case(VectorQuantizer, "plain", life_span=2),
    "replace, every code chosen by some rank": case(VectorQuantizer, data="covered", life_span=1),
    "replace, no code dead for one rank": case(
        VectorQuantizer, "plain", data="one covers", life_span=1
    ),
    "affine": case(learned_affine),
    "affine + replace": case(learned_affine, "affine", life_span=2),
    "moving-affine": case(moving_affine),
    "moving-affine + replace": case(moving_affine, "moving-affine", life_span=2),
    "moving-affine of chosen": case(moving_affine, of="chosen"),
    "moving-affine of chosen + replace": case(
        moving_affine, "moving-affine of chosen", of="chosen", life_span=2
    ),
    "ema": case(VectorQuantizer, "plain", decay=0.9),
    "ema + replace": case(VectorQuantizer, "ema", decay=0.9, life_span=2),
    "ema + sample + replace": case(
        VectorQuantizer, "ema + replace", init="sample", decay=0.9, life_span=2
    ),
    "l2 + ema": case(VectorQuantizer, "plain", l2=True, decay=0.9),
    "l2 + ema + replace": case(VectorQuantizer, "l2 + ema", l2=True, decay=0.9, life_span=2),
    "diversity": case(VectorQuantizer, penalty=diversity(1.0, 0.5)),
    "ema + diversity": case(VectorQuantizer, decay=0.9, penalty=diversity(1.0)),
    "refit": case(VectorQuantizer, "plain", refit=2),
    "refit + ema": case(VectorQuantizer, "ema", refit=2, decay=0.9),
    "refit + affine + replace": case(learned_affine, "affine + replace", refit=3, life_span=2),
    "channels": case(
        VectorQuantizer, "", "channels", init="kmeans", decay=0.9, life_span=1, channel_dim=1
    ),
    "simvq": case(SimVQ),
    "optvq": case(OptVQ),
    "optvq + ema + replace": case(OptVQ, "optvq", decay=0.9, life_span=2),
    "group": case(GroupQuantizer, make=KEPT),
    "group + shared": case(GroupQuantizer, shared=True, make=KEPT),
    "residual": case(ResidualQuantizer, levels=3, make=KEPT),
    "residual + shared": case(ResidualQuantizer, levels=3, shared=True, make=KEPT),
    "multiscale": case(MultiScaleQuantizer, data="maps", make=KEPT),
    "deferred": case(DeferredQuantizer, steps=2, make=partial(KEPT, init="kmeans")),
    "deferred group": case(DeferredQuantizer, steps=3, make=partial(recipe, "vq + ema + group")),
    "fsq": case(FSQ, codes=5**4, levels=[5] * 4),
    "lfq": case(LFQ, codes=16),
    "lfq in groups": case(LFQ, codes=16, group=2, temperature=1.0),
    "bsq": case(BSQ, codes=16),
    "lfq of another width": case(LFQ, codes=8),
    "router, entropy": case(RouterQuantizer, entropy=1.0, entropy_temperature=0.5),
    "router + tied, entropy": case(
        RouterQuantizer, tied=True, entropy=1.0, entropy_temperature=0.5
    ),
    **{spec: case(partial(recipe, spec)) for spec in ("gumbel", "sq", "router", "router + tied")},
}
NOISY = {"gumbel", "sq"}  # noise of each vector is a rank's own: here only their start is compared
# with noise of each vector inside: one process does not do the same, but the ranks still agree
LOOSE = {
    "stochastic": case(StochasticQuantizer, init="kmeans", decay=0.9, life_span=1),
    "residual + dropout": case(ResidualQuantizer, levels=3, dropout=True, make=KEPT),
}
COMPARED = [name for name in CASES if name not in NOISY]


def batches(world):
    "Of each kind of data a list of steps, each the parts of the ranks."
    torch.manual_seed(1)
    drawn = partial(torch.randn, dtype=torch.float64)
    drift = [share(drawn(sum(step), 4) + 0.7 * i, step) for i, step in enumerate(SIZES[world])]
    maps = [share(drawn(8, 4, 2, 4), step) for step in IMAGES[world]]
    torch.manual_seed(0)
    own = VectorQuantizer(4, 8).double().codebook.detach()
    return {
        "vectors": drift,
        "maps": maps,
        "channels": [[part.movedim(3, 1).contiguous() for part in step] for step in maps],
        "covered": [share(own.roll(i, 0), [8 - world + 1] + [1] * (world - 1)) for i in range(4)],
        "one covers": [
            [own[: 1 + i % 2]] * (world - 1) + [own if i < 2 else own[:4]] for i in range(4)
        ],
    }


def steps(rank, case, data):
    """Training steps on this rank's parts; rank None: on all of each batch, in one process.

    Returns the start, the last step's outputs, its gradients, and the state after it.
    """
    # only the first rank has the seed of the one process
    torch.manual_seed(rank * 100 if rank else 0)
    quantizer = case.build().double().train()
    quantizer.before_training()
    start = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for parts in data[case.data]:
        z = (torch.cat(parts) if rank is None else parts[rank].clone()).requires_grad_()
        z_q, codes, loss = quantizer(z)
    (loss + z_q.pow(2).mean()).backward()
    return {
        "start": start,
        "z_q": z_q.detach(),
        "codes": codes,
        "loss": loss.detach(),
        "z.grad": z.grad,
        "state": quantizer.state_dict(),
        "random": torch.get_rng_state(),
        "grads": {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None},
    }


def refuse(*_, **__):
    raise AssertionError("a collective was called")


COLLECTIVES = ["all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce"]
COLLECTIVES += ["gather", "scatter", "barrier"]


def without_collectives(patch):
    for name in COLLECTIVES:
        patch.setattr(dist, name, refuse)


def evaluations(rank, cases, data):
    "In evaluation a rank may be alone with its batch: it asks the others for nothing."
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            without_collectives(patch)
            quantizer = case.build().double().eval()
            z = data[case.data][0][rank]
            quantizer.decode(quantizer(z).codes)
            quantizer.train().encode(z)


def measurements():
    "Nor does a rank that measures alone, on a copy in training mode, ask anybody."
    torch.manual_seed(0)
    encode, decode = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(encode, KEPT(4, 8, init="kmeans"), decode).train()
    x = torch.randn(16, 4)
    with pytest.MonkeyPatch.context() as patch:
        without_collectives(patch)
        gap = gradient_gap(model, lambda m, b: (Pass(m)(b) - b).pow(2).mean(), x)
        monitor = Monitor(lambda m, x, y: (Pass(m)(x) - x).pow(2).mean(), x, at=lambda step: True)
        row, _ = monitor(model, 0)
        quantizer = model[1].set_codebook(torch.randn(8, 4))
        copy.deepcopy(model).eval().load_state_dict(model.state_dict())
    return {"gap": torch.tensor(gap.total), "row": torch.tensor(row["gap"])}


class Pass:
    "A model's output, where the quantizer in it returns three things."

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        encode, quantizer, decode = self.model
        return decode(quantizer(encode(x)).z_q)


def in_group(rank, data, group):
    "Training steps of a quantizer whose processes are those of the group."
    torch.manual_seed(rank * 100)
    make = partial(KEPT, init="kmeans", life_span=1, process_group=group)
    quantizer = ResidualQuantizer(4, 8, 2, make).double().train()
    for parts in data["vectors"]:
        quantizer(parts[rank])
    return quantizer.state_dict()


def groups(rank, data):
    "The first two processes together, and each by itself."
    pair = dist.new_group([0, 1])
    grouped = in_group(rank, data, pair if rank < 2 else "local")
    with pytest.MonkeyPatch.context() as patch:
        without_collectives(patch)
        local = in_group(rank, data, "local")
    return {"grouped": grouped, "local": local}


def everything(rank, data):
    "One start of the processes for all tests."
    evaluations(rank, CASES.values(), data)
    return {
        "measured": measurements(),
        "groups": groups(rank, data),
        "total": total(torch.tensor([rank, 1])),
        "threads": torch.get_num_threads(),
        **{name: steps(rank, case, data) for name, case in (CASES | LOOSE).items()},
    }


def alone(case, data):
    "What one process makes of the joined batches, where every collective is refused."
    with pytest.MonkeyPatch.context() as patch:
        without_collectives(patch)
        return steps(None, case, data)


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    "What each rank made of its parts of the batches, and a function: a case's `alone`."
    data, threads = batches(request.param), torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    made = in_processes(request.param, folder, everything, data, timeout=120)
    yield made, cache(lambda name: alone((CASES | LOOSE)[name], data))
    torch.set_num_threads(threads)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def close(a, b):
    return a.keys() == b.keys() and all(
        torch.allclose(value, b[key], rtol=1e-12, atol=1e-12) for key, value in a.items()
    )


def test_every_process_answers(run):
    results, _ = run
    for result in results:
        assert result["total"].tolist() == [sum(range(len(results))), len(results)]
        assert result["threads"] == 1


@pytest.mark.parametrize("name", CASES | LOOSE)
def test_ranks_agree(name, run):
    first, *others = [result[name] for result in run[0]]
    for other in others:
        assert equal(other["start"], first["start"]) and equal(other["state"], first["state"])


@pytest.mark.parametrize("name", CASES)
def test_ranks_start_as_one_process_does(name, run):
    assert equal(run[0][0][name]["start"], run[1](name)["start"])


@pytest.mark.parametrize("name", COMPARED)
def test_ranks_make_what_one_process_makes(name, run):
    ranks, one = [result[name] for result in run[0]], run[1](name)
    for key in ("z_q", "codes"):
        parts = torch.cat([rank[key] for rank in ranks])
        assert torch.allclose(parts, one[key], rtol=0, atol=1e-12), key
    for rank in ranks:
        assert close(rank["state"], one["state"])
    assert torch.equal(ranks[0]["random"], one["random"])  # the next draw will be the same, too


@pytest.mark.parametrize("name", COMPARED)
def test_losses_and_gradients_are_parts_of_those_of_one_process(name, run):
    ranks, one = [result[name] for result in run[0]], run[1](name)
    shares = [len(rank["z_q"]) / len(one["z_q"]) for rank in ranks]
    joined = lambda values: sum(share * value for share, value in zip(shares, values))
    loss = joined(rank["loss"] for rank in ranks)
    assert torch.allclose(loss, one["loss"], rtol=1e-12, atol=1e-12)
    to_z = torch.cat([share * rank["z.grad"] for share, rank in zip(shares, ranks)])
    assert torch.allclose(to_z, one["z.grad"], rtol=1e-11, atol=1e-12)
    grads = {key: joined(rank["grads"][key] for rank in ranks) for key in ranks[0]["grads"]}
    assert close(grads, one["grads"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.without])
def test_the_upkeep_acts(name, run):
    states = [run[1](n)["state"] for n in (name, CASES[name].without)]
    table, other = (next(v for k, v in s.items() if k.endswith("weight")) for s in states)
    assert (table - other).abs().amax(1).gt(1e-3).any()


def test_a_code_is_dead_where_no_rank_chooses_it(run):
    for rank in run[0]:
        kept = rank["replace, every code chosen by some rank"]
        assert torch.equal(kept["state"]["book.weight"], kept["start"]["book.weight"])
        assert not kept["state"]["alive.idle"].any()
        died = rank["replace, no code dead for one rank"]
        before, after = died["start"]["book.weight"], died["state"]["book.weight"]
        assert torch.equal(after[:4], before[:4]) and not torch.equal(after[4:], before[4:])


def test_measuring_asks_nobody(run):
    for result in run[0]:
        assert equal(result["measured"], run[0][0]["measured"])
        assert result["measured"]["gap"] > 0


def test_a_group_trains_together_and_nobody_else(run):
    first, second, *rest = [result["groups"] for result in run[0]]
    assert equal(first["grouped"], second["grouped"])
    for other in rest:
        assert equal(other["grouped"], other["local"])
        assert not equal(other["grouped"], first["grouped"])
    assert not equal(first["local"], second["local"])


def test_a_group_makes_what_one_process_makes_of_its_parts(run):
    torch.manual_seed(0)
    data = batches(len(run[0]))["vectors"]
    joined = {"vectors": [[torch.cat(parts[:2])] for parts in data]}
    alone = in_group(0, joined, None)
    assert close(alone, run[0][0]["groups"]["grouped"])


def test_a_copy_keeps_its_processes_and_a_pickle_those_that_it_can():
    for group, pickled in ((None, None), ("local", "local")):
        quantizer = ResidualQuantizer(4, 8, process_group=group)
        copied = copy.deepcopy(quantizer)
        assert copied.process_group == group and copied.parts[0].process_group == group
        assert pickle.loads(pickle.dumps(quantizer)).process_group == pickled
    copied.process_group = None
    assert copied.parts[0].process_group is None


@pytest.mark.parametrize("spec", recipes())
def test_every_quantizer_takes_a_process_group(spec):
    assert recipe(spec, 4, 16, process_group="local").process_group == "local"
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup"):
        recipe(spec, 4, 16, process_group=3)


UNATTENDED = [spec for spec in recipes() if not {"exact", "hessian"} & set(spec.split(" + "))]


@pytest.mark.parametrize("spec", UNATTENDED)
def test_one_process_alone_calls_no_collective(spec, monkeypatch):
    without_collectives(monkeypatch)
    wanted = {"life_span": 1, "refit": 1, "init": "kmeans", "entropy": 1.0}
    given = {name: value for name, value in wanted.items() if name in keywords(spec)}
    quantizer = recipe(spec, 4, 16, **given).train()
    for _ in range(2):
        z_q, _, loss = quantizer(torch.randn(2, 2, 2, 4, requires_grad=True))
        (loss + z_q.sum()).backward()
    quantizer.eval()(torch.randn(2, 2, 2, 4))


@pytest.mark.parametrize("name", CASES | LOOSE)
def test_one_process_alone_calls_no_collective_in_any_case(name, run):
    run[1](name)  # `alone` raises at a collective


@pytest.mark.parametrize(
    "backends,sent",
    [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")],
)
def test_a_model_built_on_the_cpu_can_be_sent_by_a_backend_of_the_gpu(backends, sent, monkeypatch):
    devices = []
    for name, stand_in in {
        "is_initialized": lambda: True,
        "get_world_size": lambda group: 2,
        "get_backend_config": lambda group: backends,
        "broadcast": lambda x, source, group: devices.append(x.device.type),
    }.items():
        monkeypatch.setattr(dist, name, stand_in)
    with FakeTensorMode():
        x = torch.zeros(3)
        received = from_first(x)  # shapes and devices alone: no GPU is needed
    assert received is x and devices == [sent] and x.device.type == "cpu"


def raise_on_one(rank):
    if rank == 1:
        raise KeyError("the second process fails")
    dist.barrier()


def hang_on_one(rank):
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def test_a_failure_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"\[1\] failed(.|\n)*the second process fails"):
        in_processes(2, tmp_path, raise_on_one)


def test_a_hang_is_a_failure(tmp_path):
    with pytest.raises(TimeoutError, match="had not ended after 8 s"):
        in_processes(2, tmp_path, hang_on_one, timeout=8)


def test_share_refuses_an_empty_part():
    assert [len(part) for part in share(torch.zeros(8, 2), [5, 3])] == [5, 3]
    for sizes in ([4, 0], [8, 0], [3, 3]):
        with pytest.raises(ValueError, match="add up to"):
            share(torch.zeros(4 if sum(sizes) == 4 else 8, 2), sizes)
