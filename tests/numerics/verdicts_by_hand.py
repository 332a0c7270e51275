"""Verdicts on drafts by the plain formula, in NumPy and float64, and drafts and targets to ask for them.

Shapes: B requests, K drafts, L = K + 1 rows, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from blockroll.kernels.rows import LogitRows, Mix
from blockroll.types import POINT_MASS, Draft, Verdict
from tests.numerics.rows_by_hand import (
    NUM_DRAFTS,
    SIZE,
    TEMPERATURES,
    coins,
    edits_of,
    probs_by_hand,
    random,
    token_at,
    top_k_of,
)

COUNTS = torch.tensor([3, 3, 3, 1, 0, 2])
OPTIONS = ["plain", "cut", "mixed", "edited", "all"]
KINDS = ["drawn", "certain", "either"]
ROUNDING = 2e-6  # of float32 weights


def target_of(vocab_size: int, option: str, *, size: int = NUM_DRAFTS + 1) -> LogitRows:
    rows = LogitRows(3 * random(SIZE, size, vocab_size, seed=1), TEMPERATURES, True)
    if option in ("cut", "all"):
        rows = dataclasses.replace(rows, cut=top_k_of(20.0))
    if option in ("mixed", "all"):
        weight_B = torch.tensor([0.5, 0.2, 1.0, 0.9, 0.5, 0.0], dtype=torch.float64)
        mix = Mix(3 * random(SIZE, NUM_DRAFTS, vocab_size, seed=2), weight_B, COUNTS)
        rows = dataclasses.replace(rows, mix=mix)
    if option in ("edited", "all"):
        rows = dataclasses.replace(rows, edits=edits_of(size, vocab_size))
    return rows


def draft_of(target: LogitRows, kind: str) -> Draft:
    """Drafts by rows near the target's; or its best tokens, but for one that a greedy request has second."""
    logits_BKV = target.logits()[:, :NUM_DRAFTS].float()
    if kind == "certain":
        tokens_BK = logits_BKV.argmax(dim=-1)
        tokens_BK[2, 1] = logits_BKV[2, 1].topk(2).indices[1]
        return Draft(token_ids_BK=tokens_BK, law=POINT_MASS, num_drafts_B=COUNTS)
    near_BKV = logits_BKV + 0.7 * random(*logits_BKV.shape, seed=6)
    tokens_BK, law = LogitRows(near_BKV, TEMPERATURES, True, target.cut).drawn(
        coins(SIZE, NUM_DRAFTS, seed=5)
    )
    certain_B = TEMPERATURES < 0.8 if kind == "either" else None
    return Draft(token_ids_BK=tokens_BK, law=law, num_drafts_B=COUNTS, certain_B=certain_B)


class Told(NamedTuple):
    """What the plain formula says of one request."""

    tokens: list[int]
    num_accepted: int
    probs: list[float]
    drawn: list[tuple[float, float, float]]  # where tokens that were drawn begin and end, and all weights


def by_hand(drafts: list[int], law_KV: np.ndarray | None, target_LV: np.ndarray, uniforms: Tensor) -> Told:
    """Leviathan's rule; without a law of the drafts, each token by the uniform of its row."""
    if law_KV is None:
        tokens: list[int] = []
        drawn = []
        for i, row_V in enumerate(target_LV[: len(drafts) + 1]):
            token, *where = token_at(row_V, float(uniforms[i]))
            tokens.append(token)
            drawn.append(tuple(where))
            if i == len(drafts) or token != drafts[i]:
                break
        return Told(tokens, len(tokens) - 1, [target_LV[i, t] for i, t in enumerate(tokens)], drawn)
    num_accepted, weights_V = 0, None
    for i, draft in enumerate(drafts):
        if float(uniforms[i]) * law_KV[i, draft] >= target_LV[i, draft]:
            weights_V = np.maximum(target_LV[i] - law_KV[i], 0)
            break
        num_accepted += 1
    if weights_V is None or weights_V.max() == 0:
        weights_V = target_LV[num_accepted]
    last, *where = token_at(weights_V, float(uniforms[-1]))
    tokens = [*drafts[:num_accepted], last]
    return Told(tokens, num_accepted, [target_LV[i, t] for i, t in enumerate(tokens)], [tuple(where)])


def assert_told(verdict: Verdict, draft: Draft, target: LogitRows, uniforms_BL: Tensor) -> int:
    """All that the formula says; gives the number of drafts that were accepted."""
    target_BLV, evidence = probs_by_hand(target), verdict.evidence
    law_BKV = None if draft.law is POINT_MASS else probs_by_hand(draft.law)
    assert evidence is not None
    total = 0
    for b in range(SIZE):
        count = int(draft.num_drafts_B[b])
        drafts, uniforms = draft.token_ids_BK[b, :count].tolist(), uniforms_BL[b]
        certain = law_BKV is None or (draft.certain_B is not None and bool(draft.certain_B[b]))
        told = by_hand(drafts, None if certain else law_BKV[b], target_BLV[b], uniforms)
        number, total = len(told.tokens), total + told.num_accepted
        assert int(verdict.num_committed_B[b]) == number
        assert verdict.token_ids_BL[b, :number].tolist() == told.tokens
        assert verdict.is_draft_BL[b].tolist() == [i < told.num_accepted for i in range(NUM_DRAFTS + 1)]
        found = verdict.behavior_logprobs_BL[b, :number].exp().tolist()
        assert found == pytest.approx(told.probs, rel=1e-4, abs=1e-9)
        assert bool(evidence.by_position_B[b]) == certain
        for i, where in zip(range(number) if certain else [number - 1], told.drawn, strict=True):
            held = [float(each[b, i]) for each in (evidence.low_BL, evidence.high_BL, evidence.mass_BL)]
            assert held == pytest.approx(where, abs=ROUNDING)
        for i in range(min(count, number)):
            assert float(evidence.target_probs_BK[b, i]) == pytest.approx(
                target_BLV[b, i, drafts[i]], rel=1e-4, abs=1e-9
            )
    return total
