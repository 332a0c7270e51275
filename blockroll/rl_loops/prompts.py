"""Prompts for a conversion: a task's, or a JSONL file's, as tokens and in an endless order.

As in TRL, a `prompt` that is text is taken as it is, and one that is a list of messages goes through the
tokenizer's chat template.
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
from blockroll.policies.prompts import encode_prompt, fit_prompts
from blockroll.rl_loops.prompt_order import MAX_SKIPPED_IN_A_ROW
from blockroll.rl_loops.tasks import Task, load_task, shuffled
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
    if tokenizer is None:
        raise InvalidInput("the policy was loaded without a tokenizer, and prompts are text")
    if not source.endswith((".jsonl", ".json")):
        order = _TaskOrder(load_task(source), tokenizer, max_tokens=policy.max_length - 1)
        order(0, 0)  # a task without a prompt that fits is refused before anything runs
        return Prompts(token_ids=order)

    rows = read_prompts(Path(source))
    is_chat = any(not isinstance(row, str) for row in rows)
    if is_chat and not tokenizer.chat_template:
        raise InvalidInput(
            f"{source} holds messages, but the policy's tokenizer has no chat template: give prompts as text"
        )

    encoded = [
        encode_prompt(
            tokenizer, row, chat_template_kwargs=chat_template_kwargs, name=f"prompt {number} of {source}"
        )
        for number, row in enumerate(rows)
    ]
    fitted = fit_prompts(encoded, max_tokens=policy.max_length - 1, overlong="skip")
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
        chat_template_hash=chat_template_hash(tokenizer) if is_chat else None,
        chat_template_kwargs=dict(chat_template_kwargs) if is_chat else {},
    )


class _TaskOrder:
    """`token_ids` of a task: its prompts in its order, without those that are too long."""

    def __init__(self, task: Task, tokenizer: Any, *, max_tokens: int) -> None:
        self._task, self._tokenizer, self._max_tokens = task, tokenizer, max_tokens
        self._rows: dict[int, list[int]] = {}  # by seed, the rows that fit, as far as they were asked for
        self._has_warned = False

    def __call__(self, seed: int, index: int) -> tuple[int, ...]:
        rows = self._rows.setdefault(seed, [])
        while len(rows) <= index:
            rows.append(self._next_that_fits(seed, rows[-1] + 1 if rows else 0))
        return self._encode(seed, rows[index])

    def _next_that_fits(self, seed: int, start: int) -> int:
        for number in range(start, start + MAX_SKIPPED_IN_A_ROW):
            num_tokens = len(self._encode(seed, number))
            if num_tokens <= self._max_tokens:
                return number
            if not self._has_warned:
                self._has_warned = True
                log.warning(
                    "prompt %d of task %r has %d tokens, and the context has room for %d: prompts that are "
                    "too long are left out",
                    number,
                    self._task.name,
                    num_tokens,
                    self._max_tokens,
                )
        raise InvalidInput(
            f"{MAX_SKIPPED_IN_A_ROW} prompts of task {self._task.name!r}, from prompt {start} on, have more "
            f"than {self._max_tokens} tokens, all that the context has room for; give shorter prompts"
        )

    def _encode(self, seed: int, number: int) -> tuple[int, ...]:
        (row,) = self._task.train_rows(seed, number, 1)
        return encode_prompt(
            self._tokenizer, row["prompt"], name=f"prompt {number} of task {self._task.name!r}"
        )


def read_prompts(path: Path) -> list[str | list[dict[str, str]]]:
    """The `prompt` of every line; a bad line is named with its number and what was expected."""
    if not path.is_file():
        raise InvalidInput(f"no prompts file at {path}")
    prompts: list[str | list[dict[str, str]]] = []
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
        if not _is_prompt(prompt):
            raise InvalidInput(f"{where} has the prompt {prompt!r}; expected {_EXPECTED}")
        prompts.append(prompt)
    if not prompts:
        raise InvalidInput(f"{path} holds no prompt; expected {_EXPECTED} per line")
    return prompts


_EXPECTED = 'an object like {"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}'


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        )
    )
