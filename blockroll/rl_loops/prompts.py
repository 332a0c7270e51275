"""Prompts for a conversion: a task's, or a JSONL file's, as tokens and in an endless order.

A `prompt` is what `RolloutPool.requests` takes: text, messages, which go through the tokenizer's chat
template with all that stands in them, or token ids.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockroll.errors import InvalidInput
from blockroll.policies.adapter import chat_template_hash
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prompts import PromptEncoder, PromptInput, Room, fit_prompts, is_prompt
from blockroll.rl_loops.prompt_order import Walk
from blockroll.rl_loops.tasks import Row, Task, load_task, shuffled
from blockroll.rl_loops.tracking import split_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """`token_ids(seed, index)` is a pure function; the index is unbounded."""

    token_ids: Callable[[int, int], tuple[int, ...]]
    chat_template_hash: str | None = None  # None: no prompt went through one
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(source: str, policy: HFPolicy, chat_template_kwargs: Mapping[str, Any]) -> Prompts:
    """From a file that ends in .jsonl, or a task's training rows.

    A prompt that leaves the context no token for an answer is left out, and logged: of a file, whose prompts
    are all encoded here, before the first is used; of a task, which has no end, where the order comes to it.
    InvalidInput names a bad line, and a task of which no prompt fits.
    """
    tokenizer = policy.tokenizer
    room = Room.of(policy.max_length, policy.length_boundaries)
    encode = PromptEncoder(tokenizer, chat_template_kwargs=chat_template_kwargs, vocab_size=policy.vocab_size)
    if not source.endswith((".jsonl", ".json")):
        order = _TaskOrder(load_task(source), encode, room)
        order(0, 0)  # a task without a prompt that fits is refused before anything runs
        return Prompts(token_ids=order)

    rows = read_prompts(Path(source))
    is_chat = any(not isinstance(row, str) and isinstance(row[0], Mapping) for row in rows)
    encoded = [encode(row, name=f"prompt {number} of {source}") for number, row in enumerate(rows)]
    fitted = fit_prompts(encoded, room=room, overlong="skip")
    if not fitted:
        raise InvalidInput(
            f"every prompt of {source} is longer than the context of {policy.max_length} tokens, which must "
            "have one free for the answer; give shorter prompts"
        )

    def of_file(seed: int, index: int) -> tuple[int, ...]:
        epoch, within = divmod(index, len(fitted))
        return fitted[shuffled(f"{seed}-{epoch}", len(fitted))[within]].token_ids

    return Prompts(
        token_ids=of_file,
        chat_template_hash=chat_template_hash(tokenizer) if is_chat and tokenizer is not None else None,
        chat_template_kwargs=dict(chat_template_kwargs) if is_chat else {},
    )


class _TaskOrder:
    """`token_ids` of a task: its prompts in its order, without those that are too long."""

    def __init__(self, task: Task, encode: PromptEncoder, room: Room) -> None:
        self._task, self._encode, self._room = task, encode, room
        self._walks: dict[int, Walk] = {}  # by seed
        self._has_warned = False

    def __call__(self, seed: int, index: int) -> tuple[int, ...]:
        if seed not in self._walks:
            self._walks[seed] = Walk(
                lambda number: self._is_overlong(seed, number), task_name=self._task.name
            )
        return self._token_ids(seed, self._walks[seed].index(index))

    def _is_overlong(self, seed: int, number: int) -> bool:
        num_tokens = len(self._token_ids(seed, number))
        if self._room.fits(num_tokens):
            return False
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "prompt %d of task %r has %d tokens, and the context no room for prompts of %s: those that "
                "are too long are left out",
                number,
                self._task.name,
                num_tokens,
                self._room.excess,
            )
        return True

    def _token_ids(self, seed: int, number: int) -> tuple[int, ...]:
        (row,) = self._task.train_rows(seed, number, 1)
        return self._encode(row["prompt"], name=f"prompt {number} of task {self._task.name!r}")


def read_prompts(path: Path) -> list[PromptInput]:
    """The `prompt` of every line, as `read_rows` reads it."""
    return [row["prompt"] for row in read_rows(path)]


def read_rows(path: Path) -> list[Row]:
    """The object of every line, with its `prompt`; a bad line is named, and what was expected."""
    if not path.is_file():
        raise InvalidInput(f"no prompts file at {path}")
    rows: list[Row] = []
    lines, rest = split_lines(path)
    for number, line in enumerate([*lines, rest], start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{where} is not JSON ({error}); expected {_EXPECTED}") from None
        prompt: Any = row.get("prompt") if isinstance(row, dict) else None
        if not is_prompt(prompt):
            raise InvalidInput(f"{where} has the prompt {prompt!r}; expected {_EXPECTED}")
        rows.append(row)
    if not rows:
        raise InvalidInput(f"{path} holds no prompt; expected {_EXPECTED} per line")
    return rows


_EXPECTED = (
    'an object like {"prompt": "text"}, {"prompt": [{"role": "user", "content": "text"}]} or '
    '{"prompt": [1, 2]}'
)
