"""GRPO as scripts of before `rl_loops.algorithms` import it."""

from blockroll.rl_loops.algorithms import ALGORITHMS, Algorithm

GRPO: Algorithm = ALGORITHMS["grpo"]

__all__ = ["ALGORITHMS", "GRPO", "Algorithm"]
