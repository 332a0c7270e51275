"""The rows of a bench as a table for the terminal."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from blockroll.bench.rows import BenchRow

Cell = Callable[[BenchRow], str]


def bench_table(rows: Sequence[BenchRow], *, title: str) -> Table:
    """One line per row; parts of the setting are columns where rows differ in them, else in the caption."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    columns = _columns(rows)
    for name in columns:
        table.add_column(name, justify="left" if name in ("plan", "law") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    table.caption = "\n".join(_caption(rows))
    table.caption_justify = "left"
    return table


def short_name(row: BenchRow) -> str:
    """A plan's name; what is transformers' own goes without saying so."""
    return row.plan.removeprefix("transformers_")


def _columns(rows: Sequence[BenchRow]) -> dict[str, Cell]:
    """Headings and what stands below them, from left to right."""
    settings: dict[str, Cell] = {
        "law": lambda row: row.law,
        "temp": lambda row: f"{row.temperature:g}",
        "prompt": lambda row: str(row.prompt_tokens or "as is"),
        "max": lambda row: str(row.max_tokens),
    }
    figures: dict[str, Cell] = {
        "tok/s": lambda row: _figure(row.tokens_per_s, 0),
        "min..max": lambda row: f"{_figure(row.tokens_per_s_min, 0)}..{_figure(row.tokens_per_s_max, 0)}",
        "x plain": lambda row: _figure(row.speedup_over_plain, 2),
        "tok/cpu-s": lambda row: _figure(row.tokens_per_cpu_s, 0),
        "accept": lambda row: _figure(row.acceptance_rate, 3),
        "tok/fwd": lambda row: _figure(row.tokens_per_forward, 2),
        "p50 ms": lambda row: _figure(row.latency_ms_p50, 0),
        "host ms": lambda row: _figure(row.host_ms_per_step, 2),
    }
    judged = next((row for row in rows if row.pass_k is not None), None)
    if judged is not None:
        figures["pass@1"] = lambda row: _figure(row.pass_at_1, 3)
        figures[f"pass@{judged.pass_k}"] = lambda row: _figure(row.pass_at_k, 3)
    varied = {name: cell for name, cell in settings.items() if len({cell(row) for row in rows}) > 1}
    return {"plan": short_name, **varied, "batch": lambda row: str(row.batch), **figures}


def _caption(rows: Sequence[BenchRow]) -> list[str]:
    first = rows[0]
    lengths = [row.mean_length for row in rows if row.mean_length is not None]
    completions = _span(lengths)
    contexts = _span([row.context for row in rows])
    lines = [
        f"medians of {first.repeats}; prompts of {contexts} tokens ({first.prompts}), completions of "
        f"{completions}, {first.setting.threads} torch threads;",
        "p50 is a request's latency; host ms are per step, without forward and sampler; tok/cpu-s is per "
        "second of processor time",
    ]
    lines += [f"{row.plan}: {row.version}" for row in _first_of_each(rows) if row.version is not None]
    own = dict.fromkeys(short_name(row) for row in rows if short_name(row) != row.plan)
    if own:
        lines.append(f"transformers' own: {', '.join(own)}")
    if first.pass_k is not None:
        lines.append(f"pass@k of {first.pass_samples} samples for each of {first.pass_prompts} prompts")
    batches: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if row.skipped is not None:
            batches.setdefault((short_name(row), row.skipped), set()).add(row.batch)
    for (name, reason), sizes in batches.items():
        lines.append(f"not measured: {name} at batch {', '.join(map(str, sorted(sizes)))}: {reason}")
    return lines


def _first_of_each(rows: Sequence[BenchRow]) -> list[BenchRow]:
    return list({row.plan: row for row in reversed(rows)}.values())[::-1]


def _span(values: Sequence[float]) -> str:
    """The values in one word: `12` or `12 to 15`."""
    return (
        " to ".join(dict.fromkeys(f"{value:.0f}" for value in (min(values), max(values)))) if values else "no"
    )


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
