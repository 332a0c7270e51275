"""The rows of an audit by request, and what a check of them reports."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from blockroll.rollout.audit.writer import AuditFile, as_json
from blockroll.types import Law, Sampling

RequestKey = tuple[str, str, int]  # request id, session of the writer, serial


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
    largest_difference: float = 0.0  # of a recomputed probability,
    tolerance: float = 0.0  # and the largest that rounding explains
    unfinished: list[str] = field(default_factory=list)  # files that a dead process was writing

    @property
    def passed(self) -> bool:
        """Whether no row is bad."""
        return self.problem is None


class Place(NamedTuple):
    """Where a row stands."""

    file: str
    row: int


@dataclass(slots=True)
class AuditedRequest:
    """The rows of one request over all files, by position."""

    name: str
    info: dict[str, Any]
    numbers: np.ndarray
    places: list[Place]

    @property
    def tokens(self) -> list[int]:
        """Its completion, the prefix it was resumed from included."""
        return [*self.info["prefix_ids"], *self.numbers["token"].tolist()]

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens of its prompt."""
        return list(self.info["prompt_ids"])

    @property
    def precision(self) -> str | None:
        """That forwards multiplied in; None in files of before it was kept."""
        return self.info.get("precision")

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
        place = self.places[index]
        return Problem(place.file, place.row, self.name, int(self.numbers["position"][index]), what)


def rows_by_request(file: AuditFile) -> dict[RequestKey, list[int]]:
    """Indices of the rows of each request; one that was served twice is two."""
    indices: dict[RequestKey, list[int]] = defaultdict(list)
    serials = file.numbers_N["serial"].tolist()
    for index, (name, serial) in enumerate(zip(file.requests, serials, strict=True)):
        indices[name, file.session, serial].append(index)
    return indices


def joined(files: Sequence[AuditFile]) -> list[AuditedRequest]:
    """Every request of these files, with all its rows."""
    parts: dict[RequestKey, list[tuple[np.ndarray, list[Place]]]] = defaultdict(list)
    infos: dict[RequestKey, dict[str, Any]] = {}
    for file in files:
        for key, indices in rows_by_request(file).items():
            parts[key].append((file.numbers_N[indices], [Place(file.path.name, index) for index in indices]))
            for index in indices:
                info = file.infos[index]
                if info is not None:
                    infos[key] = as_json(info)
    requests = []
    for key, pieces in parts.items():
        numbers = np.concatenate([numbers for numbers, _ in pieces])
        places = [place for _, rows in pieces for place in rows]
        order = np.argsort(numbers["position"], kind="stable")
        requests.append(
            AuditedRequest(key[0], infos.get(key, {}), numbers[order], [places[index] for index in order])
        )
    return requests
