"""A `rollout_func` for `trl.GRPOTrainer` itself, for scripts that do not want another trainer class.

Its limits are TRL's: importance-sampling correction and its metrics stay off, and with tools or environments
the turns after the first are generated without it. Weights are published when they have changed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.rl_loops.trl.generation import TrainerRollouts, trainer_sampling
from blockroll.rl_loops.trl.metrics import round_metrics
from blockroll.rl_loops.trl.placement import Given
from blockroll.rollout.pool.pool import RolloutPool

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]


def make_rollout_func(pool: RolloutPool) -> RolloutFunc:
    """What `trl.GRPOTrainer(rollout_func=...)` takes: completions of the pool, drawn from the policy itself.

    It serves one trainer. The pool may serve others too, and gets this one's weights when it is asked.
    """
    engine: TrainerRollouts | None = None
    owner: Any = None

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        nonlocal engine, owner
        if engine is None:
            sampling = trainer_sampling(trainer, RolloutConfig())
            engine, owner = TrainerRollouts(trainer, Given(trainer, pool), sampling), trainer
        if trainer is not owner:
            raise InvalidInput("a rollout_func serves one trainer; make another for another trainer")
        engine.sync_weights()
        engine.begin_round()
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        done = engine.generate(prompt_ids, images, num_generations=1, profiler=nullcontext())
        mode = "train" if trainer.model.training else "eval"
        for name, value in round_metrics(trainer.accelerator, engine.rollouts, engine.duration_s).items():
            trainer._metrics[mode][name].append(value)
        return {
            "prompt_ids": done.prompt_ids,
            "completion_ids": done.completion_ids,
            "logprobs": [[logprob for (logprob,) in logprobs] for logprobs in done.logprobs],
        }

    return rollout_func
