"""Drafts that were certain carry no dense law, and stand if they are the tokens that their coins draw."""

from dataclasses import replace

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.block_verify import reference
from blockroll.kernels.block_verify.by_position import draw_by_position
from blockroll.kernels.rows import LogitRows
from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import Laws, draft_probs, draw_draft, settle_first, verify_block
from blockroll.samplers.check import check_draft_law
from blockroll.samplers.laws import Text
from blockroll.types import POINT_MASS, Draft, Sampling
from tests.law.integrate import PRODUCTION, Sampler, committed_law, max_difference, target_law
from tests.law.toys import TOYS, Toy

BATCH, VOCAB = 2_000, 7
CERTAIN = ["argmax_draft", "greedy_argmax_draft"]
NEVER_LIKELY = Toy(  # fixed tokens, as looked-up ones are, that the target rarely takes
    vocab_size=4,
    target_weights=TOYS["four_tokens"].target_weights,
    draft_weights=lambda history, i: [int(token == (i + 2) % 4) for token in range(4)],
    draft_temperature=0,
)


def certain_draft(num_drafts: int, generator: torch.Generator) -> Draft:
    return Draft(
        token_ids_BK=torch.randint(VOCAB, (BATCH, num_drafts), generator=generator),
        law=POINT_MASS,
        num_drafts_B=torch.randint(num_drafts + 1, (BATCH,), generator=generator),
    )


def targets(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Laws with zeros, and some of one token alone."""
    logits = 3 * torch.randn((BATCH, num_rows, VOCAB), generator=generator, dtype=torch.float64)
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
    logits[..., 0] = logits[..., 0].nan_to_num(neginf=-1.0)
    logits[:50, :, 1:] = -torch.inf
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 5])
def test_tokens_are_those_of_their_coins_up_to_the_first_that_is_not_the_draft(num_drafts):
    generator = torch.Generator().manual_seed(num_drafts)
    draft = certain_draft(num_drafts, generator)
    rows = targets(num_drafts + 1, generator)
    uniforms = torch.rand((BATCH, num_drafts + 1), generator=generator, dtype=torch.float64)
    verdict, drawn = verify_block(draft, rows, uniforms), inverse_cdf(rows, uniforms)
    is_same = drawn[:, :num_drafts] == draft.token_ids_BK
    is_same &= torch.arange(num_drafts) < draft.num_drafts_B[:, None]
    num_same = is_same.long().cumprod(dim=1).sum(dim=1)
    assert torch.equal(verdict.num_committed_B, num_same + 1)
    assert torch.equal(verdict.num_accepted_B, num_same)
    is_committed = torch.arange(num_drafts + 1) < verdict.num_committed_B[:, None]
    assert torch.equal(verdict.token_ids_BL[is_committed], drawn[is_committed])
    want = rows.gather(-1, drawn[..., None])[..., 0].log()
    assert torch.equal(verdict.behavior_logprobs_BL[is_committed], want[is_committed])
    seen, committed = verdict.evidence, uniforms[is_committed]
    low, high, mass = (each[is_committed] for each in (seen.low_BL, seen.high_BL, seen.mass_BL))
    assert ((low <= committed * mass) & (committed * mass < high)).all()
    assert seen.by_position_B.all()
    assert torch.equal(seen.uniforms_BL[is_committed], committed)


@pytest.mark.parametrize("vocab_size", [40, 9_000])
def test_rows_of_logits_are_verified_as_their_probabilities_are(vocab_size):
    """Where rows cost much, none behind the first token that is no draft is formed; the rest is equal."""
    generator = torch.Generator().manual_seed(7)
    size, num_drafts = 30, 4
    logits = 4 * torch.randn((size, num_drafts + 1, vocab_size), generator=generator)
    temperature = torch.where(torch.arange(size) % 3 > 0, 0.7, 0.0).double()
    uniforms = torch.rand((size, num_drafts + 1), generator=generator, dtype=torch.float64)
    rows = LogitRows(logits, temperature, True)
    right = torch.rand((size, num_drafts), generator=generator) < 0.8
    tokens = torch.where(right, rows.drawn(uniforms)[0][:, :-1], 3)
    draft = Draft(token_ids_BK=tokens, law=POINT_MASS, num_drafts_B=torch.full((size,), num_drafts))
    lean, dense = (verify_block(draft, each, uniforms) for each in (rows, rows.dense()))
    assert lean.num_committed_B.unique().tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(lean.num_committed_B, dense.num_committed_B)
    is_committed = torch.arange(num_drafts + 1) < lean.num_committed_B[:, None]
    for name in ("token_ids_BL", "behavior_logprobs_BL"):
        assert torch.equal(getattr(lean, name)[is_committed], getattr(dense, name)[is_committed])


@pytest.mark.parametrize("settles", [False, True])
def test_requests_whose_drafts_were_certain_change_nothing_for_those_whose_were_drawn(settles):
    generator = torch.Generator().manual_seed(3)
    temperature = torch.where(torch.arange(BATCH) % 2 > 0, 1.0, 0.0)
    logits = torch.randn((BATCH, 2, VOCAB), generator=generator)
    rows = targets(1 if settles else 3, generator)
    uniforms = torch.rand((BATCH, 3), generator=generator, dtype=torch.float64)
    verify = (
        (lambda *each: settle_first(*each, uniforms[:, :2]))
        if settles
        else (lambda *each: verify_block(*each, uniforms))
    )
    draft = draw_draft(logits, temperature, uniforms[:, :2])
    both = verify(draft, rows)
    drawn = verify(replace(draft, certain_B=None), rows)
    certain = verify(replace(draft, law=POINT_MASS, certain_B=None), rows)
    for one, is_mine in ((certain, temperature == 0), (drawn, temperature > 0)):
        for name in ("num_committed_B", "is_draft_BL", "token_ids_BL"):
            assert torch.equal(getattr(both, name)[is_mine], getattr(one, name)[is_mine]), name
        assert torch.equal(both.evidence.by_position_B[is_mine], one.evidence.by_position_B[is_mine])


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "repetition_penalty": 1.3}, {"bad_words_ids": ((2,),)}])
def test_drafts_that_are_all_greedy_hold_no_row_as_wide_as_the_vocabulary(options):
    logits = torch.randn((3, 4, VOCAB), generator=torch.Generator().manual_seed(0))
    uniforms, counts = torch.full((3, 4), 0.5, dtype=torch.float64), torch.tensor([4, 2, 0])

    def draw(*temperatures: float) -> Draft:
        texts = [
            Text(
                sampling=Sampling(draft_temperature=temperature, **options), prompt_ids=(1, 2), token_ids=[3]
            )
            for temperature in temperatures
        ]
        return Laws.of(texts, vocab_size=VOCAB, device=logits.device).draw(logits, uniforms, counts)

    certain, mixed = draw(0, 0, 0), draw(0, 0, 1)
    assert certain.law is POINT_MASS
    assert torch.equal(draft_probs(certain, VOCAB)[:2], draft_probs(mixed, VOCAB)[:2])
    assert torch.equal(certain.token_ids_BK[:2], mixed.token_ids_BK[:2])
    assert certain.is_certain is True
    assert mixed.certain_B.tolist() == [True, True, False]


@pytest.mark.parametrize("toy", [*(TOYS[name] for name in CERTAIN), NEVER_LIKELY], ids=[*CERTAIN, "fixed"])
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize("corner", ["low", "high"])
def test_tokens_behind_point_masses_follow_the_target_law(toy, num_drafts, corner):
    drawn = []

    def draw(logits, temperature, uniforms):
        drawn.append(draw_draft(logits, temperature, uniforms))
        return drawn[-1]

    law = committed_law(Sampler(draw, verify_block), toy, [num_drafts], num_drafts + 1, corner=corner)
    assert all(draft.law is POINT_MASS for draft in drawn)
    assert max_difference(law, target_law(toy, num_drafts + 1)) < 1e-12


def takes_every_point_mass(draft, target, uniforms):
    verdict = draw_by_position(draft, target, uniforms)
    offsets = torch.arange(uniforms.shape[1])
    return replace(verdict, is_draft_BL=offsets < draft.num_drafts_B[:, None])


def compares_with_the_draft_before(draft, target, uniforms):
    return draw_by_position(replace(draft, token_ids_BK=draft.token_ids_BK.roll(1, dims=1)), target, uniforms)


def goes_on_behind_a_rejection(draft, target, uniforms):
    verdict = draw_by_position(draft, target, uniforms)
    return replace(verdict, is_draft_BL=verdict.is_draft_BL | verdict.is_draft_BL.roll(1, dims=1))


@pytest.mark.parametrize(
    "plant", [takes_every_point_mass, compares_with_the_draft_before, goes_on_behind_a_rejection]
)
@pytest.mark.parametrize("toy", [TOYS["argmax_draft"], NEVER_LIKELY], ids=["argmax", "fixed"])
def test_a_planted_bug_of_point_masses_breaks_the_law(monkeypatch, plant, toy):
    monkeypatch.setattr(reference, "draw_by_position", plant)
    law = committed_law(PRODUCTION, toy, [2], 3)
    assert max_difference(law, target_law(toy, 3)) > 1e-3


def test_a_draft_without_a_law_is_no_point_mass():
    with pytest.raises(InvalidInput, match="or POINT_MASS"):
        Draft(token_ids_BK=torch.zeros((1, 1), dtype=torch.int64), law=None, num_drafts_B=torch.ones(1))


def test_a_claim_of_point_masses_is_not_passed_by_the_check_of_draft_laws():
    """One token drawn from a law of one token agrees with it, whatever the token was drawn from."""
    draft = certain_draft(2, torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match="POINT_MASS"):
        check_draft_law(lambda call: draft, 1)
