"""Prompts that no completion fits behind never end a run: they are found when a trainer is made, or left out.

TRL neither shortens nor leaves out a long prompt, and with transformers it generates past the context without
a word. A dataset that has a length is read whole before anything is drawn, and the numbers of its rows are
named. A stream cannot be: what does not fit is left out of it as it comes, and logged.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from datasets import IterableDataset

from blockroll.errors import InvalidInput

logger = logging.getLogger(__name__)

_TOKENS_AROUND = 64  # that a tokenizer or a template may put around a text or a message
_MOST_LEFT_OUT = 1000  # prompts of a stream, one after another: none may ever fit


def with_fitting_prompts(trainer: Any, name: str, dataset: Any, *, max_tokens: int) -> Any:
    """The dataset, or a mapping of datasets, with prompts of at most `max_tokens` tokens.

    InvalidInput names the longest row of a dataset with others. Of a stream they are left out when it is
    read. Prompts that environments write are not looked at. Only rows whose bytes could be that many tokens
    are tokenized.
    """
    if getattr(trainer, "environment_factories", None) is not None:
        return dataset
    if isinstance(dataset, Mapping):
        parts = {
            key: with_fitting_prompts(trainer, f"{name}[{key!r}]", part, max_tokens=max_tokens)
            for key, part in dataset.items()
        }
        kind: Any = type(dataset)
        return kind(parts)
    lengths = _Lengths(trainer, max_tokens)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Fits(lengths, name), input_columns=["prompt"])
    if hasattr(dataset, "__len__") and len(dataset):
        _check_rows(lengths, name, dataset)
    return dataset


class _Lengths:
    """Which prompts have more tokens than there is room for."""

    def __init__(self, trainer: Any, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._trainer = trainer
        self._around: int | None = None  # what the template puts around the first prompt, tools among it

    def overlong(self, prompt: Any) -> int | None:
        """How many tokens the prompt has, if there is no room for them."""
        if isinstance(prompt, str):
            num_bytes = len(prompt.encode()) + _TOKENS_AROUND
        else:
            if self._around is None:
                self._around = self._num_tokens(prompt)
            num_bytes = len(json.dumps(prompt, default=str)) + self._around + _TOKENS_AROUND * len(prompt)
        if num_bytes <= self.max_tokens:
            return None
        num_tokens = self._num_tokens(prompt)
        return num_tokens if num_tokens > self.max_tokens else None

    def _num_tokens(self, prompt: Any) -> int:
        prompt_ids, _, _ = self._trainer._tokenize_prompts([prompt])
        return len(prompt_ids[0])


def _check_rows(lengths: _Lengths, name: str, dataset: Any) -> None:
    found = ((row, lengths.overlong(prompt)) for row, prompt in enumerate(dataset["prompt"]))
    overlong = {row: num_tokens for row, num_tokens in found if num_tokens is not None}
    if overlong:
        longest = max(overlong, key=lambda row: overlong[row])
        raise InvalidInput(
            f"{len(overlong)} of {len(dataset)} rows of {name} have prompts of more than "
            f"{lengths.max_tokens} tokens, which leave no room in the context; the first is row "
            f"{min(overlong)}, the longest row {longest} with {overlong[longest]}. Leave them out by "
            "dataset.filter(...), or shorten them"
        )


class _Fits:
    """Which prompts of a stream are kept. Every 1st, 10th, 100th, ... that is left out is logged."""

    def __init__(self, lengths: _Lengths, name: str) -> None:
        self._lengths, self._name = lengths, name
        self._num_read = self._num_left_out = self._num_in_a_row = 0

    def __call__(self, prompt: Any) -> bool:
        """InvalidInput if no prompt has fitted for long: the stream may never give one."""
        num_tokens = self._lengths.overlong(prompt)
        self._num_read += 1
        if num_tokens is None:
            self._num_in_a_row = 0
            return True
        self._num_left_out += 1
        self._num_in_a_row += 1
        what = (
            f"prompt {self._num_read} that {self._name} gave has {num_tokens} tokens, more than "
            f"{self._lengths.max_tokens}, which leave no room in the context"
        )
        if self._num_in_a_row == _MOST_LEFT_OUT:
            raise InvalidInput(f"{what}, like the {_MOST_LEFT_OUT - 1} before it: shorten them")
        if set(str(self._num_left_out)[1:]) <= {"0"} and str(self._num_left_out)[0] == "1":
            logger.warning("%s: left out, %d so far", what, self._num_left_out)
        return False
