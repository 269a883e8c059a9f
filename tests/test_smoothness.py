"""Tokenizers begin, are kept and come back as they were; known answers of how smooth they are."""

import math
import pytest
import torch
from vqstudy.autoencoders import Autoencoder
from vqstudy.cells import check, plan, tuned_by
from vqstudy.quantizers import recipe
from vqstudy.smoothness import _others, neighbours, smoothness
from vqstudy.tokenizers import restored, tokenizer_for
from vqstudy.train import reproducible
from vqstudy.trials import RANGES

GIVEN = check("tokenizer", {"channels": 8, "num_codes": 16})
BOOKS = ("vq", "vq + ema + replace", "simvq", "router", "router + tied")


def of_random_codes(k=32, d=3, pictures=300, side=4):
    "Quantized maps of a random table, in float64."
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(k, d, dtype=torch.float64, generator=generator)
    codes = torch.randint(k, (pictures, side, side), generator=generator)
    return table[codes].movedim(-1, 1)


# ---- tokenizers ----


@pytest.mark.parametrize("method", [*BOOKS, "fsq", "lfq"])
def test_a_tokenizer_begins_as_a_reconstruction_does(method):
    "The network of nbs/runs/reconstruct.ipynb, whatever the quantizer has drawn."
    reproducible(0)
    model = tokenizer_for(GIVEN | {"method": method})
    reproducible(0)
    quantizer = recipe(method, 8, 16, channel_dim=1)
    torch.manual_seed(1_000_003)
    wanted = Autoencoder(quantizer, 32, 8).state_dict()
    assert wanted.keys() == model.state_dict().keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", BOOKS)
def test_the_scale_multiplies_the_start_and_nothing_else(method):
    reproducible(0)
    plain = tokenizer_for(GIVEN | {"method": method})
    reproducible(0)
    scaled = tokenizer_for(GIVEN | {"method": method, "start_scale": 10.0})
    assert torch.allclose(scaled.quantizer.codebook, 10 * plain.quantizer.codebook, rtol=1e-4)
    pairs = zip(plain.encoder.parameters(), scaled.encoder.parameters())
    assert all(torch.equal(one, other) for one, other in pairs)
    if method == "router":
        assert torch.equal(scaled.quantizer.keys, 10 * plain.quantizer.keys)


@pytest.mark.parametrize("method", [*BOOKS, "fsq"])
def test_what_was_kept_comes_back(method):
    given = GIVEN | {"method": method, "code_dim": 4, "start_scale": 1.0}
    model, x = tokenizer_for(given), torch.rand(4, 3, 32, 32)
    model(x)  # in training mode: batch norm and averages move
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    again = restored(given, weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again(x).x, model.eval()(x).x)


# ---- smoothness ----


def test_neighbours_are_those_of_all_pairs():
    table = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(table.double(), table.double()).fill_diagonal_(math.inf)
    assert torch.equal(neighbours(table, rows=16), distances.argmin(1))


def test_a_decoder_that_keeps_distances_changes_as_they_do():
    maps = of_random_codes()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    found = smoothness(lambda maps: 7 * torch.einsum("bdhw,de->behw", maps, turn), maps)
    assert torch.allclose(found.change, found.distance, rtol=1e-9)
    assert float(found.change.mean()) < -0.5


def mean_and_half(logs):
    return float(logs.mean()), 2.6 * float(logs.std()) / len(logs) ** 0.5


@pytest.mark.parametrize("decode", [lambda maps: maps, lambda maps: (1e4 * maps).sin()])
def test_a_permuted_codebook_gives_1_whatever_the_decoder(decode):
    "With more codes than pictures, which share a permutation."
    mean, half = mean_and_half(smoothness(decode, of_random_codes(k=512), places=4).null)
    assert abs(mean) < half < 0.1


def test_the_nearest_by_a_permuted_codebook_is_any_other_code():
    generator, table = torch.Generator().manual_seed(0), torch.randn(6, 2)
    near, codes = neighbours(table), torch.arange(6)
    counts = torch.zeros(6, 6)
    for _ in range(3000):
        counts[codes, _others(near, codes, generator)[2]] += 1
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(6, dtype=torch.bool)]
    assert (others / 3000 - 1 / 5).abs().max() < 4 * (0.2 * 0.8 / 3000) ** 0.5


def test_the_nearest_by_a_permuted_codebook_is_found_by_hand():
    "Of the vectors dealt out anew, the nearest to that of the code."
    table = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    codes = torch.arange(9)
    one, same = (torch.Generator().manual_seed(2) for _ in range(2))
    found = _others(neighbours(table), codes, one)[2]
    torch.randint(1, 9, codes.shape, generator=same)
    dealt = table[torch.randperm(9, generator=same)]
    assert torch.equal(found, neighbours(dealt))


def test_where_near_codes_have_pictures_of_their_own_the_change_is_1():
    rough = smoothness(lambda maps: (1e4 * maps).sin(), of_random_codes())
    mean, half = mean_and_half(rough.change)
    assert abs(mean) < half + 0.1  # the table is one, and small


# ---- the sweeps ----


@pytest.mark.parametrize("scale", ["smoke", "desk", "gpu"])
def test_what_is_kept_is_of_the_study_and_one_a_method_and_seed(scale):
    kept = plan("kalomaze_router_kept", scale)
    assert {cell.id for cell in kept} <= {cell.id for cell in plan("kalomaze_router", scale)}
    assert len({(c.parameters["method"], c.parameters["seed"]) for c in kept}) == len(kept)
    if scale != "smoke":
        assert {cell.parameters["num_codes"] for cell in kept} == {65_536}


STUDY = ("kalomaze_router", "kalomaze_router_sizes")


@pytest.mark.parametrize("scale", ["desk", "gpu"])
def test_life_spans_in_draws_are_20_at_every_size(scale):
    spans = {}
    for cell in [cell for name in STUDY for cell in plan(name, scale)]:
        given = cell.parameters
        if "replace" in given["method"]:
            spans.setdefault(given["num_codes"], set()).add(given["life_draws"])
            assert given["ema_draws"] == given["life_draws"]
    assert spans.keys() == {1024, 4096, 16_384, 65_536}
    assert all(20.0 in each and each <= {0.0, 20.0} for each in spans.values())
    assert 0.0 in spans[65_536]


@pytest.mark.parametrize("scale", ["desk", "gpu"])
def test_no_size_is_in_both_sweeps(scale):
    large, small = ({cell.parameters["num_codes"] for cell in plan(name, scale)} for name in STUDY)
    assert (large, small) == ({16_384, 65_536}, {1024, 4096})
    assert tuned_by(STUDY[0], scale)["kalomaze_router_tune"] == 1
    assert "kalomaze_router_tune" not in tuned_by(STUDY[1], scale)


def seeds_of(name, **wanted):
    "By method and life span in draws, the seeds of a sweep's plain rows at desk."
    found = {}
    for given in [cell.parameters for cell in plan(name, "desk")]:
        plain = given["init"] == "normal" and not given["recipe_options"]
        if plain and wanted.items() <= given.items():
            row = given["method"], given["life_draws"]
            found.setdefault(row, set()).add(given["seed"])
    return found


@pytest.mark.parametrize(
    "name, size, single",
    [(STUDY[0], 65_536, {"router + tied"}), (STUDY[1], 4096, set()), (STUDY[1], 1024, set())],
)
def test_rows_that_are_compared_have_three_seeds(name, size, single):
    rows = seeds_of(name, num_codes=size)
    assert {method for method, _ in rows} >= {"router", "router + tied", "vq", "simvq"}
    assert ("vq + ema + replace", 20.0) in rows
    assert {method for (method, _), seeds in rows.items() if len(seeds) < 3} == single


# what a trial may have in another way than the rows it is for
OF_A_TRIAL = {"lengths", "warmup_updates", "watch_limit", "watch_updates", "draws", "seed"}


def test_a_knob_is_tuned_in_the_row_that_it_serves():
    "A trial is a row of 65,536 codes but for its length, the images it measures, and its knobs."
    trials = {}
    for given in [cell.parameters for cell in plan("kalomaze_router_tune", "desk")]:
        trials.setdefault(given["method"], []).append(given)
    trials.pop("none")
    rows = [c.parameters for c in plan(STUDY[0], "desk") if c.parameters["num_codes"] == 65_536]
    rows = [row for row in rows if row["life_draws"] or "replace" not in row["method"]]
    assert {row["method"] for row in rows} == trials.keys()
    for row in rows:
        mine = trials[row["method"]]
        same = (row.keys() & mine[0].keys()) - OF_A_TRIAL - {"lr"}
        same = {name for name in same if all(each[name] == mine[0][name] for each in mine)}
        assert len(same) > 15
        assert {name: row[name] for name in same} == {name: mine[0][name] for name in same}


def test_trials_in_the_ranges_of_all_searches_are_three_for_each_method():
    "Or the search would be refused when it has run."
    counts = {}
    for given in [cell.parameters for cell in plan("kalomaze_router_tune", "desk")]:
        tuned = given["method"].startswith("vq")
        inside = not tuned or RANGES["beta"][0] <= given["beta"] <= RANGES["beta"][1]
        counts[given["method"]] = counts.get(given["method"], 0) + inside
    assert counts.pop("none") == 1 and set(counts.values()) == {3}
