"""A forward that raises, or an interrupt anywhere, leaves an engine that goes on as if nothing were."""

import dataclasses
import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

from blockroll.rollout import engine as engine_package
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.engine.running import RunningRequest
from blockroll.rollout.engine.served import ServedRequests
from blockroll.types import Plan, Request, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.models import adapted_policy

PLAIN, TWO_FORWARD, FUSED = Plan(0), Plan(4), Plan(4, (0, 2, 4))
PLANS = pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD, FUSED], ids=lambda plan: plan.name)
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError)
SAMPLING = Sampling(max_tokens=14)
SOURCES = str(Path(engine_package.__file__).parent)


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


def text(length: int, *, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(range(4, 24)) for _ in range(length))


def first_requests() -> list[Request]:
    """Groups of one prompt, prompts that begin alike, short ones; more than run together."""
    root = text(30, seed=1)
    prompts = [root, root, (*root[:20], 5, 6), text(3, seed=2), text(25, seed=3), root, text(9, seed=4), (7,)]
    return make_requests(prompts, SAMPLING)


def later_requests(rollouts) -> list[Request]:
    """What would take over whatever rows the first ones left: their texts, whole, cut, and gone on with."""
    prompts = []
    for rollout in rollouts.values():
        whole = (*rollout.request.prompt_ids, *rollout.token_ids)
        prompts += [whole, whole[: max(len(whole) - 3, 1)], (*whole, 9, 8)]
    requests = make_requests(prompts, SAMPLING, seed=5)
    return [dataclasses.replace(each, request_id=f"later {each.request_id}") for each in requests]


def make_engine(policy, plan, **options) -> Engine:
    return Engine(policy, plan=plan, max_batch_size=4, **options)


def finish(engine: Engine, requests=()) -> dict:
    """Step to the end; whatever raises is met by another step, and the engine is whole after each."""
    engine.submit(requests)
    finished = {}
    while engine.num_requests:
        try:
            ended = engine.step().finished
        except ERRORS:
            engine.check_integrity()
            continue
        engine.check_integrity()
        assert finished.keys().isdisjoint(rollout.request.request_id for rollout in ended)
        finished.update((rollout.request.request_id, rollout) for rollout in ended)
    return finished


class Expected:
    """Rollouts of engines to which nothing happens."""

    def __init__(self, policy, plan) -> None:
        self.policy = policy
        self.first = finish(make_engine(policy, plan), first_requests())
        self.later = finish(make_engine(policy, plan), later_requests(self.first))

    def check(self, engine: Engine, first: dict) -> None:
        """These are the first rollouts, and the engine's later ones are those of a fresh engine."""
        for want, got in ((self.first, first), (self.later, finish(engine, later_requests(self.first)))):
            assert_same_rollouts(self.without_prefixes(want), self.without_prefixes(got), self.policy)
            for name, rollout in want.items():
                if rollout.token_ids == got[name].token_ids:
                    assert got[name].stats.num_forwards == rollout.stats.num_forwards

    def without_prefixes(self, rollouts: dict) -> list:
        """As if none had been aborted and had gone on."""
        return [
            dataclasses.replace(each, request=dataclasses.replace(each.request, prefix=None))
            for each in rollouts.values()
        ]


@pytest.fixture(scope="module")
def expected(policy):
    return {plan: Expected(policy, plan) for plan in (PLAIN, TWO_FORWARD, FUSED)}


class Breaking:
    """The n-th forward of a model raises half-way: its first layer has written keys and values, poisoned."""

    def __init__(self, policy, number: int, error: type[BaseException]) -> None:
        self.policy, self.number, self.error, self.count = policy, number, error, 0
        layers = policy.model.base_model.layers
        self.hooks = [
            layers[-1].register_forward_pre_hook(self.meet),
            policy.output_head.register_forward_pre_hook(self.meet),
        ]

    def meet(self, module, inputs) -> None:
        self.count += 1
        if self.count == self.number:
            raise self.error("the forward broke")

    def __enter__(self) -> "Breaking":
        return self

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()


def break_one_forward(make, expected: "Expected", number: int, error: type[BaseException]) -> None:
    """An engine that `make` gives serves all the same, though its n-th forward raises."""
    engine = make()
    with Breaking(engine.policy, number, error) as breaking:
        first = finish(engine, first_requests())
        assert breaking.count > number
    expected.check(engine, first)


def num_forwards(policy, plan) -> int:
    with Breaking(policy, 0, RuntimeError) as counting:
        finish(make_engine(policy, plan), first_requests())
    return counting.count


@PLANS
def test_a_step_whose_forward_raised_can_be_repeated_whichever_it_was(policy, plan, expected):
    """Prefill, draft, verify, fused or the head alone: out of memory, Ctrl-C, anything."""
    total = num_forwards(policy, plan)
    for number in (*range(1, 7), *range(9, total, 26)):
        error = ERRORS[number % len(ERRORS)]
        break_one_forward(lambda: make_engine(policy, plan), expected[plan], number, error)


def abort_after_a_broken_forward(policy, plan, expected, number: int) -> None:
    """What was committed comes back, goes on elsewhere, and the engine serves others as a fresh one would."""
    engine, finished = make_engine(policy, plan), {}
    engine.submit(first_requests())
    names = [request.request_id for request in first_requests()]
    with Breaking(policy, number, RuntimeError):
        while engine.num_requests:
            try:
                finished |= {rollout.request.request_id: rollout for rollout in engine.step().finished}
            except RuntimeError:
                for rollout in engine.abort(names):
                    finished[rollout.request.request_id] = rollout
    engine.check_integrity()
    assert finished.keys() == set(names)
    aborted = {name for name, rollout in finished.items() if rollout.finish_reason == "abort"}
    assert aborted
    resumed = [
        dataclasses.replace(request, prefix=finished[request.request_id].as_prefix())
        for request in first_requests()
        if request.request_id in aborted
    ]
    whole = {name: rollout for name, rollout in finished.items() if name not in aborted}
    expected[plan].check(engine, whole | finish(engine, resumed))


@pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD], ids=lambda plan: plan.name)
def test_after_a_broken_forward_requests_can_be_aborted_and_lose_nothing(policy, plan, expected):
    """Under a fused plan those that resume start with a draft forward of their own, and with other coins."""
    for number in (1, 2, 3, 6, 11, 23):
        abort_after_a_broken_forward(policy, plan, expected, number)


def rows_named_without_a_forward(monkeypatch):
    """A request that is given up leaves a slot that counts as holding its whole text."""
    leave = ServedRequests._leave
    turns = itertools.count()

    def wrong(served, request_id):
        tokens = served.requests[request_id].token_ids[:-1]
        cache = served._cache
        slot = next(turns) % cache.num_slots
        leave(served, request_id)
        if slot >= cache.num_open:
            cache._texts.cut(slot, 0)
            cache._texts.extend(slot, tokens)

    monkeypatch.setattr(ServedRequests, "_leave", wrong)


def rows_committed_before_the_forward(monkeypatch):
    window = SlotCache.window

    def wrong(cache, start, stop, num_rows, **options):
        opened = window(cache, start, stop, num_rows, **options)
        cache._texts.extend(start, [5] * num_rows)
        return opened

    monkeypatch.setattr(SlotCache, "window", wrong)


@pytest.mark.parametrize("plant", [rows_named_without_a_forward, rows_committed_before_the_forward])
def test_rows_that_no_forward_finished_would_be_noticed(policy, expected, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        abort_after_a_broken_forward(policy, TWO_FORWARD, expected, number=1)


@PLANS
def test_an_interrupt_between_the_commits_of_cache_and_request_loses_nothing(
    policy, plan, expected, monkeypatch
):
    commit = RunningRequest.commit
    for number in range(1, 20, 6):
        count = 0

        def interrupted(*arguments, number=number, **step):
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return commit(*arguments, **step)

        engine = make_engine(policy, plan)
        monkeypatch.setattr(RunningRequest, "commit", interrupted)
        first = finish(engine, first_requests())
        monkeypatch.setattr(RunningRequest, "commit", commit)
        assert count > number
        expected[plan].check(engine, first)


class Interrupted:
    """Raises KeyboardInterrupt at the n-th call that the engine makes, or behind one: as signals do."""

    def __init__(self, number: int) -> None:
        self.number, self.count, self.place = number, 0, ""

    def __call__(self, frame, event, argument) -> None:
        if event != "return" and frame.f_code.co_filename.startswith(SOURCES):
            self.count += 1
            if self.count == self.number:
                self.place = f"{event} in {frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt

    def run(self, call, *arguments):
        """A call until it has returned once without an interrupt."""
        while True:
            sys.setprofile(self)
            try:
                return call(*arguments)
            except KeyboardInterrupt:
                continue
            finally:
                sys.setprofile(None)


def serve(engine: Engine, interrupted: Interrupted) -> dict:
    """Steps, aborts in their middle, and goes on with what was aborted."""
    finished = {}
    engine.submit(first_requests())
    for _ in range(3):
        finished |= by_name(interrupted.run(engine.step).finished)
    aborted = by_name(interrupted.run(engine.abort, [f"r{index}" for index in (1, 2, 6)]))
    while engine.num_requests:
        finished |= by_name(interrupted.run(engine.step).finished)
    resumed = [
        dataclasses.replace(rollout.request, prefix=rollout.as_prefix())
        for rollout in aborted.values()
        if rollout.finish_reason == "abort"
    ]
    ended = {name: rollout for name, rollout in aborted.items() if rollout.finish_reason != "abort"}
    return finished | ended | finish(engine, resumed)


def by_name(rollouts) -> dict:
    return {rollout.request.request_id: rollout for rollout in rollouts}


def interrupt_anywhere(make, expected: "Expected", *, count: int, serve=serve) -> None:
    """So many engines that `make` gives, each interrupted once at a call drawn at random."""
    counting = Interrupted(0)
    engine = make()
    serve(engine, counting)
    rng = random.Random(engine.plan.name)
    for _ in range(count):
        engine, interrupted = make(), Interrupted(rng.randrange(1, counting.count))
        first = serve(engine, interrupted)
        assert interrupted.count > interrupted.number
        expected.check(engine, first)
        engine.check_integrity()


@pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD], ids=lambda plan: plan.name)
def test_an_interrupt_at_any_call_changes_no_token(policy, plan, expected):
    interrupt_anywhere(lambda: make_engine(policy, plan), expected[plan], count=4)


def test_memory_that_cannot_be_had_changes_nothing(policy, expected, monkeypatch):
    """Growing, allocating and moving rows each fail once, at every use in turn."""
    real = {"zeros": torch.zeros, "pad": torch.nn.functional.pad}
    for name, module in (("zeros", torch), ("pad", torch.nn.functional)):
        for number in (1, 2, 4):
            count = 0

            def scarce(*arguments, real=real[name], number=number, **options):
                nonlocal count
                count += sys._getframe(1).f_code.co_filename.endswith("slots.py") or (
                    sys._getframe(2).f_code.co_filename.endswith("slots.py")
                )
                if count == number:
                    count += 1
                    raise torch.OutOfMemoryError
                return real(*arguments, **options)

            engine = make_engine(policy, PLAIN)
            monkeypatch.setattr(module, name, scarce)
            engine.submit(first_requests()[:1])
            assert finish(engine)
            first = finish(engine, first_requests())
            monkeypatch.setattr(module, name, real[name])
            assert count > number
            expected[PLAIN].check(engine, first)


@PLANS
def test_an_observer_that_raises_costs_no_rollout(policy, plan, expected):
    """All observers stand behind the commit; a step that raised for one of them is final all the same."""
    traces = []

    def raises_sometimes(trace):
        traces.append(trace)
        if len(traces) % 3 == 0 or trace.is_last:
            raise RuntimeError("no disk")

    engine = make_engine(policy, plan, observers=(raises_sometimes,))
    first = finish(engine, first_requests())
    kept = sum(sum(trace.num_kept) for trace in traces)
    assert kept == sum(len(rollout.token_ids) for rollout in first.values())
    expected[plan].check(engine, first)
