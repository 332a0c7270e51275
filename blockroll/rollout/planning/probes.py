"""Steps that are run to know what they cost, before anything is generated: what `doctor` shows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from blockroll.policies.base import Policy
from blockroll.rollout.engine.drafting import Drafter, DraftStep
from blockroll.rollout.engine.engine import BareEngine
from blockroll.rollout.engine.plans import Choice, NextStep, StepsTaken
from blockroll.rollout.planning.candidates import candidate_plans
from blockroll.rollout.planning.costs import CostModel, Work
from blockroll.types import HISTORY, PLAIN, POINT_MASS, Draft, Plan, Request, Sampling

BATCH_SIZES = (1, 8, 32)
_ROUNDS = 4  # of which the first warms up
_PROMPT = 32  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What a plan costs at a batch, in plain steps, and from when on it pays."""

    batch_size: int
    plain_ms: float
    plan: Plan
    cost: float  # and the committed tokens of a request and step from which on it is faster


def probe(
    policy: Policy, costs: CostModel, *, drafters: Iterable[Drafter], batch_sizes: Sequence[int] = BATCH_SIZES
) -> list[PlanCost]:
    """Measure every plan that `auto` may choose, at these batches and a short context, into `costs`.

    `drafters` serve the plans of mask rows. Drafts from history are stood in for by arbitrary ones: what a
    step costs does not depend on what they are.
    """
    drafters = tuple(drafters)
    plans = [plan for plan in candidate_plans(policy) if plan != PLAIN]
    found = []
    for batch_size in batch_sizes:
        turns = _Turns(plans, costs)
        engine = BareEngine(
            policy, plan=turns, max_batch_size=batch_size, drafters=(*drafters, _Arbitrary(HISTORY))
        )
        most = min(policy.max_length - 1, _PROMPT)
        sampling = Sampling(max_tokens=policy.max_length - most, ignore_eos=True)
        requests = [
            Request(request_id=f"{index}", prompt_ids=(1,) * most, seed=index, sampling=sampling)
            for index in range(batch_size)
        ]
        engine.submit(requests)
        for _ in range(_ROUNDS * 2 * len(plans) + 1):
            if engine.num_requests < batch_size:
                break
            engine.step()
        engine.abort([request.request_id for request in requests])
        plain_ms = 1e3 * (costs.plain_seconds() or 0.0)
        found += [
            PlanCost(
                batch_size=batch_size,
                plain_ms=plain_ms,
                plan=plan,
                cost=costs.cost(Work.of(plan, batch_size, 2 * _PROMPT)),
            )
            for plan in plans
        ]
    return found


class _Turns:
    """Every plan in its turn, a plain step before each."""

    speedups = (1.0, 1.0)

    def __init__(self, plans: Sequence[Plan], costs: CostModel) -> None:
        self.candidates = (PLAIN, *plans)
        self._plans, self._costs = plans, costs
        self._num_steps = 0
        self._context = 0

    def choose(self, step: NextStep) -> Choice:
        index, is_other = divmod(self._num_steps, 2)
        self._num_steps += 1
        self._context = step.context
        return Choice(plan=self._plans[index % len(self._plans)] if is_other else PLAIN)

    def observe(self, taken: StepsTaken) -> None:
        work = Work.of(taken.plan, taken.batch_size, self._context)
        self._costs.observe(work, taken.seconds - taken.start_seconds)


class _Arbitrary(Drafter):
    """Drafts the first token of the vocabulary, again and again."""

    def __init__(self, name: str) -> None:
        self.name = name

    def propose(self, step: DraftStep) -> Draft:
        size, num_drafts, device = len(step.batch), step.plan.num_drafts, step.policy.device
        return Draft(
            token_ids_BK=torch.zeros((size, num_drafts), dtype=torch.int64, device=device),
            law=POINT_MASS,
            num_drafts_B=torch.full((size,), num_drafts, device=device),
        )
