"""Rollouts of TRL's trainers by blockroll: change the import, say `rollout=RolloutConfig(...)`.

from blockroll.rl_loops.trl import GRPOTrainer

trainer = GRPOTrainer(..., rollout=RolloutConfig(plan="auto"))
"""

from blockroll.rl_loops.trl.contract import require_tested
from blockroll.rl_loops.trl.guard import GuardCallback
from blockroll.rl_loops.trl.rollout_func import make_rollout_func
from blockroll.rl_loops.trl.trainers import GRPOTrainer, RLOOTrainer

__all__ = ["GRPOTrainer", "GuardCallback", "RLOOTrainer", "make_rollout_func", "require_tested"]
