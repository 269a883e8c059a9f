"""Beside the authors' public code: every row of the table of agreement, and what it says."""

import re
from functools import partial
from pathlib import Path
import pytest
import torch
import oracles_authors as authors
from agreement import FILES, ROWS
from agreement_package import PACKAGE
from agreement_tables import LR, alternating_start, both_zero, counts_zero, table_and_data
from beside import COLUMNS, D, K, sample
from vqstudy.code import code_digest
from vqstudy.quantizers import recipe
from vqstudy.transport import sinkhorn_codes

ROOT = Path(__file__).parents[1]
NAMES = [f"{i:02} {row.method}, {row.theirs.split(',')[0]}" for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_differences_are_what_the_row_says(row):
    found = row.differences()
    assert set(found) <= set(COLUMNS) and set(row.apart) <= set(found)
    for column, difference in found.items():
        least, most = row.apart.get(column, (0.0, row.most))
        assert least <= difference <= most, f"{column}: {difference}"
    # a row that tells a difference has at least one column in which there is one
    if row.apart:
        assert max(found[column] for column in row.apart) > 1e-13 and row.note


def test_a_row_gives_the_same_numbers_again():
    torch.manual_seed(7)
    again = [row.differences() for row in ROWS[:3]]
    assert again == [row.differences() for row in ROWS[:3]]


def test_every_source_is_named_to_its_commit():
    for row in ROWS:
        places = re.findall(r"[\w.-]+/[\w.-]+@([0-9a-f]+)", row.theirs)
        assert all(len(commit) == 7 for commit in places)
        assert places or row in PACKAGE or "naive" in row.theirs


# ---- what the rows say in words ----


def in_place_with_affine() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "vqtorch's step inside: the code vectors of the pass, those before it, and the table's after."
    encoder, table, batches = alternating_start()
    map = [torch.zeros(1, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    z = batches[0] @ encoder
    codes = authors.nearest(z, table.detach())
    before = table.detach()[codes]
    mapped = lambda table: authors.vqtorch_affine(table, *map, 1.0)
    q = authors.vqtorch_in_place(z, table, codes, torch.optim.SGD([table], LR), mapped)
    return q, before, table.detach()[codes]


def test_an_affine_codebook_with_an_optimiser_inside_raises_there():
    "What reads the code vectors' gradient goes through a graph that the inner step has freed."
    q, before, after = in_place_with_affine()
    assert torch.equal(q, before) and (q - after).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="a second time"):
        (0.2 * q).sum().backward()


def test_an_affine_codebook_with_an_inner_step_runs_here():
    _, _, batches = alternating_start()
    quantizer = recipe("vq + affine + opt", 5, K).double().train()
    inner = torch.optim.SGD(quantizer.book.parameters(), LR)
    before = quantizer.codebook.detach().clone()

    def inner_step(loss):
        loss.backward(inputs=list(quantizer.book.parameters()))
        inner.step()
        inner.zero_grad()

    quantizer.inner_step = inner_step
    out = quantizer(batches[0])
    out.z_q.sum().backward()
    moved = quantizer.codebook.detach()
    assert torch.equal(out.z_q, moved[out.codes]) and (moved - before).abs().max() > 1e-3
    assert quantizer.book.map.scale.grad.abs().max() > 1e-3


def test_a_normalised_table_gets_the_part_along_its_codes_there():
    torch.manual_seed(0)
    quantizer = recipe("vq + l2", D, K, alpha=1.0, beta=0.95).double().train()
    quantizer.set_codebook(quantizer.codebook.detach())
    quantizer(sample()).loss.backward()
    table = quantizer.codebook.detach().requires_grad_()
    authors.vqtorch_l2(sample(), table)[1].backward()
    ours, theirs = quantizer.book.weight.grad, table.grad
    along = table.detach() * (table.detach() * theirs).sum(1, keepdim=True)
    assert torch.allclose(ours, theirs - along, atol=1e-14) and along.abs().max() > 1e-3


def first_table(start, step) -> torch.Tensor:
    "Lengths of the codes that the first batch leaves out, after it and before it."
    table, batches = table_and_data(3 * K // 4)
    counts, sums = start(table)
    after = step(batches[0], table, counts, sums)[0]
    return torch.stack([x[3 * K // 4 :].norm(dim=1) for x in (after, table)])


def test_where_a_code_goes_that_the_first_batch_leaves_out():
    after, before = first_table(counts_zero, authors.ema)
    assert (after > 1e4 * before).all()
    after, _ = first_table(both_zero, partial(authors.ema_sonnet, step=1))
    assert not after.any()
    ours = recipe("vq + ema", D, K).double().train()
    table, batches = table_and_data(3 * K // 4)
    ours.set_codebook(table)
    ours(batches[0])
    assert torch.allclose(ours.codebook[3 * K // 4 :], table[3 * K // 4 :], atol=1e-4)


def test_a_far_code_is_left_out_there():
    "1e-8 beside the sum of what the plan gives it; ours gives it about its share, 4 vectors."
    torch.manual_seed(0)
    z, table = torch.randn(1024, D, dtype=torch.float64), torch.randn(256, D, dtype=torch.float64)
    table[0] += 20
    plan = authors.optvq_plan(authors.optvq_cost(z, table))
    counts = torch.bincount(sinkhorn_codes(z, table), minlength=256)
    assert (plan.argmax(1) != 0).all() and plan.sum(0)[0] < 1e-3
    assert 2 <= counts[0] <= 8


def test_scaled_signs_have_the_gradient_over_the_root_of_the_width_there():
    z, g = sample().requires_grad_(), torch.randn_like(sample())
    (theirs,) = torch.autograd.grad((authors.bsq(z, zeta=0.0)[0] * g).sum(), z)
    bsq = recipe("bsq", D, 2**D, entropy=0.0).double().train()
    (ours,) = torch.autograd.grad((bsq(z).z_q * g).sum(), z)
    assert torch.allclose(ours, D**0.5 * theirs)


# ---- the table that is committed ----


def test_the_table_shows_every_row_of_the_code_of_now():
    "`make figures` writes it anew where this fails."
    written = (ROOT / "figures/bench_agreement.md").read_text()
    squeezed = re.sub(r"\s+", " ", written)
    digest = code_digest("\n".join((ROOT / "tests" / name).read_text() for name in FILES))
    assert f"tests/agreement.py, {digest[:12]}" in written
    for row in ROWS:
        assert row.method in squeezed and row.note in squeezed
        # a package is named with the version that drew the table
        assert row in PACKAGE or row.theirs in squeezed
