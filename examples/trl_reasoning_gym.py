"""GRPO through TRL on a reasoning-gym task, with the policy that ships with blockroll.

python -m examples.trl_reasoning_gym --steps 10
"""

import argparse
import re
from typing import Any

from trl import GRPOConfig

from blockroll import RolloutConfig
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops.envs import from_reasoning_gym
from blockroll.rl_loops.trl import GRPOTrainer


def as_the_policy_was_asked(question: str) -> str:
    """`Calculate 120 + 35 + 7.` becomes `120+35+7=?`, which the tiny policy knows."""
    return re.sub(r"[^+0-9]", "", question) + "=?\n"


def main(argv: list[str] | None = None) -> GRPOTrainer:
    """Train and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output-dir", default="runs/trl_reasoning_gym")
    given = parser.parse_args(argv)
    task = from_reasoning_gym(
        "basic_arithmetic",
        size=512,
        min_terms=3,
        max_terms=3,
        min_digits=3,
        max_digits=3,
        operators=("+",),
        allow_parentheses=False,
        allow_negation=False,
        prompt=as_the_policy_was_asked,
    )

    def score(completions: list[str], **columns: Any) -> list[float | None]:
        """The task's own scoring of what stands behind the last hash."""
        return task.reward([text.rpartition("#")[2] for text in completions], **columns)

    trainer = GRPOTrainer(
        str(TINY_POLICY_DIR),
        reward_funcs=score,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=64,
            learning_rate=3e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
        train_dataset=task.dataset,
        rollout=RolloutConfig(plan="two_forward"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
