"""The pool over real engines: routing, weight updates and refusals, without processes."""

import dataclasses

import pytest
import torch

from blockroll.errors import InvalidInput, ReplicaError, WeightSyncError
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import MASK_ID, prompts, random_model, random_policy

PLAN = Plan(4)
SAMPLING = Sampling(max_tokens=12)


def local_replica(replica_id=0, *, max_batch_size=8):
    policy = HFPolicy(random_model())
    engine = Engine(policy, plan=PLAN, max_batch_size=max_batch_size)
    return LocalReplica(engine, policy.model, replica_id=replica_id)


def local_pool(num_replicas=2, **options):
    return RolloutPool([local_replica(index) for index in range(num_replicas)], **options)


def moved_model(factor=1.1):
    model = random_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def moved_update(version=1, factor=1.1):
    """Weights that differ from the replicas', in several buckets."""
    tensors = named_weights(moved_model(factor))
    return make_update(tensors, version=version, base_version=version - 1, bucket_bytes=4096)


def flip_a_byte(update, bucket=1):
    damaged = update.buckets[bucket].copy()
    damaged[len(damaged) // 2] ^= 1
    return dataclasses.replace(update, buckets=_replaced(update.buckets, bucket, damaged))


def drop_a_bucket(update):
    return dataclasses.replace(update, buckets=_replaced(update.buckets, 1, None))


def lose_the_last_bucket(update):
    return dataclasses.replace(update, buckets=update.buckets[:-1])


def swap_two_buckets(update):
    first, second, *rest = update.buckets
    return dataclasses.replace(update, buckets=(second, first, *rest))


def rename_a_tensor(update):
    first, *rest = update.manifest.tensors
    tensors = (dataclasses.replace(first, name="other"), *rest)
    return dataclasses.replace(update, manifest=dataclasses.replace(update.manifest, tensors=tensors))


def repeat_the_version(update):
    return dataclasses.replace(update, version=0)


DAMAGES = {
    "ChecksumMismatch": [flip_a_byte, swap_two_buckets],
    "BucketMissing": [drop_a_bucket, lose_the_last_bucket],
    "ManifestMismatch": [rename_a_tensor],
    "VersionMismatch": [repeat_the_version],
}


def _replaced(items, index, value):
    return tuple(value if position == index else item for position, item in enumerate(items))


class Saboteur:
    """A replica whose updates are damaged on the way; everything else is the replica's own."""

    def __init__(self, replica, damage):
        self._replica, self.damage = replica, damage
        self.replica_id, self.limits = replica.replica_id, replica.limits
        self.kernels = replica.kernels
        self.submit, self.poll, self.abort = replica.submit, replica.poll, replica.abort
        self.health, self.close, self.expect = replica.health, replica.close, replica.expect

    def update(self, update):
        return self._replica.update(self.damage(update) if self.damage else update)


def test_every_request_comes_back_once_and_equals_a_single_engine():
    requests = make_requests(prompts(40), SAMPLING)
    policy = random_policy()
    want = run(policy, requests, PLAN, max_batch_size=8)
    with local_pool() as pool:
        assert_same_rollouts(want, pool.generate(requests), policy)


def test_groups_stay_on_one_replica_and_the_load_is_shared():
    with local_pool(requests_per_replica=8) as pool:
        served: list[dict[str, str]] = []
        for member in pool._members:
            seen = {}
            served.append(seen)

            def submit(requests, seen=seen, inner=member.replica.submit):
                seen.update({request.request_id: request.group_id for request in requests})
                inner(requests)

            member.replica.submit = submit
        requests = [
            dataclasses.replace(request, group_id=f"g{index // 4}")
            for index, request in enumerate(make_requests(prompts(32), SAMPLING))
        ]
        assert len(list(pool.generate(requests))) == 32
    assert not set(served[0].values()) & set(served[1].values())
    assert all(8 <= len(seen) <= 24 for seen in served)


def test_a_bad_request_is_refused_before_any_starts():
    with local_pool() as pool:
        requests = [*make_requests(prompts(3), SAMPLING), *make_requests([()], SAMPLING, seed=1)]
        requests[-1] = dataclasses.replace(requests[-1], request_id="bad")
        with pytest.raises(InvalidInput, match="'bad' has an empty prompt"):
            pool.generate(requests)
        with pytest.raises(InvalidInput, match="unique"):
            pool.generate([requests[0], requests[0]])
        assert {health.num_requests for health in pool.health()} == {0}


def test_stopping_early_aborts_what_still_runs():
    with local_pool() as pool:
        rollouts = pool.generate(make_requests(prompts(40), SAMPLING))
        next(rollouts)
        rollouts.close()
        assert {health.num_requests for health in pool.health()} == {0}
        assert len(list(pool.generate(make_requests(prompts(5), SAMPLING)))) == 5


def test_after_an_update_every_replica_reports_the_learners_version_and_checksum():
    with local_pool() as pool:
        before = {health.checksum for health in pool.health()}
        for version, factor in ((1, 1.1), (2, 0.9)):
            update = moved_update(version, factor)
            assert len(update.buckets) > 3
            receipts = pool.update(update)
            for report in (*receipts, *pool.health()):
                assert (report.version, report.checksum) == (version, update.manifest.checksum)
            assert before.isdisjoint({update.manifest.checksum})
        rollouts = list(pool.generate(make_requests(prompts(10), SAMPLING)))
    policy = HFPolicy(moved_model(0.9))
    want = run(policy, make_requests(prompts(10), SAMPLING), PLAN, policy_version=2)
    assert_same_rollouts(want, rollouts, policy)


@pytest.mark.parametrize(
    ("error", "damage"),
    [(error, damage) for error, damages in DAMAGES.items() for damage in damages],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_update_is_named_and_the_old_version_goes_on_serving(error, damage):
    with local_pool() as pool:
        requests = make_requests(prompts(8), SAMPLING)
        before = list(pool.generate(requests))
        checksums = [health.checksum for health in pool.health()]
        with pytest.raises(WeightSyncError, match=f"refused by every replica, version 0 goes on.*{error}"):
            pool.update(damage(moved_update()))
        assert pool.num_refused_updates == 2
        assert pool.version == 0
        assert [health.checksum for health in pool.health()] == checksums
        after = list(pool.generate(requests))
        assert_same_rollouts(before, after, random_policy())
        assert {version for r in after for version in r.policy_versions} == {0}


def test_a_stale_replica_serves_nothing_until_an_update_succeeds():
    broken = Saboteur(local_replica(1), flip_a_byte)
    with RolloutPool([local_replica(0), broken]) as pool:
        receipts = pool.update(moved_update(1))
        assert [receipt.accepted for receipt in receipts] == [True, False]
        assert pool.states == ("READY", "STALE")
        assert pool.version == 1
        rollouts = list(pool.generate(make_requests(prompts(20), SAMPLING)))
        assert len(rollouts) == 20
        assert {version for r in rollouts for version in r.policy_versions} == {1}
        broken.damage = None
        pool.update(moved_update(2, 1.2))
        assert pool.states == ("READY", "READY")


def test_an_update_that_arrives_whole_at_the_second_try_is_accepted_and_counted():
    broken = Saboteur(local_replica(0), None)
    damages = [flip_a_byte, lambda update: update]
    broken.damage = lambda update: damages.pop(0)(update)
    with RolloutPool([broken]) as pool:
        (receipt,) = pool.update(moved_update(1))
        assert receipt.accepted
        assert pool.num_refused_updates == 1
        assert pool.states == ("READY",)


def test_a_pool_without_a_ready_replica_says_so():
    with RolloutPool([local_replica(0), Saboteur(local_replica(1), flip_a_byte)]) as pool:
        pool.update(moved_update(1))
        pool._members[0].state = "DEAD"
        with pytest.raises(ReplicaError, match=r"no replica is ready at version 1.*DEAD.*STALE"):
            list(pool.generate(make_requests(prompts(2), SAMPLING)))
    with pytest.raises(InvalidInput, match="at least one replica"):
        RolloutPool([])


def test_the_next_turn_of_a_group_goes_where_its_texts_are_until_weights_change():
    pool = local_pool()
    sampling = Sampling(max_tokens=8, ignore_eos=True, logit_bias={MASK_ID: -100.0})
    texts = [tuple(4 + (7 * group + 3 * place) % 20 for place in range(24)) for group in range(4)]

    def turn(groups, name):
        requests = [
            dataclasses.replace(request, group_id=f"g{group}", request_id=f"{name} {group}")
            for group, request in zip(
                groups, make_requests([texts[group] for group in groups], sampling), strict=True
            )
        ]
        finished = list(pool.generate(requests))
        for rollout in finished:
            group = int(rollout.request.group_id[1:])
            texts[group] = (*texts[group], *rollout.token_ids, 5, 6, 7)
        return {rollout.request.group_id: rollout.stats for rollout in finished}

    turn(range(4), "first")
    assert [member.replica.engine._cache.num_slots for member in pool._members] == [2, 2]
    later = turn((1, 3), "second")  # both on one replica; by load they would be one on each
    assert {name: stats.num_prefilled for name, stats in later.items()} == {"g1": 3, "g3": 3}
    pool.update(moved_update())
    assert {stats.num_reused for stats in turn(range(4), "third").values()} == {0}


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_closed_pool_serves_nothing_and_its_iterators_give_back_what_was_committed(num_read):
    """Replicas in this process would go on for ever, as if nothing had been closed."""
    pool = local_pool()
    requests = make_requests(prompts(6), Sampling(max_tokens=40, ignore_eos=True))
    rollouts = pool.generate(requests)
    read = [next(rollouts) for _ in range(num_read)]
    pool.close()
    for ask in (lambda: pool.generate(requests), lambda: pool.sync(moved_model())):
        with pytest.raises(InvalidInput, match="the pool was closed"):
            ask()
    with pytest.raises(InvalidInput, match="the pool was closed"):
        read.extend(iter(rollouts.__next__, None))  # keeps what came before the error
    left = rollouts.close()
    assert sorted(each.request.request_id for each in (*read, *left)) == [f"r{i}" for i in range(6)]
    assert {each.finish_reason for each in left} == {"abort"}
    pool.close()
