"""A replica in a process of its own: a Ray actor, and its handle in the pool's process.

Weights travel through the object store. Processes that know an actor's name share it: each has a pool of its
own over the same actors, and gets its own rollouts back. Weights come from the process that made them.
"""

import dataclasses
import logging
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from blockroll.errors import (
    BlockrollError,
    InvalidInput,
    ReplicaError,
    ReplicaFault,
    StaleReplica,
    WeightSyncError,
)
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.drafters.history import MAX_TOKENS
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.pool.ray_calls import ActorCalls
from blockroll.rollout.pool.replica import LocalReplica
from blockroll.rollout.pool.shared import SharedReplica
from blockroll.rollout.pool.untold import UntoldTexts
from blockroll.types import FinishedText, Plan, ReplicaHealth, Request, Rollout, UpdateReceipt, WeightUpdate

_POLL_WAIT_S = 0.02
_START_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 5.0  # to write what the audit still holds

logger = logging.getLogger(__name__)

NAMESPACE = "blockroll"


class ReplicaActor:
    """What runs inside the actor's process: threads set, buckets fetched, clients kept apart."""

    def __init__(
        self, build: Callable[[], LocalReplica], *, num_threads: int, client_timeout_s: float
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._refusal: BlockrollError | None = None
        try:
            self._replica = build()
        except BlockrollError as refusal:  # raised here, Ray would report no more than a death
            self._refusal = refusal
            return
        self._shared = SharedReplica(self._replica, client_timeout_s=client_timeout_s)

    def limits(self) -> Limits | BlockrollError:
        return self._refusal or self._replica.limits

    def told(self) -> tuple[str | None, str]:
        return self._replica.notice, self._replica.kernels

    def enter(self, client: str) -> None:
        self._shared.enter(client)

    def submit(self, requests: Sequence[Request], client: str) -> bool:
        return self._shared.submit(requests, client)

    def poll(self, client: str, texts: Sequence[FinishedText]) -> tuple[Rollout, ...] | None:
        self._replica.tell_history(texts)
        return self._shared.poll(client)

    def abort(self, request_ids: Sequence[str], client: str) -> tuple[Rollout, ...]:
        return self._shared.abort(request_ids, client)

    def leave(self, client: str) -> None:
        self._shared.leave(client)

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        return self._replica.update(dataclasses.replace(update, buckets=tuple(map(_fetch, update.buckets))))

    def expect(self, version: int) -> None:
        self._replica.expect(version)

    def close(self) -> None:
        if self._refusal is None:
            self._replica.close()

    def devices(self) -> tuple[str, ...]:
        return tuple(f"{socket.gethostname()}:{index}" for index in ray.get_gpu_ids())

    def release_memory(self) -> None:
        self._replica.release_memory()

    def hold_plan(self, plan: Plan | None) -> None:
        self._replica.hold_plan(plan)

    def take_evidence(self) -> Evidence:
        return self._replica.take_evidence()

    def save_history(self, path: Path) -> None:
        self._replica.save_history(path)

    def load_history(self, path: Path) -> None:
        self._replica.load_history(path)

    def health(self) -> ReplicaHealth:
        return self._replica.health()


class RayReplica:
    """A replica actor, seen from the pool. One poll is always under way while it has requests."""

    def __init__(
        self, replica_id: int, actor: Any, *, is_own: bool = True, update_timeout_s: float = 600
    ) -> None:
        """A handle of an actor; only the process whose own it is may close it.

        One that has not taken an update within `update_timeout_s` is killed, and dead from then on.
        """
        self.replica_id = replica_id
        self._calls = ActorCalls(replica_id, actor)
        self._is_own, self._update_timeout_s = is_own, update_timeout_s
        self._client = uuid.uuid4().hex
        self._held: dict[str, Request] = {}  # submitted, and not back yet
        self._pending: ray.ObjectRef[Any] | None = None
        self._untold = UntoldTexts(MAX_TOKENS)
        self._arrived: tuple[Rollout, ...] = ()  # finished by a poll whose result an abort had to wait for
        self.limits: Limits
        self.notice: str | None = None
        self.kernels = ""

    @classmethod
    def start(
        cls,
        replica_id: int,
        build: Callable[[], LocalReplica],
        *,
        num_threads: int,
        num_gpus: float = 0,
        name: str | None = None,
        client_timeout_s: float = 600,
    ) -> Self:
        """A new actor around what `build` makes there; others can find it by `name`.

        `client_timeout_s` bounds how long it waits for processes that share it, and they for its updates.
        """
        threads = str(num_threads)
        options: dict[str, Any] = {} if name is None else {"name": name, "namespace": NAMESPACE}
        actor = (
            ray.remote(ReplicaActor)
            .options(
                num_cpus=0,  # cores are shared by explicit thread counts, not by Ray's bookkeeping
                num_gpus=num_gpus,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
                **options,
            )
            .remote(build, num_threads=num_threads, client_timeout_s=client_timeout_s)
        )
        return cls(replica_id, actor, update_timeout_s=client_timeout_s)

    @classmethod
    def join(cls, replica_id: int, name: str) -> Self:
        """The actor of this name, which another process has made."""
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except (ValueError, RayError) as error:
            raise ReplicaError(f"there is no replica of the name {name!r}: {error}") from error
        return cls(replica_id, actor, is_own=False)

    def wait_until_ready(self) -> None:
        """Block until the policy is loaded; raises what its construction raised."""
        limits = self._calls.ask("limits", timeout_s=_START_TIMEOUT_S)
        if isinstance(limits, BlockrollError):
            raise limits
        self.limits = limits
        self.notice, self.kernels = self._calls.ask("told")
        self._calls.ask("enter", self._client)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests in the actor."""
        if not self._calls.ask("submit", requests, self._client):
            self._enter_again()
            self._calls.ask("submit", requests, self._client)
        self._held.update((request.request_id, request) for request in requests)

    def poll(self) -> tuple[Rollout, ...]:
        """Rollouts of the poll under way, if it has ended; waits for it only briefly."""
        if self._pending is None:
            self._start_poll()
        assert self._pending is not None
        if not self._calls.is_over(self._pending, wait_s=_POLL_WAIT_S):
            return ()
        finished = self._result_of_poll()
        self._start_poll()
        return finished

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Swap weights between two polls. ReplicaError, and its process ends, where it does not answer."""
        receipt: UpdateReceipt = self._ask_in_time("update", update)
        return receipt

    def expect(self, version: int) -> None:
        """Serve nothing, to no process, by weights older than this; it ends where it does not answer."""
        self._ask_in_time("expect", version)

    def _ask_in_time(self, method: str, argument: Any) -> Any:
        """What the actor answers. Late it is killed: it could still serve by weights that nobody knows."""
        try:
            return self._calls.ask(method, argument, timeout_s=self._update_timeout_s)
        except ReplicaError as error:
            if isinstance(error.__cause__, GetTimeoutError):
                self._calls.kill()
            raise

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now; those of them that a poll under way has finished come back too."""
        try:
            finished = self._result_of_poll()
        except (StaleReplica, ReplicaFault) as error:  # of a poll whose requests end anyhow
            logger.warning("a poll of what is aborted had failed: %s", error)
            finished, self._arrived = self._arrived, ()
        aborted: tuple[Rollout, ...] = self._calls.ask("abort", request_ids, self._client)
        ended = set(request_ids)
        self._arrived = tuple(each for each in finished if each.request.request_id not in ended)
        for request_id in request_ids:
            self._held.pop(request_id, None)
        return (*(each for each in finished if each.request.request_id in ended), *aborted)

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        self._calls.ask("release_memory")

    def hold_plan(self, plan: Plan | None) -> None:
        """Decode by this plan from the next step on; None: as was asked."""
        self._calls.ask("hold_plan", plan)

    def take_evidence(self) -> Evidence:
        """What it has seen of the tokens it drew since the last call."""
        evidence: Evidence = self._calls.ask("take_evidence")
        return evidence

    def tell_history(self, texts: Sequence[FinishedText]) -> None:
        """Texts that other replicas have finished, which go along with the next poll."""
        self._untold.add(texts)

    def save_history(self, path: Path) -> None:
        """Write the texts that drafts are looked up in to a file of the actor's machine, if there are any."""
        self._calls.ask("save_history", path.absolute())

    def load_history(self, path: Path) -> None:
        """Look drafts up in the texts of a file from now on."""
        self._calls.ask("load_history", path.absolute())

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        health: ReplicaHealth = self._calls.ask("health")
        return health

    def devices(self) -> tuple[str, ...]:
        """Accelerators that Ray gave the actor, as host:index."""
        devices: tuple[str, ...] = self._calls.ask("devices")
        return devices

    def close(self) -> None:
        """End the actor's process, if it is one's own; leave it otherwise.

        AuditError if it held rows of an audit that it could not write. One that does not answer is killed.
        Where the connection to Ray has ended, Ray has ended the actors of this process with it.
        """
        if not self._calls.is_connected:
            return
        if not self._is_own:
            self._calls.start("leave", self._client)
            return
        try:
            self._calls.ask("close", timeout_s=_CLOSE_TIMEOUT_S)
        except ReplicaError as death:
            logger.info("%s while it was closed", death)
        finally:
            self._calls.kill()

    def _start_poll(self) -> None:
        self._pending = self._calls.start("poll", self._client, self._untold.take())

    def _result_of_poll(self) -> tuple[Rollout, ...]:
        """What the poll under way finished, behind what an earlier one did."""
        pending, self._pending = self._pending, None
        polled = () if pending is None else self._calls.result(pending)
        finished, self._arrived = self._arrived, ()
        if polled is None:
            self._enter_again()
        else:
            finished += polled
        for rollout in finished:
            self._held.pop(rollout.request.request_id, None)
        return finished

    def _enter_again(self) -> None:
        """The actor has not heard of this process for too long, and ended what it had submitted."""
        self._client, self._pending = uuid.uuid4().hex, None
        self._calls.ask("enter", self._client)
        self._calls.ask("submit", list(self._held.values()), self._client)


def check_disjoint(trainer_devices: Sequence[str], replica_devices: Sequence[str]) -> None:
    """InvalidInput, listing both, if an accelerator is claimed by a trainer and by a replica."""
    both = sorted(set(trainer_devices) & set(replica_devices))
    if both:
        raise InvalidInput(
            f"accelerators {both} are claimed twice: ranks of the trainer hold {sorted(trainer_devices)}, "
            f"Ray gave the replicas {sorted(replica_devices)}; start Ray with the others only, or use "
            "placement='colocated'"
        )


def put_buckets(update: WeightUpdate) -> WeightUpdate:
    """The same update with its buckets in Ray's object store, written once for all replicas.

    WeightSyncError where Ray does not take them.
    """
    if not ray.is_initialized():  # asked for it, Ray would start a cluster without a replica
        raise ReplicaError(
            f"version {update.version} reaches no replica: ray.shutdown() was called in this process while "
            "its pool was in use; make another pool"
        )
    try:
        return dataclasses.replace(update, buckets=tuple(ray.put(bucket) for bucket in update.buckets))
    except RayError as error:
        raise WeightSyncError(
            f"version {update.version} could not be put into Ray's object store, the old version goes on "
            f"serving: {type(error).__name__}: {error}; start Ray with a larger object_store_memory"
        ) from error


def _fetch(bucket: object) -> np.ndarray | None:
    """A bucket's bytes from the object store; None if it is not there."""
    if not isinstance(bucket, ray.ObjectRef):
        return bucket if isinstance(bucket, np.ndarray) else None
    try:
        fetched: np.ndarray = ray.get(bucket)
    except RayError:
        return None
    return fetched
