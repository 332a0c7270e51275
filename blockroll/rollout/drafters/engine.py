"""The engine as users make it: with every drafter of this package at hand."""

from collections.abc import Callable
from pathlib import Path

from blockroll.errors import InvalidInput
from blockroll.policies.base import Policy
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.drafters.history_file import load_history, save_history
from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.plans import by_name, check_plan
from blockroll.types import HISTORY, Plan


class Engine(BareEngine):
    """A `BareEngine` that knows the drafters that plans of this package name; others come by `drafters`."""

    own_drafters: tuple[Callable[[], Drafter], ...] = (MaskRows, HistoryDrafts)

    def save_history(self, path: Path) -> bool:
        """Write what its history knows, if a plan asks for it; whether there was anything to write."""
        drafter = self._drafters[HISTORY]
        if not isinstance(drafter, HistoryDrafts) or not drafter.index.num_tokens:
            return False
        save_history(drafter, path, self.policy)
        return True

    def load_history(self, path: Path) -> None:
        """Go on with a history from a file, in the place of its own.

        CheckpointError and InvalidInput as `load_history` of a file; InvalidInput while requests are served.
        """
        drafter = self._drafters[HISTORY]
        if self.num_requests:
            raise InvalidInput(f"{self.num_requests} requests are served: load the history before, or behind")
        if isinstance(drafter, HistoryDrafts):
            loaded = load_history(path, self.policy, max_tokens=drafter.index.max_tokens)
            drafter.index, drafter.vocabulary = loaded.index, loaded.vocabulary

    @classmethod
    def check_plan(cls, plan: Plan, policy: Policy) -> None:
        """Raise InvalidInput for a plan that such an engine could not follow; its drafter may warn."""
        check_plan(plan, policy, by_name(make() for make in cls.own_drafters))
