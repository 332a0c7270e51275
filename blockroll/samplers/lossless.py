"""Drafting and lossless verification: committed tokens follow the target law exactly.

Samplers see logits and uniforms, never models or requests. Logits come in as float32; probabilities are
float64, because the law is proven on what this module computes.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.types import POINT_MASS, Draft, Evidence, PointMass, Verdict


def target_probs(logits_BLV: Tensor, temperature_B: Tensor, *, has_greedy: bool | None = None) -> Tensor:
    """The law to commit by: float64 (B, L, V) softmax of logits over temperature; a point mass where it is 0.

    Ties of a greedy row go to the lowest id. Who knows whether any temperature is 0 saves a look.
    """
    logits = logits_BLV.to(torch.float64)
    if has_greedy is None:
        has_greedy = bool((temperature_B == 0).any())
    if not has_greedy:
        return (logits / temperature_B.to(torch.float64)[:, None, None]).softmax(dim=-1)
    is_greedy_B = temperature_B == 0
    scale_B = torch.where(is_greedy_B, 1.0, temperature_B.to(torch.float64))
    probs = (logits / scale_B[:, None, None]).softmax(dim=-1)
    best = torch.zeros_like(probs).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(is_greedy_B[:, None, None], best, probs)


def mixed_logits(
    policy_logits_BLV: Tensor, draft_logits_BKV: Tensor, weight_B: Tensor, num_drafts_B: Tensor
) -> Tensor:
    """Target rows of the mixed law: float64 (B, L, V), w z_policy + (1 - w) z_draft where a draft was met.

    A draft row enters only at the position it was drafted for; rows without a draft, the extra row among
    them, stay causal, and so does every row of a request with w = 1, bit for bit. The law of a token then
    depends on its prefix and on the draft row it met, so its log-probability is known only here.
    Source: logit mixing of TiDAR (arXiv 2511.08923, ablation), as a target law under the verify rule.
    """
    num_drafts = draft_logits_BKV.shape[1]
    policy_BLV = policy_logits_BLV.to(torch.float64)
    weight_B11 = weight_B.to(torch.float64)[:, None, None]
    mixed_BKV = weight_B11 * policy_BLV[:, :num_drafts] + (1 - weight_B11) * draft_logits_BKV.to(
        torch.float64
    )
    offsets_K = torch.arange(num_drafts, device=policy_BLV.device)
    meets_draft_BK = (offsets_K < num_drafts_B[:, None]) & (weight_B < 1)[:, None]
    mixed_BKV = torch.where(meets_draft_BK[..., None], mixed_BKV, policy_BLV[:, :num_drafts])
    return torch.cat([mixed_BKV, policy_BLV[:, num_drafts:]], dim=1)


def draw_draft(
    logits_BKV: Tensor,
    temperature_B: Tensor,
    uniforms_BK: Tensor,
    num_drafts_B: Tensor | None = None,
    *,
    has_greedy: bool | None = None,
    all_greedy: bool | None = None,
) -> Draft:
    """Draw every draft independently from its own row; temperature 0 takes the argmax, a point mass.

    The law returned is the law drawn from, whatever the rows hold: POINT_MASS where every request takes the
    argmax. Without `num_drafts_B` every row counts. Who knows whether any or all temperatures are 0 saves a
    look.
    """
    batch, num_drafts = uniforms_BK.shape
    if num_drafts_B is None:
        num_drafts_B = torch.full((batch,), num_drafts, device=logits_BKV.device)
    if num_drafts == 0:
        no_tokens = torch.empty((batch, 0), dtype=torch.int64, device=logits_BKV.device)
        return Draft(token_ids_BK=no_tokens, probs_BKV=logits_BKV.double(), num_drafts_B=num_drafts_B)
    if all_greedy is None:
        all_greedy = bool((temperature_B == 0).all())
    if all_greedy:
        return Draft(token_ids_BK=logits_BKV.argmax(dim=-1), probs_BKV=POINT_MASS, num_drafts_B=num_drafts_B)
    probs_BKV = target_probs(logits_BKV, temperature_B, has_greedy=has_greedy)
    return Draft(
        token_ids_BK=inverse_cdf(probs_BKV, uniforms_BK), probs_BKV=probs_BKV, num_drafts_B=num_drafts_B
    )


def draft_probs(draft: Draft, vocab_size: int) -> Tensor:
    """The law of every draft as dense rows, float64 (B, K, V), whichever way the draft states it."""
    if not isinstance(draft.probs_BKV, PointMass):
        return draft.probs_BKV
    tokens_BK = draft.token_ids_BK
    rows_BKV = torch.zeros((*tokens_BK.shape, vocab_size), dtype=torch.float64, device=tokens_BK.device)
    return rows_BKV.scatter_(-1, tokens_BK[..., None], 1.0)


def verify_block(draft: Draft, target_probs_BLV: Tensor, uniforms_BL: Tensor) -> Verdict:
    """Accept the longest draft prefix the target allows, then take one token from the target.

    Law: if each draft token was drawn from its row of `draft.probs_BKV` and the uniforms are
    independent on (0, 1), the committed tokens are a sample of the target. A point mass is accepted with the
    token's own target probability, and its residual is the target without that token: no dense row is formed.
    Source: Leviathan et al. 2023, appendix A.1; Chen et al. 2023, theorem 1.
    Rows sum to one and are float64; K may be zero, and a request may have fewer drafts than K.
    """
    num_drafts = draft.token_ids_BK.shape[1]
    if num_drafts == 0:
        return _draw(target_probs_BLV, uniforms_BL)
    rows_B = torch.arange(len(target_probs_BLV), device=target_probs_BLV.device)
    drafted_BK1 = draft.token_ids_BK[..., None]
    draft_p_BK = _own_probs(draft)
    target_p_BK = target_probs_BLV[:, :num_drafts].gather(-1, drafted_BK1).squeeze(-1)

    # u * draft < target is u < target / draft without the division, so draft == 0 is no special case.
    accepted_BK = uniforms_BL[:, :num_drafts] * draft_p_BK < target_p_BK
    accepted_BK &= torch.arange(num_drafts, device=rows_B.device) < draft.num_drafts_B[:, None]
    num_accepted_B = accepted_BK.long().cumprod(dim=1).sum(dim=1)

    final_weights_BV = _final_weights(
        target_probs_BLV[rows_B, num_accepted_B],
        draft,
        num_accepted_B.clamp(max=num_drafts - 1),
        is_rejected_B=num_accepted_B < draft.num_drafts_B,
    )
    cumulative_BV = final_weights_BV.cumsum(dim=-1)
    final_B = _search(cumulative_BV, uniforms_BL[:, -1])

    tokens_BL = torch.cat([draft.token_ids_BK, final_B[:, None]], dim=1)
    tokens_BL = tokens_BL.scatter(1, num_accepted_B[:, None], final_B[:, None])
    behavior_BL = target_probs_BLV.gather(-1, tokens_BL[..., None]).squeeze(-1).log()
    offsets_L = torch.arange(num_drafts + 1, device=rows_B.device)
    return Verdict(
        token_ids_BL=tokens_BL,
        num_committed_B=num_accepted_B + 1,
        is_draft_BL=offsets_L < num_accepted_B[:, None],
        behavior_logprobs_BL=behavior_BL,
        evidence=Evidence(
            draft_probs_BK=draft_p_BK,
            target_probs_BK=target_p_BK,
            uniforms_BL=uniforms_BL,
            cumulative_BV=cumulative_BV,
        ),
    )


def settle_first(draft: Draft, target_probs_B1V: Tensor, uniforms_B2: Tensor) -> Verdict:
    """The first position alone, whatever becomes of the others: its draft if accepted, else the residual's.

    `uniforms_B2` are its accept coin and the coin of the token that replaces a rejected draft.
    Law: verify_block on one draft without its extra token; the token that stands is a sample of the target.
    """
    target_BV, drafted_B1 = target_probs_B1V[:, 0], draft.token_ids_BK[:, :1]
    draft_p_B1, target_p_B1 = _own_probs(draft)[:, :1], target_BV.gather(-1, drafted_B1)
    is_draft_B1 = uniforms_B2[:, :1] * draft_p_B1 < target_p_B1
    is_draft_B1 &= draft.num_drafts_B[:, None] > 0
    first_B = torch.zeros_like(draft.num_drafts_B)
    final_weights_BV = _final_weights(target_BV, draft, first_B, is_rejected_B=draft.num_drafts_B > 0)
    cumulative_BV = final_weights_BV.cumsum(dim=-1)
    final_B = _search(cumulative_BV, uniforms_B2[:, 1])
    tokens_B1 = torch.where(is_draft_B1, drafted_B1, final_B[:, None])
    return Verdict(
        token_ids_BL=tokens_B1,
        num_committed_B=torch.ones_like(draft.num_drafts_B),
        is_draft_BL=is_draft_B1,
        behavior_logprobs_BL=target_BV.gather(-1, tokens_B1).log(),
        evidence=Evidence(
            draft_probs_BK=draft_p_B1,
            target_probs_BK=target_p_B1,
            uniforms_BL=uniforms_B2,
            cumulative_BV=cumulative_BV,
        ),
    )


def _draw(target_probs_B1V: Tensor, uniforms_B1: Tensor) -> Verdict:
    """One token from the target: what verifying no draft comes to."""
    cumulative_BV = target_probs_B1V[:, 0].cumsum(dim=-1)
    tokens_B1 = _search(cumulative_BV, uniforms_B1[:, 0])[:, None]
    return Verdict(
        token_ids_BL=tokens_B1,
        num_committed_B=torch.ones_like(tokens_B1[:, 0]),
        is_draft_BL=torch.zeros_like(tokens_B1, dtype=torch.bool),
        behavior_logprobs_BL=target_probs_B1V.gather(-1, tokens_B1[..., None]).squeeze(-1).log(),
        evidence=Evidence(
            draft_probs_BK=uniforms_B1[:, :0],
            target_probs_BK=uniforms_B1[:, :0],
            uniforms_BL=uniforms_B1,
            cumulative_BV=cumulative_BV,
        ),
    )


def _own_probs(draft: Draft) -> Tensor:
    """Of each drafted token under the law it was drawn from, float64 (B, K)."""
    if isinstance(draft.probs_BKV, PointMass):
        return torch.ones_like(draft.token_ids_BK, dtype=torch.float64)
    return draft.probs_BKV.gather(-1, draft.token_ids_BK[..., None]).squeeze(-1)


def _final_weights(target_BV: Tensor, draft: Draft, offset_B: Tensor, *, is_rejected_B: Tensor) -> Tensor:
    """What the token at these offsets is drawn from: the residual of the rejected draft there, or target."""
    residual_BV = _residual(target_BV, draft, offset_B)
    # Rounding can reject a token and leave no mass: draft and target are then equal.
    use_residual_B = is_rejected_B & (residual_BV.sum(dim=-1) > 0)
    return torch.where(use_residual_B[:, None], residual_BV, target_BV)


def _residual(target_BV: Tensor, draft: Draft, offset_B: Tensor) -> Tensor:
    """The positive part of target less draft, not normalised; of a point mass, target without its token."""
    if isinstance(draft.probs_BKV, PointMass):
        return target_BV.scatter(-1, draft.token_ids_BK.gather(1, offset_B[:, None]), 0.0)
    rows_B = torch.arange(len(target_BV), device=target_BV.device)
    return (target_BV - draft.probs_BKV[rows_B, offset_B]).clamp(min=0)


def join_verdicts(first: Verdict, rest: Verdict) -> Verdict:
    """One verdict over both: everything of `first` is committed, and then what `rest` commits."""
    return Verdict(
        token_ids_BL=torch.cat([first.token_ids_BL, rest.token_ids_BL], dim=1),
        num_committed_B=first.num_committed_B + rest.num_committed_B,
        is_draft_BL=torch.cat([first.is_draft_BL, rest.is_draft_BL], dim=1),
        behavior_logprobs_BL=torch.cat([first.behavior_logprobs_BL, rest.behavior_logprobs_BL], dim=1),
    )


def policy_logprobs(logits_BLV: Tensor, token_ids_BL: Tensor, temperature_B: Tensor) -> Tensor:
    """Log-probability under the causal policy, float64 (B, L): full vocabulary, T = 1 where greedy."""
    scale_B = torch.where(temperature_B == 0, 1.0, temperature_B.to(torch.float64))
    scaled_BLV = logits_BLV.to(torch.float64) / scale_B[:, None, None]
    return scaled_BLV.gather(-1, token_ids_BL[..., None]).squeeze(-1) - scaled_BLV.logsumexp(dim=-1)


def inverse_cdf(weights_V: Tensor, uniforms: Tensor) -> Tensor:
    """The id whose interval of the cumulative weights holds the uniform; never an id without weight.

    `weights_V` (..., V) need not be normalised; `uniforms` (...) lie in (0, 1). One token per row, int64.
    """
    return _search(weights_V.cumsum(dim=-1), uniforms)


def _search(cumulative_V: Tensor, uniforms: Tensor) -> Tensor:
    total = cumulative_V[..., -1:].contiguous()
    token = torch.searchsorted(cumulative_V, uniforms[..., None] * total, right=True)
    # Rounding can carry the goal onto the total: the last id with weight is where the total is first reached.
    last = torch.searchsorted(cumulative_V, total)
    return torch.minimum(token, last).squeeze(-1)
