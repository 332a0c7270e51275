"""Where a trainer's replicas run: in each rank's own process, or as Ray actors on devices of their own."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from blockroll.config import RolloutConfig
from blockroll.policies.adapter import DraftAdapter, has_adapter
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.publish import publish
from blockroll.rl_loops.trl.weights import (
    are_whole,
    base_model,
    check_supported,
    copy_weights,
    copying_policy,
    full_weights,
    sharing_policy,
)
from blockroll.rollout.pool import RolloutPool
from blockroll.rollout.replica import LocalReplica
from blockroll.types import Request, Rollout


class Placement(Protocol):
    """What a trainer's rollouts need of it. One per rank."""

    def sync(self, version: int) -> None:
        """Bring every replica to the trainer's weights, as this version. All ranks call it."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts of this rank's requests, in any order."""
        ...

    def close(self) -> None:
        """Stop what was started for the trainer."""
        ...


class Colocated:
    """A replica in this process, without Ray. Between two batches it holds no keys and values."""

    def __init__(self, trainer: Any, config: RolloutConfig, adapter: str | Path | None) -> None:
        check_supported(trainer)
        self._trainer = trainer
        self._shares = are_whole(trainer)
        model, tokenizer = base_model(trainer.model), trainer.processing_class
        if self._shares:
            self.policy = sharing_policy(model, tokenizer)
        else:
            self.policy = copying_policy(model, tokenizer, _forward_dtype(trainer))
        use_adapter(self.policy, adapter, model.config._name_or_path)
        self._replica = LocalReplica.around(self.policy, config, replica_id=trainer.accelerator.process_index)
        self.pool = RolloutPool(
            [self._replica], requests_per_replica=2 * config.max_batch_size, tokenizer=tokenizer
        )

    def sync(self, version: int) -> None:
        """Shared weights have moved with the trainer's; others are gathered and copied."""
        if not self._shares:
            copy_weights(self._trainer, self.policy)
        self._replica.weights_changed(version)
        self.pool.version = version

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts in any order; the cache's memory is given back behind the last."""
        yield from self.pool.generate(requests)
        self.pool.release_memory()

    def close(self) -> None:
        """Write what the audit still holds."""
        self.pool.close()


class Given:
    """A pool of the script's own, which gets every version as a checked update. It stays the script's."""

    def __init__(self, trainer: Any, pool: RolloutPool) -> None:
        check_supported(trainer)
        self._trainer = trainer
        self.pool = pool

    def sync(self, version: int) -> None:
        """Publish the weights; before the first update the pool must hold them already."""
        publish(self.pool, full_weights(self._trainer), version=version)

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts in any order."""
        return self.pool.generate(requests)

    def close(self) -> None:
        """Nothing: whoever made the pool closes it."""


def place(trainer: Any, config: RolloutConfig, adapter: str | Path | None) -> Placement:
    """The placement that a config asks for."""
    return Colocated(trainer, config, adapter)


def use_adapter(policy: HFPolicy, adapter: str | Path | None, checkpoint: str) -> None:
    """Draft with this adapter, or with the one that lies beside the checkpoint, if there is one."""
    if adapter is None and has_adapter(Path(checkpoint)):
        adapter = checkpoint
    if adapter is not None:
        policy.use_adapter(DraftAdapter.from_pretrained(adapter, policy.model))
        policy.warn_of_another_chat_template()


def _forward_dtype(trainer: Any) -> torch.dtype:
    """The precision that the trainer's forward multiplies in."""
    if trainer.args.bf16:
        return torch.bfloat16
    return torch.float16 if trainer.args.fp16 else base_model(trainer.model).dtype
