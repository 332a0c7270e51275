"""The files of an audit: read, known again, dropped."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockroll.errors import InvalidInput
from blockroll.rollout.audit.writer import NUMBERS, SCHEMA_VERSION

_INFO_KEYS = {
    "prompt_ids",
    "prefix_ids",
    "seed",
    "weight",
    "sampling",
    "logits_processors",
    "constraint",
}


class AuditFile(NamedTuple):
    """Rows of one file."""

    path: Path
    session: str  # of the writer: with it a serial is unique
    pool_id: str  # of the pool whose replica wrote it; in files of before it was kept, the session
    requests: list[str]
    infos: list[str | None]
    numbers_N: np.ndarray
    checksums_N: np.ndarray


def audit_files(folder: Path) -> list[Path]:
    """Files of an audit in the order they were written; InvalidInput if there are none."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise InvalidInput(
            f"no audit in {folder}: set rollout.audit to 'share' or 'all' for the next run, and give the "
            "folder of a run or the audit folder itself"
        )
    return paths


def read_audit(path: Path) -> AuditFile:
    """One file; InvalidInput, in one line, if it is damaged, no audit or one of another schema."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        metadata = table.schema.metadata or {}
        version = metadata.get(b"blockroll_audit", b"none").decode(errors="replace")
        if version == str(SCHEMA_VERSION):
            session = metadata.get(b"session", b"")
            return _audit_file(path, table, session.decode(), metadata.get(b"pool", session).decode())
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        line = f"{error}".strip().partition("\n")[0] or type(error).__name__
        raise InvalidInput(
            f"{path} cannot be read as an audit file: {line}; move it away to look at the others"
        ) from error
    raise InvalidInput(f"{path} has audit schema {version}, this version reads {SCHEMA_VERSION}")


def _audit_file(path: Path, table: Any, session: str, pool_id: str) -> AuditFile:
    names = ("request", *(NUMBERS.names or ()), "request_info", "checksum")
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise KeyError(f"it lacks {', '.join(missing)}")
    holes = [name for name in names if name != "request_info" and table[name].null_count]
    if holes:
        raise ValueError(f"{', '.join(holes)} are not there in every row")
    numbers_N = np.zeros(len(table), dtype=NUMBERS)
    for name in NUMBERS.names or ():
        numbers_N[name] = table[name].to_numpy()
    return AuditFile(
        path,
        session,
        pool_id,
        table["request"].to_pylist(),
        table["request_info"].to_pylist(),
        numbers_N,
        table["checksum"].to_numpy(),
    )


def read_info(file: AuditFile, row: int) -> dict[str, Any]:
    """What `request_info` wrote into this row; InvalidInput names it if it is damaged."""
    text = file.infos[row]
    assert text is not None
    try:
        info: dict[str, Any] = json.loads(text)
        missing = _INFO_KEYS - info.keys()
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"{file.path}, row {row}: request_info is damaged: {error}") from error
    if missing:
        raise InvalidInput(f"{file.path}, row {row}: request_info lacks {', '.join(sorted(missing))}")
    return info


def audit_mark(folder: Path) -> list[str]:
    """Names of the files that are there: what a checkpoint keeps, so that a resumed run knows them."""
    return sorted(path.name for path in folder.glob("*.parquet"))


def drop_audit(folder: Path, version: int, *, known: Sequence[str] | None = None) -> None:
    """Delete what a run that resumes from this version makes again.

    That is every row of later versions, and of this version what was drawn after the checkpoint: files that
    are not among the `known` ones of its `audit_mark`. Without a mark rows of this version stay.
    """
    for path in folder.glob("version-*.parquet"):
        drawn_by = int(path.name.split("-")[1])
        if drawn_by > version or (drawn_by == version and known is not None and path.name not in known):
            path.unlink()
