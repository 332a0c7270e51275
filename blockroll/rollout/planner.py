"""A plan that chooses itself: each step takes the plan with the most expected tokens per second.

Expected are the tokens a plan commits per request and step, counted online, over the seconds a step takes at
that batch and context. Both come from real steps, so measuring commits tokens too: plain is timed first in a
bucket, then each plan that could be faster runs for a few steps and is dropped as soon as it is clearly not.
Machines speed up and slow down, so every now and then a rival of the plan in use runs for a moment again: no
plan is judged by one bad moment.

Law: a choice depends on counts of committed tokens and on times, never on a draft that is not settled, and
every coin of a step is fresh. So under the target law tokens follow the causal policy exactly, whatever is
chosen. A mixed law mixes draft rows only where a plan drafts; each token records the law it was drawn from.
Which tokens a request gets depends on the clock: a fixed plan is what repeats them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import blockroll
from blockroll.config import cache_dir
from blockroll.policies.base import Policy
from blockroll.rollout.cost_table import Bucket, CostTable
from blockroll.types import PLAIN, Plan

if TYPE_CHECKING:
    from blockroll.policies.hf import HFPolicy

logger = logging.getLogger(__name__)

AUTO = "auto"
_NUM_DRAFTS = (4, 8, 16, 32)  # drafts worth a try, below what the policy was trained for
_MARGIN = 0.05  # a plan replaces another if it is faster by this share
_HOPELESS = 0.5  # a plan being tried is dropped early at this share of the best plan's tokens per second
_TIMED_STEPS = 3  # a plan is known in a bucket after so many timed steps,
_COUNTED_STEPS = 16  # and so many request-steps anywhere
_PRIOR_STEPS = 4  # request-steps that the optimistic guess at a plan's tokens weighs
_HALF_LIFE = 1024  # request-steps after which a count of tokens weighs half
_TRYING_SHARE = 0.01  # of the time spent decoding that may go to trying plans, beyond the time at the start
_STEPS_PER_CHECK = 64  # after which a rival is timed again,
_CHECKED_STEPS = 3  # for so many steps,
_RIVAL = 0.5  # if it is known to reach this share of the best plan's tokens per second
_STEPS_PER_CHOICE = 8  # a choice holds so long while nothing is tried: choosing takes time too
_FORGET_STEPS = 10_000  # steps after which all plans but the one in use are tried anew


@dataclass(slots=True)
class Acceptance:
    """Committed tokens of one plan, the older the lighter."""

    num_steps: float = 0.0  # request-steps
    num_tokens: float = 0.0

    def count(self, num_requests: int, num_tokens: int) -> None:
        """One step of so many requests committed so many tokens."""
        kept = 0.5 ** (num_requests / _HALF_LIFE)
        self.num_steps = kept * self.num_steps + num_requests
        self.num_tokens = kept * self.num_tokens + num_tokens


class Planner:
    """Chooses among candidate plans from what their steps have cost and committed.

    Its decisions are functions of the calls made so far: it reads no clock and draws nothing.
    """

    name = AUTO

    def __init__(
        self, candidates: Iterable[Plan], *, costs: CostTable | None = None, max_measure_s: float = 20.0
    ) -> None:
        """Plain is always a candidate. Trying others takes at most `max_measure_s` and 1 % of the time."""
        self.candidates = tuple(
            sorted({PLAIN, *candidates}, key=lambda plan: (plan.rows_per_forward, plan.forwards_per_step))
        )
        self.costs = CostTable() if costs is None else costs
        self.max_measure_s = max_measure_s
        self._acceptance = {plan: Acceptance() for plan in self.candidates}
        self._narrower = {
            plan: [other for other in reversed(self.candidates) if _is_narrower(other, plan)]
            for plan in self.candidates
        }
        self._in_use = PLAIN  # the best plan known at the latest choice
        self._chosen = PLAIN
        self._chosen_for: Bucket | None = None
        self._holds_until = 0  # this many steps
        self._is_trying = False
        self._checked: Plan | None = None  # the rival being timed again
        self._check_ends = 0
        self._next_check = _STEPS_PER_CHECK
        self._timed_at: dict[tuple[Plan, Bucket], int] = {}
        self._last_run: Plan | None = None
        self._warm: set[tuple[Plan, Bucket]] = set()
        self._num_steps = 0
        self._decoding_s = 0.0
        self._trying_s = 0.0

    def choose(self, batch_size: int, context: int) -> Plan:
        """The plan of the next step of so many requests, the longest of `context` tokens."""
        bucket = Bucket.of(batch_size, context)
        if bucket == self._chosen_for and self._num_steps < self._holds_until:
            return self._chosen
        self._chosen_for = bucket
        best, tried = PLAIN, None
        if self._is_known(PLAIN, bucket):
            self._in_use = best = self._best_known(bucket)
            if self._trying_s < self.max_measure_s + _TRYING_SHARE * self._decoding_s:
                tried = self._worth_trying(bucket, best) or self._rival(bucket, best)
            if tried is None:
                self._holds_until = self._num_steps + _STEPS_PER_CHOICE
        self._is_trying = tried is not None
        plan = tried or best
        if plan != self._chosen:
            self._log_switch(plan, bucket, batch_size)
        self._chosen = plan
        return plan

    def observe(self, plan: Plan, batch_size: int, context: int, seconds: float, num_tokens: int) -> None:
        """A step under `plan` took so long, prefill excluded, and committed so many tokens in all."""
        self._num_steps += 1
        self._decoding_s += seconds
        if self._is_trying:
            self._trying_s += seconds
        bucket = Bucket.of(batch_size, context)
        is_warm, is_steady = (plan, bucket) in self._warm, plan == self._last_run
        self._warm.add((plan, bucket))
        self._last_run = plan
        # The first step after a switch is unlike those that follow: fused plans start their proposals in it.
        if is_steady:
            self._acceptance[plan].count(batch_size, num_tokens)
            if is_warm and seconds > 0:
                self.costs.add(plan, bucket, seconds)
                self._timed_at[plan, bucket] = self._num_steps
                if self.costs.num_samples(plan, bucket) in (1, _TIMED_STEPS):
                    self.costs.save()
        if self._num_steps % _FORGET_STEPS == 0:
            self._forget()

    def expected_tokens(self, plan: Plan) -> float:
        """Committed tokens per request and step; as many as there can be at most while few were counted."""
        if plan == PLAIN:
            return 1.0
        counted = self._acceptance[plan]
        total = counted.num_tokens + _PRIOR_STEPS * self._most_tokens(plan)
        return total / (counted.num_steps + _PRIOR_STEPS)

    def _most_tokens(self, plan: Plan) -> float:
        """Further drafts are accepted at most as often as, on average, those of the next narrower plan."""
        for narrower in self._narrower[plan]:
            if self._acceptance[narrower].num_steps:
                accepted_per_draft = (self.expected_tokens(narrower) - 1) / narrower.num_drafts
                return 1 + accepted_per_draft * plan.num_drafts
        return 1.0 + plan.num_drafts

    def _is_known(self, plan: Plan, bucket: Bucket) -> bool:
        is_counted = plan == PLAIN or self._acceptance[plan].num_steps >= _COUNTED_STEPS
        return is_counted and self.costs.num_samples(plan, bucket) >= _TIMED_STEPS

    def _speed(self, plan: Plan, bucket: Bucket) -> float:
        """Expected tokens per second of one request; at most that where the plan was not timed."""
        seconds = self.costs.seconds(plan, bucket)
        if seconds is None:  # no step takes less time than one of fewer forwards and rows
            seconds = max(
                self.costs.seconds(other, bucket) or 0.0
                for other in self.candidates
                if other.forwards_per_step <= plan.forwards_per_step
                and other.rows_per_forward <= plan.rows_per_forward
            )
        return self.expected_tokens(plan) / seconds

    def _best_known(self, bucket: Bucket) -> Plan:
        speeds = {plan: self._speed(plan, bucket) for plan in self.candidates if self._is_known(plan, bucket)}
        fastest = max(speeds, key=speeds.__getitem__)
        is_close = speeds[fastest] <= (1 + _MARGIN) * speeds.get(self._in_use, 0.0)
        return self._in_use if is_close else fastest

    def _worth_trying(self, bucket: Bucket, best: Plan) -> Plan | None:
        """The narrowest plan not known yet that could still win."""
        speed = self._speed(best, bucket)
        for plan in self.candidates:
            if not self._is_known(plan, bucket):
                share = _HOPELESS if self.costs.num_samples(plan, bucket) else 1 + _MARGIN
                if self._speed(plan, bucket) > share * speed:
                    return plan
        return None

    def _rival(self, bucket: Bucket, best: Plan) -> Plan | None:
        """The plan to time again now: of those that come near the best, the one timed longest ago."""
        if self._checked is not None and self._num_steps < self._check_ends:
            return self._checked
        self._checked = None
        if self._num_steps < self._next_check:
            return None
        self._next_check = self._num_steps + _STEPS_PER_CHECK
        least = _RIVAL * self._speed(best, bucket)
        rivals = [
            plan
            for plan in self.candidates
            if plan != best and self._is_known(plan, bucket) and self._speed(plan, bucket) >= least
        ]
        if rivals:
            self._checked = min(rivals, key=lambda plan: self._timed_at.get((plan, bucket), 0))
            self._check_ends = self._num_steps + _CHECKED_STEPS
        return self._checked

    def _forget(self) -> None:
        """Policy, prompts and machine have changed meanwhile: what is not in use may have become better."""
        for plan in self.candidates:
            if plan != self._in_use:
                self._acceptance[plan] = Acceptance()
                self.costs.forget(plan)

    def _log_switch(self, plan: Plan, bucket: Bucket, batch_size: int) -> None:
        before, where = self._chosen, f"at batch {batch_size}, context up to {bucket.context}"
        if self.costs.seconds(PLAIN, bucket) is None:
            logger.info("plan %s after %s %s: plain is timed first", plan.name, before.name, where)
            return
        logger.info(
            "plan %s after %s %s: %s %.4g tokens/s, against %.4g",
            plan.name,
            before.name,
            where,
            "tried, could give" if self._is_trying else "expected",
            batch_size * self._speed(plan, bucket),
            batch_size * self._speed(before, bucket),
        )


def candidate_plans(policy: Policy) -> tuple[Plan, ...]:
    """The plans a policy was trained for, plain first."""
    if not (policy.can_draft and policy.trained_drafts):
        return (PLAIN,)
    trained = policy.trained_drafts
    sizes = [*(num_drafts for num_drafts in _NUM_DRAFTS if num_drafts < trained), trained]
    plans = [PLAIN]
    if "two_forward" in policy.trained_layouts:
        plans += [Plan(size) for size in sizes]
    if "fused" in policy.trained_layouts:
        for size in sizes:
            plans += [Plan(size, tuple(sorted(levels))) for levels in ({0}, {0, size}, {0, size // 2, size})]
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
    """Whether it is of the same kind with fewer drafts."""
    kind, other_kind = (plan.layout, len(plan.levels)), (other.layout, len(other.levels))
    return kind == other_kind and plan.num_drafts < other.num_drafts
