"""What a decoding step costs, in plain steps, by plan and by bucket of batch and context.

A figure is the time of a step over that of the plain steps around it: machines speed up and slow down, and
leave a ratio alone. The table is kept between processes, for one kind of model on one kind of machine; its
name is a hash of both. A file that is lost or damaged costs nothing but measuring again.
"""

import contextlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections import deque
from pathlib import Path
from typing import NamedTuple, Self

from blockroll.types import PLAIN, Plan

logger = logging.getLogger(__name__)

SAMPLES_KEPT = 12  # per plan and bucket, the newest
_KEY = "plain_steps_per_step"
_SHORTEST_CONTEXT = 64  # below, a step costs the same


class Bucket(NamedTuple):
    """Steps of about equal cost: batch and context rounded up to powers of two."""

    batch_size: int
    context: int

    @classmethod
    def of(cls, batch_size: int, context: int) -> "Bucket":
        """The bucket of a step with so many requests, the longest of `context` tokens."""
        return cls(_next_power(batch_size), max(_SHORTEST_CONTEXT, _next_power(context)))

    def neighbours(self) -> tuple["Bucket", ...]:
        """The buckets that differ by one step, the likeliest to cost the same first."""
        batch_size, context = self
        return (
            Bucket(batch_size, context // 2),
            Bucket(batch_size, context * 2),
            Bucket(batch_size * 2, context),
            Bucket(batch_size // 2, context),
        )


class CostTable:
    """Plain steps that one step takes, as the median of the newest samples of each plan in each bucket."""

    def __init__(self, path: Path | None = None) -> None:
        """An empty table; `save` writes it to `path`, or nowhere."""
        self.path = path
        self._samples: dict[Plan, dict[Bucket, deque[float]]] = {}
        self._medians: dict[Plan, dict[Bucket, float]] = {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """The table kept at `path`; empty where there is none. A damaged file is ignored with a warning."""
        table = cls(path)
        try:
            kept = json.loads(path.read_text())
            for name, buckets in kept[_KEY].items():
                plan = Plan.parse(name, default_drafts=1, drafters=None)
                for text, samples in buckets.items():
                    batch_size, context = map(int, text.split("x"))
                    for cost in samples:
                        if not 0 < cost < math.inf:
                            raise ValueError(f"{name} at {text} took {cost} plain steps")
                        table.add(plan, Bucket(batch_size, context), cost)
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as damage:
            logger.warning("ignoring the damaged cost table %s, plans are measured again: %s", path, damage)
            return cls(path)
        return table

    def save(self) -> None:
        """Replace the file in one move, so that a reader never sees half of it."""
        if self.path is None:
            return
        kept = {
            _KEY: {
                plan.name: {f"{b.batch_size}x{b.context}": [*samples] for b, samples in buckets.items()}
                for plan, buckets in self._samples.items()
            }
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, json.dumps(kept, indent=1))
        except OSError as refusal:
            logger.warning(
                "the cost table %s cannot be written, this process keeps its own: %s", self.path, refusal
            )
            self.path = None

    def add(self, plan: Plan, bucket: Bucket, cost: float) -> None:
        """Count one more step, that took `cost` times as long as the plain steps around it."""
        samples = self._samples.setdefault(plan, {}).setdefault(bucket, deque(maxlen=SAMPLES_KEPT))
        samples.append(cost)
        self._medians.setdefault(plan, {})[bucket] = statistics.median(samples)

    def cost(self, plan: Plan, bucket: Bucket) -> float:
        """Plain steps that one step takes: as measured, or else as its rows and forwards let expect.

        Of a plain step a share grows with the rows and the rest comes with every forward, so a step of f
        forwards and r rows in all takes f + (r - f) share plain steps. What was measured in the bucket gives
        the share, or else a bucket next to it; where nothing is known rows are taken to cost nothing.
        """
        measured = self._medians.get(plan, {}).get(bucket)
        if measured is not None or plan == PLAIN:
            return measured or 1.0
        forwards, rows = _forwards_and_rows(plan)
        near = (self._row_share(each) for each in (bucket, *bucket.neighbours()))
        share = next((share for share in near if share is not None), 0.0)
        return forwards + (rows - forwards) * share

    def _row_share(self, bucket: Bucket) -> float | None:
        """The share of a plain step that grows with its rows; None if no plan was measured there."""
        shares = []
        for plan, medians in self._medians.items():
            if bucket in medians:
                forwards, rows = _forwards_and_rows(plan)
                shares.append(max(0.0, medians[bucket] - forwards) / (rows - forwards))
        return statistics.median(shares) if shares else None

    def num_samples(self, plan: Plan, bucket: Bucket) -> int:
        """Samples behind the cost; 0 if it is only expected."""
        return len(self._samples.get(plan, {}).get(bucket, ()))

    def is_measured_near(self, plan: Plan, bucket: Bucket) -> bool:
        """Whether the plan was measured in a bucket next to this one."""
        return any(self.num_samples(plan, near) for near in bucket.neighbours())


def _forwards_and_rows(plan: Plan) -> tuple[int, int]:
    return plan.forwards_per_step, plan.forwards_per_step * plan.rows_per_forward


def _next_power(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 1 else 1


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
