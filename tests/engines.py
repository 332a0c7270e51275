"""Running an engine in tests."""

from collections.abc import Iterable
from itertools import cycle

import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.plans import Choice, NextStep, StepsTaken
from blockroll.types import Plan, Request, Rollout, Sampling


def make_requests(prompts: Iterable[tuple[int, ...]], sampling: Sampling, *, seed: int = 0) -> list[Request]:
    return [
        Request(request_id=f"r{index}", prompt_ids=prompt, seed=seed * 100_003 + index, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]


class PlansInTurn:
    """Stands in for a planner: every step takes the next plan, over and over; what was observed is kept."""

    name = "in_turn"
    speedups = (1.0, 1.0)

    def __init__(self, *plans: Plan) -> None:
        self.candidates = plans
        self.observed: list[tuple[Plan, int, int, int]] = []  # plan, batch size, context, tokens
        self._turns = cycle(plans)

    def choose(self, step: NextStep) -> Choice:
        self._context = step.context
        return Choice(plan=next(self._turns))

    def observe(self, taken: StepsTaken) -> None:
        self.observed.append((taken.plan, taken.batch_size, self._context, taken.num_tokens))


def run(policy, requests: Iterable[Request], plan: Plan | PlansInTurn, **options) -> dict[str, Rollout]:
    """All rollouts by request id; the scheduler's invariants are checked on the way."""
    engine = Engine(policy, plan=plan, **options)
    engine.submit(requests)
    finished: dict[str, Rollout] = {}
    while engine.num_requests:
        for rollout in engine.step().finished:
            assert rollout.request.request_id not in finished
            finished[rollout.request.request_id] = rollout
        engine.check_integrity()
    return finished


def causal_logprobs(policy, rollout):
    """Teacher-forced log-probabilities of the finished text, by transformers' own forward."""
    prompt, tokens = rollout.request.prompt_ids, rollout.token_ids
    policy.model.set_attn_implementation(policy.stock_attention)
    with torch.no_grad():
        logits = policy.model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    policy.model.set_attn_implementation("blockroll")
    logits = logits[len(prompt) - 1 : -1].double() / rollout.request.sampling.logprob_temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
