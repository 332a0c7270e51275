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
from blockroll.rollout.audit.rows import AuditedRequest, AuditReport, Problem
from blockroll.rollout.audit.writer import ACCEPTED, RECOVERED
from blockroll.rollout.engine.cache import SlotCache
from blockroll.samplers import step_uniforms
from blockroll.samplers.laws import Laws, Text
from blockroll.types import Sampling

_BATCH = 64  # texts or blocks of one forward
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
        for batch in _batches(concerned):
            with _in_precision(policy, batch[0].precision):
                found = _recompute(batch, version, policy, tolerance, report)
            if found is not None:
                report.problem = found
                return
            done += sum(int((request.numbers["version"] == version).sum()) for request in batch)
            progress(done, total)
        report.recomputed[version] = report.rows_by_version[version]


def _batches(requests: Sequence[AuditedRequest]) -> Iterator[list[AuditedRequest]]:
    """Requests whose forwards ran in one precision."""
    for _, alike in groupby(requests, key=lambda request: request.precision):
        waiting = list(alike)
        for start in range(0, len(waiting), _BATCH):
            yield waiting[start : start + _BATCH]


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
    logits = _causal_logits(policy, texts)
    is_rough = torch.finfo(policy.kv_shape.dtype).bits < 32
    if is_rough:
        with nudged_inputs(policy):
            nudged = _causal_logits(policy, texts)
        moved = torch.cat([_distance(*pair) for pair in zip(logits, nudged, strict=True)])
        tolerance = max(tolerance, _ROUNDING_MARGIN * float(moved.quantile(0.99)))
    report.tolerance = max(report.tolerance, tolerance)
    for request, logits_TV in zip(requests, logits, strict=True):
        rows, prompt = request.numbers, request.prompt_ids
        indices = np.flatnonzero(rows["version"] == version)
        positions = torch.from_numpy(rows["position"][indices].astype(np.int64)) + len(prompt) - 1
        row_logits_BV = logits_TV[positions]
        temperature = request.info["sampling"]["temperature"] or 1.0
        tokens_B1 = torch.from_numpy(rows["token"][indices].astype(np.int64))[:, None]
        policy_B = (row_logits_BV.double() / temperature).log_softmax(-1).gather(1, tokens_B1)[:, 0].numpy()
        pairs = [("policy_logprob", np.exp(rows["policy_logprob"][indices]), np.exp(policy_B))]
        sampling = request.sampling()
        # Where a cut falls, rounding decides which tokens stay: no bound on laws holds behind it.
        if sampling is None or (is_rough and sampling.truncation):
            report.num_unknown_laws += len(indices)
        else:
            drafts = _draft_rows(request, indices, policy, sampling)
            pairs += _laws_again(request, indices, row_logits_BV, drafts, policy, sampling, tolerance)
            for index in indices:
                found = _drafted_again(request, int(index), drafts, tolerance)
                if found is not None:
                    return found
        for name, recorded_B, recomputed_B in pairs:
            with np.errstate(invalid="ignore"):
                difference_B = np.abs(recorded_B - recomputed_B)
            report.largest_difference = max(
                report.largest_difference, float(np.nanmax(difference_B, initial=0))
            )
            wrong = np.flatnonzero(difference_B > tolerance)
            if len(wrong):
                first = int(wrong[0])
                return request.problem(
                    int(indices[first]),
                    f"{name} is {recorded_B[first]:.6g} in the file and {recomputed_B[first]:.6g} by the "
                    f"policy of version {version}",
                )
    return None


def _distance(logits_TV: torch.Tensor, others_TV: torch.Tensor) -> torch.Tensor:
    """Total variation between the laws of each row, at temperature 1: no event differs by more."""
    laws = (each.double().softmax(dim=-1) for each in (logits_TV, others_TV))
    return torch.sub(*laws).abs().sum(dim=-1) / 2


def _causal_logits(policy: HFPolicy, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits (T, V) of each text, by one causal forward of all."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    cache = SlotCache(policy, num_slots=len(texts), capacity=longest)
    logits_BTV = policy.verify_logits(
        ids_BT.to(policy.device),
        cache.window(0, len(texts), longest),
        num_tokens_B=torch.tensor([len(text) for text in texts], device=policy.device),
    ).cpu()
    return [logits_TV[: len(text)] for logits_TV, text in zip(logits_BTV, texts, strict=True)]


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
            _is_tied(self.soft_KV[[offset]], np.array([token]), tolerance)[0]
        )


def _draft_rows(
    request: AuditedRequest, indices: np.ndarray, policy: HFPolicy, sampling: Sampling
) -> dict[int, _Block]:
    """The draft rows behind these rows of the file, by the attempt of their step."""
    rows, whole = request.numbers, [*request.prompt_ids, *request.tokens]
    drafted = [int(index) for index in indices if rows["draft"][index] >= 0]
    blocks: dict[int, _Block] = {}
    by_width = defaultdict(list)
    for attempt, group in groupby(drafted, key=lambda index: int(rows["attempt"][index])):
        first = next(group)
        by_width[int(rows["num_masks"][first])].append((attempt, first))
    for num_masks, steps in by_width.items():
        for start in range(0, len(steps), _BATCH):
            part = steps[start : start + _BATCH]
            contexts = [int(rows["context"][first]) for _, first in part]
            logits_BKV = _fresh_drafts(policy, [whole[:context] for context in contexts], num_masks)
            for (attempt, first), logits_KV in zip(part, logits_BKV, strict=True):
                # Slots of a step are consecutive; the file may begin in its middle.
                before = int(rows["slot"][first]) - int(rows["offset"][first])
                blocks[attempt] = _block(request, first, logits_KV[before:], policy, sampling)
    return blocks


def _block(
    request: AuditedRequest, index: int, logits_KV: torch.Tensor, policy: HFPolicy, sampling: Sampling
) -> _Block:
    row = request.numbers[index]
    start = int(row["position"]) - int(row["offset"])
    num_drafts = int(row["num_drafts"])
    logits_KV = logits_KV[:num_drafts]
    uniforms_BK, _ = step_uniforms(
        torch.tensor([request.info["seed"]]),
        torch.tensor([len(request.prompt_ids) + start]),
        torch.tensor([int(row["attempt"])]),
        num_drafts,
    )
    uniforms_BK = uniforms_BK[:, : len(logits_KV)]
    laws, softened = _laws(request, [start], policy, sampling)
    num_drafts_B = torch.tensor([len(logits_KV)])
    draft = laws.draw(logits_KV[None], uniforms_BK, num_drafts_B)
    soft = softened.draw(logits_KV[None], uniforms_BK, num_drafts_B) if laws.has_greedy_draft else None
    return _Block(
        logits_KV,
        draft.probs_BKV[0].numpy(),
        None if soft is None else soft.probs_BKV[0].numpy(),
        draft.token_ids_BK[0].tolist(),
        uniforms_BK[0].numpy(),
    )


def _is_tied(soft_BV: np.ndarray, tokens_B: np.ndarray, tolerance: float) -> np.ndarray:
    """Which greedy rows rounding could have decided otherwise: of the two best the token may be either."""
    best_B2 = np.sort(soft_BV, axis=1)[:, -2:]
    mine_B = soft_BV[np.arange(len(soft_BV)), tokens_B]
    is_close_B: np.ndarray = np.minimum(mine_B, best_B2[:, 0]) >= best_B2[:, 1] - tolerance
    return is_close_B


def _laws(
    request: AuditedRequest, num_tokens: Sequence[int], policy: HFPolicy, sampling: Sampling
) -> tuple[Laws, Laws]:
    """Behind so many tokens, as they were; and at temperature 1 where they are greedy."""

    def laws_of(sampling: Sampling) -> Laws:
        texts = [_text(request, number, policy, sampling) for number in num_tokens]
        return Laws.of(texts, vocab_size=policy.vocab_size, device=torch.device("cpu"))

    laws = laws_of(sampling)
    if not (laws.has_greedy or laws.has_greedy_draft):
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


def _fresh_drafts(policy: HFPolicy, texts: Sequence[Sequence[int]], num_masks: int) -> torch.Tensor:
    """Draft rows (B, K, V) of masks behind these texts."""
    lengths = [len(text) - 1 for text in texts]
    cache = SlotCache(policy, num_slots=len(texts), capacity=max(lengths) + num_masks + 1)
    if max(lengths):
        ids_BR = torch.zeros((len(texts), max(lengths)), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids_BR[row, : len(text) - 1] = torch.tensor(text[:-1])
        policy.prefill(ids_BR.to(policy.device), cache.window(0, len(texts), max(lengths)))
        cache.commit(0, [text[:-1] for text in texts])
    anchors_B = torch.tensor([text[-1] for text in texts], device=policy.device)
    window = cache.window(0, len(texts), num_masks + 1)
    return policy.draft_logits(anchors_B[:, None], num_masks, window)[:, 1:].cpu()


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
    draft_logits_B1V = torch.zeros_like(logits_BV)[:, None]
    draft_probs_BV = np.zeros(logits_BV.shape)
    is_tied_B = np.zeros(len(rows), dtype=bool)  # rounding could have made another token the best one
    for index in np.flatnonzero(drafted).tolist():
        block, offset = blocks[int(rows["attempt"][index])], int(rows["offset"][index])
        draft_logits_B1V[index, 0] = block.logits_KV[offset]
        draft_probs_BV[index] = block.probs_KV[offset]
        is_tied_B[index] = block.is_tied(offset, int(rows["draft"][index]), tolerance)
    place = np.arange(len(rows))
    tokens, drafts = rows["token"], np.maximum(rows["draft"], 0)

    def target_rows(of: Laws) -> np.ndarray:
        no_tokens = torch.empty((len(rows), 0), dtype=torch.int64)
        num_drafts_B = torch.from_numpy(drafted.astype(np.int64))
        targets = of.target_rows(logits_BV[:, None], no_tokens, draft_logits_B1V, num_drafts_B)
        probs_BV: np.ndarray = targets.probs_BLV[:, 0].numpy()
        return probs_BV

    target_BV = target_rows(laws)
    if laws.has_greedy:
        soft_BV = target_rows(softened)
        is_tied_B |= _is_tied(soft_BV, tokens, tolerance)
    weights_BV = np.where(
        (rows["kind"] == RECOVERED)[:, None], np.maximum(target_BV - draft_probs_BV, 0), target_BV
    )
    drawn = rows["kind"] != ACCEPTED
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


def _drafted_again(
    request: AuditedRequest, index: int, blocks: Mapping[int, _Block], tolerance: float
) -> Problem | None:
    """The drafted token is the one its coin draws from the recomputed law, up to its noise."""
    row = request.numbers[index]
    drafted = int(row["draft"])
    if drafted < 0:
        return None
    block, offset = blocks[int(row["attempt"])], int(row["offset"])
    if block.tokens_K[offset] == drafted or block.is_tied(offset, drafted, tolerance):
        return None
    cumulative_V = block.probs_KV[offset].cumsum()
    low = cumulative_V[drafted - 1] if drafted else 0.0
    if low - tolerance <= block.uniforms_K[offset] <= cumulative_V[drafted] + tolerance:
        return None
    return request.problem(
        index,
        f"token {drafted} was drafted, its coin draws {block.tokens_K[offset]} from the policy's rows",
    )
