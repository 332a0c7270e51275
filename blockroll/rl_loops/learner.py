"""The learner: the weights that the optimizer moves, and the log-probabilities it computes itself.

Owns its own copy of the model, in float32 with transformers' ordinary attention, never the one that
generates. Dropout is off throughout, because a ratio of two dropout draws is no ratio of policies.

Shapes: B rollouts, S positions of a padded chunk, N completion tokens of all rollouts one after another,
W hidden width, V vocabulary.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockroll.config import TrainConfig
from blockroll.errors import CheckpointError, InvalidInput
from blockroll.kernels.choice import Kernels, choose, using
from blockroll.kernels.selective_logprob import OutputHead, TokenLaws, selective_logprob
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.advantages import Advantages
from blockroll.rl_loops.algorithms import Algorithm
from blockroll.rl_loops.losses import LossTokens, TokenLoss, behavior_correction
from blockroll.rollout.pool.weight_sync import named_weights
from blockroll.types import Rollout

log = logging.getLogger(__name__)

MAX_CHUNK_POSITIONS = 8192  # padded positions of one forward and backward
MAX_HEAD_DIFFERENCE = 1e-3  # of logits, relative to the largest: rounding stays far below
SAVED = ("optimizer", "num_optimizer_steps", "num_skipped")


class Learner:
    """Model and optimizer. Equal state, batches and threads give equal weights."""

    def __init__(
        self, policy: HFPolicy, config: TrainConfig, algorithm: Algorithm, kernels: Kernels = "auto"
    ) -> None:
        """Take over the policy's model, which must be float32: smaller types lose small updates.

        `kernels` says what makes log-probabilities of states, forward and backward. InvalidInput for another
        type, and for a model whose own logits are not what its head makes of states.
        """
        dtypes = {parameter.dtype for parameter in policy.model.parameters()}
        if dtypes != {torch.float32}:
            raise InvalidInput(f"the learner's weights must be float32, got {sorted(map(str, dtypes))}")
        policy.model.set_attn_implementation(policy.stock_attention)
        _check_head(policy)
        self.policy = policy
        self.model = policy.model
        self.config = config
        self.algorithm = algorithm
        self.kernels = choose(kernels, policy.device)
        log.info("kernels of the learner: %s", self.kernels)
        self.num_optimizer_steps = 0
        self.num_skipped = 0
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=0.0, foreach=False
        )

    @property
    def learning_rate(self) -> float:
        """Of the next optimizer step: up over `warmup_steps`, then down to 0 after the last one, or flat."""
        config, step = self.config, self.num_optimizer_steps
        share = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.lr_scheduler == "linear" and step >= config.warmup_steps:
            total = config.steps * config.minibatches
            share = max(0.0, (total - step) / max(total - config.warmup_steps, 1))
        return config.learning_rate * share

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights to publish, in the order replicas hold them; tied ones once."""
        return named_weights(self.model)

    def logprobs(self, rollouts: Sequence[Rollout]) -> TokenLaws:
        """Teacher-forced law of every completion token, and its entropy, without gradient."""
        empty = torch.empty(0, device=self.policy.device)
        logprobs_B, entropies_B = [empty] * len(rollouts), [empty] * len(rollouts)
        with torch.no_grad(), self._threads():
            for indices in length_chunks(rollouts):
                chunk = self._forward([rollouts[i] for i in indices], with_entropy=True)
                sizes = [len(rollouts[i].token_ids) for i in indices]
                logprobs, entropies = (
                    torch.split(chunk.logprobs_N, sizes),
                    torch.split(chunk.entropies_N, sizes),
                )
                for j, i in enumerate(indices):
                    logprobs_B[i], entropies_B[i] = logprobs[j], entropies[j]
        return TokenLaws(
            logprobs_N=torch.cat([empty, *logprobs_B]), entropies_N=torch.cat([empty, *entropies_B])
        )

    def update(
        self,
        rollouts: Sequence[Rollout],
        advantages: Advantages,
        *,
        on_laws: Callable[[Sequence[Rollout], TokenLaws], None] | None = None,
    ) -> dict[str, float]:
        """Move the weights by one batch, `advantages` parallel to `rollouts`; returns metrics.

        `on_laws` is told of the old policy's log-probabilities of the rollouts it learns from.

        The old policy is computed once, before the first optimizer step. Without importance sampling
        correction the weights are 1, and the metrics still say what they would have been. Rollouts without a
        valid advantage or without tokens stay out. A step whose gradient norm is not finite is skipped,
        counted and named.
        """
        used = [i for i, rollout in enumerate(rollouts) if advantages.is_valid_B[i] and rollout.token_ids]
        batch = [rollouts[i] for i in used]
        device = self.policy.device
        advantages_B = advantages.advantages_B[used].to(device)
        old = self.logprobs(batch)
        if on_laws is not None:
            on_laws(batch, old)
        behavior = [logprob for rollout in batch for logprob in rollout.behavior_logprobs]
        behavior_N = torch.tensor(behavior, dtype=torch.float32, device=device)
        correction = behavior_correction(old.logprobs_N, behavior_N, cap=self.config.behavior_ratio_cap)
        finite_entropies = old.entropies_N[old.entropies_N.isfinite()]

        sizes = [len(rollout.token_ids) for rollout in batch]
        old_B = torch.split(old.logprobs_N, sizes)
        is_corrected = self.config.importance_sampling_correction
        weights_N = correction.weights_N if is_corrected else torch.ones_like(correction.weights_N)
        weights_B = torch.split(weights_N, sizes)
        valid_B = torch.split(correction.is_valid_N, sizes)

        learning_rate = self.learning_rate
        steps: list[_StepResult] = []
        with self._threads():
            for start in range(min(self.config.minibatches, len(batch))):
                # Every n-th rollout, so that a group spreads over the minibatches.
                part = list(range(start, len(batch), self.config.minibatches))
                steps.append(self._optimizer_step(batch, part, old_B, weights_B, valid_B, advantages_B))
        return {
            **correction.metrics,
            "loss": _mean([step.loss for step in steps]),
            "clip_ratio": _mean([step.clip_ratio for step in steps]),
            "grad_norm": _mean([step.grad_norm for step in steps]),
            "entropy": float(finite_entropies.mean()) if len(finite_entropies) else math.nan,
            "learning_rate": learning_rate,
            "update/num_tokens": float(sum(step.num_tokens for step in steps)),
            "update/dropped_tokens": float(sum(step.num_dropped for step in steps)),
            "update/skipped_total": float(self.num_skipped),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, which a checkpoint keeps as an ordinary model folder."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "num_optimizer_steps": self.num_optimizer_steps,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the weights must be those it was taken with.

        CheckpointError if a part is missing or the optimizer's state is of other shapes.
        """
        missing = [key for key in SAVED if key not in state]
        if missing:
            raise CheckpointError(f"the learner's state lacks {', '.join(missing)}; use another checkpoint")
        self._check_optimizer(state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_optimizer_steps = int(state["num_optimizer_steps"])
        self.num_skipped = int(state["num_skipped"])

    def _check_optimizer(self, state: Mapping[str, Any]) -> None:
        """CheckpointError unless every moment has its parameter's shape, which torch does not compare."""
        parameters = dict(enumerate(self.model.parameters()))
        groups = [len(group["params"]) for group in state["param_groups"]]
        if groups != [len(parameters)]:
            raise CheckpointError(
                f"the optimizer's state is of {sum(groups)} tensors, and the policy has {len(parameters)}: "
                "it belongs to another policy; use another checkpoint"
            )
        for index, moments in state["state"].items():
            for name, moment in moments.items():
                expected = parameters[index].shape
                if torch.is_tensor(moment) and moment.dim() and moment.shape != expected:
                    raise CheckpointError(
                        f"the optimizer's {name} of tensor {index} has shape {tuple(moment.shape)}, and the "
                        f"policy's tensor has {tuple(expected)}: it belongs to another policy; use another "
                        "checkpoint"
                    )

    def _optimizer_step(
        self,
        batch: Sequence[Rollout],
        part: Sequence[int],
        old_B: Sequence[Tensor],
        weights_B: Sequence[Tensor],
        valid_B: Sequence[Tensor],
        advantages_B: Tensor,
    ) -> "_StepResult":
        """One optimizer step on the rollouts `part`: the loss of all their valid tokens, across chunks.

        A rollout of advantage 0 has loss and gradient 0 whatever the policy: it counts, but costs no forward.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.zero_grad(set_to_none=True)

        def loss_of(indices: Sequence[int], learner_logprobs_N: Tensor) -> TokenLoss:
            repeats = torch.tensor([len(batch[i].token_ids) for i in indices], device=self.policy.device)
            tokens = LossTokens(
                rollouts=[batch[i] for i in indices],
                learner_logprobs_N=learner_logprobs_N,
                old_logprobs_N=torch.cat([old_B[i] for i in indices]),
                weights_N=torch.cat([weights_B[i] for i in indices]),
                advantages_N=advantages_B[indices].repeat_interleave(repeats),
                is_valid_N=torch.cat([valid_B[i] for i in indices]),
            )
            return self.algorithm.loss(tokens, self.config)

        worthless = [i for i in part if advantages_B[i] == 0]
        teaching = [i for i in part if advantages_B[i] != 0]
        results = [loss_of(worthless, torch.cat([old_B[i] for i in worthless]))] if worthless else []
        for chunk in length_chunks([batch[i] for i in teaching]):
            indices = [teaching[j] for j in chunk]
            result = loss_of(indices, self._forward([batch[i] for i in indices]).logprobs_N)
            if result.num_tokens:
                torch.autograd.backward(result.loss_sum)
            results.append(replace(result, loss_sum=result.loss_sum.detach()))
        denominator = sum(result.denominator for result in results)
        num_tokens = sum(result.num_tokens for result in results)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(denominator or 1)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        self.num_optimizer_steps += 1  # before the weights move, so that a step cut off is seen
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.num_skipped += 1
            log.warning("NonFiniteGradient: gradient norm %s; the optimizer step is skipped", norm)
        return _StepResult(
            loss=sum(float(each.loss_sum) for each in results) / denominator if denominator else math.nan,
            clip_ratio=sum(each.num_clipped for each in results) / num_tokens if num_tokens else math.nan,
            grad_norm=norm,
            num_tokens=num_tokens,
            num_dropped=sum(each.num_dropped for each in results),
        )

    def _forward(self, rollouts: Sequence[Rollout], *, with_entropy: bool = False) -> TokenLaws:
        """One right-padded forward; the output head sees only rows that predict completion tokens."""
        device = self.policy.device
        rows = [torch.tensor(r.request.prompt_ids + r.token_ids[:-1], device=device) for r in rollouts]
        ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        starts = [len(rollout.request.prompt_ids) - 1 for rollout in rollouts]
        mask_BS = torch.zeros_like(ids_BS)
        is_scored_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            mask_BS[b, : len(row)] = 1
            is_scored_BS[b, start : len(row)] = True
        positions_S = torch.arange(ids_BS.shape[1], device=device)
        output = self.model.base_model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            # Padding stays on a text's last position: how long it is may decide its rotary factors.
            position_ids=positions_S.minimum(mask_BS.sum(dim=1, keepdim=True) - 1),
            use_cache=False,
        )
        hidden_NW = output.last_hidden_state[is_scored_BS]
        temperatures = torch.tensor([r.request.sampling.logprob_temperature for r in rollouts], device=device)
        sizes = torch.tensor([len(rollout.token_ids) for rollout in rollouts], device=device)
        tokens_N = torch.tensor([token for rollout in rollouts for token in rollout.token_ids], device=device)
        with using(self.kernels.form):
            return selective_logprob(
                hidden_NW,
                _head(self.policy),
                tokens_N,
                temperatures.repeat_interleave(sizes),
                memory_bytes=self.config.logits_memory_mb << 20,
                with_entropy=with_entropy,
            )

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """Run with `learner_threads` torch threads and put the process's own number back after."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.learner_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepResult:
    loss: float
    clip_ratio: float
    grad_norm: float
    num_tokens: int
    num_dropped: int


def _head(policy: HFPolicy) -> OutputHead:
    head = policy.output_head
    return OutputHead(weight_VW=head.weight, bias_V=head.bias, softcap=policy.final_softcap)


def _check_head(policy: HFPolicy) -> None:
    """The learner takes logits from states, piece by piece: they must be those of the model's own forward."""
    ids_1S = torch.arange(min(4, policy.vocab_size), device=policy.device)[None]
    with torch.no_grad():
        own_1SV = policy.model(input_ids=ids_1S, use_cache=False).logits.float()
        states_1SW = policy.model.base_model(input_ids=ids_1S, use_cache=False).last_hidden_state
        difference = float(
            (_head(policy).logits(states_1SW[0]) - own_1SV[0]).abs().max() / own_1SV.abs().max().clamp(min=1)
        )
    if not difference < MAX_HEAD_DIFFERENCE:
        raise InvalidInput(
            f"{type(policy.model).__name__} does more behind its output head than the learner computes (its "
            f"logits differ by {difference:.2g} of the largest): it would be trained as another policy than "
            "the one that generates; train it through TRL, whose trainers call the model's own forward"
        )


def length_chunks(rollouts: Sequence[Rollout], max_positions: int = MAX_CHUNK_POSITIONS) -> list[list[int]]:
    """Indices of rollouts of like length: rows times the longest is at most `max_positions`, or one row."""
    lengths = [len(rollout.request.prompt_ids) + len(rollout.token_ids) for rollout in rollouts]
    chunks: list[list[int]] = []
    for i in sorted(range(len(rollouts)), key=lambda i: (-lengths[i], i)):
        if chunks and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] <= max_positions:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
