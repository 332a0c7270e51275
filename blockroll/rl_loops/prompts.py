"""Prompts for a conversion: a task's, or a JSONL file's, as tokens and in an endless order.

As in TRL, a `prompt` that is text is taken as it is, and one that is a list of messages goes through the
tokenizer's chat template.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockroll.errors import InvalidInput
from blockroll.policies.adapter import chat_template_hash
from blockroll.policies.hf import HFPolicy
from blockroll.policies.prompts import encode_prompt, fit_prompts
from blockroll.rl_loops.tasks import load_task, shuffled
from blockroll.rl_loops.tracking import split_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """`token_ids(seed, index)` is a pure function; the index is unbounded."""

    token_ids: Callable[[int, int], tuple[int, ...]]
    chat_template_hash: str | None = None  # None: no prompt went through one
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(source: str, policy: HFPolicy, chat_template_kwargs: Mapping[str, Any]) -> Prompts:
    """From a file that ends in .jsonl, or a task's training rows.

    Every prompt of a file is encoded here, before the first is used. One that leaves the context no token for
    an answer is left out; how many were is logged. InvalidInput names a bad line.
    """
    tokenizer = policy.tokenizer
    if tokenizer is None:
        raise InvalidInput("the policy was loaded without a tokenizer, and prompts are text")
    if not source.endswith((".jsonl", ".json")):
        task = load_task(source)

        def of_task(seed: int, index: int) -> tuple[int, ...]:
            (row,) = task.train_rows(seed, index, 1)
            return encode_prompt(tokenizer, row["prompt"])

        return Prompts(token_ids=of_task)

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
        except ValueError as error:
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
