"""Forwards that raise, memory that is not there and interrupts, while pages are shared and evicted."""

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.page_memory import PageMemory
from blockroll.rollout.engine.cache.page_pool import PagePool
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.types import Plan
from tests.equality import assert_same_rollouts
from tests.invariants.test_engine_faults import (
    ERRORS,
    Expected,
    break_one_forward,
    finish,
    first_requests,
    interrupt_anywhere,
)
from tests.models import adapted_policy

pytestmark = pytest.mark.slow  # each fault once more, where pages are few
PLANS = [Plan(0), Plan(4), Plan(4, (0, 2, 4))]
LONGEST = 30 + 14 + 2 + 14  # tokens of the last texts that `Expected` asks for


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


@pytest.fixture(scope="module")
def expected(policy):
    """Of slots, to which nothing happens."""
    return {plan: Expected(policy, plan) for plan in PLANS}


def make_engine(policy, plan) -> Engine:
    """With room for little more than the longest text, so that requests are sent back."""
    rows = LONGEST + plan.rows_per_forward + 12
    return Engine(policy, plan=plan, max_batch_size=4, cache="pages", page_size=4, max_cache_rows=rows)


@pytest.mark.parametrize("plan", PLANS[1:], ids=lambda plan: plan.name)
def test_a_forward_that_raises_costs_no_page_and_no_token(policy, plan, expected):
    for number in (2, 11):
        error = ERRORS[number % len(ERRORS)]
        break_one_forward(lambda: make_engine(policy, plan), expected[plan], number, error)


def test_an_interrupt_at_any_call_changes_no_token_and_loses_no_page(policy, expected):
    interrupt_anywhere(lambda: make_engine(policy, PLANS[1]), expected[PLANS[1]], count=2)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS[:2], ids=lambda plan: plan.name)
def test_interrupts_at_many_calls_change_no_token_and_lose_no_page(policy, plan, expected):
    interrupt_anywhere(lambda: make_engine(policy, plan), expected[plan], count=40)


def interrupt_every_kind_of_change(policy) -> None:
    """Ctrl-C once in each method that counts pages, before it has counted."""
    for name in ("open", "open_new", "close", "keep", "drop"):
        engine = make_engine(policy, PLANS[0])
        engine.submit(first_requests())
        with pytest.MonkeyPatch.context() as patch:
            is_over = False
            real = getattr(PagePool, name)

            def interrupted(self, pages, real=real):
                nonlocal is_over
                if not is_over:
                    is_over = True
                    raise KeyboardInterrupt
                real(self, pages)

            patch.setattr(PagePool, name, interrupted)
            finish(engine)
            assert is_over, f"nothing has called {name}"


def test_counts_that_an_interrupt_leaves_wrong_are_made_anew(policy):
    interrupt_every_kind_of_change(policy)


def test_planted_counts_that_nobody_repairs_are_noticed(policy, monkeypatch):
    monkeypatch.setattr(PagedCache, "repair", lambda self: None)
    with pytest.raises(AssertionError):
        interrupt_every_kind_of_change(policy)


@pytest.mark.parametrize("name", ["allocate", "grow", "copy"])
def test_memory_that_cannot_be_had_changes_nothing(policy, expected, monkeypatch, name):
    """Each use of it in turn raises once: as nothing has changed before, the step can be repeated."""
    real, plan = getattr(PageMemory, name), PLANS[0]
    for number in (1, 2):
        count = 0

        def scarce(self, *arguments, number=number):
            nonlocal count
            count += 1
            if count == number:
                raise torch.OutOfMemoryError
            real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(PageMemory, name, scarce)
            engine = make_engine(policy, plan)
            first = finish(engine, first_requests())
        assert_same_rollouts(expected[plan].first, first, policy)
        if count < number:
            break
    assert count > 0
