"""Plans measured in turn: in each repeat all decode the same requests, who comes first going round.

What else the machine does slows all alike, so figures are ratios within a repeat. Plain is there twice: how
far its two ratios spread is the band in which nothing was shown.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields

from benchmarks.rows import Row
from blockroll.bench.subjects import EngineSubject, Subject, Wave
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.trace import EngineTimes
from blockroll.rollout.planning.reading import read_plan
from blockroll.types import Law, Request

PLAIN, AGAIN = "plain", "plain, again"


@contextmanager
def subjects(
    policy: HFPolicy, plans: Sequence[str], *, batch: int, max_length: int
) -> Iterator[dict[str, Subject]]:
    """An engine for each plan, by its name, and a second one of plain; closed at the end."""
    found: dict[str, Subject] = {}
    for name in (*plans, AGAIN):
        plan = read_plan(PLAIN if name == AGAIN else name, policy)
        found[name] = EngineSubject(policy, plan, law=Law(), batch=batch, max_length=max_length)
    try:
        yield found
    finally:
        for subject in found.values():
            subject.close()


def waves_in_turn(
    subjects: Mapping[str, Subject], repeats: Sequence[Sequence[Request]], *, warm_up: Sequence[Request] = ()
) -> dict[str, list[Wave]]:
    """What each subject took for each repeat, by its name; the warm-up is not among it."""
    if warm_up:
        for subject in subjects.values():
            subject.warm_up(warm_up)
    names = list(subjects)
    waves: dict[str, list[Wave]] = {name: [] for name in names}
    for index, requests in enumerate(repeats):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            waves[name].append(subjects[name].decode(requests))
    return waves


def steps_in_turn(engines: Sequence[BareEngine], requests: Sequence[Request]) -> float:
    """Time of the second engine's steps over the first one's, which draws the same tokens.

    A step of one comes after a step of the other, who comes first alternating: what else the machine does
    slows both alike.
    """
    for engine in engines:
        engine.submit(requests)
    seconds, num_steps = [0.0, 0.0], 0
    while engines[0].num_requests:
        for which in (0, 1) if num_steps % 2 else (1, 0):
            start = time.perf_counter()
            engines[which].step()
            seconds[which] += time.perf_counter() - start
        num_steps += 1
    assert not engines[1].num_requests, "the second engine drew other tokens"
    return seconds[1] / seconds[0]


def figures(waves: Sequence[Wave], plain: Sequence[Wave]) -> Row:
    """Speed, its ratios to plain within each repeat, and what the steps were.

    `speedup` is by wall time, prefill included; `cpu_speedup` by processor time; `step_speedup` by the
    time of decode steps alone.
    """
    row: Row = {
        "repeats": len(waves),
        "rollouts": len(waves[0].latencies_s),
        "num_tokens": sum(wave.num_tokens for wave in waves),
        "tokens_per_s": statistics.median(wave.num_tokens / wave.duration_s for wave in waves),
        "tokens_per_cpu_s": statistics.median(wave.num_tokens / wave.cpu_s for wave in waves),
        **_ratios("speedup", waves, plain, lambda wave: wave.duration_s),
        **_ratios("cpu_speedup", waves, plain, lambda wave: wave.cpu_s),
    }
    timed = [wave for wave in waves if wave.times is not None]
    if len(timed) < len(waves):
        return row
    rollouts = [rollout for wave in waves for rollout in wave.rollouts or ()]
    steps: Counter[str] = Counter()
    for rollout in rollouts:
        steps.update({plan.name: count for plan, count in rollout.stats.steps_by_plan})
    num_drafted = sum(rollout.stats.num_drafted for rollout in rollouts)
    return row | {
        **_ratios("step_speedup", waves, plain, step_s),
        "tokens_per_step": row["num_tokens"] / steps.total(),
        "drafts_per_step": num_drafted / steps.total(),
        "acceptance_rate": sum(rollout.stats.num_accepted for rollout in rollouts) / max(1, num_drafted),
        "nats_per_token": -sum(sum(rollout.policy_logprobs) for rollout in rollouts) / row["num_tokens"],
        "sampler_share": sum(wave.times.sampler_s for wave in timed if wave.times) / sum(map(step_s, timed)),
        "share_by_plan": {plan: count / steps.total() for plan, count in steps.most_common()},
    }


def step_s(wave: Wave) -> float:
    """Seconds of its decode steps, prefill excluded."""
    assert wave.times is not None, "only our engines tell"
    return wave.times.step_s


def _ratios(name: str, waves: Sequence[Wave], plain: Sequence[Wave], seconds: Callable[[Wave], float]) -> Row:
    """Tokens per second over plain's, repeat by repeat."""
    found = [
        (wave.num_tokens / seconds(wave)) / (base.num_tokens / seconds(base))
        for wave, base in zip(waves, plain, strict=True)
    ]
    return {
        name: statistics.median(found),
        f"{name}_low": min(found),
        f"{name}_high": max(found),
        f"{name}_all": found,
    }


def joined(waves: Sequence[Wave]) -> Wave:
    """Waves of one engine, one after the other, as one."""
    times = [wave.times for wave in waves if wave.times is not None]
    return Wave(
        num_tokens=sum(wave.num_tokens for wave in waves),
        duration_s=sum(wave.duration_s for wave in waves),
        cpu_s=sum(wave.cpu_s for wave in waves),
        latencies_s=tuple(latency for wave in waves for latency in wave.latencies_s),
        rollouts=tuple(rollout for wave in waves for rollout in wave.rollouts or ()),
        times=EngineTimes(
            **{each.name: sum(getattr(time, each.name) for time in times) for each in fields(EngineTimes)}
        ),
    )
