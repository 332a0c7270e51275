"""Replicas as Ray actors: the same LocalReplica, one process each, weights through the object store.

One process makes the actors. Others may join them by name: each has a pool of its own over the same actors,
and gets its own rollouts back. Weights come from the process that made them.
"""

import dataclasses
import logging
import os
import socket
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import InvalidInput, MissingDependency, ReplicaError
from blockroll.policies.loading import load_tokenizer, resolve_checkpoint, resolve_device
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.types import ReplicaHealth, Request, Rollout, UpdateReceipt, WeightUpdate

try:
    import ray
    from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError
except ImportError as missing:
    raise MissingDependency(
        "Ray is not installed; install it with pip install 'blockroll[ray]', or use rollout.backend=local"
    ) from missing

_POLL_WAIT_S = 0.02
_START_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 5.0


NAMESPACE = "blockroll"


class ReplicaActor:
    """What runs inside the actor's process: threads set, buckets fetched, everything else is LocalReplica.

    Any poll lets the engine work for all clients; what it finishes for another one waits for that one's poll.
    """

    def __init__(self, replica_id: int, policy: PolicyConfig, config: RolloutConfig) -> None:
        import torch

        torch.set_num_threads(config.threads_per_replica)
        self._replica = LocalReplica.build(policy, config, replica_id=replica_id)
        self._clients: dict[str, str] = {}  # by request id
        self._finished: defaultdict[str, list[Rollout]] = defaultdict(list)  # by client

    def limits(self) -> Limits:
        return self._replica.limits

    def submit(self, requests: Sequence[Request], client: str) -> None:
        self._replica.submit(requests)
        self._clients.update((request.request_id, client) for request in requests)

    def poll(self, client: str) -> tuple[Rollout, ...]:
        for rollout in self._replica.poll():
            self._finished[self._clients.pop(rollout.request.request_id)].append(rollout)
        return tuple(self._finished.pop(client, ()))

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        return self._replica.update(dataclasses.replace(update, buckets=tuple(map(_fetch, update.buckets))))

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        for request_id in request_ids:
            self._clients.pop(request_id, None)
        return self._replica.abort(request_ids)

    def devices(self) -> tuple[str, ...]:
        return tuple(f"{socket.gethostname()}:{index}" for index in ray.get_gpu_ids())

    def release_memory(self) -> None:
        self._replica.release_memory()

    def health(self) -> ReplicaHealth:
        return self._replica.health()


class RayReplica:
    """A replica actor, seen from the pool. One poll is always under way while it has requests."""

    def __init__(self, replica_id: int, actor: Any, *, is_own: bool = True) -> None:
        """A handle of an actor; only the process whose own it is may close it."""
        self.replica_id = replica_id
        self.actor = actor  # its methods are made at run time
        self._is_own = is_own
        self._client = uuid.uuid4().hex
        self._pending: ray.ObjectRef[Any] | None = None
        self._arrived: tuple[Rollout, ...] = ()  # finished by a poll whose result an abort had to wait for
        self.limits: Limits

    @classmethod
    def start(
        cls, replica_id: int, policy: PolicyConfig, config: RolloutConfig, *, name: str | None = None
    ) -> Self:
        """A new actor, which others can find by `name`."""
        threads = str(config.threads_per_replica)
        options: dict[str, Any] = {} if name is None else {"name": name, "namespace": NAMESPACE}
        actor = (
            ray.remote(ReplicaActor)
            .options(
                num_cpus=0,  # cores are shared by explicit thread counts, not by Ray's bookkeeping
                num_gpus=config.gpus_per_replica if resolve_device(policy.device).type == "cuda" else 0,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
                **options,
            )
            .remote(replica_id, policy, config)
        )
        return cls(replica_id, actor)

    def wait_until_ready(self) -> None:
        """Block until the policy is loaded; raises what its construction raised."""
        self.limits = self._get(self.actor.limits.remote(), timeout=_START_TIMEOUT_S)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests in the actor."""
        self._get(self.actor.submit.remote(requests, self._client))

    def poll(self) -> tuple[Rollout, ...]:
        """Rollouts of the poll under way, if it has ended; waits for it only briefly."""
        if self._pending is None:
            self._pending = self.actor.poll.remote(self._client)
        ready, _ = ray.wait([self._pending], timeout=_POLL_WAIT_S)
        if not ready:
            return ()
        arrived, self._arrived = self._arrived, ()
        pending, self._pending = self._pending, self.actor.poll.remote(self._client)
        finished: tuple[Rollout, ...] = self._get(pending)
        return arrived + finished

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Swap weights between two polls."""
        receipt: UpdateReceipt = self._get(self.actor.update.remote(update))
        return receipt

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now; those of them that a poll under way has finished come back too."""
        finished = self._arrived
        if self._pending is not None:
            finished += self._get(self._pending)
            self._pending = None
        aborted: tuple[Rollout, ...] = self._get(self.actor.abort.remote(request_ids))
        ended = set(request_ids)
        self._arrived = tuple(each for each in finished if each.request.request_id not in ended)
        return (*(each for each in finished if each.request.request_id in ended), *aborted)

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        self._get(self.actor.release_memory.remote())

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        health: ReplicaHealth = self._get(self.actor.health.remote())
        return health

    def devices(self) -> tuple[str, ...]:
        """Accelerators that Ray gave the actor, as host:index."""
        devices: tuple[str, ...] = self._get(self.actor.devices.remote())
        return devices

    def close(self) -> None:
        """Kill the actor's process, if it is one's own."""
        if self._is_own:
            ray.kill(self.actor)

    def _get(self, reference: "ray.ObjectRef[Any]", timeout: float | None = None) -> Any:
        try:
            return ray.get(reference, timeout=timeout)
        except RayActorError as death:
            raise ReplicaError(f"replica {self.replica_id} died: {death}") from death
        except GetTimeoutError as late:
            raise ReplicaError(f"replica {self.replica_id} did not answer within {timeout:g} s") from late


def make_ray_pool(
    policy: PolicyConfig,
    config: RolloutConfig,
    *,
    name: str | None = None,
    taken_devices: Sequence[str] = (),
) -> RolloutPool:
    """One actor per replica. Ray is started if it is not running, and then stopped with the pool.

    With a `name` other processes can join: `join_ray_pool(name, ...)`. InvalidInput if Ray gives a replica
    one of the `taken_devices`, which are named host:index.
    """
    policy = dataclasses.replace(policy, path=str(resolve_checkpoint(policy.path).resolve()))
    started = not ray.is_initialized()
    if started:
        ray.init(
            num_cpus=max(1, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=True,
        )
    on_close = ray.shutdown if started else None
    try:
        replicas = [
            RayReplica.start(index, policy, config, name=name and f"{name}-{index}")
            for index in range(config.num_replicas)
        ]
        for replica in replicas:
            replica.wait_until_ready()
        check_disjoint(taken_devices, [each for replica in replicas for each in replica.devices()])
    except BaseException:
        if on_close:
            on_close()
        raise
    return RolloutPool(
        replicas,
        requests_per_replica=2 * config.max_batch_size,
        transport=put_buckets,
        on_close=on_close,
        tokenizer=load_tokenizer(policy.path),
    )


def check_disjoint(trainer_devices: Sequence[str], replica_devices: Sequence[str]) -> None:
    """InvalidInput, listing both, if an accelerator is claimed by a trainer and by a replica."""
    both = sorted(set(trainer_devices) & set(replica_devices))
    if both:
        raise InvalidInput(
            f"accelerators {both} are claimed twice: ranks of the trainer hold {sorted(trainer_devices)}, "
            f"Ray gave the replicas {sorted(replica_devices)}; start Ray with the others only, or use "
            "placement='colocated'"
        )


def ray_address() -> str:
    """Where other processes find the Ray of this one, as host:port."""
    address: str = ray.get_runtime_context().gcs_address
    return address


def join_ray_pool(name: str, policy: PolicyConfig, config: RolloutConfig, *, address: str) -> RolloutPool:
    """A pool over actors that another process has made; it sends them requests, and no weights."""
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    replicas = []
    for index in range(config.num_replicas):
        actor = ray.get_actor(f"{name}-{index}", namespace=NAMESPACE)
        replicas.append(RayReplica(index, actor, is_own=False))
        replicas[-1].wait_until_ready()
    return RolloutPool(
        replicas,
        requests_per_replica=2 * config.max_batch_size,
        on_close=ray.shutdown if started else None,
        tokenizer=load_tokenizer(policy.path),
    )


def put_buckets(update: WeightUpdate) -> WeightUpdate:
    """The same update with its buckets in Ray's object store, written once for all replicas."""
    return dataclasses.replace(update, buckets=tuple(ray.put(bucket) for bucket in update.buckets))


def _fetch(bucket: object) -> np.ndarray | None:
    """A bucket's bytes from the object store; None if it is not there."""
    if not isinstance(bucket, ray.ObjectRef):
        return bucket if isinstance(bucket, np.ndarray) else None
    try:
        fetched: np.ndarray = ray.get(bucket)
    except ObjectLostError:
        return None
    return fetched
