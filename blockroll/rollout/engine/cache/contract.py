"""Keys and values of texts: the one owner of what a slot holds, however its rows lie in memory.

Contract of every layout:

1. A row is *valid* once the forward that wrote it has returned and `commit` has named its token. Only valid
   rows are read as keys by a later step, or taken over by another text. A forward that raises has committed
   nothing: its slots hold what they held before.
2. Slots 0..`num_open`-1 belong to running texts. Only they have windows, and a window writes behind the valid
   rows of its slots alone. Texts that have ended are kept while their memory is not needed: `longest_prefix`
   names them as sources, and `share` opens slots with their rows.
3. Every row holds causal keys of a token behind exactly the tokens before it. So whoever begins with the same
   tokens may read them (`longest_prefix`, `share`), until the weights change (`invalidate`).
4. `tokens(slot)` is the only answer to what a slot holds. Callers keep no second copy.
5. Memory that more than one text reads is written by none of them.
6. Whatever an exception interrupts, `repair` makes whole, from the tokens of each text and where they lie.

`check_integrity` says whether this still holds as far as counts and indices can tell. It runs whenever an
engine becomes idle.

Life of a slot: `reserve` (memory) - `share` (open, with the rows of a source or none) - `window` and `commit`
(each step) - `release` (closed; its rows may be shared).

Shapes: B slots of one window, H key-value heads, R new rows, S keys, D head width; of a packed window N rows.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from blockroll.kernels.block_attention import Packing
from blockroll.policies.base import KVWindow, StateWindow

ROW_STEP = 16  # keys handed to attention come in multiples of this, so that few shapes occur


@dataclass(frozen=True, slots=True)
class Ahead:
    """Rows behind the valid ones that the host has not committed yet: of a step that is not read."""

    rows_B: Tensor  # int64, how many the step commits for each request; a device alone knows
    most: int  # of any of them


class Window(KVWindow, Protocol):
    """What one forward sees of a cache."""

    packing: Packing | None  # of its rows; None: all requests have as many
    states: StateWindow | None


class Cache(ABC):
    """Keys and values by slot, under the contract above. Not thread-safe."""

    @property
    @abstractmethod
    def page_size(self) -> int:
        """Rows of a page; 0: each slot has one piece of memory."""

    @property
    @abstractmethod
    def num_open(self) -> int:
        """Slots of running texts."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Open ones and others."""

    @abstractmethod
    def tokens(self, source: int) -> list[int]:
        """The tokens of a slot's valid rows, in order, or of another source's; not to be changed."""

    @abstractmethod
    def lengths(self, start: int, stop: int) -> list[int]:
        """Valid rows of the slots start..stop-1; below 0 for a text that begins so many rows later."""

    @abstractmethod
    def window(
        self, start: int, stop: int, num_rows: int, *, num_pending: int = 0, ahead: Ahead | None = None
    ) -> Window:
        """The open slots start..stop-1, for `num_rows` new rows each, behind their valid ones.

        `num_pending` rows that an earlier forward of the same step wrote there stand before the new ones, and
        before those, where the layout `has_ahead`, the rows of a step that is not read yet.
        """

    @property
    def has_ahead(self) -> bool:
        """Whether windows may stand behind rows that the host has not committed."""
        return False

    def settled_window(self, start: int, stop: int, num_rows: int) -> Window:
        """The same, for rows all of which will be committed: little is kept of recurrent states then."""
        return self.window(start, stop, num_rows)

    @abstractmethod
    def packed_window(self, start: int, packing: Packing) -> Window:
        """The open slots from `start` on, for the rows of `packing` behind the valid ones of each.

        It takes packed rows (1, H, N, D), and of a rectangle the rows that are a request's.
        """

    @abstractmethod
    def commit(self, start: int, token_ids: Sequence[Sequence[int]]) -> None:
        """The rows behind those of slots start.. are these tokens': the forwards that wrote them are done."""

    @abstractmethod
    def keep(self, slot: int, num_rows: int) -> None:
        """Only the first rows of an open slot, so many, are its text's."""

    @abstractmethod
    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have so many slots, with room for so many rows each; what the first of them hold stays."""

    def spare(self, num_rows: int) -> int:
        """Pages left once every open slot has so many rows behind its valid ones; below 0, so many lack.

        Where there are plenty, as many at least. Texts that have ended count for nothing. A layout that has
        reserved all memory always has some.
        """
        return sys.maxsize

    def cost(self, token_ids: Sequence[int], num_rows: int, *, is_repeated: bool = False) -> int:
        """Pages for these tokens and so many rows behind them, but for those of a running text that has them.

        `is_repeated` says that a text of the same tokens joins before.
        """
        return 0

    @abstractmethod
    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The source that holds most of a text's first rows, and how many; (0, 0) if none does.

        A source is an open slot or a text that is kept; it stands until the cache changes.
        """

    @abstractmethod
    def share(
        self, start: int, sources: Sequence[int], num_rows: Sequence[int], *, num_pending: int = 0
    ) -> None:
        """Open slots start.. with the first valid rows of `sources`, so many each; slots behind them close.

        As many as `num_pending` rows that a forward of this step wrote behind them come along. A number of
        rows below 0 is of a text that begins so many rows later.
        """

    @abstractmethod
    def exchange(self, first: int, second: int) -> None:
        """Two open slots change places; if that fails half-way, neither holds anything."""

    @abstractmethod
    def release(self, slot: int) -> None:
        """Close a slot: the last open one takes its place, and its rows may be taken over."""

    @abstractmethod
    def close(self, num_open: int) -> None:
        """Only so many slots are open any more; what the others hold may be taken over."""

    @abstractmethod
    def scrub(self, slot: int) -> None:
        """Zero a slot whose forward went wrong: hidden NaN would still reach its next request, as 0 * NaN."""

    @abstractmethod
    def scrub_all(self) -> None:
        """Zero what is not finite anywhere, and forget texts with such rows: nobody may have seen it yet."""

    @abstractmethod
    def repair(self) -> None:
        """Put right what an exception amid a change has left: memory and tokens say what holds."""

    @abstractmethod
    def invalidate(self) -> None:
        """No slot is open and no row valid any more: the weights have changed. No interrupt halves it."""

    @abstractmethod
    def forget(self) -> None:
        """No row of a text that has ended may be taken over any more."""

    @abstractmethod
    def clear(self) -> None:
        """Give the memory back and forget everything; a window after the next `reserve` allocates anew."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken."""

    @abstractmethod
    def committed(self, source: int) -> tuple[Tensor, ...]:
        """Keys and then values of a source's valid rows (H, S, D), layer by layer."""

    @abstractmethod
    def fill_stale(self, value: float) -> None:
        """Overwrite every row that is not valid: what attention may not see must not matter."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where counts, indices or memory contradict the contract."""
