"""Calls of one pool are separate: each gets its own rollouts, all of them, once."""

import dataclasses
import gc
import threading
from collections import Counter

import pytest

from blockroll.errors import InvalidInput
from blockroll.rollout.pool import calls
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.router import Router
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.invariants.test_pool import local_pool, local_replica, moved_update
from tests.models import MASK_ID, prompts, random_policy


def asked(count, *, seed, shortest=4, step=5):
    """Requests of one id per place, whatever the seed; some end early and some late."""
    return [
        dataclasses.replace(
            request,
            sampling=Sampling(
                max_tokens=shortest + step * place, ignore_eos=True, logit_bias={MASK_ID: -100.0}
            ),
        )
        for place, request in enumerate(make_requests(prompts(count, seed=seed), Sampling(), seed=seed))
    ]


def check_complete(requests, rollouts):
    """Every request of this call came back, once, as it was asked and as long as it was asked."""
    assert Counter(rollout.request for rollout in rollouts) == Counter(requests)
    assert all(len(rollout.token_ids) == rollout.request.sampling.max_tokens for rollout in rollouts)


def is_idle(pool):
    return {health.num_requests for health in pool.health()} == {0} and not pool._router._owners


def nested():
    with local_pool() as pool:
        outer, inner = asked(8, seed=1), [asked(3, seed=seed) for seed in range(2, 10)]
        finished, within = [], []
        for rollout, requests in zip(pool.generate(outer), inner, strict=True):
            finished.append(rollout)
            within.append((requests, list(pool.generate(requests))))
        check_complete(outer, finished)
        for requests, rollouts in within:
            check_complete(requests, rollouts)
        assert is_idle(pool)


def in_turns():
    with local_pool() as pool:
        parts = [asked(6, seed=seed) for seed in (1, 2, 3)]
        iterators, finished = [pool.generate(part) for part in parts], [[], [], []]
        for _ in range(6):
            for own, iterator in zip(finished, iterators, strict=True):
                own.append(next(iterator))
        for part, own, iterator in zip(parts, finished, iterators, strict=True):
            assert list(iterator) == []
            check_complete(part, own)
        assert is_idle(pool)


def one_left_half_way():
    with local_pool(requests_per_replica=4) as pool:
        left, requests = pool.generate(asked(12, seed=1)), asked(12, seed=2)
        next(left)  # and nobody asks it again, though something still holds it
        check_complete(requests, list(pool.generate(requests)))
        assert len(left.close()) == 11
        assert is_idle(pool)


def in_threads():
    with local_pool() as pool:
        parts = [asked(8, seed=seed) for seed in (1, 2, 3)]
        finished = [[], [], []]

        def read(own, part):
            own.extend(pool.generate(part))

        threads = [threading.Thread(target=read, args=each) for each in zip(finished, parts, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        for part, own in zip(parts, finished, strict=True):
            check_complete(part, own)
        assert is_idle(pool)


WAYS = [nested, in_turns, one_left_half_way, in_threads]


@pytest.mark.parametrize("run", WAYS)
def test_calls_with_the_same_ids_get_their_own_rollouts_all_of_them_once(run):
    run()


def give_all_to_whoever_asks(monkeypatch):
    """What finishes goes to the call that polls."""
    serve = Router._serve

    def mistaken(self, call):
        for member in self.members:
            member.in_flight.update({alias: (call, held[1]) for alias, held in member.in_flight.items()})
        serve(self, call)

    monkeypatch.setattr(Router, "_serve", mistaken)


def share_ids(monkeypatch):
    """Ids of one call stand for those of all."""
    monkeypatch.setattr(calls, "free_alias", lambda request_id, *taken: request_id)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("run", WAYS[:3])
@pytest.mark.parametrize("plant", [give_all_to_whoever_asks, share_ids])
def test_planted_calls_that_are_not_separate_are_noticed(run, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, RuntimeError)):
        run()


def test_closing_a_call_aborts_its_own_requests_and_gives_what_they_had_committed():
    with local_pool() as pool:
        mine, others = asked(10, seed=1, shortest=30), asked(10, seed=2)
        left, kept = pool.generate(mine), pool.generate(others)
        finished = [next(kept)]
        first = next(left)
        aborted = left.close()
        assert [each.request for each in aborted] == [each for each in mine if each is not first.request]
        assert {each.finish_reason for each in aborted} <= {"abort", "length"}
        assert any(each.finish_reason == "abort" and each.token_ids for each in aborted)
        check_complete(others, [*finished, *kept])
        assert is_idle(pool)


def test_an_aborted_rollout_goes_on_from_where_it_stood():
    with local_pool() as pool:
        requests = asked(6, seed=1, shortest=20)
        whole = list(pool.generate(requests))
        rollouts = pool.generate(requests)
        finished = [next(rollouts)]
        left = rollouts.close()
        finished += (each for each in left if each.finish_reason != "abort")
        finished += pool.generate(
            dataclasses.replace(each.request, prefix=each.as_prefix() if each.token_ids else None)
            for each in left
            if each.finish_reason == "abort"
        )
    assert_same_rollouts(whole, finished, random_policy())


def test_aborting_the_pool_ends_every_call_and_gives_back_all_that_was_not_delivered():
    with local_pool() as pool:
        one, two = asked(6, seed=1), asked(6, seed=2)
        first, second = pool.generate(one), pool.generate(two)
        delivered = [next(first), next(second)]
        aborted = pool.abort()
        assert Counter(each.request for each in (*delivered, *aborted)) == Counter([*one, *two])
        assert list(first) == list(second) == []
        assert pool.abort() == ()
        assert is_idle(pool)


def test_an_iterator_that_is_dropped_ends_its_call():
    with local_pool() as pool:
        next(pool.generate(asked(6, seed=1)))
        gc.collect()
        assert is_idle(pool)


class Stubborn:
    """A replica whose aborts raise; everything else is the replica's own."""

    def __init__(self, replica):
        self._replica = replica
        self.replica_id, self.limits, self.update = replica.replica_id, replica.limits, replica.update
        self.submit, self.poll, self.health = replica.submit, replica.poll, replica.health
        self.close, self.expect = replica.close, replica.expect
        self.kernels = replica.kernels

    def abort(self, request_ids):
        raise OSError("the abort went wrong")


def test_an_abort_that_raises_on_one_replica_skips_no_other_and_what_it_leaves_reaches_nobody():
    first, second = local_replica(0), local_replica(1)
    with RolloutPool([Stubborn(first), second]) as pool:
        requests = asked(8, seed=1)
        rollouts = pool.generate(requests)
        next(rollouts)
        with pytest.raises(OSError, match="went wrong"):
            rollouts.close()
        assert second.engine.num_requests == 0
        assert first.engine.num_requests > 0
        again = [dataclasses.replace(request, seed=request.seed + 1000) for request in requests]
        check_complete(again, list(pool.generate(again)))
        while first.engine.num_requests:  # what nobody wanted finishes beside the others
            check_complete(again, list(pool.generate(again)))
        check_complete(again, list(pool.generate(again)))
        assert pool._router._owners == {}


def test_planted_an_abort_that_stops_at_the_first_error_is_noticed(monkeypatch):
    def until_one_raises(self, call):
        for member in self.members:
            if call.num_on[member]:
                self.empty(member, call)

    monkeypatch.setattr(Router, "_take_back", until_one_raises)
    with pytest.raises(AssertionError):
        test_an_abort_that_raises_on_one_replica_skips_no_other_and_what_it_leaves_reaches_nobody()


def test_an_update_while_calls_run_reaches_all_of_them():
    with local_pool() as pool:
        one, two = asked(8, seed=1), asked(8, seed=2)
        rollouts = pool.generate(one)
        finished = [next(rollouts)]
        other = []
        thread = threading.Thread(target=lambda: other.extend(pool.generate(two)))
        thread.start()
        pool.update(moved_update(1))
        finished += rollouts
        thread.join(timeout=120)
        check_complete(one, finished)
        check_complete(two, other)
        assert finished[-1].policy_versions[-1] == 1
        for rollout in (*finished, *other):
            assert list(rollout.policy_versions) == sorted(rollout.policy_versions)


def test_an_error_in_the_middle_leaves_the_call_to_go_on_with():
    replica = local_replica(0)
    with RolloutPool([replica]) as pool:
        requests = asked(6, seed=1)
        rollouts = pool.generate(requests)
        finished = [next(rollouts)]
        step, errors = replica.engine.step, [KeyboardInterrupt(), MemoryError()]

        def fails_twice():
            if errors:
                raise errors.pop()
            return step()

        replica.engine.step = fails_twice
        for expected in (MemoryError, KeyboardInterrupt):
            with pytest.raises(expected):
                next(rollouts)
            assert replica.engine.num_requests == 0
        check_complete(requests, [*finished, *rollouts])


def test_a_pool_that_is_asked_from_within_its_own_step_says_so():
    replica = local_replica(0)
    with RolloutPool([replica]) as pool:
        step = replica.engine.step

        def asks():
            pool.health()
            return step()

        replica.engine.step = asks
        with pytest.raises(InvalidInput, match="asked from within a call of its own"):
            list(pool.generate(asked(1, seed=1)))
