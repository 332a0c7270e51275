"""A real model beside transformers and vLLM, for the README and docs/measured.md."""

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.readme_speed import paired
from benchmarks.rows import Row

OURS = ("plain", "auto")
PROMPTS = {"worked": "worked arithmetic", "gsm8k": "GSM8K"}
Group = tuple[str, float, int]  # prompts, temperature, batch


def peers_page(rows: Sequence[Row], *, picture: str | None = None) -> str:
    """All of it, as far as there are rows, with their picture if there is one."""
    even, grouped = of_workload(rows, "even"), of_workload(rows, "grouped")
    parts = [even_table(even)] if even else []
    if grouped:
        if picture is not None:
            parts += [f"![Tokens per second beside transformers and vLLM]({picture})"]
        parts += [grouped_table(grouped)]
    return "\n\n".join(parts)


def readme_section(rows: Sequence[Row]) -> str:
    """The picture and the grouped table, behind one line on plain decoding."""
    picture = "![Tokens per second of SmolLM2 beside transformers and vLLM](docs/images/speed_peers.png)"
    even = cells_of(of_workload(rows, "even"))
    plain = "; ".join(
        f"at batch {batch} {over(cells, 'plain', 'transformers_generate')} of `generate` and "
        f"{over(cells, 'plain', 'vllm')} of vLLM"
        for (_, _, batch), cells in even.items()
    )
    parts = [picture, grouped_table(of_workload(rows, "grouped"))]
    if plain:
        parts.append(f"Plain decoding, where nothing comes back that could be looked up, reaches {plain}.")
    return "\n\n".join(parts)


def has_grouped(rows: Sequence[Row]) -> bool:
    """Whether the README can show the real model."""
    return bool(of_workload(rows, "grouped"))


def even_table(rows: Sequence[Row]) -> str:
    """Tokens per second, and per second of processor time, where every text has one length."""
    lines = [
        "| batch | | tokens a second | a CPU second | ours plain over it, wall time | CPU time "
        "| `auto` over it, wall time |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (_, _, batch), cells in cells_of(rows).items():
        for name, row in cells.items():
            shown = f"| {batch} | `{name.removeprefix('transformers_')}` |"
            if row["skipped"] is not None:
                lines.append(f"{shown} not measured: {row['skipped']} | | | | |")
                continue
            ratios = (
                over(cells, "plain", name) if name != "plain" else "",
                over(cells, "plain", name, "tokens_per_cpu_s") if name != "plain" else "",
                over(cells, "auto", name) if name != "auto" and "auto" in cells else "",
            )
            figures = (f"{row['tokens_per_s']:.0f}", f"{row['tokens_per_cpu_s']:.0f}", *ratios)
            lines.append(f"{shown} {' | '.join(figures)} |")
    first = rows[0]
    return "\n".join(
        (*lines, "", f"{_setting(rows)}, every text {first['max_tokens']} tokens. {_how_to_read(rows)}")
    )


def grouped_table(rows: Sequence[Row]) -> str:
    """`auto` where prompts come back: over plain, and over vLLM's plain and the best of vLLM."""
    lines = [
        "| prompts | temperature | batch | ours plain | `auto` | over plain | first epoch, second | vLLM "
        "| `auto` over it | vLLM's best | `auto` over it |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for (prompts, temperature, batch), cells in cells_of(rows).items():
        best = best_of_vllm(cells)
        epochs = zip(*(cells[name]["tokens_per_s_by_epoch"] or () for name in ("auto", "plain")), strict=True)
        lines.append(
            f"| {PROMPTS.get(prompts, prompts)} | {temperature:g} | {batch} "
            f"| {_speed(cells, 'plain')} | {_speed(cells, 'auto')} | {over(cells, 'auto', 'plain')} "
            f"| {', '.join(f'{ours / plain:.2f}x' for ours, plain in epochs)} "
            f"| {_speed(cells, 'vllm')} | {over(cells, 'auto', 'vllm')} "
            f"| {f'`{best}` {_speed(cells, best)}' if best else 'not measured'} "
            f"| {over(cells, 'auto', best) if best else ''} |"
        )
    first = rows[0]
    lines.append("")
    lines.append(
        f"Tokens per second. {_setting(rows)}, {first['siblings']} rollouts of each prompt, "
        f"{first['epochs']} epochs, at most {first['max_tokens']} tokens each. vLLM's best is the "
        f"fastest of its plain decoding, its n-gram speculation and its suffix decoding in that row. "
        f"{_how_to_read(rows)}"
    )
    skipped = dict.fromkeys(
        f"`{row['plan']}`: {row['skipped']}" for row in rows if row["skipped"] is not None
    )
    if skipped:
        lines.append(f"Not measured: {'; '.join(skipped)}.")
    return "\n".join(lines)


def of_workload(rows: Sequence[Row], workload: str) -> list[Row]:
    """Rows of a workload; what was measured before there was another one was even."""
    return [row for row in rows if row.get("workload", "even") == workload]


def cells_of(rows: Iterable[Row]) -> dict[Group, dict[str, Row]]:
    """The rows that were measured together, by what was measured."""
    found: dict[Group, dict[str, Row]] = {}
    for row in rows:
        group = (row["prompts"], row["temperature"], row["batch"])
        found.setdefault(group, {})[row["plan"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][2], item[0][0] != "worked", item[0][1])))


def best_of_vllm(cells: dict[str, Row]) -> str | None:
    """The fastest of vLLM's ways that were measured."""
    speeds = {
        name: row["tokens_per_s"]
        for name, row in cells.items()
        if name.startswith("vllm") and row["skipped"] is None
    }
    return max(speeds, key=speeds.__getitem__) if speeds else None


def over(cells: dict[str, Row], ours: str, other: str, figure: str = "tokens_per_s") -> str:
    """Median and range of the ratios within repeats; of one repeat the ratio alone."""
    if any(name not in cells or cells[name]["skipped"] is not None for name in (ours, other)):
        return "not measured"
    values = [cells[name][f"{figure}_all"] for name in (ours, other)]
    return f"{np.divide(*values)[0]:.2f}x" if len(values[0]) == 1 else paired(*values)


def _speed(cells: dict[str, Row], name: str) -> str:
    row = cells.get(name)
    return "not measured" if row is None or row["skipped"] is not None else f"{row['tokens_per_s']:.0f}"


def _setting(rows: Sequence[Row]) -> str:
    first = rows[0]
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    temperatures = sorted({row["temperature"] for row in rows})
    heat = f", temperature {temperatures[0]:g}" if len(temperatures) == 1 else ""
    return f"SmolLM2-135M-Instruct, {first['dtype']}, {threads} each, {first['machine']}{heat}"


def _how_to_read(rows: Sequence[Row]) -> str:
    first = rows[0]
    versions = ", ".join(sorted({row["version"] for row in rows if row["version"] is not None}))
    starts = [row["setup_s"] for row in rows if row["version"] is not None and row["setup_s"] is not None]
    repeats = " and ".join(str(count) for count in sorted({row["repeats"] for row in rows}))
    text = (
        f"Log-probabilities on; medians of {repeats} repeats in turns, and median (and range) of their "
        f"ratios. Above 1 ours is faster; a range that holds 1 shows no difference. {versions or 'no vLLM'}; "
        f"transformers {first['transformers_version']}; commit {first['commit']}."
    )
    if starts:
        text += f" vLLM's start and compilation, up to {max(starts):.0f} s, are not counted."
    return text
