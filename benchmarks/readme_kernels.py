"""What kernels take of the GPUs they are compiled for, for docs/kernels.md."""

from collections.abc import Iterable, Sequence

from benchmarks.rows import Row

UNITS = {"gfx942": "VGPR", "gfx950": "VGPR", "sm_90": "registers"}


def compiled_table(rows: Sequence[Row]) -> str:
    """A line for each kernel: registers, waves and shared memory over all that ships, by GPU."""
    targets = [*dict.fromkeys(row["target"] for row in rows)]
    heads = (f"{target}: {UNITS[target]}, KiB" for target in targets)
    lines = [
        f"| op | kernel | configurations | {' | '.join(heads)} |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in targets)} |",
    ]
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in rows):
        of_kernel = [row for row in rows if (row["op"], row["kernel"]) == (op, kernel)]
        cells = (_taken([row for row in of_kernel if row["target"] == target]) for target in targets)
        count = len({row["label"] for row in of_kernel})
        lines.append(f"| {op} | `{kernel}` | {count} | {' | '.join(cells)} |")
    versions = " and ".join(dict.fromkeys(row["triton"] for row in rows))
    number, bad = len({(row["op"], row["label"]) for row in rows}), [row for row in rows if row["problems"]]
    found = (
        "Nothing spills, and all fit."
        if not bad
        else f"{len(bad)} of them do not fit: {'; '.join(map(_problem, bad))}."
    )
    caption = (
        f"{number} configurations, each compiled for {', '.join(targets)} by Triton {versions}, without a "
        f"GPU. {found} Ranges are over configurations and both Tritons; with VGPR, in brackets, the least "
        "waves on a SIMD. No time was measured."
    )
    return "\n".join((*lines, "", caption))


def _taken(rows: Sequence[Row]) -> str:
    waves = f" ({min(row['occupancy'] for row in rows)})" if "occupancy" in rows[0] else ""
    return (
        f"{_range(row['registers'] for row in rows)}{waves}, {_range(row['shared'] / 1024 for row in rows)}"
    )


def _range(numbers: Iterable[float]) -> str:
    given = [*numbers]
    low, high = f"{min(given):.3g}", f"{max(given):.3g}"
    return low if low == high else f"{low} to {high}"


def _problem(row: Row) -> str:
    return f"{row['label']} on {row['target']} with Triton {row['triton']} ({', '.join(row['problems'])})"
