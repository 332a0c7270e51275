"""What a trainer logs about its rollouts, over all ranks; names as in the trainers' own logs.

`sampling/surprisal_minus_entropy` is the mean of -log pi(token) - H(pi) over the tokens that the policy drew,
both from the learner's logits. It is 0 if tokens follow the policy, within `.../se`, whatever log-probability
was reported with them; the ratios in `rollout_corr/*` compare only what was reported. Both are taken in the
loss, where the weights are still those that drew the tokens, and over all tokens that were drawn: which texts
are long is decided by their tokens, so that complete texts alone would be a biased choice. Rare tokens carry
most of the variance: in a small batch none may occur, and `se` is then too small, so `run_mean` and `run_se`
go on over the whole run, through checkpoints, for training and evaluation apart. A forward that draws random
numbers (dropout, NEFTune, router jitter) is not the law that drew the tokens, and its entropy is left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from blockroll.rl_loops.losses import raw_weight_metrics
from blockroll.rl_loops.watch.signals import (
    count_metrics,
    known,
    reward_metrics,
    rollout_rates,
    source_of,
    values_of,
)
from blockroll.types import Rollout, counted

SURPRISAL = "sampling/surprisal_minus_entropy"
NOISE = (
    "in training the trainer's forward draws random numbers (dropout, neftune_noise_alpha), and the law that "
    "it computes is not the one that generates: sampling/surprisal_minus_entropy is not logged for training, "
    "and rollout_corr/* and sampling/* measure that noise. Evaluations are without it; disable_dropout=True "
    "trains without dropout"
)


def round_metrics(accelerator: Any, rollouts: Sequence[Rollout], duration_s: float) -> dict[str, float]:
    """How the completions of one batch were generated. All ranks call it."""
    rates = rollout_rates(rollouts, duration_s)
    counts = counted(rollout.stats.steps for rollout in rollouts)
    if accelerator.num_processes > 1:
        pairs = torch.tensor([*rates.values(), (duration_s, 1.0)], dtype=torch.float64)
        gathered = accelerator.gather(pairs[None].float().to(accelerator.device)).double().cpu()
        *sums, _ = gathered.sum(dim=0).tolist()
        duration_s = float(gathered[:, -1, 0].max())
        rates = dict(zip(rates, map(tuple, sums), strict=True))
        counts = sum(gather_object([counts]), Counter())
    # Ranks generate side by side: the job's speed is all their tokens in the time of the slowest.
    rates["rollout/generated_tok_s"] = (rates["rollout/generated_tok_s"][0], duration_s)
    own = {name: rate for name, rate in rates.items() if rate[1] and "completions/" not in name}
    return {**values_of(own), "rollout/duration_s": duration_s, **known(count_metrics(counts))}


def reward_signals(trainer: Any, inputs: Sequence[Mapping[str, Any]], rewards_BF: Tensor) -> dict[str, float]:
    """Of rewards, what TRL does not log. All ranks call it.

    `rewards_BF` are those of all ranks by function, NaN where it gave none; `inputs` the rows of this rank's.
    """
    sources = [source_of(row) for row in inputs]
    if trainer.accelerator.num_processes > 1:
        sources = gather_object(sources)
    weights_F = trainer.reward_weights.to(rewards_BF.device)
    rewards_B = (rewards_BF * weights_F).nansum(dim=1).where(~rewards_BF.isnan().all(dim=1), math.nan)
    return known(reward_metrics(rewards_B.tolist(), sources))


# In place of a policy version, for positions of a batch where no token was drawn.
SAID_BY_OTHERS, PADDING = -1, -2


def drawn_versions(
    completion_ids: Sequence[Sequence[int]],
    tool_mask: Sequence[Sequence[int]] | None,
    *,
    version: int,
    like_BT: Tensor,
) -> Tensor:
    """The policy version that drew each token (B, T): complete and cut texts alike.

    SAID_BY_OTHERS where a tool or an environment spoke, PADDING behind a text.
    """
    versions_BT = torch.full_like(like_BT, PADDING)
    for row, token_ids in enumerate(completion_ids):
        versions_BT[row, : len(token_ids)] = version
        if tool_mask is not None:
            said_T = torch.tensor(tool_mask[row], device=like_BT.device) == 0
            versions_BT[row, : len(token_ids)][said_T] = SAID_BY_OTHERS
    return versions_BT


def reported_logprobs(rollouts: Sequence[Rollout], *, like_BT: Tensor) -> Tensor:
    """Log-probabilities (B, T) of the law that each token was drawn from, 0 behind a text: one a rollout."""
    reported_BT = torch.zeros(like_BT.shape, dtype=torch.float32, device=like_BT.device)
    for row, rollout in enumerate(rollouts):
        reported_BT[row, : len(rollout.token_ids)] = torch.tensor(rollout.behavior_logprobs)
    return reported_BT


class LearnersView:
    """What the learner's forward says of tokens that its weights drew: until it is logged, and over the run.

    One for training, one for evaluation.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # tokens, surprisal - entropy, its square
        self._run_sums = torch.zeros(3, dtype=torch.float64)  # of all ranks, without the above
        self._log_weights: list[Tensor] = []  # of tokens: the learner's log-probability - the reported one
        self._text_weights: list[Tensor] = []  # their sums over a text
        # Is told of the former too, as they come, unless the forward drew random numbers.
        self.on_log_weights: Callable[[Tensor], None] | None = None

    def add(
        self,
        logprobs_BT: Tensor,
        entropies_BT: Tensor,
        drawn_BT: Tensor,
        *,
        reported_BT: Tensor | None,
        is_random: bool = False,
    ) -> None:
        """A micro-batch, of which `drawn_BT` says where a token was drawn by the learner's very weights.

        `is_random`: the forward drew random numbers, so that tokens do not follow what it computes.
        """
        if not is_random:
            values_N = (-logprobs_BT - entropies_BT).detach()[drawn_BT].double()
            sums = torch.stack([torch.ones_like(values_N).sum(), values_N.sum(), values_N.square().sum()])
            self._sums += sums.cpu()
        if reported_BT is not None:
            log_weights_BT = (logprobs_BT.detach() - reported_BT).float()
            is_known_BT = drawn_BT & ~log_weights_BT.isnan()
            self._log_weights.append(log_weights_BT[is_known_BT])
            if self.on_log_weights is not None and not is_random:
                self.on_log_weights(log_weights_BT[is_known_BT])
            self._text_weights.append(log_weights_BT.where(is_known_BT, 0.0).sum(-1)[is_known_BT.any(-1)])

    def flush(self, accelerator: Any, *, by_text: bool | None = None) -> dict[str, float]:
        """Everything of the time since the last flush, over all ranks, and the run's mean. All ranks call it.

        `by_text` is given if TRL did not score the batch: its own metrics of that are here too then, with
        ratios of texts or of tokens. Values of one text are uncorrelated, as each has mean 0 given the text
        before it; that is what `se` counts on.
        """
        sums = self._reduced(accelerator)
        self._sums.zero_()
        self._run_sums += sums
        metrics = {}
        for prefix, (count, total, squares) in (("", sums.tolist()), ("run_", self._run_sums.tolist())):
            if sums[0]:
                metrics[f"{SURPRISAL}/{prefix}mean"] = total / count
                metrics[f"{SURPRISAL}/{prefix}se"] = math.sqrt(squares) / count
        log_weights_N = _gathered(accelerator, self._log_weights)
        text_weights_N = _gathered(accelerator, self._text_weights)
        self._log_weights, self._text_weights = [], []
        if len(log_weights_N):
            metrics.update(raw_weight_metrics(log_weights_N))
            if by_text is not None:
                metrics.update(_scoring_metrics(log_weights_N, text_weights_N if by_text else log_weights_N))
        return metrics

    def state_dict(self, accelerator: Any) -> dict[str, Tensor]:
        """What the run's mean goes on from. All ranks call it."""
        return {"run_sums": self._run_sums + self._reduced(accelerator)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()`."""
        self._run_sums.copy_(state["run_sums"])

    def _reduced(self, accelerator: Any) -> Tensor:
        reduced: Tensor = accelerator.reduce(self._sums.to(accelerator.device), reduction="sum")
        return reduced.cpu().clone()


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Of the generators that a forward on this device draws from: another one once it has drawn."""
    states = (torch.random.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _gathered(accelerator: Any, own: Sequence[Tensor]) -> Tensor:
    """One tensor (N,) of what all ranks have, in float64."""
    mine_N = torch.cat([torch.empty(0, device=accelerator.device), *own])
    padded = accelerator.pad_across_processes(mine_N, pad_index=math.nan)
    gathered_N: Tensor = accelerator.gather(padded).double()
    return gathered_N[~gathered_N.isnan()]


def _scoring_metrics(log_weights_N: Tensor, ratios_of_N: Tensor) -> dict[str, float]:
    """What TRL logs of a batch that it scores, from the loss instead, and before any truncation."""
    ratios_N = ratios_of_N.exp()
    return {
        "sampling/sampling_logp_difference/mean": float(log_weights_N.abs().mean()),
        "sampling/sampling_logp_difference/max": float(log_weights_N.abs().max()),
        "sampling/importance_sampling_ratio/min": float(ratios_N.min()),
        "sampling/importance_sampling_ratio/mean": float(ratios_N.mean()),
        "sampling/importance_sampling_ratio/max": float(ratios_N.max()),
    }
