"""Checking an audit: from its files alone, and with the weights that it says drew each token.

Level 1 repeats every decision from the file: checksums, coins from the seed, accept flags from probabilities
and coins, the interval that each uniform fell into, log-probabilities against probabilities. Level 2
(`audit_recompute.py`) brings the policy of each version.

Shapes: B rows, L coins of a step, N rows of a file.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from blockroll.rollout.audit.recompute import PolicyOf, recompute
from blockroll.rollout.audit.rows import AuditedRequest, AuditReport, Problem, joined
from blockroll.rollout.audit.writer import (
    ACCEPTED,
    EXTRA,
    KINDS,
    PLAIN_TOKEN,
    RECOVERED,
    AuditFile,
    read_audit,
    row_checksums,
)
from blockroll.samplers import step_uniforms

EXACT = 1e-9  # between two float64 figures of one file
TOLERANCE = 1e-3  # of a probability that another forward computes, in float32


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
    files = []
    for path in paths:
        file = read_audit(path)
        report.num_rows += len(file.numbers_N)
        report.rows_by_version.update(file.numbers_N["version"].tolist())
        report.problem = _check_checksums(file)
        if report.problem is not None:
            return report
        files.append(file)
    requests = joined(files)
    report.num_requests = len(requests)
    report.problem = next((found for found in map(_check_request, requests) if found is not None), None)
    if report.problem is None:
        report.problem = _check_coins_serve_once(requests)
    if report.problem is None and policy_of is not None:
        recompute(requests, policy_of, tolerance, report, progress)
    return report


def _check_checksums(file: AuditFile) -> Problem | None:
    wrong = np.flatnonzero(row_checksums(file.requests, file.numbers_N, file.infos) != file.checksums_N)
    if not len(wrong):
        return None
    index = int(wrong[0])
    position = int(file.numbers_N["position"][index])
    return Problem(
        file.path.name, index, file.requests[index], position, "the checksum is not that of the row"
    )


def _check_request(request: AuditedRequest) -> Problem | None:
    """Every decision of one request, from its rows and its seed."""
    rows = request.numbers
    if not request.info:
        return request.problem(0, "no row brings the request's prompt and seed: its first rows are missing")
    start = len(request.info["prefix_ids"])
    found = (
        _first(rows["position"] != start + np.arange(len(rows)), "positions of the request do not follow on"),
        _first(np.diff(rows["version"], prepend=rows["version"][:1]) < 0, "the version of the weights falls"),
        *_decisions(request),
        _coins(request),
    )
    index, what = min((each for each in found if each is not None), default=(None, ""))
    return None if index is None else request.problem(index, what)


def _first(is_wrong: np.ndarray, what: str) -> tuple[int, str] | None:
    wrong = np.flatnonzero(is_wrong)
    return (int(wrong[0]), what) if len(wrong) else None


def _decisions(request: AuditedRequest) -> Iterator[tuple[int, str] | None]:
    """Accept flags, intervals and log-probabilities against each other."""
    rows = request.numbers
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
        yield _first((kind == RECOVERED) & passes, "a draft was rejected that its coin accepts")
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
    sampling = request.sampling()
    if sampling is not None and sampling.is_policy:
        difference = np.abs(rows["behavior_logprob"] - rows["policy_logprob"])
        yield _first(difference > EXACT, "policy and behavior log-probability differ under the target law")


def _coins(request: AuditedRequest) -> tuple[int, str] | None:
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


def _check_coins_serve_once(requests: Iterable[AuditedRequest]) -> Problem | None:
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
                    return request.problem(index, f"its {name} has served before")
                used.add(value)
    return None
