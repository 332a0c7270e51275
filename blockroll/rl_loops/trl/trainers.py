"""TRL's GRPO and RLOO trainers with rollouts by blockroll; everything else of them is TRL's."""

import inspect
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint
from trl.extras.profiling import profiling_context
from trl.trainer.utils import pad

from blockroll.config import AlignmentConfig, RolloutConfig
from blockroll.errors import ConfigError
from blockroll.policies.ends import end_token_ids
from blockroll.policies.prompts import PromptEncoder
from blockroll.rl_loops.trl.alignment import AfterUpdate
from blockroll.rl_loops.trl.arguments import check_arguments, check_head
from blockroll.rl_loops.trl.checkpoint import load_rollout_state, save_rollout_state
from blockroll.rl_loops.trl.contract import GRPO_PARTS, TRAINER_PARTS, require_parts
from blockroll.rl_loops.trl.generation import TrainerRollouts, trainer_sampling
from blockroll.rl_loops.trl.guard import find_guard
from blockroll.rl_loops.trl.metrics import (
    NOISE,
    PADDING,
    LearnersView,
    drawn_versions,
    random_state,
    reported_logprobs,
    reward_signals,
    round_metrics,
)
from blockroll.rl_loops.trl.modules import base_model, is_random_in_training
from blockroll.rl_loops.trl.placement import forward_dtype, place
from blockroll.rl_loops.trl.prompt_lengths import with_fitting_prompts
from blockroll.rl_loops.trl.record import Record, audit_folder, check_audit_is_new
from blockroll.rl_loops.trl.rewards import RewardErrors
from blockroll.rl_loops.trl.together import on_any, raise_together, together
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Sampling

if TYPE_CHECKING:  # a mixin sees the trainer it is mixed into; at run time it stands alone
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


logger = logging.getLogger(__name__)


class _DraftedRollouts(_Trainer):
    """Takes the place of the trainer's generation, and logs how it went."""

    def __init__(
        self,
        *args: Any,
        rollout: RolloutConfig | RolloutPool,
        adapter: str | Path | None = None,
        alignment: AlignmentConfig | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        if given.get("args") is not None:
            check_arguments(given["args"], rollout_func=given.get("rollout_func"))
        super().__init__(*args, **kwargs)
        require_parts(self, TRAINER_PARTS)
        check_head(self.args, forward_dtype(self))
        # TRL tells by them which texts are complete: all that end a text here, the model config's too.
        self.eos_token_ids = list(end_token_ids(base_model(self.model), self._tokenizer))
        self._views = {"train": LearnersView(), "eval": LearnersView()}
        self._loss_inputs: dict[str, Any] | None = None  # of the loss under way
        self._is_noise_told = False
        self._has_begun = False  # whether this rank has come to the first meeting of the round under way
        self._generated: tuple[Any, Any] = ((), None)  # completions of the latest batch, and their tool masks
        config = RolloutConfig() if isinstance(rollout, RolloutPool) else rollout
        sampling = trainer_sampling(self, config)
        self._check_law(sampling)
        self._audit = audit_folder(self.args, rollout)
        self._begins_audit = config.audit != "off"
        self._guard = find_guard(self.callback_handler.callbacks)
        if self._guard is not None and isinstance(rollout, RolloutConfig):
            rollout = self._guard.looked_at(rollout)
        placement = place(self, rollout, adapter, alignment)
        self._max_prompt_length = placement.pool.limits.max_length - 1
        for name in ("train_dataset", "eval_dataset"):
            setattr(self, name, self._with_fitting_prompts(name, getattr(self, name)))
        self.rollouts = TrainerRollouts(self, placement, sampling, check_sync=config.check_sync)
        if self._guard is not None:
            self._guard.bind(self)
        if placement.alignment is not None:
            self.add_callback(AfterUpdate(self))
        self._record = Record(self)
        self._reward_errors = RewardErrors()
        if self.accelerator.num_processes > 1:
            reward_funcs: list[Any] = self.reward_funcs  # type: ignore[has-type]
            self.reward_funcs = [self._reward_errors.guard(function) for function in reward_funcs]
        # From here on TRL generates with what it takes for a server of its own.
        self.vllm_generation = self.rollouts
        self.use_vllm, self.vllm_mode, self._last_loaded_step = True, "server", -1

    def _check_law(self, sampling: Sampling) -> None:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As TRL's; a checkpoint brings back drafts and planner too.

        InvalidInput, before anything is drawn, if the audit's folder holds what another run has drawn and no
        checkpoint is given to go on from.
        """
        begins = self._begins_audit and self.rollouts.version < 0 and not resume_from_checkpoint
        with together(self.accelerator, "looking at the audit's folder"):
            if begins and self.accelerator.is_main_process:
                check_audit_is_new(self._audit)
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
            if folder is not None:
                load_rollout_state(
                    self, Path(folder), views=self._views, audit=self._audit, guard=self._guard
                )
        self.rollouts.begin_run()
        done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.accelerator.is_main_process:
            self._record.write_report()
        return done

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As TRL's; a dataset that is given to `evaluate` is looked at like that of the trainer."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._with_fitting_prompts("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; one outside a training compares the laws, as the beginning of a training does."""
        if not self.is_in_train:
            self.rollouts.begin_run()
        return super().evaluation_loop(*args, **kwargs)

    def _with_fitting_prompts(self, name: str, dataset: Any) -> Any:
        return with_fitting_prompts(self, name, dataset, max_tokens=self._max_prompt_length)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        views = {mode: view.state_dict(self.accelerator) for mode, view in self._views.items()}
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        save_rollout_state(self, folder, views=views, guard=self._guard)
        self.rollouts.begin_version(after=self.rollouts.version)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if not all(isinstance(prompt, str) for prompt in prompts):
            return super()._tokenize_prompts(prompts)
        encode = PromptEncoder(self._tokenizer)
        return [list(encode(prompt)) for prompt in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        mode = self._mode
        self._has_begun = True
        with profiling_context(self, "sync_weights"):
            self.rollouts.sync_weights()
        self._last_loaded_step = self.state.global_step  # TRL's own condition for a sync, met
        self.rollouts.begin_round()
        try:
            generated = super()._generate(prompts)
        except BaseException as error:  # of prompts: the other ranks wait where they have generated
            if not self.rollouts.is_met:
                raise_together(self.accelerator, error, "preparing prompts")
            raise
        self.rollouts.end_round()
        metrics = round_metrics(self.accelerator, self.rollouts.rollouts, self.rollouts.duration_s)
        metrics["rollout/weight_version"] = float(self.rollouts.version)
        metrics["engine/shared_texts_total"] = float(self.rollouts.placement.num_shared_texts)
        metrics["perf/weight_sync_s"] = self.rollouts.weight_sync_s
        self._append(mode, metrics)
        if mode == "train":
            self.rollouts.note_trained()
        if self._guard is not None:
            self._guard.note(self.rollouts.rollouts, is_training=mode == "train")
        self._generated = (generated[1], self._tool_mask(generated))
        return generated

    def _tool_mask(self, generated: Any) -> Any:
        """Which tokens of what `_generate` gave a tool has said; None where the trainer calls no tools."""
        return None

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        try:
            rewards: Tensor = super()._calculate_rewards(inputs, *args, **kwargs)
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            # Of a reward model, which is no guarded function: the other ranks wait in TRL's gather.
            self._reward_errors.keep(error)
            num_texts = len(self._generated[0])
            nothing = torch.full(
                (num_texts, len(self.reward_funcs)), math.nan, device=self.accelerator.device
            )
            rewards = self.accelerator.gather(nothing)
        raise_together(self.accelerator, self._reward_errors.take(), "computing rewards")
        self._append(self._mode, reward_signals(self, inputs, rewards))
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._has_begun = False
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        except BaseException as error:  # of rows and environments: the other ranks compare weights already
            if not self._has_begun:
                raise_together(self.accelerator, error, "preparing prompts")
            raise
        completion_ids, tool_mask = self._generated
        batch["drawn_versions"] = drawn_versions(
            completion_ids, tool_mask, version=self.rollouts.version, like_BT=batch["completion_ids"]
        )
        if "sampling_per_token_logps" not in batch:  # RLOO leaves them out; our metrics compare with them
            reported = reported_logprobs(self.rollouts.rollouts, like_BT=batch["completion_ids"])
            batch["sampling_per_token_logps"] = reported
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._loss_inputs = inputs
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self._loss_inputs
        if inputs is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, *args, **kwargs
            )
        versions_BT = inputs["drawn_versions"]
        drawn_BT = versions_BT == (self.rollouts.version if self.rollouts.are_weights_served() else PADDING)
        drawn_BT &= versions_BT != PADDING
        if kwargs.get("compute_aux_loss"):
            drawn_BT &= inputs["completion_mask"].bool()  # a text that TRL masks would change that loss
        elif drawn_BT.any():
            # TRL hides texts that it masks from themselves: they count nowhere, and have no law then.
            attention_mask = torch.cat([inputs["prompt_mask"], (versions_BT != PADDING).long()], dim=1)
        before = random_state(input_ids.device)
        logprobs_BT, entropies_BT, aux_loss = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, *args, **kwargs
        )
        is_random = not all(map(torch.equal, before, random_state(input_ids.device)))
        if is_random and not self._is_noise_told:
            self._is_noise_told = True
            if self.accelerator.is_main_process:
                logger.warning(NOISE)
        reported_BT = inputs.get("sampling_per_token_logps")
        self._views[self._mode].add(
            logprobs_BT, entropies_BT, drawn_BT, reported_BT=reported_BT, is_random=is_random
        )
        return logprobs_BT, entropies_BT, aux_loss

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _ratios_by_text(self) -> bool | None:
        """Whether ratios are logged of texts or of tokens; None where TRL scores batches and logs its own."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with what was gathered since the last time."""
        view = self._views[self._mode]
        self._append(self._mode, view.flush(self.accelerator, by_text=self._ratios_by_text))
        super().log(logs, start_time)
        if self.accelerator.is_main_process:
            told = self._guard.told() if self._guard is not None and self._mode == "train" else {}
            self._record.log({**self.state.log_history[-1], **told})

    def _append(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)


class GRPOTrainer(_DraftedRollouts, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions blockroll generates: `rollout=RolloutConfig(...)`, or a pool.

    `adapter` is the folder of a draft adapter; one beside the model's checkpoint is used unasked.
    `alignment` lets drafts follow the policy. TRL's importance-sampling correction works on the
    log-probabilities of the law each token was drawn from.
    """

    def __init__(
        self,
        *args: Any,
        rollout: RolloutConfig | RolloutPool,
        adapter: str | Path | None = None,
        alignment: AlignmentConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rollout=rollout, adapter=adapter, alignment=alignment, **kwargs)
        require_parts(self, GRPO_PARTS)
        self._reported_BT: Tensor | None = None  # log-probabilities of the latest batch, instead of a scoring
        self._is_by_report = False  # whether they stand for a scoring of the latest batch
        self._scores_by_report = (
            self._corrects
            and self.rollouts.sampling.is_policy
            and forward_dtype(self) == torch.float32
            and not is_random_in_training(self)
        )
        mode = self.vllm_importance_sampling_mode
        if self.loss_type == "vespo" and self._corrects and not mode.startswith("token"):
            raise ConfigError(
                "loss_type='vespo' needs vllm_importance_sampling_mode 'token_truncate' or 'token_mask', got "
                f"{mode!r}"
            )

    @property
    def _corrects(self) -> bool:
        return bool(self.vllm_importance_sampling_correction)

    def _tool_mask(self, generated: Any) -> Any:
        return generated[2]

    def _check_law(self, sampling: Sampling) -> None:
        if sampling.truncation and self._corrects:
            raise ConfigError(
                f"{', '.join(sampling.truncation)} leaves out tokens that the policy could draw, while TRL's "
                "correction takes the policy over all of them: its ratios would be biased. Draw without "
                "truncation (top_k=0, top_p=1.0, min_p=None), or switch the correction off, which is any "
                "engine's though named after vLLM: vllm_importance_sampling_correction=False"
            )
        mode = self.vllm_importance_sampling_mode
        if sampling.is_truncated and self._corrects:
            warnings.warn(
                "a constraint, a minimal length or forbidden tokens leave out texts that the policy could "
                "draw. TRL's correction weighs each token by the share of the policy's mass that was left, "
                f"and {mode!r} "
                + ("multiplies these over a completion: " if mode.startswith("sequence") else "keeps them: ")
                + "what is learned is the policy's own gradient, as if other texts had no advantage. "
                "vllm_importance_sampling_correction=False learns from the completions as they are",
                stacklevel=4,
            )
        elif not sampling.is_policy and self._corrects and mode.startswith("sequence"):
            warnings.warn(
                f"vllm_importance_sampling_mode={mode!r} multiplies the ratios of a completion, and the "
                f"law {sampling.law.name} differs from the policy at every token: most completions would be "
                "dropped or clipped. Set vllm_importance_sampling_mode='token_truncate'",
                stacklevel=4,
            )

    @property
    def _ratios_by_text(self) -> bool | None:
        return self.vllm_importance_sampling_mode.startswith("sequence") if self._is_by_report else None

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._reported_BT = None
        reported = generated[4]
        is_known = not any(math.isnan(logprob) for logprobs in reported for logprob in logprobs)
        self._is_by_report = self._scores_by_report and not on_any(self.accelerator, not is_known)
        if self._is_by_report:
            rows = [torch.tensor(logprobs) for logprobs in reported]
            self._reported_BT = pad(rows, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
        return generated

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._reported_BT is not None and self._loss_inputs is None:
            # TRL asks for the law that drew the batch first: it is the policy, and was reported with it.
            reported_BT, self._reported_BT = self._reported_BT.to(input_ids.device), None
            return reported_BT, None, None
        return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._is_by_report:
            logged = self._metrics[self._mode]
            for name in [name for name in logged if name.startswith("sampling/")]:
                del logged[name]  # of the reported law and itself: the loss measures it
            generate_every = self.args.steps_per_generation * self.num_iterations
            if self.args.gradient_accumulation_steps % generate_every == 0:
                # As in a stock run: the loss's own forward is at the weights that drew the batch.
                batch.pop("old_per_token_logps", None)
        return batch


class RLOOTrainer(_DraftedRollouts, trl.RLOOTrainer):
    """`trl.RLOOTrainer` whose completions blockroll generates. It corrects nothing: lossless laws only."""

    def _check_law(self, sampling: Sampling) -> None:
        if sampling.law.weight != 1:
            raise ConfigError(
                f"RLOO has no importance-sampling correction, and the law {sampling.law.name} is not the "
                "policy; use mix_weight=1, or GRPOTrainer"
            )
