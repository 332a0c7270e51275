"""Laws: how tokens are drawn and verified, given logits and uniforms."""

from blockroll.kernels.block_verify import settle_first, verify_block
from blockroll.kernels.draft_draw import draft_probs, draw_draft
from blockroll.kernels.rows import target_probs
from blockroll.samplers.laws import Laws
from blockroll.samplers.uniforms import step_coins, step_uniforms, token_uniforms

__all__ = [
    "Laws",
    "draft_probs",
    "draw_draft",
    "settle_first",
    "step_coins",
    "step_uniforms",
    "target_probs",
    "token_uniforms",
    "verify_block",
]
