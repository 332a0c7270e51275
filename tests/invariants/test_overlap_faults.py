"""Faults beside a step in flight, and planted bugs of steps that are read late."""

import dataclasses

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.paged_window import PagedWindow
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.launched import Beginning, Launched
from blockroll.rollout.engine.outcome import Unread
from blockroll.types import Plan, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.invariants.test_engine_faults import (
    Expected,
    Interrupted,
    break_one_forward,
    by_name,
    finish,
    first_requests,
    interrupt_anywhere,
)
from tests.invariants.test_engine_faults import serve as serve_and_abort
from tests.invariants.test_overlap import (
    EACH_PLAN,
    OPTIONS,
    PLANS,
    assert_as_in_turn,
    check_weights_between_steps,
    counted_launches,
    forward_of,
    in_pages,
)
from tests.invariants.test_pages import groups, num_forwards, rows_of_one, serve_at_random
from tests.invariants.test_waits import torch_policy
from tests.models import EOS_ID, adapted_policy, prompts


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


@pytest.fixture
def launches(monkeypatch):
    return counted_launches(monkeypatch)


# NaN


def spoil_the_third_forward(policy, plan, monkeypatch):
    name, count = forward_of(plan), 0
    verify = getattr(policy, name)

    def spoiled(*given):
        nonlocal count
        count += 1
        rows = verify(*given)
        if count == 3:
            with torch.inference_mode():
                (rows.verify_logits_BLV if plan.levels else rows)[1, -1, 3] = torch.nan
        return rows

    monkeypatch.setattr(policy, name, spoiled)


@EACH_PLAN
def test_nan_in_one_row_fails_its_request_alone(policy, plan, monkeypatch):
    requests = make_requests(prompts(4), Sampling(max_tokens=12, ignore_eos=True))
    untouched = finish(in_pages(policy, plan, "off"), requests)
    spoil_the_third_forward(policy, plan, monkeypatch)
    engine = in_pages(policy, plan)
    late = finish(engine, requests)
    failed = late.pop("r1")
    assert failed.finish_reason == "error"
    assert "NonFiniteLogits: verify logits" in failed.error
    assert failed.token_ids == untouched["r1"].token_ids[: len(failed.token_ids)]
    assert_same_rollouts({name: untouched[name] for name in late}, late, policy)


def serve_what_ends_in_nan(plan) -> None:
    """Nothing follows an end token: forwards in turn never meet it, a step too many does, and gives NaN."""
    policy = torch_policy()
    requests = make_requests([*prompts(9), *prompts(3)], Sampling(max_tokens=14))
    want = finish(in_pages(policy, plan, "off"), requests)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[EOS_ID] = torch.nan
    engine = in_pages(policy, plan)
    got = finish(engine, requests)
    # Its rows are nobody's: 0 * NaN would reach whoever has the pages next.
    assert_same_rollouts(want, got, torch_policy())
    assert sum(each.finish_reason == "stop" for each in got.values()) > 3
    assert all(torch.isfinite(tensor).all() for tensor in engine._cache.memory.tensors)


def test_nan_in_a_step_too_many_reaches_nobody():
    serve_what_ends_in_nan(Plan(0))


def test_planted_nan_of_a_step_too_many_that_nobody_looks_for_is_noticed(monkeypatch):
    read = Unread.read
    monkeypatch.setattr(Unread, "read", lambda self: dataclasses.replace(read(self), not_finite=frozenset()))
    with pytest.raises(AssertionError):
        serve_what_ends_in_nan(Plan(0))


# Under pressure, faults and interrupts


@EACH_PLAN
def test_pages_that_run_out_keep_steps_in_turn_and_change_no_token(policy, plan, launches):
    requests = groups(count=4, size=3, seed=3)
    free = finish(Engine(policy, plan=plan, cache="slots"), requests)
    launches.clear()
    longest = max(len(each.prompt_ids) + each.sampling.max_tokens for each in requests)
    late = finish(in_pages(policy, plan, max_cache_rows=2 * rows_of_one(plan, longest)), requests)
    assert_same_rollouts(free, late, policy)
    assert sum(each.stats.num_preempted for each in late.values()) > 0
    assert num_forwards(free.values()) == num_forwards(late.values())
    assert launches["behind"] > 0 < launches["alone"]


@EACH_PLAN
def test_random_schedules_change_no_token(policy, plan, launches):
    serve_at_random(policy, plan, num_steps=80, seed=2, overlap="on")
    assert launches["behind"] > 5


@pytest.mark.slow
@EACH_PLAN
def test_thousands_of_steps_at_random_change_no_token(policy, plan):
    serve_at_random(policy, plan, num_steps=1_500, seed=3, overlap="on")


@pytest.fixture(scope="module")
def expected(policy):
    return {plan: Expected(policy, plan) for plan in PLANS.values()}


def tight(policy, plan) -> Engine:
    return in_pages(policy, plan, max_batch_size=4, max_cache_rows=2 * rows_of_one(plan, 60))


@EACH_PLAN
def test_a_forward_that_raises_behind_a_step_costs_no_token(policy, plan, expected):
    for number, error in ((5, RuntimeError), (8, torch.OutOfMemoryError), (13, KeyboardInterrupt)):
        break_one_forward(lambda: tight(policy, plan), expected[plan], number, error)


def serve_to_the_end(engine: Engine, interrupted: Interrupted) -> dict:
    """Nothing is aborted: a fused text that goes on elsewhere starts with other drafts."""
    engine.submit(first_requests())
    finished = {}
    while engine.num_requests:
        finished |= by_name(interrupted.run(engine.step).finished)
    return finished


def interrupt_tight_engines(policy, plan, expected, *, count: int) -> None:
    serve = serve_to_the_end if plan.levels else serve_and_abort
    interrupt_anywhere(lambda: tight(policy, plan), expected, count=count, serve=serve)


@EACH_PLAN
def test_an_interrupt_at_any_call_changes_no_token(policy, plan, expected):
    interrupt_tight_engines(policy, plan, expected[plan], count=3)


@pytest.mark.slow
@EACH_PLAN
def test_interrupts_at_many_calls_change_no_token(policy, plan, expected):
    interrupt_tight_engines(policy, plan, expected[plan], count=24)


# Planted


def rows_by_slot(monkeypatch):
    monkeypatch.setattr(Launched, "rows_of", lambda self, batch: [*range(len(batch))])


def lengths_not_advanced(monkeypatch):
    make = PagedWindow.of.__func__
    monkeypatch.setattr(PagedWindow, "of", classmethod(lambda cls, *given: make(cls, *given[:5])))


def begun_otherwise(monkeypatch, change):
    make = Beginning.of.__func__

    def wrong(cls, batch, device, behind):
        begin = make(cls, batch, device, behind)
        return begin if behind is None else dataclasses.replace(begin, **change(begin))

    monkeypatch.setattr(Beginning, "of", classmethod(wrong))


def attempts_not_advanced(monkeypatch):
    begun_otherwise(monkeypatch, lambda begin: {"attempts_B": begin.attempts_B - 2})


def positions_not_advanced(monkeypatch):
    begun_otherwise(monkeypatch, lambda begin: {"positions_B": begin.positions_B - begin.behind.ahead.rows_B})


def text_without_its_last_token(monkeypatch):
    begun_otherwise(monkeypatch, lambda begin: {"between_BN": begin.between_BN[:, :0]})


def pages_not_taken_beforehand(monkeypatch):
    take = PagedCache._take
    monkeypatch.setattr(
        PagedCache,
        "_take",
        lambda self, texts, lengths, num_rows: take(self, texts, lengths, [1 for _ in num_rows]),
    )


@pytest.mark.parametrize(
    ("plant", "plan"),
    [
        (rows_by_slot, "plain"),
        (rows_by_slot, "two_forward"),
        (lengths_not_advanced, "plain"),
        (lengths_not_advanced, "two_forward"),
        (attempts_not_advanced, "two_forward"),
        (positions_not_advanced, "plain"),
        (positions_not_advanced, "two_forward"),
        (text_without_its_last_token, "plain"),
        (pages_not_taken_beforehand, "plain"),
    ],
)
def test_planted_bugs_are_noticed(policy, monkeypatch, plant, plan):
    options = OPTIONS["penalties"] if plant is text_without_its_last_token else {}
    requests = make_requests(prompts(8), Sampling(max_tokens=18, **options))
    assert_as_in_turn(policy, PLANS[plan], requests)
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        assert_as_in_turn(policy, PLANS[plan], requests)


def test_planted_attempts_of_a_dropped_step_are_noticed(monkeypatch):
    drop = BareEngine._drop_in_flight

    def counted(self):
        for running in () if self._in_flight is None else self._in_flight.step.batch:
            running._num_forwards += 2
        drop(self)

    monkeypatch.setattr(BareEngine, "_drop_in_flight", counted)
    with pytest.raises(AssertionError):
        check_weights_between_steps(PLANS["two_forward"])


def test_planted_a_step_that_outlives_its_weights_is_noticed(monkeypatch):
    """Tokens of the old weights behind those of the new, under their version."""
    change = BareEngine.change_weights

    def careless(self, version):
        kept, self._in_flight = self._in_flight, None
        change(self, version)
        self._in_flight = kept

    monkeypatch.setattr(BareEngine, "change_weights", careless)
    with pytest.raises(AssertionError):
        check_weights_between_steps(PLANS["plain"])
