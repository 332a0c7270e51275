"""Which texts a chunk of prefill is of, and how many rows of each: integers alone.

A forward of a prefill is a rectangle: as many rows for each of its texts. Between two tokens of a request
that runs there is one chunk at most, so a long prompt is written in several. Beside it others join that lack
few rows; they need not wait for it, nor it for them:

1. All that lack rows are written whole, if that is one chunk.
2. Otherwise those that lack fewest are, as many as one chunk ends.
3. If that passes over the first in the order of service, the next chunk is of this one alone.

So where one chunk has c rows of a text, the first in the order of service begins after 2 * ceil(m / c) chunks
at most, m being the rows that it lacks, and any other after the sum of that over all before it and itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

PREFILL_CHUNK = 2048  # rows of a chunk while requests run,
MAX_PREFILL_ROWS = 16384  # and where none does
LEAST_ROWS = 256  # of a chunk, below which it is made no smaller where memory runs out
MOST_CELLS = 1 << 24  # of a forward's mask: 16 MiB, and 64 MiB once torch has made a float mask of it


@dataclass(frozen=True, slots=True)
class Bound:
    """How large a forward of a prefill may be; one row of one text always fits."""

    rows: int  # of all its texts
    cells: int = MOST_CELLS  # of its mask: rows by keys

    def has(self, num_texts: int, num_rows: int, num_keys: int) -> bool:
        """Whether so many texts fit, with so many rows each, the last of which see so many keys."""
        total = num_texts * num_rows
        return total <= 1 or (total <= self.rows and total * num_keys <= self.cells)

    def at_most(self, num_rows: int) -> "Bound":
        """The same, of no more rows than these."""
        return Bound(min(self.rows, num_rows), self.cells)

    def rows_behind(self, num_held: int) -> int:
        """The most rows of one text that has so many already: r, where r * (num_held + r) cells fit."""
        root = math.isqrt(num_held * num_held + 4 * self.cells)
        return max(min((root - num_held) // 2, self.rows), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one chunk writes."""

    texts: tuple[int, ...]  # by their numbers
    num_rows: int  # of each; where it is all that the texts lack, those that lack fewer have that many
    is_whole: bool  # whether the texts are whole then


class Turns:
    """Chooses chunk after chunk, and remembers whether the first was passed over."""

    def __init__(self) -> None:
        self._is_first_due = False

    def choose(self, held: Sequence[int], lacking: Sequence[int], bound: Bound) -> Choice:
        """Of texts in the order of service, with the rows that each has and the rows, above 0, it lacks."""
        texts = sorted(range(len(lacking)), key=lambda text: lacking[text])
        ends, chosen, most_keys = [h + m for h, m in zip(held, lacking, strict=True)], 0, 0
        while chosen < len(texts):
            most_keys = max(most_keys, ends[texts[chosen]])
            if not bound.has(chosen + 1, lacking[texts[chosen]], most_keys):
                break
            chosen += 1
        is_first_passed = 0 not in texts[:chosen]
        if is_first_passed and (self._is_first_due or not chosen):
            self._is_first_due = False
            num_rows = min(bound.rows_behind(held[0]), lacking[0])
            return Choice(texts=(0,), num_rows=num_rows, is_whole=num_rows == lacking[0])
        self._is_first_due = is_first_passed
        return Choice(texts=tuple(sorted(texts[:chosen])), num_rows=lacking[texts[chosen - 1]], is_whole=True)
