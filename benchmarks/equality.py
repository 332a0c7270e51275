"""Equality of tokens as the project states it: token for token, except at coins on a boundary and ties.

Two float32 forwards of different shape differ by rounding, so a coin may fall on the other side of a
boundary. A difference counts as that only if the coin really lay there.
"""

import torch

from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.step import StepRecord
from blockroll.types import Rollout

COIN_TOLERANCE = 1e-5  # "token for token" allows a difference where a coin lies this close to a boundary
TIE_TOLERANCE = 1e-4  # greedy: where the two best logits are this close


class CoinMargins:
    """An engine observer: how close each request's coins came to a boundary, step by step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, float]]] = {}  # (tokens committed, smallest margin)

    def __call__(self, record: StepRecord) -> None:
        verdict, draft = record.verdict, record.draft
        for row, request_id in enumerate(record.request_ids):
            margins, num_drafts = [], int(draft.num_drafts_B[row])
            committed = int(verdict.num_committed_B[row])
            for i in range(min(committed, num_drafts)):
                coin = record.verify_uniforms_BL[row, i]
                token = draft.token_ids_BK[row, i]
                ratio = record.target_probs_BLV[row, i, token] / draft.probs_BKV[row, i, token]
                margins.append(float((coin - ratio).abs()))
                margins.append(_edge_distance(draft.probs_BKV[row, i], record.draft_uniforms_BK[row, i]))
            replaced = [(committed - 1, record.verify_uniforms_BL[row, -1])]
            if record.settle_uniforms_B is not None and not verdict.is_draft_BL[row, 0]:
                replaced.append((0, record.settle_uniforms_B[row]))
            for i, uniform in replaced:
                law = record.target_probs_BLV[row, i]
                if i < num_drafts:
                    law = (law - draft.probs_BKV[row, i]).clamp(min=0)
                margins.append(_edge_distance(law, uniform))
            self.steps.setdefault(request_id, []).append((committed, min(margins)))

    def at(self, request_id: str, token_index: int) -> float:
        """The smallest margin of the step that committed a request's token."""
        committed = 0
        for count, margin in self.steps[request_id]:
            committed += count
            if token_index < committed:
                return margin
        raise AssertionError(f"request {request_id} never committed token {token_index}")


def count_coin_differences(want: dict[str, Rollout], got: dict[str, Rollout], margins: CoinMargins) -> int:
    """Rollouts that differ, each at a coin on a boundary; any other difference fails."""
    assert want.keys() == got.keys()
    differences = 0
    for request_id, rollout in want.items():
        index = first_difference(rollout.token_ids, got[request_id].token_ids)
        if index is None:
            continue
        margin = margins.at(request_id, index)
        assert margin < COIN_TOLERANCE, (
            f"{request_id} differs at token {index}, its coins keep {margin:g} away"
        )
        differences += 1
    return differences


def count_greedy_differences(policy: HFPolicy, want: dict[str, Rollout], got: dict[str, Rollout]) -> int:
    """Greedy rollouts that differ, each where the two best logits tie; any other difference fails."""
    assert want.keys() == got.keys()
    differences = 0
    for request_id, rollout in want.items():
        index = first_difference(rollout.token_ids, got[request_id].token_ids)
        if index is None:
            continue
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids[:index]]])
        with torch.no_grad():
            best = policy.model(ids, use_cache=False).logits[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < TIE_TOLERANCE, (
            f"{request_id} differs at token {index}, where the best logits are {gap:g} apart"
        )
        differences += 1
    return differences


def first_difference(left: tuple[int, ...], right: tuple[int, ...]) -> int | None:
    """Index of the first token that differs, None if there is none."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _edge_distance(weights_V: torch.Tensor, uniform: torch.Tensor) -> float:
    edges = weights_V.cumsum(0) / weights_V.sum()
    return float((edges[:-1] - uniform).abs().min())
