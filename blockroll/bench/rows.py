"""One row per subject and workload: its whole setting, and the figures of its waves."""

import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import blockroll
from blockroll.bench.pass_at_k import Passed
from blockroll.bench.subjects import Wave
from blockroll.kernels.processor import processor
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.trace import EngineTimes
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.types import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a measurement was taken."""

    policy: str  # as asked for: "tiny" or a folder
    device: str  # "cpu", or the accelerator's name
    dtype: str  # of weights and forward
    threads: int  # torch threads of this process
    cpu: str  # the processor's name, as the system has it
    commit: str | None  # of the source tree; None outside one
    blockroll_version: str
    torch_version: str
    transformers_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One subject under one workload. Figures are None where a subject has no such figure or was skipped."""

    plan: str  # a plan's name, `transformers_...` or `vllm...`
    law: str  # of its requests
    batch: int  # requests decoded together
    temperature: float  # 0 is greedy
    prompts: str  # `text`, `text cut to length` or `random`
    prompt_tokens: int | None  # the length that was asked for; None: as long as each prompt is
    context: int  # prompt tokens, median
    max_tokens: int  # completion length at most
    ignore_eos: bool  # every completion goes on to its length
    workload: str  # `even`, `grouped` or `skewed`
    siblings: int | None  # rollouts of each prompt; None: not grouped
    epochs: int | None  # times that a repeat goes through its prompts; None: not grouped
    repeats: int
    rollouts: int  # of one repeat
    queue: int  # rollouts submitted together for each place in the batch
    seed: int
    setting: Setting
    version: str | None = None  # of an engine with an environment of its own; None: the setting says it
    skipped: str | None = None  # why it was not measured; None if it was
    setup_s: float | None = None  # start, load, compilation and a first wave: in no other figure

    tokens_per_s: float | None = None  # median over repeats
    tokens_per_s_min: float | None = None
    tokens_per_s_max: float | None = None
    tokens_per_s_all: tuple[float, ...] = ()  # in the order of repeats
    speedup_over_plain: float | None = None  # median of the repeats' ratios; None if plain was not measured
    speedup_min: float | None = None
    speedup_max: float | None = None
    tokens_per_cpu_s: float | None = None  # by processor time of all threads; median over repeats
    tokens_per_cpu_s_min: float | None = None
    tokens_per_cpu_s_max: float | None = None
    tokens_per_cpu_s_all: tuple[float, ...] = ()  # in the order of repeats
    cpu_speedup_over_plain: float | None = None  # median of the repeats' ratios of processor time
    # Entry i is epoch i + 1, median over repeats; None: not grouped.
    tokens_per_s_by_epoch: tuple[float, ...] | None = None
    tokens_per_cpu_s_by_epoch: tuple[float, ...] | None = None
    latency_ms_p50: float | None = None  # of a request, from submission to its end; over all repeats
    latency_ms_p95: float | None = None
    latency_ms_p99: float | None = None
    host_ms_per_step: float | None = None  # everything but forward and sampler; prefill excluded
    forward_ms_per_step: float | None = None
    sampler_ms_per_step: float | None = None
    num_tokens: int | None = None  # committed in all repeats
    mean_length: float | None = None  # tokens per completion
    tokens_per_forward: float | None = None  # over all repeats; prefill excluded
    share_by_plan: dict[str, float] | None = None  # of the steps of single requests
    acceptance_rate: float | None = None  # over all repeats
    # Entry i is draft i + 1 of a step; over all repeats.
    acceptance_by_position: tuple[float | None, ...] | None = None  # accepted / reached
    accepted_at_least: tuple[float | None, ...] | None = None  # share of steps that accept i + 1 or more
    num_verify_steps: int | None = None  # behind the two
    pass_at_1: float | None = None  # mean over the judged prompts
    pass_at_k: float | None = None
    pass_k: int | None = None
    pass_samples: int | None = None  # of each prompt
    pass_prompts: int | None = None


def to_record(row: BenchRow) -> dict[str, Any]:
    """The row as one flat JSON object."""
    record = asdict(row)
    setting = record.pop("setting")
    return {**record, **setting}


def with_speed(row: BenchRow, repeats: Sequence[Sequence[Wave]], plain: Sequence[Sequence[Wave]]) -> BenchRow:
    """The row with what its waves measured, each repeat against plain's same repeat (none: no ratios)."""
    speeds, cpu_speeds = ([_tokens_per(time, waves) for waves in repeats] for time in (_wall_s, _cpu_s))
    ratios, cpu_ratios = (
        [speed / _tokens_per(time, waves) for speed, waves in zip(all_speeds, plain, strict=bool(plain))]
        for time, all_speeds in ((_wall_s, speeds), (_cpu_s, cpu_speeds))
    )
    waves = [wave for repeat in repeats for wave in repeat]
    rollouts = [rollout for wave in waves for rollout in wave.rollouts or ()]
    latencies_ms = [1000 * latency for wave in waves for latency in wave.latencies_s]
    num_tokens = sum(wave.num_tokens for wave in waves)
    counts = counted(rollout.stats.steps for rollout in rollouts)
    acceptance = AcceptanceByPosition(counts)
    steps: Counter[str] = Counter()
    for step, count in counts.items():
        steps[step.plan.name] += count
    return replace(
        row,
        tokens_per_s=statistics.median(speeds),
        tokens_per_s_min=min(speeds),
        tokens_per_s_max=max(speeds),
        tokens_per_s_all=tuple(speeds),
        speedup_over_plain=statistics.median(ratios) if ratios else None,
        speedup_min=min(ratios, default=None),
        speedup_max=max(ratios, default=None),
        tokens_per_cpu_s=statistics.median(cpu_speeds),
        tokens_per_cpu_s_min=min(cpu_speeds),
        tokens_per_cpu_s_max=max(cpu_speeds),
        tokens_per_cpu_s_all=tuple(cpu_speeds),
        cpu_speedup_over_plain=statistics.median(cpu_ratios) if cpu_ratios else None,
        tokens_per_s_by_epoch=_by_epoch(row, repeats, _wall_s),
        tokens_per_cpu_s_by_epoch=_by_epoch(row, repeats, _cpu_s),
        latency_ms_p50=percentile(latencies_ms, 50),
        latency_ms_p95=percentile(latencies_ms, 95),
        latency_ms_p99=percentile(latencies_ms, 99),
        host_ms_per_step=_ms_per_step(repeats, lambda times: times.host_s),
        forward_ms_per_step=_ms_per_step(repeats, lambda times: times.forward_s),
        sampler_ms_per_step=_ms_per_step(repeats, lambda times: times.sampler_s),
        num_tokens=num_tokens,
        mean_length=num_tokens / len(latencies_ms),
        tokens_per_forward=_ratio(
            sum(len(rollout.token_ids) for rollout in rollouts),
            sum(rollout.stats.num_forwards for rollout in rollouts),
        ),
        share_by_plan={name: count / steps.total() for name, count in steps.most_common()} or None,
        acceptance_rate=_ratio(
            sum(rollout.stats.num_accepted for rollout in rollouts),
            sum(rollout.stats.num_drafted for rollout in rollouts),
        ),
        acceptance_by_position=acceptance.conditional or None,
        accepted_at_least=acceptance.at_least or None,
        num_verify_steps=acceptance.num_steps or None,
    )


def with_passed(row: BenchRow, passed: Passed) -> BenchRow:
    """The row with pass@1 and pass@k."""
    return replace(
        row,
        pass_at_1=passed.at_1,
        pass_at_k=passed.at_k,
        pass_k=passed.k,
        pass_samples=passed.samples,
        pass_prompts=passed.prompts,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of 100 values do not exceed: always one that was observed.

    Source: Hyndman & Fan 1996, "Sample Quantiles in Statistical Packages", definition 1.
    """
    ordered = sorted(values)
    rank = max(1, -(-percent * len(ordered) // 100))  # rounded up, in whole numbers
    return ordered[rank - 1]


def describe_setting(policy: HFPolicy, policy_path: str) -> Setting:
    """Machine and versions, as recorded in every row."""
    device = policy.device
    return Setting(
        policy=policy_path,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(policy.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        cpu=processor(),
        commit=_commit(),
        blockroll_version=blockroll.__version__,
        torch_version=torch.__version__,
        transformers_version=version("transformers"),
    )


def _by_epoch(
    row: BenchRow, repeats: Sequence[Sequence[Wave]], time: Callable[[Wave], float]
) -> tuple[float, ...] | None:
    """Tokens per second of each epoch, which is a wave, median over repeats."""
    if row.epochs is None:
        return None
    return tuple(
        statistics.median(_tokens_per(time, [waves[epoch]]) for waves in repeats)
        for epoch in range(row.epochs)
    )


def _wall_s(wave: Wave) -> float:
    return wave.duration_s


def _cpu_s(wave: Wave) -> float:
    return wave.cpu_s


def _tokens_per(time: Callable[[Wave], float], waves: Sequence[Wave]) -> float:
    """Tokens per second of a kind of time."""
    return sum(wave.num_tokens for wave in waves) / sum(map(time, waves))


def _ms_per_step(repeats: Sequence[Sequence[Wave]], part: Callable[[EngineTimes], float]) -> float | None:
    """Median over repeats of one part's milliseconds per step."""
    figures = []
    for waves in repeats:
        times = [wave.times for wave in waves if wave.times is not None]
        figure = _ratio(1000 * sum(map(part, times)), sum(each.num_steps for each in times))
        if figure is not None:
            figures.append(figure)
    return statistics.median(figures) if figures else None


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, with `+changes` if it was edited."""
    root = Path(blockroll.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
