"""`block_verify` as Triton's kernels, interpreted: what is wrong with rows, and rows that no kernel serves.

Shapes: B requests, K drafts, L = K + 1 rows, V vocabulary.
"""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.block_verify import verify_block
from blockroll.kernels.choice import using
from blockroll.kernels.draft_draw import draw_draft
from blockroll.kernels.rows import LogitRows, tiles
from blockroll.types import POINT_MASS, Draft, RowFault
from tests.kernels.far_apart import far_apart
from tests.numerics.rows_by_hand import NUM_DRAFTS, SIZE, TEMPERATURES, coins, random
from tests.numerics.verdicts_by_hand import COUNTS, KINDS, assert_told, draft_of, target_of

SMALL = 63


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


def uniforms():
    return coins(SIZE, NUM_DRAFTS + 1)


def test_a_row_that_is_not_finite_is_told_of_and_its_neighbours_are_not_changed():
    """In the request's row or another one; what is drawn is an id of the vocabulary."""
    target = target_of(SMALL, "plain")
    draft = draft_of(target, "either")
    expected = verify_block(draft, target, uniforms())
    bad = target.logits_BLV.clone()
    bad[1, 0, 5], bad[3, 1, 62], bad[0, :, :] = torch.nan, torch.inf, torch.nan
    bad[4, 2] = torch.nan  # behind the last row that the request has
    verdict = verify_block(draft, dataclasses.replace(target, logits_BLV=bad), uniforms())
    is_bad_B = (verdict.faults_BL == RowFault.NOT_FINITE).any(dim=1)
    assert is_bad_B.tolist() == [True, True, False, True, False, False]
    assert ((verdict.token_ids_BL >= 0) & (verdict.token_ids_BL < SMALL)).all()
    fine = ~is_bad_B
    assert torch.equal(verdict.token_ids_BL[fine], expected.token_ids_BL[fine])
    assert torch.equal(verdict.num_committed_B[fine], expected.num_committed_B[fine])


def test_a_draft_row_that_is_not_finite_leaves_the_targets_law():
    target = target_of(SMALL, "plain")
    rows = target.logits_BLV[:, :NUM_DRAFTS] + 0.7 * random(SIZE, NUM_DRAFTS, SMALL, seed=8)
    rows[1], rows[3, 0, 7] = torch.nan, torch.nan
    draft = draw_draft(rows, TEMPERATURES, coins(SIZE, NUM_DRAFTS, seed=5), COUNTS, certain=TEMPERATURES == 0)
    assert (draft.faults_BK == RowFault.NOT_FINITE).any(dim=1).tolist() == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    even = LogitRows(torch.where(rows.isnan().any(-1, keepdim=True), 0.0, rows), TEMPERATURES, True)
    as_even = dataclasses.replace(draft, law=even)
    assert assert_told(verify_block(draft, target, uniforms()), as_even, target, uniforms()) > 0


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "either" else pytest.mark.slow) for kind in KINDS]
)
def test_a_row_without_any_token_is_told_of(kind):
    target = target_of(SMALL, "plain")
    empty = target.logits_BLV.clone()
    empty[0, 0] = empty[3, 1] = -torch.inf
    draft = draft_of(target, kind)
    verdict = verify_block(draft, dataclasses.replace(target, logits_BLV=empty), uniforms())
    found = (verdict.faults_BL == RowFault.EMPTY).nonzero().tolist()
    assert found == [[0, 0], [3, 1]]
    assert not (verdict.faults_BL == RowFault.NOT_FINITE).any()
    assert ((verdict.token_ids_BL >= 0) & (verdict.token_ids_BL < SMALL)).all()


def test_ids_that_are_no_tokens_are_rejected():
    target = target_of(SMALL, "plain")
    draft = draft_of(target, "drawn")
    strange = dataclasses.replace(draft, token_ids_BK=torch.full_like(draft.token_ids_BK, SMALL))
    strange.token_ids_BK[1] = -1
    verdict = verify_block(strange, target, uniforms())
    assert (verdict.num_committed_B == 1).all()
    assert (verdict.token_ids_BL[:, 0] < SMALL).all()


STRIDED = torch.zeros(SIZE, NUM_DRAFTS + 1, SMALL, 2)[..., 0]
REFUSED = {
    "half": (torch.zeros(SIZE, NUM_DRAFTS + 1, SMALL).half(), "logits are float16: Triton's kernels read"),
    "strides": (STRIDED, "a stride of 2 between ids: Triton's kernels read ids that follow on one another"),
    "vocabulary": (
        torch.zeros(tiles.LARGEST_VOCABULARY + 1).expand(SIZE, NUM_DRAFTS + 1, -1),
        "the vocabulary has 524289 tokens: Triton's kernels take 1 to 524288",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_kernel_serves_is_refused_by_name(case):
    logits_BLV, sentence = REFUSED[case]
    target = dataclasses.replace(target_of(SMALL, "plain"), logits_BLV=logits_BLV)
    tokens_BK = torch.zeros((SIZE, NUM_DRAFTS), dtype=torch.int64)
    draft = Draft(token_ids_BK=tokens_BK, law=POINT_MASS, num_drafts_B=COUNTS)
    with pytest.raises(InvalidInput, match=sentence):
        verify_block(draft, target, uniforms())


def test_rows_that_lie_far_apart_are_found(monkeypatch):
    """Beyond 2^31 elements, of the target and of the drafts."""
    target = target_of(SMALL, "plain")
    draft = draft_of(target, "drawn")
    expected = verify_block(draft, target, uniforms())
    apart = dataclasses.replace(target, logits_BLV=far_apart(target.logits_BLV, monkeypatch))
    law = dataclasses.replace(draft.law, logits_BLV=far_apart(draft.law.logits_BLV, monkeypatch))
    found = verify_block(dataclasses.replace(draft, law=law), apart, uniforms())
    for name in ("token_ids_BL", "num_committed_B"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
