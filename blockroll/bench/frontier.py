"""What a sweep finds: what each point earns less than plain decoding, and the fastest that loses little.

Law: share_i is the mean reward of prompt i under one point, scaled to [0, 1] by bounds that are fixed
beforehand, a failed reward as the lower one. Of a point and of plain at the same temperature

    y_i = (1 + share_i - plain_i) / 2,      in [0, 1], of mean 1/2 where both earn the same,

and a confidence sequence bounds the mean of y over prompts that come in an order drawn by the seed. Each of
the M points that a sweep compares has alpha / M, so all differences lie in their bands together with
probability 1 - alpha, and choosing among them costs nothing. Bands of rewards hold each by itself.

A lossless point loses nothing by its law; its band is a check of that. A band without 0 refutes it.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from blockroll.bench.rows import Setting
from blockroll.errors import InvalidInput
from blockroll.rollout.calibration.confidence import ConfidenceSequence

Finding = Literal["lossless", "refuted", "within", "open", "loses"]
IN_WORDS: Mapping[Finding, str] = {
    "lossless": "lossless",  # by its law, and nothing speaks against it
    "refuted": "NOT LOSSLESS",  # by its law, but its reward is another than plain's
    "within": "within the loss",  # the lower end of its band is
    "open": "cannot be told",
    "loses": "loses more",  # even the upper end of its band
}
HARMLESS: tuple[Finding, ...] = ("lossless", "within")


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A mean and what it lies in."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """One point of a sweep. Figures of drafts are None where none were drafted."""

    plan: str
    law: str
    mix_weight: float  # 1: lossless
    temperature: float  # 0 is greedy
    draft_temperature: float | None  # None: as `temperature`, or no draft is drawn
    batch: int  # requests decoded together
    queue: int  # rollouts submitted together for each place in the batch
    max_tokens: int  # completion length at most
    task: str  # whose reward it is
    num_prompts: int
    samples: int  # rollouts of each prompt, each in a repeat of its own
    seed: int
    reward_low: float  # the bounds that rewards are scaled by
    reward_high: float
    max_loss: float  # as a share of what lies between them
    alpha: float  # that any band of a difference of this sweep misses its mean; of a reward's own band
    setting: Setting
    reward: float  # mean over prompts
    reward_cs_low: float
    reward_cs_high: float
    num_failed: int  # rollouts without a reward: they count as the lower bound
    difference: float | None  # of mean reward to plain at the same temperature; None: it is plain
    difference_cs_low: float | None
    difference_cs_high: float | None
    acceptance_rate: float | None
    tokens_per_forward: float | None  # prefill excluded
    mean_length: float  # tokens per completion
    tokens_per_s: float  # median over repeats
    tokens_per_s_min: float
    tokens_per_s_max: float
    speedup_over_plain: float  # median of the repeats' ratios to plain at the same temperature
    speedup_min: float
    speedup_max: float
    speedup_all: tuple[float, ...]  # in the order of repeats
    finding: Finding = "open"
    is_marked: bool = False  # the fastest at its temperature that loses at most `max_loss`

    @property
    def label(self) -> str:
        """The point in words, at its temperature."""
        parts = [self.plan]
        if self.mix_weight < 1:
            parts.append(f"at mix weight {self.mix_weight:g}")
        if self.draft_temperature is not None:
            parts.append(f"with drafts at temperature {self.draft_temperature:g}")
        return " ".join(parts)

    @property
    def range(self) -> float:
        """What lies between the bounds of a reward."""
        return self.reward_high - self.reward_low


class RewardsByPrompt:
    """Rewards of one point, each with the prompt that it answers."""

    def __init__(self, *, low: float, high: float) -> None:
        self.num_failed = 0
        self._low, self._high = low, high
        self._shares: dict[int, list[float]] = {}

    def add(self, prompt: int, reward: float) -> None:
        """Of one rollout; NaN: it has none. InvalidInput for one beyond the bounds, which void bands."""
        if math.isnan(reward):
            self.num_failed += 1
            reward = self._low
        if not self._low <= reward <= self._high:
            raise InvalidInput(
                f"a reward of {reward:g} lies outside {self._low:g} to {self._high:g}: bands need the bounds "
                "of rewards beforehand, give them by --reward-low and --reward-high"
            )
        share = (reward - self._low) / (self._high - self._low)
        self._shares.setdefault(prompt, []).append(share)

    def band(self, order: Sequence[int], *, alpha: float) -> Band:
        """Of the mean reward, in its own unit; prompts in this order."""
        shares = self._means()
        found = _bounded((shares[prompt] for prompt in order), alpha)
        return _scaled(found, self._high - self._low, self._low)

    def difference(self, plain: "RewardsByPrompt", order: Sequence[int], *, alpha: float) -> Band:
        """Of the mean difference to plain, in the unit of rewards, paired by prompt."""
        ours, theirs = self._means(), plain._means()
        found = _bounded(((1 + ours[prompt] - theirs[prompt]) / 2 for prompt in order), alpha)
        scale = 2 * (self._high - self._low)
        return _scaled(found, scale, -scale / 2)

    def _means(self) -> dict[int, float]:
        counts = {len(shares) for shares in self._shares.values()}
        assert len(counts) == 1, f"every prompt has equally many rollouts, got {counts}"
        return {prompt: statistics.fmean(shares) for prompt, shares in self._shares.items()}


def _bounded(values: Iterable[float], alpha: float) -> Band:
    sequence = ConfidenceSequence(alpha)
    for value in values:
        sequence.add(min(max(value, 0.0), 1.0))  # beyond by rounding alone
    return Band(mean=sequence.mean, low=sequence.low, high=sequence.high)


def _scaled(band: Band, scale: float, offset: float) -> Band:
    return Band(
        mean=offset + scale * band.mean, low=offset + scale * band.low, high=offset + scale * band.high
    )


def mark(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows with what was found of each, and at each temperature the fastest harmless one marked."""
    found = [replace(row, finding=_finding(row)) for row in rows]
    fastest = {_fastest(some) for some in _by_temperature(found)}
    return [replace(row, is_marked=row in fastest) for row in found]


def _finding(row: SweepRow) -> Finding:
    if row.difference_cs_low is None or row.difference_cs_high is None:
        return "lossless"
    if row.mix_weight == 1:
        return "lossless" if row.difference_cs_low <= 0 <= row.difference_cs_high else "refuted"
    edge = -row.max_loss * row.range
    if row.difference_cs_low >= edge:
        return "within"
    return "loses" if row.difference_cs_high < edge else "open"


def _fastest(rows: Iterable[SweepRow]) -> SweepRow:
    """Plain is always among the harmless ones."""
    return max((row for row in rows if row.finding in HARMLESS), key=lambda row: row.speedup_over_plain)


def prompts_needed(row: SweepRow) -> int | None:
    """About how many prompts would put the band within the loss, if the difference stays as it is.

    None where it lies beyond. A band is about as wide as one over the root of the number of prompts.
    """
    if row.difference is None or row.difference_cs_low is None:
        return 0
    room = row.difference + row.max_loss * row.range
    if room <= 0:
        return None
    return math.ceil(row.num_prompts * ((row.difference - row.difference_cs_low) / room) ** 2)


def conclusion(rows: Sequence[SweepRow]) -> list[str]:
    """A line for each temperature: the marked point, what it costs, and why faster ones are not marked."""
    return [_concluded(some) for some in _by_temperature(rows)]


def _concluded(rows: Sequence[SweepRow]) -> str:
    best = next(row for row in rows if row.is_marked)
    speed = f"{best.speedup_over_plain:.2f}x plain ({best.speedup_min:.2f} to {best.speedup_max:.2f})"
    said = (
        f"Temperature {best.temperature:g}: the fastest that loses at most {best.max_loss:g} of the reward's "
        f"range is {best.label}, {speed}"
    )
    if best.finding == "within":
        said += f", reward {best.reward:.3f}, {_difference(best)} against plain's"
    elif best.difference is not None:
        said += ", lossless by its law"
    faster = [row for row in rows if row.speedup_over_plain > best.speedup_over_plain]
    reasons = [_why_not(row) for row in sorted(faster, key=lambda row: -row.speedup_over_plain)]
    reasons += [_why_not(row) for row in rows if row.finding == "refuted" and row not in faster]
    return ". Not marked: ".join([said, "; ".join(reasons)] if reasons else [said]) + "."


def _why_not(row: SweepRow) -> str:
    name = f"{row.label} ({row.speedup_over_plain:.2f}x)"
    if row.finding == "refuted":
        return f"{name}, which should be lossless and is not, {_difference(row)}: run `blockroll doctor`"
    if row.finding == "loses":
        return f"{name}, which loses more, {_difference(row)}"
    needed = prompts_needed(row)
    advice = "it did lose more on average" if needed is None else f"about {max(needed, 2):,} prompts could"
    return f"{name}, of which {row.num_prompts:,} prompts cannot tell, {_difference(row)}; {advice}"


def _difference(row: SweepRow) -> str:
    return f"{row.difference:+.3f} ({row.difference_cs_low:+.3f} to {row.difference_cs_high:+.3f})"


def _by_temperature(rows: Sequence[SweepRow]) -> Iterator[list[SweepRow]]:
    for _, some in itertools.groupby(rows, key=lambda row: row.temperature):
        yield list(some)


def to_record(row: SweepRow) -> dict[str, Any]:
    """The row as one flat JSON object."""
    record = asdict(row)
    setting = record.pop("setting")
    return {**record, **setting}


def from_record(record: Mapping[str, Any]) -> SweepRow:
    """What `to_record` gave; InvalidInput names what is missing."""
    try:
        setting = Setting(**{each.name: record[each.name] for each in fields(Setting)})
        own = {each.name: record[each.name] for each in fields(SweepRow) if each.name != "setting"}
    except KeyError as error:
        raise InvalidInput(
            f"a row of a sweep has no {error}: it needs rows that `blockroll bench --sweep --json FILE` of "
            "this version wrote"
        ) from None
    return SweepRow(**{**own, "speedup_all": tuple(own["speedup_all"])}, setting=setting)
