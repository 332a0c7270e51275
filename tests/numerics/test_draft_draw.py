"""`draft_draw`: tokens and laws are those of the plain formula, in every way it runs.

Shapes: B requests, K drafts, V vocabulary.
"""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.draft_draw import draft_probs, draw_draft, reference
from blockroll.kernels.rows import Cut, Edits, LogitRows
from blockroll.types import POINT_MASS
from tests.numerics.rows_by_hand import (
    NUM_DRAFTS,
    SIZE,
    SMALL,
    TEMPERATURES,
    coins,
    edits_of,
    probs_by_hand,
    random,
    token_at,
    top_k_of,
)

SHAPE = (SIZE, NUM_DRAFTS)


def rows_of(vocab_size: int, *, cut: bool, edited: bool) -> LogitRows:
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
    own_BK = draft.law.probs_of(draft.token_ids_BK)
    drawn_BK = found_BKV.gather(-1, draft.token_ids_BK[..., None])[..., 0]
    torch.testing.assert_close(own_BK, drawn_BK, rtol=1e-12, atol=0)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_each_draft_is_the_token_that_its_uniform_draws_from_its_row(vocab_size, cut, edited):
    assert_drawn(rows_of(vocab_size, cut=cut, edited=edited))


def test_a_planted_uniform_of_another_draft_is_found_out(monkeypatch):
    real = reference.draw
    monkeypatch.setattr(
        reference, "draw", lambda rows, uniforms_BK, *rest: real(rows, uniforms_BK.flip(1), *rest)
    )
    with pytest.raises(AssertionError):
        assert_drawn(rows_of(SMALL, cut=False, edited=False))


@pytest.mark.parametrize("edited", [False, True])
def test_greedy_drafts_are_point_masses_on_the_best_token(vocab_size, edited):
    rows = dataclasses.replace(
        rows_of(vocab_size, cut=True, edited=edited), temperature_B=torch.zeros(SIZE).double()
    )
    best_BK = torch.from_numpy(probs_by_hand(rows).argmax(axis=-1))
    for certain in (None, True):
        draft = draw_draft(
            rows.logits_BLV,
            rows.temperature_B,
            coins(*SHAPE),
            cut=rows.cut,
            edits=rows.edits,
            certain=certain,
        )
        assert draft.law is POINT_MASS
        assert torch.equal(draft.token_ids_BK, best_BK)


def test_it_is_said_whose_drafts_were_certain():
    rows = rows_of(SMALL, cut=False, edited=False)
    some = draw_draft(rows.logits_BLV, TEMPERATURES, coins(*SHAPE))
    assert torch.equal(some.certain_B, TEMPERATURES == 0)
    nobody = draw_draft(rows.logits_BLV, TEMPERATURES + 1, coins(*SHAPE))
    assert nobody.is_certain is False
    known = draw_draft(rows.logits_BLV, TEMPERATURES, coins(*SHAPE), certain=TEMPERATURES == 0)
    assert torch.equal(known.token_ids_BK, some.token_ids_BK)


def test_of_no_rows_nothing_is_drawn(vocab_size):
    draft = draw_draft(torch.zeros(2, 0, vocab_size), torch.ones(2), coins(2, 0))
    assert draft.token_ids_BK.shape == (2, 0)
    assert draft.num_drafts_B.tolist() == [0, 0]
    assert draft_probs(draft, vocab_size).shape == (2, 0, vocab_size)


HALF = torch.ones(SIZE - 1, dtype=torch.float64)
REFUSED = {
    "flat rows": (
        {"logits_BKV": torch.zeros(SIZE, SMALL)},
        r"rows have shape \(6, 63\) and uniforms \(6, 3\)",
    ),
    "rows of fewer drafts": (
        {"logits_BKV": torch.zeros(SIZE, 2, SMALL)},
        r"the law of the drafts has shape \(6, 2, 63\): give \(6, 3, 63\)",
    ),
    "integers": (
        {"logits_BKV": torch.zeros(SIZE, 3, SMALL).long()},
        "logits of int64: give one of float32, bfloat16",
    ),
    "float32 uniforms": (
        {"uniforms_BK": coins(*SHAPE).float()},
        r"uniforms_BK is float32 \(6, 3\): give float64",
    ),
    "temperatures of others": ({"temperature_B": HALF}, r"temperatures float64 \(5,\)"),
    "counts of others": ({"num_drafts_B": torch.ones(5).long()}, r"num_drafts_B is int64 \(5,\)"),
    "float counts": ({"num_drafts_B": torch.ones(6)}, "num_drafts_B is float32"),
    "cuts of others": ({"cut": Cut(HALF, HALF, HALF)}, r"top-k, top-p and min-p float64 \(5,\)"),
    "edits of others": (
        {"edits": Edits(torch.zeros(SIZE, 2), torch.zeros(SIZE, 3, 2).double())},
        r"edited tokens float32 \(6, 2\)",
    ),
    "flags of others": ({"certain": torch.ones(5) > 0}, r"certain is bool \(5,\): give bool \(6,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(case):
    change, sentence = REFUSED[case]
    right = {
        "logits_BKV": torch.zeros(*SHAPE, SMALL),
        "temperature_B": TEMPERATURES,
        "uniforms_BK": coins(*SHAPE),
    }
    with pytest.raises(InvalidInput, match=sentence):
        draw_draft(**(right | change))
