"""Scripts of what siblings have written, and a drafter that sees them alone.

Each request has a history of its own, beside siblings that follow a script, so that what it is drafted is
known whatever the other requests of the engine write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine.drafting import DraftStep
from blockroll.rollout.engine.ends import StopRule
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import POINT_MASS, Draft, Law, Plan, Prefix, Request, Rollout, RolloutStats, Sampling
from tests.law.engine_law import PROMPT
from tests.law.integrate import Tokens
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
        self.drafts: set[tuple[Tokens, Tokens]] = set()  # all of them, by the text before them

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
            drafted = tuple(draft.token_ids_BK[1, : counts[-1]].tolist())
            self.drafts.add((tuple(running.text.token_ids), drafted))
        return Draft(token_ids_BK=torch.stack(tokens), law=POINT_MASS, num_drafts_B=torch.stack(counts))
