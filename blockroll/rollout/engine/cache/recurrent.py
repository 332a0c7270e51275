"""A cache, in whichever layout, of a policy whose layers carry a state: the states go where the rows go."""

from collections.abc import Sequence

from torch import Tensor

from blockroll.kernels.block_attention import Packing
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Ahead, Cache, Window
from blockroll.rollout.engine.cache.state import SlotStates


class RecurrentCache(Cache):
    """Keys and values of `rows`, and beside them the states of the same slots.

    The contract of a cache holds with two things more: `keep` may leave fewer rows than it is asked for, and
    `longest_prefix` names fewer than are there; as many as a state stands behind. So no pending rows come
    along when slots are shared. Where an exception comes between the two, a state stands nowhere, and
    whoever puts requests and slots right finds too few rows.
    """

    def __init__(self, policy: Policy, rows: Cache, *, max_rows: int = 0) -> None:
        """`rows` is this cache's own from now on; `max_rows` bounds those of all texts, 0 does not."""
        self._policy, self._rows, self._max_rows = policy, rows, max_rows
        self._states = SlotStates(policy, num_slots=rows.num_slots)
        self._is_outdated = False  # a change of weights has begun and not ended

    @property
    def page_size(self) -> int:
        """Rows of a page; 0: each slot has one piece of memory."""
        return self._rows.page_size

    @property
    def num_open(self) -> int:
        """Slots of running texts."""
        return self._rows.num_open

    @property
    def num_slots(self) -> int:
        """Open ones and others."""
        return self._rows.num_slots

    def tokens(self, source: int) -> list[int]:
        """The tokens of a slot's valid rows, in order, or of another source's; not to be changed."""
        return self._rows.tokens(source)

    def lengths(self, start: int, stop: int) -> list[int]:
        """Valid rows of the slots start..stop-1; below 0 for a text that begins so many rows later."""
        return self._rows.lengths(start, stop)

    def window(
        self, start: int, stop: int, num_rows: int, *, num_pending: int = 0, ahead: Ahead | None = None
    ) -> Window:
        """The open slots start..stop-1, for `num_rows` new rows each, behind their valid ones."""
        assert ahead is None, "a state stands where the host has committed rows"
        window = self._rows.window(start, stop, num_rows, num_pending=num_pending)
        lengths, counts = self.lengths(start, stop), [num_rows] * (stop - start)
        window.states = self._states.window(start, lengths, counts, num_pending)
        return window

    def settled_window(self, start: int, stop: int, num_rows: int) -> Window:
        """The same, for rows all of which will be committed."""
        window = self._rows.window(start, stop, num_rows)
        window.states = self._states.settled_window(start, self.lengths(start, stop), num_rows)
        return window

    def packed_window(self, start: int, packing: Packing) -> Window:
        """The open slots from `start` on, for the rows of `packing` behind the valid ones of each."""
        window = self._rows.packed_window(start, packing)
        lengths = self.lengths(start, start + len(packing.num_rows))
        window.states = self._states.window(start, lengths, packing.num_rows, 0)
        return window

    def commit(self, start: int, token_ids: Sequence[Sequence[int]]) -> None:
        """The rows behind those of slots start.. are these tokens': the forwards that wrote them are done."""
        self._rows.commit(start, token_ids)
        self._states.commit(start, [self.tokens(slot) for slot in range(start, start + len(token_ids))])

    def keep(self, slot: int, num_rows: int) -> None:
        """Only the first rows of an open slot, so many at most, are its text's, as far as a state is left."""
        self._rows.keep(slot, num_rows)
        self._rows.keep(slot, self._states.keep(slot, self.tokens(slot)))

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have so many slots, with room for so many rows each; what the first of them hold stays."""
        if self._states.parts != self._policy.state_shape and not self.num_open:
            self.clear()  # what earlier texts left under another precision is no use in this one
        num_rows = num_slots * capacity
        self._states.resize(num_slots, min(num_rows, self._max_rows) if self._max_rows else num_rows)
        self._rows.reserve(num_slots=num_slots, capacity=capacity)

    def spare(self, num_rows: int) -> int:
        """Pages left once every open slot has so many rows behind its valid ones; below 0, so many lack."""
        return self._rows.spare(num_rows)

    def cost(self, token_ids: Sequence[int], num_rows: int, *, is_repeated: bool = False) -> int:
        """Pages for these tokens and so many rows behind them, beyond those that running texts have."""
        return self._rows.cost(token_ids, num_rows, is_repeated=is_repeated)

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The source that holds most of a text's first rows, and up to which a state stands."""
        source, num_rows = self._rows.longest_prefix(token_ids)
        num_rows = self._states.longest(token_ids, num_rows)
        return (source, num_rows) if num_rows else (0, 0)

    def share(
        self, start: int, sources: Sequence[int], num_rows: Sequence[int], *, num_pending: int = 0
    ) -> None:
        """Open slots start.. with the first valid rows of `sources`, so many each; others behind close."""
        assert not num_pending, "pending rows have states that are not taken to other slots"
        texts = [
            self.tokens(source)[:number] if number > 0 else []
            for source, number in zip(sources, num_rows, strict=True)
        ]
        taken = self._states.take(start, sources, texts)
        self._rows.share(start, sources, num_rows)
        self._states.put(start, taken, [len(text) for text in texts])

    def exchange(self, first: int, second: int) -> None:
        """Two open slots change places; if that fails half-way, neither holds anything."""
        self._states.exchange(first, second)
        self._rows.exchange(first, second)

    def release(self, slot: int) -> None:
        """Close a slot: the last open one takes its place, and its rows may be taken over."""
        self._states.release(slot, self.tokens(slot), self.num_open - 1)
        self._rows.release(slot)

    def close(self, num_open: int) -> None:
        """Only so many slots are open any more; what the others hold may be taken over."""
        self._rows.close(num_open)

    def scrub(self, slot: int) -> None:
        """Zero a slot whose forward went wrong: hidden NaN would still reach its next request, as 0 * NaN."""
        self._rows.scrub(slot)
        self._states.scrub(slot)

    def scrub_all(self) -> None:
        """Zero what is not finite anywhere, and forget texts with such rows: nobody may have seen it yet."""
        self._rows.scrub_all()
        for slot in self._states.not_finite():
            if slot < self.num_open:
                self._rows.keep(slot, 0)
            self._states.scrub(slot)
        self._states.snapshots.drop_not_finite()

    def repair(self) -> None:
        """Put right what an exception amid a change has left: memory and tokens say what holds."""
        if self._is_outdated:
            self.invalidate()
        self._states.repair()
        self._rows.repair()

    def invalidate(self) -> None:
        """No slot is open and no row valid any more: the weights have changed."""
        self._is_outdated = True  # an interrupt on the way is made good by `repair`
        self._states = self._states.emptied()
        self._rows.invalidate()
        self._is_outdated = False

    def forget(self) -> None:
        """No row of a text that has ended may be taken over any more."""
        self._states.snapshots.clear()
        self._rows.forget()

    def clear(self) -> None:
        """Give the memory back and forget everything; a window after the next `reserve` allocates anew."""
        self._states = SlotStates(self._policy)
        self._rows.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken."""
        return self._rows.num_bytes + self._states.num_bytes

    def committed(self, source: int) -> tuple[Tensor, ...]:
        """Keys and then values of a source's valid rows (H, S, D), layer by layer; of an open slot its state
        as well, part by part (layers, ...)."""
        is_open = 0 <= source < self.num_open
        return (*self._rows.committed(source), *(self._states.state(source) if is_open else ()))

    def fill_stale(self, value: float) -> None:
        """Overwrite every row and state that is not valid: what may not be seen must not matter."""
        self._rows.fill_stale(value)
        self._states.fill_stale(value)

    def check_integrity(self) -> None:
        """Raise AssertionError where counts, indices or memory contradict the contract."""
        self._rows.check_integrity()
        self._states.check_integrity([len(self.tokens(slot)) for slot in range(self.num_open)])
