"""The law of what is committed where all that a policy knows of a text is a state beside the cache."""

import pytest

from blockroll.rollout.engine.cache.state import SlotStates
from blockroll.types import Plan
from tests.law.engine_law import Interruption, engine_law
from tests.law.integrate import max_difference, target_law
from tests.law.table_policy import RecurrentTablePolicy
from tests.law.toys import TOYS

pytestmark = pytest.mark.slow  # many whole laws; the same seam is held in tests/invariants/test_recurrent.py
LENGTH = 3
PLANS = [Plan(0), Plan(2), Plan(2, (0, 2)), Plan(2, (0, 1, 2))]
TURNS = (Plan(2, (0, 2)), Plan(1), Plan(0))


@pytest.mark.parametrize(
    ("plan", "name", "weight"),
    [*((plan, "stochastic", 1.0) for plan in PLANS), (Plan(2), "hot", 0.5), (Plan(2, (0, 2)), "hot", 0.5)],
    ids=lambda each: getattr(each, "name", each),
)
def test_committed_tokens_follow_their_law_by_states_alone(plan, name, weight):
    law, corrected = engine_law(
        TOYS[name], plan, length=LENGTH, weight=weight, make_policy=RecurrentTablePolicy
    )
    expected = target_law(TOYS[name], LENGTH)
    assert max_difference(corrected, expected) < 1e-12
    assert weight < 1 or max_difference(law, expected) < 1e-12


def test_changing_plans_and_aborts_leave_the_law_by_states_exact():
    for interruption in (None, Interruption(step=1), Interruption(step=1, broken_forward=1)):
        law, _ = engine_law(
            TOYS["stochastic"],
            *TURNS,
            length=LENGTH,
            interruption=interruption,
            make_policy=RecurrentTablePolicy,
        )
        assert max_difference(law, target_law(TOYS["stochastic"], LENGTH)) < 1e-12


@pytest.mark.parametrize("plan", PLANS[1:3], ids=lambda plan: plan.name)
def test_planted_a_state_behind_rejected_drafts_breaks_the_law(plan, monkeypatch):
    real = SlotStates._column

    def last_column(self, slot, length):
        return self._held[0].shape[2] - 1 if real(self, slot, length) else 0

    monkeypatch.setattr(SlotStates, "_column", last_column)
    law, _ = engine_law(TOYS["stochastic"], plan, length=LENGTH, make_policy=RecurrentTablePolicy)
    assert max_difference(law, target_law(TOYS["stochastic"], LENGTH)) > 1e-3
