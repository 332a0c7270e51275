"""Draft alignment: one optimizer step on rollouts teaches the policy to draft them.

`blockroll convert` repeats generate-and-step until acceptance stops rising; in RL one step follows each
policy update. With an adapter the policy's own weights never move.

Shapes: K drafted tokens of a block.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockroll.config import DraftConfig
from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.adapter import AdapterConfig, DraftAdapter, parent_hash
from blockroll.policies.draft_training import Texts, draft_pass, random_blocks
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.learner import length_chunks
from blockroll.types import Rollout

MAX_LOGITS = 1 << 24  # of one forward's scored rows: rows times vocabulary
OnGradients = Callable[[Sequence[torch.nn.Parameter], int], int]
SAVED = ("optimizer", "num_steps", "num_tokens", "weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMetrics:
    """What one step saw before it moved the weights: on fresh rollouts, a held-out measure."""

    num_drafts: int  # K of this step's blocks
    layout: str
    loss: float  # per scored slot
    acceptance_K: tuple[float, ...]  # expected, by draft position, if the position is reached; NaN: not met
    tokens_per_step: float  # expected of a whole block: accepted drafts, and what the step adds
    # Of a full conversion, nats per token: KL divergence from the teacher; without one how far the tokens'
    # log-probabilities have fallen since they were drawn, which estimates it. NaN with an adapter.
    policy_kl: float
    num_scored: int
    grad_norm: float
    is_skipped: bool  # the gradient was not finite: nothing moved

    @property
    def acceptance(self) -> float:
        """Mean over the draft positions met."""
        met = [value for value in self.acceptance_K if not math.isnan(value)]
        return sum(met) / len(met) if met else math.nan


class DraftTrainer:
    """Optimizer of a policy's adapter, or in a full conversion of all its weights."""

    def __init__(
        self, policy: HFPolicy, config: DraftConfig, *, teacher: HFPolicy | None = None, seed: int = 0
    ) -> None:
        """Makes the adapter if the policy has none; one of another rank is refused.

        A full conversion stays close to the law of its `teacher`, or learns from the rollouts alone.
        """
        self.policy = policy
        self.teacher = teacher
        self.config = config
        self.num_steps = 0
        self.num_tokens = 0  # of rollouts it has stepped on
        self.lr_scale = 1.0  # of the learning rate, for schedules
        self._seed = seed
        if config.conversion == "adapter":
            if policy.adapter is None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    adapter = DraftAdapter(policy.model, _adapter_config(policy, config))
                policy.use_adapter(adapter)
            assert policy.adapter is not None
            if policy.adapter.config.rank != config.rank:
                raise InvalidInput(
                    f"rank is {config.rank}, but the policy's adapter has rank {policy.adapter.config.rank}; "
                    "go on with that rank, or start without the adapter"
                )
            self.module: torch.nn.Module = policy.adapter
        else:
            policy.mask_token_id = _mask_token_id(policy, config)
            self.module = policy.model
            policy.describe_drafts(config.block_sizes, config.layouts)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.98), foreach=False
        )

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def num_kinds(self) -> int:
        """Pairs of block size and layout, trained turn about."""
        return len(self.config.block_sizes) * len(self.config.layouts)

    def step(self, rollouts: Sequence[Rollout], *, on_gradients: OnGradients | None = None) -> DraftMetrics:
        """One optimizer step on rollouts that the policy itself has drawn.

        `on_gradients` sees the parameters, their gradients summed over the scored slots, and the number of
        slots, before anything moves; it may sum both over processes, and returns that number.

        The block size and layout are those of the step's turn, the offsets random from seed and step alone.
        Rollouts without tokens stay out. A gradient that is not finite moves nothing, and is named.
        """
        used = [rollout for rollout in rollouts if len(rollout.token_ids) > 1]
        if not used:
            raise InvalidInput("a draft step needs at least one rollout of two tokens or more, got none")
        kinds = [(k, layout) for k in self.config.block_sizes for layout in self.config.layouts]
        num_drafts, layout = kinds[self.num_steps % len(kinds)]
        generator = torch.Generator().manual_seed((self._seed << 24) + self.num_steps)
        is_full = self.config.conversion == "full"
        loss_sum = tokens_sum = kl_sum = 0.0
        num_scored = num_blocks = num_tokens = 0
        overlap_K = torch.zeros(num_drafts, dtype=torch.float64)
        count_K = torch.zeros(num_drafts, dtype=torch.int64)
        self.optimizer.zero_grad(set_to_none=True)
        rows = max(1, MAX_LOGITS // self.policy.vocab_size)
        with self._gradients():
            for indices in length_chunks(used, max_positions=min(rows, 4096)):
                chunk = [used[i] for i in indices]
                texts = _texts(chunk, self.policy.device)
                blocks = random_blocks(texts, num_drafts, layout, generator)
                result = draft_pass(
                    self.policy,
                    texts,
                    blocks,
                    loss=self.config.loss,
                    causal_weight=self.config.causal_weight if is_full else 0.0,
                    teacher=self.teacher,
                )
                if result.num_scored == 0:
                    continue
                torch.autograd.backward(result.loss_sum, inputs=self.parameters)
                loss_sum += float(result.loss_sum.detach())
                overlap_K += result.overlap_sum_K
                count_K += result.count_K
                num_scored += result.num_scored
                num_blocks += result.num_whole_blocks
                num_tokens += sum(len(rollout.token_ids) for rollout in chunk)
                kl_sum += result.causal_sum
                if self.teacher is None:
                    kl_sum += sum(sum(rollout.policy_logprobs) for rollout in chunk)
                tokens_sum += result.tokens_sum
        if on_gradients is not None:
            norm = self._move(on_gradients(self.parameters, num_scored))
        else:
            norm = self._move(num_scored)
        self.num_steps += 1
        self.num_tokens += sum(len(rollout.token_ids) for rollout in used)
        return DraftMetrics(
            num_drafts=num_drafts,
            layout=layout,
            loss=loss_sum / num_scored if num_scored else math.nan,
            acceptance_K=tuple((overlap_K / count_K).tolist()),
            tokens_per_step=tokens_sum / num_blocks if num_blocks else math.nan,
            policy_kl=kl_sum / num_tokens if is_full and num_tokens else math.nan,
            num_scored=num_scored,
            grad_norm=norm,
            is_skipped=not math.isfinite(norm),
        )

    def describe(self, **extra: Any) -> None:
        """Write what the policy can draft now into the adapter's, or the checkpoint's, own description."""
        config, policy = self.config, self.policy
        if policy.adapter is not None and config.conversion == "adapter":
            adapter = policy.adapter
            adapter.config = replace(
                adapter.config,
                block_sizes=tuple(config.block_sizes),
                layouts=tuple(config.layouts),
                trained_tokens=self.num_tokens,
                extra={**adapter.config.extra, "loss": config.loss, **extra},
            )
            policy.describe_drafts(adapter.config.block_sizes, adapter.config.layouts)
        else:
            policy.model.config.blockroll = {
                "conversion": "full",
                "mask_token_id": policy.mask_token_id,
                "block_sizes": list(config.block_sizes),
                "layouts": list(config.layouts),
                "trained_tokens": self.num_tokens,
                **extra,
            }
            policy.describe_drafts(config.block_sizes, config.layouts)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and counts: a step after loading them equals the uninterrupted one."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "weights": {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        missing = [key for key in SAVED if key not in state]
        if missing:
            raise CheckpointError(f"the draft trainer's state lacks {', '.join(missing)}")
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_steps = int(state["num_steps"])
        self.num_tokens = int(state["num_tokens"])

    def _move(self, num_scored: int) -> float:
        """Clip and step; the gradient norm, which is not finite if nothing moved."""
        if num_scored == 0:
            return math.nan
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(num_scored)
        share = min(1.0, (self.num_steps + 1) / max(self.config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share * self.lr_scale
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    @contextlib.contextmanager
    def _gradients(self) -> Iterator[None]:
        """An adapter's pass needs no gradient of the policy's weights: leave them out of the graph."""
        if self.config.conversion == "full":
            yield
            return
        wanted = [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


def _adapter_config(policy: HFPolicy, config: DraftConfig) -> AdapterConfig:
    return AdapterConfig(
        family=policy.model.config.model_type,
        rank=config.rank,
        block_sizes=tuple(config.block_sizes),
        layouts=tuple(config.layouts),
        parent_hash=parent_hash(policy.model),
    )


def _mask_token_id(policy: HFPolicy, config: DraftConfig) -> int:
    """The token that a full conversion uses as mask: the one asked for, the policy's or the tokenizer's."""
    own = (policy.mask_token_id, getattr(policy.tokenizer, "mask_token_id", None))
    found = next((each for each in (config.mask_token_id, *own) if each is not None), None)
    if found is None or not 0 <= found < policy.vocab_size:
        raise InvalidInput(
            f"a full conversion needs a mask token, got {found}: give draft.mask_token_id, the id (below "
            f"{policy.vocab_size}) of a token that never occurs, or convert by adapter, which needs none"
        )
    return found


def _texts(rollouts: Sequence[Rollout], device: torch.device) -> Texts:
    return Texts.of(
        [rollout.request.prompt_ids for rollout in rollouts],
        [rollout.token_ids for rollout in rollouts],
        [rollout.request.sampling.logprob_temperature for rollout in rollouts],
        device,
    )
