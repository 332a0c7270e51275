"""The engine as users make it: with every drafter of this package at hand."""

from collections.abc import Callable, Iterable
from pathlib import Path

from blockroll.errors import InvalidInput
from blockroll.policies.base import Policy
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.drafters.history_file import load_history, save_history
from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.plans import by_name, check_plan
from blockroll.types import HISTORY, FinishedText, Plan


class Engine(BareEngine):
    """A `BareEngine` that knows the drafters that plans of this package name; others come by `drafters`."""

    own_drafters: tuple[Callable[[], Drafter], ...] = (MaskRows, HistoryDrafts)

    def save_history(self, path: Path) -> bool:
        """Write what its history knows, if a plan asks for it; whether there was anything to write."""
        drafter = self._history()
        if drafter is None or not drafter.index.num_tokens:
            return False
        save_history(drafter, path, self.policy)
        return True

    def load_history(self, path: Path) -> None:
        """Go on with a history from a file, in the place of its own; where no plan asks, none is read.

        CheckpointError and InvalidInput as `load_history` of a file; InvalidInput while requests are served.
        """
        drafter = self._history()
        if drafter is None:
            return
        if self.num_requests:
            raise InvalidInput(f"{self.num_requests} requests are served: load the history before, or behind")
        loaded = load_history(path, self.policy, max_tokens=drafter.index.max_tokens)
        drafter.index, drafter.vocabulary = loaded.index, loaded.vocabulary

    def tell_history(self, texts: Iterable[FinishedText]) -> None:
        """Draft from texts that other engines have finished too, if a plan asks for history."""
        drafter = self._history()
        if drafter is not None:
            drafter.tell(texts)

    def _history(self) -> HistoryDrafts | None:
        """The drafter that keeps one, if a plan asks for it."""
        drafter = self._drafters[HISTORY]
        return drafter if isinstance(drafter, HistoryDrafts) and drafter.is_asked else None

    @classmethod
    def check_plan(cls, plan: Plan, policy: Policy) -> None:
        """Raise InvalidInput for a plan that such an engine could not follow; its drafter may warn."""
        check_plan(plan, policy, by_name(make() for make in cls.own_drafters))
