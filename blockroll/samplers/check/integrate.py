"""The exact law of the tokens a sampler commits, by integrating over its uniforms.

A verdict is a step function of the uniforms: it changes only where one of them crosses a threshold. So each
uniform is split at its thresholds, the sampler runs once on a point of every cell, and

    law(x_1..x_N) = sum over cells of volume * [committed is a prefix of x] * product of target(x_j | x_<j)

with the product over the positions j that the cell left uncommitted. That is the law itself, to rounding, if
the verdict is constant in each cell. A midpoint would forgive a threshold that is off by half a cell, hence
the points lie in a corner, 1e-11 from the edges, and the low and the high corners must give the same law.
The thresholds come from the tables, in numpy, never from the code under test:

    draft uniform i     cumulative law of draft i
    accept coin i       min(1, target(d_i) / draft(d_i)), with target row i given the drafts before it
    final uniform       cumulative law of every target row and of every residual max(target - draft, 0)

Where drafts are point masses (a draft temperature of 0) a coin may as well draw the token that its draft is
compared with: accept coin i is split at the cumulative law of target row i too.

Shapes: C cells, K drafted tokens, L = K + 1 target positions, V vocabulary, I intervals, T thresholds.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.rows import target_probs
from blockroll.samplers.check.tables import Sampler, Tables, Tokens

Corner = Literal["low", "high"]
TokenLaw = dict[Tokens, float]

# Thresholds this near to each other are one threshold that rounding has split.
_EMPTY_WIDTH = 1e-13
_MARGIN = 1e-11  # between a point and the edges of its cell, which allows thresholds their rounding


class Step(NamedTuple):
    """One decoding step in every cell of its uniforms."""

    volume_C: np.ndarray  # sums to one
    token_ids_CL: np.ndarray  # the first num_committed are committed
    num_committed_C: np.ndarray
    num_accepted_C: np.ndarray
    behavior_logprobs_CL: np.ndarray

    def committed(self) -> list[Tokens]:
        """The tokens each cell commits."""
        rows = zip(self.token_ids_CL.tolist(), self.num_committed_C.tolist(), strict=True)
        return [tuple(tokens[:num_committed]) for tokens, num_committed in rows]


def integrate_step(
    sampler: Sampler,
    tables: Tables,
    history: Tokens,
    num_drafts: int,
    *,
    corner: Corner = "low",
    is_coin_shared: bool = False,
) -> Step:
    """Run one step in every cell, on a point beside the lowest or the highest corner.

    `is_coin_shared` splits the accept coins at the final thresholds too, for a sampler that uses one as both.
    """
    points_CU, volume_C = _cells(tables, history, num_drafts, corner, is_coin_shared)
    uniforms_CK, uniforms_CL = torch.split(torch.from_numpy(points_CU), [num_drafts, num_drafts + 1], dim=1)
    rows = [tables.draft_weights(history, offset) for offset in range(num_drafts)]
    draft_logits_KV = _log(np.array(rows, dtype=np.float64).reshape(num_drafts, tables.vocab_size))
    draft = sampler.draw_draft(
        draft_logits_KV.expand(len(volume_C), -1, -1),
        torch.full((len(volume_C),), tables.draft_temperature, dtype=torch.float64),
        uniforms_CK,
    )
    drafted_C = [tuple(tokens) for tokens in draft.token_ids_BK.tolist()]
    index = {drafts: i for i, drafts in enumerate(dict.fromkeys(drafted_C))}
    targets = [
        [tables.target_weights(history + drafts[:i]) for i in range(num_drafts + 1)] for drafts in index
    ]
    target_logits_CLV = _log(np.array(targets, dtype=np.float64))[[index[drafts] for drafts in drafted_C]]
    temperature_C = torch.full((len(volume_C),), tables.temperature, dtype=torch.float64)
    verdict = sampler.verify_block(draft, target_probs(target_logits_CLV, temperature_C), uniforms_CL)
    return Step(
        volume_C,
        verdict.token_ids_BL.numpy(),
        verdict.num_committed_B.numpy(),
        verdict.num_accepted_B.numpy(),
        verdict.behavior_logprobs_BL.numpy(),
    )


def committed_law(
    sampler: Sampler,
    tables: Tables,
    drafts_per_step: Sequence[int],
    length: int,
    *,
    corner: Corner = "low",
    is_coin_shared: bool = False,
) -> TokenLaw:
    """The law of the first `length` tokens of a rollout: these steps in turn, then the target to the end."""
    reached: TokenLaw = {(): 1.0}
    for num_drafts in drafts_per_step:
        following: TokenLaw = defaultdict(float)
        for history, mass in reached.items():
            if len(history) == length:
                following[history] += mass
                continue
            step = integrate_step(
                sampler, tables, history, num_drafts, corner=corner, is_coin_shared=is_coin_shared
            )
            for committed, volume in zip(step.committed(), step.volume_C.tolist(), strict=True):
                following[(history + committed)[:length]] += mass * volume
        reached = following
    law: TokenLaw = defaultdict(float)
    for prefix, mass in reached.items():
        for tokens, probability in target_law(tables, length, prefix=prefix).items():
            law[tokens] += mass * probability
    return dict(law)


def target_law(tables: Tables, length: int, *, prefix: Tokens = ()) -> TokenLaw:
    """The target's own law of sequences of this length that begin with `prefix`, given that they do."""
    law = {prefix: 1.0}
    for _ in range(length - len(prefix)):
        law = {
            (*tokens, token): mass * probability
            for tokens, mass in law.items()
            for token, probability in enumerate(tables.target_V(tokens).tolist())
        }
    return law


def max_difference(law: Mapping[Tokens, float], expected: Mapping[Tokens, float]) -> float:
    """The largest absolute difference of probability over all sequences of either law."""
    return max(
        abs(law.get(tokens, 0.0) - expected.get(tokens, 0.0)) for tokens in law.keys() | expected.keys()
    )


def _cells(
    tables: Tables, history: Tokens, num_drafts: int, corner: Corner, is_coin_shared: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Points (C, 2K + 1), in the order draft uniforms, accept coins, final uniform, and volumes (C,)."""
    draft_KV = [tables.draft_V(history, offset) for offset in range(num_drafts)]
    points, volumes = [], []
    for drafts in itertools.product(*(np.flatnonzero(law_V).tolist() for law_V in draft_KV)):
        target_LV = [tables.target_V(history + drafts[:i]) for i in range(num_drafts + 1)]
        pairs = list(zip(target_LV, draft_KV, strict=False))
        residuals = [np.maximum(target_V - draft_V, 0) for target_V, draft_V in pairs]
        final_T = np.concatenate([_boundaries(weights_V) for weights_V in (*target_LV, *residuals)])
        intervals = [
            _split(_boundaries(law_V), corner, within=law_V[:token].sum() + law_V[token] / 2)
            for token, law_V in zip(drafts, draft_KV, strict=True)
        ]
        for token, (target_V, draft_V) in zip(drafts, pairs, strict=True):
            coin_T = np.minimum(1, target_V[token] / draft_V[token])[None]
            if is_coin_shared:
                coin_T = np.concatenate([coin_T, final_T])
            elif tables.draft_temperature == 0:
                coin_T = np.concatenate([coin_T, _boundaries(target_V)])
            intervals.append(_split(coin_T, corner))
        intervals.append(_split(final_T, corner))
        points.append(_product(point_I for point_I, _ in intervals))
        volumes.append(_product(width_I for _, width_I in intervals).prod(axis=1))
    return np.concatenate(points), np.concatenate(volumes)


def _boundaries(weights_V: np.ndarray) -> np.ndarray:
    """The cumulative law, ends included; nothing for weights that are all zero."""
    return weights_V.cumsum() / weights_V.sum() if weights_V.sum() > 0 else np.zeros(0)


def _split(
    thresholds_T: np.ndarray, corner: Corner, within: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Points and widths of the intervals of (0, 1) between thresholds, or of the one around `within`."""
    edges = np.unique(np.concatenate([[0.0, 1.0], thresholds_T.clip(0, 1)]))
    width_I = np.diff(edges)
    keep_I = width_I > _EMPTY_WIDTH
    if within is not None:
        keep_I &= (edges[:-1] < within) & (within < edges[1:])
    margin_I = np.minimum(_MARGIN, width_I / 2)
    point_I = edges[:-1] + margin_I if corner == "low" else edges[1:] - margin_I
    return point_I[keep_I], width_I[keep_I]


def _product(axes: Iterable[np.ndarray]) -> np.ndarray:
    """Every combination of one entry per axis, as rows."""
    return np.stack([grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")], axis=1)


def _log(weights: np.ndarray) -> Tensor:
    return torch.from_numpy(weights).log()
