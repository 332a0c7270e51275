"""What was written before, kept so that what followed a text's last tokens is found at once.

Of each prompt, its texts: the prompt itself, those that run, and the latest that have ended. Over the whole
job, the last place of each n-gram of a few orders. Both are bounded, and a token costs a fixed number of
operations, however often it is repeated.

An interrupt leaves no text half kept: what belongs together is stored without a call in between, where none
comes. Whoever was interrupted calls again, and what is done stays as it is.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from blockroll.errors import InvalidInput
from blockroll.rollout.drafters.history_job import JobTexts
from blockroll.rollout.drafters.history_text import ORDER, PROMPT, Match, Source, Text, Tokens

TEXTS_PER_PROMPT = 32  # that have ended
PLACES_PER_NGRAM = 16  # in as many texts, the latest ones
IDLE_PROMPTS = 8  # whose n-grams are kept while no text of theirs runs: siblings may come one by one
_ELSEWHERE = "\0"  # no group of an engine: what others have written is nobody's sibling


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
        self._next = PROMPT + 1

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
        text = Text(group)
        self.begin(text)
        return text.number

    def begin(self, text: Text) -> None:
        """A text begins, once: it has a number from now on."""
        number = self._next
        if text.number:
            return
        # No calls from here on.
        text.number = number
        self._texts[number] = text
        self._next = number + 1
        self.num_running += 1

    def find(self, number: int) -> Text | None:
        """A text by its number; None: it was empty, or is kept no more."""
        return self._texts.get(number)

    def tail(self, number: int) -> tuple[int, ...]:
        """The last tokens of prompt and text, as many as are looked up at most."""
        return self._tail_before(number, len(self._texts[number].tokens))

    def extend(self, number: int, token_ids: Iterable[int]) -> None:
        """More tokens of a text."""
        text, fresh = self._texts[number], array("i", token_ids)
        num_fresh = len(fresh)
        # No calls from here on.
        text.tokens += fresh
        self.num_tokens += num_fresh
        self._unlearned[number] = None

    def close(self, number: int) -> None:
        """A text has ended. Twice as many as are kept may pile up before the oldest are dropped."""
        text = self._texts.get(number)
        if text is None:
            return
        if not text.tokens:
            self._unlearned.pop(number, None)
            # No calls from here on.
            del self._texts[number]
            self.num_running -= 1
            return
        if not text.has_ended:
            text.has_ended = True
            self._ended[number] = None
            self.num_running -= 1
        if len(self._ended) >= 2 * TEXTS_PER_PROMPT:
            self.forget_ngrams()  # first: they name texts that are dropped
            while len(self._ended) > TEXTS_PER_PROMPT:
                oldest = next(iter(self._ended))
                self._unlearned.pop(oldest, None)
                num_dropped = len(self._texts[oldest].tokens)
                # No calls from here on.
                del self._ended[oldest]
                del self._texts[oldest]
                self.num_tokens -= num_dropped

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
        if other in (PROMPT, number):
            return Source.OWN
        return Source.SIBLINGS if self._texts[other].group == group else Source.EARLIER

    def _tokens(self, number: int) -> Tokens:
        return self._prompt if number == PROMPT else self._texts[number].tokens

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
            self._learn_all(ngrams, PROMPT, (), self._prompt, 0)
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
        texts, text = self.of_prompt(prompt_ids), Text(_ELSEWHERE)
        try:
            texts.begin(text)
            texts.extend(text.number, token_ids)
        finally:
            if text.number:
                self.close(texts, text.number)

    def close(self, texts: PromptTexts, number: int) -> None:
        """A text has ended: it is one of the job's, and the bounds hold again. Once closed it stays so."""
        text = texts.find(number)
        if text is not None and text.tokens:
            self.job.add(tuple(texts.prompt[-ORDER:]), text.tokens, text)
        texts.close(number)
        key = _key(texts.prompt)
        if texts.num_running or self._prompts.get(key) is not texts:
            return
        more = texts.num_tokens - self._counted.get(key, 0)
        # No calls from here on.
        self._num_tokens += more
        self._counted[key] = texts.num_tokens
        if texts.has_ngrams:
            self._idle[key] = None
        while len(self._idle) > IDLE_PROMPTS:
            oldest = next(iter(self._idle))
            self._prompts[oldest].forget_ngrams()
            del self._idle[oldest]
        for _ in range(len(self._prompts)):
            if self._num_tokens <= self.max_tokens:
                return
            oldest, unused = next(iter(self._prompts.items()))
            if unused.num_running:
                self._prompts.move_to_end(oldest)
                continue
            self._idle.pop(oldest, None)
            num_dropped = self._counted.get(oldest, 0)
            # No calls from here on.
            del self._prompts[oldest]
            self._num_tokens -= num_dropped
            if oldest in self._counted:
                del self._counted[oldest]


def _key(prompt_ids: Sequence[int]) -> bytes:
    return blake2b(array("i", prompt_ids).tobytes(), digest_size=16).digest()
