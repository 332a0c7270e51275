"""What the watch puts into a report: the run's story at its top, and cards of what is watched."""

import html
import itertools
from collections.abc import Sequence

from blockroll.bench.frontier import IN_WORDS, SweepRow, conclusion
from blockroll.rl_loops import cards
from blockroll.rl_loops.display import number
from blockroll.rl_loops.figures import SLATE, draw
from blockroll.rl_loops.watch import figures
from blockroll.rl_loops.watch.rows import Rows, TestEvidence, evidence_of, series, stretches
from blockroll.rl_loops.watch.story import Sentence

DIFFERENCE = tuple(f"drift/reward/{each}" for each in ("mean", "cs_low", "cs_high"))


def story_section(sentences: list[Sentence]) -> str:
    """The sentences by topic."""
    topics = "".join(
        f"<dt>{topic}</dt><dd>{''.join(_sentence(each) for each in some)}</dd>"
        for topic, some in itertools.groupby(sentences, key=lambda sentence: sentence.topic)
    )
    return f'<section class="card story"><h2>What happened</h2><dl>{topics}</dl></section>'


def _sentence(sentence: Sentence) -> str:
    kind = ' class="bad"' if sentence.is_alarm else ""
    return f"<p{kind}>{html.escape(sentence.text)}</p>"


def watch_cards(rows: Rows) -> list[str]:
    """Of what the rows have: evidence, reward difference, acceptance by position."""
    return [card for card in (_evidence(rows), _difference(rows), _positions(rows)) if card]


def _evidence(rows: Rows) -> str:
    tests = evidence_of(rows)
    if not tests:
        return ""
    curves = {test.name: _shares(rows, test.name) for test in tests}
    spoke = [float(row["step"]) for row in rows if row.get("guard/action")]
    plot = figures.shaded(figures.evidence(curves, spoke), stretches(rows))
    note = (
        "Log e of each test over its threshold: at 1, dashed, the test speaks; the most of it in the table. "
        "Dotted: the guard acted. Shaded: steps under its fallback."
    )
    return cards.card("Evidence", note, draw(plot), beside=_legend(tests))


def _shares(rows: Rows, test: str) -> list[tuple[float, float]]:
    thresholds = dict(series(rows, f"drift/{test}/threshold"))
    logs = series(rows, f"drift/{test}/log_e")
    return [(step, value / thresholds[step]) for step, value in logs if thresholds.get(step)]


def _legend(tests: list[TestEvidence]) -> str:
    """Of every test its colour, the most of its log e, its threshold, what it has seen, when it spoke."""
    head = "".join(f"<th>{each}</th>" for each in ("test", "log e", "limit", "n", "spoke"))
    rows = "".join(
        f'<tr><td><i class="swatch" style="background:{figures.colour_of(i)}"></i>'
        f"{html.escape(test.name)}</td>"
        f"<td>{number(test.highest, 1)}</td><td>{number(test.threshold, 1)}</td><td>{test.num_values}</td>"
        f"{_spoke(test)}</tr>"
        for i, test in enumerate(tests)
    )
    return f'<table class="legend"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _spoke(test: TestEvidence) -> str:
    return "<td>–</td>" if test.spoke_at is None else f'<td class="bad">{test.spoke_at}</td>'  # noqa: RUF001


def _difference(rows: Rows) -> str:
    found = [dict(series(rows, key)) for key in DIFFERENCE]
    steps = sorted(set.intersection(*(set(each) for each in found)))
    if not steps:
        return ""
    mean, low, high = ([(step, each[step]) for step in steps] for each in found)
    note = (
        "Mean reward under the law that was asked for minus under the lossless one, of shadow pairs; the "
        "band is a confidence sequence, which holds at all steps together."
    )
    plot = figures.shaded(figures.reward_difference(mean, low, high), stretches(rows))
    return cards.card("Reward difference", note, draw(plot))


def _positions(rows: Rows) -> str:
    plot = figures.acceptance_by_position(rows)
    if plot is None:
        return ""
    return cards.card(
        "Acceptance by position", "Of the drafts that were reached at each position.", draw(plot)
    )


def frontier_card(rows: Sequence[SweepRow]) -> str:
    """Of a sweep: what it concludes, reward against speed and against acceptance, and every point."""
    said = " ".join(html.escape(line) for line in conclusion(rows))
    note = (
        f"{said} Beside points: mix weights, 1 is lossless. Bars: the band of the reward difference to "
        "plain, drawn from plain's reward, dashed; dotted: what may be lost. A ring is around what is marked."
    )
    beside = draw(figures.frontier(rows, "acceptance")) + _points(rows)
    return cards.card("Frontier", note, draw(figures.frontier(rows, "speed")), beside=beside)


def _points(rows: Sequence[SweepRow]) -> str:
    """Of every point its line's colour, mix weight, reward, speed and what was found of it."""
    kinds = figures.sweep_lines(rows)
    found = {
        row: (label, figures.colour_of(i)) for i, (label, some) in enumerate(kinds.items()) for row in some
    }
    head = "".join(f"<th>{each}</th>" for each in ("point", "weight", "reward", "speed", "finding"))
    body = "".join(_point(row, *found.get(row, (row.plan, SLATE))) for row in rows)
    return f'<table class="legend"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _point(row: SweepRow, label: str, colour: str) -> str:
    return (
        f'<tr><td><i class="swatch" style="background:{colour}"></i>{html.escape(label)}</td>'
        f"<td>{row.mix_weight:g}</td><td>{number(row.reward)}</td>"
        f"<td>{number(row.speedup_over_plain, 2)}×</td>{_found(row)}</tr>"  # noqa: RUF001
    )


def _found(row: SweepRow) -> str:
    words = f"<b>{IN_WORDS[row.finding]}</b>" if row.is_marked else IN_WORDS[row.finding]
    return f'<td class="bad">{words}</td>' if row.finding == "refuted" else f"<td>{words}</td>"
