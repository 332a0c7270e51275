"""A Ray cluster that runs already is joined and left as it was; actors are shared by several processes."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import ReplicaError
from blockroll.rollout.pool.makers import join_ray_pool, make_ray_pool
from tests.invariants.test_calls import asked, check_complete

ray = pytest.importorskip("ray")
CONFIG = RolloutConfig(num_replicas=1, max_batch_size=8, plan="two_forward(8)")
TINY = PolicyConfig(path="tiny", device="cpu")

USE_A_POOL = """
import ray
from blockroll import RolloutPool, Sampling
with RolloutPool.from_pretrained("tiny", backend="ray", num_replicas=1, plan="plain") as pool:
    rollouts = list(pool.generate(pool.requests(["1+1=?"], Sampling(max_tokens=4))))
    print(ray.get_runtime_context().gcs_address, len(rollouts), flush=True)
print(ray.is_initialized(), flush=True)
"""
JOIN_AND_HANG = """
import sys, time
from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.rollout.pool.makers import join_ray_pool
from tests.invariants.test_calls import asked
pool = join_ray_pool(
    "dead-client", PolicyConfig(path="tiny", device="cpu"), RolloutConfig(num_replicas=1), address=sys.argv[1]
)
rollouts = pool.generate(asked(6, seed=1, shortest=60, step=1))
pool._router._serve(rollouts._call)
print("asked", flush=True)
time.sleep(600)
"""


def in_a_process(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def cluster_that_ray_start_left(**environment):
    """What finds it, as variables of the environment, and its address."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # sockets need a short path
        command = [os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block"]
        options = ["--num-cpus=1", "--include-dashboard=false", "--port=0"]
        cluster = subprocess.Popen(
            [*command, *options],
            env={**os.environ, "RAY_TMPDIR": folder, **environment},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            file = os.path.join(folder, "ray", "ray_current_cluster")
            for _ in range(300):
                if os.path.exists(file):
                    break
                time.sleep(0.2)
            with open(file) as opened:
                yield {"RAY_TMPDIR": folder}, opened.read().strip()
        finally:
            # Ended by hand, `ray start` gives its daemons half a minute.
            for process in [*psutil.Process(cluster.pid).children(recursive=True), cluster]:
                process.kill()
            cluster.wait(timeout=60)


@pytest.mark.slow
def test_a_cluster_that_ray_start_left_is_joined_and_left_running():
    with cluster_that_ray_start_left(RAY_AUTH_MODE="disabled") as (where, address):
        for named in ({}, {"RAY_ADDRESS": address}):
            process = in_a_process(USE_A_POOL, **where, **named, RAY_AUTH_MODE="disabled")
            said, _ = process.communicate(timeout=180)
            assert said.split() == [address, "1", "False"]


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_so():
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    with cluster_that_ray_start_left(**token) as (where, address):
        refused = in_a_process(
            USE_A_POOL, **where, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled", RAY_NUM_REDIS_GET_RETRIES="1"
        )
        said, errors = refused.communicate(timeout=180)
        assert not said
        assert re.search(
            rf"ReplicaError: the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE", errors
        )
        said, _ = in_a_process(USE_A_POOL, **where, **token, RAY_ADDRESS=address).communicate(timeout=180)
        assert said.split() == [address, "1", "False"]


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    if ray.is_initialized():
        pytest.skip("this process has a cluster already")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ReplicaError, match=r"no Ray cluster answers at 127\.0\.0\.1:1.*RAY_ADDRESS"):
        make_ray_pool(TINY, CONFIG)


@pytest.mark.slow
def test_pools_share_actors_under_the_same_ids_and_a_dead_client_leaves_nothing(ray_session):
    address = ray.get_runtime_context().gcs_address
    with make_ray_pool(TINY, CONFIG, name="dead-client", client_timeout_s=3.0) as pool:
        with in_a_process(JOIN_AND_HANG, address) as client:
            assert client.stdout.readline() == "asked\n"
            client.kill()
        assert [health.num_requests for health in pool.health()] == [6]
        mine = asked(3, seed=5)
        check_complete(mine, list(pool.generate(mine)))
        time.sleep(3.5)
        check_complete(mine, list(pool.generate(mine)))
        assert [health.num_requests for health in pool.health()] == [0]

        with join_ray_pool("dead-client", TINY, CONFIG, address=address) as other:
            theirs = asked(3, seed=6)
            ours, others = pool.generate(mine), other.generate(theirs)
            first, second = next(others), next(ours)
            time.sleep(3.5)  # longer than the actor waits for a client, while the other one asks
            check_complete(mine, [second, *ours])
            check_complete(theirs, [first, *others])
    assert ray.is_initialized()


@pytest.mark.parametrize("address", ["nonsense", "a:b"])
def test_what_is_no_address_is_named(address, monkeypatch):
    if ray.is_initialized():
        pytest.skip("this process has a cluster already")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ReplicaError, match=f"'{address}' is no address of a Ray cluster: give RAY_ADDRESS"):
        make_ray_pool(PolicyConfig(), RolloutConfig())
