"""What steps of a plan commit: counted, and hoped for while few were counted."""

import dataclasses
from collections.abc import Mapping, Sequence

from blockroll.rollout.planning.candidates import is_narrower
from blockroll.rollout.planning.counts import Counts
from blockroll.types import HISTORY, PLAIN, Plan

COUNTED_STEPS = 12  # request-steps anywhere, after which a plan's tokens are known
_PRIOR_STEPS = 4  # request-steps that what is hoped of a plan weighs,
_HOPE = 0.6  # which is so many of its drafts, where nothing was found before
_DOUBTED = 0.5  # of the drafts that are hoped for


class TokensByPlan:
    """Committed tokens per request and step of each plan; plain ones commit one."""

    def __init__(self, plans: Sequence[Plan], found_before: Mapping[Plan, float]) -> None:
        """`found_before` is what steps of a plan committed elsewhere, as when its drafts were trained."""
        self.found_before = found_before
        self._counts = {plan: Counts() for plan in plans}
        drafted = [plan for plan in plans if plan.drafter != HISTORY]
        self._narrower = {
            plan: [other for other in reversed(drafted) if is_narrower(other, plan)] for plan in drafted
        }

    def counts(self, plan: Plan) -> Counts:
        """To be added to."""
        return self._counts[plan]

    def is_counted(self, plan: Plan) -> bool:
        """Whether its tokens are known by counting them."""
        return self._counts[plan].num_steps >= COUNTED_STEPS

    def is_in_turn(self, plan: Plan) -> bool:
        """Whether it may be tried: those of narrower plans come first, unless something was found before."""
        return plan in self.found_before or all(map(self.is_counted, self._narrower[plan]))

    def expected(self, plan: Plan) -> float:
        """Hopefully many while few were counted."""
        if plan == PLAIN:
            return 1.0
        counted = self._counts[plan]
        total = counted.num_tokens + _PRIOR_STEPS * self._most(plan)
        return total / (counted.num_steps + _PRIOR_STEPS)

    def surer(self, plan: Plan) -> float:
        """Without hope: drafts that were neither counted nor found before are doubted."""
        if not self.is_counted(plan):
            doubted = 1.0 if plan in self.found_before else _DOUBTED
            return 1 + doubted * (self.expected(plan) - 1)
        counted = self._counts[plan]
        return (counted.num_tokens + _PRIOR_STEPS) / (counted.num_steps + _PRIOR_STEPS)

    def _most(self, plan: Plan) -> float:
        """What was found before; else further drafts are accepted as the next narrower plan's, at most."""
        if plan in self.found_before:
            return self.found_before[plan]
        for narrower in self._narrower.get(plan, ()):
            if self._counts[narrower].num_steps:
                accepted_per_draft = (self.expected(narrower) - 1) / narrower.num_drafts
                return 1 + accepted_per_draft * plan.num_drafts
        return 1.0 + _HOPE * plan.num_drafts

    def forget(self, *, but: Plan) -> None:
        """Count all plans but one anew."""
        for plan in self._counts:
            if plan != but:
                self._counts[plan] = Counts()

    def state_dict(self) -> dict[str, list[float]]:
        """What was counted, by the names of plans."""
        return {plan.name: list(dataclasses.astuple(counts)) for plan, counts in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from `state_dict()`; plans that are unknown here are left out."""
        for plan in self._counts:
            if plan.name in state:
                self._counts[plan] = Counts(*state[plan.name])
