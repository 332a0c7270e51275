"""Plain Hugging Face `generate`, to measure and compare against: stock attention, cache and sampler."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel


@torch.inference_mode()
def generate_stock(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    eos_token_ids: Sequence[int],
    seed: int,
) -> list[list[int]]:
    """One completion per prompt, all prompts in one left-padded batch; an end token is kept.

    Law: softmax(logits / temperature) over the full vocabulary, or the argmax at temperature 0. The model
    must be one of its own (`load_model`), not one that a policy has taken over. No end tokens: every
    completion has `max_tokens` tokens. The global random state is left as it was.
    """
    longest = max(map(len, prompts))
    pad_id = model.config.pad_token_id or 0
    ids_BR = torch.tensor([[pad_id] * (longest - len(prompt)) + [*prompt] for prompt in prompts])
    seen_BR = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # `generate` fills options left at None from the model's own; only here can "no end token" be said.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_id,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inputs = {"input_ids": ids_BR.to(model.device), "attention_mask": seen_BR.to(model.device)}
        output_BR = model.generate(**inputs)  # type: ignore[operator]
    completions: list[list[int]] = output_BR[:, longest:].tolist()
    return [_through_end(completion, frozenset(eos_token_ids)) for completion in completions]


def _through_end(token_ids: list[int], ends: frozenset[int]) -> list[int]:
    for index, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: index + 1]
    return token_ids
