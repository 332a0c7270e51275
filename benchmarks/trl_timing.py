"""TRL's trainer and ours on the same prompts: what each generates, learns and takes."""

import itertools
import statistics
import tempfile
import time
from typing import Any

import trl
from datasets import Dataset
from transformers import PrinterCallback

from blockroll.policies.hf import TINY_POLICY_DIR
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.trl import GRPOTrainer

GENERATE_S = "bench/generate_s"


def timed(cls: type) -> type:
    """The trainer with the seconds of every generation round, weight sync included, in its log."""

    class Timed(cls):  # type: ignore[misc, valid-type]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            done = super()._generate_single_turn(*args, **kwargs)
            self._metrics["train" if self.model.training else "eval"][GENERATE_S].append(
                time.perf_counter() - start
            )
            return done

    return Timed


STOCK, OURS = timed(trl.GRPOTrainer), timed(GRPOTrainer)


def is_right(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 if the text behind the last hash is the answer."""
    return [arithmetic.reward(text, right) for text, right in zip(completions, answer, strict=True)]


def problems(seed: int, count: int) -> Dataset:
    """Arithmetic of the tiny policy's kind."""
    drawn = itertools.islice(arithmetic.problems(seed, held_out=False), count)
    return Dataset.from_list([{"prompt": each.prompt, "answer": each.answer} for each in drawn])


def train(
    cls: type,
    *,
    seed: int,
    steps: int,
    batch: int,
    group: int = 8,
    model: str = str(TINY_POLICY_DIR),
    reward: Any = is_right,
    dataset: Dataset | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Logged steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch,
            **{
                "num_generations": group,
                "max_completion_length": 64,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": 2,
                **(arguments or {}),
            },
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        dataset = dataset if dataset is not None else problems(seed, steps * batch)
        trainer = cls(model, reward_funcs=reward, args=args, train_dataset=dataset, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [row for row in trainer.state.log_history if "reward" in row]


def medians(rows: list[dict[str, Any]], *names: str) -> dict[str, float]:
    """Over the steps of a run, the first left out: it warms up."""
    return {name: statistics.median(row[name] for row in rows[1:]) for name in names}
