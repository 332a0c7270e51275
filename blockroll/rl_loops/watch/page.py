"""What the watch puts into a report: the run's story at its top, and cards of what is watched."""

import html
import itertools

from blockroll.rl_loops import cards
from blockroll.rl_loops.display import number
from blockroll.rl_loops.figures import draw
from blockroll.rl_loops.watch import figures
from blockroll.rl_loops.watch.rows import Evidence, Rows, evidence_of, series, stretches
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


def _legend(tests: list[Evidence]) -> str:
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


def _spoke(test: Evidence) -> str:
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
