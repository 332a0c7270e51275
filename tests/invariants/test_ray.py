"""The same pool over Ray actors: equal tokens, real processes, real kills."""

import dataclasses
import os
import signal
import time

import pytest
from safetensors.torch import load_file, save_file

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import CheckpointError, InvalidInput, WeightSyncError
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rollout.pool.makers import make_ray_pool
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.invariants.test_pool import drop_a_bucket, flip_a_byte, moved_model, moved_update
from tests.models import prompts, random_model

ray = pytest.importorskip("ray")
SAMPLING = Sampling(max_tokens=24)
CONFIG = RolloutConfig(num_replicas=2, threads_per_replica=1, max_batch_size=8, plan="two_forward(4)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    random_model().save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pool(ray_session, checkpoint):
    with make_ray_pool(PolicyConfig(path=checkpoint), CONFIG) as pool:
        yield pool


def test_ray_equals_in_process_token_for_token(pool, checkpoint):
    requests = make_requests(prompts(48), SAMPLING)
    policy = HFPolicy.from_pretrained(checkpoint)
    assert_same_rollouts(run(policy, requests, Plan(4), max_batch_size=8), pool.generate(requests), policy)


@pytest.mark.slow
def test_actors_are_processes_of_their_own_with_the_threads_they_were_given(pool):
    reports = pool.health()
    assert len({report.pid for report in reports} | {os.getpid()}) == 3
    assert {report.num_threads for report in reports} == {1}


def test_updates_travel_through_the_object_store_and_are_checked(pool):
    update = moved_update(1)
    for receipt in (*pool.update(update), *pool.health()):
        assert (receipt.version, receipt.checksum) == (1, update.manifest.checksum)
    for damage, error in ((flip_a_byte, "ChecksumMismatch"), (drop_a_bucket, "BucketMissing")):
        with pytest.raises(WeightSyncError, match=f"version 1 goes on serving.*{error}"):
            pool.update(damage(moved_update(2, 0.9)))
    rollouts = list(pool.generate(make_requests(prompts(6), SAMPLING)))
    assert {version for r in rollouts for version in r.policy_versions} == {1}


@pytest.mark.slow
def test_a_replica_whose_bucket_is_lost_on_the_way_is_stale_and_serves_nothing(pool):
    replica = pool._members[1].replica
    inner = replica.update
    replica.update = lambda update: inner(drop_a_bucket(update))
    update = moved_update(1)
    receipts = pool.update(update)
    assert [receipt.accepted for receipt in receipts] == [True, False]
    assert pool.states == ("READY", "STALE")
    rollouts = list(pool.generate(make_requests(prompts(12), SAMPLING)))
    assert {version for r in rollouts for version in r.policy_versions} == {1}
    replica.update = inner
    tensors = named_weights(moved_model(0.9))
    pool.update(make_update(tensors, version=2, base_version=1))
    assert pool.states == ("READY", "READY")


@pytest.mark.failure(31)
def test_killing_a_replica_in_the_middle_loses_and_repeats_no_rollout(pool, checkpoint):
    requests = make_requests(prompts(64), dataclasses.replace(SAMPLING, max_tokens=64, ignore_eos=True))
    policy = HFPolicy.from_pretrained(checkpoint)
    want = run(policy, requests, Plan(4), max_batch_size=8)
    victim = pool.health()[1].pid
    got = []
    for rollout in pool.generate(requests):
        got.append(rollout)
        if len(got) == 5:
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.5)
    assert pool.states == ("READY", "DEAD")
    assert pool.num_redispatched > 0
    near_ties = assert_same_rollouts(want, got, policy)
    for rollout in got:
        name = rollout.request.request_id
        assert name in near_ties or rollout.stats.steps == want[name].stats.steps


@pytest.mark.slow
def test_a_checkpoint_that_a_replica_cannot_load_is_the_same_error_as_in_process(ray_session, tmp_path):
    random_model().save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing weights: lm_head\.weight\."):
        make_ray_pool(PolicyConfig(path=str(tmp_path)), CONFIG)


def test_a_model_that_is_not_supported_is_refused_before_any_process_starts(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InvalidInput, match="model family 'gpt2' is not supported; supported are llama, "):
        make_ray_pool(PolicyConfig(path=str(tmp_path)), CONFIG)
