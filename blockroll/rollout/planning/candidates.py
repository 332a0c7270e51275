"""Which plans a policy may have, and where what they cost is kept."""

import hashlib
import json
from typing import TYPE_CHECKING

import torch

import blockroll
from blockroll.config import cache_dir
from blockroll.kernels.processor import processor_features
from blockroll.policies.base import Policy
from blockroll.rollout.planning.costs import CostModel
from blockroll.types import HISTORY, PLAIN, Plan
from blockroll.types.plan import MAX_DRAFTS

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

_NUM_DRAFTS = (4, 8, 16, 32)  # drafts worth a try, below what the policy was trained for
NUM_LOOKED_UP = (1, 2, 4, 8, 16)  # drafts from history that a step may verify for a request


def candidate_plans(
    policy: Policy, *, with_mask_rows: bool = True, with_history: bool = True
) -> tuple[Plan, ...]:
    """The plans a policy was trained for, plain first, and those of history, which any policy can follow."""
    looked_up = [
        Plan(size, drafter=HISTORY) for size in NUM_LOOKED_UP if with_history and size < policy.max_length
    ]
    if not (with_mask_rows and policy.can_draft and policy.trained_drafts):
        return (PLAIN, *looked_up)
    trained = min(policy.trained_drafts, policy.max_length - 1, MAX_DRAFTS)
    sizes = [*(num_drafts for num_drafts in _NUM_DRAFTS if num_drafts < trained), trained]
    plans = [PLAIN]
    if "two_forward" in policy.trained_layouts:
        plans += [Plan(size) for size in sizes]
    if "fused" in policy.trained_layouts:
        for size in sizes:
            plans += [Plan(size, tuple(sorted(levels))) for levels in ({0}, {0, size // 2, size})]
    return tuple(dict.fromkeys([*plans, *looked_up]))


def is_narrower(plan: Plan, other: Plan) -> bool:
    """Whether it is of the same kind, by the same drafter, with fewer drafts."""
    like, other_like = ((each.kind, each.drafter, len(each.levels)) for each in (plan, other))
    return like == other_like and plan.num_drafts < other.num_drafts


def recorded_tokens(policy: "HFPolicy") -> dict[Plan, float]:
    """Tokens that two-forward steps committed when the policy's draft adapter was trained, as it says.

    Of fused plans an adapter knows what proposals at every level would commit: no plan has them all.
    """
    if policy.adapter is None:
        return {}
    config = policy.adapter.config
    record = config.extra.get("tokens_per_step", {})
    found = {Plan(size): record.get(Plan(size).name, 0) for size in config.block_sizes}
    return {plan: tokens for plan, tokens in found.items() if 1 <= tokens <= 1 + plan.num_drafts}


def read_costs(policy: "HFPolicy") -> CostModel:
    """What is kept of the costs of such a policy on such a machine."""
    return CostModel.load(cache_dir() / "plans" / f"{cost_key(policy)}.json")


def cost_key(policy: "HFPolicy") -> str:
    """A hash of what the cost of a step depends on.

    That is architecture, precision, device and processor, how layers are run, threads, and versions.
    """
    modules = [policy.model, *([policy.adapter] if policy.adapter is not None else [])]
    described = {
        "family": policy.model.config.model_type,
        "parameters": [
            (name, [*parameter.shape]) for module in modules for name, parameter in module.named_parameters()
        ],
        "dtype": str(policy.model.dtype),
        "device": torch.cuda.get_device_name(policy.device)
        if policy.device.type == "cuda"
        else policy.device.type,
        "processor": processor_features(),
        "layers": [policy.packed.prepack, policy.compiled.compile],
        "threads": torch.get_num_threads(),
        "blockroll": blockroll.__version__,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
