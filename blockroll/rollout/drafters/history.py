"""Drafts from history: what followed a text's last tokens before, in any text that the engine has seen.

The longest suffix of a text, up to 8 tokens, is looked up in the text itself with its prompt, in its
siblings, in earlier texts of its prompt, and in all texts of the job. Each source has one guess of what
follows; the one that promises most tokens is drafted, as far as its rows are likely to be accepted. That is
counted from the guesses of steps before, drafted or not: by source, length of the match, and how far its
places agreed.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from blockroll.errors import InvalidInput
from blockroll.kernels.transfer import send
from blockroll.policies.base import Policy
from blockroll.rollout.drafters.history_index import HistoryIndex, PromptTexts
from blockroll.rollout.drafters.history_text import Match, Source, Text
from blockroll.rollout.engine.drafting import Drafter, DraftStep
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import HISTORY, POINT_MASS, Draft, FinishedText, Plan, Request, Rollout

MAX_TOKENS = 1 << 20
ROW_COST = 0.1
_MOST_TRIES = 512  # of a cell; then both counts are halved, so that what was right lately decides
_PRIOR_TRIES = 4.0
_MOST_LEARNED = 1024  # tokens that one look over a batch makes n-grams of, by prompt and of the job, about
_MOST_SKIPPED = 15  # tokens that a text goes on without a look where it has found nothing again and again


class Row(NamedTuple):
    """One token of a guess, and what its chance goes by."""

    token_id: int
    order: int  # tokens before it that match
    agreement: int  # 0: one place; 1 to 4: of several, how many went on with this token


@dataclass(frozen=True, slots=True)
class Guess:
    """What one source expects to follow."""

    source: Source
    rows: list[Row]


class AcceptanceTable:
    """How often guessed tokens were those that came, by source, order and agreement."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Source, int, int], tuple[int, int]] = {}  # tries, and those that were right

    def rate(self, source: Source, row: Row) -> float:
        """Chance of a row whose rows before are right; a longer match starts from a better one."""
        tries, right = self._counts.get((source, min(row.order, 8), row.agreement), (0, 0))
        prior = 0.05 + 0.05 * min(row.order, 8)
        return (right + prior * _PRIOR_TRIES) / (tries + _PRIOR_TRIES)

    def learn(self, guess: Guess, token_ids: Sequence[int]) -> None:
        """These tokens came: rows count up to the first that is wrong."""
        for row, token_id in zip(guess.rows, token_ids, strict=False):
            key = (guess.source, min(row.order, 8), row.agreement)
            tries, right = self._counts.get(key, (0, 0))
            if tries >= _MOST_TRIES:
                tries, right = tries // 2, right // 2
            self._counts[key] = (tries + 1, right + (row.token_id == token_id))
            if row.token_id != token_id:
                return


@dataclass(slots=True)
class _Followed:
    """A request that runs, and its text in the index."""

    texts: PromptTexts
    text: Text
    guesses: list[Guess] = field(default_factory=list)  # of the latest look
    drafts: list[int] = field(default_factory=list)  # of the guess that promises most,
    chances: list[float] = field(default_factory=list)  # and that each and all before it are accepted
    num_silent: int = 0  # tokens without a look after one that finds nothing; doubles with each
    looks_at: int = 0  # so many tokens of its completion

    @property
    def number(self) -> int:
        """Of its text."""
        return self.text.number


class HistoryDrafts(Drafter):
    """Looks drafts up in earlier texts; needs no training and no mask token.

    Law: drafts depend on committed tokens alone, and are point masses: each position's token is drawn by the
    one coin of the position, and a draft stands if it is that token. So texts are those of plain decoding,
    whatever is looked up, a text that the same coins have drawn before included.

    Memory: `max_tokens` bounds tokens of prompts and texts that are kept by prompt, 4 bytes each, of each
    prompt the latest 32 to 64 texts. N-grams take about 1 KB a token for prompts that run and the latest 8
    that have run; at most 500 bytes for each of the job's last `max_tokens` / 8 tokens.

    It learns once a plan of its engine asks for it. Changes of weights leave it as it is.
    """

    name = HISTORY

    def __init__(self, *, max_tokens: int = MAX_TOKENS, row_cost: float = ROW_COST) -> None:
        """`row_cost` is the least chance of acceptance that a row is drafted for: what a row more costs, as
        a share of what a token costs.

        InvalidInput unless `max_tokens` is at least 1 and `row_cost` above 0 and at most 1.
        """
        if not 0 < row_cost <= 1:
            raise InvalidInput(
                f"row_cost of a history must be above 0 and at most 1, got {row_cost!r}: it is the least "
                "chance of acceptance that a row is drafted for"
            )
        self.index = HistoryIndex(max_tokens)
        self.acceptance = AcceptanceTable()
        self.row_cost = row_cost
        self.vocabulary: str | None = None  # of texts that came from a file
        self.is_asked = False  # whether a plan of its engine drafts from it
        self._followed: dict[str, _Followed] = {}
        self._ending: _Followed | None = None  # what has ended, until the index has all of it
        self._last: Rollout | None = None  # that has ended

    def check(self, plan: Plan, policy: Policy) -> None:
        """Learn from now on. InvalidInput where the history was written in another vocabulary."""
        if self.vocabulary is not None and self.vocabulary != vocabulary_of(policy):
            raise InvalidInput(
                f"plan {plan.name} has a history of another tokenizer or vocabulary; load it with the policy "
                "that wrote it, or begin with an empty one"
            )
        self.is_asked = True

    def finished(self, rollout: Rollout) -> None:
        """Keep its text, whichever plans drew it. Told again of the latest one, as behind an interrupt, it
        keeps that once.
        """
        self._end()
        if not self.is_asked or rollout is self._last:
            return
        request_id = rollout.request.request_id
        followed = self._follow(rollout.request)
        self._read(followed, rollout.token_ids)
        # No calls up to the next: an interrupt finds the request running, or its text ending.
        del self._followed[request_id]
        self._ending = followed
        self._last = rollout
        self._end()

    def _end(self) -> None:
        """Let the index have all of a text that has ended."""
        if self._ending is not None:
            self.index.close(self._ending.texts, self._ending.number)
            self._ending = None

    def tell(self, texts: Iterable[FinishedText]) -> None:
        """Keep texts that other engines of the job have finished."""
        self._end()
        for text in texts:
            self.index.add(text.prompt_ids, text.token_ids)

    def outlook(
        self, batch: Sequence[RunningRequest], most: int, least_chance: float
    ) -> Sequence[Sequence[float]]:
        """Look for each request's drafts; a text that finds nothing is looked up seldom, until it does.

        Of the texts of a prompt all are read before one is looked up. Prompts with more new tokens than one
        look may learn wait for the next.
        """
        self._end()
        self.index.job.learn(_MOST_LEARNED)
        num_learned = 0
        followed_B = [self._follow(running.request) for running in batch]
        due_B = [
            len(running.text.token_ids) >= followed.looks_at
            for followed, running in zip(followed_B, batch, strict=True)
        ]
        prompts = {id(each.texts) for each, due in zip(followed_B, due_B, strict=True) if due}
        for followed, running in zip(followed_B, batch, strict=True):
            if id(followed.texts) in prompts:
                self._read(followed, running.text.token_ids)
        chances_B: list[Sequence[float]] = []
        for followed, running, is_due in zip(followed_B, batch, due_B, strict=True):
            num_new = followed.texts.num_unlearned if is_due else 0
            waits = num_new and num_learned and num_learned + num_new > _MOST_LEARNED
            if not is_due or waits:
                chances_B.append(())
                continue
            num_learned += num_new
            self._look(followed, running, most, least_chance)
            followed.num_silent = 0 if followed.drafts else min(2 * followed.num_silent + 1, _MOST_SKIPPED)
            followed.looks_at = len(running.text.token_ids) + 1 + followed.num_silent
            chances_B.append(followed.chances)
        return chances_B

    def propose(self, step: DraftStep) -> Draft:
        """Of each request the guess that promises most tokens, behind texts that are all read first."""
        self._end()
        most, lengths = step.plan.num_drafts, step.lengths
        drafts: list[list[int]] = []
        if lengths is not None:  # chosen by the outlook on this very step
            for running, length in zip(step.batch, lengths, strict=True):
                drafts.append(self._followed[running.request.request_id].drafts[:length] if length else [])
        else:
            followed_B = [self._up_to_date(running) for running in step.batch]
            self.index.job.learn()
            for followed, running in zip(followed_B, step.batch, strict=True):
                self._look(followed, running, most, self.row_cost)
                drafts.append(followed.drafts)
        device, width = step.policy.device, max(map(len, drafts))
        padded = np.array([each + [0] * (width - len(each)) for each in drafts], dtype=np.int64)
        counts = [len(each) for each in drafts]
        token_ids_BK, num_drafts_B = send([padded, np.array(counts)], device)
        return Draft(token_ids_BK=token_ids_BK, law=POINT_MASS, num_drafts_B=num_drafts_B, num_drafts=counts)

    def _up_to_date(self, running: RunningRequest) -> _Followed:
        followed = self._follow(running.request)
        self._read(followed, running.text.token_ids)
        return followed

    def _follow(self, request: Request) -> _Followed:
        """The text of a request in the index, which begins with the first look."""
        followed = self._followed.get(request.request_id)
        if followed is None:
            texts = self.index.of_prompt(request.prompt_ids)
            followed = self._followed[request.request_id] = _Followed(texts, Text(request.group_id))
        followed.texts.begin(followed.text)
        return followed

    def _read(self, followed: _Followed, token_ids: Sequence[int]) -> None:
        """What was committed since the last time; guesses of a step that raised teach nothing."""
        fresh = token_ids[len(followed.text.tokens) :]
        if not fresh:
            return
        guesses, followed.guesses = followed.guesses, []  # an interrupt has none of them count twice
        for guess in guesses:
            self.acceptance.learn(guess, fresh)
        followed.texts.extend(followed.number, fresh)

    def _look(self, followed: _Followed, running: RunningRequest, most: int, least_chance: float) -> None:
        """Find the guess that promises most. The text has been read.

        The step's last token needs no draft, and behind one that ends the text none is needed.
        """
        followed.drafts, followed.chances, followed.guesses = [], [], []
        most = min(most, running.request.sampling.max_tokens - len(running.text.token_ids) - 1)
        if most < 1:
            return
        promised = 0.0
        ends = running.text.end_token_ids
        for match in self._matches(followed):
            guess, chances = self._guess(match, most, least_chance, ends)
            followed.guesses.append(guess)
            if sum(chances) > promised:
                followed.drafts = [row.token_id for row in guess.rows[: len(chances)]]
                followed.chances, promised = chances, sum(chances)

    def _matches(self, followed: _Followed) -> Iterable[Match]:
        yield from followed.texts.matches(followed.number)
        match = self.index.job.match(followed.texts.tail(followed.number))
        if match is not None:
            yield match

    def _guess(
        self, match: Match, most: int, least_chance: float, ends: Container[int]
    ) -> tuple[Guess, list[float]]:
        """What a source expects, and the chances of the rows that are worth drafting.

        It goes one row further than they do: what is not drafted has to be counted to become worth it.
        """
        guess, chances, chance = Guess(match.source, []), [], 1.0
        for row in rows_behind(match, most):
            guess.rows.append(row)
            chance *= self.acceptance.rate(match.source, row)
            if chance < least_chance:
                break
            chances.append(chance)
            if row.token_id in ends:
                break
        return guess, chances


def rows_behind(match: Match, most: int) -> Iterator[Row]:
    """What followed, row by row: the most frequent token, then of the places that went on with it.

    Of equally frequent ones the latest. A text that is looked up in itself goes on with its own drafts, so
    what repeats is drafted as far as is asked.
    """
    drafts: list[int] = []
    places = match.places
    while len(drafts) < most:
        went_on = []
        votes: dict[int, int] = {}
        for tokens, offset in places:
            if offset < len(tokens):
                token_id = tokens[offset]
            elif tokens is match.own and offset - len(tokens) < len(drafts):
                token_id = drafts[offset - len(tokens)]
            else:
                continue
            if token_id >= 0:
                went_on.append((token_id, tokens, offset + 1))
                votes[token_id] = votes.get(token_id, 0) + 1
        if not votes:
            return
        best = max(votes, key=votes.__getitem__)
        agreement = 0 if len(went_on) == 1 else 1 + 3 * votes[best] // len(went_on)
        yield Row(best, match.order + len(drafts), agreement)
        drafts.append(best)
        places = [(tokens, offset) for token_id, tokens, offset in went_on if token_id == best]


def vocabulary_of(policy: Policy) -> str:
    """A hash of what token ids mean: how many there are, and the tokenizer's words if it has one."""
    digest = blake2b(str(policy.vocab_size).encode(), digest_size=16)
    if policy.tokenizer is not None:
        for word, token_id in sorted(policy.tokenizer.get_vocab().items()):
            digest.update(f"\0{token_id} {word}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
