"""Draft alignment under a TRL trainer: draft steps on fresh rollouts, so that drafts follow the policy.

Each is a step of `DraftTrainer` after a policy update. With an adapter the policy never moves by it. In a
full conversion draft and policy share the weights: the draft gradient is clipped by itself, and its cosine
with the policy gradient of the same update is reported.

Ranks sum their gradients, so all hold the same adapter.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from blockroll.config import AlignmentConfig
from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.draft_trainer import DraftTrainer
from blockroll.rl_loops.watch.signals import acceptance_rate
from blockroll.types import Rollout


class Alignment:
    """When to take draft steps, and the draft trainer that takes them. One per rank."""

    def __init__(self, trainer: Any, policy: HFPolicy, config: AlignmentConfig, *, shares: bool) -> None:
        """Makes the adapter if the policy has none, so it comes before whoever decodes with the policy."""
        if config.draft.conversion == "full" and not (shares and trainer.accelerator.num_processes == 1):
            raise InvalidInput(
                "alignment with draft.conversion='full' moves the trainer's own weights, which must lie "
                "whole in one process, without PEFT; use conversion='adapter'"
            )
        self.config = config
        self.drafts = DraftTrainer(policy, config.draft, seed=trainer.args.seed)
        self.first_acceptance: float | None = None  # of the first batch that drafted
        self._accelerator = trainer.accelerator
        self._acceptance = math.nan  # of the latest batch
        self._policy_gradients: list[Tensor] | None = None
        self._cosine = math.nan

    def watch(self, rollouts: Sequence[Rollout]) -> None:
        """Note how well a fresh batch was drafted. All ranks call it."""
        rates = gather_object([acceptance_rate(rollouts)])
        met = [rate for rate in rates if not math.isnan(rate)]
        if met:
            self._acceptance = sum(met) / len(met)
            if self.first_acceptance is None:
                self.first_acceptance = self._acceptance

    def is_due(self, step: int) -> bool:
        """Whether the update that made this step is followed by draft steps."""
        if self.config.below > 0:
            if self.first_acceptance is None:
                return True
            return self._acceptance < self.config.below * self.first_acceptance
        return step % self.config.every == 0

    def keep_policy_gradients(self) -> None:
        """Before the policy's optimizer step: what a full conversion's draft gradient is compared with."""
        if self.config.draft.conversion == "full":
            self._policy_gradients = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
                for parameter in self.drafts.parameters
            ]

    def align(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Draft steps on these rollouts, if every rank has any to learn from. All ranks call it."""
        self._cosine = math.nan
        if not all(gather_object([any(len(rollout.token_ids) > 1 for rollout in rollouts)])):
            return {}
        steps = [
            self.drafts.step(rollouts, on_gradients=self._on_gradients) for _ in range(self.config.steps)
        ]
        # Shared weights must not carry a draft gradient into the policy's next update.
        self.drafts.optimizer.zero_grad(set_to_none=True)
        metrics = {
            "draft/loss": steps[-1].loss,
            "draft/acceptance": steps[-1].acceptance,
            "draft/tokens_per_step": steps[-1].tokens_per_step,
            "draft/grad_norm": steps[-1].grad_norm,
            "draft/num_steps": float(self.drafts.num_steps),
            "draft/policy_grad_cosine": self._cosine,
            "draft/policy_kl": steps[-1].policy_kl,
        }
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run goes on from."""
        return {"drafts": self.drafts.state_dict(), "first_acceptance": self.first_acceptance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.drafts.load_state_dict(state["drafts"])
        self.first_acceptance = state["first_acceptance"]

    def _on_gradients(self, parameters: Sequence[nn.Parameter], num_scored: int) -> int:
        if self._accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(self._accelerator.reduce(parameter.grad, reduction="sum"))
            num_scored = sum(gather_object([num_scored]))
        if self._policy_gradients is not None:
            self._cosine = cosine([parameter.grad for parameter in parameters], self._policy_gradients)
            self._policy_gradients = None
        return num_scored


def cosine(first: Sequence[Tensor | None], second: Sequence[Tensor]) -> float:
    """Between two gradients over the same parameters; NaN if one is 0."""
    pairs = [
        (one.flatten(), other.flatten()) for one, other in zip(first, second, strict=True) if one is not None
    ]
    dot = sum(float(one @ other) for one, other in pairs)
    norms = [math.sqrt(sum(float(each[i].square().sum()) for each in pairs)) for i in (0, 1)]
    return dot / math.prod(norms) if all(norms) else math.nan


class AfterUpdate(TrainerCallback):
    """Aligns drafts once an update is made, before the next batch is drawn."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The policy's gradient is complete and clipped."""
        alignment: Alignment = self._trainer.rollouts.placement.alignment
        if alignment.is_due(state.global_step + 1):
            alignment.keep_policy_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The policy has moved."""
        alignment: Alignment = self._trainer.rollouts.placement.alignment
        if alignment.is_due(state.global_step):
            for name, value in alignment.align(self._trainer.rollouts.trained).items():
                self._trainer._metrics["train"][name].append(value)
