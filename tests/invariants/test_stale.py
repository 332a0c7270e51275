"""A replica that missed an update serves nothing; what it had in flight goes on elsewhere."""

import pytest

from blockroll.errors import ReplicaError
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.router import Router
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.invariants.test_pool import Saboteur, flip_a_byte, local_replica, moved_update
from tests.models import MASK_ID, prompts

LONG = Sampling(
    max_tokens=85,  # more than a poll can commit
    ignore_eos=True,
    logit_bias={MASK_ID: -100.0},
)
SHORT = Sampling(max_tokens=2, ignore_eos=True, logit_bias={MASK_ID: -100.0})


def asked(count):
    """One request that ends at once, and many that are under way when it does."""
    first, *others = make_requests(prompts(count, longest=6), LONG)
    return [make_requests([first.prompt_ids], SHORT)[0], *others]


def across_an_update(break_replica=flip_a_byte):
    """What arrives behind an update that one replica of two refuses, while both have requests in flight."""
    stale = local_replica(1)
    pool = RolloutPool([local_replica(0), Saboteur(stale, break_replica)])
    requests = asked(13)
    rollouts = pool.generate(requests)
    first = next(rollouts)
    assert stale.engine.num_requests > 2, (
        "the case needs requests in flight at the replica that becomes stale"
    )
    under_way = {running.request.request_id for running in stale.engine._served.requests.values()}
    pool.update(moved_update(1))
    assert pool.states == ("READY", "STALE")
    return pool, stale, requests, first, under_way, rollouts


def check_that_nothing_stale_is_served():
    pool, stale, requests, first, under_way, rollouts = across_an_update()
    assert stale.engine.num_requests == 0
    later = {rollout.request.request_id: rollout for rollout in rollouts}
    assert len(later) == len(requests) - 1
    assert {first.request.request_id, *later} == {request.request_id for request in requests}
    for rollout in later.values():
        assert (rollout.finish_reason, len(rollout.token_ids)) == ("length", 85)
        assert rollout.request in requests, "a rollout bears the request as it was asked"
        assert rollout.policy_versions[-1] == 1, "it was finished by weights that are not the pool's"
        assert list(rollout.policy_versions) == sorted(rollout.policy_versions)
    assert any(later[name].policy_versions[0] == 0 for name in under_way), (
        "what was committed was thrown away"
    )
    assert pool.num_redispatched == len(under_way)


def test_a_stale_replica_delivers_nothing_of_what_it_had_in_flight():
    check_that_nothing_stale_is_served()


def test_planted_a_stale_replica_that_goes_on_with_what_it_has_is_noticed(monkeypatch):
    empty = Router.empty
    monkeypatch.setattr(
        Router, "empty", lambda self, member, call=None: call and empty(self, member, call) and None
    )
    with pytest.raises(AssertionError):
        check_that_nothing_stale_is_served()


def test_a_replica_that_is_ready_again_later_has_nothing_of_before():
    pool, stale, requests, first, _, rollouts = across_an_update()
    pool._members[1].replica.damage = None
    pool.update(moved_update(2, 1.2))
    assert pool.states == ("READY", "READY")
    assert stale.engine.num_requests == 0
    later = list(rollouts)
    names = [first.request.request_id, *(rollout.request.request_id for rollout in later)]
    assert sorted(names) == sorted(request.request_id for request in requests)
    assert {rollout.policy_versions[-1] for rollout in later} == {2}


def test_without_a_ready_replica_the_call_raises_and_loses_nothing_that_was_committed():
    pool, _, requests, _, under_way, rollouts = across_an_update()
    pool._members[0].state = "DEAD"
    with pytest.raises(ReplicaError, match=r"no replica is ready at version 1; states are .*DEAD.*STALE"):
        next(rollouts)
    left = rollouts.close()
    assert [rollout.request for rollout in left] == requests[1:]
    assert {rollout.finish_reason for rollout in left} == {"abort"}
    kept = {rollout.request.request_id: rollout.token_ids for rollout in left}
    assert all(kept[name] for name in under_way)
    assert rollouts.close() == ()
    with pytest.raises(StopIteration):
        next(rollouts)


def test_a_call_that_found_no_ready_replica_goes_on_after_an_update():
    pool, _, requests, first, under_way, rollouts = across_an_update()
    pool._members[0].state = "DEAD"
    with pytest.raises(ReplicaError, match="go on iterating after an update"):
        next(rollouts)
    pool._members[1].replica.damage = None
    pool.update(moved_update(2, 1.2))
    later = {rollout.request.request_id: rollout for rollout in rollouts}
    assert sorted([first.request.request_id, *later]) == sorted(request.request_id for request in requests)
    assert any(later[name].policy_versions[0] == 0 for name in under_way)


def test_states_that_fail_in_the_middle_of_an_update_serve_nothing_until_the_next_one():
    def interrupt(update):
        raise KeyboardInterrupt

    pool = RolloutPool([local_replica(0), Saboteur(local_replica(1), interrupt)])
    with pytest.raises(KeyboardInterrupt):
        pool.update(moved_update(1))
    assert pool.states == ("STALE", "STALE")
    with pytest.raises(ReplicaError, match="no replica is ready at version 1"):
        list(pool.generate(asked(2)))
    pool._members[1].replica.damage = None
    pool.update(moved_update(2, 1.2))
    assert pool.states == ("READY", "READY")
