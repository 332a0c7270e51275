"""RL algorithms, one file each, by the name that `train.algorithm` has for them."""

from collections.abc import Mapping

from blockroll.rl_loops.algorithms.base import Algorithm
from blockroll.rl_loops.algorithms.grpo import GRPO

ALGORITHMS: Mapping[str, Algorithm] = {algorithm.name: algorithm for algorithm in (GRPO(),)}

__all__ = ["ALGORITHMS", "GRPO", "Algorithm"]
