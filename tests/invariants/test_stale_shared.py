"""A replica that missed an update serves nothing to anybody: pools that share it need not be told."""

import pytest

from blockroll.errors import ReplicaError, WeightSyncError
from blockroll.rollout.pool import replica as replica_module
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.shared import SharedReplica
from tests.invariants import test_stale
from tests.invariants.test_calls import asked, check_complete
from tests.invariants.test_pool import Saboteur, flip_a_byte, local_replica, moved_update


class Client:
    """What a process sees of a replica that another one made: its own requests, and no updates."""

    def __init__(self, replica, name):
        self._shared, self._name = SharedReplica(replica, client_timeout_s=600), name
        self.replica_id, self.limits = replica.replica_id, replica.limits
        self.kernels = replica.kernels
        self.health, self.close = replica.health, lambda: self._shared.leave(name)
        self._shared.enter(name)

    def submit(self, requests):
        assert self._shared.submit(requests, self._name)

    def poll(self):
        return self._shared.poll(self._name)

    def abort(self, request_ids):
        return self._shared.abort(request_ids, self._name)


def owner_and_joined(damage=flip_a_byte):
    replicas = [local_replica(0), local_replica(1)]
    owner = RolloutPool([replicas[0], Saboteur(replicas[1], damage)])
    return owner, RolloutPool([Client(replica, "joined") for replica in replicas])


def across_an_update():
    owner, joined = owner_and_joined()
    requests = test_stale.asked(13)
    rollouts = joined.generate(requests)
    first = next(rollouts)
    num_stale = joined.health()[1].num_requests
    assert num_stale > 2, "the case needs requests in flight at the replica that becomes stale"
    owner.update(moved_update(1))
    later = list(rollouts)
    assert {each.policy_versions[-1] for each in later} == {1}, "weights that are not published drew it"
    check_complete(requests, [first, *later])
    assert any(each.policy_versions[0] == 0 for each in later), "what was committed was thrown away"
    assert (owner.states, joined.states) == (("READY", "STALE"),) * 2
    assert joined.num_redispatched == num_stale
    return owner, joined


def test_a_stale_replica_serves_nothing_whichever_pool_asks():
    owner, joined = across_an_update()
    requests = asked(8, seed=2)
    rollouts = list(joined.generate(requests))
    check_complete(requests, rollouts)
    assert {version for each in rollouts for version in each.policy_versions} == {1}
    owner._members[1].replica.damage = None
    owner.update(moved_update(2, 1.2))
    check_complete(requests, list(joined.generate(requests)))
    assert joined.states == ("READY", "READY")


def test_planted_a_replica_that_does_not_hold_what_was_published_is_noticed(monkeypatch):
    monkeypatch.setattr(LocalReplica, "expect", lambda self, version: None)
    with pytest.raises(AssertionError, match="not published"):
        across_an_update()


def test_a_pool_all_of_whose_replicas_are_stale_says_why_and_goes_on_after_an_update():
    def interrupt(update):
        raise KeyboardInterrupt

    owner, joined = owner_and_joined(interrupt)
    owner._members[0].replica = Saboteur(owner._members[0].replica, interrupt)
    requests = test_stale.asked(6)
    rollouts = joined.generate(requests)
    finished = [next(rollouts)]
    with pytest.raises(KeyboardInterrupt):
        owner.update(moved_update(1))
    for _ in range(2):
        with pytest.raises(ReplicaError, match=r"is ready.*replica 0 holds version 0, published is 1"):
            next(rollouts)
    for member in owner._members:
        member.replica.damage = None
    owner.update(moved_update(2, 1.2))
    check_complete(requests, [*finished, *rollouts])
    assert joined.states == ("READY", "READY")


def test_weights_that_are_not_as_they_were_sent_once_written_serve_nothing(monkeypatch):
    """Two names of one tensor, or a fault of the memory: what counts is what the replica holds."""
    replica = local_replica(0)
    pool = RolloutPool([replica])
    write = replica_module.load_update

    def falls_over(update, own):
        write(update, own)
        own[0][1].data.view(-1)[0] += 1

    monkeypatch.setattr(replica_module, "load_update", falls_over)
    with pytest.raises(WeightSyncError, match=r"have checksum .* once they are written, sent was"):
        pool.update(moved_update(1))
    with pytest.raises(ReplicaError, match="no replica is ready"):
        next(pool.generate(asked(1, seed=1)))
    monkeypatch.undo()
    pool.update(moved_update(2, 1.2))
    check_complete(asked(2, seed=1), list(pool.generate(asked(2, seed=1))))
