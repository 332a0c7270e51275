"""The engine as users make it: with every drafter of this package at hand."""

from collections.abc import Callable

from blockroll.policies.base import Policy
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.plans import by_name, check_plan
from blockroll.types import Plan


class Engine(BareEngine):
    """A `BareEngine` that knows the drafters that plans of this package name; others come by `drafters`."""

    own_drafters: tuple[Callable[[], Drafter], ...] = (MaskRows, HistoryDrafts)

    @classmethod
    def check_plan(cls, plan: Plan, policy: Policy) -> None:
        """Raise InvalidInput for a plan that such an engine could not follow; its drafter may warn."""
        check_plan(plan, policy, by_name(make() for make in cls.own_drafters))
