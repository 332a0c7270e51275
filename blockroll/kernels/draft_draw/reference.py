"""The definition of `draft_draw`, and how it runs on a CPU.

Shapes: B requests, K drafted tokens, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.kernels.rows.logit_rows import LogitRows, as_rows, held
from blockroll.types import POINT_MASS, Draft, PointMass


def draw(rows: LogitRows, uniforms_BK: Tensor, num_drafts_B: Tensor, certain: Tensor | bool) -> Draft:
    """A token of each row by inverse CDF, and the rows it was drawn from."""
    if certain is True and rows.edits is None:  # truncation leaves the best token
        token_ids_BK, law = rows.logits_BLV.argmax(dim=-1), POINT_MASS
        return Draft(token_ids_BK=token_ids_BK, law=law, num_drafts_B=num_drafts_B)
    token_ids_BK, drawn_rows = held(rows).drawn(uniforms_BK)
    return Draft(
        token_ids_BK=token_ids_BK,
        law=POINT_MASS if certain is True else drawn_rows,
        num_drafts_B=num_drafts_B,
        certain_B=certain if isinstance(certain, Tensor) else None,
    )


def draft_probs(draft: Draft, vocab_size: int) -> Tensor:
    """The law of every draft as dense rows, float64 (B, K, V), whichever way the draft states it."""
    if not isinstance(draft.law, PointMass):
        return as_rows(draft.law).dense()
    tokens_BK = draft.token_ids_BK
    rows_BKV = torch.zeros((*tokens_BK.shape, vocab_size), dtype=torch.float64, device=tokens_BK.device)
    return rows_BKV.scatter_(-1, tokens_BK[..., None], 1.0)
