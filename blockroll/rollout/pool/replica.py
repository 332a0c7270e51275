"""One engine with its weights and version, behind the six calls that a pool makes.

In process and inside a Ray actor it is the same class.
"""

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from blockroll.errors import InvalidInput, VersionMismatch, WeightSyncError
from blockroll.rollout.engine.engine import Engine
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.pool.weight_sync.buckets import (
    ADAPTER_PREFIX,
    check_update,
    load_update,
    named_adapter_weights,
    named_weights,
    weights_checksum,
)
from blockroll.types import ReplicaHealth, Request, Rollout, UpdateReceipt, WeightUpdate

_STEPS_PER_POLL = 16  # a poll returns after this many steps at the latest, so that updates need not wait long


class Replica(Protocol):
    """What a pool asks of an engine, wherever it runs."""

    replica_id: int
    limits: Limits

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue checked requests."""
        ...

    def poll(self) -> tuple[Rollout, ...]:
        """Rollouts finished since the last poll; lets the engine work meanwhile. ReplicaError if it died."""
        ...

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Check and swap weights at a step boundary; a refusal is a receipt, not an exception."""
        ...

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now and return what each had committed."""
        ...

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        ...

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        ...

    def close(self) -> None:
        """Free everything; calling it again changes nothing."""
        ...


class LocalReplica:
    """An engine in this process. After an update, running requests go on with a recomputed cache."""

    def __init__(
        self, engine: Engine, model: nn.Module, *, adapter: nn.Module | None = None, replica_id: int = 0
    ) -> None:
        """`adapter` drafts for the model; an update may bring its weights too."""
        self.replica_id = replica_id
        self.engine = engine
        self.limits = engine.limits
        self._weights: list[tuple[str, Tensor]] = list(named_weights(model))
        self._adapter_weights = [] if adapter is None else list(named_adapter_weights(adapter))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        self.engine.submit(requests)

    def poll(self) -> tuple[Rollout, ...]:
        """Run steps until a rollout finishes, at most a fixed number."""
        for _ in range(_STEPS_PER_POLL):
            if not self.engine.num_requests:
                return ()
            finished = self.engine.step().finished
            if finished:
                return finished
        return ()

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Check everything, then swap; on a refusal the old version goes on serving."""
        error = None
        brings_drafts = any(spec.name.startswith(f"{ADAPTER_PREFIX}.") for spec in update.manifest.tensors)
        own = [*self._weights, *self._adapter_weights] if brings_drafts else self._weights
        try:
            self._check_version(update)
            check_update(update, own)
        except WeightSyncError as refusal:
            error = f"{type(refusal).__name__}: {refusal}"
        else:
            load_update(update, own)
            self.weights_changed(update.version)
        return UpdateReceipt(
            replica_id=self.replica_id,
            accepted=error is None,
            version=self.engine.policy_version,
            checksum=weights_checksum(own),
            error=error,
        )

    def weights_changed(self, version: int) -> None:
        """Weights that somebody else also holds have been changed in place, to this version."""
        self.engine.policy_version = version
        self.engine.recompute_cache()

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now and return what each had committed."""
        return self.engine.abort(request_ids)

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        self.engine.release_memory()

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        return ReplicaHealth(
            version=self.engine.policy_version,
            checksum=weights_checksum(self._weights),
            num_requests=self.engine.num_requests,
            num_threads=torch.get_num_threads(),
            pid=os.getpid(),
        )

    def close(self) -> None:
        """Write what the audit still holds; nothing else outlives the object."""
        if self.engine.audit is not None:
            self.engine.audit.flush()

    def _check_version(self, update: WeightUpdate) -> None:
        if update.kind != "full":
            raise InvalidInput(f"weight updates of kind {update.kind!r} are not served; allowed is 'full'")
        if update.version <= self.engine.policy_version:
            raise VersionMismatch(
                f"version {update.version} does not follow version {self.engine.policy_version}, served now"
            )
