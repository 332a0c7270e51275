"""`block_verify` as Triton's kernels, interpreted, against the plain formula in float64 and the definition.

Everything that is left uninitialized holds NaN, or the largest integer.
Shapes: B requests, K drafts, L = K + 1 rows, V vocabulary.
"""

import dataclasses

import pytest
import torch

from blockroll.kernels.block_verify import chosen_logprobs, reference, settle_first, verify_block
from blockroll.kernels.choice import using
from blockroll.kernels.draft_draw import draw_draft
from blockroll.kernels.philox import drawn
from blockroll.kernels.rows import Cut, LogitRows, PackedLogits, PackedRows, tiles
from blockroll.samplers import step_coins
from blockroll.types import POINT_MASS, Draft, Verdict
from tests.numerics.rows_by_hand import (
    NUM_DRAFTS,
    SIZE,
    TEMPERATURES,
    coins,
    probs_by_hand,
    random,
    token_at,
)
from tests.numerics.verdicts_by_hand import (
    COUNTS,
    KINDS,
    OPTIONS,
    assert_told,
    by_hand,
    draft_of,
    target_of,
)

SMALL, TINY_POLICY, TWO_TILES, LARGE = 63, 260, 4_097, 32_000
QUICK = {
    ("plain", "drawn"),
    ("plain", "certain"),
    ("cut", "drawn"),
    ("mixed", "either"),
    ("edited", "certain"),
}
CASES = [
    pytest.param(
        size, option, kind, marks=[] if size == SMALL and (option, kind) in QUICK else pytest.mark.slow
    )
    for size in (SMALL, TWO_TILES)
    for option in OPTIONS
    for kind in KINDS
]
# Rules that meet in one batch are quick; each of them alone is slow.
EACH_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "either" else pytest.mark.slow) for kind in KINDS]
)


@pytest.fixture(autouse=True)
def _poisoned():
    """What `torch.empty` gives, while algorithms are deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"):
        yield


@pytest.fixture
def tiles_as_on_a_gpu(monkeypatch):
    """One row of a program, whatever the vocabulary."""
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.SHAPE._replace(width=0))


def uniforms():
    return coins(SIZE, NUM_DRAFTS + 1)


@pytest.mark.parametrize(("vocab_size", "option", "kind"), CASES)
def test_verdicts_are_those_of_the_plain_formula(vocab_size, option, kind):
    target = target_of(vocab_size, option)
    draft, before = draft_of(target, kind), target.logits_BLV.clone()
    num_accepted = assert_told(verify_block(draft, target, uniforms()), draft, target, uniforms())
    assert 0 < num_accepted < int(COUNTS.sum())
    assert torch.equal(target.logits_BLV, before)


@pytest.mark.parametrize(
    ("vocab_size", "kind"),
    [
        (1, "certain"),
        (1, "drawn"),
        (TINY_POLICY, "either"),
        (TWO_TILES, "drawn"),
        pytest.param(LARGE, "drawn", marks=pytest.mark.slow),
        pytest.param(LARGE, "either", marks=pytest.mark.slow),
    ],
)
def test_verdicts_at_vocabularies_of_every_kind(vocab_size, kind):
    target = target_of(vocab_size, "plain")
    draft = draft_of(target, kind) if vocab_size > 1 else of_the_only_token(kind)
    assert assert_told(verify_block(draft, target, uniforms()), draft, target, uniforms()) > 0


def of_the_only_token(kind):
    law = POINT_MASS if kind == "certain" else LogitRows(torch.zeros(SIZE, NUM_DRAFTS, 1), TEMPERATURES, True)
    tokens_BK = torch.zeros((SIZE, NUM_DRAFTS), dtype=torch.int64)
    return Draft(token_ids_BK=tokens_BK, law=law, num_drafts_B=COUNTS)


@EACH_KIND
def test_one_row_of_a_program_gives_the_same(tiles_as_on_a_gpu, kind):
    target = target_of(SMALL, "plain")
    draft = draft_of(target, kind)
    assert assert_told(verify_block(draft, target, uniforms()), draft, target, uniforms()) > 0


@pytest.mark.parametrize("option", ["plain", "edited"])
def test_without_drafts_one_token_is_drawn_from_the_target(option):
    target = target_of(SMALL, option, size=1)
    no_tokens_B0 = torch.zeros((SIZE, 0), dtype=torch.int64)
    for law, by_position in ((POINT_MASS, True), (torch.zeros(SIZE, 0, SMALL).double(), False)):
        none = Draft(token_ids_BK=no_tokens_B0, law=law, num_drafts_B=no_tokens_B0.sum(dim=1))
        verdict, uniforms_B1 = verify_block(none, target, coins(SIZE, 1)), coins(SIZE, 1)
        expected = [
            [token_at(row_V, float(u))[0]]
            for row_V, u in zip(probs_by_hand(target)[:, 0], uniforms_B1[:, 0], strict=True)
        ]
        assert verdict.token_ids_BL.tolist() == expected
        assert (verdict.num_committed_B == 1).all()
        assert not verdict.is_draft_BL.any()
        assert (verdict.evidence.by_position_B == by_position).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_settled_first_position_is_that_of_one_draft(kind):
    target = target_of(SMALL, "plain")
    draft = dataclasses.replace(draft_of(target, kind), num_drafts_B=COUNTS.clamp(min=1))
    uniforms_B2, target_BLV = coins(SIZE, 2), probs_by_hand(target)
    settled = settle_first(draft, target, uniforms_B2)
    for b in range(SIZE):
        certain = kind == "certain" or (draft.certain_B is not None and bool(draft.certain_B[b]))
        law_KV = None if certain else probs_by_hand(draft.law)[b]
        given = uniforms_B2[b, :1].expand(2) if certain else uniforms_B2[b]
        told = by_hand(draft.token_ids_BK[b, :1].tolist(), law_KV, target_BLV[b], given)
        assert settled.token_ids_BL[b].tolist() == told.tokens[:1]
        assert settled.is_draft_BL[b].tolist() == [told.num_accepted == 1]
        assert settled.behavior_logprobs_BL[b].exp().tolist() == pytest.approx(told.probs[:1], rel=1e-4)
    assert (settled.num_committed_B == 1).all()


def assert_same(found: Verdict, expected: Verdict) -> None:
    """Bit for bit, as far as tokens are committed."""
    assert torch.equal(found.num_committed_B, expected.num_committed_B)
    assert torch.equal(found.is_draft_BL, expected.is_draft_BL)
    for b, number in enumerate(found.num_committed_B.tolist()):
        for name in ("token_ids_BL", "behavior_logprobs_BL"):
            assert torch.equal(getattr(found, name)[b, :number], getattr(expected, name)[b, :number])


@EACH_KIND
@pytest.mark.parametrize("option", [pytest.param("plain", marks=pytest.mark.slow), "edited"])
def test_packed_rows_give_the_verdict_of_the_rectangle(option, kind):
    target = target_of(SMALL, option)
    num_rows_B = COUNTS + 1
    packed = PackedLogits(
        logits_NV=target.logits_BLV[torch.arange(NUM_DRAFTS + 1) < num_rows_B[:, None]],
        starts_B=num_rows_B.cumsum(0) - num_rows_B,
        num_rows_B=num_rows_B,
        width=NUM_DRAFTS + 1,
    )
    draft = draft_of(target, kind)
    rows = PackedRows(packed, TEMPERATURES, True, edits=target.edits)
    assert_same(*(verify_block(draft, each, uniforms()) for each in (rows, target)))


@pytest.mark.parametrize("kind", [pytest.param("drawn", marks=pytest.mark.slow), "either"])
def test_rows_behind_the_first_are_verified_as_rows_of_their_own(kind):
    """By what is known of them already, where they were drawn by kernels."""
    target = target_of(SMALL, "edited")
    logits_BKV = target.logits()[:, :NUM_DRAFTS].float() + 0.7 * random(SIZE, NUM_DRAFTS, SMALL, seed=6)
    temperature_B = TEMPERATURES if kind == "either" else TEMPERATURES.clamp(min=0.2)
    drawn_BK = coins(SIZE, NUM_DRAFTS, seed=5)
    draft = draw_draft(logits_BKV, temperature_B, drawn_BK, COUNTS.clamp(min=1)).behind_first()
    law = LogitRows(logits_BKV[:, 1:], temperature_B, True)
    anew, behind = dataclasses.replace(draft, law=law), uniforms()[:, 1:]
    assert_same(*(verify_block(each, target.behind_first(), behind) for each in (draft, anew)))


@pytest.mark.failure(54)
@pytest.mark.parametrize(
    ("vocab_size", "is_cut"),
    [(SMALL, False), *(pytest.param(size, True, marks=pytest.mark.slow) for size in (SMALL, TWO_TILES))],
)
def test_a_request_alone_has_the_bits_that_it_has_in_a_batch(vocab_size, is_cut):
    """By both rules, and in another place of the batch."""
    target = target_of(vocab_size, "plain")
    draft = draft_of(target, "either")
    if is_cut:
        target = dataclasses.replace(target, cut=some_cut())
    order_B = torch.tensor([4, 2, 0, 5, 1, 3])
    together = verify_block(draft, target, uniforms())
    moved = verify_block(*of_requests(draft, target, order_B), uniforms()[order_B])
    alone = [
        verify_block(*of_requests(draft, target, torch.tensor([b])), uniforms()[b : b + 1])
        for b in range(SIZE)
    ]
    for place, b in enumerate(order_B.tolist()):
        number = int(together.num_committed_B[b])
        for other, row in ((moved, place), (alone[b], 0)):
            assert int(other.num_committed_B[row]) == number
            for name in ("token_ids_BL", "behavior_logprobs_BL"):
                same = [getattr(each, name)[at, :number] for each, at in ((together, b), (other, row))]
                assert torch.equal(*same)


def some_cut() -> Cut:
    top_p = torch.tensor([1, 0.7, 1, 0.9, 1, 0.5], dtype=torch.float64)
    return Cut(
        torch.tensor([0.0, 0, 0, 0, 9, 5]).double(), top_p, torch.tensor([0.1, 0, 0, 0, 0, 0]).double()
    )


def of_requests(draft: Draft, target: LogitRows, chosen_N: torch.Tensor) -> tuple[Draft, LogitRows]:
    law = LogitRows(draft.law.logits_BLV[chosen_N], TEMPERATURES[chosen_N], True)
    cut = None if target.cut is None else target.cut.of(chosen_N)
    given = {name: getattr(draft, name)[chosen_N] for name in ("token_ids_BK", "num_drafts_B", "certain_B")}
    return Draft(law=law, **given), LogitRows(target.logits_BLV[chosen_N], TEMPERATURES[chosen_N], True, cut)


@pytest.mark.parametrize(
    "cut", [None, pytest.param(some_cut(), marks=pytest.mark.slow)], ids=["whole", "cut"]
)
def test_bfloat16_logits_stand_for_the_float32_that_they_are(cut):
    exact = dataclasses.replace(target_of(SMALL, "plain"), cut=cut)
    rough = dataclasses.replace(exact, logits_BLV=exact.logits_BLV.bfloat16())
    as_float = dataclasses.replace(exact, logits_BLV=rough.logits_BLV.float())
    drafted = 3 * random(SIZE, NUM_DRAFTS, SMALL, seed=8)
    drafts = [
        draw_draft(rows, TEMPERATURES, coins(SIZE, NUM_DRAFTS, seed=5), COUNTS)
        for rows in (drafted.bfloat16(), drafted.bfloat16().float())
    ]
    assert torch.equal(*(draft.token_ids_BK for draft in drafts))
    verdicts = [verify_block(*each, uniforms()) for each in zip(drafts, (rough, as_float), strict=True)]
    assert_same(*verdicts)
    # A law of another type than the target's is read as the wider one.
    assert_same(verify_block(drafts[0], as_float, uniforms()), verdicts[1])


def test_laws_of_probabilities_and_of_logits_meet():
    target = target_of(SMALL, "plain")
    draft = draft_of(target, "drawn")
    dense = dataclasses.replace(draft, law=draft.law.dense())
    expected = verify_block(draft, target, uniforms())
    for each in ((dense, target), (draft, target.dense()), (dense, target.dense())):
        found = verify_block(*each, uniforms())
        assert torch.equal(found.num_committed_B, expected.num_committed_B)
        for b, number in enumerate(found.num_committed_B.tolist()):
            assert torch.equal(found.token_ids_BL[b, :number], expected.token_ids_BL[b, :number])


@EACH_KIND
@pytest.mark.parametrize("settles", [False, True])
def test_coins_that_kernels_draw_are_the_uniforms_of_the_definition(kind, settles):
    """Word for word: the evidence says which uniform decided what."""
    target = target_of(SMALL, "plain")
    draft = draft_of(target, kind)
    seeds_B = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    given = (seeds_B, torch.arange(SIZE) + 2**31 - 3, torch.arange(SIZE) * 7, NUM_DRAFTS)
    _, inside = step_coins(*given, settles=settles, by_position=draft.is_certain)
    if settles:
        inside = inside[:, [0, -1]]
        draft = dataclasses.replace(draft, num_drafts_B=COUNTS.clamp(min=1))
    verify = settle_first if settles else verify_block
    found, expected = (verify(draft, target, each) for each in (inside, drawn(inside)))
    assert_same(found, expected)
    for name in ("coins_BK", "uniforms_BL"):
        pair = (getattr(each.evidence, name) for each in (found, expected))
        assert torch.equal(*(each.nan_to_num(nan=-1.0) for each in pair))
    used_BK, given_BK = found.evidence.coins_BK, drawn(inside)[:, : found.evidence.coins_BK.shape[1]]
    assert torch.equal(used_BK[~used_BK.isnan()], given_BK[~used_BK.isnan()])


def test_logprobs_of_the_policy_are_those_of_the_chosen_cells_of_all_parts():
    logits_BLV = 3 * random(SIZE, 3, SMALL, seed=3)
    logits_BLV[2, 1, 4] -= 900.0  # too unlikely for float64
    tokens_BL = torch.randint(SMALL, (SIZE, 3), generator=torch.Generator().manual_seed(2))
    tokens_BL[2, 1] = 4
    is_chosen_BL = coins(SIZE, 3) < 0.6
    is_chosen_BL[2, 1] = True
    given = (is_chosen_BL, tokens_BL, TEMPERATURES)
    packed = PackedLogits(
        logits_NV=logits_BLV[:, 1:].reshape(-1, SMALL),
        starts_B=2 * torch.arange(SIZE),
        num_rows_B=torch.full((SIZE,), 2),
        width=2,
    )
    scale_B11 = torch.where(TEMPERATURES == 0, 1.0, TEMPERATURES)[:, None, None]
    exact_BL = (logits_BLV.double() / scale_B11).log_softmax(-1).gather(-1, tokens_BL[..., None])[..., 0]
    for rest in (logits_BLV[:, 1:], packed):
        found = chosen_logprobs([logits_BLV[:, :1], rest], *given)
        torch.testing.assert_close(found, exact_BL.where(is_chosen_BL, 0.0), rtol=1e-9, atol=1e-6)


def test_of_no_requests_nothing_is_decided():
    none = Draft(
        token_ids_BK=torch.zeros((0, 2), dtype=torch.int64),
        law=torch.zeros(0, 2, 5).double(),
        num_drafts_B=torch.zeros(0, dtype=torch.int64),
    )
    verdict = verify_block(none, torch.zeros(0, 3, 5).double(), torch.zeros(0, 3).double())
    assert verdict.token_ids_BL.shape == (0, 3)


def test_the_definition_is_not_called(monkeypatch):
    for name in ("verify", "settle", "chosen_logprobs"):
        monkeypatch.setattr(reference, name, None)
    target = target_of(SMALL, "plain")
    verify_block(draft_of(target, "drawn"), target, uniforms())
