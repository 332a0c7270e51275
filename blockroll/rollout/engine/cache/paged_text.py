"""A text with the pages of its rows, and what becomes of the tables of several that are about to write."""

from collections.abc import Callable, Sequence

from blockroll.rollout.engine.cache.held import HeldText


class PagedText(HeldText):
    """The tokens of a text, and the pages of their rows in order."""

    __slots__ = ("missing", "pages", "source")

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[int] = []
        self.missing = 0  # rows by which it begins later than its slot's first column
        self.source = 0  # its name once it has ended, below 0


class TableWrites:
    """Texts that are about to write rows first..stop-1 each, in pages that no other text may name then.

    Pages that others name are copied before; of texts that all write here the last keeps its page. Tables
    change only by what the caller does with `with_pages`.
    """

    def __init__(self, texts: Sequence[PagedText], spans: Sequence[tuple[int, int]], page_size: int) -> None:
        self._texts, self._page_size = texts, page_size
        self._spans = [(first // page_size, -(-stop // page_size)) for first, stop in spans]
        self._copied: list[list[int]] = []  # by text, where in its table the pages stand that it copies

    def count(self, num_texts: Callable[[int], int]) -> int:
        """Pages that they need, copies and new ones, where so many texts name a page."""
        self._copied = self._find_copied(num_texts)
        number = sum(map(len, self._copied))
        for text, (_, stop) in zip(self._texts, self._spans, strict=True):
            number += max(stop - len(text.pages), 0)
        return number

    def with_pages(self, pages: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """The tables with as many pages as `count` has said, and what the first of these are copies of."""
        sources = [
            text.pages[place]
            for text, places in zip(self._texts, self._copied, strict=True)
            for place in places
        ]
        copies, others = iter(pages[: len(sources)]), iter(pages[len(sources) :])
        tables = []
        for text, places, (_, stop) in zip(self._texts, self._copied, self._spans, strict=True):
            table = [*text.pages]
            for place in places:
                table[place] = next(copies)
            table += [next(others) for _ in range(len(table), stop)]
            tables.append(table)
        return sources, tables

    def _find_copied(self, num_texts: Callable[[int], int]) -> list[list[int]]:
        left: dict[int, int] = {}
        copied: list[list[int]] = []
        for text, (first, stop) in zip(self._texts, self._spans, strict=True):
            copied.append([])
            for place in range(first, min(stop, len(text.pages))):
                page = text.pages[place]
                number = left.get(page, num_texts(page))
                if number > 1:
                    left[page] = number - 1
                    copied[-1].append(place)
        return copied
