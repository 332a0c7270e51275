"""Where a trainer's replicas run: in each rank's own process, or as Ray actors on devices of their own."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedModel

from blockroll.config import AlignmentConfig, PolicyConfig, RolloutConfig
from blockroll.errors import BlockrollError, InvalidInput
from blockroll.policies.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DraftAdapter, has_adapter
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.publish import publish, publish_or_keep
from blockroll.rl_loops.trl.agreement import policy_gap, pool_gap
from blockroll.rl_loops.trl.alignment import Alignment
from blockroll.rl_loops.trl.devices import device_names, hidden
from blockroll.rl_loops.trl.fingerprint import Fingerprint, fingerprint
from blockroll.rl_loops.trl.modules import base_model
from blockroll.rl_loops.trl.record import audit_folder
from blockroll.rl_loops.trl.together import on_any, raise_together, together
from blockroll.rl_loops.trl.weights import (
    are_whole,
    bare_architecture,
    check_supported,
    copy_weights,
    copying_policy,
    full_weights,
    share_again,
    sharing_policy,
)
from blockroll.rollout.planning.planner import Planner
from blockroll.rollout.pool.makers import join_ray_pool, make_ray_pool, replica_around
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.weight_sync import named_adapter_weights
from blockroll.types import Request, Rollout

logger = logging.getLogger(__name__)


class Placement(Protocol):
    """What a trainer's rollouts need of it. One per rank."""

    pool: RolloutPool
    planner: Planner | None  # what chooses plans in this process
    alignment: Alignment | None

    @property
    def policy(self) -> HFPolicy | None:
        """One with the trainer's weights, if this process has it."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Of everything on this rank that a sync brings to the replicas."""
        ...

    def sync(self, *, after: int) -> int:
        """Bring every replica to the trainer's weights; gives the version they are served as, above `after`.

        All ranks call it.
        """
        ...

    def gap(self) -> float:
        """How far the law that generates on this rank is from the one that is trained. All ranks call it."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts of this rank's requests, in any order."""
        ...

    def end_round(self, rollouts: Sequence[Rollout]) -> None:
        """The batch is complete, all turns of it: this rank has drawn these. All ranks call it."""
        ...

    @property
    def num_shared_texts(self) -> int:
        """Finished texts that replicas were told of by others, as far as this process knows."""
        ...

    def close(self) -> None:
        """Stop what was started for the trainer."""
        ...


class Colocated:
    """A replica in this process, without Ray. Between two batches it holds no keys and values."""

    def __init__(
        self,
        trainer: Any,
        config: RolloutConfig,
        adapter: str | Path | None,
        alignment: AlignmentConfig | None,
    ) -> None:
        check_supported(trainer)
        self._trainer = trainer
        self._shares = are_whole(trainer)
        model, tokenizer = base_model(trainer.model), trainer.processing_class
        if self._shares:
            self.policy = sharing_policy(model, tokenizer)
        else:
            self.policy = copying_policy(model, tokenizer, forward_dtype(trainer))
        use_adapter(self.policy, adapter, model.config._name_or_path)
        self.alignment: Alignment | None = None
        if alignment is not None:
            self.alignment = Alignment(trainer, self.policy, alignment, shares=self._shares)
        rank = trainer.accelerator.process_index
        # Each rank has a device of its own, but for those that run on the processors of one machine.
        num_engines = trainer.accelerator.num_processes if self.policy.device.type == "cpu" else 1
        self._replica = replica_around(self.policy, config, replica_id=rank, num_engines=num_engines)
        if rank == 0:
            logger.info("kernels: %s", self._replica.kernels)
        if self._replica.notice is not None and rank == 0:
            logger.warning(self._replica.notice)
        planner = self._replica.engine.planner
        self.planner = planner if isinstance(planner, Planner) else None
        self.pool = RolloutPool(
            [self._replica],
            requests_per_replica=2 * config.max_batch_size,
            tokenizer=tokenizer,
            sibling_by_sibling=config.group_order == "sibling_by_sibling",
        )
        self._shares_history = config.share_history and trainer.accelerator.num_processes > 1
        self.num_shared_texts = 0
        self._is_synced = False  # version 0, or the one behind a checkpoint's, is the first

    def fingerprint(self) -> Fingerprint:
        """Of the trainer's weights."""
        return fingerprint(self._trainer.model)

    def sync(self, *, after: int) -> int:
        """Shared weights have moved with the trainer's; others are gathered and copied."""
        with together(self._trainer.accelerator, "bringing weights to the replica"):
            if self._shares:
                share_again(self.policy, base_model(self._trainer.model))
            else:
                copy_weights(self._trainer, self.policy)
            version = max(self.pool.version, after) + 1 if self._is_synced else after + 1
            self._replica.weights_changed(version)
            self.pool.version, self._is_synced = version, True
        return self.pool.version

    def gap(self) -> float:
        """By logits of the policy in this process."""
        return policy_gap(self._trainer, self.policy)

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts in any order."""
        return self.pool.generate(requests)

    def end_round(self, rollouts: Sequence[Rollout]) -> None:
        """The memory of keys and values goes back to the trainer. Other ranks' texts become history here."""
        if self._shares_history:
            of_ranks = gather_object([[rollout.text for rollout in rollouts]])
            del of_ranks[self._trainer.accelerator.process_index]
            texts = [text for each in of_ranks for text in each]
            self._replica.tell_history(texts)
            self.num_shared_texts += len(texts)
        self.pool.release_memory()

    def close(self) -> None:
        """Write what the audit still holds."""
        self.pool.close()


class Separate:
    """Ray actors that rank 0 starts and the others join. They begin with a checkpoint that rank 0 writes.

    Alignment trains drafts here, on the trainer's own weights, and every sync brings them along.
    """

    planner: Planner | None = None  # each actor has its own

    def __init__(
        self,
        trainer: Any,
        config: RolloutConfig,
        adapter: str | Path | None,
        alignment: AlignmentConfig | None,
    ) -> None:
        check_supported(trainer)
        self._trainer = trainer
        self.policy: HFPolicy | None = None
        self.alignment: Alignment | None = None
        if alignment is not None:
            if alignment.draft.conversion == "full" or not are_whole(trainer):
                raise InvalidInput(
                    "with placement='separate', alignment trains an adapter on the trainer's own weights, "
                    "which must lie whole in each process: use draft.conversion='adapter', and one process "
                    "or DDP without PEFT; or placement='colocated'"
                )
            model = base_model(trainer.model)
            self.policy = sharing_policy(model, trainer.processing_class)
            use_adapter(self.policy, adapter, model.config._name_or_path)
            self.alignment = Alignment(trainer, self.policy, alignment, shares=True)
        accelerator = trainer.accelerator
        self._dtype = forward_dtype(trainer)
        self._bare = bare_architecture(base_model(trainer.model))
        folder = Path(trainer.args.output_dir) / "blockroll" / "policy"
        _write_policy(trainer, self._bare, folder, adapter)
        self._made_from = self.fingerprint()
        if accelerator.is_main_process and self.policy is not None and self.policy.adapter is not None:
            self.policy.adapter.save_pretrained(folder)
        policy = PolicyConfig(path=str(folder), dtype=_name(self._dtype))
        own = device_names(accelerator.device)
        owned = sorted({name for names in gather_object([own]) for name in names})
        error: BlockrollError | None = None
        where: list[str | None] = [None, None, None]  # name, address, and how Ray lets processes in
        if accelerator.is_main_process:
            try:
                from blockroll.rollout.pool.ray_cluster import ray_address

                name = f"blockroll-{os.getpid()}"
                with hidden(owned):
                    self.pool = make_ray_pool(policy, config, name=name, taken_devices=owned)
                where = [name, ray_address(), os.environ.get("RAY_AUTH_MODE")]
            except BlockrollError as failure:
                error = failure
        raise_together(accelerator, error, "starting replicas")
        if accelerator.num_processes > 1:
            broadcast_object_list(where)
        if not accelerator.is_main_process:
            if where[2] is not None:  # read when ray is imported
                os.environ["RAY_AUTH_MODE"] = where[2]
            self.pool = join_ray_pool(str(where[0]), policy, config, address=str(where[1]))

    def fingerprint(self) -> Fingerprint:
        """Of the trainer's weights, and of the drafts that alignment moves."""
        policy = self.policy
        drafts = policy.adapter.parameters() if policy is not None and policy.adapter is not None else ()
        return fingerprint(self._trainer.model, beside=drafts)

    def sync(self, *, after: int) -> int:
        """Rank 0 publishes what all ranks gather; nobody goes on before every replica has it."""
        accelerator = self._trainer.accelerator
        is_as_made = self.fingerprint() == self._made_from and self.pool.version == 0 and after < 0
        with_drafts = on_any(accelerator, not is_as_made)
        version = max(self.pool.version, after) + 1 if with_drafts else 0
        with together(accelerator, "sending weights to the replicas"):
            weights = self._weights(with_drafts=with_drafts)
            if accelerator.is_main_process:
                try:
                    publish(self.pool, weights, version=version)
                finally:
                    _drain(weights)
            else:
                _drain(weights)
            self.pool.version = version
        return version

    def _weights(self, *, with_drafts: bool) -> Iterator[tuple[str, Tensor]]:
        """In the replicas' precision; drafts keep their own. Replicas start with the drafts as they are."""
        for name, tensor in full_weights(self._trainer, self._bare):
            yield name, tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        if with_drafts and self.alignment is not None and self.policy is not None:
            assert self.policy.adapter is not None, "alignment gives a policy without drafts an adapter"
            yield from named_adapter_weights(self.policy.adapter)

    def gap(self) -> float:
        """By what the replicas draw and report."""
        return pool_gap(self._trainer, self.pool)

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts in any order."""
        return self.pool.generate(requests)

    def end_round(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing: replicas keep their memory, and share texts as they finish."""

    @property
    def num_shared_texts(self) -> int:
        """By the pool's count."""
        return self.pool.num_shared_texts

    def close(self) -> None:
        """Stop the actors; they also end with the process of rank 0."""
        self.pool.close()


class Given:
    """A pool of the script's own, which gets every version as a checked update. It stays the script's."""

    policy: HFPolicy | None = None
    planner: Planner | None = None
    alignment: Alignment | None = None

    def __init__(self, trainer: Any, pool: RolloutPool) -> None:
        check_supported(trainer)
        self._trainer = trainer
        self._bare = bare_architecture(base_model(trainer.model))
        self.pool = pool

    def fingerprint(self) -> Fingerprint:
        """Of the trainer's weights."""
        return fingerprint(self._trainer.model)

    def sync(self, *, after: int) -> int:
        """Publish the weights, unless the pool was never updated and holds them already."""
        with together(self._trainer.accelerator, "sending weights to the pool"):
            weights = full_weights(self._trainer, self._bare)
            try:
                self.pool.version = publish_or_keep(self.pool, weights, after=after)
            finally:
                _drain(weights)
        return self.pool.version

    def gap(self) -> float:
        """By what the pool draws and reports."""
        return pool_gap(self._trainer, self.pool)

    def generate(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Rollouts in any order."""
        return self.pool.generate(requests)

    def end_round(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing: replicas keep their memory, and share texts as they finish."""

    @property
    def num_shared_texts(self) -> int:
        """By the pool's count."""
        return self.pool.num_shared_texts

    def close(self) -> None:
        """Nothing: whoever made the pool closes it."""


def place(
    trainer: Any,
    rollout: RolloutConfig | RolloutPool,
    adapter: str | Path | None,
    alignment: AlignmentConfig | None,
) -> Placement:
    """The placement that a trainer's arguments ask for. All ranks call it."""
    if isinstance(rollout, RolloutConfig) and rollout.audit != "off":
        rollout = replace(rollout, audit_dir=str(audit_folder(trainer.args, rollout)))
    if isinstance(rollout, RolloutConfig) and not rollout.is_separate:
        return Colocated(trainer, rollout, adapter, alignment)
    if isinstance(rollout, RolloutConfig):
        return Separate(trainer, rollout, adapter, alignment)
    if alignment is not None:
        raise InvalidInput(
            "alignment does not know how the drafts of a pool that is given were made; pass a RolloutConfig"
        )
    if adapter is not None:
        raise InvalidInput("a pool that is given has its adapter already; leave adapter out")
    return Given(trainer, rollout)


def use_adapter(policy: HFPolicy, adapter: str | Path | None, checkpoint: str) -> None:
    """Draft with this adapter, or with the one that lies beside the checkpoint, if there is one."""
    folder = adapter_folder(adapter, checkpoint)
    if folder is not None:
        policy.use_adapter(DraftAdapter.from_pretrained(folder, policy.model))
        policy.warn_of_another_chat_template()


def adapter_folder(adapter: str | Path | None, checkpoint: str) -> Path | None:
    """Where the draft adapter lies: the folder that was asked for, or the checkpoint if it has one."""
    if adapter is not None:
        return Path(adapter)
    return Path(checkpoint) if checkpoint and has_adapter(Path(checkpoint)) else None


def forward_dtype(trainer: Any) -> torch.dtype:
    """The precision that the trainer's forward multiplies in."""
    if trainer.args.bf16:
        return torch.bfloat16
    return torch.float16 if trainer.args.fp16 else base_model(trainer.model).dtype


def _write_policy(trainer: Any, bare: PreTrainedModel, folder: Path, adapter: str | Path | None) -> None:
    """The trainer's weights as a checkpoint for replicas to start from. All ranks call it."""
    is_main = trainer.accelerator.is_main_process
    with together(trainer.accelerator, "writing a checkpoint for the replicas"):
        gathered = full_weights(trainer, bare)
        weights = {name: tensor.cpu().clone() for name, tensor in gathered if is_main}
        if is_main:
            bare.save_pretrained(folder, state_dict=weights)
            trainer.processing_class.save_pretrained(folder)
            source = adapter_folder(adapter, bare.config._name_or_path)
            if source is not None:
                for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                    shutil.copyfile(source / name, folder / name)


def _drain(weights: Iterator[Any]) -> None:
    """Take part in gathering what is left: other ranks wait in each tensor's gather."""
    for _ in weights:
        pass


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
