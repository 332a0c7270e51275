"""The definition of `block_verify`, and how it runs on a CPU.

Two rules verify drafts. One that was drawn is accepted by min(1, target / draft), else the residual replaces
it. One that was certain is compared with the token that the position's own coin draws from the target: as
likely to stand, and what is committed does not depend on it. Probabilities are float64, because the law is
proven on what this module computes; of large vocabularies they are those of float32 weights, the very ones
that tokens are drawn from.

Shapes: B requests, K drafted tokens, L = K + 1 target positions, N rows, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockroll.kernels import transfer
from blockroll.kernels.block_verify.by_position import draw_by_position
from blockroll.kernels.rows.compiled import At, Judged, Looked
from blockroll.kernels.rows.logit_rows import (
    LogitRows,
    Weighed,
    as_rows,
    held,
    looked,
    looked_at,
    spans_of_rows,
    weights_at,
)
from blockroll.kernels.rows.packed import Logits, PackedLogits, PackedRows, cells
from blockroll.kernels.rows.weights import Weights
from blockroll.types import Draft, Evidence, PointMass, Rows, Verdict

_T = TypeVar("_T", Verdict, Evidence)


def verify(draft: Draft, target: Rows, uniforms_BL: Tensor) -> Verdict:
    """The longest draft prefix the target allows, and one token more from the target."""
    target, is_certain = held(target), draft.is_certain
    if draft.token_ids_BK.shape[1] == 0:
        return _draw(draft, target, uniforms_BL)
    if is_certain is True:
        return _verify_certain(draft, target, uniforms_BL)
    verdict = _verify_drawn(draft, target, uniforms_BL)
    if is_certain is False:
        return verdict
    return _certain_or(is_certain, _verify_certain(draft, target, uniforms_BL), verdict)


def settle(draft: Draft, target: Rows, uniforms_B2: Tensor) -> Verdict:
    """The first position alone: its draft if accepted, else what replaces it."""
    target, is_certain = held(target), draft.is_certain
    first = dataclasses.replace(
        draft,
        token_ids_BK=draft.token_ids_BK[:, :1],
        num_drafts_B=draft.num_drafts_B.clamp(max=1),
        num_drafts=None,
    )
    if is_certain is True:
        return _settle_certain(first, target, uniforms_B2[:, :1])
    verdict = _settle_drawn(draft, first, target, uniforms_B2)
    if is_certain is False:
        return verdict
    return _certain_or(is_certain, _settle_certain(first, target, uniforms_B2[:, :1]), verdict)


def _verify_drawn(draft: Draft, target: Rows, uniforms_BL: Tensor) -> Verdict:
    """By accept coins, and a residual."""
    num_drafts, law = draft.token_ids_BK.shape[1], _law(draft)
    draft_p_BK, coins_BK = law.probs_of(draft.token_ids_BK), uniforms_BL[:, :num_drafts]
    target_p_BK, num_accepted_B, final = _judged(
        draft, law, target, draft_p_BK, coins_BK, uniforms_BL[:, -1], num_rows=num_drafts + 1
    )
    num_accepted_B1, final_p_B1 = num_accepted_B[:, None], final.probs_N[:, None]
    tokens_BL = torch.cat([draft.token_ids_BK, final.token_ids_N[:, None]], dim=1)
    probs_BL = torch.cat([target_p_BK, final_p_B1], dim=1).scatter(1, num_accepted_B1, final_p_B1)
    return Verdict(
        token_ids_BL=tokens_BL.scatter(1, num_accepted_B1, final.token_ids_N[:, None]),
        num_committed_B=num_accepted_B + 1,
        is_draft_BL=torch.arange(num_drafts + 1, device=uniforms_BL.device) < num_accepted_B1,
        behavior_logprobs_BL=probs_BL.log(),
        evidence=_evidence(draft_p_BK, target_p_BK, uniforms_BL, final, width=num_drafts + 1),
    )


def _judged(
    draft: Draft,
    law: Rows,
    target: Rows,
    draft_p_BK: Tensor,
    coins_BK: Tensor,
    uniforms_B: Tensor,
    *,
    num_rows: int,
) -> Judged:
    """Drafts against the first rows: those accepted, and the token behind them if it is in these rows."""
    tables = [rows.table() if isinstance(rows, Weighed) else None for rows in (target, law)]
    if tables[0] is not None and tables[1] is not None:
        given = (draft.token_ids_BK, draft_p_BK, draft.num_drafts_B, coins_BK, uniforms_B)
        return tables[0].judged(tables[1], *given, num_rows=num_rows)
    target_p_BK = target.probs_of(draft.token_ids_BK)
    # u * draft < target is u < target / draft without the division, so draft == 0 is no special case.
    accepted_BK = coins_BK * draft_p_BK < target_p_BK
    accepted_BK &= torch.arange(accepted_BK.shape[1], device=coins_BK.device) < draft.num_drafts_B[:, None]
    num_accepted_B = accepted_BK.long().cumprod(dim=1).sum(dim=1)
    offset_B = num_accepted_B.clamp(max=num_rows - 1)
    return Judged(
        target_p_BK,
        num_accepted_B,
        _draw_final(law, target, offset_B, offset_B < draft.num_drafts_B, uniforms_B),
    )


def _settle_drawn(draft: Draft, first: Draft, target: Rows, uniforms_B2: Tensor) -> Verdict:
    law, drafted_B1, coins_B1 = _law(draft), first.token_ids_BK, uniforms_B2[:, :1]
    # Of all drafts, which a law that was drawn from knows; those of the first it would compute.
    draft_p_B1 = law.probs_of(draft.token_ids_BK)[:, :1]
    target_p_B1, num_accepted_B, final = _judged(
        first, law, target, draft_p_B1, coins_B1, uniforms_B2[:, 1], num_rows=1
    )
    is_draft_B1 = num_accepted_B[:, None] > 0
    return Verdict(
        token_ids_BL=torch.where(is_draft_B1, drafted_B1, final.token_ids_N[:, None]),
        num_committed_B=torch.ones_like(first.num_drafts_B),
        is_draft_BL=is_draft_B1,
        behavior_logprobs_BL=torch.where(is_draft_B1, target_p_B1, final.probs_N[:, None]).log(),
        evidence=_evidence(draft_p_B1, target_p_B1, uniforms_B2, final, width=1),
    )


def _verify_certain(draft: Draft, target: Rows, uniforms_BL: Tensor) -> Verdict:
    verdict = draw_by_position(draft, target, uniforms_BL)
    return dataclasses.replace(verdict, num_committed_B=verdict.is_draft_BL.sum(dim=1) + 1)


def _settle_certain(first: Draft, target: Rows, uniforms_B1: Tensor) -> Verdict:
    verdict = draw_by_position(first, target, uniforms_B1)
    return dataclasses.replace(verdict, num_committed_B=torch.ones_like(first.num_drafts_B))


def _certain_or(certain_B: Tensor, certain: Verdict, drawn: Verdict) -> Verdict:
    """Of each request the verdict by the rule of its drafts."""
    assert drawn.evidence is not None
    assert certain.evidence is not None
    return _either(certain_B, certain, drawn, evidence=_either(certain_B, certain.evidence, drawn.evidence))


def _draw(draft: Draft, target: Rows, uniforms_B1: Tensor) -> Verdict:
    """One token from the target: what verifying no draft comes to."""
    nothing_B0, first_B = uniforms_B1[:, :0], torch.zeros_like(draft.num_drafts_B)
    drawn = looked_at(
        target, At(torch.arange(len(first_B), device=first_B.device), first_B), uniforms_B1[:, 0]
    )
    tokens_B1 = drawn.token_ids_N[:, None]
    return Verdict(
        token_ids_BL=tokens_B1,
        num_committed_B=torch.ones_like(first_B),
        is_draft_BL=torch.zeros_like(tokens_B1, dtype=torch.bool),
        behavior_logprobs_BL=drawn.probs_N[:, None].log(),
        evidence=_evidence(nothing_B0, nothing_B0, uniforms_B1, drawn, width=1, by_position=draft.is_certain),
    )


def _law(draft: Draft) -> Rows:
    """What drafts were drawn from that are not all certain."""
    assert not isinstance(draft.law, PointMass)
    return held(as_rows(draft.law))


def _draw_final(
    law: Rows, target: Rows, offset_B: Tensor, is_rejected_B: Tensor, uniforms_B: Tensor
) -> Looked:
    """The token at an offset of each request: from a rejected draft's residual, or from the target."""
    requests_B = torch.arange(len(offset_B), device=offset_B.device)
    last_draft = law.shape[1] - 1
    found: list[Looked] = []
    for span in spans_of_rows(len(requests_B), target.shape[-1]):
        requests_M, offset_M = requests_B[span], offset_B[span]
        weights = weights_at(target, requests_M, offset_M)
        drafted = weights_at(law, requests_M, offset_M.clamp(max=last_draft))
        residual_MV = _residual(weights, drafted, law.shape[-1]).weights_NM
        drawable_MV = torch.where(is_rejected_B[span, None], residual_MV, weights.dense(law.shape[-1]))
        drawable = Weights(weights_NM=drawable_MV)
        found.append(looked(weights, drawable.draw(uniforms_B[span])))
    return found[0] if len(found) == 1 else Looked(*map(torch.cat, zip(*found, strict=True)))


def _residual(target: Weights, draft: Weights, vocab_size: int) -> Weights:
    """The positive part of target less draft, not normalised."""
    target_NV = target.dense(vocab_size)
    residual_NV = (target_NV - draft.dense(vocab_size)).clamp_(min=0)
    # Rounding can reject a token and leave no mass: draft and target are then equal.
    is_empty_N1 = residual_NV.amax(dim=-1, keepdim=True) == 0
    return Weights(weights_NM=torch.where(is_empty_N1, target_NV, residual_NV))


def _evidence(
    draft_p_BK: Tensor,
    target_p_BK: Tensor,
    uniforms: Tensor,
    final: Looked,
    *,
    width: int,
    by_position: Tensor | bool = False,
) -> Evidence:
    """Of accept coins and the token that was drawn behind them, wherever that is."""
    size, num_drafts = draft_p_BK.shape
    return Evidence(
        by_position_B=torch.full((size,), by_position, device=uniforms.device)
        if isinstance(by_position, bool)
        else by_position,
        draft_probs_BK=draft_p_BK,
        target_probs_BK=target_p_BK,
        coins_BK=uniforms[:, :num_drafts],
        uniforms_BL=uniforms[:, -1:].expand(-1, width),
        mass_BL=final.mass_N[:, None].expand(-1, width),
        low_BL=final.low_N[:, None].expand(-1, width),
        high_BL=final.high_N[:, None].expand(-1, width),
    )


def join_verdicts(first: Verdict, rest: Verdict) -> Verdict:
    """One verdict over both: everything of `first` is committed, and then what `rest` commits."""
    return Verdict(
        token_ids_BL=torch.cat([first.token_ids_BL, rest.token_ids_BL], dim=1),
        num_committed_B=first.num_committed_B + rest.num_committed_B,
        is_draft_BL=torch.cat([first.is_draft_BL, rest.is_draft_BL], dim=1),
        behavior_logprobs_BL=torch.cat([first.behavior_logprobs_BL, rest.behavior_logprobs_BL], dim=1),
        faults_BL=None
        if first.faults_BL is None or rest.faults_BL is None
        else torch.cat([first.faults_BL, rest.faults_BL], dim=1),
    )


def chosen_logprobs(
    parts: Sequence[Logits], is_chosen_BL: Tensor, token_ids_BL: Tensor, temperature_B: Tensor
) -> Tensor:
    """Log-probabilities under the causal policy, float64 (B, L): full vocabulary, T = 1 where greedy.

    Of the chosen cells of all rows, which come in parts; 0 in others.
    """
    logprobs_BL = torch.zeros(token_ids_BL.shape, dtype=torch.float64, device=token_ids_BL.device)
    first = 0
    for part in parts:
        columns = slice(first, first + part.shape[1])
        if transfer.is_free(token_ids_BL.device):
            at = At(*is_chosen_BL[:, columns].nonzero().unbind(dim=1))
        else:  # which are chosen only a look says
            at = cells(is_chosen_BL[:, columns])
        token_ids_N = token_ids_BL[:, columns][at]
        logprobs_BL[:, columns][at] = _policy_rows(part, temperature_B).logprobs_at(at, token_ids_N)
        first = columns.stop
    return logprobs_BL if transfer.is_free(token_ids_BL.device) else logprobs_BL.where(is_chosen_BL, 0.0)


def _policy_rows(logits_BLV: Logits, temperature_B: Tensor) -> LogitRows | PackedRows:
    scale_B = torch.where(temperature_B == 0, 1.0, temperature_B)
    if isinstance(logits_BLV, PackedLogits):
        return PackedRows(logits_BLV, scale_B, False)
    return LogitRows(logits_BLV, scale_B, False)


def _either(is_first_B: Tensor, first: _T, second: _T, **others: Evidence) -> _T:
    """Of each request the row of one or the other, tensor by tensor."""
    chosen: dict[str, Any] = {**others}
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, Tensor):
            is_first = is_first_B.view(-1, *[1] * (one.ndim - 1))
            chosen[field.name] = torch.where(is_first, one, other)
    return type(first)(**chosen)
