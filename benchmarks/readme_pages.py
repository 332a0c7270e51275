"""The two layouts of a cache, for docs/measured.md."""

from collections.abc import Sequence

from benchmarks.ranges import median_and_range
from benchmarks.rows import Row


def pages_table(rows: Sequence[Row]) -> str:
    """What pages cost a decode step on a CPU, and what they save in memory."""
    speeds = [row for row in rows if row["what"] == "decode steps"]
    lines = [
        "| batch | context | tokens / s of pages over slots | by processor time |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['batch']} | {row['context']} | {median_and_range(row['pages_to_slots_all'])} "
        f"| {row['cpu_pages_to_slots']:.2f} |"
        for row in speeds
    ]
    slots, pages = (next(row for row in rows if row.get("layout") == layout) for layout in ("slots", "pages"))
    taken = [f"{row['peak_bytes'] / 1e6:.0f} MB" for row in (slots, pages)]
    caption = (
        f"The tiny policy, plain, one thread, pages of {speeds[0]['page_size']} rows: medians of "
        f"{speeds[0]['pairs']} pairs in one run, and their range; processor time has "
        f"prefills in it. Of {pages['rollouts']} texts of "
        f"{pages['length_mean']:.0f} tokens on average and {pages['length_longest']} at most, all begun "
        f"together, a cache in slots takes {taken[0]} and one in pages {taken[1]}, texts that have ended "
        f"included. For each token of running texts slots hold {slots['running_rows_per_token']:.1f} rows, "
        f"pages {pages['running_rows_per_token']:.2f}."
    )
    return "\n".join((*lines, "", caption))
