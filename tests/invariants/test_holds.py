"""A choice that holds for several steps: when a planner is asked again, and what it is told of them."""

import dataclasses
import itertools

import pytest

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.plans import Choice
from blockroll.rollout.planning.candidates import candidate_plans
from blockroll.rollout.planning.planner import Planner
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_policy

PLAIN, TWO_FORWARD, HISTORY = Plan(0), Plan(3), Plan(3, drafter="history")
HELD = 4


class Holding:
    """Chooses one plan for so many steps at a time."""

    name = "holding"
    speedups = (1.0, 1.0)

    def __init__(self, plan, num_steps=HELD):
        self.candidates = (PLAIN, plan)
        self.plan, self.num_steps = plan, num_steps
        self.asked, self.told, self.events = [], [], []

    def choose(self, step):
        self.asked.append(step)
        self.events.append("asked")
        return Choice(plan=self.plan, num_steps=self.num_steps)

    def observe(self, taken):
        self.told.append(taken)
        self.events.append("told")


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def requests_of(*lengths):
    requests = make_requests(prompts(len(lengths)), Sampling(ignore_eos=True))
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=length))
        for request, length in zip(requests, lengths, strict=True)
    ]


def test_a_planner_is_asked_at_joins_ends_and_where_its_choice_ends(policy):
    """Two texts of 6 and 11 tokens, and a third that takes the place of the first."""
    planner, ticks = Holding(PLAIN), itertools.count()
    engine = Engine(policy, plan=planner, max_batch_size=2, clock=lambda: float(next(ticks)))
    engine.submit(requests_of(6, 11, 3))
    asked_at, num_steps = [], 0
    while engine.num_requests:
        before = len(planner.asked)
        engine.step()
        if len(planner.asked) > before:
            asked_at.append((num_steps, planner.asked[-1].batch_size, planner.asked[-1].num_joining))
        num_steps += 1
    # The first choice ends behind step 3, the first text behind step 5; the third has steps 6 to 8.
    assert asked_at == [(0, 2, 2), (4, 2, 0), (6, 2, 1), (9, 1, 0)]
    assert [len(taken.step_seconds) for taken in planner.told] == [3, 2, 3, 2]  # the first came by a prefill
    assert [taken.num_tokens for taken in planner.told] == [6, 4, 6, 2]
    assert [taken.batch_size for taken in planner.told] == [2, 2, 2, 1]


@pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD, HISTORY], ids=lambda plan: plan.name)
def test_all_steps_are_told_once_and_before_the_next_question(policy, plan):
    planner = Holding(plan)
    planner.candidates = (PLAIN, TWO_FORWARD, HISTORY)
    rollouts = run(policy, requests_of(5, 9, 14, 20, 2, 8), planner, max_batch_size=3)
    assert not any(pair == ("told", "told") for pair in itertools.pairwise(planner.events))
    assert all(1 <= len(taken.step_seconds) <= HELD for taken in planner.told)
    num_untold = 0 if plan == HISTORY else 3  # of the first step: mask rows and plain have it of the prefill
    steps = sum(taken.batch_size * len(taken.step_seconds) for taken in planner.told)
    assert steps == sum(rollout.stats.steps_by_plan[0][1] for rollout in rollouts.values()) - num_untold
    if plan == PLAIN:
        assert sum(taken.num_tokens for taken in planner.told) == steps


def test_texts_do_not_depend_on_how_long_a_choice_holds(policy):
    requests = requests_of(5, 9, 14, 20, 2, 8)
    once, long = (run(policy, requests, Holding(TWO_FORWARD, held), max_batch_size=3) for held in (1, 50))
    assert_same_rollouts(once, long, policy)


def test_what_a_choice_took_is_told_with_the_first_steps_that_are(policy):
    """A step that a prefill began is not told, and the time of its choice is."""
    planner, ticks = Holding(PLAIN), itertools.count()
    engine = Engine(policy, plan=planner, max_batch_size=2, clock=lambda: float(next(ticks)))
    engine.submit(requests_of(9, 9))
    engine.step()
    assert not planner.told
    while engine.num_requests:
        engine.step()
    assert all(taken.choice_seconds > 0 for taken in planner.told)


def test_a_step_that_raises_is_told_of_by_none(policy, monkeypatch):
    planner = Holding(PLAIN)
    engine = Engine(policy, plan=planner, max_batch_size=2)
    engine.submit(requests_of(12, 12))
    engine.step()
    engine.step()
    forward = policy.verify_logits
    monkeypatch.setattr(policy, "verify_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(policy, "verify_logits", forward)
    finished = []
    while engine.num_requests:
        finished += engine.step().finished
    assert [len(rollout.token_ids) for rollout in finished] == [12, 12]
    assert sum(taken.num_tokens for taken in planner.told) == 2 * (12 - 1)


def test_a_planner_that_raises_is_asked_again_by_the_next_step(policy, monkeypatch):
    """What held before it was asked holds no longer, also where the batch is as large as it was."""
    planner = Holding(PLAIN, num_steps=100)
    engine = Engine(policy, plan=planner, max_batch_size=3)
    engine.submit(requests_of(12, 12))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(planner, "choose", lambda step: 1 / 0)
        (third,) = requests_of(12, 12, 12)[2:]
        engine.submit([third])
        with pytest.raises(ZeroDivisionError):
            engine.step()
    engine.abort([third.request_id])
    engine.step()
    assert [step.batch_size for step in planner.asked] == [2, 2]


def test_a_clock_that_stands_still_stops_no_planner(policy):
    engine = Engine(policy, plan=Planner(candidate_plans(policy)), max_batch_size=2, clock=lambda: 1.0)
    engine.submit(requests_of(12, 12))
    finished = []
    while engine.num_requests:
        finished += engine.step().finished
    assert [len(rollout.token_ids) for rollout in finished] == [12, 12]
