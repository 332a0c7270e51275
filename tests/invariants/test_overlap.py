"""Steps that are queued before the one before is read: texts, counts and ends are those of steps in turn."""

import dataclasses
from collections import Counter

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels import transfer
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.outcome import Unread
from blockroll.rollout.engine.plans import Choice
from blockroll.rollout.engine.step import Decoder
from blockroll.types import HISTORY, Plan, Sampling
from tests.engines import PlansInTurn, make_requests
from tests.equality import assert_same_rollouts, by_id
from tests.invariants.test_engine_faults import Breaking, finish
from tests.invariants.test_pages import text
from tests.invariants.test_waits import NoFives, assert_one_wait, torch_policy
from tests.models import adapted_policy, prompts
from tests.recurrent_policy import RecurrentPolicy
from tests.waits import Waits

PLANS = {"plain": Plan(0), "two_forward": Plan(4), "fused": Plan(4, (0, 2, 4))}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
OPTIONS = {
    "alone": {},
    "greedy": {"temperature": 0},
    "top_p": {"top_p": 0.9, "logit_bias": {5: 1.0}},
    "min_tokens": {"min_tokens": 4},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "bad_words_ids": ((5,), (6, 7))},
    "stop": {"stop": ("fg", "k")},
}


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


def letters(token_ids) -> str:
    return "".join(chr(97 + token_id) for token_id in token_ids)


def in_pages(policy, plan, overlap="on", **options) -> Engine:
    options = {"max_batch_size": 5, "page_size": 4, "decode": letters, **options}
    return Engine(policy, plan=plan, cache="pages", overlap=overlap, **options)


@pytest.fixture
def launches(monkeypatch):
    return counted_launches(monkeypatch)


def counted_launches(monkeypatch) -> Counter:
    """How many steps were launched behind one that was not read, and how many were not."""
    counted: Counter = Counter()
    launch = Decoder.launch

    def counting(self, *arguments, behind=None, **options):
        counted["alone" if behind is None else "behind"] += 1
        return launch(self, *arguments, behind=behind, **options)

    monkeypatch.setattr(Decoder, "launch", counting)
    return counted


def assert_as_in_turn(policy, plan, requests, **options) -> dict:
    """Texts and all that is counted of each are those of an engine whose steps take turns."""
    in_turn = finish(in_pages(policy, plan, "off", **options), requests)
    late = finish(in_pages(policy, plan, **options), requests)
    ties = assert_same_rollouts(in_turn, late, policy)
    for name in late.keys() - ties:
        assert without_prefill(late[name].stats) == without_prefill(in_turn[name].stats), name
    return late


def without_prefill(stats):
    """What the steps of a request count: whose rows it takes over hangs on when it joins."""
    return dataclasses.replace(stats, num_prefilled=0, num_reused=0, num_preempted=0)


@EACH_PLAN
@pytest.mark.parametrize("options", OPTIONS)
def test_texts_and_counts_are_those_of_steps_in_turn(policy, plan, options, launches):
    """More requests than slots, which end anywhere: at end tokens, at strings, at their lengths."""
    requests = [
        dataclasses.replace(make_requests([prompt], sampling)[0], request_id=f"r{row}", seed=row)
        for row, prompt in enumerate(prompts(14))
        for sampling in [Sampling(max_tokens=4 if row % 5 == 0 else 30, **OPTIONS[options])]
    ]
    late = assert_as_in_turn(policy, plan, requests)
    assert {each.finish_reason for each in late.values()} == {"stop", "length"}
    # Drafts behind a text that is not there yet would break its rules: such steps take turns.
    assert (launches["behind"] > 5) == (plan.num_drafts == 0 or options != "penalties")


def forward_of(plan) -> str:
    """The method of a policy that verifies."""
    return "fused_rows" if plan.levels else "verify_logits"


@EACH_PLAN
def test_the_next_forward_is_queued_before_a_step_is_read(policy, plan, monkeypatch):
    events = []
    name = forward_of(plan)
    verify, read = getattr(policy, name), Unread.read
    monkeypatch.setattr(policy, name, lambda *given: events.append("forward") or verify(*given))
    monkeypatch.setattr(Unread, "read", lambda self: events.append("read") or read(self))
    engine = in_pages(policy, plan)
    engine.submit(make_requests(prompts(4), Sampling(max_tokens=40, ignore_eos=True)))
    engine.step()
    for _ in range(3):
        events.clear()
        assert len(engine.step().commits) == 4
        assert events == ["forward", "read"]
        assert engine._in_flight is not None
    off = in_pages(policy, plan, "off")
    off.submit(make_requests(prompts(4), Sampling(max_tokens=40, ignore_eos=True)))
    off.step()
    assert off._in_flight is None


@EACH_PLAN
@pytest.mark.parametrize("options", ["alone", "top_p", "penalties"])
def test_a_step_still_waits_once_and_behind_the_next_forward(plan, options, monkeypatch):
    monkeypatch.setattr(transfer, "is_free", lambda device: False)
    policy = torch_policy()
    engine = in_pages(policy, plan, "auto")
    engine.submit(make_requests(prompts(4), Sampling(max_tokens=40, ignore_eos=True, **OPTIONS[options])))
    for _ in range(3):
        engine.step()
    for _ in range(3):
        with Waits() as waits:
            engine.step()
        assert_one_wait(waits)
        assert waits.num_sends <= 7, waits.sends


def reached(value, seen) -> list:
    """The tensors that an object holds, by its fields and those of what they hold."""
    if id(value) in seen or isinstance(value, type | HFPolicy | Engine | PagedCache):
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict | list | tuple):
        held = [*value.values()] if isinstance(value, dict) else [*value]
    else:
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        held = [getattr(value, name) for name in names if hasattr(value, name)]
    return [tensor for each in held for tensor in reached(each, seen)]


@pytest.mark.parametrize("plan", [PLANS["plain"], PLANS["two_forward"]], ids=lambda plan: plan.name)
def test_a_step_in_flight_holds_no_row_over_the_vocabulary(policy, plan):
    """Beside those of the step behind it they would double what a step takes."""
    engine = in_pages(policy, plan)
    engine.submit(make_requests(prompts(4), Sampling(max_tokens=40, ignore_eos=True)))
    engine.step()
    tensors = reached(engine._in_flight, set())
    assert len(tensors) > 5
    assert not [
        each.shape for each in tensors if each.untyped_storage().nbytes() >= 4 * 4 * policy.vocab_size
    ]


# No step too many, and what becomes of one


def count_forwards(policy, requests, overlap, **options) -> int:
    with Breaking(policy, 0, RuntimeError) as counting:
        finish(in_pages(policy, Plan(0), overlap, **options), requests)
    return counting.count


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_an_end_that_is_certain_costs_no_step_too_many(policy, max_tokens):
    requests = make_requests(prompts(5), Sampling(max_tokens=max_tokens, ignore_eos=True))
    assert count_forwards(policy, requests, "on") == count_forwards(policy, requests, "off")


@EACH_PLAN
def test_a_batch_whose_requests_all_end_in_one_step_leaves_nothing(policy, plan, launches):
    """At a token that nobody foresaw: the step too many is dropped, and the engine is idle."""
    options = {"max_tokens": 12, "ignore_eos": True}
    (request,) = make_requests([(5, 6, 7)], Sampling(**options))
    (alone,) = finish(in_pages(policy, plan, "off"), [request]).values()
    ends = Sampling(**options, stop_token_ids=(alone.token_ids[7],))
    requests = [dataclasses.replace(request, sampling=ends, request_id=f"r{index}") for index in range(4)]
    engine = in_pages(policy, plan)
    rollouts = finish(engine, requests)
    assert launches["behind"] > 0
    assert {each.finish_reason for each in rollouts.values()} == {"stop"}
    assert len({each.token_ids for each in rollouts.values()}) == 1
    assert (engine.num_requests, engine._in_flight) == (0, None)
    assert_as_in_turn(policy, plan, requests)


@EACH_PLAN
def test_abort_gives_what_was_committed_and_leaves_others_their_step(policy, plan):
    requests = make_requests(prompts(4), Sampling(max_tokens=24, ignore_eos=True))
    untouched = finish(in_pages(policy, plan, "off"), requests)
    for num_aborted in (1, 4):
        given = {}
        for overlap in ("off", "on"):
            engine = in_pages(policy, plan, overlap)
            engine.submit(requests)
            for _ in range(3):
                engine.step()
            given[overlap] = engine.abort([f"r{index}" for index in range(num_aborted)])
            assert overlap == "off" or (engine._in_flight is None) == (num_aborted == 4)
            rest = finish(engine)
        assert_same_rollouts(given["off"], given["on"], policy)
        assert all(each.token_ids for each in given["on"])
        assert_same_rollouts({name: untouched[name] for name in rest}, rest, policy)


def update_weights(plan, overlap) -> list:
    """Texts of one engine whose weights change between two of its calls, twice."""
    policy = adapted_policy()
    engine = in_pages(policy, plan, overlap)
    engine.submit(make_requests(prompts(4), Sampling(max_tokens=16, ignore_eos=True)))
    finished = []
    for call in range(100):
        finished += engine.step().finished
        engine.check_integrity()
        if call in (1, 4):
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter.mul_(1.1)
            engine.change_weights(engine.policy_version + 1)
            assert engine._in_flight is None
            if call == 4:
                engine.recompute_cache()
    assert not engine.num_requests
    return finished


@EACH_PLAN
def test_a_step_in_flight_is_decoded_again_under_new_weights(plan):
    check_weights_between_steps(plan)


def check_weights_between_steps(plan) -> None:
    want, got = by_id(update_weights(plan, "off")), by_id(update_weights(plan, "on"))
    assert want.keys() == got.keys()
    for name, rollout in want.items():
        assert {*rollout.policy_versions} == {0, 1, 2} or plan.num_drafts
        assert rollout.token_ids == got[name].token_ids
        assert rollout.policy_versions == got[name].policy_versions
        assert rollout.stats == got[name].stats


# What keeps turns


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (Plan(0), {"constraint": NoFives()}),
        (Plan(0), {"logits_processors": (lambda ids, scores: scores,)}),
        (Plan(4), {"min_tokens": 10}),
        (Plan(4, drafter=HISTORY), {}),
    ],
    ids=["guide", "processor", "min_tokens_behind_drafts", "history"],
)
def test_what_the_host_does_between_two_steps_keeps_them_in_turn(policy, plan, options, launches):
    requests = make_requests(prompts(4), Sampling(max_tokens=10, **options))
    late = finish(in_pages(policy, plan), requests)
    assert launches["behind"] == 0
    assert_same_rollouts(finish(in_pages(policy, plan, "off"), requests), late, policy)


def test_an_observer_is_told_of_steps_in_turn(policy, launches):
    traces = []
    engine = in_pages(policy, Plan(0), observers=(traces.append,))
    finish(engine, make_requests(prompts(4), Sampling(max_tokens=6)))
    assert launches["behind"] == 0 < len(traces)


class Held(PlansInTurn):
    """Choices that hold for five steps; how many steps it was told of, choice by choice."""

    def __init__(self, *plans: Plan) -> None:
        super().__init__(*plans)
        self.steps: list[int] = []

    def choose(self, step):
        return Choice(plan=super().choose(step).plan, num_steps=5)

    def observe(self, taken):
        super().observe(taken)
        self.steps.append(len(taken.step_seconds))


def test_a_planner_is_told_of_the_steps_of_its_choices_as_in_turn(policy, launches):
    requests = make_requests(prompts(5), Sampling(max_tokens=21, ignore_eos=True))
    told = {}
    for overlap in ("off", "on"):
        planner = Held(Plan(0))
        launches.clear()
        finish(in_pages(policy, planner, overlap), requests)
        told[overlap] = planner.steps, planner.observed
    assert told["on"] == told["off"]
    assert max(planner.steps) >= 4
    assert launches["behind"] > 8


# At the door


def test_steps_that_cannot_overlap_are_refused_at_the_door(policy):
    for options, said in (
        ({"overlap": "on", "cache": "slots"}, "set cache to 'pages'"),
        ({"overlap": "always"}, "allowed are 'auto', 'on' and 'off'"),
    ):
        with pytest.raises(InvalidInput, match=said):
            Engine(policy, plan=Plan(0), **options)
    with pytest.raises(InvalidInput, match="layers of this policy carry states"):
        Engine(RecurrentPolicy(), plan=Plan(0), cache="pages", overlap="on")
    assert not in_pages(policy, Plan(0), "auto")._overlaps  # the host waits for no processor


def test_a_request_of_a_name_that_was_aborted_is_another(policy):
    """It joins behind the step in flight that its namesake was in, and has no share of it."""
    requests = make_requests([text(9, seed=1), text(5, seed=2)], Sampling(max_tokens=12, ignore_eos=True))
    untouched = finish(in_pages(policy, Plan(0), "off"), requests)
    engine = in_pages(policy, Plan(0))
    engine.submit(requests)
    for _ in range(4):
        engine.step()
    engine.abort(["r1"])
    engine.submit(requests[1:])
    assert_same_rollouts(untouched, finish(engine), policy)
