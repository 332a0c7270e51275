"""Drafters that give what cannot be verified: named, nothing committed, and the step can be run again."""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidDraft
from blockroll.kernels import transfer
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.drafting import Drafter, DraftRows, Verifying
from blockroll.types import POINT_MASS, Draft, Plan, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.models import VOCAB_SIZE, adapted_policy, prompts

K = 3
PLAN = Plan(K, drafter="broken")


def good_draft(size):
    return Draft(
        token_ids_BK=torch.full((size, K), 5),
        law=torch.full((size, K, VOCAB_SIZE), 1 / VOCAB_SIZE, dtype=torch.float64),
        num_drafts_B=torch.full((size,), K),
    )


class Broken(Drafter):
    """Gives good drafts, until it is told to spoil one."""

    name = "broken"
    spoil = None
    verifies_short = keeps_short = False

    def propose(self, step):
        draft = good_draft(len(step.batch))
        return draft if self.spoil is None else self.spoil(draft)

    def verify(self, step, ids_BL, window):
        verifying = super().verify(step, ids_BL, window)
        return Verifying(logits_BLV=verifying.logits_BLV[:, :-1]) if self.verifies_short else verifying

    def keep(self, step, left, outcome):
        return [] if self.keeps_short else super().keep(step, left, outcome)


def changed(name, value, *, at=()):
    """One entry of one of its tensors is another."""

    def spoil(draft):
        tensor = getattr(draft, name).clone()
        tensor[at] = value
        return dataclasses.replace(draft, **{name: tensor})

    return spoil


def replaced(**fields):
    return lambda draft: dataclasses.replace(
        draft, **{name: make(getattr(draft, name)) for name, make in fields.items()}
    )


def rows_of(logits, *, num_origins=4):
    return lambda draft: DraftRows(
        logits=logits, num_drafts_B=draft.num_drafts_B, origins=[(0, 0, 0)] * num_origins
    )


SPOILED = {
    "id of no token": (changed("token_ids_BK", VOCAB_SIZE, at=(1, 2)), f"the token id {VOCAB_SIZE}"),
    "negative id": (changed("token_ids_BK", -1, at=(0, 0)), "the token id -1"),
    "ids too few": (replaced(token_ids_BK=lambda ids: ids[1:]), r"token_ids_BK of \(3, 3\)"),
    "ids too wide": (replaced(token_ids_BK=lambda ids: ids[:, [0, 0, 1, 2]]), r"token_ids_BK of \(4, 4\)"),
    "ids narrower than laws": (replaced(token_ids_BK=lambda ids: ids[:, 1:]), r"law of \(4, 3, 24\)"),
    "narrower than counts": (
        replaced(token_ids_BK=lambda ids: ids[:, 1:], law=lambda probs: probs[:, 1:]),
        "3 drafts for request 0 .* 0 to 2, the width of its tensors",
    ),
    "ids of floats": (replaced(token_ids_BK=lambda ids: ids.float()), "token_ids_BK of torch.float32"),
    "ids as a list": (replaced(token_ids_BK=lambda ids: ids.tolist()), "token_ids_BK of list"),
    "counts too many": (changed("num_drafts_B", K + 1, at=2), "4 drafts for request 2"),
    "counts below 0": (changed("num_drafts_B", -1, at=2), "-1 drafts for request 2"),
    "counts that differ": (replaced(num_drafts=lambda _: [K, K, 1, K]), r"num_drafts \[3, 3, 1, 3\] beside"),
    "counts of another batch": (replaced(num_drafts_B=lambda counts: counts[1:]), r"num_drafts_B of \(3,\)"),
    "law NaN": (changed("law", torch.nan, at=(1, 0, 0)), "NaN or infinity for draft 0 of request 1"),
    "law negative": (changed("law", -0.1, at=(1, 1, 0)), "a negative probability for draft 1"),
    "law of sum 2": (replaced(law=lambda probs: 2 * probs), "sum is not 1"),
    "law that cannot give it": (
        replaced(law=lambda probs: torch.eye(VOCAB_SIZE, dtype=torch.float64)[[9]].expand_as(probs)),
        "probability 0 for the very token",
    ),
    "law of float32": (replaced(law=lambda probs: probs.float()), "law of torch.float32"),
    "law of another vocabulary": (replaced(law=lambda probs: probs[..., 1:]), "law of"),
    "nothing": (lambda draft: None, "gave None"),
    "rows too few": (rows_of(torch.zeros(4, K - 1, VOCAB_SIZE)), r"logits of \(4, 2, 24\)"),
    "origins too few": (rows_of(torch.zeros(4, K, VOCAB_SIZE), num_origins=3), "3 origins"),
}  # fmt: skip


def engine_of(drafter):
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    policy = adapted_policy()
    engine = Engine(policy, plan=PLAN, drafters=[drafter])
    engine.submit(make_requests(prompts(4), sampling))
    return engine, policy


def finish(engine):
    rollouts = []
    while engine.num_requests:
        rollouts += engine.step().finished
    return {rollout.request.request_id: rollout for rollout in rollouts}


@pytest.fixture(params=["looked at", "riding along"])
def looks(request, monkeypatch):
    """Whether numbers of a draft are looked at when it is given, or with the results of its step."""
    if request.param == "riding along":
        monkeypatch.setattr(transfer, "is_free", lambda device: False)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize(("spoil", "named"), SPOILED.values(), ids=SPOILED)
def test_a_bad_draft_is_named_and_the_step_runs_again_without_loss(spoil, named):
    undisturbed, policy = engine_of(Broken())
    drafter = Broken()
    engine, _ = engine_of(drafter)
    engine.step()
    drafter.spoil = spoil
    with pytest.raises(InvalidDraft, match=named):
        engine.step()
    drafter.spoil = None
    assert_same_rollouts(finish(undisturbed), finish(engine), policy)


@pytest.mark.parametrize("part", ["verifies_short", "keeps_short"])
def test_what_a_drafter_does_behind_its_drafts_is_checked_before_a_commit(part):
    undisturbed, policy = engine_of(Broken())
    drafter = Broken()
    engine, _ = engine_of(drafter)
    engine.step()
    setattr(drafter, part, True)
    with pytest.raises(InvalidDraft, match="the drafter 'broken' of plan broken"):
        engine.step()
    setattr(drafter, part, False)
    assert_same_rollouts(finish(undisturbed), finish(engine), policy)


def test_what_stands_behind_a_requests_drafts_needs_no_law():
    drafter = Broken()
    drafter.spoil = lambda draft: dataclasses.replace(
        changed("law", torch.nan, at=(slice(None), slice(1, None)))(draft),
        num_drafts_B=torch.ones_like(draft.num_drafts_B),
    )
    engine, _ = engine_of(drafter)
    assert all(rollout.finish_reason == "length" for rollout in finish(engine).values())


def test_a_point_mass_needs_no_law():
    drafter = Broken()
    drafter.spoil = lambda draft: dataclasses.replace(draft, law=POINT_MASS)
    engine, _ = engine_of(drafter)
    assert all(rollout.finish_reason == "length" for rollout in finish(engine).values())
