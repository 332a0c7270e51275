"""When rollouts are equal: the one rule that every test and experiment goes by.

Two float32 forwards of different shape, process or instruction set differ by rounding, so a coin may fall on
the other side of a boundary. Tokens are therefore equal but for *near-ties*, which are counted: the first
token that differs was drawn by a coin within 1e-5 of a boundary, or, greedily, where the two best logits lie
within 1e-4. Log-probabilities are equal within 1e-4 up to that token; what follows it is another text.

Bits are compared only where one kernel ran twice on one shape; such a test says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.trace import StepTrace
from blockroll.samplers import draft_probs
from blockroll.types import PLAIN, Rollout
from blockroll.types.plan import MASK_ROWS

COIN_TOLERANCE = 1e-5
TIE_TOLERANCE = 1e-4
LOGPROB_TOLERANCE = 1e-4

Rollouts = Mapping[str, Rollout] | Iterable[Rollout]


def assert_same_rollouts(
    want: Rollouts, got: Rollouts, policy: HFPolicy, *, at_most: int | None = 1, cut: bool = False
) -> list[str]:
    """The ids of rollouts that differ, each at a near-tie, `at_most` so many; anything else fails.

    Equal are the requests, tokens, ends, laws and versions; log-probabilities within 1e-4. Counts of work
    (`stats`) are not compared. With `cut` one rollout may end where the other goes on. `policy` drew the
    rollouts, each under one fixed plan unless it was greedy, or all its drafts were point masses: one that
    differs is drawn again from it, alone, to see how near its coins came to a boundary.
    """
    before, after = by_id(want), by_id(got)
    assert before.keys() == after.keys()
    near_ties = []
    for request_id, rollout in before.items():
        other = after[request_id]
        shorter = min(len(each.token_ids) for each in (rollout, other)) if cut else None
        index = first_difference(rollout.token_ids[:shorter], other.token_ids[:shorter])
        for column in ("policy_logprobs", "behavior_logprobs"):
            mine, theirs = (getattr(each, column)[:shorter][:index] for each in (rollout, other))
            assert largest_gap(mine, theirs) < LOGPROB_TOLERANCE, f"{request_id}: {column} differ"
        if index is None:
            for column in ("law",) if cut else ("law", "finish_reason", "error", "policy_versions"):
                assert getattr(rollout, column) == getattr(other, column), f"{request_id}: {column} differ"
        else:
            assert_near_tie(policy, rollout, index)
            near_ties.append(request_id)
    assert at_most is None or len(near_ties) <= at_most, f"{len(near_ties)} near-ties: {near_ties}"
    return near_ties


def assert_same_tokens(
    want: Rollouts, got: Mapping[str, Sequence[int]], policy: HFPolicy, *, at_most: int = 1
) -> list[str]:
    """The same of tokens alone, by request id, where nothing else is known of the others."""
    before = by_id(want)
    assert before.keys() == got.keys()
    near_ties = []
    for request_id, rollout in before.items():
        index = first_difference(rollout.token_ids, got[request_id])
        if index is not None:
            assert_near_tie(policy, rollout, index)
            near_ties.append(request_id)
    assert len(near_ties) <= at_most, f"{len(near_ties)} near-ties: {near_ties}"
    return near_ties


def assert_near_tie(policy: HFPolicy, rollout: Rollout, index: int) -> None:
    """What was drawn at a token hung on rounding."""
    name = f"{rollout.request.request_id} differs at token {index}"
    if rollout.request.sampling.temperature == 0:
        gap = best_logits_gap(policy, rollout, index)
        assert gap < TIE_TOLERANCE, f"{name}, where the best logits are {gap:g} apart"
    else:
        margin = coin_margin(policy, rollout, index)
        assert margin < COIN_TOLERANCE, f"{name}, its coins keep {margin:g} from a boundary"


def best_logits_gap(policy: HFPolicy, rollout: Rollout, index: int) -> float:
    """How far the two best logits are apart at a token, by a causal forward of the text before it."""
    ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids[:index]]], device=policy.device)
    with torch.no_grad():
        best = policy.model(ids, use_cache=False).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def coin_margin(policy: HFPolicy, rollout: Rollout, index: int) -> float:
    """The smallest distance from a boundary, of the coins of the step that drew a token."""
    request = rollout.request
    plans = [plan for plan, _ in rollout.stats.steps_by_plan]
    if len(plans) > 1:
        drafts_from_rows = any(plan.drafter == MASK_ROWS for plan in plans)
        assert request.sampling.draft_temperature == 0 or not drafts_from_rows, "its steps had other coins"
    plan = plans[0] if len(plans) == 1 else PLAIN
    margins = CoinMargins(committed=len(request.prefix.token_ids) if request.prefix else 0)
    decode = policy.decode if policy.tokenizer is not None else None
    engine = Engine(policy, plan=plan, max_batch_size=1, decode=decode, observers=(margins,))
    engine.submit([request])
    again: list[Rollout] = []
    while engine.num_requests:
        again += engine.step().finished
    known = first_difference(rollout.token_ids, again[0].token_ids)
    assert known is None or known >= index, (
        f"{request.request_id} differs at token {index}, and drawn once more at token {known}"
    )
    return margins.at(index)


class CoinMargins:
    """An engine observer of one request: how close the coins of each step came to a boundary.

    By position each token has a coin of its own, and what was drafted has no say.
    """

    def __init__(self, *, committed: int = 0) -> None:
        self._committed = committed  # tokens before the first step
        self._steps: list[tuple[int, float]] = []  # tokens committed, smallest margin

    def at(self, token_index: int) -> float:
        """The smallest margin of the step that committed a token."""
        committed = self._committed
        for count, margin in self._steps:
            committed += count
            if token_index < committed:
                return margin
        raise AssertionError(f"token {token_index} was never committed")

    def __call__(self, record: StepTrace) -> None:
        verdict, draft = record.verdict, record.draft
        (num_drafts,), (committed,) = draft.num_drafts_B.tolist(), verdict.num_committed_B.tolist()
        if draft.is_certain is True:
            rows = zip(record.target_probs_BLV[0, :committed], record.verify_uniforms_BL[0], strict=False)
            self._steps += [(1, _edge_distance(law_V, uniform)) for law_V, uniform in rows]
            return
        draft_probs_KV = draft_probs(draft, record.target_probs_BLV.shape[-1])[0]
        margins = []
        for i in range(min(committed, num_drafts)):
            coin, token = record.verify_uniforms_BL[0, i], draft.token_ids_BK[0, i]
            ratio = record.target_probs_BLV[0, i, token] / draft_probs_KV[i, token]
            margins.append(float((coin - ratio).abs()))
            margins.append(_edge_distance(draft_probs_KV[i], record.draft_uniforms_BK[0, i]))
        replaced = [(committed - 1, record.verify_uniforms_BL[0, -1])]
        if record.settle_uniforms_B is not None and not verdict.is_draft_BL[0, 0]:
            replaced.append((0, record.settle_uniforms_B[0]))
        for i, uniform in replaced:
            law = record.target_probs_BLV[0, i]
            if i < num_drafts:
                law = (law - draft_probs_KV[i]).clamp(min=0)
            margins.append(_edge_distance(law, uniform))
        self._steps.append((committed, min(margins)))


def assert_same_rows(want: object, got: object, *, tolerance: float = 1e-4) -> None:
    """Rows of metrics, nested as they may be: floats within `tolerance` of each other or of their size."""
    if isinstance(want, float) and isinstance(got, float | int):
        is_same = math.isclose(want, got, rel_tol=tolerance, abs_tol=tolerance)
        assert is_same or (math.isnan(want) and math.isnan(got)), f"{want} and {got}"
    elif isinstance(want, Mapping) and isinstance(got, Mapping):
        assert want.keys() == got.keys()
        for key in want:
            assert_same_rows(want[key], got[key], tolerance=tolerance)
    elif isinstance(want, list | tuple) and isinstance(got, list | tuple):
        assert len(want) == len(got)
        for mine, theirs in zip(want, got, strict=True):
            assert_same_rows(mine, theirs, tolerance=tolerance)
    else:
        assert want == got


def assert_same_weights(want: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
    """Tensors by name, within 1e-4: an update carries rounding on, and Adam divides by small numbers."""
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        is_same = torch.allclose(got[name], tensor, atol=1e-4, rtol=1e-4)
        assert is_same, f"{name} differs by {(got[name] - tensor).abs().max():g}"


def by_id(rollouts: Rollouts) -> dict[str, Rollout]:
    """Rollouts by the id of their request, each once."""
    if isinstance(rollouts, Mapping):
        return dict(rollouts)
    found: dict[str, Rollout] = {}
    for rollout in rollouts:
        assert rollout.request.request_id not in found, f"{rollout.request.request_id} came twice"
        found[rollout.request.request_id] = rollout
    return found


def first_difference(left: Iterable[int], right: Iterable[int]) -> int | None:
    """Index of the first token that differs, None if there is none."""
    left, right = tuple(left), tuple(right)
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def largest_gap(left: Iterable[float], right: Iterable[float]) -> float:
    """Between two columns of log-probabilities; equal infinities are no gap."""
    gaps = (0.0 if a == b else abs(a - b) for a, b in zip(left, right, strict=True))
    return max(gaps, default=0.0)


def _edge_distance(weights_V: torch.Tensor, uniform: torch.Tensor) -> float:
    edges = weights_V.cumsum(0) / weights_V.sum()
    return float((edges[:-1] - uniform).abs().min())
