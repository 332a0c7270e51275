"""Tables and rows of measurements, printed and written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDEST_TABLE = 250  # characters


def print_whole(console: Console, table: Table) -> None:
    """A figure cut short is of no use: a narrow terminal breaks the lines instead."""
    needed = console.measure(table, options=console.options.update(max_width=WIDEST_TABLE)).maximum
    Console(file=console.file, width=max(console.width, needed)).print(table)


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A JSON array, or lines if the path ends in .jsonl."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    else:
        text = json.dumps(records, indent=2, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
