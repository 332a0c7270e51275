"""Weights change wholly or not at all: a malformed update is refused, and the old version serves on."""

import dataclasses
import hashlib
import threading

import numpy as np
import pytest
import torch

from blockroll.errors import ReplicaError, WeightSyncError
from blockroll.rollout.pool import replica as replica_module
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.rollout.pool.weight_sync.buckets import bucket_checksum
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.invariants.test_calls import asked, check_complete
from tests.invariants.test_pool import local_replica, moved_model, moved_update
from tests.models import prompts


def manifest(update, **changes):
    return dataclasses.replace(update, manifest=dataclasses.replace(update.manifest, **changes))


def spec(update, place, **changes):
    """The update with fields of one tensor replaced."""
    tensors = list(update.manifest.tensors)
    tensors[place] = dataclasses.replace(tensors[place], **changes)
    return manifest(update, tensors=tuple(tensors))


def bucket(update, place, data):
    """The update with one bucket replaced, and its checksum made to fit."""
    buckets, checksums = list(update.buckets), list(update.manifest.bucket_checksums)
    buckets[place], checksums[place] = data, bucket_checksum(data)
    return dataclasses.replace(manifest(update, bucket_checksums=tuple(checksums)), buckets=tuple(buckets))


def poisoned(value):
    """Weights with one number that is none, whole and signed."""
    model = moved_model()
    with torch.no_grad():
        next(model.parameters())[0, 0] = value
    return make_update(named_weights(model), version=1, base_version=0)


MALFORMED = {
    "an offset below 0": lambda update: spec(update, 1, offset=-4),
    "an offset behind the bucket": lambda update: spec(update, 1, offset=1 << 40),
    "an offset between elements": lambda update: spec(update, 1, offset=2),
    "an offset that is no integer": lambda update: spec(update, 1, offset=0.0),
    "two tensors in one place": lambda update: spec(
        update, 3, bucket=update.manifest.tensors[2].bucket, offset=update.manifest.tensors[2].offset
    ),
    "a bucket index below 0": lambda update: spec(update, 1, bucket=-1),
    "a bucket index too high": lambda update: spec(update, 1, bucket=999),
    "a bucket index that is a bool": lambda update: spec(update, 1, bucket=True),
    "a bucket that is cut": lambda update: bucket(update, -1, update.buckets[-1][:-4]),
    "a bucket of other numbers": lambda update: bucket(update, 0, update.buckets[0].astype(np.float32)),
    "a bucket of two dimensions": lambda update: bucket(update, 0, update.buckets[0].reshape(2, -1)),
    "buckets that are bytes": lambda update: dataclasses.replace(
        update, buckets=tuple(each.tobytes() for each in update.buckets)
    ),
    "no buckets": lambda update: dataclasses.replace(update, buckets=None),
    "other bytes, signed": lambda update: bucket(update, 0, update.buckets[0] ^ 1),
    "a name that is no text": lambda update: spec(update, 1, name=7),
    "a name twice": lambda update: spec(update, 1, name=update.manifest.tensors[0].name),
    "a shape of floats": lambda update: spec(update, 1, shape=(1.0,)),
    "another shape of the same size": lambda update: spec(
        update, 0, shape=tuple(reversed(update.manifest.tensors[0].shape))
    ),
    "another dtype": lambda update: spec(update, 1, dtype="float16"),
    "a tensor too few": lambda update: manifest(update, tensors=update.manifest.tensors[:-1]),
    "tensors in another order": lambda update: manifest(update, tensors=update.manifest.tensors[::-1]),
    "tensors that are none": lambda update: manifest(update, tensors=(None,)),
    "no tensors": lambda update: manifest(update, tensors=None),
    "another checksum": lambda update: manifest(update, checksum=hashlib.blake2b(b"").hexdigest()[:32]),
    "a checksum that is no text": lambda update: manifest(update, checksum=None),
    "bucket checksums that are none": lambda update: manifest(update, bucket_checksums=None),
    "no manifest": lambda update: dataclasses.replace(update, manifest=None),
    "a version that is text": lambda update: dataclasses.replace(update, version="1"),
    "a version that is held": lambda update: dataclasses.replace(update, version=0),
    "a version below 0": lambda update: dataclasses.replace(update, version=-1),
    "a base behind the version": lambda update: dataclasses.replace(update, base_version=1),
    "a base that is none": lambda update: dataclasses.replace(update, base_version=None),
    "another kind": lambda update: dataclasses.replace(update, kind="delta"),
    "NaN": lambda update: poisoned(float("nan")),
    "infinity": lambda update: poisoned(float("-inf")),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_update_is_refused_before_a_weight_changes(kind):
    replica = local_replica()
    before = {name: tensor.clone() for name, tensor in replica._weights}
    checksum = replica.health().checksum
    with RolloutPool([replica]) as pool:
        with pytest.raises(WeightSyncError, match="refused by every replica, version 0 goes on serving"):
            pool.update(MALFORMED[kind](moved_update()))
        assert (pool.version, pool.states) == (0, ("READY",))
        assert all(torch.equal(before[name], tensor) for name, tensor in replica._weights)
        (health,) = pool.health()
        assert (health.version, health.checksum) == (0, checksum)
        rollouts = list(pool.generate(make_requests(prompts(3), Sampling(max_tokens=4))))
        assert {version for rollout in rollouts for version in rollout.policy_versions} == {0}
        (receipt,) = pool.update(moved_update())
        assert receipt.accepted


def test_weights_that_are_not_finite_pass_where_they_are_allowed():
    engine = local_replica().engine
    replica = LocalReplica(engine, engine.policy.model, check_finite_weights=False)
    assert replica.update(poisoned(float("nan"))).accepted


def test_a_base_behind_what_is_held_is_refused():
    replica = local_replica()
    assert replica.update(moved_update(5)).accepted
    stale = make_update(named_weights(moved_model()), version=6, base_version=4)
    assert "VersionMismatch" in replica.update(stale).error


class Breaks:
    """A write that breaks off in the middle, as often as it is told to."""

    def __init__(self, error, times):
        self.error, self.times, self.load = error, times, replica_module.load_update

    def __call__(self, update, own):
        if not self.times:
            return self.load(update, own)
        self.times -= 1
        self.load(
            dataclasses.replace(
                update, manifest=dataclasses.replace(update.manifest, tensors=update.manifest.tensors[:3])
            ),
            own[:3],
        )
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no memory"), OSError("gone"), MemoryError()], ids=repr)
def test_a_write_that_breaks_off_once_is_made_again_whole(error, monkeypatch):
    monkeypatch.setattr(replica_module, "load_update", Breaks(error, 1))
    with RolloutPool([local_replica()]) as pool:
        update = moved_update()
        pool.update(update)
        (health,) = pool.health()
        assert (health.version, health.checksum, pool.states) == (1, update.manifest.checksum, ("READY",))


def broken_off(monkeypatch):
    """A pool of one replica, with requests in flight, whose weights are of two versions."""
    monkeypatch.setattr(replica_module, "load_update", Breaks(RuntimeError("no memory"), 2))
    pool = RolloutPool([local_replica()])
    requests = asked(4, seed=1, shortest=4, step=20)
    rollouts = pool.generate(requests)
    finished = [next(rollouts)]
    with pytest.raises(WeightSyncError, match="RuntimeError: no memory"):
        pool.update(moved_update())
    return pool, requests, finished, rollouts


def check_that_mixed_weights_serve_nothing(monkeypatch):
    pool, requests, finished, rollouts = broken_off(monkeypatch)
    assert pool.states == ("STALE",)
    with pytest.raises(ReplicaError, match="no replica is ready"):
        next(rollouts)
    with pytest.raises(ReplicaError, match="holds weights of two versions"):
        pool._members[0].replica.submit(requests)
    update = moved_update(2, 1.2)
    (receipt,) = pool.update(update)
    assert (receipt.accepted, receipt.checksum) == (True, update.manifest.checksum)
    check_complete(requests, [*finished, *rollouts])


def test_a_write_that_breaks_off_for_good_leaves_a_replica_that_serves_nothing(monkeypatch):
    check_that_mixed_weights_serve_nothing(monkeypatch)


def test_planted_a_replica_that_serves_on_with_mixed_weights_is_noticed(monkeypatch):
    write = LocalReplica._write

    def careless(self, update, own):
        try:
            write(self, update, own)
        finally:
            self._is_whole = True

    monkeypatch.setattr(LocalReplica, "_write", careless)
    with pytest.raises(AssertionError):
        check_that_mixed_weights_serve_nothing(monkeypatch)


def test_an_update_beside_a_running_step_waits_for_its_end():
    replica = local_replica()
    inside, go_on, order = threading.Event(), threading.Event(), []
    step = replica.engine.step

    def slow_step():
        inside.set()
        go_on.wait(timeout=60)
        result = step()
        order.append(("step", replica.engine.policy_version))
        return result

    replica.engine.step = slow_step
    replica.submit(make_requests(prompts(2), Sampling(max_tokens=4, ignore_eos=True)))
    stepping = threading.Thread(target=replica.poll)
    updating = threading.Thread(
        target=lambda: order.append(("update", replica.update(moved_update()).version))
    )
    stepping.start()
    assert inside.wait(timeout=60)
    updating.start()
    go_on.set()
    stepping.join(timeout=60)
    updating.join(timeout=60)
    assert order[0] == ("step", 0)
    assert order[-1] == ("update", 1)
