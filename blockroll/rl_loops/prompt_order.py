"""Which rows a run draws, and its rule for prompts that the context has no room for."""

import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

from blockroll.config import RunConfig
from blockroll.errors import InvalidInput
from blockroll.policies.prompts import PromptEncoder, fit_prompts
from blockroll.rl_loops.tasks import Epochs, Row, Task, checked_row
from blockroll.rollout.pool.pool import RolloutPool

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10_000  # prompts that don't fit, behind each other, after which none is expected to
ENDLESS_CHECKED = 10_000  # prompts of a task without an end that are looked at before a run starts,
ENDLESS_CHECKED_BY_ERROR = 200_000  # and how many may be where one that is too long must prevent it


class PromptOrder:
    """The training rows of a whole run and its held-out rows, all of prompts that fit.

    Pure in the config, the task and the policy's context, so that a resumed run goes on in the same order.
    Of a finite data set (`Epochs`) all that the run draws is looked at before it starts, one epoch at most.
    Of an endless task it is the first `ENDLESS_CHECKED` prompts; later ones meet the rule as they are drawn.
    """

    def __init__(self, config: RunConfig, task: Task, pool: RolloutPool) -> None:
        """InvalidInput names the first prompt that can't be served, and an endless task under `error`."""
        self._config = config
        self._task = task
        self._rule = config.train.overlong_prompts
        self.room = pool.limits.prompt_room()
        self._encode = PromptEncoder(pool.tokenizer, vocab_size=pool.limits.vocab_size)
        self._num_rows = task.train_row.num_rows if isinstance(task.train_row, Epochs) else None
        self._known: dict[str, int] = {}  # tokens of the prompts of a finite data set, which come again
        overlong, num_seen = self._look_ahead(config.train.steps * config.train.prompts_per_step)
        self._per_epoch = num_seen - len(overlong)  # of a finite data set, where all of it was seen
        self._walk = Walk(
            self._is_overlong, task_name=task.name, start=0, skipped=list(overlong), num_walked=num_seen
        )
        self._has_warned = bool(overlong)
        self.eval_rows = self._fitting_held_out() if config.train.eval_every else ()

    def rows(self, start: int, count: int) -> list[Row]:
        """Rows `start` to `start + count` of the run, those that are skipped not counted."""
        numbers = range(start, start + count)
        indices = map(self._index, numbers) if self._rule == "skip" else numbers
        return [self._row(index) for index in indices]

    def _index(self, number: int) -> int:
        """The place of a row of the run in the order of the task."""
        if self._num_rows is None:
            return self._walk.index(number)
        epoch, within = divmod(number, self._per_epoch)
        first = epoch * self._num_rows
        if self._walk.start != first:
            self._walk = Walk(self._is_overlong, task_name=self._task.name, start=first)
        return self._walk.index(within)

    def _row(self, index: int) -> Row:
        (row,) = self._task.train_rows(self._config.seed, index, 1)
        return row

    def _look_ahead(self, num_needed: int) -> tuple[dict[int, int], int]:
        """Tokens of the prompts that don't fit, by index, and how many prompts were looked at."""
        most = self._num_rows or ENDLESS_CHECKED
        if self._num_rows is None and self._rule == "error":
            most = num_needed
            if most > ENDLESS_CHECKED_BY_ERROR:
                raise InvalidInput(
                    f"train.overlong_prompts is 'error', for which all {num_needed:,} prompts of the run "
                    f"would have to be read before it starts, and task {self._task.name!r} has no end: set "
                    "it to 'skip' or 'truncate', give the task finite rows (`tasks.from_rows`), or draw at "
                    f"most {ENDLESS_CHECKED_BY_ERROR:,}"
                )
        overlong: dict[int, int] = {}
        num_seen = 0
        while num_seen < most and num_seen - (len(overlong) if self._rule == "skip" else 0) < num_needed:
            num_tokens = self._num_tokens(num_seen)
            if not self.room.fits(num_tokens):
                overlong[num_seen] = num_tokens
                if self._rule == "error":
                    raise InvalidInput(self._what(overlong, num_seen + 1))
            num_seen += 1
        if overlong:
            if self._rule == "skip" and len(overlong) == num_seen:
                raise InvalidInput(self._what(overlong, num_seen))
            does = (
                "other rows take their place" if self._rule == "skip" else "the last tokens of each are kept"
            )
            log.warning("OverlongPrompts: %s; %s", self._what(overlong, num_seen), does)
        return overlong, num_seen

    def _is_overlong(self, index: int) -> bool:
        num_tokens = self._num_tokens(index)
        if self.room.fits(num_tokens):
            return False
        if not self._has_warned:
            self._has_warned = True
            found = f"training prompt {index} of task {self._task.name!r} has {num_tokens} tokens"
            log.warning("OverlongPrompts: %s; other rows take the place of those that don't fit", found)
        return True

    def _num_tokens(self, index: int) -> int:
        prompt: Any = self._row(index)["prompt"]
        name = f"training prompt {index} of task {self._task.name!r}"
        if self._num_rows is None:
            return len(self._encode(prompt, name=name))
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, default=str)
        if key not in self._known:
            self._known[key] = len(self._encode(prompt, name=name))
        return self._known[key]

    def _what(self, overlong: dict[int, int], num_seen: int) -> str:
        longest = max(overlong, key=lambda index: overlong[index])
        return (
            f"{len(overlong)} of the first {num_seen} training prompts of task {self._task.name!r} have "
            f"{self.room.excess}, which leaves no room in the context; the longest is prompt "
            f"{longest} with {overlong[longest]} (train.overlong_prompts is {self._rule!r}; allowed are "
            "'skip', 'truncate' and 'error')"
        )

    def _fitting_held_out(self) -> Sequence[Row]:
        task = self._task
        rows = [checked_row(row, task.name) for row in task.eval_rows(self._config.train.eval_prompts)]
        names = [f"held-out prompt {number} of task {task.name!r}" for number in range(len(rows))]
        prompts = [self._encode(row["prompt"], name=name) for row, name in zip(rows, names, strict=True)]
        fitted = fit_prompts(prompts, room=self.room, overlong=self._rule, names=names)
        return tuple(rows[each.number] for each in fitted)


class Walk:
    """A stretch of a task's order without the prompts that don't fit; walked as far as it was asked for."""

    def __init__(
        self,
        is_overlong: Callable[[int], bool],
        *,
        task_name: str,
        start: int = 0,
        skipped: Sequence[int] = (),
        num_walked: int = 0,
    ) -> None:
        """From index `start` on, of which so many are walked already."""
        self.start = start
        self._task_name = task_name
        self._is_overlong = is_overlong
        self._skipped = list(skipped)  # ascending
        self._walked = start + num_walked

    def index(self, number: int) -> int:
        """Where in the task's order the prompt stands that so many fitting ones come before.

        InvalidInput where `MAX_SKIPPED_IN_A_ROW` don't fit, one behind the other.
        """
        while self._walked - self.start - len(self._skipped) <= number:
            self._step()
        index, found = -1, self.start + number
        while index != found:  # each skipped one before it moves it by one
            index = found
            found = self.start + number + bisect_right(self._skipped, index)
        return index

    def _step(self) -> None:
        if self._is_overlong(self._walked):
            self._skipped.append(self._walked)
            in_a_row = self._skipped[-MAX_SKIPPED_IN_A_ROW:]
            if self._walked - in_a_row[0] + 1 == MAX_SKIPPED_IN_A_ROW == len(in_a_row):
                raise InvalidInput(
                    f"{MAX_SKIPPED_IN_A_ROW} prompts of task {self._task_name!r} in a row, up to prompt "
                    f"{self._walked}, leave no room in the context: give it shorter ones"
                )
        self._walked += 1
