"""From a row of logits to the law of a token: penalties before the temperature, truncation after it.

Every function works on rows in float64 and gives each row the prefix it really has: a verify row behind n
drafts counts those n drafts. Orders and formulae are those of transformers and vLLM, except that of equal
probabilities at an edge those of lowest id stay.

Shapes: B requests, N tokens behind the committed text, L rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def counts_by_row(counts_BV: Tensor, between_BN: Tensor, num_rows: int) -> Tensor:
    """Counts (B, L, V) for rows that end behind all N tokens; each row before stands one token earlier."""
    first = between_BN.shape[1] - (num_rows - 1)  # tokens that the first row has behind the text
    added_BNV = torch.zeros(
        (*between_BN.shape, counts_BV.shape[1]), dtype=counts_BV.dtype, device=counts_BV.device
    ).scatter_(2, between_BN[..., None], 1.0)
    sums_BNV = torch.cat([torch.zeros_like(counts_BV)[:, None], added_BNV.cumsum(dim=1)], dim=1)
    return counts_BV[:, None] + sums_BNV[:, first:]


def penalize(
    logits_BLV: Tensor,
    seen_BLV: Tensor,
    counts_BLV: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
) -> Tensor:
    """Logits less likely to repeat: `seen` in prompt or completion, `counts` in the completion.

    Sources: CTRL (Keskar et al. 2019) for the repetition penalty; the OpenAI API for the other two.
    """
    factor_B11 = repetition_B[:, None, None]
    repeated_BLV = torch.where(logits_BLV > 0, logits_BLV / factor_B11, logits_BLV * factor_B11)
    logits_BLV = torch.where(seen_BLV & (factor_B11 != 1), repeated_BLV, logits_BLV)
    return logits_BLV - frequency_B[:, None, None] * counts_BLV - presence_B[:, None, None] * (counts_BLV > 0)


def truncate(probs_BLV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """The law on the tokens that top-k, then top-p, then min-p keep, normalised; the best token always stays.

    Off are 0, 1 and 0. Exactly k tokens stay; top-p keeps the fewest that hold the mass, of what top-k left.
    """
    sorted_BLV, ids_BLV = probs_BLV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(probs_BLV.shape[-1], device=probs_BLV.device)
    k_B11, p_B11 = top_k_B[:, None, None], top_p_B[:, None, None]
    kept_BLV = torch.where((ranks_V < k_B11) | (k_B11 == 0), sorted_BLV, 0.0)
    before_BLV = kept_BLV.cumsum(dim=-1) - kept_BLV
    is_kept_BLV = (kept_BLV > 0) & ((before_BLV < p_B11 * kept_BLV.sum(dim=-1, keepdim=True)) | (p_B11 >= 1))
    is_kept_BLV &= sorted_BLV >= min_p_B[:, None, None] * sorted_BLV[..., :1]
    kept_BLV = torch.where(is_kept_BLV, kept_BLV, 0.0)
    kept_BLV = torch.zeros_like(probs_BLV).scatter_(-1, ids_BLV, kept_BLV)
    is_truncating_B = (top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)
    # A row that is not truncated stays as it is, bit for bit.
    return torch.where(
        is_truncating_B[:, None, None], kept_BLV / kept_BLV.sum(dim=-1, keepdim=True), probs_BLV
    )


def completed_by(text: Sequence[int], sequences: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that would complete one of the sequences behind this text."""
    return [
        sequence[-1]
        for sequence in sequences
        if len(sequence) - 1 <= len(text)
        and tuple(text[len(text) - len(sequence) + 1 :]) == tuple(sequence[:-1])
    ]
