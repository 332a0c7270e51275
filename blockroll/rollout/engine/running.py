"""A request while it runs: its committed tokens, their records, and when it ends."""

from blockroll.errors import RequestFailed
from blockroll.rollout.engine.ends import StopRule
from blockroll.samplers.text import Text
from blockroll.types import Commit, FinishReason, Guide, Plan, Request, RequestStep, Rollout, RolloutStats


class RunningRequest:
    """Invariant: the columns of committed tokens have equal length; the last token overall is the anchor."""

    def __init__(self, request: Request, stop_rule: StopRule, guide: Guide | None = None) -> None:
        """`guide` stands before the first token of the completion."""
        prefix = request.prefix
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._stop_rule = stop_rule
        self._token_ids = list(prefix.token_ids) if prefix else []
        self.text = Text(
            sampling=request.sampling,
            prompt_ids=request.prompt_ids,
            token_ids=self._token_ids,
            end_token_ids=stop_rule.stop_token_ids,
        )
        self.restart(guide)
        self._policy_logprobs = list(prefix.policy_logprobs) if prefix else []
        self._behavior_logprobs = list(prefix.behavior_logprobs) if prefix else []
        self._policy_versions = list(prefix.policy_versions) if prefix else []
        stats = prefix.stats if prefix else RolloutStats()
        self._num_prefilled, self._num_reused = stats.num_prefilled, stats.num_reused
        self._num_forwards = stats.num_forwards
        self._num_preempted = stats.num_preempted
        self.first_attempt = 0  # attempts count on from here; it may be set before the first step
        self._num_shortages = stats.num_shortages
        self._steps = dict(stats.steps)
        self.proposal: object | None = None  # what its drafter keeps for the position behind the anchor

    @property
    def is_running(self) -> bool:
        """Whether another step follows."""
        return self.finish_reason is None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and committed tokens; the last one is the anchor."""
        return (*self.request.prompt_ids, *self._token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and committed tokens: the context of its next step."""
        return len(self.request.prompt_ids) + len(self._token_ids)

    @property
    def num_left(self) -> int:
        """Tokens until it has as many as it may have."""
        return self._stop_rule.max_tokens - len(self._token_ids)

    @property
    def anchor(self) -> int:
        """The last token: it has no row in the cache yet."""
        return self._token_ids[-1] if self._token_ids else self.request.prompt_ids[-1]

    @property
    def state(self) -> tuple[int, int, int, int]:
        """Anchor, seed, attempt, position of the next token: what the next step needs besides the cache."""
        return self.anchor, self.request.seed, self.first_attempt + self._num_forwards, self.num_tokens

    def restart(self, guide: Guide | None) -> None:
        """Go on with this guide, which stands before the first token, behind what was committed."""
        if guide is not None:
            guide.advance(self._token_ids)
        self.text.restart(guide)

    def count_prefill(self, num_prefilled: int, num_reused: int) -> None:
        """So many rows before its anchor were computed, and so many taken over from other texts."""
        self._num_prefilled += num_prefilled
        self._num_reused += num_reused

    def count_preemption(self, *, keeps_proposal: bool) -> None:
        """It gave its slot up, and keeps its text; its drafts only if the plan stays that they fit."""
        self._num_preempted += 1
        if not keeps_proposal:
            self.proposal = None

    def count_shortage(self) -> None:
        """A step with it was undone, because memory ran out."""
        self._num_shortages += 1

    def start_proposal(self, proposal: object) -> None:
        """Take the drafts of a draft forward of its own, which counts."""
        self.proposal = proposal
        self._num_forwards += 1

    def commit(
        self,
        token_ids: list[int],
        is_draft: list[bool],
        policy_logprobs: list[float],
        behavior_logprobs: list[float],
        version: int,
        *,
        plan: Plan,
        num_drafts: int,
        level: int | None,
        proposal: object | None,
    ) -> Commit:
        """One step has run, with so many drafts to verify: append its tokens up to the end of the request.

        `level` is that of the proposal the drafts came from, None where they came from none; `proposal` is
        for the position behind the new anchor. Raises RequestFailed where the text cannot be
        decoded or the constraint raises; then no column has changed.
        """
        kept, finish_reason = self._stop_rule.cut(self._token_ids, token_ids, self.text.guide)
        kept_ids, kept_drafts = token_ids[:kept], is_draft[:kept]
        if self.text.guide is not None and finish_reason is None:
            try:
                self.text.guide.advance(kept_ids)
            except Exception as error:
                raise RequestFailed(f"its constraint raised {error!r}") from error
        step = RequestStep(plan, level, num_drafts, tuple(is_draft), kept)
        steps = {**self._steps, step: self._steps.get(step, 0) + 1}
        num_forwards = plan.forwards_per_step
        commit = Commit(
            request_id=self.request.request_id, token_ids=tuple(kept_ids), is_draft=tuple(kept_drafts)
        )
        # No calls from here on: an interrupt finds all of it as it was, or all of it changed.
        self.finish_reason, self.proposal, self._steps = finish_reason, proposal, steps
        self._num_forwards += num_forwards
        self._token_ids += kept_ids
        self._policy_logprobs += policy_logprobs[:kept]
        self._behavior_logprobs += behavior_logprobs[:kept]
        self._policy_versions += [version] * kept
        return commit

    def fail(self, error: str) -> None:
        """It ends with what was committed so far, and with this error, a class and what is wrong."""
        self.error = f"{error} for request {self.request.request_id!r}"
        self.finish_reason = "error"

    def rollout(self, speedups: tuple[float, float] | None = None) -> Rollout:
        """The finished sample; of a request that goes on, what an abort now gives."""
        return Rollout(
            request=self.request,
            token_ids=tuple(self._token_ids),
            policy_logprobs=tuple(self._policy_logprobs),
            behavior_logprobs=tuple(self._behavior_logprobs),
            policy_versions=tuple(self._policy_versions),
            law=self.request.sampling.law,
            finish_reason=self.finish_reason or "abort",
            stats=RolloutStats(
                num_prefilled=self._num_prefilled,
                num_reused=self._num_reused,
                num_preempted=self._num_preempted,
                num_forwards=self._num_forwards,
                num_shortages=self._num_shortages,
                steps=tuple(self._steps.items()),
                speedups=speedups,
            ),
            error=self.error,
        )
