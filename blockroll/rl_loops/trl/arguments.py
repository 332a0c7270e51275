"""What a TRL config asks of whoever generates: honoured, refused by name, or no matter of generation.

Every field that TRL's configs add to transformers' stands in one of three tables; a test reads the configs,
so that an argument of a later release is noticed. An argument is refused where it differs from its default.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from blockroll.errors import InvalidInput

_VLLM = "it configures vLLM, which does not run here"
_CACHE = "keys and values are blockroll's own"

# Honoured by what TRL hands to its engine, by `trainer_sampling`, or by TRL itself around the engine.
HONOURED = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "num_generations",
        "num_generations_eval",
        "generation_batch_size",
        "steps_per_generation",
        "generation_kwargs",
        "chat_template_kwargs",
        "max_tool_calling_iterations",
        "mask_truncated_completions",
        "model_init_kwargs",
        "shuffle_dataset",
        "trust_remote_code",
        "vllm_structured_outputs_regex",
        # Their names speak of vLLM, and they act on any engine's log-probabilities, ours too.
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
    }
)

# Why, and what to say instead.
REFUSED = {
    "use_vllm": "use_vllm=True and rollout=... both want to generate: leave use_vllm out",
    "use_transformers_continuous_batching": "blockroll batches by itself: RolloutConfig(max_batch_size=...)",
    "transformers_continuous_batching_config": "blockroll batches: RolloutConfig(max_batch_size=...)",
    "use_transformers_paged": "blockroll batches by itself: RolloutConfig(max_batch_size=...)",
    "cache_implementation": f"{_CACHE}: leave it out",
    "ds3_gather_for_generation": "under ZeRO 3 weights are gathered one after the other: leave it out",
    "vllm_mode": f"{_VLLM}: RolloutConfig(placement='colocated' or 'separate') says where rollouts are made",
    "vllm_model_impl": f"{_VLLM}: leave it out",
    "vllm_enable_sleep_mode": f"{_VLLM}: a colocated replica gives its memory back between batches by itself",
    "vllm_server_base_url": f"{_VLLM}: RolloutConfig(placement='separate') starts replicas",
    "vllm_server_host": f"{_VLLM}: RolloutConfig(placement='separate') starts replicas",
    "vllm_server_port": f"{_VLLM}: RolloutConfig(placement='separate') starts replicas",
    "vllm_server_timeout": f"{_VLLM}: leave it out",
    "vllm_group_port": f"{_VLLM}: leave it out",
    "vllm_gpu_memory_utilization": f"{_VLLM}: RolloutConfig(memory_fraction=...)",
    "vllm_max_model_length": f"{_VLLM}: RolloutConfig(max_length=...)",
    "vllm_tensor_parallel_size": f"{_VLLM}: a replica holds the whole policy, there is no tensor parallelism",
}

# Of losses, references, rewards, logs: what is generated does not depend on them. `cast_lm_head_to_fp32` does
# and is looked at by itself.
ELSEWHERE = frozenset(
    {
        "beta",
        "cast_lm_head_to_fp32",
        "delta",
        "disable_dropout",
        "entropy_coef",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
        "epsilon",
        "epsilon_high",
        "importance_sampling_level",
        "log_completions",
        "log_completions_hub_repo",
        "log_multimodal",
        "log_unique_prompts",
        "loss_type",
        "multi_objective_aggregation",
        "normalize_advantages",
        "num_completions_to_print",
        "num_iterations",
        "off_policy_mask_threshold",
        "pad_to_multiple_of",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "reward_clip_range",
        "reward_weights",
        "router_aux_loss_coef",
        "sapo_temperature_neg",
        "sapo_temperature_pos",
        "scale_rewards",
        "sync_ref_model",
        "top_entropy_quantile",
        "use_adaptive_entropy",
        "use_bias_correction_kl",
        "vespo_k_neg",
        "vespo_k_pos",
        "vespo_lambda_neg",
        "vespo_lambda_pos",
    }
)

# Keys of `generation_kwargs` under transformers' names and vLLM's, by the option of `Sampling` they are.
SAMPLING_KEYS = {
    "min_new_tokens": "min_tokens",
    "min_tokens": "min_tokens",
    "bad_words_ids": "bad_words_ids",
    "logit_bias": "logit_bias",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop_strings": "stop",
    "stop": "stop",
}
# Keys that say over again what an argument says, and may not say otherwise.
ARGUMENT_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
}
# Keys that are accepted with the value that changes nothing here.
NEUTRAL_KEYS = {"do_sample": True, "num_beams": 1, "use_cache": True, "n": 1, "num_return_sequences": 1}


def check_arguments(args: Any, *, rollout_func: Any = None) -> None:
    """InvalidInput, by name, for the first argument that is refused, or has a value that nobody can do."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, advice in REFUSED.items():
        if name in defaults and getattr(args, name) != defaults[name]:
            raise InvalidInput(f"{type(args).__name__} has {name}={getattr(args, name)!r}: {advice}")
    name = type(args).__name__
    if not args.temperature > 0:
        raise InvalidInput(
            f"{name} has temperature={args.temperature!r}: it must be above 0, for the loss divides logits "
            "by it"
        )
    if args.max_completion_length is None:
        raise InvalidInput(f"{name} has max_completion_length=None: say how long a completion may be")
    if rollout_func is not None:
        raise InvalidInput(
            "rollout_func and rollout=... both want to generate: leave one out, or give a stock "
            "trl.GRPOTrainer rollout_func=make_rollout_func(pool)"
        )


def check_head(args: Any, dtype: torch.dtype) -> None:
    """InvalidInput for a head that TRL computes in another precision than the forward that generates."""
    if getattr(args, "cast_lm_head_to_fp32", False) and dtype != torch.float32:
        raise InvalidInput(
            f"cast_lm_head_to_fp32=True trains a head in float32 behind a forward in {dtype}; blockroll "
            "generates with the whole forward in one precision. Leave it out, or set bf16=False and load the "
            "model in float32"
        )


def sampling_of(generation_kwargs: Mapping[str, Any] | None, args: Any) -> dict[str, Any]:
    """Options of `Sampling` that `generation_kwargs` asks for; InvalidInput for what is none."""
    asked: dict[str, Any] = {}
    for key, value in (generation_kwargs or {}).items():
        if value is None:
            continue  # as where the key is left out
        if key in SAMPLING_KEYS:
            try:
                asked[SAMPLING_KEYS[key]] = _as_option(key, value)
            except (TypeError, ValueError, AttributeError) as error:
                raise InvalidInput(f"generation_kwargs has {key}={value!r}: {error}") from error
        elif key in ARGUMENT_KEYS:
            argument = ARGUMENT_KEYS[key]
            if value != getattr(args, argument):
                raise InvalidInput(
                    f"generation_kwargs has {key}={value!r}, the arguments have "
                    f"{argument}={getattr(args, argument)!r}, which the loss is computed with; set {argument}"
                )
        elif key not in NEUTRAL_KEYS or value != NEUTRAL_KEYS[key]:
            raise InvalidInput(
                f"generation_kwargs has {key}={value!r}, which blockroll does not do. It does "
                f"{', '.join(SAMPLING_KEYS)}; temperature, top_k, top_p, min_p, repetition_penalty and "
                "max_completion_length are arguments of the config"
            )
    return asked


def _as_option(key: str, value: Any) -> Any:
    if key in ("stop", "stop_strings"):
        return (value,) if isinstance(value, str) else tuple(value)
    if key == "bad_words_ids":
        return tuple(tuple(word) for word in value)
    if key == "logit_bias":
        return {int(token): float(bias) for token, bias in value.items()}
    return value
