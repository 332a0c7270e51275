"""What happened in a run, in sentences, from rows of metrics.jsonl: for a page as for a terminal."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from blockroll.rl_loops.display import number
from blockroll.rl_loops.watch.rows import (
    Rows,
    Stretch,
    counted,
    evaluations,
    evidence_of,
    is_guarded,
    series,
    stretches,
)

Topic = Literal["Progress", "Reward", "Drafts", "Speed", "Guard", "Losses"]
MOST_WORDS_OF_GUARD = 6  # what it said first, and the last of it
ENDS = 5  # steps that a mean at either end of a run is taken over
AROUND = 10  # steps before a fallback, and the last ones under it, whose rewards are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One thing that happened."""

    topic: Topic
    text: str
    is_alarm: bool = False  # the guard spoke, or something was lost


def story(rows: Rows, *, speed: Rows = (), asked_steps: int | None = None) -> list[Sentence]:
    """A run in sentences: how far, reward, drafts, speed, what the guard said and did, what was lost.

    `rows` has at least one; `speed` are rows of a bench run beside it.
    """
    return [
        Sentence(topic="Progress", text=_progress(rows, asked_steps)),
        *(Sentence(topic="Reward", text=text) for text in _reward(rows)),
        Sentence(topic="Drafts", text=_drafts(rows)),
        Sentence(topic="Speed", text=_speed(rows, speed)),
        *_guard(rows),
        *_losses(rows),
    ]


def last_words(rows: Rows) -> tuple[int, str] | None:
    """The step after which the guard last spoke, and what it said."""
    said = [(int(row["step"]), row["guard/said"]) for row in rows if row.get("guard/said")]
    return said[-1] if said else None


def speed_ratios(speed: Rows) -> list[tuple[int, str, float]]:
    """(batch, plan, times plain's tokens per second), the smallest batch first."""
    cells = {(row["plan"], row["batch"]): float(row["tokens_per_s"]) for row in speed}
    return sorted(
        (batch, plan, value / cells["plain", batch])
        for (plan, batch), value in cells.items()
        if plan != "plain" and cells.get(("plain", batch))
    )


def _progress(rows: Rows, asked_steps: int | None) -> str:
    done = int(rows[-1]["step"])
    times = [seconds for _, seconds in series(rows, "step_time")]
    took = f" They took {duration(sum(times))}, without evaluations and checkpoints." if times else ""
    asked = f" of {asked_steps}" if asked_steps is not None and done < asked_steps else ""
    return f"{done}{asked} steps are done.{took}"


def _reward(rows: Rows) -> Iterator[str]:
    held_out, train = evaluations(rows), series(rows, "reward")
    if len(held_out) > 1:
        yield f"On held-out prompts it went from {number(held_out[0][1])} to {number(held_out[-1][1])}."
    if train:
        first, last, over = _ends([value for _, value in train])
        yield f"On training prompts it went from {number(first)} to {number(last)}{over}."
    if missing := len(rows) - len(train):
        yield f"{_some(missing, 'step')} had no rollout with a reward."
    if useless := sum(1 for _, share in series(rows, "frac_reward_zero_std") if share == 1):
        yield f"In {_some(useless, 'step')} every group was rewarded alike, which teaches nothing."


def _drafts(rows: Rows) -> str:
    accepted = [value for _, value in series(rows, "rollout/acceptance_rate")]
    if not accepted:
        return "None were made: every rollout was decoded plain."
    first, last, over = _ends(accepted)
    text = f"Of those submitted {number(first, 2)} were accepted at first, {number(last, 2)} at last{over}"
    tokens = [value for _, value in series(rows, "rollout/tokens_per_forward")]
    if tokens:
        first, last, _ = _ends(tokens)
        text += f"; a forward brought {number(first, 2)} tokens at first, {number(last, 2)} at last"
    return f"{text}."


def _speed(rows: Rows, speed: Rows) -> str:
    if ratios := speed_ratios(speed):
        said = [f"{plan} {ratio:.2f} at batch {batch}" for batch, plan, ratio in ratios]
        return f"Measured in times plain's tokens per second: {', '.join(said)}."
    achieved = series(rows, "rollout/speedup_achieved")
    if achieved:
        return f"Steps brought {number(achieved[-1][1], 2)} times the tokens per second of plain ones."
    return "Not measured against plain."


def _guard(rows: Rows) -> Iterator[Sentence]:
    if not is_guarded(rows):
        yield Sentence(topic="Guard", text="None watched this run.")
        return
    spoke = [row for row in rows if row.get("guard/said") or row.get("guard/action")]
    if not spoke:
        yield Sentence(topic="Guard", text=_silence(rows))
    left_out = len(spoke) - MOST_WORDS_OF_GUARD
    for i, row in enumerate(spoke):
        if 0 <= i - (MOST_WORDS_OF_GUARD - 1) < left_out:
            if i == MOST_WORDS_OF_GUARD - 1:
                yield Sentence(topic="Guard", text=f"It spoke {_some(left_out, 'more time')}.", is_alarm=True)
            continue
        said = row.get("guard/said") or f"it chose {row['guard/action']}"
        text = f"After step {row['step']:.0f}: {said.rstrip('.')}."
        yield Sentence(topic="Guard", text=text, is_alarm=row.get("guard/action") not in (None, "lift"))
    for stretch in stretches(rows):
        yield Sentence(topic="Guard", text=_fallback(rows, stretch))
    if shadow := _shadow(rows):
        yield Sentence(topic="Guard", text=shadow)


def _silence(rows: Rows) -> str:
    tests = evidence_of(rows)
    if not tests:
        return "It had no data for any test."
    nearest = tests[0]
    return (
        f"It watched {_some(len(tests), 'test')} and had nothing to say. Nearest was {nearest.name}: "
        f"log e at most {number(nearest.highest, 2)} of {number(nearest.threshold, 2)} after "
        f"{nearest.num_values} values."
    )


def _fallback(rows: Rows, stretch: Stretch) -> str:
    until = "to the end" if stretch.last == rows[-1]["step"] else "then as asked again"
    steps = (
        f"step {stretch.first}"
        if stretch.first == stretch.last
        else f"steps {stretch.first} to {stretch.last}"
    )
    text = f"Rollouts of {steps} were drawn {stretch.mode}, {until}."
    reward = series(rows, "reward")
    before = [value for step, value in reward if stretch.first - AROUND <= step < stretch.first]
    under = [value for step, value in reward if stretch.first <= step <= stretch.last][-AROUND:]
    if before and under:
        text += (
            f" Reward was {number(statistics.fmean(before))} in the {_some(len(before), 'step')} before, "
            f"{number(statistics.fmean(under))} in the last {_some(len(under), 'step')} of these."
        )
    return text


def _shadow(rows: Rows) -> str | None:
    seconds = sum(value for _, value in series(rows, "shadow/duration_s"))
    generating = sum(value for _, value in series(rows, "rollout/duration_s"))
    rollouts = sum(value for _, value in series(rows, "shadow/num_rollouts"))
    if not rollouts:
        return None
    share = f" beside {duration(generating)} of all others" if generating else ""
    text = f"{rollouts:.0f} shadow rollouts took {duration(seconds)}{share}."
    means = series(rows, "drift/reward/mean")
    low, high = series(rows, "drift/reward/cs_low"), series(rows, "drift/reward/cs_high")
    if means and low and high:
        text += (
            " By them reward under the law that was asked for differs from lossless by "
            f"{means[-1][1]:+z.3f}, between {low[-1][1]:+z.3f} and {high[-1][1]:+z.3f}."
        )
    return text


def _losses(rows: Rows) -> Iterator[Sentence]:
    known = [
        (count, text.format(_some(int(count), what)))
        for key, what, text in (
            ("rollout/failed_total", "rollout", "{} failed"),
            ("reward/failed_total", "rollout", "{} got no reward, because it failed"),
            ("update/skipped_total", "optimizer step", "{} left out, for a gradient that was not finite"),
            (
                "sync/checksum_fail_total",
                "weight update",
                "{} refused by a replica",
            ),
            ("engine/redispatch_total", "request", "{} drawn again by another replica, with the same seeds"),
        )
        if (count := counted(rows, key)) is not None
    ]
    if not known:
        yield Sentence(topic="Losses", text="Not recorded.")
        return
    lost = [text for count, text in known if count]
    for text in lost:
        yield Sentence(topic="Losses", text=f"{text}.", is_alarm=True)
    if not lost:
        yield Sentence(topic="Losses", text="None: nothing failed, was refused or had to be drawn again.")


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _ends(values: list[float]) -> tuple[float, float, str]:
    """Means of the first and the last steps, as many as do not overlap, and words for over how many."""
    count = min(ENDS, max(1, len(values) // 2))
    over = f" (means of the first and the last {count} steps)" if count > 1 else ""
    return statistics.fmean(values[:count]), statistics.fmean(values[-count:]), over


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
