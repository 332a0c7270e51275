"""What an option is called here, for those who know it by another name."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from blockroll.errors import InvalidInput

F = TypeVar("F", bound=Callable[..., Any])

_SEVERAL = "ask for several completions of a prompt with `num_samples` of `requests`"
_LENGTH = "the length of a completion is `max_tokens` of `Sampling`"
_LOGPROBS = "every rollout has `policy_logprobs` and `behavior_logprobs`"
ADVICE = {
    "max_new_tokens": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_gen_len": _LENGTH,
    "max_length": _LENGTH,
    "min_new_tokens": "it is `min_tokens` of `Sampling`",
    "n": _SEVERAL,
    "best_of": _SEVERAL,
    "num_return_sequences": _SEVERAL,
    "num_generations": _SEVERAL,
    "seed": "give it to `requests`: each request gets one of its own from it",
    "logprobs": _LOGPROBS,
    "prompt_logprobs": "only tokens of the completion have log-probabilities",
    "output_scores": _LOGPROBS,
    "do_sample": "`temperature` of `Sampling` decides: 0 is greedy, above 0 draws",
    "num_beams": "beams are not served: tokens are drawn, or greedy with temperature=0",
    "stop_strings": "it is `stop` of `Sampling`",
    "eos_token_id": "it is `stop_token_ids` of `Sampling`, beside the policy's own end tokens",
    "logits_processor": "it is `logits_processors` of `Sampling`",
    "bad_words": "it is `bad_words_ids` of `Sampling`, as token ids",
    "guided_regex": "it is `constraint=Regex(...)` of `Sampling`",
    "guided_json": "it is `constraint=JsonSchema(...)` of `Sampling`",
    "torch_dtype": "it is `dtype`",
    "model": "it is `path`",
    "pretrained_model_name_or_path": "it is `path`",
    "device_map": "it is `device`: a policy lies on one device",
    "gpu_memory_utilization": "it is `memory_fraction`, of keys and values alone",
    "max_model_len": "it is `max_length`",
    "max_num_seqs": "it is `max_batch_size`",
    "tensor_parallel_size": "a policy lies on one device; `num_replicas` are whole copies",
    "enable_lora": "it is `adapter`, for a draft adapter; merge a LoRA adapter into the policy",
}


def unknown_option(what: str, name: str, allowed: Collection[str]) -> InvalidInput:
    """The refusal of an option that `what` does not have: what it is called here, or the nearest name."""
    near = difflib.get_close_matches(name, allowed, n=1)
    if name in ADVICE:
        advice = ADVICE[name]
    elif near:
        advice = f"did you mean {near[0]!r}?"
    else:
        advice = f"allowed are {', '.join(sorted(allowed))}"
    return InvalidInput(f"{what} has no option {name!r}; {advice}")


def names_options(what: str) -> Callable[[F], F]:
    """A function that refuses an unknown option with the name it has here."""

    def decorate(function: F) -> F:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def checked(*arguments: Any, **options: Any) -> Any:
            for name in options:
                if name not in known:
                    raise unknown_option(what, name, known)
            return function(*arguments, **options)

        return cast(F, checked)

    return decorate
