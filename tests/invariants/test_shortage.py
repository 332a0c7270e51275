"""Memory that runs out in a step makes the batch smaller, and changes no token."""

import dataclasses
import logging
import os
import random
import subprocess
import sys

import pytest
import torch

from blockroll.errors import AuditError
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.chunks import LEAST_ROWS, MAX_PREFILL_ROWS, Bound
from blockroll.rollout.engine.scheduler import Scheduler
from blockroll.rollout.engine.shortage import is_shortage
from blockroll.types import Plan, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import adapted_policy, prompts, random_policy

PLAIN, TWO_FORWARD, FUSED = Plan(0), Plan(4), Plan(4, (0, 2, 4))
PLANS = pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
SAMPLING = Sampling(max_tokens=14)


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


class Scarce:
    """A device whose forwards have room for so many texts, with so many rows each.

    A forward of more has run its first layer and written its keys, and then its allocator raises.
    """

    def __init__(self, policy, *, texts: int = 1 << 30, rows: int = 1 << 30) -> None:
        self.texts, self.rows, self.num_raised = texts, rows, 0
        self.hook = policy.model.base_model.layers[-1].register_forward_pre_hook(self.meet)

    def meet(self, module, inputs) -> None:
        num_texts, num_rows, width = inputs[0].shape
        if num_texts > self.texts or num_rows > self.rows:
            self.num_raised += 1
            raise torch.OutOfMemoryError(f"Tried to allocate {num_texts * num_rows * width * 4} bytes.")

    def __enter__(self) -> "Scarce":
        return self

    def __exit__(self, *exception) -> None:
        self.hook.remove()


def finish(engine, requests=(), finished=None) -> dict:
    engine.submit(requests)
    finished = {} if finished is None else finished
    while engine.num_requests:
        ended = {rollout.request.request_id: rollout for rollout in engine.step().finished}
        assert finished.keys().isdisjoint(ended)
        finished |= ended
        engine.check_integrity()
    return finished


@PLANS
def test_a_batch_that_has_no_room_is_halved_until_it_has(policy, plan, caplog):
    """Prefill and decode alike: eight requests where three have room, and only their number changes."""
    requests = make_requests(prompts(11), SAMPLING)
    free = run(policy, requests, plan)
    with Scarce(policy, texts=3) as scarce, caplog.at_level(logging.INFO):
        engine = Engine(policy, plan=plan, max_batch_size=8)
        scarcely = finish(engine, requests)
        assert scarce.num_raised == 2  # 8 and 4 together
    assert_same_rollouts(free, scarcely, policy)
    said = [record for record in caplog.records if "memory ran out" in record.message]
    assert [record.levelname for record in said] == ["WARNING", "INFO"]
    assert "in a step of 8 requests, 8 of them joining: at most 4 run together" in said[0].message
    for words in ("Lower max_batch_size, or memory_fraction", "Tried to allocate"):
        assert words in said[0].message
    shortages = [rollout.stats.num_shortages for rollout in scarcely.values()]
    assert sum(shortages) == 8 + 4
    assert all(rollout.stats.num_shortages == 0 for rollout in free.values())


@PLANS
@pytest.mark.usefixtures("layout")
def test_requests_that_run_lose_nothing_when_room_is_taken_from_them(policy, plan):
    requests = make_requests(prompts(8), Sampling(max_tokens=30, ignore_eos=True))
    free = run(policy, requests, plan)
    engine, finished = Engine(policy, plan=plan), {}
    engine.submit(requests)
    for _ in range(3):
        engine.step()
    names = tuple(request.request_id for request in requests)
    with Scarce(policy, texts=5) as scarce:
        assert engine.step().commits == ()
        assert scarce.num_raised == 1
        assert {*engine._scheduler.running} == {*names[:4]}
        assert engine._scheduler.waiting == names[4:]
        finish(engine, finished=finished)
        assert scarce.num_raised == 1
    assert_same_rollouts(free, finished, policy)
    for name, rollout in free.items():
        if rollout.token_ids == finished[name].token_ids:
            assert finished[name].stats.num_forwards == rollout.stats.num_forwards


def test_graphs_go_with_the_memory_that_they_hold(policy):
    """What was made for forwards of a few shapes is given back too, and made anew."""
    requests = make_requests(prompts(6), SAMPLING)
    options = {"cache": "pages", "graphs": "buckets"}
    free = run(policy, requests, PLAIN, **options)
    engine = Engine(policy, plan=PLAIN, **options)
    engine.submit(requests)
    engine.step()
    engine.step()
    assert engine._forwards.num_shapes
    with Scarce(policy, texts=4):
        engine.step()
        assert engine._forwards.num_shapes == 0
        assert_same_rollouts(free, finish(engine), policy)


def test_those_that_join_wait_before_those_that_run_give_way(policy):
    """Four run; of four that join, two have room beside them."""
    requests = make_requests(prompts(8), Sampling(max_tokens=20, ignore_eos=True))
    free = run(policy, requests, PLAIN)
    engine = Engine(policy, plan=PLAIN, max_batch_size=8)
    engine.submit(requests[:4])
    engine.step()
    with Scarce(policy, texts=6) as scarce:
        engine.submit(requests[4:])
        engine.step()
        assert scarce.num_raised == 1
        assert engine._scheduler.running == ("r0", "r1", "r2", "r3", "r4", "r5")
        assert_same_rollouts(free, finish(engine), policy)


@PLANS
@pytest.mark.usefixtures("layout")
def test_a_request_without_room_alone_ends_with_numbers_and_the_others_go_on(policy, plan):
    others = make_requests(prompts(7), SAMPLING)
    (large,) = make_requests([(5,) * 60], SAMPLING)
    large = dataclasses.replace(large, request_id="large")
    free = run(policy, others, plan)
    with Scarce(policy, rows=50):
        engine = Engine(policy, plan=plan, max_batch_size=4)
        finished = finish(engine, [*others[:3], large, *others[3:]])
        failed = finished.pop("large")
        assert engine._scheduler.max_batch_size == 4  # it was what took the room
    assert (failed.finish_reason, failed.token_ids) == ("error", ())
    keys = 60 * policy.kv_shape.num_bytes
    assert failed.error.startswith("OutOfMemory: Tried to allocate ")
    assert f"behind 60 tokens (keys and values of {keys / 1000:.3g} kB), had no room" in failed.error
    assert "'large'" in failed.error
    assert_same_rollouts(free, finished, policy)


class ScarceRows(Scarce):
    """A device whose forwards have room for so many rows in all."""

    def meet(self, module, inputs) -> None:
        num_texts, num_rows, _ = inputs[0].shape
        if num_texts * num_rows > self.rows:
            self.num_raised += 1
            raise torch.OutOfMemoryError(f"Tried to allocate {num_texts * num_rows} rows.")


@pytest.fixture(scope="module")
def long_policy():
    return random_policy(max_position_embeddings=2048)


def long_prompt(length: int, *, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(range(4, 24)) for _ in range(length))


@PLANS
@pytest.mark.usefixtures("layout")
def test_a_long_prompt_is_tried_in_smaller_chunks_first(long_policy, plan, caplog):
    """Rows have room as 600 and not as 1200; beside others that run, and again behind them."""
    requests = make_requests([long_prompt(7), long_prompt(9, seed=1), long_prompt(1201, seed=2)], SAMPLING)
    again = dataclasses.replace(requests[2], request_id="again", prompt_ids=long_prompt(1300, seed=3))
    free = run(long_policy, [*requests, again], plan)
    with ScarceRows(long_policy, rows=600) as scarce, caplog.at_level(logging.INFO):
        engine = Engine(long_policy, plan=plan, max_batch_size=4)
        engine.submit(requests[:2])
        engine.step()
        finished = finish(engine, requests[2:])
        assert scarce.num_raised == 1
        assert engine._scheduler.max_batch_size == 4  # nobody waits for it
        finished |= finish(engine, [again])
        assert scarce.num_raised == 1  # the bound stays
    assert_same_rollouts(free, finished, long_policy)
    (said,) = [record for record in caplog.records if "memory ran out" in record.message]
    assert said.levelname == "WARNING"
    assert "in a prefill of 1200 rows: its chunks have 600 at most" in said.message
    assert finished["r2"].stats.num_shortages == 1
    assert finished["again"].stats.num_shortages == 0


def test_chunks_are_halved_down_to_the_least_and_the_request_ends_with_it_said(long_policy, caplog):
    large, small = make_requests([long_prompt(1201), long_prompt(30, seed=1)], SAMPLING)
    with ScarceRows(long_policy, rows=LEAST_ROWS - 1) as scarce, caplog.at_level(logging.INFO):
        engine = Engine(long_policy, plan=PLAIN)
        finished = finish(engine, [large])
        # 1200, 600, 300 and the least, which is tried again once the cache's memory is given back.
        assert scarce.num_raised == 5
        (failed,) = finished.values()
        assert failed.stats.num_shortages == 5
        assert "a chunk of 256 rows of its prefill alone, behind 1201 tokens" in failed.error
        assert engine._admission._alone == Bound(MAX_PREFILL_ROWS)  # it was what took the room
        assert finish(engine, [small])["r1"].error is None
    levels = [record.levelname for record in caplog.records if "in a prefill of" in record.message]
    assert levels == ["WARNING", "INFO", "INFO"]


def test_chunks_that_stay_as_large_would_be_noticed(long_policy, monkeypatch):
    monkeypatch.setattr(Bound, "at_most", lambda bound, num_rows: bound)
    engine = Engine(long_policy, plan=PLAIN)
    engine.submit(make_requests([long_prompt(1201)], SAMPLING))
    with ScarceRows(long_policy, rows=600):
        for _ in range(6):
            assert not engine.step().commits


def test_a_request_alone_is_tried_again_once_the_memory_of_others_is_given_back(policy):
    requests = make_requests(prompts(1), SAMPLING)
    free = run(policy, requests, PLAIN)
    engine = Engine(policy, plan=PLAIN)
    finish(engine, make_requests([(7,) * 30] * 6, SAMPLING, seed=3))
    assert engine._cache.num_bytes
    with Scarce(policy, texts=0) as scarce:
        engine.submit(requests)
        engine.step()
        assert (scarce.num_raised, engine._cache.num_bytes) == (1, 0)
        scarce.texts = 1
        assert_same_rollouts(free, finish(engine), policy)


def test_a_planner_is_told_of_no_step_that_had_no_room(policy):
    planner = PlansInTurn(PLAIN, TWO_FORWARD)
    engine = Engine(policy, plan=planner)
    engine.submit(make_requests(prompts(8), Sampling(max_tokens=30, ignore_eos=True)))
    with Scarce(policy, texts=3):
        finished = finish(engine)
    assert {size for _, size, _, _ in planner.observed} <= {1, 2, 3}
    assert sum(tokens for *_, tokens in planner.observed) < sum(
        len(each.token_ids) for each in finished.values()
    )


def test_room_that_comes_and_goes_changes_no_token(policy):
    """Random schedules: requests come, are aborted and go on, while the room changes at every step."""
    for seed, plan in enumerate((PLAIN, TWO_FORWARD, FUSED)):
        rng = random.Random(seed)
        requests = make_requests(prompts(14, seed=seed), SAMPLING, seed=seed)
        free = run(policy, requests, plan)
        waiting, finished = [*requests], {}
        engine = Engine(policy, plan=plan, max_batch_size=6)
        with Scarce(policy) as scarce:
            while waiting or engine.num_requests:
                if rng.random() < 0.4:
                    count = rng.randint(1, 4)
                    engine.submit(waiting[:count])
                    del waiting[:count]
                scarce.texts = rng.choice((1, 2, 3, 5, 8))
                for rollout in engine.step().finished:
                    finished[rollout.request.request_id] = rollout
                engine.check_integrity()
            assert scarce.num_raised
        assert not [rollout.error for rollout in finished.values() if rollout.error]
        assert_same_rollouts(free, finished, policy)


def test_a_request_that_is_put_back_and_forgotten_would_be_noticed(policy, monkeypatch):
    def forgets(scheduler, request_id):
        return scheduler.drop(request_id)

    monkeypatch.setattr(Scheduler, "preempt", forgets)
    engine = Engine(policy, plan=PLAIN)
    engine.submit(make_requests(prompts(8), Sampling(max_tokens=30, ignore_eos=True)))
    engine.step()
    with Scarce(policy, texts=3), pytest.raises(AssertionError, match="nowhere scheduled"):
        finish(engine)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("the size of tensor a must match the size of tensor b"), False),
        (AuditError("rows could not be written: the disk is out of memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_allocators_say_is_known_from_other_errors(error, is_one):
    assert is_shortage(error) == is_one


REALLY = """
import resource, torch
from pathlib import Path
torch.set_num_threads(1)
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import Plan, Sampling
from tests import models
from tests.engines import make_requests, run
models.SHAPE["vocab_size"] = 200_000
policy = models.random_policy(trained_drafts=4)
requests = make_requests([(7,) * 5, (9,) * 4] * 8, Sampling(max_tokens=3, ignore_eos=True))
free = run(policy, requests, Plan(0), max_batch_size=4)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 10_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
engine = Engine(policy, plan=Plan(0), max_batch_size=16)
engine.submit(requests)
tokens, shortages = {}, 0
while engine.num_requests:
    for rollout in engine.step().finished:
        assert rollout.error is None, rollout.error
        tokens[rollout.request.request_id] = rollout.token_ids
        shortages += rollout.stats.num_shortages
assert shortages, "there was room"
assert tokens == {name: rollout.token_ids for name, rollout in free.items()}
print(engine._scheduler.max_batch_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory of a process as Linux does")
def test_a_process_whose_memory_really_runs_out_goes_on():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(
        [sys.executable, "-c", REALLY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 16
    assert done.stderr.count("memory ran out in a step of") == 1
    assert "allocate" in done.stderr
