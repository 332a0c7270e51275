"""What was written before, kept so that what followed a text's last tokens is found at once.

Of each prompt, its texts: the prompt itself, those that run, and the latest that have ended. Over the whole
job, the last place of each n-gram of a few orders. Both are bounded, and a token costs a fixed number of
operations, however often it is repeated.
"""

import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING

from blockroll.errors import InvalidInput

if TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array  # it takes no parameter before Python 3.12

ORDER = 8  # the longest suffix that is looked up: longer ones find nothing better
JOB_ORDERS = (8, 5, 3, 2)
TEXTS_PER_PROMPT = 32  # that have ended
PLACES_PER_NGRAM = 16  # in as many texts, the latest ones
IDLE_PROMPTS = 8  # whose n-grams are kept while no text of theirs runs: siblings may come one by one
_PROMPT = 0  # number of the text that a prompt itself is
_END = -1  # stands behind each text of the job
_ELSEWHERE = "\0"  # no group of an engine: what others have written is nobody's sibling


class Source(IntEnum):
    """Where a place was found."""

    OWN = 0  # the text itself, with its prompt
    SIBLINGS = 1  # texts of its group, running ones as far as they are committed
    EARLIER = 2  # other texts of its prompt
    JOB = 3  # any text that has ended


@dataclass(slots=True)
class Text:
    """A completion as far as it is known, and how much of it has n-grams."""

    tokens: Tokens
    group: str | None
    num_learned: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Places behind the longest suffix that a source has, the latest first: a text and an offset in it."""

    source: Source
    order: int
    places: list[tuple[Tokens, int]]
    own: Tokens | None = None  # of these, the text that is drafted for: it goes on with its drafts


class PromptTexts:
    """The texts of one prompt. Takes 4 bytes a token, and about 1 KB more while its n-grams are kept.

    N-grams are made when a text is looked up, for all that came since: a text costs nothing until then.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.num_running = 0
        self.num_tokens = len(prompt_ids)
        self._prompt = array("i", prompt_ids)
        self._texts: dict[int, Text] = {}  # by number, in the order of their beginnings
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._ngrams: dict[int, tuple[int, ...]] | None = None
        self._unlearned: dict[int, None] = {}  # texts with tokens that have no n-grams yet
        self._next = _PROMPT + 1

    @property
    def prompt(self) -> Tokens:
        """Its tokens."""
        return self._prompt

    @property
    def ended(self) -> Iterator[Tokens]:
        """The texts that have ended, the oldest first."""
        return (self._texts[number].tokens for number in self._ended)

    def open(self, group: str | None) -> int:
        """The number of a text that begins."""
        number, self._next = self._next, self._next + 1
        self._texts[number] = Text(array("i"), group)
        self.num_running += 1
        return number

    def text(self, number: int) -> Text:
        """A text by its number."""
        return self._texts[number]

    def tail(self, number: int) -> tuple[int, ...]:
        """The last tokens of prompt and text, as many as are looked up at most."""
        return self._tail_before(number, len(self._texts[number].tokens))

    def extend(self, number: int, token_ids: Iterable[int]) -> None:
        """More tokens of a text."""
        tokens = self._texts[number].tokens
        num_before = len(tokens)
        tokens.extend(token_ids)
        self.num_tokens += len(tokens) - num_before
        self._unlearned[number] = None

    def close(self, number: int) -> None:
        """A text has ended. Twice as many as are kept may pile up before the oldest are dropped."""
        self.num_running -= 1
        if not self._texts[number].tokens:
            del self._texts[number]
            self._unlearned.pop(number, None)
            return
        self._ended[number] = None
        if len(self._ended) >= 2 * TEXTS_PER_PROMPT:
            while len(self._ended) > TEXTS_PER_PROMPT:
                oldest, _ = self._ended.popitem(last=False)
                self.num_tokens -= len(self._texts.pop(oldest).tokens)
                self._unlearned.pop(oldest, None)
            self.forget_ngrams()

    @property
    def num_unlearned(self) -> int:
        """Tokens whose n-grams the next look will make."""
        if self._ngrams is None:
            return self.num_tokens
        texts = map(self._texts.__getitem__, self._unlearned)
        return sum(len(text.tokens) - text.num_learned for text in texts)

    @property
    def has_ngrams(self) -> bool:
        """Whether it takes memory for them."""
        return self._ngrams is not None

    def forget_ngrams(self) -> None:
        """Keep the tokens alone; n-grams are made anew when they are asked for."""
        self._ngrams = None

    def matches(self, number: int) -> Iterator[Match]:
        """By source, the places behind the longest suffix of a text."""
        ngrams = self._learned_ngrams()
        text, tail, found = self._texts[number], self.tail(number), 0
        for order in range(len(tail), 0, -1):
            held = ngrams.get(hash(tail[-order:]))
            if held is None:
                continue
            by_source: dict[Source, list[tuple[Tokens, int]]] = {}
            for place in held:
                source = self._source(place >> 32, number, text.group)
                if not found >> source & 1:
                    by_source.setdefault(source, []).append((self._tokens(place >> 32), place & 0xFFFFFFFF))
            for source, places in by_source.items():
                found |= 1 << source
                own = text.tokens if source is Source.OWN else None
                yield Match(source=source, order=order, places=places, own=own)
            if found == 0b111:
                return

    def _source(self, other: int, number: int, group: str | None) -> Source:
        if other in (_PROMPT, number):
            return Source.OWN
        return Source.SIBLINGS if self._texts[other].group == group else Source.EARLIER

    def _tokens(self, number: int) -> Tokens:
        return self._prompt if number == _PROMPT else self._texts[number].tokens

    def _tail_before(self, number: int, offset: int) -> tuple[int, ...]:
        """The tokens that stand before one of a text."""
        tokens = self._texts[number].tokens
        missing = ORDER - offset
        if missing <= 0:
            return tuple(tokens[offset - ORDER : offset])
        return (*self._prompt[-missing:], *tokens[:offset])

    def _learned_ngrams(self) -> dict[int, tuple[int, ...]]:
        """Those of all texts as they are now."""
        ngrams = self._ngrams
        if ngrams is None:
            ngrams = {}
            self._learn_all(ngrams, _PROMPT, (), self._prompt, 0)
            for text in self._texts.values():
                text.num_learned = 0
            self._unlearned = dict.fromkeys(self._texts)
            self._ngrams = ngrams
        for number in [*self._unlearned]:
            text = self._texts[number]
            tail = self._tail_before(number, text.num_learned)
            self._learn_all(ngrams, number, tail, text.tokens, text.num_learned)
            text.num_learned = len(text.tokens)
            del self._unlearned[number]
        return ngrams

    def _learn_all(
        self,
        ngrams: dict[int, tuple[int, ...]],
        number: int,
        tail: tuple[int, ...],
        tokens: Tokens,
        start: int,
    ) -> None:
        for offset in range(start, len(tokens)):
            self._learn(ngrams, number, tail, offset)
            tail = (*tail[1 - ORDER :], tokens[offset])

    @staticmethod
    def _learn(ngrams: dict[int, tuple[int, ...]], number: int, tail: tuple[int, ...], offset: int) -> None:
        """The place behind these tokens; of each text the last. Equal hashes cost no more than a draft."""
        place = number << 32 | offset
        alone = (place,)
        for start in range(len(tail)):
            key = hash(tail[start:])
            held = ngrams.get(key)
            if held is None:
                ngrams[key] = alone
            elif held[0] >> 32 == number:
                ngrams[key] = alone + held[1:]
            else:
                others = [each for each in held if each >> 32 != number]
                ngrams[key] = (place, *others[: PLACES_PER_NGRAM - 1])


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
        self._waiting: deque[tuple[tuple[int, ...], Tokens]] = deque()
        self._num_waiting = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return len(self._newer.tokens) + len(self._older.tokens) + self._num_waiting

    def add(self, tail: tuple[int, ...], token_ids: Iterable[int]) -> None:
        """A text that has ended, behind the last tokens of its prompt."""
        tokens = array("i", token_ids)
        self._waiting.append((tail, tokens))
        self._num_waiting += len(tokens) + 1  # with what stands behind it
        while self.num_tokens > 2 * self._most and self._num_waiting:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if self._older.tokens:
            self._older = _Generation()
        elif self._newer.tokens:
            self._newer = _Generation()
        else:
            _, tokens = self._waiting.popleft()
            self._num_waiting -= len(tokens) + 1

    def learn(self, most: float = math.inf) -> None:
        """Make n-grams of texts that wait, the oldest first, until so many tokens have some."""
        while self._waiting and most > 0:
            tail, tokens = self._waiting.popleft()
            self._num_waiting -= len(tokens) + 1
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


class HistoryIndex:
    """The texts of a job by prompt, and all of them together.

    At most `max_tokens` are kept by prompt, prompts included, and an eighth of that over the whole job. What
    runs comes on top: the engine bounds it.
    """

    def __init__(self, max_tokens: int) -> None:
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InvalidInput(
                f"max_tokens of a history must be a whole number of at least 1, got {max_tokens!r}: so many "
                "tokens are kept; to draft nothing from history, leave its plans out"
            )
        self.max_tokens = max_tokens
        self.job = JobTexts(max(1, max_tokens // 8))
        self._prompts: OrderedDict[bytes, PromptTexts] = OrderedDict()  # those used last stand last
        self._counted: dict[bytes, int] = {}  # tokens of each prompt when it was last idle
        self._num_tokens = 0  # the sum
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # with n-grams, and no text that runs

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept by prompt."""
        return sum(texts.num_tokens for texts in self.prompts)

    @property
    def prompts(self) -> Iterable[PromptTexts]:
        """All that it knows, those used last at the end."""
        return self._prompts.values()

    def of_prompt(self, prompt_ids: Sequence[int]) -> PromptTexts:
        """The texts of a prompt, with those it has had before."""
        key = _key(prompt_ids)
        if key not in self._prompts:
            self._prompts[key] = PromptTexts(prompt_ids)
        self._prompts.move_to_end(key)
        self._idle.pop(key, None)
        return self._prompts[key]

    def add(self, prompt_ids: Sequence[int], token_ids: Iterable[int]) -> None:
        """A text that was written elsewhere: in an earlier process, or by another engine."""
        texts = self.of_prompt(prompt_ids)
        number = texts.open(_ELSEWHERE)
        try:
            texts.extend(number, token_ids)
        finally:
            self.close(texts, number)

    def close(self, texts: PromptTexts, number: int) -> None:
        """A text has ended: it is one of the job's, and the bounds hold again."""
        tokens = texts.text(number).tokens
        if tokens:
            self.job.add(tuple(texts.prompt[-ORDER:]), tokens)
        texts.close(number)
        if texts.num_running:
            return
        key = _key(texts.prompt)
        self._num_tokens += texts.num_tokens - self._counted.get(key, 0)
        self._counted[key] = texts.num_tokens
        if texts.has_ngrams:
            self._idle[key] = None
        while len(self._idle) > IDLE_PROMPTS:
            oldest, _ = self._idle.popitem(last=False)
            self._prompts[oldest].forget_ngrams()
        for _ in range(len(self._prompts)):
            if self._num_tokens <= self.max_tokens:
                return
            oldest, unused = next(iter(self._prompts.items()))
            if unused.num_running:
                self._prompts.move_to_end(oldest)
                continue
            self._num_tokens -= self._counted.pop(oldest)
            self._idle.pop(oldest, None)
            del self._prompts[oldest]


def _key(prompt_ids: Sequence[int]) -> bytes:
    return blake2b(array("i", prompt_ids).tobytes(), digest_size=16).digest()
