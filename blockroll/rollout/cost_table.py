"""What a decoding step costs: seconds by plan and by bucket of batch and context, kept between processes.

The figures belong to one kind of model on one kind of machine; the file's name is a hash of both. They are
measurements, so a file that is lost or damaged costs nothing but measuring again.
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

from blockroll.types import Plan

logger = logging.getLogger(__name__)

_SAMPLES_KEPT = 8  # per plan and bucket, the newest
_SHORTEST_CONTEXT = 64  # below, a step costs the same


class Bucket(NamedTuple):
    """Steps of about equal cost: batch and context rounded up to powers of two."""

    batch_size: int
    context: int

    @classmethod
    def of(cls, batch_size: int, context: int) -> "Bucket":
        """The bucket of a step with so many requests, the longest of `context` tokens."""
        return cls(_next_power(batch_size), max(_SHORTEST_CONTEXT, _next_power(context)))


class CostTable:
    """Seconds per step, as the median of the newest samples of each plan in each bucket."""

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
            for name, buckets in kept["seconds_per_step"].items():
                plan = Plan.parse(name, default_drafts=1)
                for text, samples in buckets.items():
                    batch_size, context = map(int, text.split("x"))
                    for seconds in samples:
                        if not 0 < seconds < math.inf:
                            raise ValueError(f"{name} at {text} took {seconds} seconds")
                        table.add(plan, Bucket(batch_size, context), seconds)
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
            "seconds_per_step": {
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

    def add(self, plan: Plan, bucket: Bucket, seconds: float) -> None:
        """Count one more step."""
        samples = self._samples.setdefault(plan, {}).setdefault(bucket, deque(maxlen=_SAMPLES_KEPT))
        samples.append(seconds)
        self._medians.setdefault(plan, {})[bucket] = statistics.median(samples)

    def seconds(self, plan: Plan, bucket: Bucket) -> float | None:
        """Seconds per step; None if there is no sample."""
        return self._medians.get(plan, {}).get(bucket)

    def num_samples(self, plan: Plan, bucket: Bucket) -> int:
        """Samples behind that figure."""
        return len(self._samples.get(plan, {}).get(bucket, ()))

    def forget(self, plan: Plan) -> None:
        """Drop every sample of a plan."""
        self._samples.pop(plan, None)
        self._medians.pop(plan, None)


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
