"""Writes the cache rows of texts that join, chunk by chunk: each text's once, and only what no slot holds.

Groups share a prompt, chats a template, and the next turn of a text everything before it. Texts that begin
together can have their first step's draft forward in the same one.

Memory: beside weights and the cache, a chunk takes the states of its rows and a mask of `Bound.cells`
booleans, for each kind of layer and, where query heads share keys, for each of those; torch's attention may
make floats of it. How long a prompt is does not matter.

Shapes: B texts, C columns, K drafted tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from blockroll.kernels.transfer import sent
from blockroll.policies.base import Policy
from blockroll.rollout.engine.cache.contract import ROW_STEP, Cache
from blockroll.rollout.engine.chunks import Bound, Choice, Turns

Text = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What comes next of the texts that join, before anything is done. Numbers are places among the texts."""

    start: int  # slot of the first
    texts: Sequence[Text]
    num_own: Sequence[int]  # rows in the slot of each
    found: dict[int, tuple[int, int]]  # of each different body: a slot that holds its first rows, how many
    leaders: Sequence[int]  # of each place: that of these which has the same body
    choice: Choice | None  # which of these are computed; None: nothing lacks
    whole: Sequence[int]  # texts that lack nothing then
    is_recurrent: bool  # whether the policy's layers carry states

    @property
    def computed(self) -> Sequence[int]:
        """What a forward is of."""
        return () if self.choice is None else self.choice.texts

    @property
    def partial(self) -> Sequence[int]:
        """What a forward is of that is not whole then."""
        return () if self.choice is None or self.choice.is_whole else self.choice.texts

    def lacking(self, place: int) -> int:
        """Rows that no slot holds yet."""
        return len(self.texts[place]) - 1 - self.found[self.leaders[place]][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLayout:
    """How a chunk lies in the slots."""

    chunk: Chunk
    order: Sequence[int]  # places by slot: texts that are whole then, and the others
    sources: Sequence[int]  # by slot: whose rows it has before the forward,
    num_rows: Sequence[int]  # and how many; below 0 where a text begins so many columns later
    counts: Sequence[tuple[int, int]]  # by place: rows that are computed, and that are taken from others
    first: int  # offset of the first slot that the forward writes to
    rows: Sequence[Text]  # what each of these holds then, and with it its anchor if there are masks
    widths: Sequence[int]  # columns of each; those of one forward, which are alike, stand side by side
    num_masks: int | None  # behind anchors; None: neither
    copied: Sequence[int]  # offsets, one behind the other, of slots that are copies behind the forward,
    originals: Sequence[int]  # and of what

    @property
    def num_forward_rows(self) -> int:
        """Of its forwards in all."""
        return sum(self.widths) + len(self.rows) * (self.num_masks or 0)


class Prefill:
    """Chooses and writes chunks for slots of one cache."""

    def __init__(self, policy: Policy, cache: Cache) -> None:
        self._policy, self._cache = policy, cache
        self._turns = Turns()

    def next(self, start: int, texts: Sequence[Text], order: Sequence[int], bound: Bound) -> Chunk:
        """The next chunk of `texts`, in slots start.., the first of which may be open; `order` of service.

        Of a text all rows but that of the last token, the anchor, are written.
        """
        num_open = self._cache.num_open
        num_own = [
            len(self._cache.tokens(slot)) if slot < num_open else 0
            for slot in range(start, start + len(texts))
        ]
        places: dict[Text, int] = {}
        for place in order:
            body = texts[place][:-1]
            if num_own[place] > num_own[places.setdefault(body, place)]:
                places[body] = place
        found = {place: (start + place, num_own[place]) for place in places.values()}
        # Where rotary factors depend on a text's length, so do the rows of its beginning.
        if not self._policy.length_boundaries:
            for body, place in places.items():
                source = self._cache.longest_prefix(body)
                found[place] = max(found[place], source, key=lambda each: each[1])
        lacking = {place: len(texts[place]) - 1 - num_held for place, (_, num_held) in found.items()}
        chosen = [place for place, number in lacking.items() if number]
        choice = None
        if chosen:
            choice = self._turns.choose(
                [found[place][1] for place in chosen], [lacking[place] for place in chosen], bound
            )
            choice = replace(choice, texts=tuple(sorted(chosen[number] for number in choice.texts)))
        written = {place for place, number in lacking.items() if not number}
        if choice is not None and choice.is_whole:
            written |= {*choice.texts}
        leaders = [places[text[:-1]] for text in texts]
        return Chunk(
            start=start,
            texts=texts,
            num_own=num_own,
            found=found,
            leaders=leaders,
            choice=choice,
            whole=[place for place, leader in enumerate(leaders) if leader in written],
            is_recurrent=bool(self._policy.state_shape),
        )

    def write(self, layout: ChunkLayout) -> Tensor | None:
        """Commit the rows of a chunk. If it raises, each slot holds valid rows of its text, or is closed.

        With masks, it returns `Policy.draft_logits` (B, K + 1, V) of all whole texts, in their order: then
        the anchors' rows are there, uncommitted.
        """
        self._cache.share(layout.chunk.start, layout.sources, layout.num_rows)
        logits, row = None, 0
        for width, alike in groupby(layout.widths):
            stop = row + len(list(alike))
            logits = self._forward(layout, row, stop, width)
            row = stop
        if layout.copied:
            self._copy(layout)
        if logits is None or not layout.copied:
            return logits
        return logits[sent([*range(len(layout.rows)), *layout.originals], self._policy.device)]

    def _forward(self, layout: ChunkLayout, row: int, stop: int, width: int) -> Tensor | None:
        """Write and commit these of a chunk's rows, which have the same width."""
        policy, cache, rows = self._policy, self._cache, layout.rows[row:stop]
        slot = layout.chunk.start + layout.first + row
        columns = [[*[0] * (width - len(each)), *each[-width:]] for each in rows]
        ids_BC, logits = sent(columns, policy.device), None
        if layout.num_masks is not None:
            window = cache.window(slot, slot + len(rows), width + layout.num_masks)
            logits = policy.draft_logits(ids_BC, layout.num_masks, window)
        else:
            window = cache.settled_window(slot, slot + len(rows), width)
            if policy.length_boundaries:
                places = layout.order[layout.first + row : layout.first + stop]
                num_tokens = [len(layout.chunk.texts[place]) for place in places]
                policy.prefill(ids_BC, window, num_tokens_B=sent(num_tokens, policy.device))
            else:
                policy.prefill(ids_BC, window)
        num_anchors = int(layout.num_masks is not None)
        cache.commit(slot, [each[max(len(each) - width, 0) : len(each) - num_anchors] for each in rows])
        return logits

    def _copy(self, layout: ChunkLayout) -> None:
        """Fill the slots whose texts were computed for another."""
        start, cache = layout.chunk.start, self._cache
        first, num_slots = start + layout.copied[0], start + len(layout.order)
        sources = [*(start + original for original in layout.originals)]
        sources += range(first + len(sources), num_slots)
        num_pending = 0 if layout.num_masks is None else 1 + layout.num_masks
        num_rows = [len(cache.tokens(source)) for source in sources]
        cache.share(first, sources, num_rows, num_pending=num_pending)


def lay_out(chunk: Chunk, bound: Bound, *, num_masks: int | None = None) -> ChunkLayout:
    """The slots of a chunk; with anchors and `num_masks` where that has no more rows than two forwards."""
    # A state goes with a text to another slot, those of its pending rows do not.
    if num_masks is not None and chunk.whole and not chunk.partial and not chunk.is_recurrent:
        laid = _with_masks(chunk, bound, num_masks)
        if laid is not None:
            return laid
    num_rows = 0 if chunk.choice is None else chunk.choice.num_rows
    rows = {
        place: chunk.texts[place][: chunk.found[place][1] + num_rows if chunk.partial else -1]
        for place in chunk.computed
    }
    held = [place for place in chunk.whole if chunk.leaders[place] not in rows]
    copied = {
        place: chunk.leaders[place]
        for place in chunk.whole
        if place not in rows and chunk.leaders[place] in rows
    }
    return _laid(chunk, bound, rows, held, copied, width=num_rows)


def _with_masks(chunk: Chunk, bound: Bound, num_masks: int) -> ChunkLayout | None:
    """All whole texts in the one forward, unless a long one would widen it for too many others."""
    places: dict[Text, int] = {}
    for place in chunk.whole:
        places.setdefault(chunk.texts[place], place)
    lacking = [chunk.lacking(place) for place in places.values()]
    num_rows = max(lacking) + 1 + num_masks
    num_apart = sum(map(bool, lacking)) * max(lacking) + len(chunk.whole) * (num_masks + 1)
    if len(places) * num_rows > num_apart or not bound.has(
        len(places), num_rows, max(map(len, places)) + num_masks
    ):
        return None
    rows = {place: text for text, place in places.items()}
    copied = {place: places[chunk.texts[place]] for place in chunk.whole if place not in rows}
    return _laid(chunk, bound, rows, [], copied, width=max(lacking) + 1, num_masks=num_masks)


def _laid(
    chunk: Chunk,
    bound: Bound,
    rows: dict[int, Text],
    held: Sequence[int],
    copied: dict[int, int],
    *,
    width: int,
    num_masks: int | None = None,
) -> ChunkLayout:
    """`rows` are computed by place, `held` lack nothing, `copied` take what another's rows are then."""
    found = {place: chunk.found[chunk.leaders[place]] for place in (*rows, *held)}
    longest = max(map(len, rows.values()), default=0)
    is_small = bound.has(len(rows), longest + (num_masks or 0), longest + (num_masks or 0))
    if not (held or chunk.partial) and longest - width < ROW_STEP and is_small:
        # Copies would save no forward worth them.
        found, width = dict.fromkeys(rows, (0, 0)), longest
    widths = _widths(rows, {place: found[place][1] for place in rows}, width, is_tied=chunk.is_recurrent)
    rows = {place: rows[place] for place in widths}
    front = [*held, *rows] if chunk.partial else [*rows, *held, *copied]
    order = [*front, *sorted({*range(len(chunk.texts))} - {*front})]
    for place in order[len(front) :]:  # what it has, or else what others have
        own = (chunk.start + place, chunk.num_own[place])
        found[place] = own if own[1] else chunk.found.get(place, own)
    opened, counts = [], [(0, 0)] * len(order)
    for place in order:
        own = chunk.start + place
        source, num_held = found.get(place, (own, 0))
        num_computed, num_taken = 0, max(num_held - chunk.num_own[place], 0)
        num_before = num_held
        if place in rows:
            num_computed = len(rows[place]) - int(num_masks is not None) - num_held
            num_before = len(rows[place]) - widths[place]
        elif place in copied:
            num_taken = len(chunk.texts[place]) - 1 - chunk.num_own[place]
        # Who takes nothing takes its own slot along: what lies in it is nobody else's to read.
        opened.append((source if num_before > 0 else own, num_before))
        counts[place] = (num_computed, num_taken)
    return ChunkLayout(
        chunk=chunk,
        order=order,
        sources=[source for source, _ in opened],
        num_rows=[number for _, number in opened],
        counts=counts,
        first=len(held) if chunk.partial else 0,
        rows=list(rows.values()),
        widths=list(widths.values()),
        num_masks=num_masks,
        copied=[order.index(place) for place in copied],
        originals=[order.index(original) for original in copied.values()],
    )


def _widths(rows: dict[int, Text], num_held: dict[int, int], width: int, *, is_tied: bool) -> dict[int, int]:
    """Columns of each text in its forward, by place; those that are alike stand side by side.

    Through attention alone all go in one, with as many columns as the text that lacks most: a row that is
    computed again is the same, and where a text is shorter there are columns before its first token, behind a
    length below 0. A recurrent state is `tied`: it stands where the rows that were found end, or before the
    first token.
    """
    if not is_tied:
        return dict.fromkeys(rows, width)
    longest = max((len(row) for place, row in rows.items() if not num_held[place]), default=0)
    widths = {
        place: len(row) - num_held[place] if num_held[place] else longest for place, row in rows.items()
    }
    return dict(sorted(widths.items(), key=lambda each: each[1]))
