"""Texts that are aborted and go on: given when, which no later coin decides, their law is the policy's.

Under a fused plan they go on with drafts of a draft forward of its own and coins of other attempts, so these
are other tokens than without the abort. The law is summed over every coin, before the abort and behind it.
"""

import dataclasses

import pytest

from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import Plan, Rollout, RolloutStats
from tests.law.engine_law import Interruption, engine_law
from tests.law.integrate import max_difference, target_law
from tests.law.toys import TOYS
from tests.params import slow_beyond

LENGTH = 3
# Every forward of a step: a prefill at first, then those that draft, verify and propose.
MOMENTS = {
    Plan(0): [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)],
    Plan(1): [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
    Plan(2): [(0, 2), (1, 0), (1, 1), (1, 2)],
    Plan(1, (0,)): [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)],
    Plan(1, (0, 1)): [(0, 2), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)],
    Plan(2, (0, 2)): [(0, 3), (1, 0), (1, 1), (1, 2)],
}
ABORTS = [(plan, *moment) for plan, moments in MOMENTS.items() for moment in moments]


@pytest.mark.parametrize(("plan", "step", "broken"), ABORTS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("name", slow_beyond(1, ["stochastic", "hot"]))
def test_the_law_of_an_aborted_text_that_goes_on_is_the_policy_s(plan, step, broken, name):
    moment = Interruption(step=step, broken_forward=broken)
    law, _ = engine_law(TOYS[name], plan, length=LENGTH, interruption=moment)
    assert max_difference(law, target_law(TOYS[name], LENGTH)) < 1e-12


def forgets_its_attempts(self: Rollout):
    prefix = as_prefix(self)
    return dataclasses.replace(prefix, stats=RolloutStats())


as_prefix = Rollout.as_prefix


@pytest.mark.parametrize("plan", [Plan(2), Plan(2, (0, 2))], ids=lambda plan: plan.name)
def test_planted_a_text_that_meets_coins_of_rejected_drafts_again_is_noticed(plan, monkeypatch):
    """Attempts that start from 0 again: the coin that rejected a draft would decide about the next one."""
    monkeypatch.setattr(Rollout, "as_prefix", forgets_its_attempts)
    law, _ = engine_law(TOYS["stochastic"], plan, length=LENGTH, interruption=Interruption(step=1))
    assert max_difference(law, target_law(TOYS["stochastic"], LENGTH)) > 1e-3


def test_planted_a_proposal_s_draft_forward_that_is_not_counted_changes_no_law(monkeypatch):
    """What keeps the law is that the attempts of steps differ, not how many lie between them."""

    def uncounted(self, proposal):
        self.proposal = proposal

    monkeypatch.setattr(RunningRequest, "start_proposal", uncounted)
    law, _ = engine_law(TOYS["hot"], Plan(1, (0,)), length=LENGTH, interruption=Interruption(step=1))
    assert max_difference(law, target_law(TOYS["hot"], LENGTH)) < 1e-12
