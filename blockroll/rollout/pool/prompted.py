"""Requests for prompts as users have them."""

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from blockroll.errors import InvalidInput
from blockroll.policies.prompts import (
    FittedPrompt,
    OverlongRule,
    PromptEncoder,
    PromptInput,
    as_prompts,
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
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1:
        raise InvalidInput(f"num_samples must be a whole number, at least 1, got {num_samples!r}")
    if not isinstance(sampling, Sampling):
        raise InvalidInput(f"sampling must be a Sampling, as Sampling(max_tokens=64), got {sampling!r}")
    encode = PromptEncoder(tokenizer, chat_template_kwargs=chat_template_kwargs)
    encoded = [encode(prompt, name=f"prompt {number}") for number, prompt in enumerate(as_prompts(prompts))]
    if overlong_prompts == "error":  # the door of `generate` refuses them
        fitted = [FittedPrompt(number, token_ids) for number, token_ids in enumerate(encoded)]
    else:
        room = limits.prompt_room(free=sampling.max_tokens)
        fitted = fit_prompts(encoded, room=room, overlong=overlong_prompts)
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


def as_requests(requests: Iterable[Request]) -> tuple[Request, ...]:
    """All of them, at once; InvalidInput where something else was given."""
    listed = tuple(requests) if isinstance(requests, Iterable) else None
    wrong = (
        requests if listed is None else next((each for each in listed if not isinstance(each, Request)), None)
    )
    if listed is None or wrong is not None:
        raise InvalidInput(
            f"generate takes a list of requests, got {type(wrong).__name__} {reprlib.repr(wrong)}"
            f"{' in it' if listed is not None else ''}; make them with `requests(prompts, sampling)`"
        )
    return listed
