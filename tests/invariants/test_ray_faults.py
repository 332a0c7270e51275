"""Faults of Ray actors, by name: none ends a call in an error of Ray's own, and none loses a rollout."""

import dataclasses
import os
import signal
import threading
import time

import pytest

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import InvalidInput, ReplicaError, ReplicaFault
from blockroll.rollout.pool.makers import join_ray_pool, make_ray_pool
from blockroll.rollout.pool.ray_cluster import ray_address
from blockroll.rollout.pool.weight_sync import make_update, named_weights
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.invariants import test_stale
from tests.invariants.test_calls import asked, check_complete
from tests.invariants.test_pool import drop_a_bucket, moved_model, moved_update
from tests.invariants.test_ray import checkpoint  # noqa: F401 - a fixture
from tests.invariants.test_ray_cluster import in_a_process
from tests.models import prompts

ray = pytest.importorskip("ray")
CONFIG = RolloutConfig(num_replicas=2, threads_per_replica=1, max_batch_size=8, plan="two_forward(4)")

SHUT_DOWN_UNDER_A_POOL = """
import ray
from blockroll import RolloutPool, Sampling
from blockroll.errors import ReplicaError

def shut_down_and_ask(again):
    pool = RolloutPool.from_pretrained("tiny", backend="ray", num_replicas=1)
    requests = [
        *pool.requests(["1+1=?"], Sampling(max_tokens=1)),
        *pool.requests(["1+1=?"] * 3, Sampling(max_tokens=400, ignore_eos=True), seed=1),
    ]
    rollouts = pool.generate(requests)
    read = [next(rollouts)]
    ray.shutdown()
    if again:
        ray.init(log_to_driver=False, logging_level="ERROR")
    for ask in (rollouts.__next__, lambda: list(pool.generate(requests)), lambda: pool.sync(model)):
        try:
            ask()
        except ReplicaError as error:
            print(error)
    print(len(read) + len(rollouts.close()) == len(requests))
    pool.close()
    print(ray.is_initialized() is again)

from blockroll.policies.hf import HFPolicy
model = HFPolicy.from_pretrained("tiny").model
shut_down_and_ask(False)
shut_down_and_ask(True)
"""


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)


@pytest.fixture
def pool(ray_session, checkpoint):  # noqa: F811 - the fixture
    with make_ray_pool(PolicyConfig(path=checkpoint), CONFIG, name="faults") as pool:
        yield pool


@pytest.mark.slow
def test_ray_that_is_shut_down_under_a_pool_is_named_and_leaves_nothing_to_close():
    with in_a_process(SHUT_DOWN_UNDER_A_POOL) as process:
        said = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 0
    assert len(said) == 10
    for line in (*said[:3], *said[5:8]):
        assert "ray.shutdown() was called in this process while its pool was in use; make another" in line
    assert said[3:5] + said[8:] == ["True"] * 4


@pytest.mark.slow
def test_pools_that_joined_actors_get_nothing_from_one_that_missed_an_update(pool):
    requests = test_stale.asked(13)
    with join_ray_pool("faults", PolicyConfig(path="tiny"), CONFIG, address=ray_address()) as joined:
        with pytest.raises(InvalidInput, match="joined the replicas of another process"):
            joined.sync(moved_model(0.9))
        rollouts = joined.generate(requests)
        finished = [next(rollouts)]
        replica = pool._members[1].replica
        update = replica.update
        replica.update = lambda sent: update(drop_a_bucket(sent))
        arrived = {each.request.request_id for each in rollouts._call.arrived}
        pool.update(moved_update(1))
        finished += rollouts
        again = list(joined.generate(asked(8, seed=2)))
        assert (pool.states, joined.states) == (("READY", "STALE"),) * 2
        assert {each.request.request_id for each in finished} == {each.request_id for each in requests}
        late = [each for each in finished[1:] if each.request.request_id not in arrived]
        assert {each.policy_versions[-1] for each in (*late, *again)} == {1}
        replica.update = update
        pool.update(make_update(named_weights(moved_model(0.9)), version=2, base_version=1))
        list(joined.generate(asked(8, seed=2)))
        assert (pool.states, joined.states) == (("READY", "READY"),) * 2


class NoPickle:
    """A logits processor that stays in its process."""

    def __call__(self, input_ids, scores):
        return scores

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("stays where it is")


class NoUnpickle(NoPickle):
    """One that can be sent, and not received."""

    def __reduce__(self):
        return int, ("no number",)


@pytest.mark.slow
def test_what_ray_cannot_carry_is_its_requests_failure_and_what_an_actor_raises_is_named(pool):
    requests = make_requests(prompts(6), Sampling(max_tokens=8, ignore_eos=True))
    for number, processor in ((1, NoPickle()), (3, NoUnpickle())):
        sampling = dataclasses.replace(requests[number].sampling, logits_processors=(processor,))
        requests[number] = dataclasses.replace(requests[number], sampling=sampling)
    errors = {each.request.request_id: each.error for each in pool.generate(requests)}
    assert [name for name, error in sorted(errors.items()) if error is None] == ["r0", "r2", "r4", "r5"]
    assert "InvalidInput: what was asked cannot be sent to replica" in errors["r1"]
    assert "no number" in errors["r3"]
    calls = pool._members[0].replica._calls
    with pytest.raises(ReplicaFault, match="replica 0 raised TypeError in its process, which goes on: "):
        calls.ask("enter", ["no name"])
    unreachable = pytest.raises(ReplicaError, match="replica 0 cannot be reached: Ray says RaySystemError: ")
    with unreachable, calls._named_errors():
        raise ray.exceptions.RaySystemError("the object store is gone")
    assert pool.states == ("READY", "READY")


@pytest.mark.slow
def test_a_chat_and_nested_calls_of_two_threads_survive_replicas_that_are_killed(ray_session, checkpoint):  # noqa: F811
    policy, config = PolicyConfig(path="tiny", device="cpu"), dataclasses.replace(CONFIG, num_replicas=3)
    with make_ray_pool(policy, config) as pool:
        victims = [health.pid for health in pool.health()]
        found = []

        def read(seed):
            outer, finished = asked(6, seed=seed), []
            for number, rollout in enumerate(pool.generate(outer)):
                finished.append(rollout)
                inner = asked(3, seed=10 * seed + number)
                if (seed, number) == (1, 1):
                    kill(victims[2])
                check_complete(inner, list(pool.generate(inner)))
            check_complete(outer, finished)
            found.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=240)
        assert sorted(found) == [1, 2]
        assert pool.states == ("READY", "READY", "DEAD")

        pool.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        sampling = Sampling(max_tokens=80, ignore_eos=True)
        messages = [{"role": "user", "content": "1+1=?"}]
        answers = pool.chat(messages, sampling, num_samples=4)
        killed = []
        for member, pid in zip(pool._members[:2], victims[:2], strict=True):

            def killed_before_it_answers(member=member, pid=pid, poll=member.replica.poll):
                if not killed and member.in_flight:
                    killed.append(pid)
                    kill(pid)
                return poll()

            member.replica.poll = killed_before_it_answers
        assert pool.chat(messages, sampling, num_samples=4) == answers
        assert sorted(pool.states) == ["DEAD", "DEAD", "READY"]
        kill(pool.health()[0].pid)
        with pytest.raises(ReplicaError, match=r"no replica is ready .* died: .* make another pool"):
            pool.chat(messages, sampling)


@pytest.fixture
def hanging(ray_session, checkpoint):  # noqa: F811 - the fixture
    """A pool whose second replica can be stopped as a process that hangs is, and how."""
    stopped = []
    with make_ray_pool(PolicyConfig(path=checkpoint), CONFIG, client_timeout_s=10) as pool:

        def stop():
            stopped.append(pool.health()[1].pid)
            os.kill(stopped[0], signal.SIGSTOP)
            return stopped[0]

        try:
            yield pool, stop
        finally:
            for pid in filter(is_there, stopped):
                os.kill(pid, signal.SIGCONT)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_there(pid):
        assert time.monotonic() < deadline, "a replica that hangs was not ended"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_replica_that_hangs_in_an_update_is_dead_within_the_time_limit_and_others_go_on(hanging):
    pool, stop = hanging
    requests = asked(13, seed=1)
    rollouts = pool.generate(requests)
    finished = [next(rollouts)]
    pid, began = stop(), time.monotonic()
    receipts = pool.update(moved_update(1))
    assert 10 <= time.monotonic() - began < 40
    assert pool.states == ("READY", "DEAD")
    assert [receipt.accepted for receipt in receipts] == [True, False]
    assert receipts[1].error == "replica 1 did not answer within 10 s"
    finished += rollouts
    check_complete(requests, finished)
    assert all(rollout.error is None for rollout in finished)
    wait_for_end(pid)


@pytest.mark.slow
@pytest.mark.parametrize("is_limited", [True, False], ids=["limited", "planted without a limit"])
def test_a_replica_that_hangs_when_it_is_told_what_to_expect_is_named(hanging, is_limited):
    pool, stop = hanging
    replica, errors = pool._members[1].replica, []
    if not is_limited:
        replica._update_timeout_s = None

    def expect():
        try:
            replica.expect(0)
        except ReplicaError as error:
            errors.append(str(error))

    pid, thread = stop(), threading.Thread(target=expect)
    thread.start()
    thread.join(20)
    assert thread.is_alive() != is_limited
    if is_limited:
        assert errors == ["replica 1 did not answer within 10 s"]
        wait_for_end(pid)
    else:
        os.kill(pid, signal.SIGCONT)
        thread.join(20)
        assert not errors
