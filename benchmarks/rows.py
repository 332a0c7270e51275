"""Committed rows of the experiments: `results/SUBJECT_EXPERIMENT.jsonl`, an object a line."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from blockroll.kernels.processor import processor

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[Row]:
    """Rows of one result file."""
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def has_rows(name: str) -> bool:
    """Whether an experiment's rows are committed."""
    return (RESULTS / f"{name}.jsonl").is_file()


def write(name: str, rows: Iterable[Row]) -> None:
    """Rows with their provenance, the whole file or nothing; a row that bears its own keeps it."""
    RESULTS.mkdir(exist_ok=True)
    partial, here = RESULTS / f"{name}.partial", provenance()
    told = (row if "package_commit" in row else {**row, **here} for row in rows)
    partial.write_text("".join(json.dumps(row) + "\n" for row in told))
    partial.rename(RESULTS / f"{name}.jsonl")


def put(name: str, row: Row, *, same: tuple[str, ...]) -> None:
    """One row with its provenance, in the place of that whose values of `same` are equal, or behind all."""
    others = read(name) if has_rows(name) else []
    made = {**row, **provenance()}
    kept = [each for each in others if any(each.get(key) != row[key] for key in same)]
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f"{name}.partial"
    partial.write_text("".join(json.dumps(each) + "\n" for each in (*kept, made)))
    partial.rename(RESULTS / f"{name}.jsonl")


def provenance() -> Row:
    """Where and from what a row was measured; changes of the rows themselves do not count as changes.

    `commit` is the whole tree's, `package_commit` the last one that touched `blockroll/`.
    """
    commit = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    package, package_changes = last_commit("blockroll"), git("status", "--porcelain", "--", "blockroll")
    return {
        "commit": f"{commit}+changes" if changes else commit or None,
        "package_commit": f"{package}+changes" if package_changes else package or None,
        "machine": machine(),
        "torch": torch.__version__,
    }


def machine() -> str:
    """The processor by its name, and how many cores this process may use."""
    return f"{processor()}, {os.cpu_count()} cores"


def last_commit(path: str, commit: str = "HEAD") -> str:
    """The last commit up to `commit` that changed a path; empty outside a repository."""
    return git("log", "-1", "--format=%h", "--abbrev=12", commit, "--", path)


def git(*arguments: str) -> str:
    """What git says in this source tree; empty if it fails or is none."""
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
