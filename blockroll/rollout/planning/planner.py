"""A plan that chooses itself: each step takes the plan with the most expected tokens per second.

Expected are the tokens a plan commits per request and step, counted online, over what a step costs at that
batch and context. Costs are ratios: a trial is one step of a plan between two plain ones, and a step costs
what it took over the mean of theirs, so a machine that speeds up and slows down moves both. Trials are real
steps and commit tokens too. Plans that could win are tried when a bucket is first met, those that the trials
before let expect to lose never; the plan in use and those close to it are tried again now and then.

Law: a choice depends on counts of committed tokens and on times, never on a draft that is not settled, and
every coin of a step is fresh. So under the target law tokens follow the causal policy exactly, whatever is
chosen. A mixed law mixes draft rows only where a plan drafts; each token records the law it was drawn from.
Which tokens a request gets depends on the clock: a fixed plan is what repeats them.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

import blockroll
from blockroll.config import cache_dir
from blockroll.policies.base import Policy
from blockroll.rollout.planning.cost_table import SAMPLES_KEPT, Bucket, CostTable
from blockroll.types import PLAIN, Plan
from blockroll.types.plan import MAX_DRAFTS

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

logger = logging.getLogger(__name__)

AUTO = "auto"
_NUM_DRAFTS = (4, 8, 16, 32)  # drafts worth a try, below what the policy was trained for
_MARGIN = 0.05  # a plan replaces another if it is faster by this share
_HOPELESS = 0.8  # a plan is not tried if it is expected to reach less than this share of the best's speed
_TRIALS = 4  # after which a plan is known in a bucket
_COUNTED_STEPS = 16  # request-steps anywhere, after which its tokens are known
_PRIOR_STEPS = 4  # request-steps that the optimistic guess at a plan's tokens weighs
_HALF_LIFE = 1024  # request-steps after which a count of tokens weighs half
_TRIAL_SHARE = 0.01  # of the time spent decoding that may go to first trials, beyond the time at the start
_STEPS_PER_TRIAL = (64, 256)  # in use and close plans are tried again: few samples, and as many as are kept
_STEPS_PER_CHOICE = 8  # a choice holds so long: choosing takes time too
_FORGET_STEPS = 10_000  # steps after which what plans not in use commit is counted anew


@dataclass(slots=True)
class _Counts:
    """What the steps of one plan did, the older the lighter."""

    num_steps: float = 0.0  # request-steps
    num_tokens: float = 0.0
    step_s: float = 0.0  # of steps in use, without their starts,
    start_s: float = 0.0  # and of those: a fused plan starts with a draft forward for each new request

    def count(self, num_requests: int, num_tokens: int) -> None:
        """One step of so many requests committed so many tokens."""
        kept = 0.5 ** (num_requests / _HALF_LIFE)
        self.num_steps = kept * self.num_steps + num_requests
        self.num_tokens = kept * self.num_tokens + num_tokens
        self.step_s, self.start_s = kept * self.step_s, kept * self.start_s

    @property
    def start_share(self) -> float:
        """Time for starts over time for steps."""
        return self.start_s / self.step_s if self.step_s else 0.0


@dataclass(slots=True)
class _Trial:
    """A step of a plan between two plain ones; steps before it, if any, only warm it up."""

    plan: Plan
    num_warm_ups: int
    steps: list[tuple[int, float]] = field(default_factory=list)  # batch size and seconds of those done

    @property
    def next_plan(self) -> Plan:
        return self.plan if 1 <= len(self.steps) <= 1 + self.num_warm_ups else PLAIN

    @property
    def is_done(self) -> bool:
        return len(self.steps) == 3 + self.num_warm_ups

    @property
    def cost(self) -> float:
        """Plain steps that one step of the plan takes; plain as it would be at the batch of that step."""
        (size_before, before), *_, (size, seconds), (size_after, after) = self.steps
        ended = size_before - size_after
        share = min(max((size_before - size) / ended, 0.0), 1.0) if ended else 0.5
        return seconds / (before + share * (after - before))


class Planner:
    """Chooses among candidate plans from what their steps have cost and committed.

    Its decisions are functions of the calls made so far: it reads no clock and draws nothing.
    """

    name = AUTO

    def __init__(
        self, candidates: Iterable[Plan], *, costs: CostTable | None = None, max_measure_s: float = 20.0
    ) -> None:
        """Plain is always a candidate. First trials take at most `max_measure_s` and 1 % of the time."""
        self.candidates = tuple(
            sorted({PLAIN, *candidates}, key=lambda plan: (plan.rows_per_forward, plan.forwards_per_step))
        )
        self.costs = CostTable() if costs is None else costs
        self.max_measure_s = max_measure_s
        self._counts = {plan: _Counts() for plan in self.candidates}
        self._narrower = {
            plan: [other for other in reversed(self.candidates) if _is_narrower(other, plan)]
            for plan in self.candidates
        }
        self._in_use = PLAIN
        self._bucket: Bucket | None = None
        self._holds_until = 0  # this many steps
        self._trial: _Trial | None = None
        self._next_check: dict[Bucket, int] = {}
        self._tried_at: dict[tuple[Plan, Bucket], int] = {}
        self._last_run: Plan | None = None
        self._warm: set[tuple[Plan, Bucket]] = set()
        self._num_steps = 0
        self._decoding_s = 0.0
        self._first_trials_s = 0.0

    def choose(self, batch_size: int, context: int) -> Plan:
        """The plan of the next step of so many requests, the longest of `context` tokens."""
        bucket = Bucket.of(batch_size, context)
        if bucket != self._bucket:  # steps on both sides of an edge do not compare
            self._bucket, self._trial, self._holds_until = bucket, None, 0
        if self._trial is None and self._num_steps >= self._holds_until:
            best = self._best(bucket)
            if best != self._in_use:
                self._log_switch(best, bucket)
                self._in_use = best
            self._trial = self._next_trial(bucket)
            self._holds_until = self._num_steps + _STEPS_PER_CHOICE
        return self._in_use if self._trial is None else self._trial.next_plan

    def observe(
        self,
        plan: Plan,
        batch_size: int,
        context: int,
        seconds: float,
        num_tokens: int,
        *,
        start_seconds: float = 0.0,
    ) -> None:
        """A step under `plan` took so long, prefill excluded, and committed so many tokens in all.

        Of the time, `start_seconds` went into first proposals for requests that had none.
        """
        self._num_steps += 1
        self._decoding_s += seconds
        counts, trial = self._counts[plan], self._trial
        counts.count(batch_size, num_tokens)
        bucket = Bucket.of(batch_size, context)
        if trial is not None and seconds > 0:
            trial.steps.append((batch_size, seconds - start_seconds))
            if self.costs.num_samples(trial.plan, bucket) < _TRIALS:
                self._first_trials_s += seconds
            if trial.is_done:
                self._end_trial(trial, bucket)
        elif trial is None and plan == self._last_run:  # after a switch, all requests are started
            counts.step_s += seconds - start_seconds
            counts.start_s += start_seconds
        self._last_run = plan
        self._warm.add((plan, bucket))
        if self._num_steps % _FORGET_STEPS == 0:
            self._forget()

    def state_dict(self) -> dict[str, list[float]]:
        """What was counted of each plan; what steps cost lies in the cost table, of the device."""
        return {plan.name: list(dataclasses.astuple(counts)) for plan, counts in self._counts.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from `state_dict()`; plans that are no candidates here are left out."""
        for plan in self.candidates:
            if plan.name in state:
                self._counts[plan] = _Counts(*state[plan.name])

    def expected_tokens(self, plan: Plan) -> float:
        """Committed tokens per request and step; as many as there can be at most while few were counted."""
        if plan == PLAIN:
            return 1.0
        counted = self._counts[plan]
        total = counted.num_tokens + _PRIOR_STEPS * self._most_tokens(plan)
        return total / (counted.num_steps + _PRIOR_STEPS)

    def _most_tokens(self, plan: Plan) -> float:
        """Further drafts are accepted at most as often as, on average, those of the next narrower plan."""
        for narrower in self._narrower[plan]:
            if self._counts[narrower].num_steps:
                accepted_per_draft = (self.expected_tokens(narrower) - 1) / narrower.num_drafts
                return 1 + accepted_per_draft * plan.num_drafts
        return 1.0 + plan.num_drafts

    def speedup(self, plan: Plan, bucket: Bucket) -> float:
        """Expected tokens per second over plain's."""
        cost = self.costs.cost(plan, bucket) * (1 + self._counts[plan].start_share)
        return self.expected_tokens(plan) / cost

    def _best(self, bucket: Bucket) -> Plan:
        """The fastest of the plans tried here or nearby; the one in use if it comes close."""
        speedups = {
            plan: self.speedup(plan, bucket)
            for plan in self.candidates
            if plan == PLAIN
            or self.costs.num_samples(plan, bucket) >= _TRIALS
            or self.costs.is_measured_near(plan, bucket)
        }
        fastest = max(speedups, key=speedups.__getitem__)
        is_close = speedups[fastest] <= (1 + _MARGIN) * speedups.get(self._in_use, 0.0)
        return self._in_use if is_close else fastest

    def _next_trial(self, bucket: Bucket) -> _Trial | None:
        """Of a plan not known yet that could win, or again of the plan in use or one close to it."""
        best = self.speedup(self._in_use, bucket)
        plan = None
        if self._first_trials_s < self.max_measure_s + _TRIAL_SHARE * self._decoding_s:
            plan = next(
                (each for each in self.candidates if self._is_worth_a_trial(each, bucket, best)), None
            )
        if plan is None and self._num_steps >= self._next_check.get(bucket, 0):
            close = [
                each
                for each in self.candidates
                if self.costs.num_samples(each, bucket) and self.speedup(each, bucket) >= _HOPELESS * best
            ]
            if close:
                plan = min(close, key=lambda each: self._tried_at.get((each, bucket), 0))
                fewest = min(self.costs.num_samples(each, bucket) for each in close)
                self._next_check[bucket] = self._num_steps + _STEPS_PER_TRIAL[fewest >= SAMPLES_KEPT]
        if plan is None:
            return None
        return _Trial(plan, num_warm_ups=(plan, bucket) not in self._warm)

    def _is_worth_a_trial(self, plan: Plan, bucket: Bucket, best: float) -> bool:
        num_trials = self.costs.num_samples(plan, bucket)
        if plan == PLAIN or num_trials >= _TRIALS:
            return False
        return num_trials > 0 or self.speedup(plan, bucket) > _HOPELESS * best

    def _end_trial(self, trial: _Trial, bucket: Bucket) -> None:
        self._trial, self._holds_until = None, 0
        self.costs.add(trial.plan, bucket, trial.cost)
        self._tried_at[trial.plan, bucket] = self._num_steps
        if self.costs.num_samples(trial.plan, bucket) in (_TRIALS, SAMPLES_KEPT):
            self.costs.save()

    def _forget(self) -> None:
        """Policy and prompts have changed meanwhile: what is not in use may have become better."""
        for plan in self.candidates:
            if plan != self._in_use:
                self._counts[plan] = _Counts()

    def _log_switch(self, plan: Plan, bucket: Bucket) -> None:
        logger.info(
            "plan %s after %s at batch up to %d, context up to %d: expected %.3gx plain, against %.3gx",
            plan.name,
            self._in_use.name,
            bucket.batch_size,
            bucket.context,
            self.speedup(plan, bucket),
            self.speedup(self._in_use, bucket),
        )


def candidate_plans(policy: Policy) -> tuple[Plan, ...]:
    """The plans a policy was trained for, plain first."""
    if not (policy.can_draft and policy.trained_drafts):
        return (PLAIN,)
    trained = min(policy.trained_drafts, policy.max_length - 1, MAX_DRAFTS)
    sizes = [*(num_drafts for num_drafts in _NUM_DRAFTS if num_drafts < trained), trained]
    plans = [PLAIN]
    if "two_forward" in policy.trained_layouts:
        plans += [Plan(size) for size in sizes]
    if "fused" in policy.trained_layouts:
        for size in sizes:
            plans += [Plan(size, tuple(sorted(levels))) for levels in ({0}, {0, size // 2, size})]
    return tuple(dict.fromkeys(plans))


def read_plan(text: str, policy: "HFPolicy") -> Plan | Planner:
    """What `rollout.plan` asks for: `auto`, or a fixed plan as `Plan.parse` reads it."""
    if text.strip() == AUTO:
        path = cache_dir() / "plans" / f"{cost_key(policy)}.json"
        return Planner(candidate_plans(policy), costs=CostTable.load(path))
    return Plan.parse(text, default_drafts=policy.trained_drafts or 1)


def cost_key(policy: "HFPolicy") -> str:
    """A hash of what the cost of a step depends on: architecture, precision, device, threads, versions."""
    modules = [policy.model, *([policy.adapter] if policy.adapter is not None else [])]
    described = {
        "family": policy.model.config.model_type,
        "parameters": [
            (name, [*parameter.shape]) for module in modules for name, parameter in module.named_parameters()
        ],
        "dtype": str(policy.model.dtype),
        "device": torch.cuda.get_device_name(policy.device)
        if policy.device.type == "cuda"
        else policy.device.type,
        "threads": torch.get_num_threads(),
        "blockroll": blockroll.__version__,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _is_narrower(plan: Plan, other: Plan) -> bool:
    """Whether it is of the same kind, by the same drafter, with fewer drafts."""
    like, other_like = ((each.kind, each.drafter, len(each.levels)) for each in (plan, other))
    return like == other_like and plan.num_drafts < other.num_drafts
