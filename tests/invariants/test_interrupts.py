"""Ctrl-C inside the bookkeeping of slots, memory and weights: the next call puts right what it leaves."""

import dataclasses
import random
import sys
from collections.abc import Callable

import pytest
import torch

from blockroll.errors import ReplicaError
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import served
from blockroll.rollout.engine.cache import held, slots
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.cache.recurrent import RecurrentCache
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.engine.served import ServedRequests
from blockroll.rollout.pool import replica as replica_module
from blockroll.types import Plan, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.invariants.test_engine_faults import finish, first_requests, later_requests, make_engine, text
from tests.invariants.test_pool import local_replica, moved_update
from tests.models import adapted_policy
from tests.recurrent_policy import POISON, RecurrentPolicy

PLANS = [Plan(0), Plan(4), Plan(4, (0, 2, 4))]


@pytest.fixture(scope="module")
def policy():
    return adapted_policy()


class InterruptedIn:
    """Raises KeyboardInterrupt at the n-th call that these files make, or behind one, once."""

    def __init__(self, number: int, *modules) -> None:
        self.number, self.count = number, 0
        self._files = {module.__file__ for module in modules}

    def __call__(self, frame, event, argument) -> None:
        if event != "return" and frame.f_code.co_filename in self._files:
            self.count += 1
            if self.count == self.number:
                raise KeyboardInterrupt

    def run(self, call: Callable):
        """The call until it has returned once."""
        while True:
            sys.setprofile(self)
            try:
                return call()
            except KeyboardInterrupt:
                continue
            finally:
                sys.setprofile(None)


def serve(engine: Engine, interrupted: InterruptedIn) -> dict:
    engine.submit(first_requests())
    finished = {}
    while engine.num_requests:
        for rollout in interrupted.run(engine.step).finished:
            finished[rollout.request.request_id] = rollout
        engine.check_integrity()
    return finished


class InterruptedInIndex(InterruptedIn):
    """The same, where a text that has a block more is about to be found by it."""

    def __call__(self, frame, event, argument) -> None:
        if event == "c_call" and argument.__name__ == "setdefault":
            super().__call__(frame, event, argument)


def interrupt_the_bookkeeping(
    policy, plan, *, count: int, modules=(slots, held), interrupted_in=InterruptedIn
) -> None:
    first = finish(make_engine(policy, plan), first_requests())
    later = finish(make_engine(policy, plan), later_requests(first))
    counting = interrupted_in(0, *modules)
    serve(make_engine(policy, plan), counting)
    rng = random.Random(plan.name)
    for number in rng.sample(range(1, counting.count), count):
        engine = make_engine(policy, plan)
        assert_same_rollouts(first, serve(engine, interrupted_in(number, *modules)), policy)
        assert_same_rollouts(later, finish(engine, later_requests(first)), policy)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_an_interrupt_inside_the_cache_changes_no_token(policy, plan):
    """Fused plans too: a text that stays in its engine keeps its proposal, and with it every coin."""
    interrupt_the_bookkeeping(policy, plan, count=6)


class InterruptedInCommit(InterruptedIn):
    """The same, at calls of the function in which tokens become a request's own."""

    def __call__(self, frame, event, argument) -> None:
        if frame.f_code is ServedRequests.commit.__code__:
            super().__call__(frame, event, argument)


def test_what_a_step_commits_is_told_once_wherever_an_interrupt_comes(policy):
    requests = make_requests([text(9, seed=1), text(3, seed=2)], Sampling(max_tokens=3, ignore_eos=True))
    number, is_over = 0, False
    while not is_over:
        number += 1
        engine, interrupted = make_engine(policy, PLANS[0]), InterruptedInCommit(number, served)
        engine.submit(requests)
        told, finished = {request.request_id: [] for request in requests}, {}
        while engine.num_requests:
            result = interrupted.run(engine.step)
            for commit in result.commits:
                told[commit.request_id] += commit.token_ids
            finished |= {rollout.request.request_id: [*rollout.token_ids] for rollout in result.finished}
        assert told == finished
        is_over = interrupted.count < number
    assert number > 20


class InterruptedBeforeCalls(InterruptedIn):
    """The same, at what that function calls too: between two of its calls."""

    def __call__(self, frame, event, argument) -> None:
        own = ServedRequests.commit.__code__
        caller = frame.f_back
        if event != "return" and (frame.f_code is own or (caller is not None and caller.f_code is own)):
            self.count += 1
            if self.count == self.number:
                raise KeyboardInterrupt


BAD = 23  # a token whose rows are NaN


@pytest.fixture(scope="module")
def poisoned():
    """What begins with keys and values, and what carries a state besides."""
    attention, recurrent = adapted_policy(), RecurrentPolicy()
    with torch.no_grad():
        attention.model.get_input_embeddings().weight[BAD] = torch.nan
        attention.output_head.weight[BAD] = 0
    return {"slots": (attention, BAD), "pages": (attention, BAD), "recurrent": (recurrent, POISON)}


def interrupt_steps_of_a_bad_text(poisoned, kind: str) -> None:
    """Interrupts while NaN is met, wherever; who comes behind reads what is left beside rows of its own."""
    policy, bad = poisoned[kind]
    options = {"cache": "pages", "page_size": 16} if kind == "pages" else {}
    greedy = Sampling(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [(5, 6, 7, bad, 5, 6, 8), (4, 9, 11, 6), (7, 8)]
    first = make_requests(prompts, greedy)
    later = make_requests([(8,), (9, 4), (11, 5, 6), (12, 7)], greedy)
    later = [dataclasses.replace(each, request_id=f"later {each.request_id}") for each in later]

    def served_by(interrupted):
        engine = Engine(policy, plan=PLANS[0], max_batch_size=3, **options)
        engine.submit(first)
        finished = {}
        for requests in ((), later):
            engine.submit(requests)
            while engine.num_requests:
                for rollout in interrupted.run(engine.step).finished:
                    finished[rollout.request.request_id] = (rollout.finish_reason, rollout.token_ids)
        return finished

    counting = InterruptedBeforeCalls(0, served)
    want = served_by(counting)
    assert {name for name, (reason, _) in want.items() if reason == "error"} == {"r0"}
    for number in range(1, min(counting.count, 40)):
        assert served_by(InterruptedBeforeCalls(number, served)) == want, number


KINDS = pytest.mark.parametrize("kind", ["slots", "pages", "recurrent"])


@KINDS
def test_what_is_not_finite_reaches_nobody_wherever_an_interrupt_comes(poisoned, kind):
    interrupt_steps_of_a_bad_text(poisoned, kind)


@KINDS
def test_planted_rows_that_nobody_scrubs_behind_an_interrupt_are_noticed(poisoned, kind, monkeypatch):
    for cache in (SlotCache, PagedCache, RecurrentCache):
        monkeypatch.setattr(cache, "scrub_all", lambda self: None)
    with pytest.raises(AssertionError):
        interrupt_steps_of_a_bad_text(poisoned, kind)


def test_planted_an_index_that_is_left_half_changed_is_noticed(policy, monkeypatch):
    monkeypatch.setattr(SlotCache, "repair", lambda self: None)
    with pytest.raises((AssertionError, KeyError)):
        interrupt_the_bookkeeping(
            policy, PLANS[0], count=8, modules=(held,), interrupted_in=InterruptedInIndex
        )


def interrupt_the_release_of_memory(policy) -> None:
    requests = make_requests([text(40, seed=7)] * 2, Sampling(max_tokens=12))
    want = finish(make_engine(policy, PLANS[0]), requests)
    number, is_over = 0, False
    while not is_over:
        number += 1
        engine, interrupted = make_engine(policy, PLANS[0]), InterruptedIn(number, slots, held)
        finish(engine, requests)
        sys.setprofile(interrupted)
        try:
            engine.release_memory()
            is_over = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        assert_same_rollouts(want, finish(engine, requests), policy, at_most=0)
    assert number > 1


def test_memory_whose_release_was_interrupted_holds_no_rows(policy):
    interrupt_the_release_of_memory(policy)


def test_planted_rows_whose_memory_is_gone_are_noticed(policy, monkeypatch):
    def memory_first(self):
        self._keys, self._values = [], []
        self._texts, self._missing = held.SlotTexts(), []
        self.num_open = self.capacity = 0

    memory_first.__code__ = memory_first.__code__.replace(co_filename=slots.__file__)
    monkeypatch.setattr(SlotCache, "clear", memory_first)
    with pytest.raises(AssertionError):
        interrupt_the_release_of_memory(policy)


def interrupt_a_change_of_weights() -> set[str]:
    """Ctrl-C behind the last weight that is written, at calls up to where running texts are recomputed."""
    prompts = [text(30, seed=1), text(30, seed=1), text(9, seed=2)]
    running = make_requests(prompts, Sampling(max_tokens=8, ignore_eos=True))
    later = [dataclasses.replace(each, request_id=f"later {each.request_id}") for each in running]
    renewed = local_replica()
    renewed.update(moved_update())
    want = finish(renewed.engine, later)
    outcomes = set()
    for number in range(1, 60, 2):
        replica = local_replica()
        finish(replica.engine, later)
        replica.submit(running)
        replica.engine.step()
        interrupted = InterruptedIn(number, replica_module, slots, held)
        load = replica_module.load_update

        def loaded_and_then(update, own, *, load=load, interrupted=interrupted):
            load(update, own)
            sys.setprofile(interrupted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replica_module, "load_update", loaded_and_then)
            try:
                replica.update(moved_update())
                return outcomes
            except KeyboardInterrupt:
                pass
            finally:
                sys.setprofile(None)
        try:
            replica.submit(later)
        except ReplicaError:
            assert replica.health().version == -1
            outcomes.add("serves nothing")
            continue
        assert replica.health().version == 1
        outcomes.add("serves the new weights")
        finished = finish(replica.engine)
        got = [finished[request.request_id] for request in later]
        assert_same_rollouts(want, got, replica.engine.policy)
    return outcomes


def test_a_change_of_weights_that_is_interrupted_never_leaves_rows_of_the_old_ones():
    assert interrupt_a_change_of_weights() == {"serves nothing", "serves the new weights"}


def test_planted_weights_that_count_as_whole_before_the_cache_forgets_are_noticed(monkeypatch):
    def careless(self, update, own):
        replica_module.load_update(update, own)
        self.engine.policy_version = update.version
        self.engine.recompute_cache()

    def slot_by_slot(self):
        self.close(0)
        self.forget()

    monkeypatch.setattr(replica_module.LocalReplica, "_write", careless)
    monkeypatch.setattr(SlotCache, "invalidate", slot_by_slot)
    with pytest.raises(AssertionError):
        interrupt_a_change_of_weights()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_the_first_step_after_an_update_may_raise_and_be_repeated(error):
    requests = make_requests([text(30, seed=1), text(9, seed=2)], Sampling(max_tokens=20, ignore_eos=True))
    later = [dataclasses.replace(each, request_id=f"later {each.request_id}") for each in requests]
    renewed = local_replica()
    renewed.update(moved_update())
    want = finish(renewed.engine, later)
    replica = local_replica()
    replica.submit(requests)
    replica.engine.step()

    def broken(*arguments):
        raise error

    layer = replica.engine.policy.model.base_model.layers[-1]
    hook = layer.register_forward_pre_hook(broken)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            replica.update(moved_update())
    else:
        assert replica.update(moved_update()).accepted
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            replica.engine.step()
    else:  # fewer requests run from now on
        assert not replica.engine.step().commits
    hook.remove()
    finished = finish(replica.engine, later)
    assert {rollout.policy_versions[-1] for rollout in finished.values()} == {1}
    assert_same_rollouts(want, [finished[request.request_id] for request in later], replica.engine.policy)
