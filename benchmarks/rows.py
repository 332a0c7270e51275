"""Committed rows of the experiments."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> list[Row]:
    """Rows of one result file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def has_rows(name: str) -> bool:
    """Whether an experiment's rows are committed."""
    return (RESULTS / f"{name}.jsonl").is_file()
