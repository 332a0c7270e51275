"""Tokens drawn by the coins of their positions, and the drafts that turn out to be these tokens.

Law: each committed token is the draw of one coin from the target row behind the tokens before it, and that
coin decides nothing else. So the committed text is a function of rows and coins alone: whatever was drafted,
it is the text of plain decoding. A draft stands with the probability that the target gives it, as it would by
an accept coin.

Shapes: B requests, K drafted tokens, L target rows, N rows, W rows of a request, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.kernels import transfer
from blockroll.kernels.rows.compiled import At
from blockroll.kernels.rows.logit_rows import looked_at
from blockroll.types import Draft, Evidence, Rows, Verdict

_FORMED = 1 << 19  # probabilities that cost about what it costs to look whether more are needed
_NO_TOKEN = -1  # stands where a request has no draft


def draw_by_position(draft: Draft, target: Rows, uniforms_BL: Tensor) -> Verdict:
    """Row by row the token that its coin draws, up to the first that is not the draft.

    No row behind that one is formed, if the vocabulary is large: each token that is committed takes one row.
    Where a look at how far the drafts came is a wait, all rows are.
    """
    (size, width), num_drafts = uniforms_BL.shape, draft.token_ids_BK.shape[1]
    vocab_size, offsets_L = target.shape[-1], torch.arange(width, device=uniforms_BL.device)
    drafts_BL = draft.token_ids_BK.new_full((size, width), _NO_TOKEN)
    drafts_BL[:, :num_drafts] = draft.token_ids_BK
    drafts_BL.masked_fill_(offsets_L >= draft.num_drafts_B[:, None], _NO_TOKEN)
    tokens_BL, is_draft_BL = drafts_BL.clamp(min=0), torch.zeros_like(drafts_BL, dtype=torch.bool)
    figures_BL5 = uniforms_BL.new_full((size, width, 5), torch.nan)
    standing_N, first = torch.arange(size, device=offsets_L.device), 0
    formed = _FORMED if transfer.is_free(offsets_L.device) else size * width * vocab_size
    while first < width and len(standing_N):
        offsets_W = offsets_L[first : first + max(1, formed // (len(standing_N) * vocab_size))]
        place = (standing_N[:, None], offsets_W)
        tokens_NW, figures_BL5[place] = _drawn(target, *place, drafts_BL[place], uniforms_BL[place])
        came_NW = (tokens_NW == drafts_BL[place]).long().cumprod(dim=1).bool()
        tokens_BL[place], is_draft_BL[place] = tokens_NW, came_NW
        first += len(offsets_W)
        if first < width:
            standing_N = standing_N[came_NW[:, -1]]
    probs_BL, low_BL, high_BL, mass_BL, draft_probs_BL = figures_BL5.unbind(dim=-1)
    return Verdict(
        token_ids_BL=tokens_BL,
        num_committed_B=draft.num_drafts_B,
        is_draft_BL=is_draft_BL,
        behavior_logprobs_BL=probs_BL.log(),
        evidence=Evidence(
            by_position_B=torch.ones(size, dtype=torch.bool, device=offsets_L.device),
            draft_probs_BK=torch.ones_like(uniforms_BL[:, :num_drafts]),
            target_probs_BK=draft_probs_BL[:, :num_drafts],
            coins_BK=torch.full_like(uniforms_BL[:, :num_drafts], torch.nan),
            uniforms_BL=uniforms_BL,
            mass_BL=mass_BL,
            low_BL=low_BL,
            high_BL=high_BL,
        ),
    )


def _drawn(
    target: Rows, requests_N1: Tensor, offsets_W: Tensor, drafts_NW: Tensor, uniforms_NW: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of these rows (N, W); their probabilities, intervals, masses, and the drafts' (N, W, 5)."""
    shape = drafts_NW.shape
    at = At(requests_N1.expand(shape).flatten(), offsets_W.expand(shape).flatten())
    looked = looked_at(target, at, uniforms_NW.flatten(), drafts_NW.clamp(min=0).view(-1, 1))
    figures = (looked.probs_N, looked.low_N, looked.high_N, looked.mass_N, looked.asked_NA[:, 0])
    return looked.token_ids_N.view(shape), torch.stack(figures, dim=1).view(*shape, -1)
