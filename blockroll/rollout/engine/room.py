"""How much of a cache a batch may have: rows of a slot, and slots."""

from collections.abc import Iterable
from dataclasses import dataclass

from blockroll.errors import InvalidInput
from blockroll.rollout.engine.cache import ROW_STEP
from blockroll.types import Request


@dataclass(slots=True, kw_only=True)
class CacheRoom:
    """Room for the longest text that the requests at hand can become; it grows as they join."""

    max_slots: int
    max_rows: int  # over all slots; 0: no bound
    block_rows: int  # that a step writes behind a text
    max_length: int  # tokens of a text
    rows_per_slot: int = 0

    def make(self, requests: Iterable[Request]) -> int:
        """Have room for requests that join; how many slots that leaves. InvalidInput: not one of them."""
        lengths = [len(request.prompt_ids) + request.sampling.max_tokens for request in requests]
        longest = min(max(lengths, default=0), self.max_length)
        rows = max(-(-(longest + self.block_rows) // ROW_STEP) * ROW_STEP, self.rows_per_slot)
        num_slots = self.max_slots
        if self.max_rows:
            num_slots = min(num_slots, self.max_rows // rows)
            if num_slots == 0:
                raise InvalidInput(
                    f"a text of {longest} tokens needs {rows} rows of keys and values, but the cache may "
                    f"have {self.max_rows} over all slots; give it more memory (memory_fraction), or "
                    "shorten prompts or max_tokens"
                )
        self.rows_per_slot = rows
        return num_slots
