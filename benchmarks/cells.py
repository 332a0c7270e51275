"""Experiments of many cells: each is kept as soon as it is measured, and one that was stopped goes on."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row, provenance

FOLDER = Path("runs") / "evidence" / "cells"
Cells = Mapping[str, Callable[[], list[Row]]]


@dataclass(slots=True, kw_only=True)
class Given:
    """What the command line said of all experiments."""

    deadline: float = math.inf  # by time.monotonic: no cell begins later
    gsm8k: Path = Path("runs") / "gsm8k.jsonl"  # a file of it, which is not in this repository


GIVEN = Given()


def measured(name: str, cells: Cells, *, folder: Path | None = None) -> list[Row]:
    """The rows of every cell, in order, each with `cell`, its name, and its provenance.

    A cell that was measured at this very commit of the package is not measured again. Those that the deadline
    leaves no time for are left out, and named.
    """
    kept = (folder or FOLDER) / name
    kept.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for cell, measure in cells.items():
        path = kept / f"{re.sub(r'[^A-Za-z0-9.]+', '-', cell).strip('-')}.json"
        found = _known(path)
        if found is None and time.monotonic() < GIVEN.deadline:
            started = time.monotonic()
            found = [{"cell": cell, **row, **provenance()} for row in measure()]
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.rename(path)
            print(f"{name}: {cell} took {time.monotonic() - started:.0f} s", flush=True)
        elif found is None:
            print(f"{name}: {cell} is left out: no time is left", flush=True)
        rows += found or ()
    return rows


def _known(path: Path) -> list[Row] | None:
    """The rows of a cell, if they are of the package as it stands."""
    if not path.is_file():
        return None
    rows: list[Row] = json.loads(path.read_text())
    commit = provenance()["package_commit"]
    is_known = commit is not None and all(row["package_commit"] == commit for row in rows)
    return rows if is_known and "+changes" not in commit else None
