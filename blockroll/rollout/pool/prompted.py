"""Requests for prompts as users have them."""

from collections.abc import Iterable, Mapping
from typing import Any

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import (
    FittedPrompt,
    OverlongRule,
    PromptInput,
    as_prompts,
    encode_prompt,
    fit_prompts,
)
from blockroll.rollout.engine.requests import Limits, derive_seed
from blockroll.types import Request, Sampling


def make_requests(
    tokenizer: Any,
    limits: Limits,
    prompts: PromptInput | Iterable[PromptInput],
    sampling: Sampling,
    *,
    seed: int,
    num_samples: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    overlong_prompts: OverlongRule = "error",
) -> list[Request]:
    """As `RolloutPool.requests`; the tokenizer may be None where all prompts are token ids."""
    if num_samples < 1:
        raise InvalidInput(f"num_samples must be at least 1, got {num_samples}")
    encoded = [
        encode_prompt(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs, name=f"prompt {number}")
        for number, prompt in enumerate(as_prompts(prompts))
    ]
    if overlong_prompts == "error":  # the door of `generate` refuses them
        fitted = [FittedPrompt(number, token_ids) for number, token_ids in enumerate(encoded)]
    else:
        room = limits.max_length - sampling.max_tokens
        fitted = fit_prompts(encoded, max_tokens=room, overlong=overlong_prompts)
    return [
        Request(
            request_id=f"{seed}-{number}-{sample}",
            group_id=f"{seed}-{number}",
            prompt_ids=token_ids,
            seed=derive_seed(seed, number, sample),
            sampling=sampling,
        )
        for number, token_ids in fitted
        for sample in range(num_samples)
    ]
