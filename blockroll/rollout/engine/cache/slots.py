"""A slot of memory for each text, as long as the longest text may become: keys in one piece, read in place.

Shapes: N slots, B slots of one window, H key-value heads, R new rows, S keys, D head width; of a packed
window N rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blockroll.kernels.block_attention import Packing
from blockroll.kernels.transfer import sent
from blockroll.policies.base import Policy, StateWindow
from blockroll.rollout.engine.cache.contract import ROW_STEP, Ahead, Cache
from blockroll.rollout.engine.cache.finite import not_finite
from blockroll.rollout.engine.cache.held import SlotTexts


class SlotCache(Cache):
    """Texts that have ended stay in the slots behind the open ones, until `share` opens these for others."""

    page_size = 0
    num_open = 0

    def __init__(self, policy: Policy, *, num_slots: int = 0, capacity: int = 0) -> None:
        """So many slots, all of them open and empty, with room for `capacity` rows each."""
        self._policy = policy
        self.capacity = capacity  # rows of one slot: committed tokens and the widest block behind them
        self.num_open = num_slots
        self._texts = SlotTexts(num_slots)
        self._missing = [0] * num_slots  # rows by which a text begins later than its slot's first column
        self._keys: list[Tensor] = []  # per layer (N, H, capacity, D), allocated at the first window
        self._values: list[Tensor] = []

    @property
    def num_slots(self) -> int:
        """Open ones and others."""
        return len(self._texts)

    def tokens(self, slot: int) -> list[int]:
        """The tokens of a slot's valid rows, in order; not to be changed."""
        return self._texts.tokens(slot)

    def lengths(self, start: int, stop: int) -> list[int]:
        """Valid rows of the slots start..stop-1; below 0 for a text that begins so many rows later."""
        lengths, missing = self._texts.lengths(start, stop), self._missing[start:stop]
        return [length - number for length, number in zip(lengths, missing, strict=True)]

    def window(
        self, start: int, stop: int, num_rows: int, *, num_pending: int = 0, ahead: Ahead | None = None
    ) -> "SlotWindow":
        """The open slots start..stop-1, for `num_rows` new rows each, behind their valid ones.

        `num_pending` rows that an earlier forward of the same step wrote there stand before the new ones.
        """
        assert ahead is None, "rows of a slot lie where the host says"
        assert stop <= self.num_open, (
            f"slots {start} to {stop - 1} are not open, only the first {self.num_open}"
        )
        return SlotWindow(self, start, stop, num_rows, num_pending)

    def packed_window(self, start: int, packing: Packing) -> "SlotWindow":
        """The open slots from `start` on, for the rows of `packing` behind the valid ones of each."""
        stop = start + len(packing.num_rows)
        assert stop <= self.num_open, f"slots {start} to {stop - 1} are not all open: {self.num_open} are"
        return SlotWindow(self, start, stop, packing.width, 0, packing)

    def commit(self, start: int, token_ids: Sequence[Sequence[int]]) -> None:
        """The rows behind those of slots start.. are these tokens': the forwards that wrote them are done."""
        for slot, tokens in enumerate(token_ids, start=start):
            assert slot < self.num_open, f"slot {slot} is not open"
            self._missing[slot] = 0
            self._texts.extend(slot, tokens)

    def keep(self, slot: int, num_rows: int) -> None:
        """Only the first rows of an open slot, so many, are its text's."""
        self._texts.cut(slot, num_rows)

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have so many slots, with room for so many rows at least; what the first of them hold stays."""
        is_of_another = bool(self._keys) and self._keys[0].dtype != self._policy.kv_shape.dtype
        if is_of_another and not self.num_open:
            self.clear()  # what earlier texts left under another precision is no use in this one
        capacity = max(capacity, self.capacity)
        if (num_slots, capacity) == (self.num_slots, self.capacity):
            return
        with torch.inference_mode(False):
            keys, values = (
                # Negative numbers cut off.
                [
                    F.pad(each, (0, 0, 0, capacity - each.shape[2], 0, 0, 0, num_slots - len(each)))
                    for each in part
                ]
                for part in (self._keys, self._values)
            )
        # All memory is there: nothing below can fail.
        self._keys, self._values = keys, values
        self._texts.resize(num_slots)
        self._missing = [*self._missing[:num_slots], *[0] * (num_slots - len(self._missing))]
        self.num_open = min(self.num_open, num_slots)
        self.capacity = capacity

    def repair(self) -> None:
        """Put right what an exception amid a change has left: memory and tokens say what holds."""
        self._texts.repair()
        num_slots = self.num_slots
        if self._keys:
            num_slots, _, self.capacity, _ = self._keys[0].shape
            self._texts.resize(num_slots)
        self._missing = [*self._missing[:num_slots], *[0] * (num_slots - len(self._missing))]
        self.num_open = min(self.num_open, num_slots)

    def invalidate(self) -> None:
        """No slot is open and no row valid any more: the weights have changed. No interrupt halves it."""
        texts, missing = SlotTexts(self.num_slots), [0] * self.num_slots
        self._texts, self._missing, self.num_open = texts, missing, 0

    def clear(self) -> None:
        """Give the memory back and forget everything; a window after the next `reserve` allocates anew."""
        texts = SlotTexts()
        # No calls from here on: an interrupt finds all of it as it was, or all of it gone.
        self._texts, self._missing, self._keys, self._values = texts, [], [], []
        self.num_open = self.capacity = 0

    def forget(self) -> None:
        """No row of a text that has ended may be taken over any more."""
        for slot in range(self.num_open, self.num_slots):
            self._texts.cut(slot, 0)

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of a text's first rows, and how many; (0, 0) if none does."""
        return self._texts.longest_prefix(token_ids)

    def share(
        self, start: int, sources: Sequence[int], num_rows: Sequence[int], *, num_pending: int = 0
    ) -> None:
        """Open slots start.. with the first valid rows of `sources`, so many each; slots behind them close.

        As many as `num_pending` rows that a forward of this step wrote behind them come along. A number of
        rows below 0 is of a text that begins so many rows later.
        """
        stop = start + len(sources)
        tokens = [self.tokens(source)[: max(n, 0)] for source, n in zip(sources, num_rows, strict=True)]
        self.num_open = min(self.num_open, start)
        for slot in range(start, stop):
            if slot != sources[slot - start]:
                self._texts.cut(slot, 0)
        most = max(num_rows, default=0) + num_pending
        if most > 0 and list(sources) != list(range(start, stop)):
            sources_B = sent(sources, self._policy.device)
            for tensor in (*self._keys, *self._values):
                # The right side is a copy, made before any row is overwritten.
                tensor[start:stop, :, :most] = tensor[:, :, :most][sources_B]
        for slot, (taken, number) in enumerate(zip(tokens, num_rows, strict=True), start=start):
            self._texts.cut(slot, 0)
            self._texts.extend(slot, taken)
            self._missing[slot] = max(-number, 0)
        self.num_open = stop

    def release(self, slot: int) -> None:
        """Close a slot: the last open one takes its place, and its rows may be taken over."""
        last = self.num_open - 1
        if slot != last:
            self.exchange(slot, last)
        self.num_open = last

    def exchange(self, first: int, second: int) -> None:
        """Two open slots change places; if that fails half-way, neither holds anything."""
        pair = sent([first, second], self._policy.device)
        rows = max(len(self.tokens(slot)) for slot in (first, second))
        try:
            for tensor in (*self._keys, *self._values):
                tensor[pair, :, :rows] = tensor[:, :, :rows][pair.flip(0)]
            self._texts.swap(first, second)
        except BaseException:
            for slot in (first, second):
                self._texts.cut(slot, 0)
            raise

    def close(self, num_open: int) -> None:
        """Only so many slots are open any more; what the others hold may be taken over."""
        self.num_open = min(self.num_open, num_open)

    def scrub(self, slot: int) -> None:
        """Zero a slot whose forward went wrong: hidden NaN would still reach its next request, as 0 * NaN."""
        self._texts.cut(slot, 0)
        for tensor in (*self._keys, *self._values):
            tensor[slot] = 0

    def scrub_all(self) -> None:
        """Zero what is not finite anywhere, and forget texts with such rows: nobody may have seen it yet."""
        for slot in not_finite((*self._keys, *self._values)):
            if not all(bool(rows.isfinite().all()) for rows in self.committed(slot)):
                self._texts.cut(slot, 0)
            for tensor in (*self._keys, *self._values):
                tensor[slot, :, len(self.tokens(slot)) :] = 0

    def first_rows(self, start: int, stop: int, extent: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views of keys and of values (B, H, extent, D), layer by layer."""
        if not self._keys:
            self._allocate()
        slots = slice(start, stop)
        keys = [tensor[slots, :, :extent] for tensor in self._keys]
        return keys, [tensor[slots, :, :extent] for tensor in self._values]

    def _allocate(self) -> None:
        row = self._policy.kv_shape
        shape = (self.num_slots, row.num_heads, self.capacity, row.width)
        with torch.inference_mode(False):  # ordinary tensors, for code in that mode and outside of it
            tensors = [
                torch.zeros(shape, dtype=row.dtype, device=self._policy.device)
                for _ in range(2 * row.num_layers)
            ]
        self._keys, self._values = tensors[: row.num_layers], tensors[row.num_layers :]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def committed(self, slot: int) -> tuple[Tensor, ...]:
        """Keys and then values of a slot's valid rows (H, S, D), layer by layer."""
        length = len(self.tokens(slot))
        return tuple(tensor[slot, :, :length] for tensor in (*self._keys, *self._values))

    def fill_stale(self, value: float) -> None:
        """Overwrite every row that is not valid: what attention may not see must not matter."""
        for tensor in (*self._keys, *self._values):
            for slot in range(self.num_slots):
                tensor[slot, :, len(self.tokens(slot)) :] = value

    def check_integrity(self) -> None:
        """Raise AssertionError where counts, indices or memory contradict the contract."""
        assert 0 <= self.num_open <= self.num_slots, f"{self.num_open} of {self.num_slots} slots are open"
        assert len(self._missing) == self.num_slots
        longest = max(self._texts.lengths(0, self.num_slots), default=0)
        assert longest <= self.capacity, f"a slot of {self.capacity} rows holds {longest} tokens"
        assert len(self._keys) == len(self._values), "a layer has keys and no values, or the reverse"
        for tensor in (*self._keys, *self._values):
            size = (tensor.shape[0], tensor.shape[2])
            assert size == (self.num_slots, self.capacity), f"memory of {size} slots and rows"
        self._texts.check_integrity()


class SlotWindow:
    """What one forward sees of the cache; stands in for transformers' cache object."""

    states: StateWindow | None = None
    pages = None  # attention is handed keys in place

    def __init__(
        self,
        cache: SlotCache,
        start: int,
        stop: int,
        num_rows: int,
        num_pending: int,
        packing: Packing | None = None,
    ) -> None:
        lengths = [length + num_pending for length in cache.lengths(start, stop)]
        counts = [num_rows] * len(lengths) if packing is None else packing.num_rows
        needed = max(map(sum, zip(lengths, counts, strict=True)))
        assert needed <= cache.capacity, f"{needed} rows do not fit a slot of {cache.capacity}"
        self._keys, self._values = cache.first_rows(start, stop, extent := _extent(needed, cache.capacity))
        self.extent = extent
        device = self._keys[0].device
        self.lengths_B = sent(lengths, device)
        self.packing = packing  # None: all requests have as many rows
        self._rows: slice | None = None  # of all slots, where these are the same
        self._places: tuple[Tensor, Tensor]
        if packing is not None:
            index_N = self.lengths_B[packing.request_N] + packing.offset_N
            self._places = (packing.request_N, index_N)
            return
        if min(lengths) == max(lengths) >= 0:
            self._rows = slice(lengths[0], lengths[0] + num_rows)
            return
        index_BR = self.lengths_B[:, None] + torch.arange(num_rows, device=device)
        if min(lengths) < 0:  # rows before a text go behind it
            index_BR = torch.where(index_BR < 0, index_BR + num_rows, index_BR)
        self._places = (torch.arange(len(lengths), device=device)[:, None], index_BR)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows (B, H, R, D); return its keys and values (B, H, extent, D).

        A packed window takes packed rows (1, H, N, D), and of a rectangle the rows that are a request's.
        """
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        # Not by `scatter_`, which copies all of the keys there and back where they are bfloat16. Under
        # autocast some norms give float32; attention would round it likewise.
        for held, states in ((keys, key_states), (values, value_states)):
            if self._rows is not None:
                held[:, :, self._rows] = states
                continue
            rows = states.transpose(1, 2)
            if self.packing is not None:
                rows = (rows if len(rows) == 1 else self.packing.pack(rows))[0]
            held.transpose(1, 2)[self._places] = rows.to(held.dtype)
        return keys, values


def _extent(num_rows: int, capacity: int) -> int:
    return min(-(-num_rows // ROW_STEP) * ROW_STEP, capacity)
