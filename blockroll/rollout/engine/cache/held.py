"""Which tokens the rows of each text were made from, and which text has the beginning of another.

Pure Python over integers. A text's tokens are those of rows that a forward has finished, no others. Whole
blocks of them are found by a chained hash: a look-up costs the blocks of its text, not all texts there are.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

BLOCK = 16  # tokens of one hash
_MOST_CANDIDATES = 64  # texts with equal blocks that are compared further, the latest ones


class HeldText:
    """Tokens of one text's rows, in order. A list to read: `TextIndex` alone changes it."""

    __slots__ = ("keys", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.keys: list[int] = []  # chained hash up to the end of each whole block


Held = TypeVar("Held", bound=HeldText)


class TextIndex(Generic[Held]):
    """Texts by their first blocks."""

    def __init__(self) -> None:
        self._texts: dict[int, dict[Held, None]] = {}  # by chained hash, oldest first

    def extend(self, text: Held, token_ids: Iterable[int]) -> None:
        """These tokens have rows now, behind those that are there."""
        text.tokens.extend(token_ids)
        for key in _keys(text.tokens, text.keys):
            text.keys.append(key)
            self._texts.setdefault(key, {})[text] = None

    def cut(self, text: Held, num_rows: int) -> None:
        """Only the first rows, so many, are of use any more."""
        del text.tokens[num_rows:]  # first: what an interrupt leaves of the index is found by `rebuild`
        for key in text.keys[num_rows // BLOCK :]:
            texts = self._texts[key]
            del texts[text]
            if not texts:
                del self._texts[key]
        del text.keys[num_rows // BLOCK :]

    def rebuild(self, texts: Iterable[Held]) -> None:
        """Make it anew from the tokens: an exception may have left a change of it half done."""
        index: dict[int, dict[Held, None]] = {}
        for text in texts:
            text.keys = _keys(text.tokens, [])
            for key in text.keys:
                index.setdefault(key, {})[text] = None
        self._texts = index

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[Held, int] | None:
        """The text that holds most of a text's first rows, and how many; None: none holds a whole block."""
        keys = _keys(token_ids, [])
        num_blocks = 0
        while num_blocks < len(keys) and keys[num_blocks] in self._texts:
            num_blocks += 1
        while num_blocks:
            candidates = self._texts[keys[num_blocks - 1]]
            latest = islice(candidates, max(len(candidates) - _MOST_CANDIDATES, 0), None)
            found = longest(latest, token_ids, num_blocks * BLOCK)
            if found is not None:
                return found
            num_blocks -= 1  # another text with the same hash
        return None

    def check_integrity(self, texts: Iterable[Held]) -> None:
        """It holds each of these texts under its own blocks, and nothing else."""
        entries = 0
        for text in texts:
            assert len(text.keys) == len(text.tokens) // BLOCK, (
                f"{len(text.keys)} hashes stand for {len(text.tokens)} tokens"
            )
            assert all(text in self._texts.get(key, ()) for key in text.keys), "a block is not in the index"
            entries += len(text.keys)
        assert sum(map(len, self._texts.values())) == entries, "the index names a block that no text has"


def longest(candidates: Iterable[Held], token_ids: Sequence[int], num_rows: int) -> tuple[Held, int] | None:
    """The one with most rows of texts whose first `num_rows` have this hash, up to a block beyond."""
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
    return None if best is None else (best, most)


class SlotTexts:
    """The tokens of every slot, and an index of them."""

    def __init__(self, num_slots: int = 0) -> None:
        self._slots = [HeldText() for _ in range(num_slots)]
        self._index: TextIndex[HeldText] = TextIndex()

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
        self._slots = [*self._slots[:num_slots], *(HeldText() for _ in range(num_slots - len(self._slots)))]

    def extend(self, slot: int, token_ids: Iterable[int]) -> None:
        """These tokens have rows now, behind those that are there."""
        self._index.extend(self._slots[slot], token_ids)

    def cut(self, slot: int, num_rows: int) -> None:
        """Only the first rows, so many, are of use any more."""
        self._index.cut(self._slots[slot], num_rows)

    def repair(self) -> None:
        """Build the index anew from the tokens: an exception may have left a change of it half done."""
        self._index.rebuild(self._slots)

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots."""
        slots = self._slots
        slots[first], slots[second] = slots[second], slots[first]

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds most of a text's first rows, and how many; (0, 0) if none does."""
        found = self._index.longest_prefix(token_ids) or longest(self._slots, token_ids, 0)
        return (0, 0) if found is None else (self._slots.index(found[0]), found[1])

    def check_integrity(self) -> None:
        """The index holds each slot under its own blocks, and nothing else."""
        self._index.check_integrity(self._slots)


def _keys(token_ids: Sequence[int], known: Sequence[int]) -> list[int]:
    """Hashes of the whole blocks behind those known."""
    keys, last = [], known[-1] if known else 0
    for start in range(len(known) * BLOCK, len(token_ids) - BLOCK + 1, BLOCK):
        last = hash((last, *token_ids[start : start + BLOCK]))
        keys.append(last)
    return keys
