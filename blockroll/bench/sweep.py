"""A sweep over plans, mix weights and draft temperatures: reward, acceptance and speed of each point.

At each temperature plain decoding and every point decode the same prompts with the same seeds, taking turns
wave by wave. A repeat is one rollout of every prompt; the rollouts that are timed are those that are
rewarded, between waves and off the clock. Points share nothing: each has an engine of its own.

What the figures mean, and which point is marked: `frontier.py`.
"""

import copy
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockroll.bench.frontier import Band, RewardsByPrompt, SweepRow, mark
from blockroll.bench.rows import Setting, describe_setting
from blockroll.bench.subjects import EngineSubject, Wave
from blockroll.bench.workload import TARGET, Prompts, check_length, check_list
from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.requests import derive_seed
from blockroll.rollout.planning.planner import Planner
from blockroll.types import MASK_ROWS, PLAIN, Law, Plan, Request, Rollout, Sampling

LEAST_REPEATS = 3  # that a spread is seen from
# The reward of each rollout, NaN where there is none; of each the place of its prompt is given.
Reward = Callable[[Sequence[int], Sequence[Rollout]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """What is swept over, and what a loss is."""

    mix_weights: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    temperatures: tuple[float, ...] = (1.0,)
    draft_temperatures: tuple[float | None, ...] = (None,)  # None: as the temperature
    batch: int = 8  # requests decoded together
    queue: int = 1  # rollouts submitted together for each place in the batch
    max_tokens: int = 64
    samples: int = 8  # rollouts of each prompt, each in a repeat of its own
    max_loss: float = 0.01  # of what lies between the bounds of a reward
    reward_low: float = 0.0
    reward_high: float = 1.0
    alpha: float = 0.05  # that any band of a difference misses
    seed: int = 0

    def __post_init__(self) -> None:
        check_list("mix weights", self.mix_weights)
        check_list("temperatures", self.temperatures)
        check_list("draft temperatures", self.draft_temperatures)
        check_list("batch, queue and max_tokens", (self.batch,), counts=(self.batch, self.queue))
        if self.samples < LEAST_REPEATS:
            raise InvalidInput(
                f"a sweep needs at least {LEAST_REPEATS} samples of each prompt, as each is a repeat of the "
                f"timing, got {self.samples}"
            )
        if not 0 <= self.max_loss < 1:
            raise InvalidInput(
                f"max_loss is a share of the reward's range, from 0 to below 1, got {self.max_loss}"
            )
        if not self.reward_low < self.reward_high:
            raise InvalidInput(
                f"reward_low must be below reward_high, got {self.reward_low} and {self.reward_high}; they "
                "bound what a reward can be"
            )
        for weight, temperature, drafts in itertools.product(
            self.mix_weights, self.temperatures, self.draft_temperatures
        ):
            Sampling(
                temperature=temperature,
                draft_temperature=drafts,
                law=Law(weight),
                max_tokens=self.max_tokens,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """How requests are decoded and drawn."""

    plan: Plan | Planner
    sampling: Sampling


@dataclass(slots=True)
class _Measured:
    """What one point came to so far."""

    point: Point
    subject: EngineSubject
    rewards: RewardsByPrompt
    tokens: list[int] = field(default_factory=list)  # by repeat
    durations_s: list[float] = field(default_factory=list)
    num_forwards: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def begin_repeat(self) -> None:
        self.tokens.append(0)
        self.durations_s.append(0.0)

    def count(self, wave: Wave) -> None:
        """A wave of the repeat that was begun last."""
        self.tokens[-1] += wave.num_tokens
        self.durations_s[-1] += wave.duration_s
        for rollout in wave.rollouts or ():
            self.num_forwards += rollout.stats.num_forwards
            self.num_drafted += rollout.stats.num_drafted
            self.num_accepted += rollout.stats.num_accepted

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.durations_s, strict=True)]


def points(plans: Sequence[Plan | Planner], temperature: float, options: SweepOptions) -> list[Point]:
    """Plain first, whether it was asked for or not, then every plan under what makes a difference to it.

    Drafts that are looked up have no rows: nothing is mixed with them, and none is drawn.
    """
    found = [Point(plan=PLAIN, sampling=_sampling(temperature, None, TARGET, options))]
    for plan in plans:
        if plan == PLAIN:
            continue
        has_rows = _has_mask_rows(plan)
        for drafts, weight in itertools.product(
            options.draft_temperatures if has_rows else (None,), options.mix_weights if has_rows else (1.0,)
        ):
            sampling = _sampling(temperature, drafts, Law(weight), options)
            found.append(Point(plan=copy.deepcopy(plan), sampling=sampling))
    return found


def run_sweep(
    policy: HFPolicy,
    prompts: Prompts,
    plans: Sequence[Plan | Planner],
    options: SweepOptions,
    *,
    reward: Reward,
    task: str,
    policy_path: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SweepRow]:
    """A row for each point, the fastest harmless one of each temperature marked.

    `task` says in the rows whose reward it is. `on_progress` gets the waves that are done and all there are.
    """
    if len(prompts) < 2:
        raise InvalidInput(
            f"a sweep compares laws over prompts and needs at least 2, got {len(prompts)}: one prompt says "
            "nothing of others"
        )
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names):
        raise InvalidInput(f"each plan is measured once, got {', '.join(names)}")
    if set(names) <= {PLAIN.name}:
        raise InvalidInput("a sweep compares plans that draft with plain: give one, as 'two_forward'")
    check_length(prompts, options.max_tokens, policy.max_length)
    spanned = [points(plans, temperature, options) for temperature in options.temperatures]
    run = _Run(policy, prompts, spanned, options, reward=reward, on_progress=on_progress)
    setting = describe_setting(policy, policy_path)
    return mark([row for some in spanned for row in run.rows(some, setting=setting, task=task)])


class _Run:
    """What the temperatures of a sweep have in common."""

    def __init__(
        self,
        policy: HFPolicy,
        prompts: Prompts,
        spanned: Sequence[Sequence[Point]],
        options: SweepOptions,
        *,
        reward: Reward,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """`spanned`: the points of each temperature."""
        self._policy, self._prompts, self._options = policy, prompts, options
        self._reward, self._on_progress = reward, on_progress
        # An order that is drawn: files are often sorted, and bounds hold for prompts as they come.
        self._order = random.Random(derive_seed("sweep order", options.seed)).sample(
            range(len(prompts)), len(prompts)
        )
        size = options.batch * options.queue
        self._waves = [self._order[start : start + size] for start in range(0, len(prompts), size)]
        self._total = sum(map(len, spanned)) * (len(self._waves) * options.samples + 1)
        self._done = 0
        self._num_compared = sum(len(some) - 1 for some in spanned)  # differences whose bands hold together

    def rows(self, some: Sequence[Point], *, setting: Setting, task: str) -> list[SweepRow]:
        """Those of one temperature, plain first."""
        measured = [self._start(point) for point in some]
        for each in measured:
            self._warm_up(each)
        for sample in range(self._options.samples):
            for each in measured:
                each.begin_repeat()
            for prompts in self._waves:
                for each in measured:
                    wave = each.subject.decode(self._requests(prompts, sample, each.point))
                    each.count(wave)
                    self._add_rewards(each, wave)
                    self._tick()
        return [self._row(each, measured[0], setting=setting, task=task) for each in measured]

    def _start(self, point: Point) -> _Measured:
        options = self._options
        longest = max(map(len, self._prompts)) + options.max_tokens
        subject = EngineSubject(
            self._policy, point.plan, law=point.sampling.law, batch=options.batch, max_length=longest
        )
        rewards = RewardsByPrompt(low=options.reward_low, high=options.reward_high)
        return _Measured(point=point, subject=subject, rewards=rewards)

    def _warm_up(self, each: _Measured) -> None:
        """A wave that is not counted; whether there are rewards at all is seen here, before the long part."""
        wave = each.subject.decode(self._requests(self._waves[0], self._options.samples, each.point))
        rewards = RewardsByPrompt(low=self._options.reward_low, high=self._options.reward_high)
        for prompt, reward in self._rewards(wave):
            rewards.add(prompt, reward)
        if rewards.num_failed == len(self._waves[0]):
            raise InvalidInput(
                f"none of the {rewards.num_failed} rollouts of the warm-up has a reward: the reward function "
                "failed, as the log says, or gave None for each of them"
            )
        self._tick()

    def _requests(self, prompts: Sequence[int], sample: int, point: Point) -> list[Request]:
        return [
            Request(
                request_id=f"{prompt}/{sample}",
                prompt_ids=self._prompts[prompt],
                seed=derive_seed("sweep", self._options.seed, prompt, sample),
                sampling=point.sampling,
            )
            for prompt in prompts
        ]

    def _add_rewards(self, each: _Measured, wave: Wave) -> None:
        for prompt, reward in self._rewards(wave):
            each.rewards.add(prompt, reward)

    def _rewards(self, wave: Wave) -> list[tuple[int, float]]:
        """Place of the prompt and reward of each rollout; rollouts come in the order in which they ended."""
        rollouts = wave.rollouts or ()
        places = places_of(rollouts)
        return [*zip(places, map(float, self._reward(places, rollouts)), strict=True)]

    def _tick(self) -> None:
        self._done += 1
        self._on_progress(self._done, self._total)

    def _row(self, each: _Measured, plain: _Measured, *, setting: Setting, task: str) -> SweepRow:
        options, sampling, speeds = self._options, each.point.sampling, each.speeds
        ratios = [ours / theirs for ours, theirs in zip(speeds, plain.speeds, strict=True)]
        reward = each.rewards.band(self._order, alpha=options.alpha)
        difference: Band | None = None
        if each is not plain:
            alpha = options.alpha / self._num_compared
            difference = each.rewards.difference(plain.rewards, self._order, alpha=alpha)
        assert sampling.law.weight is not None
        return SweepRow(
            plan=each.point.plan.name,
            law=sampling.law.name,
            mix_weight=sampling.law.weight,
            temperature=sampling.temperature,
            draft_temperature=sampling.draft_temperature,
            batch=options.batch,
            queue=options.queue,
            max_tokens=options.max_tokens,
            task=task,
            num_prompts=len(self._prompts),
            samples=options.samples,
            seed=options.seed,
            reward_low=options.reward_low,
            reward_high=options.reward_high,
            max_loss=options.max_loss,
            alpha=options.alpha,
            setting=setting,
            reward=reward.mean,
            reward_cs_low=reward.low,
            reward_cs_high=reward.high,
            num_failed=each.rewards.num_failed,
            difference=None if difference is None else difference.mean,
            difference_cs_low=None if difference is None else difference.low,
            difference_cs_high=None if difference is None else difference.high,
            acceptance_rate=each.num_accepted / each.num_drafted if each.num_drafted else None,
            tokens_per_forward=sum(each.tokens) / each.num_forwards if each.num_forwards else None,
            mean_length=sum(each.tokens) / (len(self._prompts) * options.samples),
            tokens_per_s=statistics.median(speeds),
            tokens_per_s_min=min(speeds),
            tokens_per_s_max=max(speeds),
            speedup_over_plain=statistics.median(ratios),
            speedup_min=min(ratios),
            speedup_max=max(ratios),
            speedup_all=tuple(ratios),
        )


def places_of(rollouts: Sequence[Rollout]) -> list[int]:
    """The place of each one's prompt, by its request: under each point rollouts end in another order."""
    return [int(rollout.request.request_id.partition("/")[0]) for rollout in rollouts]


def _sampling(temperature: float, drafts: float | None, law: Law, options: SweepOptions) -> Sampling:
    return Sampling(temperature=temperature, draft_temperature=drafts, law=law, max_tokens=options.max_tokens)


def _has_mask_rows(plan: Plan | Planner) -> bool:
    plans = plan.candidates if isinstance(plan, Planner) else (plan,)
    return any(each.drafter == MASK_ROWS for each in plans)
