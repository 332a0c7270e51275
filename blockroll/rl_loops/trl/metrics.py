"""What a trainer logs about its rollouts, over all ranks; names as in the trainers' own logs.

`sampling/surprisal_minus_entropy` is the mean of -log pi(token) - H(pi) over the tokens that the policy drew,
both from the learner's logits. It is 0 if tokens follow the policy, within `.../se`, whatever log-probability
was reported with them; the ratios in `rollout_corr/*` compare only what was reported. Both are taken at the
weights that drew the tokens, before an update has moved them. Rare tokens carry most of the variance: in a
small batch none may occur, and `se` is then too small, so `run_mean` and `run_se` go on over the whole run.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from blockroll.rl_loops.collect import plan_counts, plan_shares, rollout_rates
from blockroll.rl_loops.losses import raw_weight_metrics
from blockroll.types import Rollout

SURPRISAL = "sampling/surprisal_minus_entropy"


def round_metrics(accelerator: Any, rollouts: Sequence[Rollout], duration_s: float) -> dict[str, float]:
    """How the completions of one batch were generated. All ranks call it."""
    rates = rollout_rates(rollouts, duration_s)
    counts = plan_counts(rollouts)
    if accelerator.num_processes > 1:
        pairs = torch.tensor([*rates.values(), (duration_s, 1.0)], dtype=torch.float64)
        gathered = accelerator.gather(pairs[None].float().to(accelerator.device)).double().cpu()
        *sums, _ = gathered.sum(dim=0).tolist()
        duration_s = float(gathered[:, -1, 0].max())
        rates = dict(zip(rates, map(tuple, sums), strict=True))
        counts = sum((Counter(each) for each in gather_object([counts])), Counter())
    # Ranks generate side by side: the job's speed is all their tokens in the time of the slowest.
    rates["rollout/generated_tok_s"] = (rates["rollout/generated_tok_s"][0], duration_s)
    own = {
        name: above / below for name, (above, below) in rates.items() if below and "completions/" not in name
    }
    return {**own, "rollout/duration_s": duration_s, **plan_shares(counts)}


def correction_metrics(accelerator: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Ratios of the learner's law to the reported one, before truncation. All ranks call it."""
    log_weights_BT = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).float()
    own_N = log_weights_BT[token_mask(batch).bool()]
    padded = accelerator.pad_across_processes(own_N, pad_index=math.nan)
    log_weights_N = accelerator.gather(padded).double()
    log_weights_N = log_weights_N[~log_weights_N.isnan()]
    return raw_weight_metrics(log_weights_N) if len(log_weights_N) else {}


def token_mask(batch: dict[str, Tensor]) -> Tensor:
    """Which completion tokens the policy drew: no padding, nothing that a tool or an environment said."""
    mask_BT = batch["completion_mask"]
    return mask_BT * batch["tool_mask"] if "tool_mask" in batch else mask_BT


class Surprisal:
    """Sums of -log pi(token) - H(pi), until they are logged and over the run."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # tokens, values, squares
        self._run_sums = torch.zeros(3, dtype=torch.float64)

    def add(self, logprobs_BT: Tensor, entropies_BT: Tensor, mask_BT: Tensor) -> None:
        """Tokens of one micro-batch."""
        values_N = (-logprobs_BT - entropies_BT).detach()[mask_BT.bool()].double()
        sums = torch.stack([torch.ones_like(values_N).sum(), values_N.sum(), values_N.square().sum()])
        self._sums += sums.cpu()

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Mean and its standard error over all ranks, and start again. All ranks call it.

        Values of one text are uncorrelated, as each has mean 0 given the text before it.
        """
        sums = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum").double().cpu()
        self._sums.zero_()
        self._run_sums += sums
        metrics = {}
        for prefix, (count, total, squares) in (("", sums.tolist()), ("run_", self._run_sums.tolist())):
            if sums[0]:
                metrics[f"{SURPRISAL}/{prefix}mean"] = total / count
                metrics[f"{SURPRISAL}/{prefix}se"] = math.sqrt(squares) / count
        return metrics
