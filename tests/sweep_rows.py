"""Rows of a sweep, as they come out, without the sweep."""

import dataclasses

from blockroll.bench.frontier import Band, SweepRow, mark
from blockroll.bench.rows import Setting

SETTING = Setting(
    policy="tiny",
    device="cpu",
    dtype="float32",
    threads=1,
    cpu="a processor",
    commit=None,
    blockroll_version="0",
    torch_version="2",
    transformers_version="5",
)
BLANK = {field.name: None for field in dataclasses.fields(SweepRow)}
PLAIN = SweepRow(
    **{
        **BLANK,
        "plan": "plain",
        "law": "target",
        "mix_weight": 1.0,
        "temperature": 1.0,
        "batch": 8,
        "queue": 1,
        "max_tokens": 64,
        "task": "arithmetic",
        "num_prompts": 400,
        "samples": 4,
        "seed": 0,
        "reward_low": 0.0,
        "reward_high": 1.0,
        "max_loss": 0.05,
        "alpha": 0.05,
        "setting": SETTING,
        "reward": 0.5,
        "reward_cs_low": 0.45,
        "reward_cs_high": 0.55,
        "num_failed": 0,
        "mean_length": 20.0,
        "tokens_per_forward": 1.0,
        **dict.fromkeys(("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max"), 100.0),
        **dict.fromkeys(("speedup_over_plain", "speedup_min", "speedup_max"), 1.0),
        "speedup_all": (1.0, 1.0, 1.0),
        "finding": "open",
        "is_marked": False,
    }
)


def point(weight, speed, found, **changes):
    """A row of drafts that are mixed, with a band of its difference to plain."""
    return dataclasses.replace(
        PLAIN,
        plan="two_forward(8)",
        law="target" if weight == 1 else f"mixed({weight:g})",
        mix_weight=weight,
        speedup_over_plain=speed,
        speedup_min=speed - 0.1,
        speedup_max=speed + 0.1,
        speedup_all=(speed - 0.1, speed, speed + 0.1),
        acceptance_rate=0.9 - 0.3 * weight,
        reward=PLAIN.reward + found.mean,
        difference=found.mean,
        difference_cs_low=found.low,
        difference_cs_high=found.high,
        **changes,
    )


def band(mean, low, high):
    return Band(mean=mean, low=low, high=high)


def sweep_rows():
    """Every finding that there is of a mixed law."""
    return mark(
        [
            PLAIN,
            point(1.0, 1.5, band(0.0, -0.03, 0.03)),
            point(0.75, 1.8, band(-0.01, -0.03, 0.01)),
            point(0.5, 2.0, band(-0.01, -0.09, 0.07)),
            point(0.25, 3.0, band(-0.2, -0.25, -0.15)),
        ]
    )
