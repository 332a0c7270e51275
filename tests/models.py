"""Tiny real models for tests: random weights, real architectures."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockroll.policies.adapter import AdapterConfig, DraftAdapter
from blockroll.policies.hf import HFPolicy

VOCAB_SIZE = 24
MASK_ID = 3
EOS_ID = 2
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "tie_word_embeddings": False,
}
SLIDING_WINDOW = 7
# What each family adds to the common shape: windows, soft caps and experts are all in use.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,  # low, because random weights give low scores
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def random_model(
    family: str = "llama",
    *,
    seed: int = 0,
    scale: float = 1.0,
    trained_drafts: int = 4,
    layouts: tuple[str, ...] = ("two_forward", "fused"),
    **shape,
):
    """A two-layer causal LM; `scale` widens its logits, so that tokens differ in probability."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **shape})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "lm_head" in name else 3.0)
        model.lm_head.weight.mul_(scale)
    model.config.blockroll = {
        "conversion": "full",
        "mask_token_id": MASK_ID,
        "block_sizes": [trained_drafts],
        "layouts": [*layouts],
    }
    return model.eval()


def random_policy(family: str = "llama", **options) -> HFPolicy:
    """The same, as a policy."""
    return HFPolicy(random_model(family, **options))


def random_adapter(policy: HFPolicy, *, seed: int = 1, block_sizes=(4,)) -> DraftAdapter:
    """An adapter that acts at random, so that whatever it touches changes."""
    config = AdapterConfig(
        family=policy.model.config.model_type,
        rank=3,
        block_sizes=block_sizes,
        layouts=("two_forward", "fused"),
    )
    adapter = DraftAdapter(policy.model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return adapter


def adapted_policy(family: str = "llama", **options) -> HFPolicy:
    """A policy that was never trained to draft, with a random adapter."""
    model = random_model(family, **options)
    del model.config.blockroll
    policy = HFPolicy(model)
    policy.use_adapter(random_adapter(policy))
    return policy


def prompts(count: int, *, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    """Prompts of mixed length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(4, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths]
