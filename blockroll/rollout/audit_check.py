"""Checking an audit: from its files alone, and with the weights that it says drew each token.

Level 1 repeats every decision from the file: checksums, coins from the seed, accept flags from probabilities
and coins, the interval that each uniform fell into, log-probabilities against probabilities. Level 2 brings
the policy of each version: it recomputes target and draft laws from the text, and drafts from their coins.

Shapes: B blocks or rows, K drafted tokens, L rows, V vocabulary, T tokens of a text, N rows of a file.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from blockroll.policies.hf import HFPolicy
from blockroll.rollout.audit import (
    ACCEPTED,
    EXTRA,
    KINDS,
    PLAIN_TOKEN,
    RECOVERED,
    AuditFile,
    as_json,
    read_audit,
    row_checksums,
)
from blockroll.rollout.cache import SlotCache
from blockroll.samplers import step_uniforms
from blockroll.samplers.laws import Laws, Text
from blockroll.types import Law, Sampling

EXACT = 1e-9  # between two float64 figures of one file
TOLERANCE = 1e-3  # of a probability that another forward computes, in float32
_BATCH = 64  # texts or blocks of one forward


class Problem(NamedTuple):
    """The first bad row of a file, or of a version."""

    file: str
    row: int
    request: str
    position: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: request {self.request!r}, position {self.position}: {self.what}"


@dataclass(slots=True, kw_only=True)
class AuditReport:
    """What a check found."""

    num_files: int = 0
    num_rows: int = 0
    num_requests: int = 0
    problem: Problem | None = None
    rows_by_version: Counter[int] = field(default_factory=Counter)
    recomputed: dict[int, int] = field(default_factory=dict)  # rows by version, at level 2
    without_policy: list[int] = field(default_factory=list)  # versions whose checkpoint is gone
    num_unknown_laws: int = 0  # rows whose law needs code that is not in the file
    largest_difference: float = 0.0  # of a recomputed probability
    unfinished: list[str] = field(default_factory=list)  # files that a dead process was writing

    @property
    def passed(self) -> bool:
        """Whether no row is bad."""
        return self.problem is None


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a row stands."""

    file: str
    index: int


@dataclass(slots=True)
class _Request:
    """The rows of one request over all files, by position."""

    name: str
    info: dict[str, Any]
    numbers: np.ndarray
    places: list[_Row]

    @property
    def tokens(self) -> list[int]:
        return [*self.info["prefix_ids"], *self.numbers["token"].tolist()]

    @property
    def prompt_ids(self) -> list[int]:
        return list(self.info["prompt_ids"])

    def sampling(self) -> Sampling | None:
        """None if it needs code that the file does not hold."""
        if self.info["logits_processors"] or self.info["constraint"] is not None:
            return None
        options = dict(self.info["sampling"])
        options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"]}
        for name in ("stop", "stop_token_ids"):
            options[name] = tuple(options[name])
        options["bad_words_ids"] = tuple(tuple(word) for word in options["bad_words_ids"])
        return Sampling(**options, law=Law(self.info["weight"]))


_Key = tuple[str, str, int]  # request id, session of the writer, serial
PolicyOf = Callable[[int], HFPolicy | None]


def check_audit(
    paths: Sequence[Path],
    *,
    policy_of: PolicyOf | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Check files of one audit; at both levels with `policy_of`, which gives a version's policy or None.

    Ends at the first bad row and names it.
    """
    report = AuditReport(num_files=len(paths))
    report.unfinished = sorted(path.name for path in paths[0].parent.glob(".*.partial"))
    requests: dict[_Key, list[tuple[np.ndarray, list[_Row]]]] = defaultdict(list)
    infos: dict[_Key, dict[str, Any]] = {}
    for path in paths:
        file = read_audit(path)
        report.num_rows += len(file.numbers_N)
        report.rows_by_version.update(file.numbers_N["version"].tolist())
        report.problem = _check_checksums(file)
        if report.problem is not None:
            return report
        for key, indices in rows_by_request(file).items():
            rows = [_Row(path.name, index) for index in indices]
            requests[key].append((file.numbers_N[indices], rows))
            for index in indices:
                info = file.infos[index]
                if info is not None:
                    infos[key] = as_json(info)
    report.num_requests = len(requests)
    whole = [_joined(key[0], parts, infos.get(key)) for key, parts in requests.items()]
    report.problem = next((found for found in map(_check_request, whole) if found is not None), None)
    if report.problem is None:
        report.problem = _check_coins_serve_once(whole)
    if report.problem is None and policy_of is not None:
        _check_with_policies(whole, policy_of, tolerance, report, progress)
    return report


def rows_by_request(file: AuditFile) -> dict[_Key, list[int]]:
    """Indices of the rows of each request; one that was served twice is two."""
    indices: dict[_Key, list[int]] = defaultdict(list)
    serials = file.numbers_N["serial"].tolist()
    for index, (name, serial) in enumerate(zip(file.requests, serials, strict=True)):
        indices[name, file.session, serial].append(index)
    return indices


def _joined(
    name: str, parts: Sequence[tuple[np.ndarray, list[_Row]]], info: dict[str, Any] | None
) -> _Request:
    numbers = np.concatenate([numbers for numbers, _ in parts])
    places = [row for _, rows in parts for row in rows]
    order = np.argsort(numbers["position"], kind="stable")
    return _Request(name, info or {}, numbers[order], [places[index] for index in order])


def _check_checksums(file: AuditFile) -> Problem | None:
    wrong = np.flatnonzero(row_checksums(file.requests, file.numbers_N, file.infos) != file.checksums_N)
    if not len(wrong):
        return None
    index = int(wrong[0])
    position = int(file.numbers_N["position"][index])
    return Problem(
        file.path.name, index, file.requests[index], position, "the checksum is not that of the row"
    )


def _check_request(request: _Request) -> Problem | None:
    """Every decision of one request, from its rows and its seed."""
    rows = request.numbers
    if not request.info:
        return _problem(request, 0, "no row brings the request's prompt and seed: its first rows are missing")
    start = len(request.info["prefix_ids"])
    found = (
        _first(rows["position"] != start + np.arange(len(rows)), "positions of the request do not follow on"),
        _first(np.diff(rows["version"], prepend=rows["version"][:1]) < 0, "the version of the weights falls"),
        *_decisions(rows, request.info),
        _coins(request),
    )
    index, what = min((each for each in found if each is not None), default=(None, ""))
    return None if index is None else _problem(request, index, what)


def _first(is_wrong: np.ndarray, what: str) -> tuple[int, str] | None:
    wrong = np.flatnonzero(is_wrong)
    return (int(wrong[0]), what) if len(wrong) else None


def _problem(request: _Request, index: int, what: str) -> Problem:
    place, position = request.places[index], int(request.numbers["position"][index])
    return Problem(place.file, place.index, request.name, position, what)


def _decisions(rows: np.ndarray, info: Mapping[str, Any]) -> Iterator[tuple[int, str] | None]:
    """Accept flags, intervals and log-probabilities against each other."""
    kind, drafted = rows["kind"], rows["draft"] >= 0
    accepted, drawn = kind == ACCEPTED, kind != ACCEPTED
    with np.errstate(invalid="ignore", divide="ignore"):
        passes = rows["coin"] * rows["draft_prob"] < rows["target_prob"]
        target_logprob = np.log(rows["target_prob"])
        share = np.log((rows["high"] - rows["low"]) * rows["mass"])
        yield _first((kind < 0) | (kind >= len(KINDS)), "no such kind of token")
        yield _first(drafted != np.isin(kind, (ACCEPTED, RECOVERED)), "kind and draft contradict each other")
        yield _first(accepted & (rows["token"] != rows["draft"]), "an accepted token is not the draft")
        yield _first(accepted & ~passes, "a draft was accepted that its coin rejects")
        # Rounding may reject a token whose laws are equal: what was drawn then comes from the target.
        equal = np.abs(rows["draft_prob"] - rows["target_prob"]) < EXACT
        yield _first((kind == RECOVERED) & passes & ~equal, "a draft was rejected that its coin accepts")
        yield _first(
            accepted & (np.abs(rows["behavior_logprob"] - target_logprob) > EXACT),
            "behavior_logprob is not the log of target_prob",
        )
        inside = (rows["uniform"] >= rows["low"] - EXACT) & (rows["uniform"] <= rows["high"] + EXACT)
        yield _first(drawn & ~inside, "the uniform lies outside the token's interval")
        whole = (kind == EXTRA) | (kind == PLAIN_TOKEN)
        yield _first(whole & (np.abs(rows["mass"] - 1) > EXACT), "a whole row has another mass than 1")
        # A narrow interval is a difference of two sums near 1.
        loose = EXACT + 1e-14 / np.exp(rows["behavior_logprob"])
        yield _first(
            whole & (np.abs(rows["behavior_logprob"] - share) > loose),
            "behavior_logprob is not the log of the token's interval",
        )
        yield _first(
            (kind == RECOVERED) & (share > rows["behavior_logprob"] + loose),
            "the residual gives the token more than the target does",
        )
    sampling = info["sampling"]
    if info["weight"] == 1 and sampling["temperature"] > 0 and _is_bare(info):
        difference = np.abs(rows["behavior_logprob"] - rows["policy_logprob"])
        yield _first(difference > EXACT, "policy and behavior log-probability differ under the target law")


def _is_bare(info: Mapping[str, Any]) -> bool:
    """Whether tokens come from softmax(logits / temperature) and from nothing else."""
    bare = Sampling(max_tokens=1 << 30)
    options = dict(info["sampling"])
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return (
        all(options[name] == getattr(bare, name) for name in names)
        and not (options["logit_bias"] or options["min_tokens"] or options["bad_words_ids"])
        and not info["logits_processors"]
        and info["constraint"] is None
    )


def _coins(request: _Request) -> tuple[int, str] | None:
    """Coins and uniforms are the words of seed, position and attempt."""
    rows, prompt_length = request.numbers, len(request.info["prompt_ids"])
    wrong: list[tuple[int, str]] = []
    keys = rows["num_drafts"].astype(int) * 2 + rows["is_fused"]
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        num_drafts, is_fused = divmod(int(key), 2)
        settles = num_drafts > 0 and not is_fused
        part = rows[members]
        starts = prompt_length + part["position"].astype(np.int64) - part["offset"]
        _, expected_BL = step_uniforms(
            torch.full((len(part),), request.info["seed"], dtype=torch.int64),
            torch.from_numpy(starts),
            torch.from_numpy(part["attempt"].astype(np.int64)),
            num_drafts,
            settles=settles,
        )
        verify_BL = expected_BL.numpy()
        index, offset = np.arange(len(part)), part["offset"].astype(int)
        is_settled = settles & (offset == 0)
        uniforms = np.where(is_settled, verify_BL[:, -1], verify_BL[:, num_drafts])
        coins = verify_BL[index, np.minimum(offset, num_drafts)]
        drafted, drawn = part["draft"] >= 0, part["kind"] != ACCEPTED
        for is_wrong, what in (
            (drafted & (part["coin"] != coins), "the coin is not that of seed, position and attempt"),
            (drawn & (part["uniform"] != uniforms), "the uniform is not that of seed, position and attempt"),
        ):
            found = _first(is_wrong, what)
            if found is not None:
                wrong.append((int(members[found[0]]), what))
    return min(wrong, default=None)


def _check_coins_serve_once(requests: Iterable[_Request]) -> Problem | None:
    """A coin of one seed serves no other, and no two tokens of a request; what is drawn again has its own."""
    seeds: dict[float, int] = {}
    for request in requests:
        seed, used = int(request.info["seed"]), set[float]()
        for index, row in enumerate(request.numbers):
            for name in ("coin", "uniform"):
                value = float(row[name])
                if math.isnan(value):
                    continue
                if value in used or seeds.setdefault(value, seed) != seed:
                    return _problem(request, index, f"its {name} has served before")
                used.add(value)
    return None


def _check_with_policies(
    requests: Sequence[_Request],
    policy_of: PolicyOf,
    tolerance: float,
    report: AuditReport,
    progress: Callable[[int, int], None],
) -> None:
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
        for start in range(0, len(concerned), _BATCH):
            batch = concerned[start : start + _BATCH]
            found = _recompute(batch, version, policy, tolerance, report)
            if found is not None:
                report.problem = found
                return
            done += sum(int((request.numbers["version"] == version).sum()) for request in batch)
            progress(done, total)
        report.recomputed[version] = report.rows_by_version[version]


@torch.inference_mode()
def _recompute(
    requests: Sequence[_Request], version: int, policy: HFPolicy, tolerance: float, report: AuditReport
) -> Problem | None:
    """Laws of all rows of these requests that this version drew, from their texts."""
    logits = _causal_logits(policy, [[*request.prompt_ids, *request.tokens] for request in requests])
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
        if sampling is None:
            report.num_unknown_laws += len(indices)
        else:
            drafts = _draft_rows(request, indices, policy, sampling)
            pairs += _laws_again(request, indices, row_logits_BV, drafts, policy, sampling)
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
                return _problem(
                    request,
                    int(indices[first]),
                    f"{name} is {recorded_B[first]:.6g} in the file and {recomputed_B[first]:.6g} by the "
                    f"policy of version {version}",
                )
    return None


def _causal_logits(policy: HFPolicy, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Float32 logits (T, V) of each text, by one causal forward of all."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    cache = SlotCache(num_slots=len(texts), capacity=longest, device=policy.device)
    logits_BTV = policy.verify_logits(ids_BT.to(policy.device), cache.window(0, len(texts), longest)).cpu()
    return [logits_TV[: len(text)] for logits_TV, text in zip(logits_BTV, texts, strict=True)]


@dataclass(frozen=True, slots=True)
class _Block:
    """Draft rows of one step, from its first draft on."""

    logits_KV: torch.Tensor
    probs_KV: np.ndarray  # the law drafts were drawn from
    tokens_K: list[int]
    uniforms_K: np.ndarray


def _draft_rows(
    request: _Request, indices: np.ndarray, policy: HFPolicy, sampling: Sampling
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
    request: _Request, index: int, logits_KV: torch.Tensor, policy: HFPolicy, sampling: Sampling
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
    laws = Laws.of(
        [_text(request, start, policy, sampling)], vocab_size=policy.vocab_size, device=torch.device("cpu")
    )
    draft = laws.draw(logits_KV[None], uniforms_BK, torch.tensor([len(logits_KV)]))
    return _Block(
        logits_KV, draft.probs_BKV[0].numpy(), draft.token_ids_BK[0].tolist(), uniforms_BK[0].numpy()
    )


def _text(request: _Request, num_tokens: int, policy: HFPolicy, sampling: Sampling) -> Text:
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
    cache = SlotCache(num_slots=len(texts), capacity=max(lengths) + num_masks + 1, device=policy.device)
    if max(lengths):
        ids_BR = torch.zeros((len(texts), max(lengths)), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids_BR[row, : len(text) - 1] = torch.tensor(text[:-1])
        policy.prefill(ids_BR.to(policy.device), cache.window(0, len(texts), max(lengths)))
        cache.commit(0, len(texts), torch.tensor(lengths, device=policy.device))
    anchors_B = torch.tensor([text[-1] for text in texts], device=policy.device)
    window = cache.window(0, len(texts), num_masks + 1)
    return policy.draft_logits(anchors_B, num_masks, window)[:, 1:].cpu()


def _laws_again(
    request: _Request,
    indices: np.ndarray,
    logits_BV: torch.Tensor,
    blocks: Mapping[int, _Block],
    policy: HFPolicy,
    sampling: Sampling,
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Recorded and recomputed probabilities, by name."""
    rows = request.numbers[indices]
    texts = [_text(request, int(position), policy, sampling) for position in rows["position"]]
    laws = Laws.of(texts, vocab_size=policy.vocab_size, device=torch.device("cpu"))
    drafted = rows["draft"] >= 0
    draft_logits_B1V = torch.zeros_like(logits_BV)[:, None]
    draft_probs_BV = np.zeros(logits_BV.shape)
    for index in np.flatnonzero(drafted).tolist():
        block, offset = blocks[int(rows["attempt"][index])], int(rows["offset"][index])
        draft_logits_B1V[index, 0] = block.logits_KV[offset]
        draft_probs_BV[index] = block.probs_KV[offset]
    targets = laws.target_rows(
        logits_BV[:, None],
        torch.empty((len(rows), 0), dtype=torch.int64),
        draft_logits_B1V,
        torch.from_numpy(drafted.astype(np.int64)),
    )
    target_BV = targets.probs_BLV[:, 0].numpy()
    place = np.arange(len(rows))
    tokens, drafts = rows["token"], np.maximum(rows["draft"], 0)
    weights_BV = np.where(
        (rows["kind"] == RECOVERED)[:, None], np.maximum(target_BV - draft_probs_BV, 0), target_BV
    )
    drawn = rows["kind"] != ACCEPTED
    cumulative_BV = weights_BV.cumsum(axis=1)
    # Intervals are compared as mass: a small residual magnifies the noise of its two laws.
    mass = cumulative_BV[:, -1]
    high = cumulative_BV[place, tokens]
    nothing = np.full(len(rows), np.nan)
    return [
        ("behavior_logprob", np.exp(rows["behavior_logprob"]), target_BV[place, tokens]),
        ("target_prob", rows["target_prob"], np.where(drafted, target_BV[place, drafts], nothing)),
        ("draft_prob", rows["draft_prob"], np.where(drafted, draft_probs_BV[place, drafts], nothing)),
        ("mass", rows["mass"], np.where(drawn, mass, nothing)),
        ("low", rows["low"] * rows["mass"], np.where(drawn, high - weights_BV[place, tokens], nothing)),
        ("high", rows["high"] * rows["mass"], np.where(drawn, high, nothing)),
    ]


def _drafted_again(
    request: _Request, index: int, blocks: Mapping[int, _Block], tolerance: float
) -> Problem | None:
    """The drafted token is the one its coin draws from the recomputed law, up to its noise."""
    row = request.numbers[index]
    drafted = int(row["draft"])
    if drafted < 0:
        return None
    block, offset = blocks[int(row["attempt"])], int(row["offset"])
    if block.tokens_K[offset] == drafted:
        return None
    cumulative_V = block.probs_KV[offset].cumsum()
    low = cumulative_V[drafted - 1] if drafted else 0.0
    if low - tolerance <= block.uniforms_K[offset] <= cumulative_V[drafted] + tolerance:
        return None
    return _problem(
        request,
        index,
        f"token {drafted} was drafted, its coin draws {block.tokens_K[offset]} from the policy's rows",
    )
