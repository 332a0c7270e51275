"""GRPO through TRL on generated arithmetic. Without the three lines marked `blockroll` it is a stock script.

    python -m examples.trl_grpo --steps 20

It ends with blockroll's page about the run in OUTPUT_DIR/blockroll/report.html.
"""

import argparse
import itertools

from datasets import Dataset
from trl import GRPOConfig

from blockroll import RolloutConfig  # blockroll: 1
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.trl import GRPOTrainer  # blockroll: 2, instead of TRL's


def is_right(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """A reward as TRL calls it: 1 if the text behind the last hash is the answer."""
    return [arithmetic.reward(text, right) for text, right in zip(completions, answer, strict=True)]


def main(argv: list[str] | None = None) -> GRPOTrainer:
    """Train and return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/trl_grpo")
    parser.add_argument("--model", default=str(TINY_POLICY_DIR))
    parser.add_argument("--plan", default="auto")
    given = parser.parse_args(argv)
    problems = itertools.islice(arithmetic.problems(0, held_out=False), 2048)
    trainer = GRPOTrainer(
        given.model,
        reward_funcs=is_right,
        args=GRPOConfig(
            output_dir=given.output_dir,
            max_steps=given.steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=64,
            learning_rate=3e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems]),
        rollout=RolloutConfig(plan=given.plan),  # blockroll: 3
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
