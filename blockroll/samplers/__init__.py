"""Laws: how tokens are drawn and verified, given logits and uniforms."""

from blockroll.samplers.lossless import (
    draw_draft,
    mixed_logits,
    policy_logprobs,
    target_probs,
    verify_block,
)
from blockroll.samplers.uniforms import step_uniforms

__all__ = [
    "draw_draft",
    "mixed_logits",
    "policy_logprobs",
    "step_uniforms",
    "target_probs",
    "verify_block",
]
