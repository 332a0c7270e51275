"""How much of a cache a batch may have: rows of a slot and slots, or pages."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blockroll.rollout.engine.cache.contract import ROW_STEP, Cache
from blockroll.types import Request


@dataclass(slots=True, kw_only=True)
class CacheRoom:
    """Room for the longest text that the requests at hand can become; it grows as they join.

    Slots are bounded by it beforehand, since each is as long; of pages every text has only those of its rows.
    """

    max_slots: int
    max_rows: int  # over all slots; 0: no bound
    block_rows: int  # that a step writes behind a text
    max_length: int  # tokens of a text
    page_size: int = 0  # 0: there are no pages
    rows_per_slot: int = 0

    @property
    def max_text(self) -> int:
        """Tokens of the longest text that there may be room for."""
        if not self.max_rows:
            return self.max_length
        step = self.page_size or ROW_STEP
        return min(self.max_length, self.max_rows // step * step - self.block_rows)

    def make(self, requests: Iterable[Request]) -> int:
        """Have room for requests that join, none longer than `max_text`; how many slots that leaves."""
        lengths = [len(request.prompt_ids) + request.sampling.max_tokens for request in requests]
        self.rows_per_slot = max(self.rows_of(max(lengths, default=0)), self.rows_per_slot)
        return self.num_slots(self.rows_per_slot)

    def rows_of(self, num_tokens: int) -> int:
        """Rows for a text of so many tokens, with what a step writes behind it, in a slot or in pages."""
        step = self.page_size or ROW_STEP
        return -(-(min(num_tokens, self.max_length) + self.block_rows) // step) * step

    def num_slots(self, num_rows: int) -> int:
        """Slots of so many rows that there is room for, and use."""
        if self.page_size or not self.max_rows:
            return self.max_slots
        return min(self.max_slots, self.max_rows // num_rows)

    @property
    def num_pages(self) -> int:
        """Pages that texts may have; 0: there are none, or no bound."""
        return self.max_rows // self.page_size if self.page_size else 0

    def num_texts(self, num_tokens: int) -> int:
        """Texts that may become so long and have room at once, if no two of them share a page."""
        rows = self.rows_of(num_tokens)
        if not self.page_size or not self.max_rows:
            return self.num_slots(rows)
        return min(self.max_slots, self.num_pages * self.page_size // rows)


class SparePages:
    """What is left of a cache's pages behind those that its open slots need for one step more."""

    def __init__(self, cache: Cache, num_rows: int) -> None:
        """A step writes so many rows behind each text."""
        self._cache, self._num_rows = cache, num_rows
        self._left = cache.spare(num_rows)
        self._taken: set[Sequence[int]] = set()  # texts

    @property
    def is_short(self) -> bool:
        """Whether open slots, and those that took some, lack any."""
        return self._left < 0

    def complete(self, token_ids: Sequence[int], num_held: int) -> None:
        """Take what an open slot needs besides, whose text has so many of its rows."""
        size, num_rows = self._cache.page_size, len(token_ids) - 1
        first = num_rows // size if token_ids in self._taken else 0  # it takes over whole pages
        pages = -(-(num_rows + self._num_rows) // size) - max(-(-(num_held + self._num_rows) // size), first)
        self._left -= max(pages, 0)
        self._taken.add(token_ids)

    def take(self, token_ids: Sequence[int]) -> bool:
        """Take what a text needs that joins, with rows for all but its anchor; whether it was there."""
        is_repeated = token_ids in self._taken
        self._left -= self._cache.cost(token_ids[:-1], self._num_rows, is_repeated=is_repeated)
        self._taken.add(token_ids)
        return not self.is_short
