"""Wrong samplers, one planted bug each: a law test that cannot tell them from production proves nothing.

Shapes: B rows, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.samplers import draft_probs, draw_draft, verify_block
from blockroll.types import Draft, Verdict
from tests.law.integrate import Sampler


def final_from_target(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """After a rejection the final token comes from the target row, not from the residual."""
    verdict = verify_block(draft, target_probs_BLV, uniforms_BL)
    num_accepted_B1 = verdict.num_accepted_B[:, None]
    final_BV = target_probs_BLV.take_along_dim(num_accepted_B1[..., None], dim=1).squeeze(1)
    final_B = inverse_cdf(final_BV, uniforms_BL[:, -1])
    return replace(verdict, token_ids_BL=verdict.token_ids_BL.scatter(1, num_accepted_B1, final_B[:, None]))


def accept_if_target_is_larger(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """A draft is accepted if and only if target >= draft: no coin."""
    coins_BK = torch.full_like(uniforms_BL[:, :-1], 1 - 1e-12)
    return verify_block(draft, target_probs_BLV, torch.cat([coins_BK, uniforms_BL[:, -1:]], dim=1))


def no_cumulative_stop(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """Accepted drafts are counted past the first rejection: the cumprod is dropped."""
    num_drafts = draft.token_ids_BK.shape[1]
    drafted_BK1 = draft.token_ids_BK[..., None]
    draft_p_BK = draft_probs(draft, target_probs_BLV.shape[-1]).gather(-1, drafted_BK1).squeeze(-1)
    target_p_BK = target_probs_BLV[:, :num_drafts].gather(-1, drafted_BK1).squeeze(-1)
    num_accepted_B = (uniforms_BL[:, :-1] * draft_p_BK < target_p_BK).sum(dim=1)
    # Coins that force this count: -1 always accepts, infinity never does.
    is_kept_BK = torch.arange(num_drafts) < num_accepted_B[:, None]
    coins_BK = torch.where(is_kept_BK, -1.0, torch.inf).to(uniforms_BL.dtype)
    return verify_block(draft, target_probs_BLV, torch.cat([coins_BK, uniforms_BL[:, -1:]], dim=1))


def coin_reused(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """The accept coin of the rejected draft (of the last draft, if none was) also draws the final token."""
    num_drafts = draft.token_ids_BK.shape[1]
    if num_drafts == 0:
        return verify_block(draft, target_probs_BLV, uniforms_BL)
    num_accepted_B = verify_block(draft, target_probs_BLV, uniforms_BL).num_accepted_B
    coin_B1 = uniforms_BL.gather(1, num_accepted_B.clamp(max=num_drafts - 1)[:, None])
    return verify_block(draft, target_probs_BLV, torch.cat([uniforms_BL[:, :-1], coin_B1], dim=1))


MUTANTS = {
    "final_from_target": Sampler(draw_draft, final_from_target),
    "accept_if_target_is_larger": Sampler(draw_draft, accept_if_target_is_larger),
    "no_cumulative_stop": Sampler(draw_draft, no_cumulative_stop),
    "coin_reused": Sampler(draw_draft, coin_reused),
}


def draws_from_bfloat16(logits_BKV: Tensor, temperature_B: Tensor, uniforms_BK: Tensor) -> Draft:
    """Draws from rounded logits, and returns the law of the others."""
    drawn = draw_draft(logits_BKV.bfloat16().float(), temperature_B, uniforms_BK)
    return replace(drawn, law=logits_BKV.double().softmax(-1))
