"""Laws: how tokens are drawn and verified, given logits and uniforms."""

from blockroll.samplers.laws import Laws
from blockroll.samplers.lossless import (
    as_rows,
    draft_probs,
    draw_draft,
    join_verdicts,
    settle_first,
    verify_block,
)
from blockroll.samplers.packed import Logits, PackedLogits, without_non_finite
from blockroll.samplers.processing import mixed_logits
from blockroll.samplers.rows import LogitRows, target_probs
from blockroll.samplers.uniforms import step_uniforms, token_uniforms

__all__ = [
    "Laws",
    "LogitRows",
    "Logits",
    "PackedLogits",
    "as_rows",
    "draft_probs",
    "draw_draft",
    "join_verdicts",
    "mixed_logits",
    "settle_first",
    "step_uniforms",
    "target_probs",
    "token_uniforms",
    "verify_block",
    "without_non_finite",
]
