"""Keys and values of the running requests, one slot each, committed per slot.

A forward writes its rows behind a slot's committed length and reads everything up to them; only
`commit` makes rows final. Rejected and mask rows are overwritten by the next forward, and no row ever sees
a row that is neither committed nor new, so stale contents can't matter.

A slot also remembers which tokens its first rows were made from, after its request has ended too: a text that
begins with the same tokens takes them over. Only causal rows of committed tokens are ever remembered.

Shapes: N slots, B slots of one window, H key-value heads, R new rows, S keys, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blockroll.policies.base import Policy

ROW_STEP = 16  # keys handed to attention come in multiples of this, so that few shapes occur
_NOTHING = -1  # no token: stands behind the last one a slot remembers


class SlotCache:
    """Invariant: rows below `lengths_N[slot]` are the keys and values of that slot's committed tokens."""

    def __init__(self, policy: Policy, *, num_slots: int = 0, capacity: int = 0) -> None:
        self._policy = policy
        self.num_slots = num_slots
        self.capacity = capacity  # rows of one slot: committed tokens and the widest block behind them
        self.lengths_N = torch.zeros(num_slots, dtype=torch.int64, device=policy.device)
        self._held_NS = torch.full((num_slots, capacity), _NOTHING)  # int64, on the host: token of each row
        self._keys: list[Tensor] = []  # per layer (N, H, capacity, D), allocated at the first window
        self._values: list[Tensor] = []

    def window(self, start: int, stop: int, num_rows: int) -> "SlotWindow":
        """The slots start..stop-1, opened for `num_rows` new rows each."""
        return SlotWindow(self, start, stop, num_rows)

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have so many slots, with room for so many rows at least; what is committed in them stays."""
        is_of_another = bool(self._keys) and self._keys[0].dtype != self._policy.kv_shape.dtype
        if is_of_another and not self.lengths_N.any():
            self.release()  # what earlier texts left under another precision is no use in this one
        capacity = max(capacity, self.capacity)
        if (num_slots, capacity) == (self.num_slots, self.capacity):
            return
        more = (0, 0, 0, capacity - self.capacity, 0, 0, 0, num_slots - self.num_slots)  # negative cuts off
        with torch.inference_mode(False):
            for storage in (self._keys, self._values):
                storage[:] = [F.pad(tensor, more) for tensor in storage]
            self.lengths_N = F.pad(self.lengths_N, more[-2:])
        added = (0, capacity - self.capacity, 0, num_slots - self.num_slots)
        self._held_NS = F.pad(self._held_NS, added, value=_NOTHING)
        self.num_slots, self.capacity = num_slots, capacity

    def release(self) -> None:
        """Give the memory back and forget everything; a window after the next `reserve` allocates anew."""
        self._keys, self._values = [], []
        self.num_slots = self.capacity = 0
        self.lengths_N, self._held_NS = self.lengths_N[:0], self._held_NS[:0, :0]

    def commit(self, start: int, stop: int, num_rows_B: Tensor | int) -> None:
        """Make the first `num_rows_B` of the rows just written final, per slot."""
        self.lengths_N[start:stop] += num_rows_B

    def hold(self, slot: int, token_ids: Sequence[int]) -> None:
        """The first rows of a slot are the causal rows of these tokens, until a forward overwrites them."""
        self._held_NS[slot] = _NOTHING
        self._held_NS[slot, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)

    def forget(self) -> None:
        """No row may be taken over any more: the weights that made them have changed."""
        self._held_NS.fill_(_NOTHING)

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of a text's first rows, and how many."""
        text_S = torch.tensor(token_ids, dtype=torch.int64)
        differs_NS = self._held_NS[:, : len(token_ids)] != text_S
        ends_NS = F.pad(differs_NS, (0, 1), value=True)
        num_rows, slot = ends_NS.int().argmax(dim=1).max(dim=0)
        return int(slot), int(num_rows)

    def take_over(
        self, start: int, sources: Sequence[int], num_rows: Sequence[int], *, num_behind: int = 0
    ) -> None:
        """Commit to slots start.. the first rows of `sources`, so many each. They hold nothing until told.

        As many as `num_behind` rows behind them come along. A number of rows below 0 is of a text that begins
        so many rows later.
        """
        targets = range(start, start + len(sources))
        most = max(num_rows, default=0) + num_behind
        if most > 0 and list(sources) != list(targets):
            sources_B = torch.tensor(sources, device=self.lengths_N.device)
            for tensor in (*self._keys, *self._values):
                # The right side is a copy, made before any row is overwritten.
                tensor[start : targets.stop, :, :most] = tensor[:, :, :most][sources_B]
        self.lengths_N[start : targets.stop] = torch.tensor(num_rows, device=self.lengths_N.device)
        self._held_NS[start : targets.stop] = _NOTHING

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots."""
        pair = torch.tensor([first, second], device=self.lengths_N.device)
        held = (self._held_NS[pair.cpu()] != _NOTHING).sum(dim=1)
        rows = int(max(self.lengths_N[pair].max(), held.max()))
        for tensor in (*self._keys, *self._values):
            tensor[pair, :, :rows] = tensor[:, :, :rows][pair.flip(0)]
        self.lengths_N[pair] = self.lengths_N[pair.flip(0)]
        self._held_NS[pair.cpu()] = self._held_NS[pair.flip(0).cpu()]

    def clear(self, slot: int) -> None:
        """Nothing is committed in a slot any more; what it holds may still be taken over."""
        self.lengths_N[slot] = 0

    def scrub(self, slot: int) -> None:
        """Zero a slot whose forward went wrong: hidden NaN would still reach its next request, as 0 * NaN."""
        self.hold(slot, ())
        for tensor in (*self._keys, *self._values):
            tensor[slot] = 0

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
            for storage in (self._keys, self._values):
                storage.extend(
                    torch.zeros(shape, dtype=row.dtype, device=self._policy.device)
                    for _ in range(row.num_layers)
                )

    def committed(self, slot: int) -> tuple[Tensor, ...]:
        """Keys and then values of a slot's committed rows (H, S, D), layer by layer."""
        length = int(self.lengths_N[slot])
        return tuple(tensor[slot, :, :length] for tensor in (*self._keys, *self._values))

    def fill_stale(self, value: float) -> None:
        """Overwrite every row that is not committed: what attention may not see must not matter."""
        for tensor in (*self._keys, *self._values):
            for slot, length in enumerate(self.lengths_N.tolist()):
                tensor[slot, :, length:] = value
                self._held_NS[slot, length:] = _NOTHING


class SlotWindow:
    """What one forward sees of the cache; stands in for transformers' cache object."""

    def __init__(self, cache: SlotCache, start: int, stop: int, num_rows: int) -> None:
        # A copy: commits move the cache's own lengths on.
        self.lengths_B = cache.lengths_N[start:stop].clone()
        shortest, longest = (int(length) for length in self.lengths_B.aminmax())
        needed = longest + num_rows
        assert needed <= cache.capacity, f"{needed} rows do not fit a slot of {cache.capacity}"
        self.extent = min(-(-needed // ROW_STEP) * ROW_STEP, cache.capacity)
        index_BR = self.lengths_B[:, None] + torch.arange(num_rows, device=self.lengths_B.device)
        if shortest < 0:  # rows before a text go behind it
            index_BR = torch.where(index_BR < 0, index_BR + num_rows, index_BR)
        self._index_B1R1 = index_BR[:, None, :, None]
        self._keys, self._values = cache.first_rows(start, stop, self.extent)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows (B, H, R, D); return its keys and values (B, H, extent, D)."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        index_BHRD = self._index_B1R1.expand_as(key_states)
        # Under autocast some norms give float32; attention would round it likewise.
        keys.scatter_(2, index_BHRD, key_states.to(keys.dtype))
        values.scatter_(2, index_BHRD, value_states.to(values.dtype))
        return keys, values
