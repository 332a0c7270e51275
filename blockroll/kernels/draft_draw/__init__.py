"""Drafts: a token of each proposal row, drawn by its own uniform, and the law it was drawn from.

Shapes: B requests, K drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import is_triton
from blockroll.kernels.draft_draw import reference
from blockroll.kernels.philox import Uniforms, drawn
from blockroll.kernels.rows import Cut, Edits, LogitRows
from blockroll.kernels.rows.checks import check_columns, check_rows
from blockroll.types import Draft

__all__ = ["draft_probs", "draw_draft"]

draft_probs = reference.draft_probs


def draw_draft(
    logits_BKV: Tensor,
    temperature_B: Tensor,
    uniforms_BK: Uniforms,
    num_drafts_B: Tensor | None = None,
    *,
    cut: Cut | None = None,
    edits: Edits | None = None,
    certain: Tensor | bool | None = None,
) -> Draft:
    """Draw every draft independently from its own row; temperature 0 takes the argmax, a point mass.

    The law returned is the law drawn from, whatever the rows hold: POINT_MASS where every request takes the
    argmax, and `certain_B` where some do. Without `num_drafts_B` every row counts. `cut` truncates the rows,
    `edits` are logits that stand in them instead. `certain` says whose temperatures are 0, bool (B,), or True
    or False where it is the same of all: who knows saves a look. Uniforms are float64. InvalidInput where
    shapes or types do not belong together.
    """
    if uniforms_BK.dim() != 2 or logits_BKV.dim() != 3:
        raise InvalidInput(
            f"rows have shape {tuple(logits_BKV.shape)} and uniforms {tuple(uniforms_BK.shape)}: give "
            "(B, K, V) and (B, K)"
        )
    size, num_drafts = uniforms_BK.shape
    if certain is None:
        is_greedy_B = temperature_B == 0
        certain = bool(is_greedy_B.all()) or (is_greedy_B if is_greedy_B.any() else False)
    rows = LogitRows(logits_BKV, temperature_B, certain is not False, cut, edits=edits)
    check_rows("the law of the drafts", rows, (size, num_drafts, logits_BKV.shape[2]))
    check_columns("uniforms_BK", uniforms_BK, (size, num_drafts), torch.float64)
    if num_drafts_B is None:
        num_drafts_B = torch.full((size,), num_drafts, device=logits_BKV.device)
    check_columns("num_drafts_B", num_drafts_B, (size,), torch.int64)
    if isinstance(certain, Tensor):
        check_columns("certain", certain, (size,), torch.bool)
    if is_triton():
        from blockroll.kernels.draft_draw import fused

        return fused.drawn(rows, uniforms_BK, num_drafts_B, certain)
    return reference.draw(rows, drawn(uniforms_BK), num_drafts_B, certain)
