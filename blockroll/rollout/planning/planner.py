"""A plan that chooses itself: each step takes the plan with the most expected tokens per second.

A step's cost is predicted by a model of measured steps (costs.py). What it commits is counted online where
mask rows draft, and where history drafts it is what the drafter expects of the very texts at hand: request by
request, the chance that each draft is accepted. From these follow how many drafts each request gets, none
included. Plain is always a candidate, and a step without drafts is a plain one.

What teaches costs time: a step of a plan that may turn out slower, a look into history that finds nothing.
Of all time at most three in two hundred go there, beyond a step or two at the start.

Law: a choice depends on committed tokens, their counts, and times, never on a draft that is not settled. So
under the target law tokens follow the causal policy exactly, whatever is chosen. A mixed law mixes draft rows
only where a plan drafts; each token records the law it was drawn from.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence

from blockroll.rollout.engine.plans import Choice, NextStep, StepsTaken
from blockroll.rollout.planning.costs import VERIFY, CostModel, Work
from blockroll.rollout.planning.counts import Account, Chosen, Looks
from blockroll.rollout.planning.lengths import cheapest_draft, verifiable
from blockroll.rollout.planning.plain_times import PlainTimes
from blockroll.rollout.planning.tokens import COUNTED_STEPS, TokensByPlan
from blockroll.types import HISTORY, PLAIN, Plan, PlanKind

logger = logging.getLogger(__name__)

AUTO = "auto"
_MARGIN = 0.05  # a plan replaces another if it is faster by this share
_HOPELESS = 0.8  # a plan is not tried if it is hoped to reach less than this share of the best's speed,
_CLOSE = 0.9  # and one that is known not again
_TRIALS = 3  # steps of a plan at a place, after which its cost is known there
_SHARE_TO_TRY = 0.01  # of the time, that trials may take, paid before,
_SHARE_OF_GAINS = 0.1  # of what drafts have saved pays for trials too
_LEAST_UNKNOWN = 1.0  # and so many plain steps at least for each of work that the machine has never shown,
_FEARED = 1.5  # which is paid for as if it cost so many times what is expected
_LEAST_CHANCE = 0.01  # of a draft that is looked for, however cheap its row is
_FIRST_DRAFTS = 8  # or one for each request; more where half as many rows were measured: lines bend
_WORST = 2.0  # times its predicted cost: what a step took beyond that was not the plan's doing
_STEPS_OF_A_TRIAL = 4
_STEPS_BETWEEN_TRIALS = 3
_STEPS_PER_TRIAL = 64  # the plan in use and those close to it are tried again
_FIRST_PLAIN = 4  # steps until a plain one is among others; twice as many each time
_FIRST_STEPS = 2  # that are plain, to compare others with
_STEPS_PER_CHOICE = 8  # a choice among counted plans holds so long: choosing takes time too;
_MOST_STEPS_PER_CHOICE = 32  # twice as long each time that nothing was to be tried
_FORGET_STEPS = 10_000  # steps after which what plans not in use commit is counted anew
_CALIBRATION_STEPS = 256.0  # request-steps that the promise of history is held against


class Planner:
    """Chooses among candidate plans from what steps have cost and committed.

    Its decisions are functions of the calls made so far: it reads no clock and draws nothing.
    """

    name = AUTO

    def __init__(
        self,
        candidates: Iterable[Plan],
        *,
        costs: CostModel | None = None,
        known_tokens: Mapping[Plan, float] | None = None,
    ) -> None:
        """Plain is always a candidate. `known_tokens`: what steps of a plan were found to commit before."""
        self.candidates = tuple(
            sorted({PLAIN, *candidates}, key=lambda plan: (plan.rows_per_forward, plan.forwards_per_step))
        )
        self.costs = CostModel() if costs is None else costs
        self._plain_times = PlainTimes(self.costs)
        self._looked_up = [plan for plan in self.candidates if plan.drafter == HISTORY]
        self._counted = [plan for plan in self.candidates if plan.drafter != HISTORY]
        self._tokens = TokensByPlan(self.candidates, dict(known_tokens or {}))
        self._in_use = PLAIN
        self._place: Work | None = None
        self._holds_until = _FIRST_STEPS  # this many steps
        self._hold = _STEPS_PER_CHOICE
        self._trial: tuple[Plan, int] | None = None  # and its steps to come
        self._tried_at: dict[Plan, int] = {}
        self._num_plain_trials = 0
        self._ran: set[Work] = set()
        self._last_run = PLAIN
        self._chosen: Chosen | None = None
        self._num_steps = 0
        self._plain_steps = 0.0  # that the time of all steps is worth
        self._trials, self._looks = Account(), Looks()
        self._promised, self._kept = _CALIBRATION_STEPS / 8, _CALIBRATION_STEPS / 8  # drafts from history
        self._plain_at = 0  # the last plain step
        self._held_at: Work | None = None  # the place where what was chosen last holds
        self._speeds = [0.0, 0.0, 0.0]  # seconds, and times predicted and achieved speed-ups

    def choose(self, step: NextStep) -> Choice:
        """How the next step decodes, and for how many steps that holds while its requests are the same."""
        if step.num_joining:
            self._looks.joined(self._num_steps)
        place = Work.of(PLAIN, step.batch_size, step.context).place
        held = self._chosen
        if held is not None and place == self._held_at and self._num_steps < self._next_question:
            return Choice(
                plan=held.plan, num_steps=self._steps_to_hold(held.plan, place.context - step.context)
            )
        plan, is_trial = self._from_counts(step, place)
        lengths = None
        chosen = Chosen(
            plan=plan,
            work=Work.of(plan, step.batch_size, step.context),
            tokens=self.expected_tokens(plan),
            rate=self.speedup(self._in_use, step.batch_size, step.context),
            is_trial=is_trial,
        )
        if not is_trial and self._looked_up and self._looks.is_due(self._num_steps, self._plain_steps):
            chosen, lengths = self._from_history(step, chosen)
            self._looks.looked(self._num_steps, has_found=lengths is not None)
        chosen = dataclasses.replace(
            chosen,
            cost=self.costs.cost(chosen.work),
            is_measured=chosen.plan == PLAIN or self.costs.num_samples(chosen.work) > 0,
        )
        self._chosen = chosen
        if is_trial or lengths is not None:
            self._held_at = None
            return Choice(plan=chosen.plan, lengths=lengths)
        self._held_at = place
        return Choice(
            plan=chosen.plan, num_steps=self._steps_to_hold(chosen.plan, place.context - step.context)
        )

    @property
    def _next_question(self) -> int:
        """So many steps behind which something else may be chosen."""
        return min(self._holds_until, self._looks.next_at) if self._looked_up else self._holds_until

    def _steps_to_hold(self, plan: Plan, tokens_to_go: int) -> int:
        """Up to the next question, and as long as the context stays at its place."""
        most = 1 + tokens_to_go // (1 + plan.num_drafts)
        return max(1, min(self._next_question - self._num_steps, most))

    def observe(self, taken: StepsTaken) -> None:
        """The steps that were chosen last took so long, prefill excluded, and committed so many tokens."""
        chosen, num_steps = self._chosen, len(taken.step_seconds)
        assert chosen is not None, "a step is chosen before it is observed"
        self._num_steps += num_steps
        for seconds in taken.step_seconds:
            self.costs.observe(chosen.work, seconds - taken.start_seconds / num_steps)
        counts = self._tokens.counts(taken.plan)
        if taken.plan != PLAIN:
            counts.count(num_steps * taken.batch_size, taken.num_tokens)
        # After a switch, all requests are started.
        if taken.plan == self._last_run != PLAIN and not chosen.is_trial:
            counts.step_s += taken.seconds - taken.start_seconds
            counts.start_s += taken.start_seconds
        if taken.plan.drafter == HISTORY:
            kept = 0.5 ** (taken.batch_size / _CALIBRATION_STEPS)
            self._promised = kept * self._promised + taken.batch_size * (chosen.tokens - 1)
            self._kept = kept * self._kept + taken.num_tokens - taken.batch_size
        self._balance(chosen, taken)
        self._last_run = taken.plan
        self._ran.add(chosen.work.place)
        if self._num_steps % _FORGET_STEPS < num_steps:
            self._forget()

    @property
    def speedups(self) -> tuple[float, float]:
        """Predicted and achieved tokens per second, over those of plain steps; 1 before the first step."""
        seconds, predicted, achieved = self._speeds
        return (predicted / seconds, achieved / seconds) if seconds else (1.0, 1.0)

    def state_dict(self) -> dict[str, list[float]]:
        """What was counted of each plan; what steps cost lies in the cost model, of the device."""
        return self._tokens.state_dict()

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from `state_dict()`; plans that are no candidates here are left out."""
        self._tokens.load_state_dict(state)

    def expected_tokens(self, plan: Plan) -> float:
        """Committed tokens per request and step; hopefully many while few were counted."""
        return self._tokens.expected(plan)

    def speedup(self, plan: Plan, batch_size: int, context: int) -> float:
        """Expected tokens per second over plain's."""
        cost = self.costs.cost(Work.of(plan, batch_size, context)) * (
            1 + self._tokens.counts(plan).start_share
        )
        return self.expected_tokens(plan) / cost

    def _from_counts(self, step: NextStep, place: Work) -> tuple[Plan, bool]:
        """The plan in use, or a trial of another."""
        if place != self._place:  # steps on both sides of an edge do not compare
            self._place, self._trial = place, None
            self._holds_until = max(self._num_steps, _FIRST_STEPS)
        if self._trial is None and self._num_steps >= self._holds_until:
            speeds = {plan: self.speedup(plan, step.batch_size, step.context) for plan in self._counted}
            self._use_best(speeds, step)
            self._trial = self._next_trial(speeds, step)
            if self._trial is None:
                self._holds_until = self._num_steps + self._hold
                self._hold = min(2 * self._hold, _MOST_STEPS_PER_CHOICE)
            else:
                self._holds_until = self._num_steps + self._trial[1] + _STEPS_BETWEEN_TRIALS
                self._hold = _STEPS_PER_CHOICE
        # What a prefill begins is not measured.
        if self._trial is None or step.num_joining or step.has_prefill:
            return self._in_use, False
        plan, steps = self._trial
        self._trial = (plan, steps - 1) if steps > 1 else None
        return plan, True

    def _use_best(self, speeds: Mapping[Plan, float], step: NextStep) -> None:
        """The fastest of the plans whose tokens are counted; the one in use if it comes close.

        Without hope: of plans that were counted for some steps one is always lucky.
        """
        known = {
            plan: speed * self._tokens.surer(plan) / self.expected_tokens(plan)
            for plan, speed in speeds.items()
            if plan == PLAIN or self._tokens.is_counted(plan)
        }
        best = max(known, key=known.__getitem__)
        if known[best] > (1 + _MARGIN) * known.get(self._in_use, 0.0):
            logger.info(
                "plan %s after %s at batch %d, context %d: expected %.3gx plain, against %.3gx",
                best.name,
                self._in_use.name,
                step.batch_size,
                step.context,
                known[best],
                known.get(self._in_use, 0.0),
            )
            self._in_use = best

    def _is_unknown(self, plan: Plan, step: NextStep) -> bool:
        """Whether tokens or cost need a trial; those of narrower plans come first, wider ones follow them."""
        if plan in (PLAIN, self._in_use) or not self._tokens.is_in_turn(plan):
            return False
        work = Work.of(plan, step.batch_size, step.context)
        return not self._tokens.is_counted(plan) or self.costs.num_samples(work) < _TRIALS

    def _next_trial(self, speeds: Mapping[Plan, float], step: NextStep) -> tuple[Plan, int] | None:
        """Of a plan that could win and is not known yet, or again of one that comes close, or of plain."""
        if len(self.candidates) == 1:
            return None
        best = speeds[self._in_use]
        unknown = [plan for plan in self._counted if self._is_unknown(plan, step)]
        recorded = [plan for plan in unknown if plan in self._tokens.found_before]
        for each in (recorded, unknown):
            plan = max(each, key=speeds.__getitem__, default=None)
            if plan is None or not self._is_promising(plan, speeds[plan], best, step):
                continue
            steps = self._fewest_steps(plan, step)
            if self.costs.knows_like(plan):
                steps = max(steps, min(-(-COUNTED_STEPS // step.batch_size), _STEPS_OF_A_TRIAL))
            if self._is_paid((plan, steps), best, step):
                return plan, steps
        close = [
            plan
            for plan, speed in speeds.items()
            if plan == PLAIN or (speed >= _CLOSE * best and self._tokens.is_counted(plan))
        ]
        since = {plan: self._num_steps - self._tried_at.get(plan, 0) for plan in close}
        since[PLAIN] *= len(close)  # what plain steps take is to be known near in time
        least = dict.fromkeys(close, _STEPS_PER_TRIAL * len(close))
        least[PLAIN] = min(_FIRST_PLAIN << self._num_plain_trials, least[PLAIN])
        due = [plan for plan in close if plan != self._last_run and since[plan] >= least[plan]]
        if not due:
            return None
        plan = max(due, key=since.__getitem__)
        trial = (plan, self._fewest_steps(plan, step))
        if not self._is_paid(trial, best, step):
            return None
        self._tried_at[plan] = self._num_steps
        self._num_plain_trials += plan == PLAIN
        return trial

    def _is_promising(self, plan: Plan, speed: float, best: float, step: NextStep) -> bool:
        """Whether it could win, by what is hoped of it."""
        if not self.costs.knows_rows_at(step.batch_size):  # they may be free here
            speed = self.expected_tokens(plan) / plan.forwards_per_step
        is_told = self.costs.knows_like(plan) and self._tokens.is_counted(plan)
        return speed > (1 if is_told else _HOPELESS) * best

    def _fewest_steps(self, plan: Plan, step: NextStep) -> int:
        """Of a trial: the first at a place warms it up."""
        return 1 if Work.of(plan, step.batch_size, step.context).place in self._ran else 2

    def _is_paid(self, trial: tuple[Plan, int], best: float, step: NextStep) -> bool:
        """Whether what has run is long enough for what the trial may lose, if it may: tokens without hope."""
        plan, steps = trial
        work = Work.of(plan, step.batch_size, step.context)
        cost, worth = self.costs.cost(work), self._tokens.surer(plan) / best
        is_known = self.costs.knows_like(plan)
        loss = (cost if is_known else _FEARED * cost) - worth
        if not is_known and plan not in self._tokens.found_before:
            loss = max(loss, _LEAST_UNKNOWN)
        lost = steps * loss + self._start_cost(plan, step.batch_size, step.context)
        return lost <= 0 or self._trials.unpaid + lost <= _SHARE_TO_TRY * self._plain_steps

    def _start_cost(self, plan: Plan, batch_size: int, context: int) -> float:
        """Plain steps that it takes to begin with a plan: a draft forward, where it is fused."""
        if plan.kind is not PlanKind.FUSED:
            return 0.0
        return self.costs.cost(Work.of(Plan(plan.num_drafts), batch_size, context)) / 2

    def _from_history(self, step: NextStep, without: Chosen) -> tuple[Chosen, Sequence[int] | None]:
        """Drafts from history if they beat the plan in use, and how many for each request."""
        size, most = step.batch_size, self._looked_up[-1].num_drafts
        one_more = Work(VERIFY, 1, size, 2 * size, step.context)  # a row for each request
        sizes = [plan.num_drafts for plan in self._looked_up]
        costs = [self.costs.cost(Work.of(plan, size, step.context)) for plan in self._looked_up]
        least_chance = min(max(without.rate * cheapest_draft(sizes, costs), _LEAST_CHANCE), 1.0)
        chances = step.outlook(HISTORY, most, least_chance)
        looked = dataclasses.replace(without, has_looked=True)
        if not chances or not any(chances):
            return looked, None
        trust = min(self._kept / self._promised, 1.2)
        best, fastest, few = looked, without.rate, None
        most_rows = max(size + max(size, _FIRST_DRAFTS), 2 * self.costs.most_rows())
        for drafts in verifiable(chances, step.least_saved):
            if drafts.rows > most_rows:
                continue
            work = one_more._replace(rows=drafts.rows)
            tokens = 1 + trust * drafts.expected / size
            speed = tokens / (self.costs.cost(work) + self._looks.cost)
            if speed > fastest:
                plan = next(each for each in self._looked_up if each.num_drafts >= drafts.widest)
                best = dataclasses.replace(looked, plan=plan, work=work, tokens=tokens)
                fastest, few = speed, drafts
        if few is None or not self._is_worth_switching(best, step):
            return looked, None
        return best, few.lengths(chances)

    def _is_worth_switching(self, best: Chosen, step: NextStep) -> bool:
        """Whether history wins by a margin, with the look that each of its steps takes.

        From a fused plan and back costs a draft forward.
        """
        cost = self.costs.cost(best.work) + self._looks.cost
        gain = best.tokens - best.rate * cost
        is_on = self._last_run.drafter == HISTORY
        if self._in_use.kind is PlanKind.FUSED:
            start = best.rate * self._start_cost(self._in_use, 1, step.context)
            return gain > (-start / _STEPS_PER_CHOICE if is_on else start)
        return gain > (0.0 if is_on else _MARGIN / 2 * best.rate * cost)

    def _balance(self, chosen: Chosen, taken: StepsTaken) -> None:
        """What the steps have lost or saved against the plan in use, and how fast they were.

        By what they cost where that is known, not by what they took: a machine that paused has lost nothing
        by the plan.
        """
        seconds, num_steps = taken.seconds, len(taken.step_seconds)
        if taken.plan == PLAIN:
            num_others = self._num_steps - num_steps - self._plain_at
            for index, each in enumerate(taken.step_seconds):
                self._plain_times.observe(chosen.work, each, 0 if index else num_others)
            self._plain_at = self._num_steps
        plain_s = self._plain_times.seconds(chosen.work)
        if not plain_s:  # none was measured, or by a clock that stands still
            return
        tokens, total_s = taken.num_tokens / taken.batch_size, seconds + taken.choice_seconds
        self._plain_steps += seconds / plain_s
        for index, part in enumerate((total_s, chosen.tokens / chosen.cost * total_s, tokens * plain_s)):
            self._speeds[index] += part
        cost = num_steps * chosen.cost
        if not chosen.is_measured:
            cost = max(cost, min(seconds / plain_s, _WORST * cost))
        lost = cost - tokens / chosen.rate
        if chosen.is_trial:
            self._trials.add(lost + taken.start_seconds / plain_s)
            if seconds / plain_s > 2 * self._tokens.surer(taken.plan) / (_HOPELESS * chosen.rate):
                self._trial = None  # even if half of it was for the first time
        elif cost < tokens:
            self._trials.add(-_SHARE_OF_GAINS * (tokens - cost))
        if chosen.has_looked:
            look = taken.choice_seconds / plain_s
            self._looks.charge(look, lost if taken.plan.drafter == HISTORY else 0.0)
            self._chosen = dataclasses.replace(chosen, has_looked=False)

    def _forget(self) -> None:
        """Policy and prompts have changed meanwhile: what is not in use may have become better."""
        self._tokens.forget(but=self._in_use)
