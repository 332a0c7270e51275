"""Does the generating policy compute the law that the trainer trains?

Weights that went to another place, an update that was left out, a config that reads them differently: each
gives a policy that decodes well and is another one. So both laws are computed of a few tokens and compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockroll.errors import WeightSyncError
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.cache.layouts import open_slots
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import Request, Sampling

NUM_TEXTS, NUM_TOKENS = 2, 12
# Of the mean difference of log-probabilities, as a share of 1 + their size: what rounding makes, ten times.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def policy_gap(trainer: Any, policy: HFPolicy) -> float:
    """How far the law of a policy in this process is from the trainer's, on made-up texts.

    The mean over positions of the difference in a token's log-probability and in the entropy, as a share of
    1 + their size. All ranks call it.
    """
    length = min(NUM_TOKENS, policy.max_length)
    ids_BT = _spread_ids(policy.vocab_size, NUM_TEXTS, length).to(trainer.accelerator.device)
    cache = open_slots(policy, num_slots=NUM_TEXTS, capacity=length)
    with trainer.accelerator.autocast():
        logits_BTV = policy.verify_logits(ids_BT.to(policy.device), cache.window(0, NUM_TEXTS, length))
    law_BTV = (logits_BTV[:, :-1] / trainer.temperature).log_softmax(-1)
    mine_BT = law_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    entropies_BT = -(law_BTV.exp() * law_BTV).nan_to_num(0.0).sum(-1)
    theirs_BT, their_entropies_BT = _trained_law(trainer, ids_BT, num_scored=length - 1)
    return max(_gap(mine_BT, theirs_BT), _gap(entropies_BT, their_entropies_BT))


def pool_gap(trainer: Any, pool: RolloutPool) -> float:
    """The same of tokens that a pool draws, by the log-probabilities that it reports. All ranks call it."""
    prompts_BT = _spread_ids(pool.limits.vocab_size, NUM_TEXTS, min(4, pool.limits.max_length - 1))
    rank, version = trainer.accelerator.process_index, pool.version
    num_drawn = min(NUM_TOKENS, pool.limits.max_length) - prompts_BT.shape[1]
    requests = [
        Request(
            request_id=f"agreement-{rank}-{version}-{index}",
            prompt_ids=tuple(ids),
            seed=index,
            sampling=Sampling(temperature=trainer.temperature, max_tokens=num_drawn, ignore_eos=True),
        )
        for index, ids in enumerate(prompts_BT.tolist())
    ]
    drawn = list(pool.generate(requests))
    if {len(rollout.token_ids) for rollout in drawn} != {num_drawn}:
        problems = "; ".join(f"{rollout.finish_reason}: {rollout.error}" for rollout in drawn)
        raise WeightSyncError(f"the pool could not draw {num_drawn} tokens to compare: {problems}")
    texts = [(*rollout.request.prompt_ids, *rollout.token_ids) for rollout in drawn]
    ids_BT = torch.tensor(texts, device=trainer.accelerator.device)
    mine_BT = torch.tensor([rollout.policy_logprobs for rollout in drawn], device=ids_BT.device)
    return _gap(mine_BT, _trained_law(trainer, ids_BT, num_scored=num_drawn)[0])


def require_agreement(gap: float, *, dtype: torch.dtype, version: int) -> None:
    """WeightSyncError unless the gap is one that rounding makes in this precision."""
    if not gap <= TOLERANCE[dtype]:
        raise WeightSyncError(
            f"the policy that generates is not the one that is trained, at version {version}: on "
            f"{NUM_TEXTS} short texts their log-probabilities differ by {gap:.3g} in the mean (as a share of "
            f"1 + their size), {TOLERANCE[dtype]:g} is what {dtype} explains. Rollouts would be another "
            "policy's. Look for a forward, a hook or a config that the model has and its architecture has "
            "not; RolloutConfig(check_sync='off') generates without this check"
        )


@torch.no_grad()
def _trained_law(trainer: Any, ids_BT: Tensor, *, num_scored: int) -> tuple[Tensor, Tensor]:
    """What TRL computes in a step of the last tokens: log-probabilities and entropies, (B, num_scored)."""
    device = trainer.accelerator.device
    with (
        _evaluating(trainer.model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        trainer.accelerator.autocast(),
    ):
        logprobs_BT, entropies_BT, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids_BT, torch.ones_like(ids_BT), num_scored, compute_entropy=True
        )
    return logprobs_BT.float(), entropies_BT.float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _gap(mine_BT: Tensor, theirs_BT: Tensor) -> float:
    """Where the trained law is finite; weights that are not end the first text that is drawn, by name."""
    is_finite_BT = theirs_BT.isfinite()
    if not is_finite_BT.any():
        return 0.0
    difference_BT = (mine_BT.to(theirs_BT.device) - theirs_BT).abs() / (1 + theirs_BT.abs())
    return float(difference_BT[is_finite_BT].mean())


def _spread_ids(vocab_size: int, num_texts: int, length: int) -> Tensor:
    """Token ids (B, T) from all over the vocabulary, the same every time."""
    stride = max(1, vocab_size // (num_texts * length + 1))
    return (stride * (1 + torch.arange(num_texts * length)) % vocab_size).view(num_texts, length)
