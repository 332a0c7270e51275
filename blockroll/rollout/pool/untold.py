"""Texts that wait for a replica in another process: they travel with the next message to it."""

from collections import deque
from collections.abc import Iterable

from blockroll.types import FinishedText


class UntoldTexts:
    """Invariant: at most `max_tokens` wait, those of the latest texts.

    An interrupt may leave more counted than wait, until all are taken.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._texts: deque[FinishedText] = deque()
        self._num_tokens = 0

    def add(self, texts: Iterable[FinishedText]) -> None:
        """More of them; the oldest make room."""
        for text in texts:
            self._num_tokens += _num_tokens(text)
            self._texts.append(text)
        while self._texts and self._num_tokens > self._max_tokens:
            self._num_tokens -= _num_tokens(self._texts.popleft())

    def take(self) -> tuple[FinishedText, ...]:
        """All that wait; from now on none do."""
        taken = tuple(self._texts)
        self._texts.clear()
        self._num_tokens = 0
        return taken


def _num_tokens(text: FinishedText) -> int:
    return len(text.prompt_ids) + len(text.token_ids)
