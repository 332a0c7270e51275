"""What recurrent layers carry behind the last valid row of each slot: the part of a cache that is not rows.

1. A state *stands* at one length of one text: it is the one behind so many rows. That of an open slot stands
   at the length of its valid rows, between steps.
2. A forward leaves *candidates*, one behind each row that holds a token; masks leave none. `commit` makes the
   one at the committed length the slot's own. What was rejected is never read again.
3. A forward whose rows lie behind pending ones begins at the candidate of the last of these.
4. Another text may take over rows only up to a length at which a state of just these tokens stands: a slot's
   own, or a snapshot. Where all tokens of a forward are settled, a prefill's, it leaves states at the last
   row and every so many before it, and all of them become snapshots. So does that of a text that ends.

Column 0 of a slot is its state, column i the i-th candidate: to commit is one gather by an index tensor, and
in a decoding step the number of rows that the verdict commits is the column. Before a text's first row there
are zeros.

Shapes: N slots, B slots of one window, C candidates of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from blockroll.kernels.transfer import sent
from blockroll.policies.base import KVShape, Policy, StatePart
from blockroll.rollout.engine.cache.finite import not_finite
from blockroll.rollout.engine.cache.snapshots import Snapshots, State

_NOWHERE = -1  # stands a state that is being written, or nobody's
_LEAST_STEP = 16  # rows from snapshot to snapshot
_SHARE = 8  # snapshots along a text may take as much memory as an eighth of its keys and values
_MOST_MARKS = 8  # snapshots of one forward, since each is a candidate of every slot


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMemory:
    """What states take of memory, in bytes, before any is there; of a policy without any it is nothing."""

    state: int  # of one text
    step: int  # rows from snapshot to snapshot

    @classmethod
    def of(cls, parts: Sequence[StatePart], row: KVShape) -> Self:
        """The step is the least power of two at which snapshots take no more than their share."""
        state = sum(part.num_bytes for part in parts)
        return cls(
            state=state, step=max(1 << (-(-_SHARE * state // row.num_bytes) - 1).bit_length(), _LEAST_STEP)
        )

    def slot(self, *, num_drafts: int, max_rows: int) -> int:
        """Of a slot at most: its state, candidates of so many drafts or settled rows, and 2 snapshots."""
        most_marks = 1 + min(-(-(max_rows - 1) // self.step), _MOST_MARKS + 1)
        return (1 + max(num_drafts + 1, most_marks) + 2) * self.state

    def most_snapshots(self, num_slots: int, num_rows: int) -> int:
        """Of slots with so many rows in all: of each text at its marks, where it began and where it ended."""
        return 2 * num_slots + num_rows // self.step


class SlotStates:
    """The states of open slots, their candidates, and snapshots of texts."""

    def __init__(self, policy: Policy, *, num_slots: int = 0) -> None:
        """So many slots, all of them empty."""
        self._policy = policy
        self.parts = policy.state_shape
        self._memory = StateMemory.of(self.parts, policy.kv_shape)
        self.snapshots = Snapshots(2 * num_slots)
        self._held: list[Tensor] = []  # by part (layers, N, 1 + C, ...), allocated at the first use
        self._stands = [0] * num_slots
        self._columns: list[Sequence[int]] = [()] * num_slots  # lengths at which columns 1.. stand
        self._is_settled = [False] * num_slots  # whether those are to become snapshots

    def emptied(self) -> "SlotStates":
        """The same memory, in which no state stands and no snapshot is left."""
        empty = SlotStates(self._policy, num_slots=len(self._stands))
        empty._held, empty.snapshots.most = self._held, self.snapshots.most
        empty._stands = [_NOWHERE] * len(self._stands)
        return empty

    def resize(self, num_slots: int, num_rows: int) -> None:
        """Have so many slots, for texts of so many rows in all; what the first of them hold stays."""
        self.snapshots.most = self._memory.most_snapshots(num_slots, num_rows)
        self._fit(num_slots)

    def repair(self) -> None:
        """Bring to one size what an exception amid `resize` has left."""
        self._fit(len(self._stands))

    def _fit(self, num_slots: int) -> None:
        with torch.inference_mode(False):
            for index, held in enumerate(self._held):  # a negative number cuts off
                behind = (0, 0) * (held.dim() - 2)
                self._held[index] = pad(held, (*behind, 0, num_slots - held.shape[1]))
        missing = [0] * (num_slots - len(self._stands))
        self._columns = [*self._columns, *[()] * num_slots][:num_slots]
        self._is_settled = [*self._is_settled, *[False] * num_slots][:num_slots]
        self._stands = [*self._stands[:num_slots], *missing]

    def window(
        self, start: int, lengths: Sequence[int], num_rows: Sequence[int], num_pending: int
    ) -> "SlotStateWindow":
        """For so many new rows of each slot from `start` on, behind so many valid ones and pending ones.

        Lengths below 0 are of texts that begin so many rows later.
        """
        self._check_stands(start, lengths)
        for slot, (length, count) in enumerate(zip(lengths, num_rows, strict=True), start=start):
            self._columns[slot] = range(length + 1, length + num_pending + count + 1)
            self._is_settled[slot] = False
        return SlotStateWindow(self, slice(start, start + len(lengths)), num_pending, None)

    def settled_window(self, start: int, lengths: Sequence[int], num_rows: int) -> "SlotStateWindow":
        """The same, for rows that will be committed all: they leave states at their marks."""
        self._check_stands(start, lengths)
        rows = []
        for slot, length in enumerate(lengths, start=start):
            marks = self._marks(length, length + num_rows)
            self._columns[slot], self._is_settled[slot] = marks, True
            rows.append([mark - length - 1 for mark in marks])
        widest = max(map(len, rows))
        rows_BC = sent(
            [[*each, *[num_rows - 1] * (widest - len(each))] for each in rows], self._policy.device
        )
        return SlotStateWindow(self, slice(start, start + len(lengths)), 0, rows_BC)

    def _check_stands(self, start: int, lengths: Sequence[int]) -> None:
        self._allocate()
        stands = self._stands[start : start + len(lengths)]
        assert stands == [max(length, 0) for length in lengths], (
            f"states stand at {stands}, rows at {lengths}"
        )

    def _marks(self, start: int, stop: int) -> list[int]:
        """The lengths behind `start` at which settled rows leave states; the last is `stop`."""
        step, first = self._memory.step, max(start, 0) + 1
        while (stop - first) // step > _MOST_MARKS:
            step *= 2
        return [*range(-(-first // step) * step, stop, step), stop]

    def commit(self, start: int, texts: Sequence[Sequence[int]]) -> None:
        """The forwards behind slots start.. are done, and their valid rows are these tokens' now."""
        columns = [self._column(slot, len(text)) for slot, text in enumerate(texts, start=start)]
        self._advance(start, columns, [len(text) for text in texts])
        for slot, (text, column) in enumerate(zip(texts, columns, strict=True), start=start):
            if self._is_settled[slot]:
                self._is_settled[slot] = False
                for index, length in enumerate(self._columns[slot][:column], start=1):
                    self.snapshots.put(text[:length], self.state(slot, index))

    def _column(self, slot: int, length: int) -> int:
        if length == self._stands[slot]:
            return 0
        lengths = self._columns[slot]
        assert length in lengths, f"slot {slot} is committed to {length} rows, its candidates to {lengths}"
        return 1 + lengths.index(length)

    def _advance(self, start: int, columns: Sequence[int], lengths: Sequence[int]) -> None:
        """Move the states of these columns to the front, where they stand at these lengths."""
        stop = start + len(columns)
        if any(columns):
            self._stands[start:stop] = [_NOWHERE] * len(columns)
            columns_B = sent(columns, self._policy.device)
            slots_B = torch.arange(start, stop, device=self._policy.device)
            for held in self._held:
                held[:, start:stop, 0] = held[:, slots_B, columns_B]
        self._stands[start:stop] = lengths

    def longest(self, token_ids: Sequence[int], most: int) -> int:
        """The most first rows of a text, up to `most`, behind which another may go on."""
        return self.snapshots.longest(token_ids, most)[0] if most else 0

    def take(self, start: int, sources: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Copies of the states behind rows of `sources`, of these tokens, part by part (layers, B, ...).

        From here on no state stands in slots start.., until `put`.
        """
        self._allocate()
        own = [
            source if source >= 0 and self._is_of(source, len(text)) else None
            for source, text in zip(sources, texts, strict=True)
        ]
        slots_B = sent([slot or 0 for slot in own], self._policy.device)
        taken = [held[:, slots_B, 0] for held in self._held]
        for index, (slot, text) in enumerate(zip(own, texts, strict=True)):
            if slot is not None and text:
                continue
            found, state = self.snapshots.longest(text, len(text)) if text else (0, None)
            assert found == len(text), f"{len(text)} rows are shared, behind {found} of them stands a state"
            for number, part in enumerate(taken):
                part[:, index] = 0 if state is None else state[number]
        self._stands[start:] = [_NOWHERE] * (len(self._stands) - start)
        return taken

    def put(self, start: int, taken: Sequence[Tensor], lengths: Sequence[int]) -> None:
        """Slots start.. have these states, at these lengths."""
        stop = start + len(lengths)
        self._columns[start:] = [()] * (len(self._columns) - start)
        for held, part in zip(self._held, taken, strict=True):
            held[:, start:stop, 0] = part
        self._stands[start:stop] = lengths

    def _is_of(self, slot: int, length: int) -> bool:
        return self._stands[slot] == length

    def keep(self, slot: int, text: Sequence[int]) -> int:
        """Only these rows are a slot's any more; how many of them a state is left for, and stands at now."""
        length = len(text)
        if self._is_of(slot, length):
            return length
        if length in self._columns[slot]:
            self._advance(slot, [self._column(slot, length)], [length])
            return length
        length, state = self.snapshots.longest(text, length)
        self._stands[slot], self._columns[slot] = _NOWHERE, ()
        for index, held in enumerate(self._held):
            held[:, slot, 0] = 0 if state is None else state[index]
        self._stands[slot] = length
        return length

    def exchange(self, first: int, second: int) -> None:
        """Two slots change places."""
        stands = self._stands[second], self._stands[first]
        pair = [first, second]
        for slot in pair:
            self._stands[slot], self._columns[slot] = _NOWHERE, ()
        for held in self._held:
            held[:, pair, 0] = held[:, pair[::-1], 0]
        self._stands[first], self._stands[second] = stands

    def release(self, slot: int, text: Sequence[int], last: int) -> None:
        """The text of a slot has ended; that of slot `last` takes its place."""
        if text and self._is_of(slot, len(text)):
            self.snapshots.put(text, self.state(slot))
        if slot != last:
            self._columns[slot], self._stands[slot] = (), _NOWHERE
            for held in self._held:
                held[:, slot, 0] = held[:, last, 0]
            self._stands[slot] = self._stands[last]
        self._stands[last], self._columns[last] = _NOWHERE, ()

    def scrub(self, slot: int) -> None:
        """Zero all of a slot: its forward went wrong."""
        for held in self._held:
            held[:, slot] = 0
        self._stands[slot], self._columns[slot] = 0, ()

    def not_finite(self) -> list[int]:
        """Slots whose states hold NaN or infinity."""
        return not_finite([held[:, :, 0].transpose(0, 1) for held in self._held])

    def state(self, slot: int, column: int = 0) -> State:
        """Copies of a slot's state, or of a candidate, part by part (layers, ...)."""
        return tuple(held[:, slot, column].clone() for held in self._held)

    def fill_stale(self, value: float) -> None:
        """Overwrite all candidates: what was not committed must not matter."""
        for held in self._held:
            held[:, :, 1:] = value
        self._columns = [()] * len(self._columns)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken, snapshots included."""
        one = sum(part.num_bytes for part in self.parts)
        return sum(held.nbytes for held in self._held) + len(self.snapshots) * one

    def check_integrity(self, lengths: Sequence[int]) -> None:
        """Raise AssertionError unless the states of open slots stand at these lengths."""
        stands = self._stands[: len(lengths)]
        assert stands == list(lengths), f"states stand at {stands}, rows end at {list(lengths)}"
        assert all(held.shape[1] == len(self._stands) for held in self._held), "memory of other slots"
        self.snapshots.check_integrity()

    def seed(self, part: int, layer_idx: int, slots: slice, column: int) -> Tensor:
        """A view of one layer's states in a column (B, ...)."""
        return self._held[part][layer_idx, slots, column]

    def leave(self, part: int, layer_idx: int, slots: slice, column: int, states_BC: Tensor) -> None:
        """Write one layer's candidates (B, C, ...) to the columns from this one on."""
        missing = column + states_BC.shape[1] - self._held[part].shape[2]
        if missing > 0:
            with torch.inference_mode(False):
                for index, held in enumerate(self._held):
                    behind = (0, 0) * (held.dim() - 3)
                    self._held[index] = pad(held, (*behind, 0, missing))
        held = self._held[part]
        held[layer_idx, slots, column : column + states_BC.shape[1]] = states_BC.to(held.dtype)

    def _allocate(self) -> None:
        if self._held:
            return
        with torch.inference_mode(False):
            shape, device = (len(self._stands), 1), self._policy.device
            self._held = [
                torch.zeros((part.num_layers, *shape, *part.shape), dtype=part.dtype, device=device)
                for part in self.parts
            ]


class SlotStateWindow:
    """What one forward sees of the states of some slots."""

    def __init__(self, states: SlotStates, slots: slice, column: int, rows_BC: Tensor | None) -> None:
        self._states, self._slots, self._column = states, slots, column
        self._part = {part.name: index for index, part in enumerate(states.parts)}
        self.rows_BC = rows_BC

    def seed(self, name: str, layer_idx: int) -> Tensor:
        """The state before the first new row (B, ...), in the shape of that part; not to be changed."""
        return self._states.seed(self._part[name], layer_idx, self._slots, self._column)

    def leave(self, name: str, layer_idx: int, states_BC: Tensor) -> None:
        """The states behind the rows that are asked for (B, C, ...)."""
        self._states.leave(self._part[name], layer_idx, self._slots, self._column + 1, states_BC)
