"""Small real TRL trainers of the shipped policy, for the tests of `rl_loops/trl`."""

import itertools

import trl
from datasets import Dataset

from blockroll.config import AlignmentConfig, DraftConfig, RolloutConfig
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops import arithmetic
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer

PROBLEMS = list(itertools.islice(arithmetic.problems(0, held_out=False), 64))
ROWS = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in PROBLEMS])
TWO_FORWARD = RolloutConfig(plan="two_forward")

BEST_OF_EVERY_STEP = {  # is loaded at the end
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "max_steps": 3,
}


def correctness(completions, answer, **_):
    return [arithmetic.reward(text, right) for text, right in zip(completions, answer, strict=True)]


def even_share(completion_ids, **_):
    """A reward that no two texts share, so that every step moves the weights."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def settings(folder, cls=trl.GRPOConfig, **options):
    defaults = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": 48,
        "learning_rate": 3e-4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if cls is trl.RLOOConfig:
        defaults["beta"] = 0.0
    return cls(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, cls=GRPOTrainer, *, model=str(TINY_POLICY_DIR), options=None, **arguments):
    if cls in (GRPOTrainer, RLOOTrainer):
        arguments.setdefault("rollout", TWO_FORWARD)
    config = trl.RLOOConfig if cls is RLOOTrainer else trl.GRPOConfig
    arguments.setdefault("reward_funcs", correctness)
    arguments.setdefault("train_dataset", ROWS)
    return cls(model, args=settings(folder, config, **(options or {})), **arguments)


def drawn_by_step(made):
    """The completions of each step, as they are drawn."""
    drawn = {}
    generate = made.rollouts.generate

    def recording(**arguments):
        done = generate(**arguments)
        drawn[made.state.global_step] = done.completion_ids
        return done

    made.rollouts.generate = recording
    return drawn


def logs(made):
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


def aligned(folder, *, alignment=None, **options):
    """A trainer of the tiny policy that learns to draft by an adapter of its own, from nothing."""
    draft = DraftConfig(rank=4, block_sizes=(4,), layouts=("two_forward",), learning_rate=3e-3)
    return trainer(
        folder,
        rollout=RolloutConfig(plan="two_forward(4)"),
        alignment=alignment or AlignmentConfig(draft=draft),
        options={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **options},
    )
