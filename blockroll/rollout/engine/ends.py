"""When a request ends: at a token, at a string, or at a length.

A stop string is looked for in the text of all tokens, special ones too, token by token: the same text stops
at the same token, however its tokens came. Only a window of the last tokens is decoded for it. The window
begins where cutting off what stands before has left the text behind its first characters as it was, so that
leading spaces, merged pieces and characters of several tokens are read as in the whole text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockroll.errors import RequestFailed
from blockroll.types import FinishReason, Guide

Decode = Callable[[list[int]], str]

_MARGIN = 8  # characters at a window's beginning that the tokens before it could have changed
_SLACK = 8  # characters at its end that the tokens behind it may still change
_INCOMPLETE = (
    "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of a character whose tokens are not all there
)
_MOST_TRIES = 4  # tokens of one character


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """When one request ends. It remembers where in its text it stands, so each request has its own.

    Under a constraint, a stop string or a stop token that is text ends it only where the constraint accepts
    the completion as it then stands; elsewhere it is text like other. So what ends by `stop` matches.
    No stop string or stop token ends it with one of its first `min_tokens` tokens: there it is text.
    """

    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]
    max_tokens: int
    decode: Decode | None  # of a list of tokens, special ones included
    # Of the stop tokens, those that a constraint allows only where a text may end.
    end_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    _strings: "_StopStrings | None" = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.stop and self.decode is not None:
            object.__setattr__(self, "_strings", _StopStrings(self.stop, self.decode))

    def cut(
        self, committed: list[int], new: list[int], guide: Guide | None = None
    ) -> tuple[int, FinishReason | None]:
        """How many of the new tokens are kept, and why the request ends with them, if it does.

        `committed` is what was kept so far, longer from call to call. Raises RequestFailed where the text
        cannot be decoded, or the guide raises.
        """
        room = self.max_tokens - len(committed)
        for kept, token_id in enumerate(new[:room], start=1):
            if len(committed) + kept <= self.min_tokens:
                continue
            is_stop = token_id in self.stop_token_ids or (
                self._strings is not None and self._strings.is_one_completed(committed, new[:kept])
            )
            if is_stop and self._may_end(new[:kept], guide):
                return kept, "stop"
        return (room, "length") if len(new) >= room else (len(new), None)

    def _may_end(self, new: list[int], guide: Guide | None) -> bool:
        """Whether the constraint, which stands before the new tokens, accepts the completion with them."""
        if guide is None or not self.end_token_ids or new[-1] in self.end_token_ids:
            return True
        try:
            (allowed_V,) = guide.allowed(new, len(new))
            return bool(allowed_V[list(self.end_token_ids)].any())
        except Exception as error:
            raise RequestFailed(f"its constraint raised {error!r}") from error


class _StopStrings:
    """Looks for strings in a growing text, at a cost that does not grow with it."""

    def __init__(self, stop: tuple[str, ...], decode: Decode) -> None:
        self._stop, self._decode_ids = stop, decode
        self._needed = _MARGIN + max(map(len, stop)) + _SLACK  # characters of a shortened window
        self._start = 0  # of the window, in the text; moves along committed tokens only
        self._limit = 2 * self._needed  # tokens in a window that is due to be shortened
        self._latest: tuple[list[int], str] = ([], "")  # tokens, and their text

    def is_one_completed(self, committed: Sequence[int], new: Sequence[int]) -> bool:
        """Whether the last of the new tokens completes one."""
        if len(committed) - self._start >= self._limit:
            self._shorten(committed)
        window = [*committed[self._start :], *new]
        before, text = self._decode(window[:-1]), self._decode(window)
        first = _MARGIN if self._start else 0
        return any(text.rfind(stop, first) > before.rfind(stop, first) for stop in self._stop)

    def _shorten(self, committed: Sequence[int]) -> None:
        """Begin the window later, where that changes nothing behind its margin; else try again later."""
        text = self._decode(list(committed[self._start :]))
        num_kept = self._needed
        self._limit *= 2
        # In the middle of a character nothing can be compared, but what never ends must be cut at last.
        if text.endswith(_INCOMPLETE) and self._limit < 16 * self._needed:
            return
        while num_kept + _MOST_TRIES < len(committed) - self._start:
            for start in range(len(committed) - num_kept, len(committed) - num_kept - _MOST_TRIES, -1):
                tail = self._decode(list(committed[start:]))
                if len(tail) >= self._needed and text.endswith(tail[_MARGIN:]):
                    self._start, self._limit = start, len(committed) - start + self._needed
                    return
            num_kept *= 2

    def _decode(self, token_ids: list[int]) -> str:
        """The text of these tokens; those asked for last are not decoded again."""
        if token_ids != self._latest[0]:
            try:
                text = self._decode_ids(list(token_ids))
            except Exception as error:
                message = f"its text cannot be decoded to look for stop strings: {error!r}"
                raise RequestFailed(message) from error
            self._latest = (token_ids, text)
        return self._latest[1]
