"""`block_verify`: verdicts, log-probabilities and evidence are the plain formula's, in every way it runs.

Shapes: B requests, K drafts, L = K + 1 rows, V vocabulary.
"""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.block_verify import chosen_logprobs, reference, settle_first, verify_block
from blockroll.kernels.rows import Cut, Edits, LogitRows, Mix, PackedLogits, PackedRows, logit_rows
from blockroll.types import POINT_MASS, Draft
from tests.numerics.rows_by_hand import (
    NUM_DRAFTS,
    SIZE,
    SMALL,
    TEMPERATURES,
    WIDE,
    coins,
    probs_by_hand,
    random,
    token_at,
)
from tests.numerics.verdicts_by_hand import COUNTS, KINDS, OPTIONS, assert_told, by_hand, draft_of, target_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_verdicts_are_those_of_the_plain_formula(vocab_size, option, kind):
    target = target_of(vocab_size, option)
    draft, uniforms_BL = draft_of(target, kind), coins(SIZE, NUM_DRAFTS + 1)
    num_accepted = assert_told(verify_block(draft, target, uniforms_BL), draft, target, uniforms_BL)
    assert 0 < num_accepted < int(COUNTS.sum())


@pytest.mark.parametrize("option", ["plain", "cut", "edited"])
def test_without_drafts_one_token_is_drawn_from_the_target(vocab_size, option):
    target = target_of(vocab_size, option, size=1)
    none = Draft(
        token_ids_BK=torch.zeros((SIZE, 0), dtype=torch.int64),
        law=POINT_MASS,
        num_drafts_B=torch.zeros(SIZE, dtype=torch.int64),
    )
    verdict, uniforms_B1 = verify_block(none, target, coins(SIZE, 1)), coins(SIZE, 1)
    for b, row_V in enumerate(probs_by_hand(target)[:, 0]):
        assert verdict.token_ids_BL[b].tolist() == [token_at(row_V, float(uniforms_B1[b, 0]))[0]]
    assert (verdict.num_committed_B == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_settled_first_position_is_that_of_one_draft(vocab_size, kind):
    """Whether the draft stands, and what stands where it does not; the token behind it is not drawn."""
    target = target_of(vocab_size, "plain")
    draft = dataclasses.replace(draft_of(target, kind), num_drafts_B=COUNTS.clamp(min=1))
    uniforms_B2 = coins(SIZE, 2)
    settled = settle_first(draft, target, uniforms_B2)
    target_BLV = probs_by_hand(target)
    for b in range(SIZE):
        certain = kind == "certain" or (draft.certain_B is not None and bool(draft.certain_B[b]))
        law_KV = None if certain else probs_by_hand(draft.law)[b]
        uniforms = uniforms_B2[b, :1].expand(2) if certain else uniforms_B2[b]
        told = by_hand(draft.token_ids_BK[b, :1].tolist(), law_KV, target_BLV[b], uniforms)
        assert settled.token_ids_BL[b].tolist() == told.tokens[:1]
        assert settled.is_draft_BL[b].tolist() == [told.num_accepted == 1]
        assert settled.behavior_logprobs_BL[b].exp().tolist() == pytest.approx(told.probs[:1], rel=1e-4)
    assert (settled.num_committed_B == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_verdict_of_the_rectangle(vocab_size, kind):
    target = target_of(vocab_size, "edited")
    num_rows_B = COUNTS + 1
    packed = PackedLogits(
        logits_NV=target.logits_BLV[torch.arange(NUM_DRAFTS + 1) < num_rows_B[:, None]],
        starts_B=num_rows_B.cumsum(0) - num_rows_B,
        num_rows_B=num_rows_B,
        width=NUM_DRAFTS + 1,
    )
    draft, uniforms_BL = draft_of(target, kind), coins(SIZE, NUM_DRAFTS + 1)
    rows = PackedRows(packed, TEMPERATURES, True, edits=target.edits)
    found, expected = (verify_block(draft, each, uniforms_BL) for each in (rows, target))
    assert torch.equal(found.num_committed_B, expected.num_committed_B)
    for b, number in enumerate(found.num_committed_B.tolist()):
        assert torch.equal(found.token_ids_BL[b, :number], expected.token_ids_BL[b, :number])
        torch.testing.assert_close(
            found.behavior_logprobs_BL[b, :number],
            expected.behavior_logprobs_BL[b, :number],
            rtol=1e-9,
            atol=0,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_alone_has_the_verdict_that_it_has_in_a_batch(vocab_size, kind):
    target = target_of(vocab_size, "plain")
    draft, uniforms_BL = draft_of(target, kind), coins(SIZE, NUM_DRAFTS + 1)
    together = verify_block(draft, target, uniforms_BL)
    for b in range(SIZE):
        one = slice(b, b + 1)
        law = draft.law
        if isinstance(law, LogitRows):
            law = LogitRows(law.logits_BLV[one], TEMPERATURES[one], True)
        alone = verify_block(
            Draft(
                token_ids_BK=draft.token_ids_BK[one],
                law=law,
                num_drafts_B=draft.num_drafts_B[one],
                certain_B=None if draft.certain_B is None else draft.certain_B[one],
            ),
            LogitRows(target.logits_BLV[one], TEMPERATURES[one], True),
            uniforms_BL[one],
        )
        number = int(alone.num_committed_B)
        assert number == int(together.num_committed_B[b])
        assert torch.equal(alone.token_ids_BL[0, :number], together.token_ids_BL[b, :number])
        assert torch.equal(alone.behavior_logprobs_BL[0, :number], together.behavior_logprobs_BL[b, :number])


@pytest.mark.parametrize("size", [SMALL, WIDE])
def test_bfloat16_logits_stand_for_the_float32_that_they_are(size, monkeypatch):
    monkeypatch.setattr(logit_rows, "rows_library", lambda: None)
    exact = dataclasses.replace(target_of(size, "all"), mix=None)
    rough = dataclasses.replace(exact, logits_BLV=exact.logits_BLV.bfloat16())
    as_float = dataclasses.replace(rough, logits_BLV=rough.logits_BLV.float())
    draft, uniforms_BL = draft_of(exact, "drawn"), coins(SIZE, NUM_DRAFTS + 1)
    found, expected = (verify_block(draft, each, uniforms_BL) for each in (rough, as_float))
    for name in ("token_ids_BL", "num_committed_B", "behavior_logprobs_BL"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_logprobs_of_the_policy_are_those_of_the_chosen_cells_of_all_parts(vocab_size):
    logits_BLV = 3 * random(SIZE, 3, vocab_size, seed=3)
    tokens_BL = torch.randint(vocab_size, (SIZE, 3), generator=torch.Generator().manual_seed(2))
    is_chosen_BL = coins(SIZE, 3) < 0.6
    found = chosen_logprobs([logits_BLV[:, :1], logits_BLV[:, 1:]], is_chosen_BL, tokens_BL, TEMPERATURES)
    scale_B11 = torch.where(TEMPERATURES == 0, 1.0, TEMPERATURES)[:, None, None]
    exact_BL = (logits_BLV.double() / scale_B11).log_softmax(-1).gather(-1, tokens_BL[..., None])[..., 0]
    torch.testing.assert_close(found, exact_BL.where(is_chosen_BL, 0.0), rtol=0, atol=1e-6)


JUDGED, DRAW = reference._judged, reference.draw_by_position


def the_target_for_the_residual(target, *_):
    return target


def drafts_half_as_likely(draft, law, target, draft_p_BK, *rest, **options):
    return JUDGED(draft, law, target, draft_p_BK / 2, *rest, **options)


def the_coin_of_the_row_before(draft, target, uniforms_BL):
    return DRAW(draft, target, uniforms_BL.roll(1, dims=1))


PLANTED = {
    "_residual": (the_target_for_the_residual, "drawn"),
    "_judged": (drafts_half_as_likely, "drawn"),
    "draw_by_position": (the_coin_of_the_row_before, "certain"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found_out(name, monkeypatch):
    wrong, kind = PLANTED[name]
    monkeypatch.setattr(reference, name, wrong)
    target = target_of(SMALL, "plain")
    draft, uniforms_BL = draft_of(target, kind), coins(SIZE, NUM_DRAFTS + 1)
    verdict = verify_block(draft, target, uniforms_BL)
    with pytest.raises(AssertionError):
        assert_told(verdict, draft, target, uniforms_BL)


def given():
    target = target_of(SMALL, "plain")
    return draft_of(target, "either"), target, coins(SIZE, NUM_DRAFTS + 1)


HALF = torch.ones(SIZE - 1, dtype=torch.float64)
REFUSED = {
    "uniforms of fewer": (
        {"uniforms": coins(SIZE, 3)},
        r"uniforms_BL is float64 \(6, 3\): give float64 \(6, 4\)",
    ),
    "float32 uniforms": ({"uniforms": coins(SIZE, 4).float()}, r"is float32 \(6, 4\): give float64"),
    "rows of fewer drafts": (
        {"logits_BLV": torch.zeros(SIZE, 3, SMALL)},
        r"the target has shape \(6, 3, 63\): give \(6, 4, 63\)",
    ),
    "rows of one request": (
        {"logits_BLV": torch.zeros(1, 4, SMALL)},
        r"the target has shape \(1, 4, 63\): give \(6, 4, 63\)",
    ),
    "another vocabulary": (
        {"logits_BLV": torch.zeros(SIZE, 4, 9)},
        r"the law of the drafts has shape \(6, 3, 63\): give \(6, 3, 9\)",
    ),
    "integers": (
        {"logits_BLV": torch.zeros(SIZE, 4, SMALL).long()},
        "the target has logits of int64: give one of float32, bfloat16",
    ),
    "a temperature too few": (
        {"temperature_B": HALF},
        r"temperatures float64 \(5,\): give float64 \(6,\)",
    ),
    "cuts of others": ({"cut": Cut(HALF, HALF, HALF)}, r"top-k, top-p and min-p float64 \(5,\)"),
    "edits of others": (
        {"edits": Edits(torch.zeros(SIZE, 2, dtype=torch.int64), torch.zeros(SIZE, 3, 2).double())},
        r"edited tokens int64 \(6, 2\) with logits float64 \(6, 3, 2\): give int64 \(6, U\) and float64",
    ),
    "mixing too many": (
        {"mix": Mix(torch.zeros(SIZE, 5, SMALL), TEMPERATURES, COUNTS)},
        r"mixes draft rows float32 \(6, 5, 63\).*give \(6, at most 4, 63\)",
    ),
    "float32 probabilities": (
        {"target": torch.ones(SIZE, 4, SMALL)},
        r"the target is float32 \(6, 4, 63\): give float64 probabilities",
    ),
    "int32 drafts": (
        {"token_ids_BK": torch.zeros(SIZE, 3, dtype=torch.int32)},
        r"token_ids_BK is int32 \(6, 3\): give int64",
    ),
    "flat drafts": ({"token_ids_BK": torch.zeros(SIZE, dtype=torch.int64)}, r"drafts have shape \(6,\)"),
    "counts of others": ({"num_drafts_B": COUNTS[1:]}, r"num_drafts_B is int64 \(5,\): give int64"),
    "float counts": ({"num_drafts_B": COUNTS.double()}, "num_drafts_B is float64"),
    "counts above K": (
        {"num_drafts": [3, 3, 3, 4, 0, 2]},
        r"num_drafts is \[3, 3, 3, 4, 0, 2\]: give 0 to 3",
    ),
    "numbers for flags": ({"certain_B": COUNTS}, r"certain_B is int64 \(6,\): give bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(case):
    change, sentence = REFUSED[case]
    draft, target, uniforms_BL = given()
    of_draft = {name: each for name, each in change.items() if name in Draft.__dataclass_fields__}
    of_rows = {name: each for name, each in change.items() if name in LogitRows.__dataclass_fields__}
    draft, target = dataclasses.replace(draft, **of_draft), dataclasses.replace(target, **of_rows)
    with pytest.raises(InvalidInput, match=sentence):
        verify_block(draft, change.get("target", target), change.get("uniforms", uniforms_BL))


def test_a_first_position_is_settled_of_drafts_and_rows_that_there_are():
    draft, target, uniforms_BL = given()
    none = dataclasses.replace(draft, token_ids_BK=draft.token_ids_BK[:, :0], law=POINT_MASS)
    with pytest.raises(InvalidInput, match="K = 0 drafts and 4 target rows"):
        settle_first(none, target, uniforms_BL[:, :2])
    with pytest.raises(InvalidInput, match=r"uniforms_B2 is float64 \(6, 4\): give float64 \(6, 2\)"):
        settle_first(draft, target, uniforms_BL)


def test_logprobs_of_other_cells_are_refused():
    tokens_BL, parts = torch.zeros(2, 3, dtype=torch.int64), [torch.zeros(2, 2, 5)]
    with pytest.raises(InvalidInput, match=r"rows \[\(2, 2, 5\)\] and 2 temperatures for tokens \(2, 3\)"):
        chosen_logprobs(parts, tokens_BL > 0, tokens_BL, torch.ones(2).double())
    with pytest.raises(InvalidInput, match="is_chosen_BL is int64"):
        chosen_logprobs(parts, tokens_BL, tokens_BL, torch.ones(2).double())
