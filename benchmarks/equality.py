"""Drafts that never change a token: rollouts at temperature 1 under every plan, equal to plain ones.

    python -m benchmarks.evidence law equality

Grouped prompts of the tiny policy's causal part with an adapter; argmax drafts: each draft is a point mass.
Each way of decoding is compared with plain decoding in batches: alone, in batches of other sizes, on two Ray
replicas, on two of which one is killed, and aborted half way and gone on with. `auto` is asked for as
`reproducible`. Tokens that differ are looked at as `tests/equality.py` says: at a near-tie the coin, or two
best logits, hung on rounding; anything else counts as different.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import measured
from benchmarks.rows import Row
from benchmarks.workload import K, causal_part, prompts, trained_adapter
from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.reading import read_plan
from blockroll.rollout.pool.makers import make_pool
from blockroll.types import Request, Rollout, Sampling
from tests.equality import assert_near_tie, first_difference, largest_gap

BATCH, ODD = 64, 7
SIBLINGS = 8
MAX_TOKENS = 64
AUTO = "auto"  # asked for as `reproducible`
STEPS_BEFORE_ABORT = 2
MOST_EXAMINED = 20  # rollouts that differ; one that does is drawn again to see how near its coins came
PLANS = ("plain", f"history({K})", f"two_forward({K})", f"fused({K},[0,{K}])", AUTO)
ARGMAX = {"draft_temperature": 0.0}  # drafts of mask rows are then point masses, as those of history are


def wanted(policy: HFPolicy, count: int, **sampling: Any) -> list[Request]:
    """Rollouts in groups of siblings; every seed comes once."""
    options = Sampling(max_tokens=MAX_TOKENS, **ARGMAX, **sampling)
    siblings = SIBLINGS if options.temperature else 1
    texts = prompts(policy, -(-count // siblings))
    return [
        Request(
            request_id=f"{index // siblings}-{index % siblings}",
            prompt_ids=texts[index // siblings],
            seed=1_000_003 + index,
            sampling=options,
            group_id=str(index // siblings),
        )
        for index in range(count)
    ]


def compared(plain: Sequence[Rollout], others: Iterable[Rollout], policy: HFPolicy) -> Row:
    """How many rollouts differ from plain ones, at near-ties and otherwise, each by name."""
    found = {rollout.request.request_id: rollout for rollout in others}
    assert found.keys() == {rollout.request.request_id for rollout in plain}, "rollouts are lost"
    near_ties, different, gap = [], [], 0.0
    for rollout in plain:
        other = found[rollout.request.request_id]
        index = first_difference(rollout.token_ids, other.token_ids)
        gap = max(gap, largest_gap(rollout.policy_logprobs[:index], other.policy_logprobs[:index]))
        if index is not None and len(different) >= MOST_EXAMINED:
            different.append(f"{rollout.request.request_id} differs at token {index}, not examined")
        elif index is not None:
            try:
                assert_near_tie(policy, rollout, index)
            except AssertionError as difference:
                different.append(str(difference))
            else:
                near_ties.append(f"{rollout.request.request_id} at token {index}")
        elif (rollout.finish_reason, rollout.error) != (other.finish_reason, other.error):
            different.append(f"{rollout.request.request_id} ended by {other.finish_reason}: {other.error}")
    stats = [rollout.stats for rollout in found.values()]
    return {
        "rollouts": len(plain),
        "tokens": sum(len(rollout.token_ids) for rollout in plain),
        "different": len(different),
        "near_ties": len(near_ties),
        "named": [*different[:MOST_EXAMINED], *near_ties],
        "largest_logprob_gap": gap,
        "accepted_drafts": sum(each.num_accepted for each in stats),
        "plans_used": sorted({plan.name for each in stats for plan, _ in each.steps_by_plan}),
    }


class Ways:
    """The ways to decode the same requests: each returns all of their rollouts."""

    def __init__(self, adapter: Path, requests: Sequence[Request]) -> None:
        self.policy = causal_part(adapter)
        self.requests = requests
        self._adapter = adapter

    @functools.cached_property
    def plain(self) -> list[Rollout]:
        """What all others are compared with."""
        return self.in_batches("plain", BATCH)

    def in_batches(self, plan: str, batch: int) -> list[Rollout]:
        """By one engine."""
        engine = self._engine(plan, batch)
        engine.submit(self.requests)
        return _drained(engine)

    def aborted(self, plan: str, batch: int) -> list[Rollout]:
        """By one engine for a few steps, then aborted and gone on with by another."""
        first, second = self._engine(plan, batch), self._engine(plan, batch)
        ended: list[Rollout] = []
        num_resumed = 0
        for start in range(0, len(self.requests), batch):
            chunk = self.requests[start : start + batch]
            first.submit(chunk)
            for _ in range(STEPS_BEFORE_ABORT):
                ended += first.step().finished
            aborted = first.abort(request.request_id for request in chunk)
            num_resumed += len(aborted)
            second.submit(replace(rollout.request, prefix=rollout.as_prefix()) for rollout in aborted)
            ended += _drained(second)
        assert 2 * num_resumed > len(self.requests), f"only {num_resumed} rollouts were aborted half way"
        return ended

    def replicas(self, plan: str, batch: int, *, backend: str = "ray", kills: bool = False) -> list[Rollout]:
        """By two replicas; with `kills` one of them is killed while the rollouts arrive."""
        config = RolloutConfig(
            backend=backend,
            num_replicas=2,
            max_batch_size=batch,
            plan=plan,
            reproducible=plan == AUTO,
        )
        policy = PolicyConfig(path="tiny", adapter=str(self._adapter))
        with make_pool(policy, config) as pool:
            rollouts = pool.generate(self.requests)
            ended = [next(rollouts) for _ in range(len(self.requests) // 10)]
            if kills:
                os.kill(pool.health()[1].pid, signal.SIGKILL)
            ended += rollouts
            assert pool.states.count("DEAD") == int(kills), f"{pool.states}"
            assert not kills or pool.num_redispatched, "the replica that was killed had nothing to do"
        return ended

    def _engine(self, plan: str, batch: int) -> Engine:
        return Engine(
            self.policy,
            plan=read_plan(plan, self.policy),
            reproducible=plan == AUTO,
            max_batch_size=batch,
            max_length=512,
        )


def _drained(engine: Engine) -> list[Rollout]:
    ended: list[Rollout] = []
    while engine.num_requests:
        ended += engine.step().finished
    return ended


def equality(
    adapter: Path | None = None,
    *,
    count: int = 2_000,
    greedy: int = 200,
    plans: Sequence[str] = PLANS,
    backend: str = "ray",
    folder: Path | None = None,
) -> list[Row]:
    """A row for each way to decode: rollouts, tokens, and how many differ from plain decoding in batches."""
    adapter = adapter or trained_adapter()
    policy = causal_part(adapter)
    sampled = Ways(adapter, wanted(policy, count))
    greedily = Ways(adapter, wanted(policy, greedy, temperature=0.0))
    cells: dict[str, Callable[[], list[Row]]] = {}

    def add(ways: Ways, plan: str, how: str, decode: Callable[[], list[Rollout]]) -> None:
        temperature = ways.requests[0].sampling.temperature
        about = {"plan": plan, "how": how, "temperature": temperature}
        cells[f"{len(ways.requests)} at {temperature:g}, {plan}, {how}"] = lambda: [
            {**about, **compared(ways.plain, decode(), ways.policy)}
        ]

    for plan in plans:
        for how, batch in (("alone", 1), (f"batch {ODD}", ODD), (f"batch {BATCH}", BATCH)):
            if (plan, batch) != ("plain", BATCH):
                add(sampled, plan, how, functools.partial(sampled.in_batches, plan, batch))
        if plan != "plain":
            add(greedily, plan, f"batch {ODD}", functools.partial(greedily.in_batches, plan, ODD))
        aborted = functools.partial(sampled.aborted, plan, BATCH)
        add(sampled, plan, "aborted and gone on with", aborted)
        two = functools.partial(sampled.replicas, plan, ODD, backend=backend)
        add(sampled, plan, "two replicas", two)
        if backend == "ray":
            add(sampled, plan, "two replicas, one killed", functools.partial(two, kills=True))
    return measured("law_equality", cells, folder=folder)
