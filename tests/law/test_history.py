"""Drafts from history, given whatever siblings have written: exact through whole engine steps, on tables."""

import dataclasses

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine import step as decoding
from blockroll.types import POINT_MASS, Draft, Plan
from tests.law.by_position import law_by_position
from tests.law.history_law import Apart, Siblings
from tests.law.integrate import max_difference, target_law
from tests.law.table_policy import TablePolicy
from tests.law.toys import TOYS

LENGTH = 3
PLANS = [Plan(1, drafter="history"), Plan(2, drafter="history")]
SIBLINGS = {
    "one runs ahead": Siblings(running=(1, 2, 0, 1, 2), pace=2),
    "one runs beside": Siblings(running=(2, 1, 1, 0)),
    "two have ended": Siblings(ended=((0, 2, 1), (0, 1, 1)), ended_group=None),
    "all kinds": Siblings(running=(1, 0, 2), ended=((2, 0, 0, 1), (1, 1, 2)), ended_group="earlier"),
    "none": Siblings(),
}


def history_law(
    toy,
    plan,
    siblings,
    *,
    length=LENGTH,
    weight=1.0,
    corner="low",
    make=lambda: HistoryDrafts(row_cost=0.01),
):
    """The law of a request's first tokens given its siblings' texts, and all that was drafted for it."""
    apart = Apart(make, siblings, plan)

    def run(requests):
        engine = Engine(TablePolicy(toy, plan.num_drafts), plan=plan, drafters=[apart], max_batch_size=256)
        engine.submit(requests)
        texts = {}
        while engine.num_requests:
            finished = engine.step().finished
            texts |= {rollout.request.request_id: rollout.token_ids for rollout in finished}
            for rollout in finished if toy.temperature else ():
                assert rollout.behavior_logprobs == pytest.approx(rollout.policy_logprobs, abs=1e-12)
        return texts

    return law_by_position(toy, run, length=length, weight=weight, corner=corner), apart.drafts


@pytest.mark.parametrize(("corner", "weight"), [("low", 1.0), ("high", 1.0), ("low", 0.5)])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", ["stochastic", "hot"])
@pytest.mark.parametrize("siblings", SIBLINGS.values(), ids=SIBLINGS)
def test_tokens_follow_the_target_law_whatever_siblings_wrote(siblings, name, plan, corner, weight):
    """A mixed law has no rows to mix where drafts are looked up: it is the target's and needs no factor."""
    law, drafts = history_law(TOYS[name], plan, siblings, weight=weight, corner=corner)
    assert max_difference(law, target_law(TOYS[name], LENGTH)) < 1e-12
    assert any(drafted for _, drafted in drafts)


@pytest.mark.parametrize("siblings", SIBLINGS.values(), ids=SIBLINGS)
def test_greedy_texts_are_the_targets_whatever_siblings_wrote(siblings):
    law, _ = history_law(TOYS["greedy"], PLANS[1], siblings)
    assert max_difference(law, target_law(TOYS["greedy"], LENGTH)) < 1e-12


def test_drafts_depend_on_siblings_and_each_request_has_its_own_number():
    drafted = {
        name: history_law(TOYS["stochastic"], PLANS[1], siblings, length=4)[1]
        for name, siblings in SIBLINGS.items()
    }
    assert len({frozenset(each) for each in drafted.values()}) == len(SIBLINGS)
    assert {len(drafts) for _, drafts in drafted["one runs beside"]} == {0, 1, 2}
    assert ((), (1, 2)) in drafted["one runs ahead"]
    assert ((), (2,)) in drafted["one runs beside"]


class LooksAtItsCoin(HistoryDrafts):
    """Withholds the drafts of a step whose first coin is large."""

    def propose(self, step):
        draft = super().propose(step)
        state = torch.tensor([running.state for running in step.batch])[1:]
        known = torch.tensor([running.num_tokens for running in step.batch])[1:]
        _, coins = decoding.step_uniforms(
            state[:, 1], known, state[:, 2], step.plan.num_drafts, settles=False, by_position=True
        )
        counts = draft.num_drafts_B.clone()
        counts[1:] = torch.where(coins[:, 0] > 0.5, 0, counts[1:])
        return Draft(token_ids_BK=draft.token_ids_BK, law=POINT_MASS, num_drafts_B=counts)


def accepts_by_a_coin_and_draws_by_another(monkeypatch):
    """The rule of drafts that were drawn: their accept coins, and one more coin for what replaces them."""
    step = decoding.verify_block

    def verify_block(draft, target, uniforms):
        rows = target.dense()
        law = torch.zeros_like(rows[:, :-1]).scatter_(-1, draft.token_ids_BK[..., None], 1.0)
        return step(dataclasses.replace(draft, law=law), target, uniforms)

    monkeypatch.setattr(decoding, "verify_block", verify_block)


@pytest.mark.parametrize("is_planted", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_drafter_that_looks_at_its_own_coin_changes_no_token(plan, is_planted, monkeypatch):
    """Under the planted rule of accept coins, by the same coins, it does."""
    if is_planted:
        accepts_by_a_coin_and_draws_by_another(monkeypatch)
    law, _ = history_law(TOYS["stochastic"], plan, SIBLINGS["one runs ahead"], make=LooksAtItsCoin)
    difference = max_difference(law, target_law(TOYS["stochastic"], LENGTH))
    assert difference > 1e-2 if is_planted else difference < 1e-12
