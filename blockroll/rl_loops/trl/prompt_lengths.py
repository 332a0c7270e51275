"""Prompts that no completion fits behind are found when a trainer is made, by the number of their row.

TRL neither shortens nor leaves out a long prompt, and with transformers it generates past the context without
a word. In the middle of a run such a prompt could only end it.
"""

import json
from collections.abc import Mapping
from typing import Any

from blockroll.errors import InvalidInput

_TOKENS_AROUND = 64  # that a tokenizer or a template may put around a text or a message


def check_prompts(trainer: Any, datasets: Mapping[str, Any], *, max_tokens: int) -> None:
    """InvalidInput that names the longest row of a dataset with prompts of more than `max_tokens` tokens.

    Only rows whose bytes could be that many tokens are tokenized. Datasets without a length are not read, nor
    prompts that environments write.
    """
    if getattr(trainer, "environment_factories", None) is not None:
        return
    for name, dataset in datasets.items():
        if isinstance(dataset, Mapping):
            parts = {f"{name}[{key!r}]": part for key, part in dataset.items()}
            check_prompts(trainer, parts, max_tokens=max_tokens)
        elif hasattr(dataset, "__len__") and len(dataset):
            _check_rows(trainer, name, dataset, max_tokens)


def _check_rows(trainer: Any, name: str, dataset: Any, max_tokens: int) -> None:
    overlong: dict[int, int] = {}
    around: int | None = None  # what the template puts around the first row, tools among it
    for row, prompt in enumerate(dataset["prompt"]):
        if isinstance(prompt, str):
            num_bytes = len(prompt.encode()) + _TOKENS_AROUND
        else:
            around = _num_tokens(trainer, prompt) if around is None else around
            num_bytes = len(json.dumps(prompt, default=str)) + around + _TOKENS_AROUND * len(prompt)
        if num_bytes > max_tokens:
            num_tokens = _num_tokens(trainer, prompt)
            if num_tokens > max_tokens:
                overlong[row] = num_tokens
    if overlong:
        longest = max(overlong, key=lambda row: overlong[row])
        raise InvalidInput(
            f"{len(overlong)} of {len(dataset)} rows of {name} have prompts of more than {max_tokens} "
            f"tokens, which leave no room in the context; the first is row {min(overlong)}, the longest row "
            f"{longest} with {overlong[longest]}. Leave them out by dataset.filter(...), or shorten them"
        )


def _num_tokens(trainer: Any, prompt: Any) -> int:
    prompt_ids, _, _ = trainer._tokenize_prompts([prompt])
    return len(prompt_ids[0])
