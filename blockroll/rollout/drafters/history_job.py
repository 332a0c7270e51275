"""All texts of a job that have ended, one behind the other: the last place of each n-gram of a few orders."""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from blockroll.rollout.drafters.history_text import ORDER, Match, Source, Text, Tokens

JOB_ORDERS = (8, 5, 3, 2)
_END = -1  # stands behind each text of the job


@dataclass(slots=True)
class _Generation:
    """Texts one behind the other, and the last place of each n-gram."""

    tokens: Tokens = field(default_factory=lambda: array("i"))
    places: dict[int, int] = field(default_factory=dict)


class JobTexts:
    """All texts of a job: the last place of an n-gram, four orders, at most some 500 bytes a token.

    Two generations of half the bound each; the older one is dropped when the newer is full. Texts get their
    n-grams by `learn`, before something is looked up; of those that wait, the latest within the bound are
    kept.
    """

    def __init__(self, max_tokens: int) -> None:
        self._most = max(1, max_tokens // 2)
        self._newer, self._older = _Generation(), _Generation()
        self._waiting: dict[int, tuple[tuple[int, ...], Tokens]] = {}  # in the order of their ends
        self._num_added = 0
        self._num_waiting = 0  # tokens of those

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return len(self._newer.tokens) + len(self._older.tokens) + self._num_waiting

    def add(self, tail: tuple[int, ...], token_ids: Iterable[int], text: Text | None = None) -> None:
        """A text that has ended, behind the last tokens of its prompt; `text` is added once."""
        tokens = array("i", token_ids)
        num_tokens, is_new = len(tokens) + 1, text is None or not text.is_in_job  # with what stands behind it
        # No calls up to the next loop.
        if is_new:
            self._waiting[self._num_added] = tail, tokens
            self._num_added += 1
            self._num_waiting += num_tokens
            if text is not None:
                text.is_in_job = True
        while self.num_tokens > 2 * self._most and self._num_waiting:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if self._older.tokens:
            self._older = _Generation()
        elif self._newer.tokens:
            self._newer = _Generation()
        else:
            self._next_waiting()

    def _next_waiting(self) -> tuple[tuple[int, ...], Tokens]:
        """The text that waits for longest, which no longer does."""
        number, (tail, tokens) = next(iter(self._waiting.items()))
        num_tokens = len(tokens) + 1
        # No calls from here on.
        del self._waiting[number]
        self._num_waiting -= num_tokens
        return tail, tokens

    def learn(self, most: float = math.inf) -> None:
        """Make n-grams of texts that wait, the oldest first, until so many tokens have some."""
        while self._waiting and most > 0:
            tail, tokens = self._next_waiting()
            most -= len(tokens)
            self._learn(tail, tokens)

    def _learn(self, tail: tuple[int, ...], tokens: Tokens) -> None:
        for token_id in (*tokens, _END):
            if len(self._newer.tokens) >= self._most:
                self._newer, self._older = _Generation(), self._newer
            newer = self._newer
            if token_id != _END:
                for order in JOB_ORDERS:
                    if order <= len(tail):
                        newer.places[hash(tail[-order:])] = len(newer.tokens)
                tail = (*tail[1 - ORDER :], token_id)
            newer.tokens.append(token_id)

    def match(self, tail: tuple[int, ...]) -> Match | None:
        """The last place behind the longest suffix of these tokens, in texts that are learned."""
        for order in JOB_ORDERS:
            if order > len(tail):
                continue
            key = hash(tail[-order:])
            for generation in (self._newer, self._older):
                offset = generation.places.get(key)
                if offset is not None:
                    return Match(source=Source.JOB, order=order, places=[(generation.tokens, offset)])
        return None
