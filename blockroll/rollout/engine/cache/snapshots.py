"""States of texts at single lengths, found by the tokens before them.

Keys and values of a text serve every text that begins alike, up to any length; a recurrent state stands at
one length only. So states are kept where other texts are likely to go on: every so many rows of a prompt, at
its end, and where a text ended. It knows no slot and no page: whoever has the keys and values of some tokens
asks whether a state of them is there.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from torch import Tensor

State = tuple[Tensor, ...]  # of one text, part by part (layers, ...)
Key = tuple[int, bytes]  # of so many tokens


class Snapshots:
    """At most so many states by the tokens behind which they stand; the longest unused leave first."""

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self._states: dict[Key, State] = {}  # in the order of their last use
        self._lengths: Counter[int] = Counter()  # at which some state stands

    def __len__(self) -> int:
        return len(self._states)

    def put(self, token_ids: Sequence[int], state: State) -> None:
        """The state behind these tokens, in the place of an earlier one of theirs."""
        ((_, key),) = _keys(token_ids, [len(token_ids)])
        self._drop(key)
        while self._states and len(self._states) >= self.most:
            self._drop(next(iter(self._states)))
        self._lengths[key[0]] += 1
        self._states[key] = state

    def longest(self, token_ids: Sequence[int], most: int) -> tuple[int, State | None]:
        """The most of a text's first tokens, up to `most`, behind which a state stands, and it; 0: none."""
        found: tuple[int, Key | None] = (0, None)
        for length, key in _keys(token_ids, sorted(each for each in self._lengths if each <= most)):
            if key in self._states:
                found = (length, key)
        length, key_found = found
        if key_found is None:
            return 0, None
        state = self._states[key_found] = self._states.pop(key_found)
        return length, state

    def drop_not_finite(self) -> None:
        """Forget those that hold NaN or infinity."""
        for key, state in tuple(self._states.items()):
            if not all(bool(part.isfinite().all()) for part in state):
                self._drop(key)

    def clear(self) -> None:
        """Forget all."""
        self._states, self._lengths = {}, Counter()

    def check_integrity(self) -> None:
        """The lengths are those of the states, and no more are held than may be."""
        assert Counter(length for length, _ in self._states) == self._lengths, "lengths without states"
        assert len(self) <= max(self.most, 1), f"{len(self)} states, of {self.most} at most"

    def _drop(self, key: Key) -> None:
        if self._states.pop(key, None) is not None:
            self._lengths -= Counter({key[0]: 1})


def _keys(token_ids: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, Key]]:
    """Of a text's first tokens, so many each, in rising order: one pass, and 16 bytes tell texts apart."""
    digest, start = blake2b(digest_size=16), 0
    for length in lengths:
        digest.update(array("q", token_ids[start:length]).tobytes())
        start = length
        yield length, (length, digest.digest())
