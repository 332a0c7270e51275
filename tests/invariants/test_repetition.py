"""Texts that go round in circles are seen: planted ones exactly, those of broken caches as far as they do."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from blockroll.kernels.block_attention import RowLayout
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.watch import repetition
from blockroll.rl_loops.watch.repetition import (
    LEAST_TIMES,
    LEAST_TOKENS,
    MAX_PERIOD,
    MOST_REPEATED,
    repeated_shares,
)
from blockroll.rl_loops.watch.signals import count_metrics
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.types import HISTORY, PLAIN, Plan, Sampling, counted
from tests.engines import make_requests, run

ROOT = Path(__file__).parents[2]


def by_hand(text):
    """The definition, word by word: every run of every period, token by token."""
    repeated = set()
    for period in range(1, MAX_PERIOD + 1):
        for start in range(len(text)):
            stop = start + period
            while stop < len(text) and text[stop] == text[stop - period]:
                stop += 1
            if stop - start >= max(LEAST_TIMES * period, LEAST_TOKENS) and stop <= len(text):
                repeated |= {*range(start, stop)}
    return len(repeated) / max(1, len(text))


@pytest.fixture(scope="module")
def random_texts():
    """Of few tokens, so that they repeat themselves by chance, and of many."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 60, 300)
    return [
        generator.integers(0, vocabulary, size).tolist()
        for size, vocabulary in zip(sizes, itertools.cycle((2, 2, 3, 50)), strict=False)
    ]


def test_shares_are_those_of_the_definition(random_texts):
    want = [by_hand(text) for text in random_texts]
    assert repeated_shares(random_texts).tolist() == pytest.approx(want, abs=1e-12)
    assert sum(share > 0 for share in want) > 50
    assert sum(0 < share < 1 for share in want) > 50


@pytest.mark.parametrize("bound", ["MAX_PERIOD", "LEAST_TIMES", "LEAST_TOKENS"])
def test_another_definition_gives_other_shares(random_texts, monkeypatch, bound):
    want = repeated_shares(random_texts)
    monkeypatch.setattr(repetition, bound, {"MAX_PERIOD": 4, "LEAST_TIMES": 2, "LEAST_TOKENS": 7}[bound])
    texts = random_texts if bound != "MAX_PERIOD" else [[*range(5)] * 3]
    changed = repeated_shares(texts)
    assert (changed < 1 if bound == "MAX_PERIOD" else (changed > want)).any()


@pytest.mark.parametrize("period", range(1, MAX_PERIOD + 2))
def test_a_block_counts_once_it_stands_there_three_times(period):
    block, before = [*range(100, 100 + period)], [*range(50)]
    num_times = max(LEAST_TIMES, -(-LEAST_TOKENS // period))
    whole = [*before, *block * num_times]
    share = period * num_times / len(whole) if period <= MAX_PERIOD else 0
    assert repeated_shares([whole, whole[:-1]])[0] == pytest.approx(share)
    if num_times * period == max(LEAST_TIMES * period, LEAST_TOKENS):
        assert repeated_shares([whole[:-1]]).tolist() == [0]


def test_no_run_reaches_into_the_next_text():
    assert repeated_shares([[7] * 5, [7] * 5, [], [7] * 5]).tolist() == [0, 0, 0, 0]
    assert repeated_shares([[1, 2], [7] * 8, [3, 4]]).tolist() == [0, 1, 0]
    assert repeated_shares([]).tolist() == []
    assert repeated_shares([[]]).tolist() == [0]


def test_prose_and_code_do_not_repeat_themselves():
    """Letter by letter; of code the indents are runs of spaces."""
    for name, most in (
        ("docs/architecture.md", 0.05),
        ("docs/trl.md", 0.05),
        ("blockroll/rl_loops/run.py", 0.25),
    ):
        letters = [*(ROOT / name).read_bytes()]
        shares = repeated_shares([letters[i : i + 256] for i in range(0, len(letters) - 256, 256)])
        assert shares.mean() < most, name
        assert shares.max() < MOST_REPEATED, name
        assert repeated_shares([letters[:40] + letters[40:56] * 10])[0] > MOST_REPEATED


@pytest.fixture(scope="module")
def policy():
    return HFPolicy.from_pretrained("tiny", device="cpu")


def drawn(policy, plan=PLAIN, temperature=1.0):
    problems = itertools.islice(arithmetic.problems(1, held_out=True), 32)
    texts = [tuple(policy.tokenizer(problem.prompt)["input_ids"]) for problem in problems]
    sampling = Sampling(max_tokens=64, temperature=temperature)
    rollouts = [*run(policy, make_requests(texts, sampling), plan, max_batch_size=16).values()]
    shares = repeated_shares([rollout.token_ids for rollout in rollouts])
    return shares, count_metrics(counted(rollout.stats.steps for rollout in rollouts))


def rows_moved(monkeypatch, by):
    """Each committed row behind a prompt holds what was meant for the one beside it."""
    commit = SlotCache.commit

    def moved(self, start, token_ids):
        slots = range(start, start + len(token_ids))
        before = [len(self.tokens(slot)) for slot in slots]
        commit(self, start, token_ids)
        for slot, first, tokens in zip(slots, before, token_ids, strict=True):
            last = min(first + len(tokens), self.capacity - 1)
            for tensor in (*self._keys, *self._values) if first else ():
                tensor[slot, :, first:last] = tensor[slot, :, first + by : last + by].clone()

    monkeypatch.setattr(SlotCache, "commit", moved)


def position_stands_still(monkeypatch):
    """No row knows how far into its text it stands."""
    positions = RowLayout.positions
    monkeypatch.setattr(RowLayout, "positions", lambda self, lengths_B: positions(self, 0 * lengths_B))


def positions_shifted(monkeypatch):
    """New rows stand one further behind a prefix than they do."""
    positions = RowLayout.positions
    monkeypatch.setattr(
        RowLayout, "positions", lambda self, lengths_B: positions(self, lengths_B) + (lengths_B > 0)[:, None]
    )


def test_a_sound_engine_does_not_go_round(policy):
    shares, _ = drawn(policy)
    assert shares.mean() < 0.01
    assert (shares > MOST_REPEATED).mean() == 0


def test_a_cache_whose_rows_lie_one_too_late_is_seen(policy, monkeypatch):
    rows_moved(monkeypatch, -1)
    shares, _ = drawn(policy)
    assert shares.mean() > 0.15
    assert (shares > MOST_REPEATED).any()


def test_positions_that_stand_still_are_seen(policy, monkeypatch):
    position_stands_still(monkeypatch)
    shares, _ = drawn(policy)
    assert shares.mean() > 0.5
    assert (shares > MOST_REPEATED).mean() > 0.5


def test_what_goes_round_is_accepted_as_often_as_what_is_right(policy, monkeypatch):
    """Why acceptance alone is no alarm: history drafts the texts of a broken engine as well as any."""
    sound, sound_metrics = drawn(policy, Plan(8, drafter=HISTORY), temperature=0)
    position_stands_still(monkeypatch)
    broken, broken_metrics = drawn(policy, Plan(8, drafter=HISTORY), temperature=0)
    rates = [metrics["rollout/acceptance_rate"] for metrics in (sound_metrics, broken_metrics)]
    assert rates[1] > rates[0] - 0.02
    assert sound.mean() < 0.01
    assert broken.mean() > 0.1


@pytest.mark.parametrize(
    "plant", [lambda patch: rows_moved(patch, 1), positions_shifted], ids=["rows one early", "positions + 1"]
)
def test_faults_that_leave_no_circles_are_not_seen(policy, monkeypatch, plant):
    """Their texts are wrong, and do not repeat themselves: log-probabilities tell these, not this figure."""
    plant(monkeypatch)
    shares, _ = drawn(policy)
    assert shares.mean() < 0.1
    assert (shares > MOST_REPEATED).mean() == 0
