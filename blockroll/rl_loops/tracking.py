"""Where metrics go: one JSON object per line in the run folder, and Weights & Biases when asked."""

import json
import logging
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockroll.errors import InvalidInput, MissingDependency

log = logging.getLogger(__name__)

Metrics = Mapping[str, Any]
WANDB_ID_FILE = "wandb_run_id"


class JsonLines:
    """One object per line, on disk as soon as `log` returns; NaN and infinity are written as null."""

    def __init__(self, path: Path) -> None:
        """Go on after the lines that are there; a last one that a kill cut short goes."""
        _, rest = split_lines(path) if path.is_file() else ([], b"")
        self._file = path.open("a", encoding="utf-8", newline="\n")
        if rest:
            self._file.truncate(path.stat().st_size - len(rest))

    def log(self, metrics: Metrics) -> None:
        """Append one line."""
        self._file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """A Weights & Biases run, the same one after a resume. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, *, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start the run of this folder, whose id lies there, or go on with it."""
        path = run_dir / WANDB_ID_FILE
        if not path.is_file():
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._run = require_wandb().init(
            project="blockroll",
            name=name,
            dir=str(run_dir),
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(config),
            allow_val_change=True,
        )
        # Its own step only grows: what a resumed run does again would be left out without a word.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics) -> None:
        """Log one step; curves are over the metric `step`."""
        self._run.log(finite(metrics))

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


def split_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The whole lines of a file, and what stands behind the last newline.

    A line ends at a newline alone: JSON may hold other separators, such as U+2028, as they are.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    return lines, rest


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file, none if it is not there.

    A last line that a kill cut short is left out, with a warning; InvalidInput names any other bad line.
    """
    if not path.is_file():
        return []
    lines, rest = split_lines(path)
    if rest.strip():
        log.warning("%s ends in a line that was cut short after %d bytes: it is left out", path, len(rest))
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InvalidInput(
                f"line {number} of {path} is not JSON ({error}): the file was changed or damaged; delete "
                "the line to go on without it"
            ) from None
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
