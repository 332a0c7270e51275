"""Which tokens the rows of each slot were made from, and which slot holds the beginning of a text.

Pure Python over integers. A slot's tokens are those of rows that a forward has finished, no others. Whole
blocks of them are found by a chained hash: a look-up costs the blocks of its text, not all texts there are.
"""

from collections.abc import Iterable, Sequence

BLOCK = 16  # tokens of one hash


class Slot:
    """Tokens of one slot's rows, in order. A list to read: `SlotTexts` alone changes it."""

    __slots__ = ("keys", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keys: list[int] = []  # chained hash up to the end of each whole block


class SlotTexts:
    """The tokens of every slot, and an index of them by their first blocks."""

    def __init__(self, num_slots: int = 0) -> None:
        self._slots = [Slot() for _ in range(num_slots)]
        self._index: dict[
            int, dict[Slot, None]
        ] = {}  # by chained hash: slots with those blocks, oldest first

    def __len__(self) -> int:
        return len(self._slots)

    def tokens(self, slot: int) -> list[int]:
        """Of a slot's rows; not to be changed."""
        return self._slots[slot].tokens

    def lengths(self, start: int, stop: int) -> list[int]:
        """How many rows the slots start..stop-1 have."""
        return [len(slot.tokens) for slot in self._slots[start:stop]]

    def resize(self, num_slots: int) -> None:
        """Have so many slots; what is cut off is forgotten."""
        for slot in range(num_slots, len(self._slots)):
            self.cut(slot, 0)
        self._slots = [*self._slots[:num_slots], *(Slot() for _ in range(num_slots - len(self._slots)))]

    def extend(self, slot: int, token_ids: Iterable[int]) -> None:
        """These tokens have rows now, behind those that are there."""
        held = self._slots[slot]
        held.tokens.extend(token_ids)
        for key in _keys(held.tokens, held.keys):
            held.keys.append(key)
            self._index.setdefault(key, {})[held] = None

    def cut(self, slot: int, num_rows: int) -> None:
        """Only the first rows, so many, are of use any more."""
        held = self._slots[slot]
        del held.tokens[num_rows:]  # first: what an interrupt leaves of the index is found by `repair`
        for key in held.keys[num_rows // BLOCK :]:
            slots = self._index[key]
            del slots[held]
            if not slots:
                del self._index[key]
        del held.keys[num_rows // BLOCK :]

    def repair(self) -> None:
        """Build the index anew from the tokens: an exception may have left a change of it half done."""
        index: dict[int, dict[Slot, None]] = {}
        for held in self._slots:
            held.keys = _keys(held.tokens, [])
            for key in held.keys:
                index.setdefault(key, {})[held] = None
        self._index = index

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots."""
        slots = self._slots
        slots[first], slots[second] = slots[second], slots[first]

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of a text's first rows, and how many; (0, 0) if none does."""
        keys = _keys(token_ids, [])
        num_blocks = 0
        while num_blocks < len(keys) and keys[num_blocks] in self._index:
            num_blocks += 1
        while num_blocks:
            found = self._longest(self._index[keys[num_blocks - 1]], token_ids, num_blocks * BLOCK)
            if found is not None:
                return found
            num_blocks -= 1  # another text with the same hash
        return self._longest(self._slots, token_ids, 0) or (0, 0)

    def _longest(
        self, candidates: Iterable[Slot], token_ids: Sequence[int], num_rows: int
    ) -> tuple[int, int] | None:
        """The same among slots whose first `num_rows` tokens have the text's hash, up to a block beyond."""
        best, most = None, num_rows - 1
        rest = tuple(token_ids[num_rows : num_rows + BLOCK])
        for held in candidates:
            length = num_rows
            for mine, wanted in zip(held.tokens[num_rows : num_rows + BLOCK], rest, strict=False):
                if mine != wanted:
                    break
                length += 1
            if length > most and held.tokens[:num_rows] == list(token_ids[:num_rows]):
                best, most = held, length
                if length == len(token_ids):
                    break
        return None if best is None else (self._slots.index(best), most)

    def check_integrity(self) -> None:
        """The index holds each slot under its own blocks, and nothing else."""
        entries = 0
        for held in self._slots:
            assert len(held.keys) == len(held.tokens) // BLOCK, (
                f"{len(held.keys)} hashes stand for {len(held.tokens)} tokens"
            )
            assert all(held in self._index[key] for key in held.keys), (
                "a slot's block is missing in the index"
            )
            entries += len(held.keys)
        assert sum(map(len, self._index.values())) == entries, "the index names a block that no slot has"


def _keys(token_ids: Sequence[int], known: Sequence[int]) -> list[int]:
    """Hashes of the whole blocks behind those known."""
    keys, last = [], known[-1] if known else 0
    for start in range(len(known) * BLOCK, len(token_ids) - BLOCK + 1, BLOCK):
        last = hash((last, *token_ids[start : start + BLOCK]))
        keys.append(last)
    return keys
