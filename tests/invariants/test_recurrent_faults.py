"""A policy whose layers carry a state, and what befalls it: exceptions, NaN, new weights, too few pages."""

import dataclasses
import random

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache import recurrent as recurrent_module
from blockroll.rollout.engine.cache import snapshots as snapshots_module
from blockroll.rollout.engine.cache import state as state_module
from blockroll.rollout.engine.cache.layouts import open_slots
from blockroll.rollout.engine.cache.state import SlotStates
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.invariants.test_interrupts import InterruptedIn
from tests.invariants.test_recurrent import (
    FUSED,
    GREEDY,
    MASKS,
    PLAIN,
    TWO_FORWARD,
    assert_states_are_cold,
    finish,
    prompts,
    text,
    verify,
)
from tests.recurrent_policy import POISON, RecurrentPolicy

pytestmark = pytest.mark.slow  # interrupts anywhere, many times


@pytest.fixture(scope="module")
def policy():
    return RecurrentPolicy()


@MASKS
def test_requests_that_are_sent_back_go_on_as_if_they_had_run(policy, plan):
    """Pages for two of the texts and a bit: the youngest wait again, and their states with them."""
    requests = make_requests([text(20, seed=seed) for seed in range(4)], GREEDY)
    engine = Engine(policy, plan=plan, cache="pages", page_size=4, max_cache_rows=108)
    finished = finish(engine, requests)
    assert sum(rollout.stats.num_preempted for rollout in finished.values()) > 0
    assert_same_rollouts(run(policy, requests, PLAIN), finished, policy)


@MASKS
def test_prompts_that_come_in_chunks_beside_what_runs_have_the_states_of_whole_ones(policy, plan):
    """Chunks end anywhere; texts that begin alike lack different numbers of rows in one chunk."""
    requests = make_requests([text(length, seed=length) for length in (5, 30, 70)] + prompts(), GREEDY)
    engine = Engine(policy, plan=plan, max_batch_size=8, prefill_chunk=13)
    engine.submit(requests[:1])
    engine.step()
    finished = finish(engine, requests[1:])
    assert_same_rollouts(run(policy, requests, PLAIN), finished, policy)
    turns = [(*each.request.prompt_ids, *each.token_ids, *text(9, seed=9)) for each in finished.values()]
    later = make_requests(turns, GREEDY, seed=1)
    assert_same_rollouts(run(policy, later, PLAIN), finish(engine, later), policy)


@MASKS
def test_a_request_that_goes_wrong_leaves_nothing_behind(policy, plan):
    requests = make_requests([(*text(20, seed=1), POISON, 5), *prompts()], GREEDY)
    engine = Engine(policy, plan=plan, max_batch_size=3)
    finished = finish(engine, requests, is_checked=False)  # what is wrong is NaN in the cold prefill too
    assert finished.pop("r0").finish_reason == "error"
    assert_same_rollouts(run(policy, requests[1:], PLAIN), finished, policy)


@MASKS
def test_nothing_is_taken_over_from_weights_that_have_changed(plan):
    policy = RecurrentPolicy()
    engine = Engine(policy, plan=plan)
    requests = make_requests(prompts(), GREEDY)
    engine.submit(requests)
    for _ in range(4):
        engine.step()
    policy.write_weights(1)
    engine.change_weights(1)
    finish(engine, [])
    warm = finish(engine, make_requests(prompts(), GREEDY, seed=1))
    cold = run(policy, make_requests(prompts(), GREEDY, seed=1), plan)
    assert {name: each.token_ids for name, each in warm.items()} == {
        name: each.token_ids for name, each in cold.items()
    }


def test_planted_states_of_old_weights_are_noticed(monkeypatch):
    monkeypatch.setattr(SlotStates, "emptied", lambda self: self)
    with pytest.raises(AssertionError):
        test_nothing_is_taken_over_from_weights_that_have_changed(PLAIN)


def interrupt(policy, plan, *, numbers, **options) -> int:
    """Ctrl-C at the n-th call in the bookkeeping of states and snapshots, for each n; of how many calls."""
    requests = make_requests(prompts()[:6], dataclasses.replace(GREEDY, max_tokens=8))
    turns = [(*each.prompt_ids, *text(3, seed=7)) for each in requests]
    later = make_requests(turns, dataclasses.replace(GREEDY, max_tokens=4), seed=1)
    plain, plain_later = run(policy, requests, PLAIN), run(policy, later, PLAIN)
    num_calls = 0
    for number in numbers:
        engine = Engine(policy, plan=plan, max_batch_size=3, **options)
        interrupted = InterruptedIn(number, state_module, recurrent_module, snapshots_module)
        engine.submit(requests)
        finished = {}
        while engine.num_requests:
            finished |= {each.request.request_id: each for each in interrupted.run(engine.step).finished}
            engine.check_integrity()
        assert_states_are_cold(policy, engine._cache)
        assert_same_rollouts(plain, finished, policy)
        assert_same_rollouts(plain_later, finish(engine, later), policy)
        num_calls = max(num_calls, interrupted.count)
    return num_calls


@pytest.mark.parametrize(
    ("plan", "options"), [(TWO_FORWARD, {"cache": "pages", "page_size": 4}), (FUSED[1], {})]
)
def test_an_interrupt_anywhere_between_rows_and_states_changes_no_token(policy, plan, options):
    rng = random.Random(plan.name)
    assert interrupt(policy, plan, numbers=rng.sample(range(1, 400), 4), **options) > 400


def test_rows_that_are_cut_back_end_where_a_state_is_left(policy):
    """Behind a step: at a candidate of it, at its beginning's snapshots, or nowhere."""
    cache = open_slots(policy, num_slots=4, capacity=64)
    whole = text(44, seed=1)
    policy.prefill(torch.tensor([whole[:40]] * 4), cache.settled_window(0, 4, 40))
    cache.commit(0, [whole[:40]] * 4)
    verify(policy, cache, torch.tensor([whole[40:44]] * 4))
    cache.commit(0, [whole[40:43]] * 4)
    for slot, num_rows in enumerate((43, 41, 38, 20)):
        cache.keep(slot, num_rows)
    assert cache.lengths(0, 4) == [43, 41, 32, 0]
    cache.check_integrity()
    assert_states_are_cold(policy, cache)


def test_planted_rows_that_are_cut_back_without_their_state_are_noticed(policy, monkeypatch):
    monkeypatch.setattr(SlotStates, "keep", lambda self, slot, rows: len(rows))
    with pytest.raises(AssertionError):
        test_rows_that_are_cut_back_end_where_a_state_is_left(policy)
