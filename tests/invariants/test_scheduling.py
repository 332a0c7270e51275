"""Which requests run together, in how much memory: nothing of it changes a token."""

import dataclasses

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_policy

IN_BOTH = pytest.mark.usefixtures("layout")
PLAIN, TWO_FORWARD, FUSED = Plan(0), Plan(4), Plan(4, (0, 2, 4))


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def test_requests_join_several_at_a_time_but_never_wait_for_what_does_not_come():
    scheduler = Scheduler(max_batch_size=16)
    for index in range(20):
        scheduler.submit(f"r{index}")
    assert len(begin(scheduler)) == 16
    scheduler.drop("r3")
    assert scheduler.join() == ()  # one of 16 slots is free, and four wait
    scheduler.drop("r4")
    assert begin(scheduler) == ("r16", "r17")
    scheduler.drop("r18")
    scheduler.drop("r0")
    assert scheduler.join() == ("r19",)  # the last does not wait for company


def begin(scheduler):
    """All that can join run at once."""
    joined = scheduler.join()
    scheduler.start(len(joined))
    return joined


def test_an_interrupt_in_the_middle_of_an_admission_leaves_each_request_here_or_there(monkeypatch):
    scheduler = Scheduler(max_batch_size=4)
    for index in range(6):
        scheduler.submit(f"r{index}")
    with monkeypatch.context() as patch:
        patch.setattr(scheduler._waiting[0], "popitem", raising, raising=False)
        with pytest.raises(KeyboardInterrupt):
            scheduler.join()
    scheduler.check_integrity()
    assert (scheduler.joining, scheduler.waiting) == (("r0", "r1", "r2", "r3"), ("r4", "r5"))
    scheduler.start(4)
    assert scheduler.drop("r1") == 1
    assert begin(scheduler) == ("r4",)
    assert (scheduler.running, scheduler.waiting) == (("r0", "r3", "r2", "r4"), ("r5",))


def raising(**_):
    raise KeyboardInterrupt


class CountedName(str):
    """Counts how often it is compared: what searches a queue compares all that stand in it."""

    num_compared = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedName.num_compared += 1
        return str.__eq__(self, other)


def test_what_leaves_a_queue_costs_the_same_however_long_the_queue_is():
    """Counted, not timed."""
    counts = []
    for size in (500, 2000):
        scheduler = Scheduler(max_batch_size=4)
        for index in range(size):
            scheduler.submit(CountedName(f"r{index}"))
        begin(scheduler)
        CountedName.num_compared = 0
        for index in reversed(range(size)):
            scheduler.drop(CountedName(f"r{index}"))
        counts.append(CountedName.num_compared)
        assert scheduler.waiting == scheduler.running == ()
    assert counts[1] < 5 * counts[0]


@IN_BOTH
def test_requests_that_join_later_find_room_and_draw_what_they_would_alone(policy):
    early = make_requests(prompts(6), Sampling(max_tokens=8))
    late = make_requests(prompts(6, seed=5), Sampling(max_tokens=40, ignore_eos=True), seed=9)
    late = [dataclasses.replace(request, request_id=f"late {i}") for i, request in enumerate(late)]
    alone = {**run(policy, early, TWO_FORWARD), **run(policy, late, TWO_FORWARD)}
    engine = Engine(policy, plan=TWO_FORWARD, max_batch_size=8)
    engine.submit(early)
    finished = [*engine.step().finished]
    engine.submit(late)  # longer than what the cache was made for, while others run
    while engine.num_requests:
        finished += engine.step().finished
    assert_same_rollouts(alone, finished, policy)


@pytest.mark.parametrize("plan", [PLAIN, FUSED], ids=lambda plan: plan.name)
def test_a_bound_on_the_cache_lets_fewer_run_together_and_changes_no_token(policy, plan):
    requests = make_requests(prompts(9), Sampling(max_tokens=12))
    free = run(policy, requests, plan)
    longest = max(len(request.prompt_ids) for request in requests) + 12 + plan.rows_per_forward
    engine = Engine(policy, plan=plan, max_cache_rows=3 * (longest + 16))
    engine.submit(requests)
    widest, finished = 0, []
    while engine.num_requests:
        finished += engine.step().finished
        widest = max(widest, len(engine._scheduler.running))
    assert 1 < widest <= 3
    assert sum(tensor.shape[0] * tensor.shape[2] for tensor in engine._cache._keys) <= 2 * 3 * (longest + 16)
    assert_same_rollouts(free, finished, policy)
    with pytest.raises(InvalidInput, match="memory_fraction"):
        Engine(policy, plan=plan, max_cache_rows=longest // 2).submit(requests)


@IN_BOTH
def test_memory_is_given_back_between_requests_and_never_under_them(policy):
    requests = make_requests(prompts(3), Sampling(max_tokens=8))
    engine = Engine(policy, plan=TWO_FORWARD)
    drawn = []
    for _ in range(2):
        engine.submit(requests)
        with pytest.raises(InvalidInput, match="3 requests are being served"):
            engine.release_memory()
        finished = []
        while engine.num_requests:
            finished += engine.step().finished
        assert engine._cache.num_bytes
        engine.release_memory()
        assert not engine._cache.num_bytes
        drawn.append(finished)
    assert_same_rollouts(*drawn, policy)


def test_a_stop_string_that_is_a_special_token_ends_a_rollout():
    policy = HFPolicy.from_pretrained("tiny")
    (end,) = policy.eos_token_ids
    text = policy.tokenizer.convert_ids_to_tokens(end)
    sampling = Sampling(max_tokens=40, ignore_eos=True, stop=(text,), logit_bias={end: 4.0})
    requests = make_requests([tuple(policy.tokenizer("1+2=?\n")["input_ids"])] * 3, sampling)
    for rollout in run(policy, requests, TWO_FORWARD).values():
        assert (rollout.finish_reason, rollout.token_ids[-1]) == ("stop", end)
        assert rollout.token_ids.count(end) == 1
