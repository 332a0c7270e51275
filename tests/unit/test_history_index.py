"""The index behind drafts from history: what it finds, what a token costs, and where it ends."""

import random
import tracemalloc

import pytest

from blockroll.rollout.drafters.history import AcceptanceTable, Guess, Row, rows_behind
from blockroll.rollout.drafters.history_index import (
    IDLE_PROMPTS,
    PLACES_PER_NGRAM,
    TEXTS_PER_PROMPT,
    HistoryIndex,
    PromptTexts,
)
from blockroll.rollout.drafters.history_job import JobTexts
from blockroll.rollout.drafters.history_text import ORDER, Source

PROMPT = (1, 2, 3)


def written(texts, tokens, group="g", *, close=False):
    number = texts.open(group)
    texts.extend(number, tokens)
    if close:
        texts.close(number)
    return number


def guesses(texts, number, most=4):
    """By source: the length of the match, and the tokens that are guessed."""
    return {
        match.source: (match.order, [row.token_id for row in rows_behind(match, most)])
        for match in texts.matches(number)
    }


def test_each_source_gives_what_followed_its_longest_match():
    texts = PromptTexts((9, 8, 4, 5, 6, 9))
    written(texts, (4, 5, 7, 7, 7), "earlier", close=True)
    written(texts, (4, 5, 8), "g")
    number = written(texts, (4, 5), "g")
    assert guesses(texts, number) == {
        Source.OWN: (2, [6, 9]),  # in the prompt, up to its end
        Source.SIBLINGS: (8, [8]),
        Source.EARLIER: (8, [7, 7, 7]),
    }


def test_the_longest_suffix_wins_and_no_shorter_one_is_looked_at():
    texts = PromptTexts(PROMPT)
    written(texts, (5, 6, 7, 0, 6, 7, 9))
    number = written(texts, (4, 4, 4, 4, 4, 5, 6, 7))
    assert guesses(texts, number)[Source.SIBLINGS] == (3, [0, 6, 7, 9])


def test_places_vote_and_those_that_disagree_drop_out():
    texts = PromptTexts(PROMPT)
    for tokens in ((4, 5, 6), (4, 5, 7), (4, 9, 9)):
        written(texts, tokens, close=True)
    (match,) = texts.matches(written(texts, ()))
    rows = [*rows_behind(match, 8)]
    assert [row.token_id for row in rows] == [4, 5, 7], "of 6 and 7, equally frequent, the latest"
    assert [row.order for row in rows] == [3, 4, 5]
    assert [row.agreement for row in rows] == [4, 3, 2]


def test_a_text_that_repeats_itself_goes_on_as_far_as_is_asked():
    texts = PromptTexts(PROMPT)
    number = written(texts, (5, 6) * 6)
    assert guesses(texts, number, most=9)[Source.OWN] == (8, [5, 6, 5, 6, 5, 6, 5, 6, 5])


def test_a_text_never_finds_its_own_end():
    texts = PromptTexts((4,))
    assert guesses(texts, written(texts, ())) == {}
    assert guesses(texts, written(texts, (5,), "other")) == {}


class Counting(dict):
    """Counts how many n-grams are read and written, and the most places that one has."""

    touched = most_places = 0

    def get(self, key, default=None):
        self.touched += 1
        return super().get(key, default)

    def __setitem__(self, key, places):
        self.touched += 1
        self.most_places = max(self.most_places, len(places))
        super().__setitem__(key, places)


@pytest.mark.parametrize("length", [1_000, 8_000])
@pytest.mark.parametrize("make", [lambda i: 7, lambda i: i % 2, lambda i: i])
def test_a_token_costs_the_same_operations_however_often_it_stood_before(length, make):
    prompt = [make(i) for i in range(length)]
    texts = PromptTexts(prompt)
    number = written(texts, ())
    [*texts.matches(number)]
    texts._ngrams = counting = Counting(texts._ngrams)
    for token in prompt:
        texts.extend(number, (token,))
        for match in texts.matches(number):
            assert len(match.places) <= PLACES_PER_NGRAM
            assert len([*rows_behind(match, 8)]) <= 8
    assert counting.touched <= length * 3 * ORDER
    assert counting.most_places <= PLACES_PER_NGRAM


def test_hundreds_of_texts_of_one_prompt_leave_the_latest_and_a_bounded_cost():
    texts = PromptTexts(PROMPT)
    for index in range(300):
        written(texts, (4, 5, index), close=True)
        [*texts.matches(written(texts, (4, 5)))]
    kept = [text[2] for text in texts.ended]
    assert TEXTS_PER_PROMPT <= len(kept) < 2 * TEXTS_PER_PROMPT
    assert kept == [*range(300 - len(kept), 300)]
    assert max(map(len, texts._ngrams.values())) <= PLACES_PER_NGRAM


def test_ngrams_that_were_forgotten_are_made_anew():
    texts = PromptTexts((9, 8, 4, 5, 6, 9))
    written(texts, (4, 5, 7, 7, 7), "earlier", close=True)
    number = written(texts, (4, 5), "g")
    before = guesses(texts, number)
    texts.forget_ngrams()
    texts.extend(number, (7,))
    texts.forget_ngrams()
    again = PromptTexts((9, 8, 4, 5, 6, 9))
    written(again, (4, 5, 7, 7, 7), "earlier", close=True)
    assert guesses(texts, number) == guesses(again, written(again, (4, 5, 7), "g"))
    assert before[Source.EARLIER] == (8, [7, 7, 7])


@pytest.mark.parametrize("max_tokens", [1, 50, 400])
def test_an_index_keeps_its_bound_and_drops_what_was_used_longest_ago(max_tokens):
    index = HistoryIndex(max_tokens)
    draw = random.Random(0)
    for step in range(400):
        texts = index.of_prompt((step % 40, 3))
        number = texts.open("g")
        texts.extend(number, [draw.randrange(20) for _ in range(draw.randrange(9))])
        index.close(texts, number)
        assert index.num_tokens <= max_tokens
        assert index.job.num_tokens <= max(2, max_tokens // 8)
        assert len(index._idle) <= IDLE_PROMPTS
    assert [texts.prompt[0] for texts in index.prompts] == [*range(40)][-len(index._prompts) :] or (
        not index._prompts
    )


def test_what_runs_is_never_dropped():
    index = HistoryIndex(10)
    running = index.of_prompt(PROMPT)
    number = written(running, range(50))
    for prompt in range(20):
        texts = index.of_prompt((prompt,))
        index.close(texts, written(texts, (4, 5, 6)))
    assert index.of_prompt(PROMPT) is running
    assert [*running.find(number).tokens] == [*range(50)]


def test_texts_of_elsewhere_are_no_siblings_and_count_like_others():
    index = HistoryIndex(100)
    index.add(PROMPT, (4, 5, 6))
    index.add(PROMPT, ())
    texts = index.of_prompt(PROMPT)
    assert [[*text] for text in texts.ended] == [[4, 5, 6]]
    assert index.job.num_tokens == 4
    for group in ("g", None):
        number = written(texts, (4, 5), group)
        assert guesses(texts, number) == {Source.EARLIER: (5, [6])}
        index.close(texts, number)
    for prompt in range(200):
        index.add((prompt,), (7,) * (prompt % 12))
        assert index.num_tokens <= 100
    index.add(PROMPT, (7,) * 101)
    assert index.num_tokens == 0, "one that is longer than the bound is not kept"


def test_a_text_of_elsewhere_that_is_cut_off_is_closed_all_the_same():
    def broken():
        yield 4
        raise KeyboardInterrupt

    index = HistoryIndex(10)
    with pytest.raises(KeyboardInterrupt):
        index.add(PROMPT, broken())
    assert index.of_prompt(PROMPT).num_running == 0
    index.add((7,), (5,) * 9)
    assert [[*texts.prompt] for texts in index.prompts] == [[7]], "it made room"


def test_texts_of_elsewhere_take_no_ngrams_from_prompts_that_are_drafted_for():
    index = HistoryIndex(10_000)
    texts = index.of_prompt(PROMPT)
    number = written(texts, (4, 5))
    [*texts.matches(number)]
    index.close(texts, number)
    assert texts.has_ngrams
    for prompt in range(2 * IDLE_PROMPTS):
        index.add((prompt,), (4, 5, 6))
    assert texts.has_ngrams
    assert not any(other.has_ngrams for other in index.prompts if other is not texts)


def test_the_job_remembers_the_last_place_and_forgets_by_halves():
    job = JobTexts(40)
    job.add((1, 2), (3, 4, 5))
    job.add((8, 2), (3, 4, 6))
    job.learn()
    match = job.match((7, 3, 4))
    assert (match.source, match.order) == (Source.JOB, 2)
    assert [row.token_id for row in rows_behind(match, 4)] == [6], "it stops where that text ended"
    assert job.match((5, 5)) is None
    for index in range(20):
        job.add((20 + index, 21), range(30, 36))
        assert job.num_tokens <= 40
    job.learn()
    assert job.match((7, 3, 4)) is None


def test_texts_that_wait_are_learned_as_far_as_is_asked():
    job = JobTexts(100)
    job.add((1, 2), (3, 4, 5))
    job.add((8, 2), (6, 7, 9))
    assert job.match((1, 2)) is None
    job.learn(2)
    assert job.match((2, 3)) is not None
    assert job.match((2, 6)) is None
    job.learn()
    assert job.match((2, 6)) is not None


def test_a_prompt_says_how_many_tokens_a_look_would_learn():
    texts = HistoryIndex(1_000).of_prompt(PROMPT)
    number = written(texts, (4, 5, 6))
    assert texts.num_unlearned == len(PROMPT) + 3
    assert [*texts.matches(number)] == []
    assert texts.num_unlearned == 0
    texts.extend(number, (7, 8))
    assert texts.num_unlearned == 2


def test_a_guess_is_counted_up_to_its_first_wrong_row_and_lately_counts_most():
    table, row = AcceptanceTable(), Row(5, 3, 0)
    first = table.rate(Source.OWN, row)
    assert table.rate(Source.OWN, Row(5, 8, 0)) > first
    for _ in range(1000):
        table.learn(Guess(Source.OWN, [row, Row(6, 4, 0), Row(7, 5, 0)]), (5, 9, 7))
    assert table.rate(Source.OWN, row) > 0.99
    assert table.rate(Source.OWN, Row(6, 4, 0)) < 0.02
    assert table.rate(Source.OWN, Row(7, 5, 0)) == AcceptanceTable().rate(Source.OWN, Row(7, 5, 0))
    assert table.rate(Source.JOB, row) == first, "each source has its own"
    for _ in range(1000):
        table.learn(Guess(Source.OWN, [row]), (6,))
    assert table.rate(Source.OWN, row) < 0.2


def bytes_per_token(write, count):
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = write()
        return (tracemalloc.get_traced_memory()[0] - before) / count, kept
    finally:
        tracemalloc.stop()


def test_a_token_takes_no_more_memory_than_the_docstrings_say():
    """Of texts that share nothing, which is the most."""
    tokens = [[random.Random(seed).randrange(49_152) for _ in range(200)] for seed in range(20)]
    texts = PromptTexts(PROMPT)
    [*texts.matches(written(texts, ()))]

    def with_ngrams():
        for each in tokens:
            written(texts, each)

    def raw():
        kept = PromptTexts(PROMPT)
        for each in tokens:
            written(kept, each)
        return kept

    def of_job():
        job = JobTexts(100_000)
        for each in tokens:
            job.add(PROMPT, each)
        return job

    assert bytes_per_token(with_ngrams, 4_000)[0] < 1_000
    assert bytes_per_token(raw, 4_000)[0] < 10
    assert bytes_per_token(of_job, 4_000)[0] < 500


def test_tokens_of_large_vocabularies_are_kept_as_they_are():
    index = HistoryIndex(1_000)
    large = (1 << 18, (1 << 31) - 1, 262_145)
    texts = index.of_prompt(large)
    index.close(texts, written(texts, (300_000, 1 << 20)))
    assert guesses(texts, written(texts, ()))[Source.SIBLINGS] == (3, [300_000, 1 << 20])
    index.job.learn()
    assert [row.token_id for row in rows_behind(index.job.match(large), 4)] == [300_000, 1 << 20]
