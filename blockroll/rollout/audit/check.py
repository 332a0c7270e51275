"""Checking an audit: from its files alone, and with the weights that it says drew each token.

Level 1 repeats every decision from the file: checksums, coins from the seed, accept flags from probabilities
and coins, the interval that each uniform fell into, log-probabilities against probabilities; and no row
stands twice. It works on whole columns. Level 2 (`recompute.py`) brings the policy of each version.

Shapes: B rows, L coins of a step, N rows of all files, S servings.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from blockroll.rollout.audit.files import AuditFile, read_audit
from blockroll.rollout.audit.recompute import PolicyOf, recompute
from blockroll.rollout.audit.rows import AuditReport, AuditRows, Problem, joined
from blockroll.rollout.audit.writer import (
    ACCEPTED,
    EXTRA,
    KINDS,
    PLAIN_TOKEN,
    RECOVERED,
    row_checksums,
    settles_first,
)
from blockroll.samplers import step_uniforms, token_uniforms
from blockroll.samplers.check import equal_coins_limit

EXACT = 1e-9  # between two float64 figures of one file
TOLERANCE = 1e-3  # of a probability that another forward computes, in float32
_ROWS_AT_ONCE = 1 << 15  # whose coins are drawn again together

Wrong = tuple[np.ndarray, str]  # bool (N,), and what is wrong with these rows


def check_audit(
    paths: Sequence[Path],
    *,
    policy_of: PolicyOf | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Check files of one audit; at both levels with `policy_of`, which gives a version's policy or None.

    Ends at the first bad row and names it. InvalidInput names a file that cannot be read.
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
    rows = joined(files)
    report.num_requests = len(rows.requests)
    report.problem = (
        _without_info(rows) or _first(rows, _all_decisions(rows)) or _served_twice(rows) or _equal_coins(rows)
    )
    if report.problem is None and policy_of is not None:
        recompute(rows.requests, policy_of, tolerance, report, progress)
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


def _first(rows: AuditRows, found: Iterator[Wrong]) -> Problem | None:
    """The first wrong row, by file and place in it, whatever is wrong with it."""
    problems = [
        rows.problem(int(index), what)
        for is_wrong_N, what in found
        # One row of each serving is enough: the first in it has the first place.
        for index in _first_of_each(np.flatnonzero(is_wrong_N), rows.serving_N)
    ]
    return min(problems, key=lambda problem: (problem.file, problem.row), default=None)


def _first_of_each(wrong: np.ndarray, serving_N: np.ndarray) -> np.ndarray:
    firsts: np.ndarray = wrong[np.unique(serving_N[wrong], return_index=True)[1]]
    return firsts


def _without_info(rows: AuditRows) -> Problem | None:
    for request in rows.requests:
        if not request.info:
            return request.problem(
                0, "no row brings the request's prompt and seed: its first rows are missing"
            )
    return None


def _all_decisions(rows: AuditRows) -> Iterator[Wrong]:
    numbers, requests = rows.numbers_N, rows.requests
    place_N = np.arange(len(numbers)) - rows.starts_S[rows.serving_N]
    start_N = rows.by_serving([len(request.info["prefix_ids"]) for request in requests], np.int64)
    yield numbers["position"] != start_N + place_N, "positions of the request do not follow on"
    falls_N = np.diff(numbers["version"], prepend=numbers["version"][:1]) < 0
    yield falls_N & (place_N > 0), "the version of the weights falls"
    yield from _decisions(rows)
    yield from _coins(rows)


def _decisions(all_rows: AuditRows) -> Iterator[Wrong]:
    """Accept flags, intervals and log-probabilities against each other."""
    rows = all_rows.numbers_N
    kind, drafted, by_position = rows["kind"], rows["draft"] >= 0, rows["by_position"] != 0
    accepted = kind == ACCEPTED
    drawn = ~accepted | by_position
    with np.errstate(invalid="ignore", divide="ignore"):
        passes = rows["coin"] * rows["draft_prob"] < rows["target_prob"]
        target_logprob = np.log(rows["target_prob"])
        share = np.log((rows["high"] - rows["low"]) * rows["mass"])
        yield ((kind < 0) | (kind >= len(KINDS)), "no such kind of token")
        yield (drafted != np.isin(kind, (ACCEPTED, RECOVERED)), "kind and draft contradict each other")
        yield (accepted & (rows["token"] != rows["draft"]), "an accepted token is not the draft")
        yield (accepted & ~by_position & ~passes, "a draft was accepted that its coin rejects")
        yield ((kind == RECOVERED) & passes, "a draft was rejected that its coin accepts")
        yield (
            (kind == RECOVERED) & by_position & (rows["token"] == rows["draft"]),
            "a draft was rejected that is the token its position's coin draws",
        )
        yield (by_position & ~np.isnan(rows["coin"]), "an accept coin stands where none decides")
        yield ((kind == PLAIN_TOKEN) & ~by_position, "a plain token is not its position's coin's")
        yield (
            accepted & (np.abs(rows["behavior_logprob"] - target_logprob) > EXACT),
            "behavior_logprob is not the log of target_prob",
        )
        inside = (rows["uniform"] >= rows["low"] - EXACT) & (rows["uniform"] <= rows["high"] + EXACT)
        yield (drawn & ~inside, "the uniform lies outside the token's interval")
        whole = (kind == EXTRA) | (kind == PLAIN_TOKEN) | by_position
        yield (whole & (np.abs(rows["mass"] - 1) > EXACT), "a whole row has another mass than 1")
        # A narrow interval is a difference of two sums near 1.
        loose = EXACT + 1e-14 / np.exp(rows["behavior_logprob"])
        yield (
            whole & (np.abs(rows["behavior_logprob"] - share) > loose),
            "behavior_logprob is not the log of the token's interval",
        )
        yield (
            (kind == RECOVERED) & ~by_position & (share > rows["behavior_logprob"] + loose),
            "the residual gives the token more than the target does",
        )
    is_certain_N = all_rows.by_serving([request.drafts_are_certain for request in all_rows.requests], bool)
    yield (
        (rows["num_masks"] > 0) & (by_position != is_certain_N),
        "its draft was verified by the other rule than its request's drafts are",
    )
    laws = [request.sampling() for request in all_rows.requests]
    is_policy_N = all_rows.by_serving([law is not None and law.is_policy for law in laws], bool)
    difference = np.abs(rows["behavior_logprob"] - rows["policy_logprob"])
    yield (
        is_policy_N & (difference > EXACT),
        "policy and behavior log-probability differ under the target law",
    )


def _coins(rows: AuditRows) -> Iterator[Wrong]:
    """Coins and uniforms are the words of seed and position, and of the attempt where drafts were drawn."""
    numbers = rows.numbers_N
    seed_N = rows.by_serving([request.info["seed"] for request in rows.requests], np.int64)
    prompt_N = rows.by_serving([len(request.info["prompt_ids"]) for request in rows.requests], np.int64)
    position_N = prompt_N + numbers["position"]
    start_N, by_position_N = position_N - numbers["offset"], numbers["by_position"] != 0
    coin_N, uniform_N = np.full(len(numbers), np.nan), np.full(len(numbers), np.nan)
    keys = numbers["num_drafts"].astype(int) * 2 + settles_first(numbers)
    for key in np.unique(keys[~by_position_N]):
        of_plan = np.flatnonzero((keys == key) & ~by_position_N)
        num_drafts, settles = divmod(int(key), 2)
        for first in range(0, len(of_plan), _ROWS_AT_ONCE):
            members = of_plan[first : first + _ROWS_AT_ONCE]
            _, expected_BL = step_uniforms(
                torch.from_numpy(seed_N[members]),
                torch.from_numpy(start_N[members]),
                torch.from_numpy(numbers["attempt"][members].astype(np.int64)),
                num_drafts,
                settles=bool(settles),
            )
            verify_BL = expected_BL.numpy()
            offset_B = numbers["offset"][members].astype(int)
            is_settled_B = settles & (offset_B == 0)
            uniform_N[members] = np.where(is_settled_B, verify_BL[:, -1], verify_BL[:, num_drafts])
            coin_N[members] = verify_BL[np.arange(len(members)), np.clip(offset_B, 0, num_drafts)]
    drafted_N, drawn_N = numbers["draft"] >= 0, numbers["kind"] != ACCEPTED
    for is_wrong_N, name in (
        (drafted_N & (numbers["coin"] != coin_N), "coin"),
        (drawn_N & (numbers["uniform"] != uniform_N), "uniform"),
    ):
        yield ~by_position_N & is_wrong_N, f"the {name} is not that of seed, position and attempt"
    token_N = token_uniforms(torch.from_numpy(seed_N), torch.from_numpy(position_N)).numpy()
    is_wrong_N = numbers["uniform"] != token_N
    yield by_position_N & is_wrong_N, "the uniform is not that of seed and position"


def _served_twice(rows: AuditRows) -> Problem | None:
    """A row that two pools have drawn: a step that was cut off, and drawn again by the same weights.

    An id that one pool serves again is another request, and so is one of another version. The pool may be
    asked again, or hand to another replica what one that died had in flight: both are served, once delivered.
    """
    numbers = rows.numbers_N
    ids: dict[tuple[str, int], int] = {}
    id_S = np.array([ids.setdefault((each.name, each.info["seed"]), len(ids)) for each in rows.requests])
    pools: dict[str, int] = {}
    pool_S = np.array([pools.setdefault(each.pool_id, len(pools)) for each in rows.requests])
    again = np.flatnonzero((np.bincount(id_S) > 1)[id_S][rows.serving_N])
    id_R, pool_R = id_S[rows.serving_N[again]], pool_S[rows.serving_N[again]]
    version_R, position_R = numbers["version"][again], numbers["position"][again]
    order = np.lexsort((pool_R, position_R, version_R, id_R))
    is_same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for each in (id_R, version_R, position_R):
        is_same &= np.diff(each[order]) == 0
    found = np.flatnonzero(is_same & (np.diff(pool_R[order]) != 0))
    if not len(found):
        return None
    pairs = (
        sorted(
            (rows.problem(int(again[order[index + side]]), "") for side in (0, 1)),
            key=lambda place: (place.file, place.row),
        )
        for index in found.tolist()
    )
    first, second = min(pairs, key=lambda pair: (pair[1].file, pair[1].row))
    return second._replace(
        what=f"the row stands twice: {first.file}, row {first.row} is of the same request and version, by "
        "another run or pool; a step was drawn again, or an id was served twice"
    )


_USE = np.dtype(
    [
        ("value", "<f8"),
        ("seed", "<i8"),
        ("position", "<i8"),  # of the word, in the whole text
        ("attempt", "<i8"),
        ("is_coin", "?"),
        ("again", "<i8"),  # which time that the same serving met the value
    ]
)


def _equal_coins(rows: AuditRows, *, bits: int = 52) -> Problem | None:
    """Coins of different use are equal as seldom as chance has it (`samplers/check/coins.py`).

    Values are compared in their first `bits` bits. What is served again by the same seed meets the same
    coins: of such copies one counts. Within one serving nothing is a copy.
    """
    numbers = rows.numbers_N
    value_M = np.concatenate([numbers["coin"], numbers["uniform"]])
    if bits < 52:
        value_M = np.floor(value_M * 2.0**bits)
    there = np.flatnonzero(~np.isnan(value_M))
    order = there[np.argsort(value_M[there], kind="stable")]
    is_equal = np.diff(value_M[order]) == 0
    shared = order[np.append(is_equal, False) | np.append(False, is_equal)]
    uses_R, index_R = _uses(rows, value_M, shared)
    different, first_R = np.unique(uses_R, return_index=True)
    _, count = np.unique(different["value"], return_counts=True)
    num_pairs = int((count * (count - 1) // 2).sum())
    num_coins = len(there) - len(shared) + len(different)
    if num_pairs <= equal_coins_limit(num_coins, bits=bits):
        return None
    second = int(np.flatnonzero(np.diff(different["value"]) == 0)[0]) + 1
    name = "coin" if different["is_coin"][second] else "uniform"
    return rows.problem(
        int(index_R[first_R[second]]),
        f"its {name} has served before: {num_pairs} pairs of {num_coins} coins are equal, more than chance "
        "explains",
    )


def _uses(rows: AuditRows, value_M: np.ndarray, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What these coins (behind the N rows' coins stand their uniforms) decided, and their rows."""
    index_R, is_coin_R = shared % len(rows.numbers_N), shared < len(rows.numbers_N)
    part, serving_R = rows.numbers_N[index_R], rows.serving_N[index_R]
    seed_S = np.array([request.info["seed"] for request in rows.requests], dtype=np.int64)
    prompt_S = np.array([len(request.info["prompt_ids"]) for request in rows.requests])
    step_R = prompt_S[serving_R] + part["position"] - part["offset"]
    is_settled_R = settles_first(part) & (part["offset"] == 0)
    drawn_at_R = step_R + np.where(is_settled_R, 0, part["num_drafts"])
    by_position_R = part["by_position"] != 0
    drawn_at_R = np.where(by_position_R, step_R + part["offset"], drawn_at_R)
    order = np.lexsort((value_M[shared], serving_R))
    is_next = np.ones(len(order), dtype=bool)
    is_next[1:] = (np.diff(serving_R[order]) != 0) | (np.diff(value_M[shared][order]) != 0)
    place = np.arange(len(order))
    uses_R = np.empty(len(shared), dtype=_USE)
    uses_R["value"], uses_R["seed"] = value_M[shared], seed_S[serving_R]
    uses_R["position"] = np.where(is_coin_R, step_R + part["offset"], drawn_at_R)
    uses_R["attempt"], uses_R["is_coin"] = np.where(by_position_R, 0, part["attempt"]), is_coin_R
    uses_R["again"][order] = place - np.maximum.accumulate(np.where(is_next, place, 0))
    return uses_R, index_R
