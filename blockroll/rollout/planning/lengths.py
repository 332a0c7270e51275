"""How many drafts each request of a step may get, and in how many rows they are verified.

Of so many rows the likeliest are the best, whichever requests they belong to. So what is left to choose is
how many there are: the likeliest one, two and so on, up to all.

A forward is padded to the longest request, whose rows are then there for all; or it is packed, and takes the
rows that are asked for and the price of packing, which is that of `least_saved` rows. Both cost the same
where packing begins.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NEXT = 8  # of so many drafts, one more each time: further numbers cost about the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """So many of the likeliest drafts of a step."""

    rows: int  # of a padded forward that takes the time of theirs, those of plain steps included
    expected: float  # accepted
    widest: int  # drafts of the request that has most
    counts: Sequence[int] | None  # of each request; None: as many as the widest, if it has them

    def lengths(self, chances: Sequence[Sequence[float]]) -> list[int]:
        """Drafts of each request."""
        if self.counts is not None:
            return [*self.counts]
        return [min(len(each), self.widest) for each in chances]


def verifiable(chances: Sequence[Sequence[float]], least_saved: float) -> Iterator[Drafts]:
    """From few drafts to all: `chances` of each request's drafts, none likelier than the one before it.

    A forward is packed if that leaves out at least `least_saved` rows.
    """
    size, most = len(chances), max(map(len, chances))
    order = sorted(
        (-chance, depth, index) for index, each in enumerate(chances) for depth, chance in enumerate(each)
    )
    padded = [0.0]  # expected of so many drafts of every request
    for depth in range(most):
        padded.append(padded[-1] + sum(each[depth] for each in chances if depth < len(each)))
    counts, expected, widest, due, last_padded = [0] * size, 0.0, 0, 1, 0
    for number, (negative, _, index) in enumerate(order, start=1):
        counts[index] += 1
        expected -= negative
        widest = max(widest, counts[index])
        if number < due and number < len(order):
            continue
        due = number + 1 + number // _NEXT
        rows, rectangle = size + number, size * (widest + 1)
        if rectangle - rows >= least_saved:
            price = round(least_saved)
            yield Drafts(rows=rows + price, expected=expected, widest=widest, counts=tuple(counts))
        elif widest > last_padded:
            last_padded = widest
            yield Drafts(rows=rectangle, expected=padded[widest], widest=widest, counts=None)


def cheapest_draft(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Plain steps that one draft more of every request takes, where it takes least: the first may take most.

    `costs` are those of so many drafts of every request, from few to many.
    """
    pairs = zip(itertools.pairwise((0, *sizes)), itertools.pairwise((1.0, *costs)), strict=True)
    return min((more - cost) / (wider - size) for (size, wider), (cost, more) in pairs)
