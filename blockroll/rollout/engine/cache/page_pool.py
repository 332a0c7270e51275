"""Which pages are free, and how many texts name each of the others. Integers alone: no memory, no tokens.

Page 0 is nobody's: it is never taken, and stands in tables where a text has no page.
"""

from collections import Counter
from collections.abc import Iterable, Sequence


class PagePool:
    """Counts apart what running texts and texts that have ended name; a page that none names is free."""

    def __init__(self, num_pages: int = 0) -> None:
        """So many pages, page 0 among them; all others are free."""
        self._free = list(range(num_pages - 1, 0, -1))
        self._open = [0] * num_pages
        self._kept = [0] * num_pages
        self.num_open = 0  # pages that running texts name

    def __len__(self) -> int:
        """Pages, page 0 among them."""
        return len(self._open)

    @property
    def num_free(self) -> int:
        """Pages that no text names."""
        return len(self._free)

    def num_texts(self, page: int) -> int:
        """Texts that name it; if there is more than one, none may write there."""
        return self._open[page] + self._kept[page]

    def num_running(self, page: int) -> int:
        """Running texts that name it."""
        return self._open[page]

    def next_free(self, num_pages: int) -> Sequence[int]:
        """So many free pages, which stay free until they are opened."""
        assert num_pages <= len(self._free), f"{num_pages} pages are asked for, {len(self._free)} are free"
        return self._free[len(self._free) - num_pages :]

    def grow(self, num_pages: int) -> None:
        """Have so many pages; the new ones are free."""
        self._free = [*range(num_pages - 1, len(self) - 1, -1), *self._free]
        more = [0] * (num_pages - len(self))
        self._kept += more
        self._open += more

    def open_new(self, num_pages: int) -> None:
        """A running text names each of `next_free`, so many."""
        first = len(self._free) - num_pages
        for page in self._free[first:]:
            self._open[page] = 1
        del self._free[first:]
        self.num_open += num_pages

    def open(self, pages: Iterable[int]) -> None:
        """One more running text names pages that others name already."""
        for page in pages:
            self.num_open += not self._open[page]
            self._open[page] += 1

    def close(self, pages: Iterable[int]) -> None:
        """A running text names them no more."""
        for page in pages:
            self._open[page] -= 1
            if not self._open[page]:
                self.num_open -= 1
                if not self._kept[page]:
                    self._free.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """A text that has ended names them, each of which others name already."""
        for page in pages:
            self._kept[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """A text that had ended names them no more."""
        for page in pages:
            self._kept[page] -= 1
            if not (self._kept[page] or self._open[page]):
                self._free.append(page)

    @classmethod
    def counted(
        cls, num_pages: int, open_tables: Iterable[Sequence[int]], kept_tables: Iterable[Sequence[int]]
    ) -> "PagePool":
        """As the tables of running texts, and of texts that have ended, say."""
        pool = cls(num_pages)
        for counts, tables in ((pool._open, open_tables), (pool._kept, kept_tables)):
            for table in tables:
                for page in table:
                    counts[page] += 1
        pool._free = [page for page in pool._free if not (pool._open[page] or pool._kept[page])]
        pool.num_open = sum(map(bool, pool._open))
        return pool

    def check_integrity(
        self, open_tables: Iterable[Sequence[int]], kept_tables: Iterable[Sequence[int]]
    ) -> None:
        """Every page is free once, or named exactly as often as it is counted; page 0 is neither."""
        named: list[Counter[int]] = []
        for tables in (open_tables, kept_tables):
            named.append(Counter())
            for table in tables:
                assert len(set(table)) == len(table), f"a text names a page twice: {table}"
                named[-1].update(table)
        free = Counter(self._free)
        assert not free or max(free.values()) == 1, f"pages are free twice: {free - Counter(set(free))}"
        assert not any(each[0] for each in (*named, free)), "page 0 is nobody's"
        for page in range(1, len(self)):
            counts, names = (self._open[page], self._kept[page]), (named[0][page], named[1][page])
            assert counts == names, f"page {page} is counted {counts}, and named {names}"
            assert bool(free[page]) != any(counts), (
                f"page {page} is named {sum(counts)} times and {'' if free[page] else 'not '}free"
            )
        assert self.num_open == len(named[0]), f"{self.num_open} pages are open, named are {len(named[0])}"
