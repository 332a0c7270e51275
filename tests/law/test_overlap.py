"""Steps that are queued before the one before is read: every law stays exact, through engines, on tables."""

import dataclasses

import pytest

from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine.cache.paged_window import PagedWindow
from blockroll.types import Plan
from tests.law.engine_law import engine_law
from tests.law.integrate import max_difference, target_law
from tests.law.test_plans import LENGTH
from tests.law.toys import TOYS

PLANS = [Plan(0), Plan(2), Plan(1, (0, 1)), Plan(2, (0, 2))]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", ["stochastic", "cold", "greedy"])
def test_tokens_of_steps_that_are_read_late_follow_the_target_law(plan, name):
    law, corrected = engine_law(TOYS[name], plan, length=LENGTH, reads_late=True)
    assert max_difference(law, target_law(TOYS[name], LENGTH)) < 1e-12
    if TOYS[name].temperature:
        assert max_difference(law, corrected) < 1e-12


@pytest.mark.parametrize("plan", PLANS[1:3], ids=lambda plan: plan.name)
def test_the_mixed_law_is_corrected_as_exactly(plan):
    _, corrected = engine_law(TOYS["hot"], plan, length=LENGTH, weight=0.5, reads_late=True)
    assert max_difference(corrected, target_law(TOYS["hot"], LENGTH)) < 1e-12


def lengths_not_advanced(monkeypatch):
    make = PagedWindow.of.__func__
    monkeypatch.setattr(PagedWindow, "of", classmethod(lambda cls, *given: make(cls, *given[:5])))


def proposals_of_the_step_before(monkeypatch):
    """One row later than what the verdict left."""
    leave = MaskRows.leave

    def wrong(self, *given):
        left = leave(self, *given)
        return dataclasses.replace(left, logits_BKV=left.logits_BKV.roll(1, dims=1))

    monkeypatch.setattr(MaskRows, "leave", wrong)


@pytest.mark.parametrize(
    ("plant", "plan"), [(lengths_not_advanced, Plan(2)), (proposals_of_the_step_before, Plan(2, (0,)))]
)
def test_planted_bugs_break_the_law(monkeypatch, plant, plan):
    plant(monkeypatch)
    _, corrected = engine_law(TOYS["hot"], plan, length=LENGTH, reads_late=True)
    assert max_difference(corrected, target_law(TOYS["hot"], LENGTH)) > 1e-4
