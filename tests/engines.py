"""Running an engine in tests."""

from collections.abc import Iterable

from blockroll.rollout.engine import Engine
from blockroll.types import Plan, Request, Rollout, Sampling


def make_requests(prompts: Iterable[tuple[int, ...]], sampling: Sampling, *, seed: int = 0) -> list[Request]:
    return [
        Request(request_id=f"r{index}", prompt_ids=prompt, seed=seed * 100_003 + index, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]


def run(policy, requests: Iterable[Request], plan: Plan, **options) -> dict[str, Rollout]:
    """All rollouts by request id; the scheduler's invariants are checked on the way."""
    engine = Engine(policy, plan=plan, **options)
    engine.submit(requests)
    finished: dict[str, Rollout] = {}
    while engine.num_requests:
        for rollout in engine.step().finished:
            assert rollout.request.request_id not in finished
            finished[rollout.request.request_id] = rollout
        engine._scheduler.check_integrity()
    return finished
