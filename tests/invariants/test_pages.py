"""A cache in pages under pressure: whatever is shared, copied, evicted and sent back, no token changes."""

import dataclasses
import random

import pytest
import torch

from blockroll.config import RolloutConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.page_pool import PagePool
from blockroll.rollout.engine.cache.paged_text import TableWrites
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import HISTORY, Plan, Request, Sampling
from tests.engines import PlansInTurn, make_requests
from tests.equality import assert_same_rollouts
from tests.models import random_policy

PLANS = {
    "plain": Plan(0),
    "two_forward": Plan(4),
    "fused": Plan(4, (0, 2, 4)),
    "history": Plan(4, drafter=HISTORY),
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def text(length: int, *, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(range(4, 24)) for _ in range(length))


def in_pages(policy, plan, *, max_rows: int = 0, **options) -> Engine:
    return Engine(policy, plan=plan, cache="pages", page_size=PAGE_SIZE, max_cache_rows=max_rows, **options)


def rows_of_one(plan: Plan, longest: int) -> int:
    """Of the smallest cache that serves texts of so many tokens."""
    return -(-(longest + plan.rows_per_forward) // PAGE_SIZE) * PAGE_SIZE


def finish(engine: Engine) -> list:
    finished = []
    while engine.num_requests:
        finished += engine.step().finished
        engine.check_integrity()
    return finished


def groups(*, count: int, size: int, seed: int) -> list[Request]:
    """Groups of one prompt each, of lengths on and beside the edges of pages; half of them begin alike."""
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        root = text(20, seed=1)[: rng.choice((0, 16, 18))]
        prompts += [(*root, *text(rng.randrange(1, 14), seed=seed * 97 + index))] * size
    sampling = Sampling(max_tokens=rng.randrange(6, 20), ignore_eos=True)
    return make_requests(prompts, sampling, seed=seed)


def finish_all(engine: Engine, requests) -> list:
    engine.submit(requests)
    return finish(engine)


# Under pressure


@EACH_PLAN
def test_requests_that_are_sent_back_go_on_with_their_coins_and_drafts(policy, plan):
    send_back(policy, plan)


def send_back(policy, plan) -> None:
    requests = groups(count=4, size=3, seed=3)
    free = finish_all(Engine(policy, plan=plan, cache="slots"), requests)
    longest = max(len(each.prompt_ids) + each.sampling.max_tokens for each in requests)
    for factor in (1, 2):
        engine = in_pages(policy, plan, max_rows=factor * rows_of_one(plan, longest))
        rollouts = finish_all(engine, requests)
        assert_same_rollouts(free, rollouts, policy)
        assert factor > 1 or sum(each.stats.num_preempted for each in rollouts) > 0
        if plan.drafter != HISTORY:  # which drafts from what others have written by then
            assert num_forwards(free) == num_forwards(rollouts)


def num_forwards(rollouts) -> dict[str, int]:
    return {each.request.request_id: each.stats.num_forwards for each in rollouts}


def serve_at_random(policy, plan, *, num_steps: int, seed: int, **options) -> None:
    """Groups come, end early, outgrow the pages; weights count as changed, and prefixes are forgotten."""
    rng = random.Random(f"{plan.name} {seed}")
    longest = 34 + 20
    rows = 2 * rows_of_one(plan, longest)
    engine = in_pages(policy, plan, max_rows=rows, max_batch_size=7, **options)
    finished, submitted, aborted = [], [], set()
    for step in range(num_steps):
        if engine.num_requests < 9:
            new = groups(count=rng.randrange(1, 3), size=rng.randrange(1, 5), seed=step)
            if rng.random() < 0.2:
                new = [dataclasses.replace(each, sampling=Sampling(max_tokens=1)) for each in new]
            new = [dataclasses.replace(each, request_id=f"{step} {each.request_id}") for each in new]
            engine.submit(new)
            submitted += new
        if rng.random() < 0.05:
            ended = engine.abort([rng.choice(submitted).request_id])
            aborted |= {each.request.request_id for each in ended}
        if rng.random() < 0.02:
            engine.change_weights(0)
        if rng.random() < 0.02:
            engine.recompute_cache()
        if rng.random() < 0.05:
            engine.forget_prefixes()
        finished += engine.step().finished
        engine.check_integrity()
    finished += finish(engine)
    wanted = [each for each in submitted if each.request_id not in aborted]
    assert {each.request_id for each in wanted} == {each.request.request_id for each in finished}
    assert sum(each.stats.num_preempted for each in finished) > num_steps // 50
    free = finish_all(Engine(policy, plan=plan, cache="slots"), wanted)
    assert_same_rollouts(free, finished, policy)


@EACH_PLAN
def test_random_schedules_under_pressure_change_no_token(policy, plan):
    serve_at_random(policy, plan, num_steps=120, seed=0)


@pytest.mark.slow
@EACH_PLAN
def test_ten_thousand_steps_in_all_under_pressure_change_no_token(policy, plan):
    serve_at_random(policy, plan, num_steps=2_500, seed=1)


def freed_twice(monkeypatch) -> None:
    close = PagePool.close

    def wrong(self, pages):
        pages = list(pages)
        before = self.num_free
        close(self, pages)
        if self.num_free > before:
            self._free.append(self._free[-1])

    monkeypatch.setattr(PagePool, "close", wrong)


def written_by_two(monkeypatch) -> None:
    monkeypatch.setattr(TableWrites, "_find_copied", lambda self, num_texts: [[] for _ in self._texts])


def never_evicted(monkeypatch) -> None:
    monkeypatch.setattr(PagedCache, "_drop", lambda self, source: self._kept.pop(source))


def coins_served_twice(monkeypatch) -> None:
    def wrong(self, *, keeps_proposal):
        self._num_preempted += 1
        self._num_forwards = 0

    monkeypatch.setattr(RunningRequest, "count_preemption", wrong)


def drafts_left_behind(monkeypatch) -> None:
    count = RunningRequest.count_preemption
    monkeypatch.setattr(
        RunningRequest, "count_preemption", lambda self, *, keeps_proposal: count(self, keeps_proposal=False)
    )


@pytest.mark.parametrize(
    "plant", [freed_twice, written_by_two, never_evicted, coins_served_twice, drafts_left_behind]
)
def test_planted_bugs_of_pages_and_preemption_are_noticed(policy, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        send_back(policy, PLANS["fused"])


def test_a_group_that_exhausts_the_pages_lets_its_later_members_wait_in_order(policy):
    plan = PLANS["plain"]
    requests = make_requests([text(21, seed=5)] * 8, Sampling(max_tokens=9, ignore_eos=True))
    engine = in_pages(policy, plan, max_rows=48)
    engine.submit(requests)
    order: list[str] = []
    widest = 0
    while engine.num_requests:
        commits = engine.step().commits
        widest = max(widest, len(commits))
        order += [each.request_id for each in commits if each.request_id not in order]
        engine.check_integrity()
    assert 1 < widest < 8
    assert sorted(order[:widest]) == [f"r{index}" for index in range(widest)]
    assert order[widest:] == [f"r{index}" for index in range(widest, 8)]


def test_a_request_that_alone_fills_the_cache_is_served_beside_what_is_kept(policy):
    plan = PLANS["fused"]
    engine = in_pages(policy, plan, max_rows=rows_of_one(plan, 40))
    for seed in range(4):
        (rollout,) = finish_all(
            engine, make_requests([text(28, seed=seed // 2)], Sampling(max_tokens=12, ignore_eos=True))
        )
        assert (rollout.finish_reason, len(rollout.token_ids)) == ("length", 12)
        assert (rollout.stats.num_reused > 0) == (seed % 2 == 1)


def test_under_a_planner_requests_that_are_sent_back_are_drafted_for_anew(policy):
    planner = PlansInTurn(PLANS["fused"], PLANS["plain"], PLANS["fused"], Plan(2, (0, 2)))
    requests = groups(count=4, size=3, seed=3)
    longest = max(len(each.prompt_ids) + each.sampling.max_tokens for each in requests)
    rows = rows_of_one(PLANS["fused"], longest)
    engine = in_pages(policy, planner, max_rows=rows)
    rollouts = finish_all(engine, requests)
    assert sum(each.stats.num_preempted for each in rollouts) > 0
    assert all(len(each.token_ids) == each.request.sampling.max_tokens for each in rollouts)


def test_rows_that_are_not_valid_may_hold_anything(policy):
    """Shared parts of pages, pages taken and not yet written, and those that are free."""
    plan = PLANS["two_forward"]
    requests = groups(count=3, size=3, seed=8)
    clean = finish_all(in_pages(policy, plan), requests)
    engine = in_pages(policy, plan, max_rows=300)
    engine.submit(requests)
    poisoned = []
    while engine.num_requests:
        engine._cache.fill_stale(1e4)
        poisoned += engine.step().finished
    assert_same_rollouts(clean, poisoned, policy)


def test_a_request_that_fails_leaves_no_nan_in_any_page(policy):
    policy = random_policy()
    weight = policy.model.get_input_embeddings().weight
    prompt = (*[each for each in text(21, seed=1) if each != 7], 7)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    engine = in_pages(policy, PLANS["plain"], max_rows=300)
    with torch.no_grad():
        weight[7] = float("nan")
    rollouts = finish_all(engine, make_requests([(*prompt, 9)] * 3 + [text(9, seed=2)], sampling))
    assert [each.finish_reason for each in rollouts].count("error") >= 3
    assert all(torch.isfinite(tensor).all() for tensor in engine._cache.memory.tensors)
    assert engine._cache.longest_prefix((*prompt, 9, 9))[1] == 0


# At the door


def test_a_request_larger_than_the_cache_is_refused_with_numbers(policy):
    plan = PLANS["fused"]
    engine = in_pages(policy, plan, max_rows=64)
    (request,) = make_requests([text(40, seed=1)], Sampling(max_tokens=20))
    with pytest.raises(InvalidInput, match=r"a text of 60 tokens, and the cache has room for 44"):
        engine.submit([request])


@pytest.mark.parametrize("page_size", [0, 12, 2048, -4])
def test_a_page_size_that_is_no_power_of_two_is_refused_with_numbers(policy, page_size):
    with pytest.raises(InvalidInput, match=f"page_size is {page_size}; it must be a power of two from 1 to"):
        Engine(policy, plan=Plan(0), cache="pages", page_size=page_size)
    with pytest.raises(ConfigError, match="page_size"):
        RolloutConfig(page_size=page_size)


def test_a_cache_of_less_than_a_page_or_of_another_layout_is_refused(policy):
    with pytest.raises(InvalidInput, match="10 rows, less than a page of 16"):
        Engine(policy, plan=Plan(0), cache="pages", max_cache_rows=10)
    with pytest.raises(InvalidInput, match="'bags'; allowed are 'auto', 'slots' and 'pages'"):
        Engine(policy, plan=Plan(0), cache="bags")
