"""Tasks: the prompts a policy trains on, the prompts it is judged by, and the reward.

Every row is a function of a seed and an index, so that a resumed run needs only the step it stopped at.
A row is a mapping with at least "prompt"; its other columns go to the reward function by name.
"""

import functools
import importlib
import inspect
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import is_prompt
from blockroll.rl_loops import arithmetic

Row = Mapping[str, Any]
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")  # what reward functions get besides columns
EVAL_SEED = 1_000_003  # of arithmetic's held-out problems: the same ones for every run


class RewardFunction(Protocol):
    """TRL's signature: lists with one entry per rollout; None leaves a rollout without a reward."""

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> Sequence[float | None]: ...


class Epochs:
    """`train_row` of a finite data set: each epoch has every row once, in an order of its own.

    The order is a function of name, seed and epoch alone.
    """

    def __init__(self, rows: Sequence[Row], *, name: str) -> None:
        """At least one row."""
        self._rows, self._name = rows, name
        self.num_rows = len(rows)

    def __call__(self, seed: int, index: int) -> Row:
        """Row `index` of the endless order."""
        epoch, within = divmod(index, self.num_rows)
        return self._rows[shuffled(f"{self._name}-{seed}-{epoch}", self.num_rows)[within]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts and reward. `train_row` must be a pure function of (seed, index); the index is unbounded.

    A prompt is text, token ids or messages; reward functions get it as the row has it.
    """

    name: str
    train_row: Callable[[int, int], Row]
    eval_rows: Callable[[int], Sequence[Row]]  # at most so many held-out rows, always the same ones
    reward_fn: RewardFunction

    def train_rows(self, seed: int, start: int, count: int) -> list[Row]:
        """Rows `start` to `start + count` of the endless training order."""
        return [checked_row(self.train_row(seed, index), self.name) for index in range(start, start + count)]


def from_rows(*, name: str, train: Sequence[Row], held_out: Sequence[Row], reward_fn: RewardFunction) -> Task:
    """A task over a finite data set: one permutation per epoch, from seed and epoch alone.

    A column that some rows lack is None there, so that the reward function always gets the same ones.
    """
    if not train:
        raise InvalidInput(f"task {name!r} needs at least one training row, got none")
    columns = dict.fromkeys(key for row in (*train, *held_out) for key in row)
    train_rows, held_out_rows = ([{**columns, **row} for row in rows] for rows in (train, held_out))

    return Task(
        name=name,
        train_row=Epochs(train_rows, name=name),
        eval_rows=lambda count: held_out_rows[:count],
        reward_fn=reward_fn,
    )


@functools.lru_cache(maxsize=4)
def shuffled(label: str, count: int) -> tuple[int, ...]:
    """A permutation of `range(count)` that depends on the label alone; made once for a whole epoch."""
    return tuple(random.Random(label).sample(range(count), count))


def load_task(name: str) -> Task:
    """`arithmetic`, or what a Python path `module:attribute` names: a Task or a function giving one."""
    if name == "arithmetic":
        return ARITHMETIC
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InvalidInput(f"task must be 'arithmetic' or a Python path 'module:attribute', got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InvalidInput(f"task {name!r}: no module {error.name!r}; is it on the Python path?") from error
    if attribute not in vars(module):
        raise InvalidInput(f"task {name!r}: module {module_name!r} has no attribute {attribute!r}")
    found = vars(module)[attribute]
    task = found() if callable(found) and _takes_nothing(found) else found
    if not isinstance(task, Task):
        raise InvalidInput(f"task {name!r} must be a Task of blockroll.rl_loops.tasks, got {task!r}")
    return task


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments; true where that cannot be told."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def checked_row(row: Row, task_name: str) -> Row:
    """The row, if it holds a prompt, and no column called like another argument of rewards."""
    prompt = row.get("prompt")
    if not is_prompt(prompt):
        raise InvalidInput(
            f"a row of task {task_name!r} needs a 'prompt' that is text, token ids or messages, and not "
            f"empty, got {prompt!r}"
        )
    for name in RESERVED_COLUMNS:
        if name in row:
            raise InvalidInput(
                f"a row of task {task_name!r} has a column {name!r}, which reward functions get from the "
                "rollouts; give it another name"
            )
    return row


def _arithmetic_row(seed: int, index: int) -> Row:
    problem = next(arithmetic.problems(f"{seed}-{index}", held_out=False))
    return {"prompt": problem.prompt, "answer": problem.answer}


def _arithmetic_eval_rows(count: int) -> list[Row]:
    held_out = itertools.islice(arithmetic.problems(EVAL_SEED, held_out=True), count)
    return [{"prompt": problem.prompt, "answer": problem.answer} for problem in held_out]


def _arithmetic_reward(
    *, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
) -> list[float]:
    return [
        arithmetic.reward(completion, answer)
        for completion, answer in zip(completions, columns["answer"], strict=True)
    ]


ARITHMETIC = Task(
    name="arithmetic",
    train_row=_arithmetic_row,
    eval_rows=_arithmetic_eval_rows,
    reward_fn=_arithmetic_reward,
)
