"""The verdict on transformers' assisted generation, written from its committed rows into the page on the kit.

    python examples/check_assisted_generation.py --tokens 8192 --out benchmarks/results/law_assisted.jsonl
    python -m benchmarks.assisted        rewrite the table of docs/correctness-kit.md

A test holds the page against the rows.
"""

from benchmarks.readme import put_between
from benchmarks.rows import ROOT, Row, read

PAGE = ROOT / "docs" / "correctness-kit.md"


def with_table(page: str) -> str:
    """The page with its table as the rows have it."""
    return put_between(page, "measured", table(read("law_assisted")))


def table(rows: list[Row]) -> str:
    """A line per finding, behind what all of them share."""
    first = rows[0]
    lines = [
        f"transformers {first['transformers']}, torch {first['torch']}, {first['tokens_per_setting']} tokens "
        f"of each way to generate, seed {first['seed']}, commit {first['commit']}.",
        "",
        "| checked | figure | at most | would be seen | |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figure = f"{row['measure']} {row['statistic']:.3g}"
        seen = "" if row["detectable"] is None else f"{row['detectable']:.2g}"
        failed = "**fail**" if row["claim"] == "target" else "another law, as documented"
        verdict = "pass" if row["passed"] else failed
        lines.append(f"| {row['check']} | {figure} | {row['threshold']:.3g} | {seen} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
