"""The exact law of what an engine commits behind drafts from history, given what the siblings have written.

As `engine_law`, with two differences. What is drafted is the drafter's to say: a state is run once to see its
drafts, then its coins are split at the thresholds that they imply. And a drafter remembers: states are joined
only where texts, drafts and acceptances were the same at every step. Each request has a history of its own,
beside siblings that follow a script, so that no cell is another's sibling.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import pad

from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine.drafting import DraftStep
from blockroll.rollout.engine.ends import StopRule
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import POINT_MASS, Draft, Law, Plan, Prefix, Request, Rollout, RolloutStats, Sampling
from tests.law.engine_law import PROMPT, Processing, Reached, _run
from tests.law.integrate import Tokens, Toy, _boundaries, _product, _split
from tests.law.table_policy import LONGEST

SAMPLING = Sampling(max_tokens=LONGEST - 1)
_SEED = -1  # of a sibling; requests have those from 0 on


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """What others have written: one that runs, so many tokens further at each step, and texts that ended."""

    running: Tokens = ()
    pace: int = 1
    ended: Sequence[Tokens] = ()
    ended_group: str | None = None

    def beside(self, step: int) -> RunningRequest:
        """The one that runs, as far as it is committed at this step."""
        tokens = self.running[: self.pace * (step + 1)]
        zeros = (0.0,) * len(tokens)
        prefix = Prefix(
            token_ids=tokens,
            policy_logprobs=zeros,
            behavior_logprobs=zeros,
            policy_versions=(0,) * len(tokens),
        )
        request = Request(
            request_id="sibling", prompt_ids=(PROMPT,), seed=_SEED, sampling=SAMPLING, prefix=prefix
        )
        return RunningRequest(
            request, StopRule(stop_token_ids=frozenset(), stop=(), max_tokens=LONGEST - 1, decode=None)
        )

    def rollouts(self) -> list[Rollout]:
        """Those that ended."""
        return [
            Rollout(
                request=Request(
                    request_id=f"ended {index}",
                    prompt_ids=(PROMPT,),
                    seed=_SEED - 1 - index,
                    sampling=SAMPLING,
                    group_id=self.ended_group,
                ),
                token_ids=tokens,
                policy_logprobs=(0.0,) * len(tokens),
                behavior_logprobs=(0.0,) * len(tokens),
                policy_versions=(0,) * len(tokens),
                law=Law(1.0),
                finish_reason="length",
                stats=RolloutStats(),
            )
            for index, tokens in enumerate(self.ended)
        ]


class Apart(HistoryDrafts):
    """Each request by a drafter of its own, beside the siblings of a script."""

    def __init__(self, make: Callable[[], HistoryDrafts], siblings: Siblings, plan: Plan) -> None:
        super().__init__()
        self._make, self._siblings, self._plan = make, siblings, plan
        self._drafters: dict[str, HistoryDrafts] = {}
        self._num_steps = 0

    def finished(self, rollout: Rollout) -> None:
        """Nothing: the script alone says what is known."""

    def propose(self, step: DraftStep) -> Draft:
        sibling = self._siblings.beside(self._num_steps)
        self._num_steps += 1
        tokens, counts = [], []
        for running in step.batch:
            drafter = self._drafters.get(running.request.request_id)
            if drafter is None:
                drafter = self._drafters[running.request.request_id] = self._make()
                drafter.check(self._plan, step.policy)
                for rollout in self._siblings.rollouts():
                    drafter.finished(rollout)
            pair = DraftStep(
                plan=step.plan,
                batch=[sibling, running],
                policy=step.policy,
                cache=step.cache,
                first_logits=None,
            )
            draft = drafter.propose(pair)
            tokens.append(pad(draft.token_ids_BK[1], (0, step.plan.num_drafts - draft.token_ids_BK.shape[1])))
            counts.append(draft.num_drafts_B[1])
        return Draft(token_ids_BK=torch.stack(tokens), law=POINT_MASS, num_drafts_B=torch.stack(counts))


@dataclass
class Integrated:
    """The law of the first tokens, the same corrected by the product of pi / mu, and all that was drafted."""

    law: dict[Tokens, float]
    corrected: dict[Tokens, float]
    drafts: set[tuple[Tokens, Tokens]] = field(default_factory=set)  # by the text before them


def history_law(
    toy: Toy,
    plan: Plan,
    siblings: Siblings,
    *,
    length: int,
    weight: float = 1.0,
    make: Callable[[], HistoryDrafts] = lambda: HistoryDrafts(row_cost=0.01),
) -> Integrated:
    """The law of a request's first `length` tokens, given its siblings' texts."""
    law: dict[Tokens, float] = defaultdict(float)
    corrected: dict[Tokens, float] = defaultdict(float)
    integrated = Integrated(law, corrected)
    # By the text and, step by step, the drafts and how many were accepted.
    frontier: dict[tuple, Reached] = {((), ()): Reached(mass=1.0, corrected=1.0)}
    plans: list[Plan] = []

    def run(coins_C):
        return _run(toy, plans, coins_C, weight, Processing(), None, lambda: [Apart(make, siblings, plan)])

    while frontier:
        plans.append(plan)
        idle = (0.5,) * (2 * plan.num_drafts + 1)
        asked = run([(*reached.coins, idle) for reached in frontier.values()])
        cells = []
        for (state, reached), (_, _, drafts, _) in zip(frontier.items(), asked, strict=True):
            integrated.drafts.add((state[0], drafts))
            for coins, volume in zip(*_cells(toy, plan, state[0], drafts), strict=True):
                cells.append((state, reached, tuple(coins), volume))
        outcomes = run([(*reached.coins, coins) for _, reached, coins, _ in cells])
        following: dict[tuple, Reached] = defaultdict(Reached)
        for (state, reached, coins, volume), (new, num_accepted, drafts, ratio) in zip(
            cells, outcomes, strict=True
        ):
            (history, blocks), mass = state, reached.mass * volume
            text, better = history + new, reached.corrected * volume * ratio(length)
            if len(text) >= length:
                law[text[:length]] += mass
                corrected[text[:length]] += better
                continue
            entry = following[text, (*blocks, (drafts, num_accepted))]
            entry.mass += mass
            entry.corrected += better
            entry.coins = (*reached.coins, coins)
        frontier = dict(following)
    return integrated


def _cells(toy: Toy, plan: Plan, history: Tokens, drafts: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Points (C, 2K + 1): coins that no draft uses, accept coins, and the coin of the last token."""
    rows = [
        Processing().target_V(toy.target_weights(history + drafts[:i]), history + drafts[:i], toy.temperature)
        for i in range(len(drafts) + 1)
    ]
    residuals = [
        np.where(np.arange(toy.vocab_size) == draft, 0.0, row)
        for draft, row in zip(drafts, rows, strict=False)
    ]
    idle = (np.array([0.5]), np.array([1.0]))
    accepts = [_split(row[draft][None], "low") for draft, row in zip(drafts, rows, strict=False)]
    final_T = np.concatenate([_boundaries(row) for row in (*rows, *residuals)])
    intervals = [
        *[idle] * plan.num_drafts,
        *accepts,
        *[idle] * (plan.num_drafts - len(drafts)),
        _split(final_T, "low"),
    ]
    return (
        _product(point for point, _ in intervals),
        _product(width for _, width in intervals).prod(axis=1),
    )
