"""Tiny real models for tests: random weights, real architectures."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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


def random_model(family: str = "llama", *, seed: int = 0, scale: float = 1.0, trained_drafts: int = 4):
    """A two-layer causal LM; `scale` widens its logits, so that tokens differ in probability."""
    torch.manual_seed(seed)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    }[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "lm_head" in name else 3.0)
        model.lm_head.weight.mul_(scale)
    model.config.blockroll = {
        "conversion": "full",
        "mask_token_id": MASK_ID,
        "block_sizes": [trained_drafts],
        "layouts": ["two_forward"],
    }
    return model.eval()


def random_policy(family: str = "llama", **options) -> HFPolicy:
    """The same, as a policy."""
    return HFPolicy(random_model(family, **options))


def prompts(count: int, *, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    """Prompts of mixed length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(4, VOCAB_SIZE, (n,), generator=generator).tolist()) for n in lengths]
