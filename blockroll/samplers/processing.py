"""Penalties, and rows that no token is left in: what changes logits before the temperature.

Every function gives each row the prefix it really has: a verify row behind n drafts counts those n drafts.
Orders and formulae are those of transformers and vLLM.

Shapes: B requests, N tokens behind the committed text, L rows, U tokens of each, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.kernels import transfer


def added_by_row(ids_BU: Tensor, between_BN: Tensor, num_rows: int) -> Tensor:
    """How often each of these tokens stands among those behind the text that a row knows: float64 (B, L, U).

    The last row ends behind all N tokens; each row before it stands one token earlier.
    """
    first = between_BN.shape[1] - (num_rows - 1)  # tokens that the first row has behind the text
    is_token_BNU = (between_BN[..., None] == ids_BU[:, None]).double()
    nothing_B1U = is_token_BNU.new_zeros((len(ids_BU), 1, ids_BU.shape[1]))
    return torch.cat([nothing_B1U, is_token_BNU.cumsum(dim=1)], dim=1)[:, first:]


def penalize(
    logits_BLU: Tensor,
    seen_BLU: Tensor,
    counts_BLU: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
) -> Tensor:
    """Logits less likely to repeat: `seen` in prompt or completion, `counts` in the completion.

    Sources: CTRL (Keskar et al. 2019) for the repetition penalty; the OpenAI API for the other two.
    """
    factor_B11 = repetition_B[:, None, None]
    repeated_BLU = torch.where(logits_BLU > 0, logits_BLU / factor_B11, logits_BLU * factor_B11)
    logits_BLU = torch.where(seen_BLU & (factor_B11 != 1), repeated_BLU, logits_BLU)
    return logits_BLU - frequency_B[:, None, None] * counts_BLU - presence_B[:, None, None] * (counts_BLU > 0)


def even_where_empty(rows_BLV: Tensor) -> Tensor | None:
    """Make rows that no token is left in even, in place, and say which they were; None: there is none.

    Of a draft row, whatever is drawn there is rejected.
    """
    is_empty_BL = ~rows_BLV.amax(dim=-1).isfinite()
    if transfer.is_free(rows_BLV.device) and not is_empty_BL.any():
        return None
    rows_BLV.masked_fill_(is_empty_BL[..., None], 0.0)
    return is_empty_BL
