"""Initialisation, moving averages and replacement against naive versions and known answers."""

import inspect
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from vqstudy.codebook import Affine, Codebook, LinearMap, MovingAffine
from vqstudy.codebook import draw, kaiming, kmeans, normal, sample
from vqstudy.upkeep import MovingAverage, Replacement


def inertia(z, centres):
    return torch.cdist(z, centres).amin(1).pow(2).mean()


def test_deviations_of_the_starts():
    torch.manual_seed(0)
    assert abs(normal(4000, 50).std() - 1) < 0.01
    assert abs(kaiming(4000, 50).std() - (2 / 50) ** 0.5) < 0.002


def test_kmeans_is_as_good_as_scikit_learn_and_repeatable():
    torch.manual_seed(0)
    z = torch.randn(2000, 8)
    torch.manual_seed(1)
    ours = kmeans(z, 32)
    torch.manual_seed(1)
    again = kmeans(z, 32)
    theirs = torch.from_numpy(KMeans(32, n_init=1, random_state=3).fit(z.numpy()).cluster_centers_)
    assert torch.equal(ours, again) and inertia(z, ours) < 1.03 * inertia(z, theirs)


@pytest.mark.parametrize("n,k", [(1, 5), (7, 7), (10, 64), (100, 1)])
def test_kmeans_with_any_number_of_samples(n, k):
    torch.manual_seed(0)
    z = 5 + torch.randn(n, 3)
    centres = kmeans(z, k)
    assert centres.shape == (k, 3) and centres.isfinite().all() and centres.dtype == z.dtype
    if k >= n:
        assert torch.isin(z, centres).all()
        assert (centres.mean(0) - z.mean(0)).abs().max() < 0.5  # no shrinking to the origin
        if n > 1:
            assert (centres.std(0) / z.std(0) - 1).abs().max() < 0.35


def test_draw_repeats_nothing_while_it_can():
    z = torch.arange(10.0)[:, None]
    assert len(draw(z, 7).unique()) == 7
    drawn = draw(z, 25)
    assert sorted(drawn.round().unique(return_counts=True)[1].tolist()) == [2] * 5 + [3] * 5


@pytest.mark.parametrize("take", [draw, sample, kmeans])
def test_copies_are_moved_a_little(take):
    torch.manual_seed(0)
    z = torch.arange(10.0)[:, None].repeat(1, 3) * torch.tensor([1.0, 10.0, 0.0])
    drawn = take(z, 64)
    assert torch.isin(z[:, 0], drawn[:, 0]).all() and len(drawn.unique(dim=0)) == 64
    far = (drawn[:, None] - z).abs()
    nearest = far.sum(2).argmin(1)
    away = far[torch.arange(64), nearest] / z.std(0).clamp_min(1e-9)
    assert away.max() < 0.06 and (drawn[:, 2] == 0).all()  # no spread, nothing to be moved by


def test_dead_codes_take_different_vectors_while_there_are_enough():
    torch.manual_seed(0)
    z, book, alive = torch.randn(16, 8), Codebook(8, 64), Replacement(64, life_span=1)
    alive.idle[::5] = 1  # 13 dead codes, 16 vectors
    alive.revive(z, book)
    revived = book.weight.detach()[::5]
    assert len(revived.unique(dim=0)) == 13 and torch.isin(revived, z).all()
    alive.idle.fill_(1)  # 64 dead codes
    alive.revive(z, book)
    assert len(book.weight.unique(dim=0)) == 64 and torch.isin(z, book.weight).all()


@pytest.mark.parametrize("smoothing", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (5, 8, 3), (200, 16, 4)])
def test_moving_average_against_one_hot(n, k, d, smoothing):
    torch.manual_seed(n)
    book = Codebook(d, k, learn=False).double()
    average = MovingAverage(book.weight, 0.9, smoothing)
    counts, sums = torch.ones(k, dtype=torch.float64), book.weight.clone()
    for _ in range(3):
        z, codes = torch.randn(n, d, dtype=torch.float64), torch.randint(k, (n,))
        one_hot = torch.nn.functional.one_hot(codes, k).double()
        counts, sums = 0.9 * counts + 0.1 * one_hot.sum(0), 0.9 * sums + 0.1 * one_hot.T @ z
        average.update(book, z, codes)
        smoothed = (counts + smoothing) / (counts.sum() + k * smoothing) * counts.sum()
        assert (book.weight - sums / smoothed[:, None]).abs().max() < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 20), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_moving_average_keeps_the_total_count(seed, n, k, decay):
    g = torch.Generator().manual_seed(seed)
    book = Codebook(2, k, learn=False)
    average = MovingAverage(book.weight, decay)
    total = float(k)
    for _ in range(4):
        average.update(book, torch.randn(n, 2, generator=g), torch.randint(k, (n,), generator=g))
        total = decay * total + (1 - decay) * n
    assert abs(float(average.counts.sum()) - total) < 1e-3 * total and (average.counts >= 0).all()


def test_a_code_dead_for_ever_stays_finite():
    book = Codebook(2, 3, learn=False)
    where = book.weight[2].clone()
    average = MovingAverage(book.weight, 0.5, smoothing=0)
    for _ in range(500):
        average.update(book, torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(book.weight[2], where) and book.weight.isfinite().all()


def test_a_revived_code_is_not_pulled_back_by_its_past():
    book = Codebook(2, 2, learn=False)
    average, alive = MovingAverage(book.weight, 0.99), Replacement(2, life_span=1)
    z = torch.full((8, 2), 50.0)
    alive.note(torch.tensor([0]))
    alive.revive(z, book, average)
    average.update(book, z, torch.ones(8, dtype=torch.int64))
    assert (book.weight[1] - 50).abs().max() < 0.1


def test_life_span_counts_training_steps():
    book, alive = Codebook(1, 4), Replacement(4, life_span=3)
    z = torch.full((5, 1), 9.0)
    for step in range(3):
        alive.revive(z, book)
        assert (book() != 9).all()
        alive.note(torch.tensor([0, 0, 1]))
    alive.revive(z, book)
    assert (book()[:2] != 9).all() and (book()[2:] == 9).all()
    assert alive.idle.tolist() == [0, 0, 0, 0]


def test_kmeans_waits_and_reloads():
    book = Codebook(3, 4, init="kmeans")
    fresh = Codebook(3, 4, init="kmeans")
    fresh.load_state_dict(book.state_dict())
    assert fresh.waiting
    book.start(torch.randn(20, 3))
    fresh.load_state_dict(book.state_dict())
    assert not fresh.waiting and torch.equal(fresh(), book())


NAMES = "'normal', 'uniform', 'kaiming', 'orthogonal', 'kmeans' or 'sample', got 'zeros'"
W = torch.ones(2, 2)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: Codebook(3, 4, init="zeros"), f"init must be {NAMES}"),
        (lambda: MovingAverage(W, decay=1.0), "decay must be .* above 0 and below 1, got 1.0"),
        (lambda: MovingAverage(W, smoothing=-1), "smoothing must be .* at least 0, got -1"),
        (lambda: MovingAverage(W, smoothing=float("nan")), "smoothing must be a finite .*, got nan"),
        (lambda: MovingAverage(torch.ones(2)), r"weight must be \(k, d\), got shape \(2,\)"),
        (lambda: Replacement(4, life_span=0), "life_span must be at least 1, got 0"),
        (lambda: Affine(2, lr=float("nan")), "lr must be a finite number above 0, got nan"),
        (lambda: Affine(2, max_norm=0), "max_norm must be a finite number above 0, got 0"),
        (lambda: Affine(2, groups=0), "groups must be at least 1, got 0"),
        (lambda: Codebook(3, 4, map=Affine(3, groups=3)), "groups must divide num_codes=4, got 3"),
        (lambda: Codebook(3, 0), "num_codes must be at least 1, got 0"),
        (lambda: MovingAffine(3, momentum=0), "momentum must be .* above 0 and at most 1, got 0"),
        (lambda: kmeans(torch.zeros(0, 3), 4), "at least one vector"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


WRONG = {
    int: [2.5, "x", None, True],
    float: ["x", None, True, [0.5]],
    bool: [1, "x", None],
    str: [1, None, ["normal"]],
}
ARGUMENTS = {  # of each class: what is right, and the types of the arguments
    Affine: (dict(dim=2), dict(dim=int, lr=float, groups=int, max_norm=float)),
    MovingAffine: (dict(dim=2), dict(dim=int, momentum=float, of=str)),
    LinearMap: (dict(dim=2), dict(dim=int)),
    Codebook: (
        dict(dim=2, num_codes=4),
        dict(dim=int, num_codes=int, init=str, l2=bool, learn=bool, map=torch.nn.Module),
    ),
    MovingAverage: (
        dict(weight=torch.ones(4, 2)),
        dict(weight=torch.Tensor, decay=float, smoothing=float, start=str),
    ),
    Replacement: (dict(num_codes=4), dict(num_codes=int, life_span=int)),
}


@pytest.mark.parametrize("make", ARGUMENTS)
def test_a_wrong_type_is_a_type_error_that_names_the_argument(make):
    right, types = ARGUMENTS[make]
    assert set(types) == set(inspect.signature(make).parameters)
    make(**right)
    for name, kind in types.items():
        for value in WRONG.get(kind, [1, "x", torch.ones(4, 2, dtype=torch.int64)]):
            if name == "max_norm" and value is None:
                continue  # no bound
            with pytest.raises(TypeError, match=f"{name} must be "):
                make(**right | {name: value})


@pytest.mark.parametrize("map", [Affine(3, groups=2), MovingAffine(3)])
def test_replacing_one_code_leaves_the_others_to_the_last_bit(map):
    torch.manual_seed(0)
    if isinstance(map, Affine):
        torch.nn.init.normal_(map.scale)
        torch.nn.init.normal_(map.shift)
    else:
        map.update(5 + 3 * torch.randn(50, 3), torch.randn(8, 3))
    book, new = Codebook(3, 8, map=map), torch.randn(8, 3)
    before, which = book.weight.detach().clone(), torch.arange(8) == 2
    book.replace(which, new)
    assert torch.equal(book.weight[~which], before[~which])
    assert torch.allclose(book()[2], new[2], atol=1e-5)
