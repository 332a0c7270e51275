"""Drafts from history, given whatever siblings have written: exact through whole engine steps, on tables."""

import numpy as np
import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine import step as decoding
from blockroll.types import POINT_MASS, Draft, Plan, Request
from tests.law.engine_law import PROMPT
from tests.law.history_law import SAMPLING, Siblings, history_law
from tests.law.integrate import _boundaries, _product, _split, max_difference, target_law
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


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", ["stochastic", "hot"])
@pytest.mark.parametrize("siblings", SIBLINGS.values(), ids=SIBLINGS)
def test_tokens_follow_the_target_law_whatever_siblings_wrote(siblings, name, plan, weight):
    """A mixed law has no rows to mix where drafts are looked up: it is the target's and needs no factor."""
    integrated = history_law(TOYS[name], plan, siblings, length=LENGTH, weight=weight)
    assert max_difference(integrated.law, target_law(TOYS[name], LENGTH)) < 1e-12
    assert max_difference(integrated.corrected, integrated.law) < 1e-12
    assert any(drafts for _, drafts in integrated.drafts)


@pytest.mark.parametrize("siblings", SIBLINGS.values(), ids=SIBLINGS)
def test_greedy_texts_are_the_targets_whatever_siblings_wrote(siblings):
    law = history_law(TOYS["greedy"], PLANS[1], siblings, length=LENGTH).law
    assert max_difference(law, target_law(TOYS["greedy"], LENGTH)) < 1e-12


def test_drafts_depend_on_siblings_and_each_request_has_its_own_number():
    drafted = {
        name: history_law(TOYS["stochastic"], PLANS[1], siblings, length=LENGTH).drafts
        for name, siblings in SIBLINGS.items()
    }
    assert len({frozenset(each) for each in drafted.values()}) == len(SIBLINGS)
    assert {len(drafts) for _, drafts in drafted["one runs beside"]} == {0, 1, 2}
    assert ((), (1, 2)) in drafted["one runs ahead"]
    assert ((), (2,)) in drafted["one runs beside"]


class LooksAtItsCoin(HistoryDrafts):
    """Withholds a draft that the coin of this step would reject more often than not."""

    def propose(self, step):
        draft = super().propose(step)
        state = torch.tensor([running.state for running in step.batch])
        known = [running.num_tokens for running in step.batch]
        _, coins = decoding.step_uniforms(
            state[1:, 1], torch.tensor(known[1:]), state[1:, 2], step.plan.num_drafts, settles=False
        )
        counts = draft.num_drafts_B.clone()
        counts[1:] = torch.where(coins[:, 0] > 0.5, 0, counts[1:])
        return Draft(token_ids_BK=draft.token_ids_BK, law=POINT_MASS, num_drafts_B=counts)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_planted_drafter_that_looks_at_its_own_coin_is_caught(plan):
    law = history_law(
        TOYS["stochastic"], plan, SIBLINGS["one runs ahead"], length=LENGTH, make=LooksAtItsCoin
    ).law
    assert max_difference(law, target_law(TOYS["stochastic"], LENGTH)) > 1e-2


class Forgetful(dict):
    """Knows of no seed that it has served."""

    def get(self, seed, default=None):
        return default


@pytest.mark.parametrize("forgets", [False, True])
def test_a_call_repeated_with_its_seed_follows_the_law_and_not_if_seeds_are_forgotten(forgets, monkeypatch):
    """Its coins come again: the text that they drew before would be a draft that knows them."""
    toy, plan = TOYS["stochastic"], PLANS[0]
    row = toy.target_V(())
    residuals = [np.where(np.arange(toy.vocab_size) == token, 0.0, row) for token in range(toy.vocab_size)]
    intervals = [
        _split(row, "low"),
        _split(np.concatenate([_boundaries(each) for each in (row, *residuals)]), "low"),
    ]
    law = dict.fromkeys(np.ndindex(toy.vocab_size), 0.0)
    points, widths = (_product(each) for each in zip(*intervals, strict=True))
    for coins, mass in zip(points, widths.prod(axis=1), strict=True):
        same = torch.tensor(coins)[None]
        monkeypatch.setattr(decoding, "step_uniforms", lambda *_, same=same, settles: (same[:, :1], same))
        drafter = HistoryDrafts()
        if forgets:
            drafter.drawn = Forgetful()
        engine = Engine(TablePolicy(toy, 1), plan=plan, drafters=[drafter])
        for name in ("first", "again"):
            engine.submit([Request(request_id=name, prompt_ids=(PROMPT,), seed=5, sampling=SAMPLING)])
            engine.step()
            (rollout,) = engine.abort([name])
        law[rollout.token_ids[:1]] += mass
    assert (max_difference(law, target_law(toy, 1)) < 1e-12) != forgets
    assert not forgets or max_difference(law, target_law(toy, 1)) > 1e-2
