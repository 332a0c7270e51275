"""The rows of an audit by request, and what a check of them reports.

An id may be served again, as evaluations do: a request is one serving, known by its id, the session of the
writer and its serial there.

Shapes: N rows, S servings.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from blockroll.rollout.audit.files import AuditFile, read_info
from blockroll.types import Law, Sampling


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
    num_unknown_laws: int = 0  # rows whose law needs code that is not in the file, or is cut too roughly
    num_near_ties: int = 0  # rows that differ, of laws that rounding may cut elsewhere: not compared
    largest_difference: float = 0.0  # of a recomputed probability,
    tolerance: float = 0.0  # and the largest that rounding explains
    unfinished: list[str] = field(default_factory=list)  # files that a dead process was writing

    @property
    def passed(self) -> bool:
        """Whether no row is bad."""
        return self.problem is None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRequest:
    """One serving of a request: its rows over all files, by position."""

    name: str
    session: str
    pool_id: str
    info: dict[str, Any]  # empty if its first rows are missing
    numbers: np.ndarray
    files: Sequence[str]  # of the audit
    file_indices: np.ndarray  # int (rows), which of the files a row stands in,
    row_indices: np.ndarray  # and where

    @property
    def tokens(self) -> list[int]:
        """Its completion, the prefix it was resumed from included."""
        return [*self.info["prefix_ids"], *self.numbers["token"].tolist()]

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of its prompt."""
        return list(self.info["prompt_ids"])

    @property
    def drafts_are_certain(self) -> bool:
        """Whether its drafts from mask rows are point masses."""
        options = self.info["sampling"]
        draft_temperature = options["draft_temperature"]
        return bool((options["temperature"] if draft_temperature is None else draft_temperature) == 0)

    @property
    def precision(self) -> str | None:
        """That forwards multiplied in; None in files of before it was kept."""
        return self.info.get("precision")

    @property
    def finish_reason(self) -> str:
        """`length` if it has all the tokens it asked for, else `stop or cut off`: no row says more."""
        if not self.info:
            return "unknown"
        asked = self.info["sampling"]["max_tokens"]
        return "length" if len(self.tokens) >= asked else "stop or cut off"

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

    def problem(self, index: int, what: str) -> Problem:
        """What is wrong with one of its rows."""
        file, row = self.files[self.file_indices[index]], int(self.row_indices[index])
        return Problem(file, row, self.name, int(self.numbers["position"][index]), what)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRows:
    """All rows of some files, serving by serving and in each by position."""

    requests: Sequence[AuditedRequest]
    numbers_N: np.ndarray
    serving_N: np.ndarray  # int, index into `requests`
    starts_S: np.ndarray  # int, first row of each serving

    def problem(self, index: int, what: str) -> Problem:
        """What is wrong with one row."""
        serving = int(self.serving_N[index])
        return self.requests[serving].problem(index - int(self.starts_S[serving]), what)

    def by_serving(self, values_S: Sequence[Any], dtype: Any) -> np.ndarray:
        """A value of each serving, at each of its rows."""
        by_row: np.ndarray = np.array(values_S, dtype=dtype)[self.serving_N]
        return by_row


def joined(files: Sequence[AuditFile]) -> AuditRows:
    """Every serving of these files, in the order of their first rows."""
    codes: dict[str, int] = {}
    sessions: dict[str, int] = {}
    code_N = np.concatenate(
        [
            np.fromiter((codes.setdefault(name, len(codes)) for name in file.requests), np.int64)
            for file in files
        ]
    )
    session_N = np.concatenate(
        [np.full(len(file.requests), sessions.setdefault(file.session, len(sessions))) for file in files]
    )
    file_N = np.repeat(np.arange(len(files)), [len(file.requests) for file in files])
    row_N = np.concatenate([np.arange(len(file.requests)) for file in files])
    numbers_N = np.concatenate([file.numbers_N for file in files])
    order = np.lexsort((numbers_N["position"], code_N, numbers_N["serial"], session_N))
    code_N, session_N, numbers_N = code_N[order], session_N[order], numbers_N[order]
    file_N, row_N = file_N[order], row_N[order]
    is_first_N = np.ones(len(order), dtype=bool)
    is_first_N[1:] = (np.diff(code_N) != 0) | (np.diff(session_N) != 0) | (np.diff(numbers_N["serial"]) != 0)
    serving_N, starts_S = np.cumsum(is_first_N) - 1, np.flatnonzero(is_first_N)
    infos = _infos(files, order, serving_N)
    names, session_names, file_names = list(codes), list(sessions), [file.path.name for file in files]
    pool_ids = {file.session: file.pool_id for file in files}
    requests = [
        AuditedRequest(
            name=names[code_N[start]],
            session=session_names[session_N[start]],
            pool_id=pool_ids[session_names[session_N[start]]],
            info=infos.get(serving, {}),
            numbers=numbers_N[start:stop],
            files=file_names,
            file_indices=file_N[start:stop],
            row_indices=row_N[start:stop],
        )
        for serving, (start, stop) in enumerate(itertools.pairwise([*starts_S.tolist(), len(order)]))
    ]
    return AuditRows(requests=requests, numbers_N=numbers_N, serving_N=serving_N, starts_S=starts_S)


def _infos(files: Sequence[AuditFile], order: np.ndarray, serving_N: np.ndarray) -> dict[int, dict[str, Any]]:
    """What the first rows of servings bring along."""
    place_N = np.empty(len(order), dtype=np.int64)
    place_N[order] = np.arange(len(order))
    return {int(serving_N[place_N[row]]): read_info(file, index) for row, file, index in _with_info(files)}


def _with_info(files: Sequence[AuditFile]) -> Iterator[tuple[int, AuditFile, int]]:
    """Rows that bring an info: their number over all files, and where they stand."""
    before = 0
    for file in files:
        yield from (
            (before + index, file, index) for index, info in enumerate(file.infos) if info is not None
        )
        before += len(file.infos)
