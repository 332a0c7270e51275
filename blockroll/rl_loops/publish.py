"""Handing a learner's weights to a pool, and making sure that every replica serves just these."""

from collections.abc import Iterable

import torch
from torch import Tensor

from blockroll.errors import WeightSyncError
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.weight_sync import make_update
from blockroll.types import UpdateReceipt, WeightUpdate


def publish(
    pool: RolloutPool,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Send a version to every replica, or check that they hold it if it is the pool's own already."""
    update = make_update(tensors, version=version, base_version=pool.version, dtype=dtype)
    if version > pool.version:
        require_accepted(pool.update(update), update)
    else:
        require_equal_weights(pool, update)


def publish_or_keep(pool: RolloutPool, tensors: Iterable[tuple[str, Tensor]], *, after: int = -1) -> int:
    """Send the weights as the pool's next version above `after`; gives the version they are served as.

    A pool that was never updated and holds these very weights keeps its version 0.
    """
    update = make_update(tensors, version=max(pool.version, after) + 1, base_version=pool.version)
    if pool.version == 0 and after < 0:
        held = {health.checksum for health in pool.health()}
        if held == {update.manifest.checksum}:
            return 0
    require_accepted(pool.update(update), update)
    return update.version


def require_accepted(receipts: Iterable[UpdateReceipt], update: WeightUpdate) -> None:
    """WeightSyncError, naming replica and cause, unless every replica holds just this update."""
    expected = (update.version, update.manifest.checksum)
    wrong = [
        f"replica {receipt.replica_id} holds version {receipt.version}, checksum {receipt.checksum}"
        + (f" ({receipt.error})" if receipt.error else "")
        for receipt in receipts
        if not receipt.accepted or (receipt.version, receipt.checksum) != expected
    ]
    if wrong:
        raise WeightSyncError(
            f"version {update.version} with checksum {update.manifest.checksum} is not served everywhere: "
            + "; ".join(wrong)
        )


def require_equal_weights(pool: RolloutPool, update: WeightUpdate) -> None:
    """Before the first rollout: every replica must hold the learner's weights, byte for byte."""
    expected = update.manifest.checksum
    for index, health in enumerate(pool.health()):
        if health.checksum != expected:
            raise WeightSyncError(
                f"replica {index} (process {health.pid}) started from weights {health.checksum}, the "
                f"learner from {expected}: give the pool the checkpoint that the run starts from"
            )
