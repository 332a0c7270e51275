"""Level 2 of an audit's check: laws and drafts again, from the text and the policy that a row names.

Shapes: B blocks or rows, K drafted tokens, V vocabulary, T tokens of a text.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from blockroll.policies.hf import HFPolicy
from blockroll.policies.rounding import nudged_inputs
from blockroll.rollout.audit.forwards import (
    MAX_LOGITS,
    causal_logits,
    draft_logits,
    first_drafts,
    lengths_of,
)
from blockroll.rollout.audit.rows import AuditedRequest, AuditReport, Problem
from blockroll.rollout.audit.ties import is_cut_close, is_tied
from blockroll.rollout.audit.writer import ACCEPTED, RECOVERED
from blockroll.samplers import draft_probs, step_uniforms
from blockroll.samplers.laws import Laws
from blockroll.samplers.text import Text
from blockroll.types import Sampling

_BATCH = 64  # texts of one forward
_ROUNDING_MARGIN = 4.0  # times what 99 of 100 laws move by rounding: what is allowed below float32

PolicyOf = Callable[[int], HFPolicy | None]


def recompute(
    requests: Sequence[AuditedRequest],
    policy_of: PolicyOf,
    tolerance: float,
    report: AuditReport,
    progress: Callable[[int, int], None],
) -> None:
    """Level 2: put into the report the first row that a version's policy would not have drawn so."""
    versions = sorted(report.rows_by_version)
    total, done = report.num_rows, 0
    for version in versions:
        policy = policy_of(version)
        if policy is None:
            report.without_policy.append(version)
            done += report.rows_by_version[version]
            progress(done, total)
            continue
        report.recomputed[version] = 0
        concerned = [request for request in requests if (request.numbers["version"] == version).any()]
        for batch in _batches(concerned, policy.vocab_size):
            with _in_precision(policy, batch[0].precision):
                found = _recompute(batch, version, policy, tolerance, report)
            if found is not None:
                report.problem = found
                return
            done += sum(int((request.numbers["version"] == version).sum()) for request in batch)
            progress(done, total)
        report.recomputed[version] = report.rows_by_version[version]


def _batches(requests: Sequence[AuditedRequest], vocab_size: int) -> Iterator[list[AuditedRequest]]:
    """Requests whose forwards ran in one precision, and whose logits fit side by side."""
    for _, alike in groupby(requests, key=lambda request: request.precision):
        batch: list[AuditedRequest] = []
        longest = 0
        for request in alike:
            length = len(request.prompt_ids) + len(request.tokens)
            longest = max(longest, length)
            if batch and (len(batch) == _BATCH or longest * (len(batch) + 1) * vocab_size > MAX_LOGITS):
                yield batch
                batch, longest = [], length
            batch.append(request)
        yield batch


def _in_precision(policy: HFPolicy, precision: str | None) -> AbstractContextManager[object]:
    """Forwards multiply in less than the weights' precision, as a trainer's do under mixed precision."""
    dtype = policy.model.dtype if precision is None else getattr(torch, precision)
    is_lower = torch.finfo(dtype).bits < torch.finfo(policy.model.dtype).bits
    return torch.autocast(policy.device.type, dtype) if is_lower else nullcontext()


@torch.inference_mode()
def _recompute(
    requests: Sequence[AuditedRequest], version: int, policy: HFPolicy, tolerance: float, report: AuditReport
) -> Problem | None:
    """Laws of all rows of these requests that this version drew, from their texts."""
    texts = [[*request.prompt_ids, *request.tokens] for request in requests]
    logits, keys = causal_logits(policy, texts)
    is_rough = torch.finfo(policy.kv_shape.dtype).bits < 32
    if is_rough:
        with nudged_inputs(policy.model, policy.kv_shape.dtype):
            nudged, _ = causal_logits(policy, texts)
        moved = torch.cat([_distance(*pair) for pair in zip(logits, nudged, strict=True)])
        tolerance = max(tolerance, _ROUNDING_MARGIN * float(moved.quantile(0.99)))
    report.tolerance = max(report.tolerance, tolerance)
    chosen = [np.flatnonzero(request.numbers["version"] == version) for request in requests]
    firsts = [first_drafts(*each) for each in zip(requests, chosen, strict=True)]
    drafted = draft_logits(policy, keys, lengths_of(policy, texts), requests, firsts)
    for request, logits_TV, indices, by_attempt in zip(requests, logits, chosen, drafted, strict=True):
        rows, sampling = request.numbers, request.sampling()
        positions = torch.from_numpy(rows["position"][indices].astype(np.int64)) + len(request.prompt_ids) - 1
        row_logits_BV = logits_TV[positions]
        temperature = request.info["sampling"]["temperature"] or 1.0
        tokens_B1 = torch.from_numpy(rows["token"][indices].astype(np.int64))[:, None]
        policy_B = (row_logits_BV.double() / temperature).log_softmax(-1).gather(1, tokens_B1)[:, 0].numpy()
        drawn_by = f"by the policy of version {version}"
        found = _differences(
            [("policy_logprob", np.exp(rows["policy_logprob"][indices]), np.exp(policy_B))],
            tolerance,
            drawn_by,
            report,
        )
        # Where a cut falls, rounding decides which tokens stay: no bound on laws holds behind it.
        if sampling is None or (is_rough and sampling.truncation):
            report.num_unknown_laws += len(indices)
        else:
            wrong = _wrong_laws(
                request, indices, row_logits_BV, by_attempt, policy, tolerance, drawn_by, report, sampling
            )
            if wrong and sampling.truncation:
                is_close_B = _close_cuts(request, indices, row_logits_BV, by_attempt, policy, sampling)
                num_wrong = len(wrong)
                wrong = {row: what for row, what in wrong.items() if not is_close_B[row]}
                report.num_near_ties += num_wrong - len(wrong)
            found = {**wrong, **found}
        if found:
            first = min(found)
            return request.problem(int(indices[first]), found[first])
    return None


def _wrong_laws(
    request: AuditedRequest,
    indices: np.ndarray,
    logits_BV: torch.Tensor,
    by_attempt: Mapping[int, tuple[int, torch.Tensor]],
    policy: HFPolicy,
    tolerance: float,
    drawn_by: str,
    report: AuditReport,
    sampling: Sampling,
) -> dict[int, str]:
    """By row, what its laws and its draft would have been otherwise."""
    drafts = _draft_blocks(request, by_attempt, policy, sampling)
    again = _laws_again(request, indices, logits_BV, drafts, policy, sampling, tolerance)
    return {
        **_drafted_otherwise(request, indices, drafts, tolerance),
        **_differences(again, tolerance, drawn_by, report),
    }


def _differences(
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], tolerance: float, drawn_by: str, report: AuditReport
) -> dict[int, str]:
    """By row, what differs by more than the tolerance; what is within goes into the report."""
    found: dict[int, str] = {}
    for name, recorded_B, recomputed_B in pairs:
        with np.errstate(invalid="ignore"):
            difference_B = np.abs(recorded_B - recomputed_B)
        within_B = difference_B[difference_B <= tolerance]
        report.largest_difference = max(report.largest_difference, float(np.max(within_B, initial=0)))
        for row in np.flatnonzero(difference_B > tolerance).tolist():
            found.setdefault(
                row, f"{name} is {recorded_B[row]:.6g} in the file and {recomputed_B[row]:.6g} {drawn_by}"
            )
    return found


def _close_cuts(
    request: AuditedRequest,
    indices: np.ndarray,
    logits_BV: torch.Tensor,
    by_attempt: Mapping[int, tuple[int, torch.Tensor]],
    policy: HFPolicy,
    sampling: Sampling,
) -> np.ndarray:
    """Rows (B,) whose target or draft law another rounding could have cut elsewhere."""
    whole = replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
    rows = request.numbers[indices]
    drafts = _Drafts.of(rows, logits_BV, _draft_blocks(request, by_attempt, policy, whole))
    laws, _ = _laws(request, rows["position"].tolist(), policy, whole)
    is_close_B = is_cut_close(drafts.target_rows(laws, logits_BV), sampling)
    is_close_B |= drafts.has_rows_B & is_cut_close(drafts.probs_BV, sampling)
    return is_close_B


def _distance(logits_TV: torch.Tensor, others_TV: torch.Tensor) -> torch.Tensor:
    """Total variation between the laws of each row, at temperature 1: no event differs by more."""
    laws = (each.double().softmax(dim=-1) for each in (logits_TV, others_TV))
    return torch.sub(*laws).abs().sum(dim=-1) / 2


@dataclass(frozen=True, slots=True)
class _Block:
    """Draft rows of one step, from its first draft on."""

    logits_KV: torch.Tensor
    probs_KV: np.ndarray  # the law drafts were drawn from,
    soft_KV: np.ndarray | None  # and at temperature 1, if it is greedy
    tokens_K: list[int]
    uniforms_K: np.ndarray

    def is_tied(self, offset: int, token: int, tolerance: float) -> bool:
        """Whether rounding could have made this greedy draft another."""
        return self.soft_KV is not None and bool(
            is_tied(self.soft_KV[[offset]], np.array([token]), tolerance)[0]
        )


@dataclass(frozen=True, slots=True)
class _Drafts:
    """What each of B rows has met as a draft."""

    has_rows_B: np.ndarray  # whether mask rows drafted it
    logits_B1V: torch.Tensor
    probs_BV: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, logits_BV: torch.Tensor, blocks: Mapping[int, _Block]) -> "_Drafts":
        """From the blocks of their steps; nothing where there is no draft."""
        drafted_B, masked_B = rows["draft"] >= 0, rows["num_masks"] > 0
        draft_logits_B1V, probs_BV = torch.zeros_like(logits_BV)[:, None], np.zeros(logits_BV.shape)
        is_certain_B = drafted_B & ~masked_B  # what was looked up is a point mass
        probs_BV[is_certain_B, rows["draft"][is_certain_B]] = 1.0
        for index in np.flatnonzero(drafted_B & masked_B).tolist():
            block, offset = blocks[int(rows["attempt"][index])], int(rows["offset"][index])
            draft_logits_B1V[index, 0] = block.logits_KV[offset]
            probs_BV[index] = block.probs_KV[offset]
        return cls(drafted_B & masked_B, draft_logits_B1V, probs_BV)

    def target_rows(self, laws: Laws, logits_BV: torch.Tensor) -> np.ndarray:
        """The target law (B, V) of each row."""
        no_tokens = torch.empty((len(logits_BV), 0), dtype=torch.int64)
        num_drafts_B = torch.from_numpy(self.has_rows_B.astype(np.int64))
        targets = laws.target_rows(logits_BV[:, None], no_tokens, self.logits_B1V, num_drafts_B)
        probs_BV: np.ndarray = targets.probs_BLV[:, 0].numpy()
        return probs_BV


def _draft_blocks(
    request: AuditedRequest,
    by_attempt: Mapping[int, tuple[int, torch.Tensor]],
    policy: HFPolicy,
    sampling: Sampling,
) -> dict[int, _Block]:
    """What was drafted in each step, again, by its attempt; steps of one shape together."""
    rows, prompt_length = request.numbers, len(request.prompt_ids)
    shapes = defaultdict(list)
    for attempt, (first, logits_KV) in by_attempt.items():
        num_drafts = int(rows["num_drafts"][first])
        shapes[num_drafts, min(num_drafts, len(logits_KV))].append((attempt, first, logits_KV))
    blocks = {}
    for (num_drafts, width), steps in shapes.items():
        starts = [int(rows["position"][first]) - int(rows["offset"][first]) for _, first, _ in steps]
        uniforms_BK, _ = step_uniforms(
            torch.full((len(steps),), request.info["seed"], dtype=torch.int64),
            torch.tensor([prompt_length + start for start in starts]),
            torch.tensor([attempt for attempt, _, _ in steps]),
            num_drafts,
        )
        uniforms_BK = uniforms_BK[:, :width]
        logits_BKV = torch.stack([logits_KV[:width] for _, _, logits_KV in steps])
        laws, softened = _laws(request, starts, policy, sampling)
        num_drafts_B = torch.full((len(steps),), width)
        draft = laws.draw(logits_BKV, uniforms_BK, num_drafts_B)
        probs_BKV, soft_BKV = draft_probs(draft, policy.vocab_size), None
        if laws.certain_draft is not False:
            soft = softened.draw(logits_BKV, uniforms_BK, num_drafts_B)
            soft_BKV = draft_probs(soft, policy.vocab_size)
        for index, (attempt, _, _) in enumerate(steps):
            blocks[attempt] = _Block(
                logits_BKV[index],
                probs_BKV[index].numpy(),
                None if soft_BKV is None else soft_BKV[index].numpy(),
                draft.token_ids_BK[index].tolist(),
                uniforms_BK[index].numpy(),
            )
    return blocks


def _laws(
    request: AuditedRequest, num_tokens: Sequence[int], policy: HFPolicy, sampling: Sampling
) -> tuple[Laws, Laws]:
    """Behind so many tokens, as they were; and at temperature 1 where they are greedy."""

    def laws_of(sampling: Sampling) -> Laws:
        texts = [_text(request, number, policy, sampling) for number in num_tokens]
        return Laws.of(texts, vocab_size=policy.vocab_size, device=torch.device("cpu"))

    laws = laws_of(sampling)
    if not laws.has_greedy and laws.certain_draft is False:
        return laws, laws
    temperature, draft_temperature = sampling.temperature or 1.0, sampling.draft_temperature or None
    soft = replace(sampling, temperature=temperature, draft_temperature=draft_temperature)
    return laws, laws_of(soft)


def _text(request: AuditedRequest, num_tokens: int, policy: HFPolicy, sampling: Sampling) -> Text:
    ends = () if sampling.ignore_eos else policy.eos_token_ids
    return Text(
        sampling=sampling,
        prompt_ids=request.prompt_ids,
        token_ids=request.tokens[:num_tokens],
        end_token_ids=frozenset((*ends, *sampling.stop_token_ids)),
    )


def _laws_again(
    request: AuditedRequest,
    indices: np.ndarray,
    logits_BV: torch.Tensor,
    blocks: Mapping[int, _Block],
    policy: HFPolicy,
    sampling: Sampling,
    tolerance: float,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Recorded and recomputed probabilities, by name."""
    rows = request.numbers[indices]
    laws, softened = _laws(request, rows["position"].tolist(), policy, sampling)
    drafted = rows["draft"] >= 0
    of_drafts = _Drafts.of(rows, logits_BV, blocks)
    draft_probs_BV = of_drafts.probs_BV
    is_tied_B = np.zeros(len(rows), dtype=bool)  # rounding could have made another token the best one
    for index in np.flatnonzero(of_drafts.has_rows_B).tolist():
        block, offset = blocks[int(rows["attempt"][index])], int(rows["offset"][index])
        is_tied_B[index] = block.is_tied(offset, int(rows["draft"][index]), tolerance)
    place = np.arange(len(rows))
    tokens, drafts = rows["token"], np.maximum(rows["draft"], 0)
    target_BV = of_drafts.target_rows(laws, logits_BV)
    if laws.has_greedy:
        is_tied_B |= is_tied(of_drafts.target_rows(softened, logits_BV), tokens, tolerance)
    by_position = rows["by_position"] != 0
    is_residual = (rows["kind"] == RECOVERED) & ~by_position
    weights_BV = np.where(is_residual[:, None], np.maximum(target_BV - draft_probs_BV, 0), target_BV)
    drawn = (rows["kind"] != ACCEPTED) | by_position
    cumulative_BV = weights_BV.cumsum(axis=1)
    # Intervals are compared as mass: a small residual magnifies the noise of its two laws.
    mass = cumulative_BV[:, -1]
    high = cumulative_BV[place, tokens]
    nothing = np.full(len(rows), np.nan)
    pairs = [
        ("behavior_logprob", np.exp(rows["behavior_logprob"]), target_BV[place, tokens]),
        ("target_prob", rows["target_prob"], np.where(drafted, target_BV[place, drafts], nothing)),
        ("draft_prob", rows["draft_prob"], np.where(drafted, draft_probs_BV[place, drafts], nothing)),
        ("mass", rows["mass"], np.where(drawn, mass, nothing)),
        ("low", rows["low"] * rows["mass"], np.where(drawn, high - weights_BV[place, tokens], nothing)),
        ("high", rows["high"] * rows["mass"], np.where(drawn, high, nothing)),
    ]
    return [(name, recorded, np.where(is_tied_B, recorded, again)) for name, recorded, again in pairs]


def _drafted_otherwise(
    request: AuditedRequest, indices: np.ndarray, blocks: Mapping[int, _Block], tolerance: float
) -> dict[int, str]:
    """By row, a drafted token that is not the one its coin draws from the law again, up to its noise."""
    found = {}
    for place, row in enumerate(request.numbers[indices]):
        drafted = int(row["draft"])
        if drafted < 0 or row["num_masks"] == 0:
            continue
        block, offset = blocks[int(row["attempt"])], int(row["offset"])
        if block.tokens_K[offset] == drafted or block.is_tied(offset, drafted, tolerance):
            continue
        cumulative_V = block.probs_KV[offset].cumsum()
        low = cumulative_V[drafted - 1] if drafted else 0.0
        if not low - tolerance <= block.uniforms_K[offset] <= cumulative_V[drafted] + tolerance:
            found[place] = (
                f"token {drafted} was drafted, its coin draws {block.tokens_K[offset]} from the policy's rows"
            )
    return found
