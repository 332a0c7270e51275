"""Drafts that were certain carry no dense law, and are verified by the same law, token for token."""

from dataclasses import fields, replace

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.samplers import Laws, draft_probs, draw_draft, lossless, settle_first, verify_block
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


def assert_same(sparse: object, dense: object) -> None:
    for field in fields(dense):
        one, other = getattr(sparse, field.name), getattr(dense, field.name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert_same(one, other)


@pytest.mark.parametrize("num_drafts", [1, 2, 5])
def test_a_point_mass_is_verified_as_its_dense_law_is(num_drafts):
    generator = torch.Generator().manual_seed(num_drafts)
    draft = certain_draft(num_drafts, generator)
    dense = replace(draft, law=draft_probs(draft, VOCAB))
    rows = targets(num_drafts + 1, generator)
    uniforms = torch.rand((BATCH, num_drafts + 1), generator=generator, dtype=torch.float64)
    sparse_verdict, dense_verdict = (verify_block(each, rows, uniforms) for each in (draft, dense))
    assert 0 < sparse_verdict.num_accepted_B.sum() < draft.num_drafts_B.sum()
    assert_same(sparse_verdict, dense_verdict)
    assert_same(*(settle_first(each, rows[:, :1], uniforms[:, :2]) for each in (draft, dense)))
    assert_same(*(verify_block(each.behind_first(), rows[:, 1:], uniforms[:, 1:]) for each in (draft, dense)))


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


def leaves_the_token_in_the_residual(monkeypatch):
    monkeypatch.setattr(lossless, "_residual", lambda target, *_: target)


def takes_every_point_mass(monkeypatch):
    monkeypatch.setattr(lossless, "_own_probs", lambda draft: torch.zeros_like(draft.token_ids_BK).double())


def removes_the_token_of_another_position(monkeypatch):
    residual_at = lossless._residual

    def residual_at_first(target, draft, offset, requests):
        return residual_at(target, draft, 0 * offset, requests)

    monkeypatch.setattr(lossless, "_residual", residual_at_first)


@pytest.mark.parametrize(
    "plant",
    [leaves_the_token_in_the_residual, takes_every_point_mass, removes_the_token_of_another_position],
)
@pytest.mark.parametrize("toy", [TOYS["argmax_draft"], NEVER_LIKELY], ids=["argmax", "fixed"])
def test_a_planted_bug_of_point_masses_breaks_the_law(monkeypatch, plant, toy):
    plant(monkeypatch)
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
