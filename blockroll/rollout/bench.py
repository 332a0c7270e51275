"""Speed of decoding plans, measured against each other in one run.

Within a repeat every subject decodes the same prompts with the same seeds, one subject after the other
(ABAB...), so that a machine that slows down slows all of them. A repeat decodes its rollouts in waves of
`batch` requests that are submitted together and drained; its speed is committed tokens over wall time,
prefill included. Reported are medians over repeats with all values beside them; the first round of every
subject is a warm-up and not counted.
"""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

import blockroll
from blockroll.errors import InvalidInput, NonFiniteLogits
from blockroll.policies.hf import HFPolicy, load_model, resolve_checkpoint
from blockroll.policies.reference import generate_stock
from blockroll.rollout.engine import Engine, EngineTimes
from blockroll.rollout.planner import Planner
from blockroll.types import PLAIN, Plan, Request, Rollout, Sampling

TRANSFORMERS = "transformers_generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    batches: tuple[int, ...] = (1, 8, 64)  # requests decoded together
    repeats: int = 5  # measured rounds of each cell
    rollouts: int = 8  # rollouts of one repeat at least; small batches take several waves
    max_tokens: int = 64  # completion length at most
    temperature: float = 1.0  # 0 is greedy
    ignore_eos: bool = False  # every completion has max_tokens tokens
    seed: int = 0  # of the requests

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InvalidInput(f"batch sizes must be at least 1, got {list(self.batches)}")
        if self.repeats < 1 or self.rollouts < 1:
            raise InvalidInput(
                f"repeats and rollouts must be at least 1, got {self.repeats} and {self.rollouts}"
            )

    @property
    def sampling(self) -> Sampling:
        """How every measured request is sampled."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a measurement was taken."""

    policy: str  # as asked for: "tiny" or a folder
    device: str  # "cpu", or the accelerator's name
    dtype: str  # of weights and forward
    threads: int  # torch threads of this process
    commit: str | None  # of the source tree; None outside one
    blockroll_version: str
    torch_version: str
    transformers_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One cell: a subject at a batch size. None where a subject has no such figure."""

    plan: str  # a plan's name, or `transformers_generate`
    batch: int
    context: int  # prompt tokens, median
    tokens_per_s: float  # median over repeats
    tokens_per_s_min: float
    tokens_per_s_max: float
    tokens_per_s_all: tuple[float, ...]  # in the order of repeats
    acceptance_rate: float | None  # over all repeats
    tokens_per_forward: float | None  # over all repeats; prefill excluded
    speedup_over_plain: float | None  # median of the repeats' ratios; None if plain was not measured
    speedup_min: float | None
    speedup_max: float | None
    host_ms_per_step: float | None  # everything but forward and sampler; prefill excluded
    forward_ms_per_step: float | None
    sampler_ms_per_step: float | None
    num_tokens: int  # committed in all repeats
    mean_length: float  # tokens per completion
    repeats: int
    temperature: float
    max_tokens: int
    ignore_eos: bool
    setting: Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """What decoding one batch gave; rollouts and times are None for a subject that reports neither."""

    num_tokens: int
    num_rollouts: int
    duration_s: float
    rollouts: tuple[Rollout, ...] | None = None
    times: EngineTimes | None = None


class Subject(Protocol):
    """Something that decodes a batch of requests."""

    name: str

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to their end."""
        ...


class EngineSubject:
    """blockroll's engine under one plan, or under a planner."""

    def __init__(self, policy: HFPolicy, plan: Plan | Planner, *, batch: int, max_length: int) -> None:
        self.name = plan.name
        # An accelerator runs behind the host; parts of a step can be told apart only if each is waited for.
        # The engine waits for it between the parts anyway, to look for logits that are not finite.
        clock = time.perf_counter if policy.device.type == "cpu" else _synchronized_clock
        self._engine = Engine(policy, plan=plan, max_batch_size=batch, max_length=max_length, clock=clock)

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to their end."""
        self._engine.times = EngineTimes()
        finished: list[Rollout] = []
        start = time.perf_counter()
        self._engine.submit(requests)
        while self._engine.num_requests:
            finished.extend(self._engine.step().finished)
        duration_s = time.perf_counter() - start
        for rollout in finished:
            if rollout.error is not None:
                raise NonFiniteLogits(f"a measured rollout failed: {rollout.error}")
        return Wave(
            num_tokens=sum(len(rollout.token_ids) for rollout in finished),
            num_rollouts=len(finished),
            duration_s=duration_s,
            rollouts=tuple(finished),
            times=self._engine.times,
        )


class TransformersSubject:
    """Plain Hugging Face `generate` on a model of its own, with transformers' default attention."""

    def __init__(self, policy: HFPolicy, path: str) -> None:
        self.name = TRANSFORMERS
        self._eos_token_ids = policy.eos_token_ids
        self._model = load_model(resolve_checkpoint(path), device=policy.device, dtype=policy.model.dtype)

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to the end of the longest."""
        sampling = requests[0].sampling
        start = time.perf_counter()
        completions = generate_stock(
            self._model,
            [request.prompt_ids for request in requests],
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            eos_token_ids=() if sampling.ignore_eos else self._eos_token_ids,
            seed=requests[0].seed,
        )
        duration_s = time.perf_counter() - start
        return Wave(
            num_tokens=sum(map(len, completions)), num_rollouts=len(completions), duration_s=duration_s
        )


def run_bench(
    policy: HFPolicy,
    prompts: Sequence[tuple[int, ...]],
    plans: Sequence[Plan | Planner],
    options: BenchOptions,
    *,
    policy_path: str,
    against_transformers: bool = False,
    on_row: Callable[[BenchRow], None] = lambda row: None,
) -> list[BenchRow]:
    """Measure every plan at every batch size. `on_row` gets each row when its batch size is done.

    Prompts are taken in turn, over and over. `against_transformers` adds Hugging Face `generate`.
    """
    if not prompts or not (plans or against_transformers):
        raise InvalidInput("a bench needs at least one prompt and one plan")
    if len(set(plans)) < len(plans):
        raise InvalidInput(f"each plan is measured once, got {', '.join(plan.name for plan in plans)}")
    max_length = max(map(len, prompts)) + options.max_tokens
    if max_length > policy.max_length:
        raise InvalidInput(
            f"prompt and completion take {max_length} tokens, but the policy was built for "
            f"{policy.max_length}; give max_tokens of at most {policy.max_length - max(map(len, prompts))}"
        )
    setting = describe_setting(policy, policy_path)
    stock = [TransformersSubject(policy, policy_path)] if against_transformers else []
    rows = []
    for batch in options.batches:
        subjects: list[Subject] = [
            *(EngineSubject(policy, plan, batch=batch, max_length=max_length) for plan in plans),
            *stock,
        ]
        for row in _measure_batch(subjects, prompts, batch, options, setting):
            rows.append(row)
            on_row(row)
    return rows


def to_record(row: BenchRow) -> dict[str, Any]:
    """The row as one flat JSON object."""
    record = asdict(row)
    setting = record.pop("setting")
    return {**record, **setting}


def describe_setting(policy: HFPolicy, policy_path: str) -> Setting:
    """Machine and versions, as recorded in every row."""
    device = policy.device
    return Setting(
        policy=policy_path,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(policy.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        commit=_commit(),
        blockroll_version=blockroll.__version__,
        torch_version=torch.__version__,
        transformers_version=version("transformers"),
    )


def make_waves(
    prompts: Sequence[tuple[int, ...]], batch: int, repeat: int, options: BenchOptions
) -> list[list[Request]]:
    """The requests of one repeat, in waves of `batch`; equal arguments give equal requests."""
    num_waves = math.ceil(options.rollouts / batch)
    first = repeat * num_waves * batch
    return [
        [
            Request(
                request_id=f"bench-{index}",
                prompt_ids=prompts[index % len(prompts)],
                seed=options.seed * 1_000_003 + index,
                sampling=options.sampling,
            )
            for index in range(first + wave * batch, first + (wave + 1) * batch)
        ]
        for wave in range(num_waves)
    ]


def _measure_batch(
    subjects: Sequence[Subject],
    prompts: Sequence[tuple[int, ...]],
    batch: int,
    options: BenchOptions,
    setting: Setting,
) -> list[BenchRow]:
    for subject in subjects:
        subject.decode(make_waves(prompts, batch, 0, options)[0])
    repeats: dict[str, list[list[Wave]]] = {subject.name: [] for subject in subjects}
    lengths: list[int] = []
    for repeat in range(options.repeats):
        waves = make_waves(prompts, batch, repeat, options)
        lengths.extend(len(request.prompt_ids) for wave in waves for request in wave)
        for subject in subjects:
            repeats[subject.name].append([subject.decode(wave) for wave in waves])
    plain = [_tokens_per_s(waves) for waves in repeats.get(PLAIN.name, [])]
    context = round(statistics.median(lengths))
    return [
        _row(
            subject.name,
            repeats[subject.name],
            plain,
            batch=batch,
            context=context,
            options=options,
            setting=setting,
        )
        for subject in subjects
    ]


def _row(
    plan: str,
    repeats: Sequence[Sequence[Wave]],
    plain: Sequence[float],
    *,
    batch: int,
    context: int,
    options: BenchOptions,
    setting: Setting,
) -> BenchRow:
    speeds = [_tokens_per_s(waves) for waves in repeats]
    ratios = [speed / base for speed, base in zip(speeds, plain, strict=True)] if plain else []
    waves = [wave for repeat in repeats for wave in repeat]
    rollouts = [rollout for wave in waves for rollout in wave.rollouts or ()]
    num_tokens = sum(wave.num_tokens for wave in waves)
    return BenchRow(
        plan=plan,
        batch=batch,
        context=context,
        tokens_per_s=statistics.median(speeds),
        tokens_per_s_min=min(speeds),
        tokens_per_s_max=max(speeds),
        tokens_per_s_all=tuple(speeds),
        acceptance_rate=_ratio(
            sum(rollout.stats.num_accepted for rollout in rollouts),
            sum(rollout.stats.num_drafted for rollout in rollouts),
        ),
        tokens_per_forward=_ratio(
            sum(len(rollout.token_ids) for rollout in rollouts),
            sum(rollout.stats.num_forwards for rollout in rollouts),
        ),
        speedup_over_plain=statistics.median(ratios) if ratios else None,
        speedup_min=min(ratios, default=None),
        speedup_max=max(ratios, default=None),
        host_ms_per_step=_ms_per_step(repeats, lambda times: times.host_s),
        forward_ms_per_step=_ms_per_step(repeats, lambda times: times.forward_s),
        sampler_ms_per_step=_ms_per_step(repeats, lambda times: times.sampler_s),
        num_tokens=num_tokens,
        mean_length=num_tokens / sum(wave.num_rollouts for wave in waves),
        repeats=options.repeats,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        setting=setting,
    )


def _tokens_per_s(waves: Sequence[Wave]) -> float:
    return sum(wave.num_tokens for wave in waves) / sum(wave.duration_s for wave in waves)


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


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


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
