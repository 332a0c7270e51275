"""blockroll: rollouts for reinforcement learning, drafted in blocks and verified exactly.

Names are imported on first use: `import blockroll` loads neither torch nor ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockroll.config import (
        AlignmentConfig,
        ConvertConfig,
        DraftConfig,
        PolicyConfig,
        RolloutConfig,
        RunConfig,
        TrainConfig,
        load_config,
    )
    from blockroll.policies.hf import HFPolicy
    from blockroll.policy_check.check import check_policy
    from blockroll.rl_loops.convert import convert
    from blockroll.rl_loops.draft_trainer import DraftTrainer
    from blockroll.rl_loops.loop import train
    from blockroll.rollout.drafters.engine import Engine
    from blockroll.rollout.pool.pool import RolloutPool
    from blockroll.samplers.constraints import JsonSchema, Regex
    from blockroll.types import Law, Plan, Request, Rollout, Sampling

__version__ = "0.1.0"

__all__ = [
    "AlignmentConfig",
    "ConvertConfig",
    "DraftConfig",
    "DraftTrainer",
    "Engine",
    "HFPolicy",
    "JsonSchema",
    "Law",
    "Plan",
    "PolicyConfig",
    "Regex",
    "Request",
    "Rollout",
    "RolloutConfig",
    "RolloutPool",
    "RunConfig",
    "Sampling",
    "TrainConfig",
    "__version__",
    "check_policy",
    "convert",
    "load_config",
    "train",
]

_MODULES = {
    "AlignmentConfig": "blockroll.config",
    "ConvertConfig": "blockroll.config",
    "DraftConfig": "blockroll.config",
    "DraftTrainer": "blockroll.rl_loops.draft_trainer",
    "Engine": "blockroll.rollout.drafters.engine",
    "HFPolicy": "blockroll.policies.hf",
    "JsonSchema": "blockroll.samplers.constraints",
    "Law": "blockroll.types",
    "Plan": "blockroll.types",
    "PolicyConfig": "blockroll.config",
    "Regex": "blockroll.samplers.constraints",
    "Request": "blockroll.types",
    "Rollout": "blockroll.types",
    "RolloutConfig": "blockroll.config",
    "RolloutPool": "blockroll.rollout.pool.pool",
    "RunConfig": "blockroll.config",
    "Sampling": "blockroll.types",
    "TrainConfig": "blockroll.config",
    "check_policy": "blockroll.policy_check.check",
    "convert": "blockroll.rl_loops.convert",
    "load_config": "blockroll.config",
    "train": "blockroll.rl_loops.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no name {name!r}; public are {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
