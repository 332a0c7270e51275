"""`draft_draw` as Triton's kernels, interpreted, against the plain formula in float64.

Everything that is left uninitialized holds NaN, or the largest integer.
Shapes: B requests, K drafts, V vocabulary.
"""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import using
from blockroll.kernels.draft_draw import draft_probs, draw_draft, reference
from blockroll.kernels.philox import drawn
from blockroll.kernels.rows import Cut, LogitRows
from blockroll.samplers import step_coins
from blockroll.samplers.check import check_draft_law
from blockroll.types import POINT_MASS, RowFault
from tests.kernels.planted import plant_in_sampler
from tests.numerics.rows_by_hand import (
    NUM_DRAFTS,
    SIZE,
    TEMPERATURES,
    coins,
    edits_of,
    probs_by_hand,
    random,
    token_at,
    top_k_of,
)

SHAPE = (SIZE, NUM_DRAFTS)
SMALL, TINY_POLICY, TWO_TILES, LARGE = 63, 260, 4_097, 32_000


@pytest.fixture(autouse=True)
def _poisoned():
    """What `torch.empty` gives, while algorithms are deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


def rows_of(vocab_size: int, *, cut: bool = False, edited: bool = False) -> LogitRows:
    logits_BKV = 3 * random(*SHAPE, vocab_size, seed=1)
    edits = edits_of(NUM_DRAFTS, vocab_size) if edited else None
    return LogitRows(logits_BKV, TEMPERATURES, True, top_k_of(20.0) if cut else None, edits=edits)


def assert_drawn(rows: LogitRows) -> None:
    uniforms_BK = coins(*SHAPE)
    draft = draw_draft(rows.logits_BLV, rows.temperature_B, uniforms_BK, cut=rows.cut, edits=rows.edits)
    probs_BKV = probs_by_hand(rows)
    expected = [
        [token_at(probs_BKV[b, i], float(uniforms_BK[b, i]))[0] for i in range(NUM_DRAFTS)]
        for b in range(SIZE)
    ]
    assert draft.token_ids_BK.tolist() == expected
    found_BKV = draft_probs(draft, rows.shape[2])
    assert ((found_BKV - torch.from_numpy(probs_BKV)).abs().sum(dim=-1) / 2 < 1e-6).all()
    # What is said of the very tokens is what they were drawn by, and the law of the rows to rounding.
    own_BK = draft.law.probs_of(draft.token_ids_BK)
    drawn_BK = found_BKV.gather(-1, draft.token_ids_BK[..., None])[..., 0]
    torch.testing.assert_close(own_BK, drawn_BK, rtol=1e-5, atol=0)
    assert not draft.faults_BK.any()


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("vocab_size", [SMALL, pytest.param(TWO_TILES, marks=pytest.mark.slow)])
def test_each_draft_is_the_token_that_its_uniform_draws_from_its_row(vocab_size, cut, edited):
    assert_drawn(rows_of(vocab_size, cut=cut, edited=edited))


@pytest.mark.parametrize(
    "vocab_size", [1, TINY_POLICY, TWO_TILES, pytest.param(LARGE, marks=pytest.mark.slow)]
)
def test_vocabularies_of_every_kind(vocab_size):
    assert_drawn(rows_of(vocab_size))


def test_a_planted_uniform_of_another_draft_is_found(tmp_path, monkeypatch):
    right = "draw(source, known, uniforms_BK, all_rows"
    wrong = "draw(source, known, uniforms_BK.flip(1), all_rows"
    plant_in_sampler(tmp_path, monkeypatch, "draft_draw.fused", right, wrong)
    with pytest.raises(AssertionError):
        assert_drawn(rows_of(SMALL))


def test_coins_that_kernels_draw_are_the_uniforms_of_the_definition():
    rows, seeds_B = rows_of(SMALL), torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    inside, _ = step_coins(seeds_B, torch.arange(SIZE) + 2**31, torch.arange(SIZE), NUM_DRAFTS)
    found, expected = (draw_draft(rows.logits_BLV, TEMPERATURES, each) for each in (inside, drawn(inside)))
    assert torch.equal(found.token_ids_BK, expected.token_ids_BK)


@pytest.mark.parametrize("edited", [False, True])
def test_greedy_drafts_are_point_masses_on_the_first_of_the_best_tokens(edited):
    rows = rows_of(SMALL, edited=edited)
    rows.logits_BLV[0, 0, 7] = rows.logits_BLV[0, 0, 40] = 50.0
    rows = dataclasses.replace(rows, temperature_B=torch.zeros(SIZE).double())
    best_BK = torch.from_numpy(probs_by_hand(rows).argmax(axis=-1))
    for certain in (None, True):
        given = (rows.logits_BLV, rows.temperature_B, coins(*SHAPE))
        draft = draw_draft(*given, edits=rows.edits, certain=certain)
        assert draft.law is POINT_MASS
        assert torch.equal(draft.token_ids_BK, best_BK)


def test_rows_behind_a_requests_drafts_are_not_read():
    """Nothing is drawn there, and nothing is told of what they hold."""
    rows, counts_B = rows_of(SMALL), torch.tensor([0, 1, 2, 3, 3, 1])
    everything = draw_draft(rows.logits_BLV, TEMPERATURES, coins(*SHAPE)).token_ids_BK
    is_asked_BK = torch.arange(NUM_DRAFTS) < counts_B[:, None]
    unread = torch.where(is_asked_BK[..., None], rows.logits_BLV, torch.nan)
    draft = draw_draft(unread, TEMPERATURES, coins(*SHAPE), counts_B)
    assert torch.equal(draft.token_ids_BK, everything.where(is_asked_BK, 0))
    assert not draft.faults_BK.any()


def test_a_row_alone_has_the_bits_that_it_has_in_a_batch():
    rows, uniforms_BK = rows_of(SMALL), coins(*SHAPE)
    cut = Cut(*(each.double() for each in (TEMPERATURES * 0, TEMPERATURES * 0 + 0.9, TEMPERATURES * 0)))
    together = draw_draft(rows.logits_BLV, TEMPERATURES, uniforms_BK, cut=cut)
    for b in (1, 5):
        one = slice(b, b + 1)
        alone = draw_draft(rows.logits_BLV[one], TEMPERATURES[one], uniforms_BK[one], cut=cut.of(one))
        assert torch.equal(alone.token_ids_BK[0], together.token_ids_BK[b])
        known = (each.law.probs_of(each.token_ids_BK)[at] for each, at in ((alone, 0), (together, b)))
        assert torch.equal(*known)


def test_rows_that_are_not_finite_or_empty_are_told_of_one_by_one():
    rows = rows_of(SMALL).logits_BLV
    rows[1, 2, 3], rows[4, 0] = torch.inf, -torch.inf
    draft = draw_draft(rows, TEMPERATURES, coins(*SHAPE))
    assert draft.faults_BK.nonzero().tolist() == [[1, 2], [4, 0]]
    assert draft.faults_BK[1, 2] == RowFault.NOT_FINITE
    assert draft.faults_BK[4, 0] == RowFault.EMPTY
    assert ((draft.token_ids_BK >= 0) & (draft.token_ids_BK < SMALL)).all()


@pytest.mark.slow
def test_a_law_that_is_returned_is_the_law_drawn_from():
    """By many draws of steps, each from a law of its own."""

    def draft(call):
        logits_BKV = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(call))
        seeds_B, nothing_B = torch.tensor([call, -call]), torch.zeros(2).long()
        uniforms_BK, _ = step_coins(seeds_B, nothing_B, nothing_B, 4)
        return draw_draft(logits_BKV, torch.tensor([0.7, 0.0]), uniforms_BK)

    assert check_draft_law(draft, 100).passed


def test_of_no_rows_nothing_is_drawn():
    draft = draw_draft(torch.zeros(2, 0, SMALL), torch.ones(2), coins(2, 0))
    assert draft.token_ids_BK.shape == (2, 0)
    assert draft_probs(draft, SMALL).shape == (2, 0, SMALL)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_what_no_kernel_serves_is_refused_by_name(dtype):
    with pytest.raises(InvalidInput, match="logits are float16: Triton's kernels read float32, bfloat16"):
        draw_draft(torch.zeros(*SHAPE, SMALL).to(dtype), TEMPERATURES, coins(*SHAPE))


def test_the_definition_is_not_called(monkeypatch):
    monkeypatch.setattr(reference, "draw", None)
    draw_draft(rows_of(SMALL).logits_BLV, TEMPERATURES, coins(*SHAPE))
