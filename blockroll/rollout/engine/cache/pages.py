"""Pages of a fixed number of rows, and of each text the table of those its rows lie in.

Whole pages of a beginning are shared by counting; a part of one is shared as well, and copied by whoever is
about to write behind it while another text still names it. Texts that have ended keep their pages until these
are needed: then the one leaves whose rows nobody has taken over for longest. Slots move by moving tables.

    table   3        7        5          page_size 4, rows 0..9 valid, 10 and 11 free to be written
    rows    0 1 2 3  4 5 6 7  8 9 . .

Shapes: B slots of one window, T pages of a table, H key-value heads, S rows, D head width.
"""

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from blockroll.kernels.block_attention import Packing
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import Ahead, Cache
from blockroll.rollout.engine.cache.finite import not_finite
from blockroll.rollout.engine.cache.held import TextIndex
from blockroll.rollout.engine.cache.page_memory import PageMemory
from blockroll.rollout.engine.cache.page_pool import PagePool
from blockroll.rollout.engine.cache.paged_text import PagedText, TableWrites
from blockroll.rollout.engine.cache.paged_window import PagedWindow

_LEAST_PAGES = 64  # that memory is taken for at first, where it is not bounded


class PagedCache(Cache):
    """Texts in pages; those that have ended are named by numbers below 0."""

    page_size = 0
    has_ahead = True

    def __init__(self, policy: Policy, *, page_size: int, num_slots: int = 0, max_rows: int = 0) -> None:
        """So many slots, all of them open and empty; `max_rows` bounds the rows of all pages, 0 does not."""
        self._policy = policy
        self.page_size = page_size
        self._most_pages = max_rows // page_size  # 0: no bound
        self._room_pages = 0  # up to which memory grows before texts that have ended give theirs
        self._num_slots = num_slots
        self._open = [PagedText() for _ in range(num_slots)]
        self._kept: dict[int, PagedText] = {}  # by source, the one unused for longest first
        self._num_ended = 0
        self._index: TextIndex[PagedText] = TextIndex()
        self._pool = PagePool()
        self.memory = PageMemory(policy, page_size)  # for every page of the pool

    @property
    def num_open(self) -> int:
        """Slots of running texts."""
        return len(self._open)

    @property
    def num_slots(self) -> int:
        """Open ones and others."""
        return max(self._num_slots, len(self._open))

    @property
    def num_pages(self) -> int:
        """Pages that there is memory for and that texts can have."""
        return max(len(self._pool) - 1, 0)

    @property
    def num_pages_used(self) -> int:
        """Pages that some text has."""
        return self.num_pages - self._pool.num_free

    @property
    def num_pages_running(self) -> int:
        """Pages that running texts have, each counted once."""
        return self._pool.num_open

    def _text(self, source: int) -> PagedText:
        return self._open[source] if source >= 0 else self._kept[source]

    def tokens(self, source: int) -> list[int]:
        """The tokens of a slot's valid rows, in order, or of another source's; not to be changed."""
        return self._text(source).tokens

    def lengths(self, start: int, stop: int) -> list[int]:
        """Valid rows of the slots start..stop-1; below 0 for a text that begins so many rows later."""
        return [len(text.tokens) - text.missing for text in self._open[start:stop]]

    def window(
        self, start: int, stop: int, num_rows: int, *, num_pending: int = 0, ahead: Ahead | None = None
    ) -> "PagedWindow":
        """The open slots start..stop-1, for `num_rows` new rows each, behind valid, `ahead`, pending ones."""
        assert stop <= self.num_open, f"slots {start} to {stop - 1} are not all open: {self.num_open} are"
        lengths = [length + num_pending for length in self.lengths(start, stop)]
        return self._window(start, lengths, [num_rows] * len(lengths), ahead=ahead)

    def packed_window(self, start: int, packing: Packing) -> "PagedWindow":
        """The open slots from `start` on, for the rows of `packing` behind the valid ones of each."""
        stop = start + len(packing.num_rows)
        assert stop <= self.num_open, f"slots {start} to {stop - 1} are not all open: {self.num_open} are"
        return self._window(start, self.lengths(start, stop), packing.num_rows, packing)

    def _window(
        self,
        start: int,
        lengths: Sequence[int],
        num_rows: Sequence[int],
        packing: Packing | None = None,
        ahead: Ahead | None = None,
    ) -> PagedWindow:
        texts = self._open[start : start + len(lengths)]
        most_ahead = 0 if ahead is None else ahead.most
        self._take(texts, lengths, [most_ahead + number for number in num_rows])
        return PagedWindow.of(self.memory, self._tables(texts), lengths, num_rows, packing, ahead)

    def _take(self, texts: Sequence[PagedText], lengths: Sequence[int], num_rows: Sequence[int]) -> None:
        """Give texts pages to write so many rows behind so many, or raise before anything has changed."""
        if not len(self.memory):
            # Where memory is bounded a device takes it at once: growing needs the old and the new together.
            num_pages = self._most_pages if self._policy.device.type != "cpu" else 0
            self.memory.allocate(num_pages + 1)
            self._pool = PagePool(num_pages + 1)
        spans = [(max(length, 0), length + count) for length, count in zip(lengths, num_rows, strict=True)]
        writes = TableWrites(texts, spans, self.page_size)
        while (number := writes.count(self._pool.num_texts)) > self._pool.num_free:
            self._make_free(number - self._pool.num_free)
        new = list(self._pool.next_free(number))
        if not new:
            return
        sources, tables = writes.with_pages(new)
        if sources:
            self.memory.copy(sources, new[: len(sources)])
        # Memory is there and written: what is left are integers, which `repair` counts anew.
        for text, table in zip(texts, tables, strict=True):
            text.pages = table
        self._pool.open_new(len(new))
        self._pool.close(sources)

    def _make_free(self, num_pages: int) -> None:
        """Have so many free pages more, or some of them: by more memory, or by what an ended text had."""
        room = max(self._room_pages, 0 if self._kept else self.num_pages + num_pages)
        room = min(room, self._most_pages or room)
        if room > self.num_pages:
            num_pages = min(max(2 * self.num_pages, self.num_pages + num_pages, _LEAST_PAGES), room)
            self.memory.grow(num_pages + 1)
            self._pool.grow(num_pages + 1)
            return
        assert self._kept, (
            f"{num_pages} pages are lacking, all {self.num_pages} are used by {self.num_open} running texts"
        )
        self._drop(next(iter(self._kept)))

    def _drop(self, source: int) -> None:
        """Forget a text that has ended."""
        text = self._kept.pop(source)
        self._index.cut(text, 0)
        self._pool.drop(text.pages)

    def spare(self, num_rows: int) -> int:
        """Pages left once every open slot has so many rows behind its valid ones; below 0, so many lack.

        Where there are plenty, as many at least.
        """
        if not self._most_pages:
            return sys.maxsize
        left = self._most_pages - self._pool.num_open
        most_lacking = 2 * len(self._open) * (num_rows // self.page_size + 2)  # copies and new ones
        if left > 2 * most_lacking:
            return left - most_lacking
        spans = [(len(text.tokens), len(text.tokens) + num_rows) for text in self._open]
        return left - TableWrites(self._open, spans, self.page_size).count(self._pool.num_running)

    def cost(self, token_ids: Sequence[int], num_rows: int, *, is_repeated: bool = False) -> int:
        """Pages for these tokens and so many rows behind them, but for those of a running text that has them.

        `is_repeated` says that a text of the same tokens joins before.
        """
        if not self._most_pages:
            return 0
        num_pages = -(-(len(token_ids) + num_rows) // self.page_size)
        num_whole = len(token_ids) // self.page_size
        if is_repeated:
            return num_pages - num_whole
        source, num_shared = self.longest_prefix(token_ids)
        if num_shared < len(token_ids):  # beside others that lack more, all of it may be computed
            return num_pages
        shared = self._text(source).pages[:num_whole] if num_shared else ()
        return num_pages - sum(self._pool.num_running(page) > 0 for page in shared)

    def commit(self, start: int, token_ids: Sequence[Sequence[int]]) -> None:
        """The rows behind those of slots start.. are these tokens': the forwards that wrote them are done."""
        for slot, tokens in enumerate(token_ids, start=start):
            text = self._open[slot]
            text.missing = 0
            self._index.extend(text, tokens)

    def keep(self, slot: int, num_rows: int) -> None:
        """Only the first rows of an open slot, so many, are its text's."""
        self._index.cut(self._open[slot], num_rows)

    def reserve(self, *, num_slots: int, capacity: int) -> None:
        """Have so many slots, with room for so many rows each; what the first of them hold stays."""
        if self.memory.is_of_another and not self.num_open:
            self.clear()  # what earlier texts left under another precision is no use in this one
        self.close(num_slots)
        self._num_slots = num_slots
        self._room_pages = max(self._room_pages, num_slots * -(-capacity // self.page_size))

    def longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The source that holds most of a text's first rows, and how many; (0, 0) if none does.

        Beginnings shorter than a block of the index are not looked for.
        """
        found = self._index.longest_prefix(token_ids)
        if found is None:
            return 0, 0
        text, num_rows = found
        return text.source or self._open.index(text), num_rows

    def share(
        self, start: int, sources: Sequence[int], num_rows: Sequence[int], *, num_pending: int = 0
    ) -> None:
        """Open slots start.. with the first valid rows of `sources`, so many each; slots behind them close.

        As many as `num_pending` rows that a forward of this step wrote behind them come along. A number of
        rows below 0 is of a text that begins so many rows later.
        """
        before = self._open[start:]
        moved: set[int] = set()  # ids of texts that stay as they are
        opened, used = [], []
        for source, number in zip(sources, num_rows, strict=True):
            origin = self._text(source) if number + num_pending > 0 else PagedText()
            if source >= start and number == len(origin.tokens) and id(origin) not in moved:
                moved.add(id(origin))
                opened.append(origin)
                continue
            text = PagedText()
            text.missing = max(-number, 0)
            text.tokens = origin.tokens[: max(number, 0)]
            text.pages = origin.pages[: -(-max(number + num_pending, 0) // self.page_size)]
            used += [source] if source < 0 and number > 0 else []
            opened.append(text)
        self._open = [*self._open[:start], *opened]  # at once; all else `repair` can tell from it
        for text in opened:
            if id(text) not in moved:
                self._index.extend(text, ())
                self._pool.open(text.pages)
        for source in dict.fromkeys(used):  # what was used last leaves last
            self._kept[source] = self._kept.pop(source)
        for text in before:
            if id(text) not in moved:
                self._end(text)

    def exchange(self, first: int, second: int) -> None:
        """Two open slots change places."""
        opened = [*self._open]
        opened[first], opened[second] = opened[second], opened[first]
        self._open = opened

    def release(self, slot: int) -> None:
        """Close a slot: the last open one takes its place, and its rows may be taken over."""
        text, last = self._open[slot], self._open[-1]
        opened = self._open[:-1]
        if text is not last:
            opened[slot] = last
        self._open = opened
        self._end(text)

    def close(self, num_open: int) -> None:
        """Only so many slots are open any more; what the others hold may be taken over."""
        ended = self._open[num_open:]
        if ended:
            self._open = self._open[:num_open]
            for text in ended:
                self._end(text)

    def _end(self, text: PagedText) -> None:
        """A text that ran has ended: it keeps the pages of its rows, if others do not have them all."""
        num_pages, pages = -(-len(text.tokens) // self.page_size), text.pages
        if any(self._pool.num_texts(page) == 1 for page in pages[:num_pages]):
            self._num_ended += 1
            text.pages, text.source = pages[:num_pages], -self._num_ended
            self._kept[text.source] = text
            self._pool.keep(text.pages)
        else:
            self._index.cut(text, 0)
        self._pool.close(pages)

    def scrub(self, slot: int) -> None:
        """Zero a slot whose forward went wrong: hidden NaN would still reach its next request, as 0 * NaN.

        Texts that have ended and share a page with it are forgotten.
        """
        text = self._open[slot]
        pages = set(text.pages)
        for source in [each for each, kept in self._kept.items() if not pages.isdisjoint(kept.pages)]:
            self._drop(source)
        own = [page for page in text.pages if self._pool.num_texts(page) == 1]
        self.memory.fill(own, 0.0)
        self._index.cut(text, 0)
        pages_before, text.pages = text.pages, []
        self._pool.close(pages_before)

    def scrub_all(self) -> None:
        """Zero what is not finite anywhere, and forget texts with such rows: nobody may have seen it yet."""
        bad = {*not_finite(self.memory.tensors)}
        if not bad:
            return
        for source in (*range(self.num_open), *self._kept):
            text = self._text(source)
            num_pages = -(-len(text.tokens) // self.page_size)
            if bad.isdisjoint(text.pages[:num_pages]) or all(
                bool(rows.isfinite().all()) for rows in self.committed(source)
            ):
                continue
            if source < 0:
                self._drop(source)
            else:
                self._index.cut(text, 0)
        self._fill_stale(bad, 0.0)

    def repair(self) -> None:
        """Put right what an exception amid a change has left: memory and tokens say what holds."""
        for source, text in tuple(self._kept.items()):
            if text in self._open or text.source != source:
                del self._kept[source]
        for text in self._open:
            text.source = 0
        self._index.rebuild((*self._open, *self._kept.values()))
        self._pool = PagePool.counted(
            len(self.memory), self._tables(self._open), self._tables(self._kept.values())
        )

    @staticmethod
    def _tables(texts: Iterable[PagedText]) -> list[list[int]]:
        return [text.pages for text in texts]

    def invalidate(self) -> None:
        """No slot is open and no row valid any more: the weights have changed. No interrupt halves it."""
        index: TextIndex[PagedText] = TextIndex()
        pool = PagePool(len(self._pool))
        self._open, self._kept, self._index, self._pool = [], {}, index, pool

    def forget(self) -> None:
        """No row of a text that has ended may be taken over any more."""
        for source in tuple(self._kept):
            self._drop(source)

    def clear(self) -> None:
        """Give the memory back and forget everything; a window after the next `reserve` allocates anew."""
        index: TextIndex[PagedText] = TextIndex()
        pool, memory = PagePool(), PageMemory(self._policy, self.page_size)
        # No calls from here on: an interrupt finds all of it as it was, or all of it gone.
        self._open, self._kept, self._index, self._pool, self.memory = [], {}, index, pool, memory
        self._num_slots = self._room_pages = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it has taken."""
        return self.memory.num_bytes

    def committed(self, source: int) -> tuple[Tensor, ...]:
        """Keys and then values of a source's valid rows (H, S, D), layer by layer."""
        text = self._text(source)
        return self.memory.rows(text.pages, len(text.tokens))

    def fill_stale(self, value: float) -> None:
        """Overwrite every row of a page that is not valid: what attention may not see must not matter."""
        self._fill_stale(range(1, len(self._pool)), value)

    def _fill_stale(self, pages: Iterable[int], value: float) -> None:
        """The same, of these pages."""
        stale_PS = torch.zeros((len(self._pool), self.page_size), dtype=torch.bool)
        stale_PS[[*pages]] = True
        for text in (*self._open, *self._kept.values()):
            for number, page in enumerate(text.pages):
                stale_PS[page, : max(len(text.tokens) - number * self.page_size, 0)] = False
        self.memory.fill_rows(stale_PS, value)

    def check_integrity(self) -> None:
        """Raise AssertionError where counts, indices or memory contradict the contract."""
        assert self.num_open <= self.num_slots, f"{self.num_open} of {self.num_slots} slots are open"
        pages = len(self.memory), len(self._pool)
        assert pages[0] == pages[1], f"{pages[0]} pages of memory, {pages[1]} counted"
        for tensor in self.memory.tensors:
            assert not tensor[0].any(), "page 0 was written, and is nobody's"
        texts = (*self._open, *self._kept.values())
        assert len(set(map(id, texts))) == len(texts), "a text runs twice, or runs and has ended"
        for text in texts:
            assert len(text.tokens) <= len(text.pages) * self.page_size, (
                f"{len(text.tokens)} tokens lie in {len(text.pages)} pages of {self.page_size}"
            )
        assert all(text.source == 0 for text in self._open), "a running text is named as one that has ended"
        assert all(text.source == source < 0 for source, text in self._kept.items())
        assert not self._most_pages or self.num_pages <= self._most_pages, (
            f"{self.num_pages} pages of memory, of {self._most_pages} at most"
        )
        self._pool.check_integrity(self._tables(self._open), self._tables(self._kept.values()))
        self._index.check_integrity(texts)
