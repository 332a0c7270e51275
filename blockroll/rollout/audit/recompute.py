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

from blockroll.policies.draft_training import MaskBlocks, TextKeys, clean_pass, mask_pass
from blockroll.policies.hf import HFPolicy
from blockroll.policies.rounding import nudged_inputs
from blockroll.rollout.audit.rows import AuditedRequest, AuditReport, Problem
from blockroll.rollout.audit.writer import ACCEPTED, RECOVERED
from blockroll.samplers import step_uniforms
from blockroll.samplers.laws import Laws, Text
from blockroll.types import Sampling

_BATCH = 64  # texts of one forward
_MAX_LOGITS = 1 << 26  # of one forward: rows times vocabulary
_MAX_MASK = 1 << 26  # entries of a forward's attention mask
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
            if batch and (len(batch) == _BATCH or longest * (len(batch) + 1) * vocab_size > _MAX_LOGITS):
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
    logits, keys = _causal_logits(policy, texts)
    is_rough = torch.finfo(policy.kv_shape.dtype).bits < 32
    if is_rough:
        with nudged_inputs(policy):
            nudged, _ = _causal_logits(policy, texts)
        moved = torch.cat([_distance(*pair) for pair in zip(logits, nudged, strict=True)])
        tolerance = max(tolerance, _ROUNDING_MARGIN * float(moved.quantile(0.99)))
    report.tolerance = max(report.tolerance, tolerance)
    chosen = [np.flatnonzero(request.numbers["version"] == version) for request in requests]
    firsts = [_first_drafts(*each) for each in zip(requests, chosen, strict=True)]
    draft_logits = _draft_logits(policy, keys, _lengths(policy, texts), requests, firsts)
    for request, logits_TV, indices, by_attempt in zip(requests, logits, chosen, draft_logits, strict=True):
        rows, prompt = request.numbers, request.prompt_ids
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
            drafts = _draft_blocks(request, by_attempt, policy, sampling)
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


def _causal_logits(policy: HFPolicy, texts: Sequence[Sequence[int]]) -> tuple[list[torch.Tensor], TextKeys]:
    """Float32 logits (T, V) of each text, by one causal forward of all; and the keys of their rows."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    hidden_BTW, keys = clean_pass(policy, ids_BT.to(policy.device), _lengths(policy, texts))
    logits_BTV = policy.logits(hidden_BTW).cpu()
    return [logits_TV[: len(text)] for logits_TV, text in zip(logits_BTV, texts, strict=True)], keys


def _lengths(policy: HFPolicy, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([len(text) for text in texts], device=policy.device)


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


def _first_drafts(request: AuditedRequest, indices: np.ndarray) -> dict[int, int]:
    """Of each step, by its attempt, the first of these rows that had a draft."""
    drafted = indices[request.numbers["draft"][indices] >= 0]
    attempts, first = np.unique(request.numbers["attempt"][drafted], return_index=True)
    return dict(zip(attempts.tolist(), drafted[first].tolist(), strict=True))


def _draft_logits(
    policy: HFPolicy,
    keys: TextKeys,
    lengths_B: torch.Tensor,
    requests: Sequence[AuditedRequest],
    firsts: Sequence[Mapping[int, int]],
) -> list[dict[int, tuple[int, torch.Tensor]]]:
    """By attempt, the first row of each step, and the logits (K, V) of its drafts from that row's on.

    A step's masks stand behind the tokens they knew and see each other alone: blocks of one width run side by
    side, over the keys of their texts.
    """
    num_tokens = int(lengths_B.max())
    found: list[dict[int, tuple[int, torch.Tensor]]] = [{} for _ in requests]
    steps = defaultdict(list)
    for row, (request, by_attempt) in enumerate(zip(requests, firsts, strict=True)):
        for attempt, first in by_attempt.items():
            steps[int(request.numbers["num_masks"][first])].append((row, attempt, first))
    for width, of_width in steps.items():
        waiting = [[each for each in of_width if each[0] == row] for row in range(len(requests))]
        per_block = len(requests) * width
        num_blocks = max(
            1, min(_MAX_LOGITS // (per_block * policy.vocab_size), _blocks(per_block, num_tokens))
        )
        for start in range(0, max(map(len, waiting)), num_blocks):
            part = [each[start : start + num_blocks] for each in waiting]
            anchors_BG = torch.zeros((len(requests), max(map(len, part))), dtype=torch.int64)
            for row, of_row in enumerate(part):
                for block, (_, _, first) in enumerate(of_row):
                    anchors_BG[row, block] = int(requests[row].numbers["context"][first]) - 1
            blocks = MaskBlocks(anchors_BG=anchors_BG.to(policy.device), num_drafts=width, first_slot=0)
            states_BMW = mask_pass(policy, blocks, keys, lengths_B)
            logits_BMV = policy.logits(states_BMW).cpu()
            logits_BGKV = logits_BMV.view(len(requests), -1, width, logits_BMV.shape[-1])
            for row, of_row in enumerate(part):
                for block, (_, attempt, first) in enumerate(of_row):
                    # Slots of a step are consecutive; the file may begin in its middle.
                    numbers = requests[row].numbers
                    before = int(numbers["slot"][first]) - int(numbers["offset"][first])
                    found[row][attempt] = first, logits_BGKV[row, block, before:]
    return found


def _blocks(rows_per_block: int, num_tokens: int) -> int:
    """Blocks of one forward whose attention mask, rows times all keys, is not too large."""
    blocks = max(1, _MAX_MASK // (rows_per_block * num_tokens))
    while blocks > 1 and blocks * rows_per_block * (num_tokens + blocks * rows_per_block) > _MAX_MASK:
        blocks //= 2
    return blocks


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
        soft = softened.draw(logits_BKV, uniforms_BK, num_drafts_B) if laws.has_greedy_draft else None
        for index, (attempt, _, _) in enumerate(steps):
            blocks[attempt] = _Block(
                logits_BKV[index],
                draft.probs_BKV[index].numpy(),
                None if soft is None else soft.probs_BKV[index].numpy(),
                draft.token_ids_BK[index].tolist(),
                uniforms_BK[index].numpy(),
            )
    return blocks


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
