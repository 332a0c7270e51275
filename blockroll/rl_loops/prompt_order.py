"""Which rows a run draws, and its rule for prompts that the context has no room for: before it starts."""

import logging
from collections.abc import Callable, Sequence

from blockroll.config import RunConfig
from blockroll.errors import InvalidInput
from blockroll.policies.prompts import encode_prompt, fit_prompts
from blockroll.rl_loops.tasks import Row, Task, checked_row
from blockroll.rollout.pool.pool import RolloutPool

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10_000  # prompts that don't fit, behind each other, after which none is expected to


class PromptOrder:
    """The training rows of a whole run and its held-out rows, all of prompts that fit.

    Pure in the config, the task and the policy's context, so that a resumed run goes on in the same order.
    """

    def __init__(self, config: RunConfig, task: Task, pool: RolloutPool) -> None:
        """Encode every prompt that the run will draw; InvalidInput names the first that can't be served."""
        self._config = config
        self._task = task
        self._rule = config.train.overlong_prompts
        self.max_prompt_tokens = pool.limits.max_length - 1  # one is free for the completion
        self._num_tokens = _counter(pool)
        self._skipped = self._find_overlong()
        self.eval_rows = self._fitting_held_out(pool) if config.train.eval_every else ()

    def rows(self, start: int, count: int) -> list[Row]:
        """Rows `start` to `start + count` of the run, those that are skipped not counted."""
        rows: list[Row] = []
        index = start
        for skipped in self._skipped:  # ascending: each one before the row moves it by one
            if skipped > index:
                break
            index += 1
        while len(rows) < count:
            if index not in self._skipped:
                rows += self._task.train_rows(self._config.seed, index, 1)
            index += 1
        return rows

    def _find_overlong(self) -> dict[int, int]:
        """Tokens of the prompts to skip, by index in the task's order; empty under the other rules."""
        train = self._config.train
        num_needed = train.steps * train.prompts_per_step
        overlong: dict[int, int] = {}
        num_fitting = index = in_a_row = 0
        while num_fitting < num_needed:
            (row,) = self._task.train_rows(self._config.seed, index, 1)
            num_tokens = self._num_tokens(
                row["prompt"], f"training prompt {index} of task {self._task.name!r}"
            )
            if num_tokens <= self.max_prompt_tokens or self._rule == "truncate":
                num_fitting, in_a_row = num_fitting + 1, 0
            else:
                in_a_row += 1
            if num_tokens > self.max_prompt_tokens:
                overlong[index] = num_tokens
                if self._rule == "error" or in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise InvalidInput(self._what(overlong, index + 1))
            index += 1
        if overlong:
            does = (
                "other rows take their place" if self._rule == "skip" else "the last tokens of each are kept"
            )
            log.warning("OverlongPrompts: %s; %s", self._what(overlong, index), does)
        return overlong if self._rule == "skip" else {}

    def _what(self, overlong: dict[int, int], num_seen: int) -> str:
        longest = max(overlong, key=lambda index: overlong[index])
        return (
            f"{len(overlong)} of the first {num_seen} training prompts of task {self._task.name!r} have more "
            f"than {self.max_prompt_tokens} tokens, all that the context has room for; the longest is prompt "
            f"{longest} with {overlong[longest]} (train.overlong_prompts is {self._rule!r}; allowed are "
            "'skip', 'truncate' and 'error')"
        )

    def _fitting_held_out(self, pool: RolloutPool) -> Sequence[Row]:
        task = self._task
        rows = [checked_row(row, task.name) for row in task.eval_rows(self._config.train.eval_prompts)]
        names = [f"held-out prompt {number} of task {task.name!r}" for number in range(len(rows))]
        prompts = [
            encode_prompt(pool.tokenizer, row["prompt"], name=name)
            for row, name in zip(rows, names, strict=True)
        ]
        fitted = fit_prompts(prompts, max_tokens=self.max_prompt_tokens, overlong=self._rule, names=names)
        return tuple(rows[each.number] for each in fitted)


def _counter(pool: RolloutPool) -> Callable[[str, str], int]:
    """Tokens of a prompt, which are counted once for all epochs."""
    known: dict[str, int] = {}

    def count(prompt: str, name: str) -> int:
        if prompt not in known:
            known[prompt] = len(encode_prompt(pool.tokenizer, prompt, name=name))
        return known[prompt]

    return count
