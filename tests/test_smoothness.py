"""Tokenizers begin, are kept and come back as they were; known answers of how smooth they are."""

import math
import pytest
import torch
from vqstudy.autoencoders import Autoencoder
from vqstudy.cells import check, plan
from vqstudy.quantizers import recipe
from vqstudy.smoothness import neighbours, smoothness
from vqstudy.tokenizers import restored, tokenizer_for
from vqstudy.train import reproducible

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
    mean, half = mean_and_half(smoothness(decode, of_random_codes(), places=4).null)
    assert abs(mean) < half < 0.1


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


@pytest.mark.parametrize("scale", ["desk", "gpu"])
def test_life_spans_in_draws_are_20_at_every_size(scale):
    spans = {}
    for cell in plan("kalomaze_router", scale):
        given = cell.parameters
        if "replace" in given["method"]:
            spans.setdefault(given["num_codes"], set()).add(given["life_draws"])
            assert given["ema_draws"] == given["life_draws"]
    assert spans.keys() >= {1024, 4096, 16_384, 65_536}
    assert all(20.0 in each and each <= {0.0, 20.0} for each in spans.values())
    assert 0.0 in spans[65_536]
