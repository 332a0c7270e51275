"""The audit: a row for every committed token, with what decided it.

A row holds the draft that stood at its position and its two probabilities, the accept coin, and for a drawn
token the uniform, the mass it was drawn from and the token's interval of the cumulative law. By position all
tokens were drawn, accepted drafts too, and there is no accept coin. With the seed of
its request, which the request's first row brings along, every decision can be repeated from the file alone
(`check.py`). Full rows of the vocabulary are not kept.

The engine hands over the tensors of a step as they are. They become columns many steps at a time, and files
when many rows are there, when the weights change, or when nothing is left to decode. A file is written under
another name and renamed: a process that dies loses the rows since its last file and leaves no broken one.

Shapes: B requests, K drafted tokens, L target positions, V vocabulary, N rows.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import AuditError, InvalidInput
from blockroll.rollout.engine.trace import StepTrace
from blockroll.types import POINT_MASS, Evidence, PlanKind, Request, Sampling

SCHEMA_VERSION = 2
KINDS = ("accepted", "recovered", "extra", "plain")  # by their codes
ACCEPTED, RECOVERED, EXTRA, PLAIN_TOKEN = range(4)
ROWS_PER_FILE = 200_000
_ROWS_HELD = 1_024  # rows whose tensors are kept before they become columns

# Everything a row holds but its request, in this order: what its checksum is taken of.
NUMBERS = np.dtype(
    [
        ("serial", "<i8"),  # of the request at its writer: ids may be served again
        ("position", "<i4"),  # of the token in its completion
        ("token", "<i4"),
        ("kind", "<i1"),
        ("num_drafts", "<i2"),  # K of the plan,
        ("is_fused", "<i1"),  # and whether one forward verified all of them
        ("version", "<i4"),  # of the weights
        ("attempt", "<i4"),  # forwards the request had run: a word of every coin of the step
        ("offset", "<i2"),  # of the token in its step
        ("by_position", "<i1"),  # whether the coin of its position drew it
        ("draft", "<i4"),  # the token drafted for this position, or -1
        ("draft_prob", "<f8"),  # of that token under the law it was drawn from,
        ("target_prob", "<f8"),  # and under the law to commit by
        ("coin", "<f8"),  # that accepted or rejected the draft, NaN by position
        ("context", "<i4"),  # tokens of the text that the draft rows of this step knew
        ("slot", "<i2"),  # mask row the draft came from, of so many
        ("num_masks", "<i2"),  # 0: no row of the policy gave it
        ("uniform", "<f8"),  # that drew the token, NaN if an accept coin took the draft; likewise:
        ("mass", "<f8"),  # of the residual, or 1
        ("low", "<f8"),  # the token's interval of the cumulative law
        ("high", "<f8"),
        ("behavior_logprob", "<f8"),
        ("policy_logprob", "<f8"),
    ]
)


_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(Sampling)
    if field.name not in ("law", "logits_processors", "constraint")
)


def settles_first(numbers_N: np.ndarray) -> np.ndarray:
    """Rows of steps that settled the first position before they verified the others, bool (N,)."""
    settles_N: np.ndarray = (numbers_N["num_drafts"] > 0) & (numbers_N["is_fused"] == 0)
    return settles_N


class AuditWriter:
    """Collects steps and writes them to `folder`, one file per version of the weights or more."""

    def __init__(
        self,
        folder: str | Path,
        *,
        share: float = 1.0,
        replica_id: int = 0,
        pool_id: str | None = None,
        rows_per_file: int = ROWS_PER_FILE,
    ) -> None:
        """`share` of the requests is kept, whole, chosen by a hash of their ids.

        Writers of one pool bear its `pool_id`: what one replica has drawn another may draw again, after a
        death. None: a pool of this writer alone.
        """
        if not 0 < share <= 1:
            raise InvalidInput(f"the share of audited requests must be above 0 and at most 1, got {share}")
        self.folder = Path(folder)
        self.share = share
        self._replica_id = replica_id
        self._rows_per_file = rows_per_file
        self._steps: list[tuple[StepTrace, list[int]]] = []
        self._num_held = 0
        self._tables: list[tuple[list[Request], np.ndarray]] = []  # request of each row, and its numbers
        self._num_rows = 0
        self._version, self._precision = 0, ""
        self._session = uuid.uuid4().hex[:12]
        self._pool_id = pool_id or self._session
        self._serials: dict[str, int] = {}  # of requests being served
        self._num_requests = 0
        self._described: set[int] = set()  # serials whose info is in a file
        self._num_files = 0

    def __call__(self, trace: StepTrace) -> None:
        """Keep one step of an engine; write all rows there are when nothing is left to decode."""
        self._record(_without_laws(trace))
        if trace.is_last:
            self.flush(is_idle=True)

    def _record(self, step: StepTrace) -> None:
        if step.version != self._version:
            self.flush()
            self._version = step.version
        self._precision = step.precision
        serials = [self._serial(*each) for each in zip(step.requests, step.num_before, strict=True)]
        self._steps.append((step, serials))
        self._num_held += sum(step.num_kept)
        if self._num_held >= _ROWS_HELD:
            self._convert()
        if self._num_rows >= self._rows_per_file:
            self.flush()

    def _serial(self, request: Request, num_tokens: int) -> int:
        """A new number when nothing of the request has been committed yet."""
        prefix = request.prefix.token_ids if request.prefix else ()
        if num_tokens == len(request.prompt_ids) + len(prefix) or request.request_id not in self._serials:
            self._num_requests += 1
            self._serials[request.request_id] = self._num_requests
        return self._serials[request.request_id]

    def flush(self, *, is_idle: bool = False) -> None:
        """Write all rows there are; a file appears whole or not at all. Idle: no request goes on.

        AuditError if that fails: no row is lost, and the next call tries again.
        """
        import pyarrow
        import pyarrow.parquet

        self._convert()
        if is_idle:
            self._serials.clear()
        if not self._num_rows:
            return
        table, described = self._table()
        partial = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (path := self._next_path()).exists():
                pass
            partial = path.with_name(f".{path.name}.partial")
            pyarrow.parquet.write_table(table, partial, compression="zstd")
            os.replace(partial, path)
        except (OSError, pyarrow.ArrowException) as error:
            if partial is not None:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            raise AuditError(
                f"{self._num_rows} rows of the audit could not be written to {self.folder}: {error}; free "
                "some space there, or set rollout.audit_dir to another folder"
            ) from error
        self._described |= described
        self._tables, self._num_rows = [], 0

    def _next_path(self) -> Path:
        self._num_files += 1
        name = f"version-{self._version:06d}-replica-{self._replica_id}-{self._num_files:05d}.parquet"
        return self.folder / name

    def _convert(self) -> None:
        """Tensors become numbers, all steps of one plan at once."""
        for step, serials in _merged(self._steps):
            is_kept_B = [is_audited(request.request_id, self.share) for request in step.requests]
            if any(is_kept_B):
                rows_N, numbers_N = _numbers(step, np.array(is_kept_B), np.array(serials))
                self._tables.append(([step.requests[row] for row in rows_N.tolist()], numbers_N))
                self._num_rows += len(rows_N)
        self._steps, self._num_held = [], 0

    def _table(self) -> tuple[Any, set[int]]:
        """The rows as a table, and the serials whose info it brings."""
        import pyarrow as pa

        requests = [request for names, _ in self._tables for request in names]
        numbers_N = np.concatenate([numbers for _, numbers in self._tables])
        names = [request.request_id for request in requests]
        infos: list[str | None] = []
        fresh = {int(serial) for serial in np.unique(numbers_N["serial"])} - self._described
        described = set(fresh)
        for request, serial in zip(requests, numbers_N["serial"].tolist(), strict=True):
            infos.append(request_info(request, self._precision) if serial in fresh else None)
            fresh.discard(serial)
        columns = {"request": pa.array(names).dictionary_encode()}
        columns |= {name: pa.array(numbers_N[name]) for name in NUMBERS.names or ()}
        columns["request_info"] = pa.array(infos, type=pa.string())
        columns["checksum"] = pa.array(row_checksums(names, numbers_N, infos), type=pa.uint32())
        metadata = {
            "blockroll_audit": str(SCHEMA_VERSION),
            "session": self._session,
            "pool": self._pool_id,
        }
        return pa.table(columns).replace_schema_metadata(metadata), described


def is_audited(request_id: str, share: float) -> bool:
    """Whether a request is among the share that is kept."""
    if share >= 1:
        return True
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def request_info(request: Request, precision: str) -> str:
    """What a row of a request is checked against, as JSON: prompt, seed, sampling, precision of forwards."""
    sampling = request.sampling
    options = {name: getattr(sampling, name) for name in _OPTIONS}
    return json.dumps(
        {
            "prompt_ids": request.prompt_ids,
            "prefix_ids": request.prefix.token_ids if request.prefix else (),
            "seed": request.seed,
            "precision": precision,
            "weight": sampling.law.weight,
            "sampling": {**options, "logit_bias": list(sampling.logit_bias.items())},
            # What holds code is named, and not kept.
            "logits_processors": [type(processor).__name__ for processor in sampling.logits_processors],
            "constraint": None if sampling.constraint is None else repr(sampling.constraint),
        }
    )


def row_checksums(names: Sequence[str], numbers_N: np.ndarray, infos: Sequence[str | None]) -> np.ndarray:
    """CRC-32 of each row: request, its info where it stands, and the numbers; uint32 (N,)."""
    data, width, crc32 = memoryview(numbers_N.tobytes()), NUMBERS.itemsize, zlib.crc32
    starts = {name: crc32(name.encode()) for name in set(names)}
    return np.array(
        [
            crc32(data[first : first + width], crc32(info.encode(), starts[name]) if info else starts[name])
            for name, info, first in zip(names, infos, range(0, len(data), width), strict=True)
        ],
        dtype=np.uint32,
    )


def _merged(steps: Sequence[tuple[StepTrace, list[int]]]) -> Iterator[tuple[StepTrace, list[int]]]:
    """Runs of steps of one shape under one plan, each as one step of a larger batch."""
    for _, group in itertools.groupby(
        steps, key=lambda pair: (pair[0].plan, pair[0].draft.token_ids_BK.shape[1])
    ):
        run = list(group)
        members = [step for step, _ in run]
        parts = [
            (_cat([draft for draft, _ in part]), _cat([verdict for _, verdict in part]))
            for part in zip(*(step.parts for step in members), strict=True)
        ]
        merged = dataclasses.replace(
            members[0],
            requests=[request for step in members for request in step.requests],
            attempts_B=torch.cat([step.attempts_B for step in members]),
            num_before=[number for step in members for number in step.num_before],
            num_kept=[number for step in members for number in step.num_kept],
            origins=[origin for step in members for origin in step.origins],
            parts=parts,
            policy_logprobs_BL=torch.cat([step.policy_logprobs_BL for step in members]),
        )
        yield merged, [serial for _, serials in run for serial in serials]


def _without_laws(step: StepTrace) -> StepTrace:
    """Laws are as wide as the vocabulary; all that rows of the audit say of them is in the evidence."""
    parts = [
        (dataclasses.replace(draft, law=POINT_MASS, certain_B=None), verdict) for draft, verdict in step.parts
    ]
    return dataclasses.replace(step, targets=(), draft=parts[0][0], parts=parts)


def _cat(records: Sequence[Any]) -> Any:
    """Dataclasses of tensors, batch behind batch; of what is neither, the first record's."""
    fields = {}
    for field in dataclasses.fields(records[0]):
        values = [getattr(record, field.name) for record in records]
        fields[field.name] = values[0]
        if isinstance(values[0], Tensor):
            fields[field.name] = torch.cat(values)
        elif dataclasses.is_dataclass(values[0]):
            fields[field.name] = _cat(values)
    return type(records[0])(**fields)


def _numbers(step: StepTrace, is_kept_B: np.ndarray, serials_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the batch and numbers of every token that a step committed and kept."""
    kept_B = np.where(is_kept_B, np.array(step.num_kept), 0)
    before_B, attempts_B = np.array(step.num_before), step.attempts_B.cpu().numpy()
    prompt_B = np.array([len(request.prompt_ids) for request in step.requests])
    origins_B3 = np.array(step.origins)
    logprobs_BL = step.policy_logprobs_BL.cpu().numpy()
    is_plain = step.plan.kind is PlanKind.PLAIN
    rows, tables, first = [], [], 0
    for draft, verdict in step.parts:
        evidence = verdict.evidence
        assert evidence is not None
        by_position_B = evidence.by_position_B.cpu().numpy()
        tokens_BL, is_draft_BL = verdict.token_ids_BL.cpu().numpy(), verdict.is_draft_BL.cpu().numpy()
        committed_B = np.minimum(verdict.num_committed_B.cpu().numpy(), np.maximum(kept_B - first, 0))
        row_N, index_N = np.nonzero(np.arange(tokens_BL.shape[1]) < committed_B[:, None])
        numbers_N = np.zeros(len(row_N), dtype=NUMBERS)
        accepted_N = is_draft_BL[row_N, index_N]
        drafted_N = index_N < draft.num_drafts_B.cpu().numpy()[row_N]
        numbers_N["serial"] = serials_B[row_N]
        numbers_N["position"] = before_B[row_N] - prompt_B[row_N] + first + index_N
        numbers_N["token"] = tokens_BL[row_N, index_N]
        kinds = np.where(drafted_N, RECOVERED, PLAIN_TOKEN if is_plain else EXTRA)
        numbers_N["kind"] = np.where(accepted_N, ACCEPTED, kinds)
        numbers_N["num_drafts"], numbers_N["is_fused"] = (
            step.plan.num_drafts,
            not (is_plain or step.plan.settles_first),
        )
        numbers_N["version"], numbers_N["attempt"] = step.version, attempts_B[row_N]
        numbers_N["offset"], numbers_N["by_position"] = first + index_N, by_position_B[row_N]
        for name in ("draft", "context", "slot", "num_masks"):
            numbers_N[name] = -1
        for name in ("draft_prob", "target_prob", "coin", "uniform", "mass", "low", "high"):
            numbers_N[name] = np.nan
        at_draft = (row_N[drafted_N], index_N[drafted_N])
        for name, values in (
            ("draft", draft.token_ids_BK),
            ("draft_prob", evidence.draft_probs_BK),
            ("target_prob", evidence.target_probs_BK),
            ("coin", evidence.coins_BK),
        ):
            numbers_N[name][drafted_N] = values.cpu().numpy()[at_draft]
        context_N, slot_N, masks_N = origins_B3[at_draft[0]].T
        numbers_N["context"][drafted_N] = context_N
        numbers_N["slot"][drafted_N] = slot_N + first + at_draft[1]
        numbers_N["num_masks"][drafted_N] = masks_N
        drawn_N = ~accepted_N | by_position_B[row_N]
        _add_draws(numbers_N, drawn_N, (row_N[drawn_N], index_N[drawn_N]), evidence)
        numbers_N["behavior_logprob"] = verdict.behavior_logprobs_BL.cpu().numpy()[row_N, index_N]
        numbers_N["policy_logprob"] = logprobs_BL[row_N, first + index_N]
        rows.append(row_N)
        tables.append(numbers_N)
        first += tokens_BL.shape[1]
    row_N, numbers_N = np.concatenate(rows), np.concatenate(tables)
    order = np.argsort(row_N, kind="stable")
    return row_N[order], numbers_N[order]


def _add_draws(
    numbers_N: np.ndarray, drawn_N: np.ndarray, places: tuple[np.ndarray, np.ndarray], evidence: Evidence
) -> None:
    """Uniform, mass and interval of the tokens that were drawn, which stand at these places of the batch."""
    uniform, mass, low, high = (
        values_BL.cpu().numpy()[places]
        for values_BL in (evidence.uniforms_BL, evidence.mass_BL, evidence.low_BL, evidence.high_BL)
    )
    numbers_N["uniform"][drawn_N], numbers_N["mass"][drawn_N] = uniform, mass
    numbers_N["low"][drawn_N], numbers_N["high"][drawn_N] = low / mass, high / mass
