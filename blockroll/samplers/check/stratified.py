"""Stratified uniforms (i + 1/2) / n: counts that are exact, at vocabularies of any size.

An inverse-CDF sampler gives every id an interval as long as its probability, in the order of ids, and n
equally spaced points fall into it n times its length, give or take less than one. The same holds of all ids
up to any one, which says more where there are fewer points than ids. No randomness: a probability, of an id
or of all ids up to one, that is off by 2 / n is seen for certain.

Shapes: N uniforms, V vocabulary, L = 2 rows of a step with one draft.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.rows import target_probs
from blockroll.samplers.check.finding import Finding
from blockroll.samplers.check.laws import as_law, softmax
from blockroll.samplers.check.tables import Sampler
from blockroll.types import Draft, Verdict

Draw = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Verdict]

_SMALLEST, _LARGEST = 2.0**-53, 1 - 2.0**-53
_ELEMENTS = 1 << 22  # rows times vocabulary of one call: 32 MiB of float64


def check_stratified(
    draw: Draw,
    law_V: Tensor | np.ndarray,
    *,
    num_uniforms: int,
    window: tuple[float, float] = (0.0, 1.0),
    rows_per_call: int | None = None,
    name: str = "stratified uniforms",
) -> Finding:
    """Every id's count within 1 of n times its probability, and so for all ids up to any one.

    `draw` turns uniforms (N,) float64 into ids (N,).

    With a `window` the n uniforms fill only that part of (0, 1), as a magnifying glass does: the counts of
    a tail of mass 1e-8 are then as exact as those of the whole. `rows_per_call` bounds N, for draws that
    hold a row of the vocabulary for each uniform. Ids outside the vocabulary or without probability do not
    pass, ever. Raises InvalidInput if the law is none, or for an empty window.
    """
    law, (low, high) = as_law(law_V), window
    if not (0 <= low < high <= 1 and num_uniforms >= 1):
        raise InvalidInput(
            "stratified uniforms need n of at least 1 and a window inside (0, 1), got "
            f"{num_uniforms} and {window}"
        )
    counts_V, num_outside = _counts(draw, len(law), num_uniforms, window, rows_per_call)
    edges = np.concatenate([[0.0], law.cumsum() / law.sum()])
    inside_V = (edges[1:].clip(low, high) - edges[:-1].clip(low, high)) / (high - low)
    excess_V = counts_V - num_uniforms * inside_V
    difference_V = np.maximum(np.abs(excess_V), np.abs(excess_V.cumsum()))
    difference_V[(law == 0) & (counts_V > 0)] = np.inf
    worst = int(difference_V.argmax())
    statistic = float("inf") if num_outside else float(difference_V[worst])
    # Points that float64 puts on the wrong side of an edge.
    threshold = 1 + num_uniforms / (high - low) * 1e-13
    found = f"{num_uniforms} uniforms gave each of {len(law)} ids its share"
    if num_outside:
        found = f"{num_outside} of {num_uniforms} ids lie outside the vocabulary of {len(law)}"
    elif not statistic <= threshold:
        share = num_uniforms * inside_V[worst]
        found = (
            f"id {worst} came {counts_V[worst]} times for a share of {share:.6g}, ids "
            f"up to it {counts_V[: worst + 1].sum()} for {num_uniforms * inside_V[: worst + 1].sum():.6g}"
        )
    return Finding(
        check=name,
        measure="largest difference of a count",
        statistic=statistic,
        threshold=threshold,
        found=found,
        detectable=2 * (high - low) / num_uniforms,
        power=1.0,
    )


def check_rows(
    sampler: Sampler,
    draft_logits_V: Tensor,
    target_logits_LV: Tensor,
    *,
    num_uniforms: int,
    temperature: float = 1.0,
) -> list[Finding]:
    """`check_stratified` on each kind of row that a step with one draft can draw from.

    draft: the drawn draft · plain: a step without drafts · accept: whether a draft of too much mass is
    accepted · residual: after a rejection · extra: after an acceptance · degenerate: rejected though draft
    and target are equal, as rounding can do; it must fall back to the target. The laws are worked out here.
    """
    rows = {
        "draft": _draft_row,
        "plain": _plain_row,
        "accept": _accept_row,
        "residual": _residual_row,
        "extra": _extra_row,
        "degenerate": _degenerate_row,
    }
    size = target_logits_LV.shape[-1]
    if draft_logits_V.shape != (size,) or target_logits_LV.shape != (2, size):
        raise InvalidInput(
            f"rows need draft logits (V,) and target logits (2, V), got {tuple(draft_logits_V.shape)} and "
            f"{tuple(target_logits_LV.shape)}"
        )
    findings = []
    for name, row in rows.items():
        draw, law_V = row(sampler, draft_logits_V, target_logits_LV, temperature)
        findings.append(
            check_stratified(
                draw,
                law_V,
                num_uniforms=num_uniforms,
                rows_per_call=max(1, _ELEMENTS // size),
                name=f"stratified uniforms, {name} row, V = {size}",
            )
        )
    return findings


def stratified(count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(i + 1/2) / n of the way from low to high, float64 (N,)."""
    return low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)


def _counts(
    draw: Draw, size: int, num_uniforms: int, window: tuple[float, float], rows_per_call: int | None
) -> tuple[np.ndarray, int]:
    counts_V, num_outside = np.zeros(size, dtype=np.int64), 0
    for uniforms in torch.split(stratified(num_uniforms, *window), rows_per_call or num_uniforms):
        tokens = draw(uniforms).numpy()
        inside = tokens[(tokens >= 0) & (tokens < size)]
        counts_V += np.bincount(inside, minlength=size)
        num_outside += len(tokens) - len(inside)
    return counts_V, num_outside


def _draft_row(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float) -> tuple[Draw, np.ndarray]:
    def draw(uniforms: Tensor) -> Tensor:
        logits_N1V = draft_V.expand(len(uniforms), 1, -1)
        return sampler.draw_draft(logits_N1V, _full(uniforms, t), uniforms[:, None]).token_ids_BK[:, 0]

    return draw, softmax(draft_V, t)


def _plain_row(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float) -> tuple[Draw, np.ndarray]:
    def draw(uniforms: Tensor) -> Tensor:
        none = _draft(draft_V.to(torch.float64), 0, len(uniforms), num_drafts=0)
        target = target_probs(target_LV[None, :1], torch.tensor([t], dtype=torch.float64)).expand(
            len(uniforms), -1, -1
        )
        return sampler.verify_block(none, target, uniforms[:, None]).token_ids_BL[:, 0]

    return draw, softmax(target_LV[0], t)


def _accept_row(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float) -> tuple[Draw, np.ndarray]:
    draft, target = softmax(draft_V, t), softmax(target_LV[0], t)
    token = int((target - draft).argmin())
    step = _step(sampler, draft_V, target_LV, t, token)
    share = min(1.0, target[token] / draft[token])
    # Accepted is 0 and rejected 1, in the order of the coins that say so.
    return lambda coins: (step(coins, _full(coins, 0.5)).num_committed_B == 1).long(), np.array(
        [share, 1 - share]
    )


def _residual_row(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float) -> tuple[Draw, np.ndarray]:
    draft, target = softmax(draft_V, t), softmax(target_LV[0], t)
    residual = np.maximum(target - draft, 0)
    step = _step(sampler, draft_V, target_LV, t, int((target - draft).argmin()))
    return _token(step, _LARGEST, offset=0), residual / residual.sum()


def _extra_row(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float) -> tuple[Draw, np.ndarray]:
    token = int((softmax(target_LV[0], t) - softmax(draft_V, t)).argmax())
    step = _step(sampler, draft_V, target_LV, t, token)
    return _token(step, _SMALLEST, offset=1), softmax(target_LV[1], t)


def _degenerate_row(
    sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float
) -> tuple[Draw, np.ndarray]:
    step = _step(sampler, target_LV[0], target_LV, t, int(target_LV[0].argmax()))
    # No coin below 1 rejects where the laws are equal; 1 itself stands for the rounding that would.
    return _token(step, 1.0, offset=0), softmax(target_LV[0], t)


def _step(sampler: Sampler, draft_V: Tensor, target_LV: Tensor, t: float, token: int) -> Step:
    """A step with this one draft, by its accept coins and last uniforms."""
    temperature_1 = torch.tensor([t], dtype=torch.float64)
    draft_law_V = target_probs(draft_V[None, None], temperature_1)[0, 0]
    target_law_LV = target_probs(target_LV[None], temperature_1)[0]

    def step(coins: Tensor, uniforms: Tensor) -> Verdict:
        draft = _draft(draft_law_V, token, len(uniforms), num_drafts=1)
        target_NLV = target_law_LV.expand(len(uniforms), -1, -1)
        return sampler.verify_block(draft, target_NLV, torch.stack([coins, uniforms], dim=1))

    return step


def _token(step: Step, coin: float, *, offset: int) -> Draw:
    """The token that such a step commits at `offset` behind this coin; -1 if it is not the last."""

    def draw(uniforms: Tensor) -> Tensor:
        verdict = step(_full(uniforms, coin), uniforms)
        return torch.where(verdict.num_committed_B == offset + 1, verdict.token_ids_BL[:, offset], -1)

    return draw


def _draft(law_V: Tensor, token: int, batch: int, *, num_drafts: int) -> Draft:
    return Draft(
        token_ids_BK=torch.full((batch, num_drafts), token),
        law=law_V.expand(batch, num_drafts, -1),
        num_drafts_B=torch.full((batch,), num_drafts),
    )


def _full(uniforms: Tensor, value: float) -> Tensor:
    return torch.full_like(uniforms, value)
