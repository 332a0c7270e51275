"""One engine with its weights and version, behind the calls that a pool makes.

In process and inside a Ray actor it is the same class.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from blockroll.errors import ChecksumMismatch, StaleReplica
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.calibration.observer import Calibration
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.requests import Limits
from blockroll.rollout.pool.weight_sync.buckets import (
    ADAPTER_PREFIX,
    load_update,
    named_adapter_weights,
    named_weights,
    weights_checksum,
)
from blockroll.rollout.pool.weight_sync.checks import check_form, check_version, check_weights
from blockroll.types import FinishedText, Plan, ReplicaHealth, Request, Rollout, UpdateReceipt, WeightUpdate

logger = logging.getLogger(__name__)

_STEPS_PER_POLL = 16  # a poll returns after this many steps at the latest, so that updates need not wait long


class Replica(Protocol):
    """What a pool asks of an engine, wherever it runs.

    `submit` and `poll` raise StaleReplica where its weights are older than `expect` said, or are not whole,
    and ReplicaError where it died. Then nothing of a `submit` was taken.
    """

    replica_id: int
    limits: Limits
    notice: str | None  # what whoever made it should know; said once for a pool
    kernels: str  # which form of them runs there, and why

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue checked requests."""
        ...

    def poll(self) -> tuple[Rollout, ...]:
        """Rollouts finished since the last poll; lets the engine work meanwhile."""
        ...

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Check and swap weights at a step boundary; a refusal is a receipt, not an exception."""
        ...

    def expect(self, version: int) -> None:
        """Serve nothing by weights older than this, whoever asks; what is in flight can be aborted."""
        ...

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now and return what each had committed."""
        ...

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        ...

    def hold_plan(self, plan: Plan | None) -> None:
        """Decode by this plan from the next step on; None: as was asked."""
        ...

    def take_evidence(self) -> Evidence:
        """What it has seen of the tokens it drew since the last call."""
        ...

    def tell_history(self, texts: Sequence[FinishedText]) -> None:
        """Look drafts up in texts that other replicas have finished too; it waits for nothing."""
        ...

    def save_history(self, path: Path) -> None:
        """Write the texts that drafts are looked up in to a file, if there are any."""
        ...

    def load_history(self, path: Path) -> None:
        """Look drafts up in the texts of a file from now on."""
        ...

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        ...

    def close(self) -> None:
        """Free everything; calling it again changes nothing."""
        ...


class LocalReplica:
    """An engine in this process. After an update, running requests go on with a recomputed cache.

    Invariant: what it serves was drawn by weights of one version, whole. A call from another thread waits for
    the step boundary. After an error in the middle of writing weights, and while they are older than it was
    told to expect, it serves nothing (StaleReplica) until an update has written all of them.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        *,
        adapter: nn.Module | None = None,
        replica_id: int = 0,
        check_finite_weights: bool = True,
        calibration: Calibration | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`adapter` drafts for the model; an update may bring its weights too.

        `calibration` is an observer of the engine, if it has one.
        """
        self.replica_id = replica_id
        self.engine = engine
        self.limits = engine.limits
        self._on_close = on_close  # the engine's observers write what they still hold
        self._weights: list[tuple[str, Tensor]] = list(named_weights(model))
        self._adapter_weights = [] if adapter is None else list(named_adapter_weights(adapter))
        self.notice: str | None = None
        self.kernels = str(engine.kernels)
        self._check_finite_weights = check_finite_weights
        self._calibration = calibration
        self._is_whole = True  # False while weights are written, and after an error in the middle of it
        self._expected = engine.policy_version
        self._lock = threading.Lock()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests."""
        with self._lock:
            self._require_current()
            self.engine.submit(requests, are_checked=True)

    def poll(self) -> tuple[Rollout, ...]:
        """Run steps until a rollout finishes, at most a fixed number."""
        with self._lock:
            self._require_current()
            for _ in range(_STEPS_PER_POLL):
                if not self.engine.num_requests:
                    return ()
                finished = self.engine.step().finished
                if finished:
                    return finished
            return ()

    def update(self, update: WeightUpdate) -> UpdateReceipt:
        """Check everything, then swap; on a refusal the old version goes on serving.

        A receipt of version -1 says that an error came in the middle: the replica serves nothing.
        """
        with self._lock:
            error, own = None, self._weights
            try:
                check_form(update)
                check_version(update, self.engine.policy_version)
                if any(spec.name.startswith(f"{ADAPTER_PREFIX}.") for spec in update.manifest.tensors):
                    own = [*self._weights, *self._adapter_weights]
                check_weights(update, own, are_finite=self._check_finite_weights)
                self._write(update, own)
            except Exception as refusal:  # noqa: BLE001 - whatever was sent, the receipt says what came of it
                error = f"{type(refusal).__name__}: {refusal}"
            held = update.manifest.checksum if error is None else ""
            if error is not None and self._is_whole:
                held = weights_checksum(own)
            return UpdateReceipt(
                replica_id=self.replica_id,
                accepted=error is None,
                version=self.engine.policy_version if self._is_whole else -1,
                checksum=held,
                error=error,
            )

    def expect(self, version: int) -> None:
        """Serve nothing by weights older than this."""
        with self._lock:
            self._expected = version

    def weights_changed(self, version: int) -> None:
        """Weights that somebody else also holds have been changed in place, to this version."""
        with self._lock:
            self._renew(version)

    def abort(self, request_ids: Sequence[str]) -> tuple[Rollout, ...]:
        """End requests now and return what each had committed."""
        with self._lock:
            return self.engine.abort(request_ids)

    def release_memory(self) -> None:
        """Give the memory of keys and values back while nothing is served."""
        with self._lock:
            self.engine.release_memory()

    def hold_plan(self, plan: Plan | None) -> None:
        """Decode by this plan from the next step on; None: as was asked."""
        with self._lock:
            self.engine.hold_plan(plan)

    def take_evidence(self) -> Evidence:
        """What it has seen of the tokens it drew since the last call."""
        with self._lock:
            return Evidence() if self._calibration is None else self._calibration.take()

    def tell_history(self, texts: Sequence[FinishedText]) -> None:
        """Look drafts up in texts that other replicas have finished too."""
        with self._lock:
            self.engine.tell_history(texts)

    def save_history(self, path: Path) -> None:
        """Write the texts that drafts are looked up in to a file, if there are any."""
        with self._lock:
            self.engine.save_history(path)

    def load_history(self, path: Path) -> None:
        """Look drafts up in the texts of a file from now on; nothing is served meanwhile."""
        with self._lock:
            self.engine.load_history(path)

    def health(self) -> ReplicaHealth:
        """Version, checksum of the weights really held, load, threads, process."""
        with self._lock:
            return ReplicaHealth(
                version=self.engine.policy_version if self._is_whole else -1,
                checksum=weights_checksum(self._weights),
                num_requests=self.engine.num_requests,
                num_threads=torch.get_num_threads(),
                pid=os.getpid(),
            )

    def close(self) -> None:
        """Write what the audit still holds; nothing else outlives the object."""
        with self._lock:
            self._on_close()

    def _write(self, update: WeightUpdate, own: Sequence[tuple[str, Tensor]]) -> None:
        self._is_whole = False
        load_update(update, own)
        held = weights_checksum(own)
        if held != update.manifest.checksum:
            raise ChecksumMismatch(
                f"the weights of version {update.version} have checksum {held} once they are written, sent "
                f"was {update.manifest.checksum}"
            )
        self._renew(update.version)

    def _renew(self, version: int) -> None:
        """Serve this version. Keys and values that cannot be renewed now are renewed by the next step."""
        self._is_whole = False  # until nothing of other weights can be read any more
        self.engine.change_weights(version)
        self._is_whole = True
        try:
            self.engine.recompute_cache()
        except (RuntimeError, MemoryError) as failure:
            logger.warning(
                "replica %d renews its cache in the next step, because: %s", self.replica_id, failure
            )

    def _require_current(self) -> None:
        if not self._is_whole:
            raise StaleReplica(
                f"replica {self.replica_id} holds weights of two versions, because an update broke off: "
                "it serves again after one that succeeds"
            )
        if self.engine.policy_version < self._expected:
            raise StaleReplica(
                f"replica {self.replica_id} holds version {self.engine.policy_version}, published is "
                f"{self._expected}: it serves again after an update that succeeds"
            )
