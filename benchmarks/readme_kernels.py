"""What kernels take: of the GPUs they are compiled for, for docs/kernels.md, and of memory."""

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


def logprob_memory_table(rows: Sequence[Row]) -> str:
    """Bytes for each token, by vocabulary: a line for each way."""
    vocabularies = [*dict.fromkeys(row["vocabulary"] for row in rows)]
    lines = [
        f"| log-probabilities and gradients | {' | '.join(f'V = {size:,}' for size in vocabularies)} |",
        f"| --- | {' | '.join('---:' for _ in vocabularies)} |",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        found = {row["vocabulary"]: row for row in rows if row["way"] == way}
        cells = (_memory(found[size]) for size in vocabularies)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    bound = next(row["memory_mb"] for row in rows if row["memory_mb"] is not None)
    caption = (
        "Memory that each further token takes at the peak of a forward and a backward pass through an output "
        f"head, states {rows[0]['width']} wide, in float32 ({rows[0]['device']}); in brackets the peak with "
        "the most tokens, gradients of states and head in it. The bound is "
        f"{bound} MiB, `train.logits_memory_mb`."
    )
    return "\n".join((*lines, "", caption))


def _memory(row: Row) -> str:
    return (
        f"{row['bytes_per_token'] / 1e3:,.1f} kB ({row['tokens'][1]:,}: {row['peak_bytes'][1] / 1e6:,.0f} MB)"
    )


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
