"""Where metrics go: one JSON object per line in the run folder, and Weights & Biases when asked."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockroll.errors import MissingDependency

Metrics = Mapping[str, Any]


class JsonLines:
    """One object per line, on disk as soon as `log` returns; NaN and infinity are written as null."""

    def __init__(self, path: Path) -> None:
        """Go on after the lines that are there."""
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append one line."""
        self._file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """A Weights & Biases run. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._run = require_wandb().init(
            project="blockroll", name=name, dir=str(run_dir), config=dict(config)
        )

    def log(self, metrics: Metrics) -> None:
        """Log one step under its own number."""
        self._run.log(finite(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def require_wandb() -> Any:
    """The wandb module; MissingDependency, with advice, if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise MissingDependency(
            "wandb is not installed; install it with pip install 'blockroll[wandb]', or leave out --wandb"
        ) from error
    return wandb


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file, none if it is not there; a last line cut short is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            rows.append(json.loads(line))
    return rows


def truncate_lines(path: Path, last: int, *, key: str = "step") -> None:
    """Keep the lines whose `key` is at most `last`; a crash in between leaves the old file."""
    kept = [row for row in read_lines(path) if row[key] <= last]
    shorter = path.with_name(f".{path.name}.shorter")
    shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(shorter, path)


def finite(value: Any) -> Any:
    """The value with every float that is not finite replaced by None, as JSON knows no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
