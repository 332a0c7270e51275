"""How much of a cache a batch may have: rows of a slot, and slots."""

from collections.abc import Iterable
from dataclasses import dataclass

from blockroll.rollout.engine.cache.contract import ROW_STEP
from blockroll.types import Request


@dataclass(slots=True, kw_only=True)
class CacheRoom:
    """Room for the longest text that the requests at hand can become; it grows as they join."""

    max_slots: int
    max_rows: int  # over all slots; 0: no bound
    block_rows: int  # that a step writes behind a text
    max_length: int  # tokens of a text
    rows_per_slot: int = 0

    @property
    def max_text(self) -> int:
        """Tokens of the longest text that there may be room for."""
        if not self.max_rows:
            return self.max_length
        return min(self.max_length, self.max_rows // ROW_STEP * ROW_STEP - self.block_rows)

    def make(self, requests: Iterable[Request]) -> int:
        """Have room for requests that join, none longer than `max_text`; how many slots that leaves."""
        lengths = [len(request.prompt_ids) + request.sampling.max_tokens for request in requests]
        self.rows_per_slot = max(self.rows_of(max(lengths, default=0)), self.rows_per_slot)
        return self.num_slots(self.rows_per_slot)

    def rows_of(self, num_tokens: int) -> int:
        """Rows of a slot for texts of so many tokens, with what a step writes behind them."""
        return -(-(min(num_tokens, self.max_length) + self.block_rows) // ROW_STEP) * ROW_STEP

    def num_slots(self, num_rows: int) -> int:
        """Slots of so many rows that there is room for, and use."""
        return min(self.max_slots, self.max_rows // num_rows) if self.max_rows else self.max_slots
