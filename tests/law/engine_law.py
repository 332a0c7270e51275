"""The exact law of what an engine commits, over whole histories of drafts, by integrating over its uniforms.

A real Engine with its real cache decodes a policy of tables; only the coins are given. A step's outcome is a
step function of its coins, so each state splits them at the thresholds that the tables imply (`integrate.py`
says how) and every cell becomes one request. What a step leaves behind is a state: the committed tokens, and
under a fused plan the proposal it chose, which the test works out for itself. States that are alike are
joined, so that

    law(x) = sum over paths of blocks of the mass of the path,
    corrected(x) = sum over paths of the mass times the product of pi / mu along it

can be summed over every path that reaches a text.

Shapes: B requests, R rows, K drafted tokens, L = K + 1, P levels, S keys, V vocabulary, C cells.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, cycle
from unittest import mock

import numpy as np
import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.engine.outcome import Unread
from blockroll.rollout.engine.step import Decoder
from blockroll.types import Law, Plan, Request, Sampling
from tests.engines import PlansInTurn
from tests.law.engine_cells import PROMPT, Processing, State, step_cells
from tests.law.integrate import Tokens, Toy
from tests.law.table_policy import LONGEST, TablePolicy


@dataclass
class Reached:
    """All paths into one state; the coins are those of any one of them."""

    mass: float = 0.0
    corrected: float = 0.0
    coins: tuple[tuple[float, ...], ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """Before this step, whatever its coins will be, all texts are aborted and go on in another engine."""

    step: int
    broken_forward: int = 0  # the step's forward that raised first; 0: none, the abort falls between steps

    def resumed(self, engine: Engine, make_engine: Callable[[], Engine], num_requests: int) -> Engine:
        """The engine that goes on."""
        if self.broken_forward:
            with broken(engine.policy, self.broken_forward), pytest.raises(RuntimeError, match="broken"):
                engine.step()
        rollouts = engine.abort([str(c) for c in range(num_requests)])
        other = make_engine()
        other.submit(replace(rollout.request, prefix=rollout.as_prefix()) for rollout in rollouts)
        return other


FORWARDS = ("prefill", "verify_logits", "draft_logits", "fused_rows", "proposal_logits")


@contextmanager
def broken(policy: TablePolicy, number: int) -> Iterator[None]:
    """Within, the policy's n-th forward raises."""
    left = number

    def breaking(forward):
        def run(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                raise RuntimeError("broken")
            return forward(*arguments, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in FORWARDS:
            patch.setattr(policy, name, breaking(getattr(policy, name)))
        yield


def processed_law(toy: Toy, processing: Processing, length: int) -> dict[Tokens, float]:
    """The law of the first `length` tokens, one token at a time."""
    law: dict[Tokens, float] = {(): 1.0}
    for _ in range(length):
        law = {
            (*tokens, token): mass * p
            for tokens, mass in law.items()
            for token, p in enumerate(
                processing.target_V(toy.target_weights(tokens), tokens, toy.temperature).tolist()
            )
            if p > 0
        }
    return law


def engine_law(
    toy: Toy,
    *plans: Plan,
    length: int,
    weight: float = 1.0,
    processing: Processing | None = None,
    interruption: Interruption | None = None,
    make_policy: Callable[[Toy, int], TablePolicy] = TablePolicy,
    reads_late: bool = False,
) -> tuple[dict[Tokens, float], dict[Tokens, float]]:
    """The law of the first `length` tokens, and the same corrected by the product of pi / mu.

    Steps take the plans in turn, over and over. `reads_late` queues each step behind one that is not read.
    """
    processing = processing or Processing()
    turns = cycle(plans)
    plan = next(turns)
    law: dict[Tokens, float] = defaultdict(float)
    corrected: dict[Tokens, float] = defaultdict(float)
    frontier = {_first_state(plan): Reached(mass=1.0, corrected=1.0)}
    steps: list[Plan] = []
    while frontier:
        steps.append(plan)
        after = next(turns)
        following: dict[State, Reached] = defaultdict(Reached)
        cells = [
            (state, reached, coins, volume)
            for state, reached in frontier.items()
            for coins, volume in zip(*step_cells(toy, plan, state, weight, processing), strict=True)
        ]
        coins_C = [(*reached.coins, tuple(coins)) for _, reached, coins, _ in cells]
        outcomes = _run(toy, steps, coins_C, weight, processing, interruption, make_policy, reads_late)
        is_cut = interruption is not None and interruption.step == len(steps)
        for (state, reached, coins, volume), (new, num_accepted, drafted, ratio) in zip(
            cells, outcomes, strict=True
        ):
            history = state.history + new
            mass, better = reached.mass * volume, reached.corrected * volume * ratio(length)
            if len(history) >= length:
                law[history[:length]] += mass
                corrected[history[:length]] += better
                continue
            following_state = _next_state(plan, after, state.history, drafted, num_accepted, history)
            entry = following[_first_state(after, history) if is_cut else following_state]
            entry.mass += mass
            entry.corrected += better
            entry.coins = (*reached.coins, tuple(coins))
        frontier, plan = dict(following), after
    return dict(law), dict(corrected)


def _first_state(plan: Plan, history: Tokens = ()) -> State:
    return State(history, tuple((history, i) for i in range(plan.num_drafts)))


def _next_state(
    plan: Plan, after: Plan, before: Tokens, drafted: Tokens, num_accepted: int, history: Tokens
) -> State:
    """By the words of the design: the largest level at or below n, its slots n - p + 1..K.

    A fused step after one of as many drafts takes its proposal; any other step drafts anew.
    """
    if not (plan.levels and after.levels and plan.num_drafts == after.num_drafts):
        return _first_state(after, history)
    level = max(p for p in plan.levels if p <= num_accepted)
    known = before + drafted[:level]
    return State(history, tuple((known, j) for j in range(num_accepted - level + 1, plan.num_drafts + 1)))


def _run(
    toy: Toy,
    plans: Sequence[Plan],
    coins_C: Sequence[Sequence[Sequence[float]]],
    weight: float,
    processing: Processing,
    interruption: Interruption | None,
    make_policy: Callable[[Toy, int], TablePolicy],
    reads_late: bool,
) -> list:
    """Of the last of these steps, one plan each, per cell: tokens, number accepted, drafts, and pi / mu."""
    tables = [torch.tensor(step, dtype=torch.float64) for step in zip(*coins_C, strict=True)]
    step_index = [0]
    num_launched = count()
    drafted: dict[str, Tokens] = {}

    first_use: dict[tuple[int, int, int, str], tuple[int, int]] = {}

    def given_uniforms(seeds_B, positions_B, attempts_B, num_drafts, *, settles, by_position):
        if reads_late:  # the coins of a step too many decide nothing
            step_index[0] = min(next(num_launched), len(tables) - 1)
        step = tables[step_index[0]][seeds_B]
        if interruption is not None:  # a coin that has served comes again, as its words would give it
            purposes = ["draft"] * num_drafts + ["accept"] * num_drafts + ["final"] * (1 + settles)
            if by_position:
                assert by_position is True
                assert num_drafts == 0, "coins that decide nothing would need cells over several steps"
                purposes, attempts_B = ["token"], 0 * attempts_B
            offsets = [*range(num_drafts), *range(num_drafts), num_drafts, *[0] * settles]
            for b, (seed, position, attempt) in enumerate(
                zip(seeds_B.tolist(), positions_B.tolist(), attempts_B.tolist(), strict=True)
            ):
                for column, words in enumerate(zip(offsets, purposes, strict=True)):
                    key = (seed, attempt, position + words[0], words[1])
                    used = first_use.setdefault(key, (step_index[0], column))
                    step[b, column] = tables[used[0]][seed, used[1]]
        return step[:, :num_drafts], step[:, num_drafts:]

    def remember(request_ids, draft):
        for row, request_id in enumerate(request_ids):
            number = int(draft.num_drafts_B[row])
            drafted[request_id] = tuple(draft.token_ids_BK[row, :number].tolist())

    def read_and_remember(decoder, launched):
        remember([running.request.request_id for running in launched.step.batch], launched.outcome.draft)
        return read(decoder, launched)

    sampling = Sampling(
        temperature=toy.temperature,
        draft_temperature=toy.draft_temperature,
        max_tokens=LONGEST - 1,
        law=Law(weight),
        allow_truncated_mix=True,
        **processing.options,
    )

    def make_engine() -> Engine:
        left = plans[step_index[0] :]
        return Engine(
            make_policy(toy, max(plan.num_drafts for plan in plans)),
            plan=left[0] if len(set(left)) == 1 else PlansInTurn(*left),
            max_batch_size=len(coins_C),
            **options,
        )

    class UnreadWithDraft(Unread):
        def __init__(self, draft, *given):
            super().__init__(draft, *given)
            self.draft = draft

    read = Decoder.read
    options = {"observers": (lambda record: remember(record.request_ids, record.draft),)}
    if reads_late:
        options = {"cache": "pages", "page_size": 2, "overlap": "on"}
    with (
        mock.patch.object(decoding, "step_uniforms", given_uniforms),
        mock.patch.object(Decoder, "read", read_and_remember if reads_late else read),
        mock.patch.object(decoding, "Unread", UnreadWithDraft),
    ):
        engine = make_engine()
        engine.submit(
            Request(request_id=str(c), prompt_ids=(PROMPT,), seed=c, sampling=sampling)
            for c in range(len(coins_C))
        )
        for step in range(len(plans)):
            step_index[0] = step if not reads_late else step_index[0]
            if interruption is not None and interruption.step == step:
                engine = interruption.resumed(engine, make_engine, len(coins_C))
            result = engine.step()
    assert not reads_late or next(num_launched) == len(plans) + 1
    assert not result.finished, "the toy must not end before the test does"
    commits = {commit.request_id: commit for commit in result.commits}
    rollouts = {r.request.request_id: r for r in engine.abort([str(c) for c in range(len(coins_C))])}
    outcomes = []
    for c in range(len(coins_C)):
        commit, rollout = commits[str(c)], rollouts[str(c)]
        start = len(rollout.token_ids) - len(commit.token_ids)
        outcomes.append((commit.token_ids, sum(commit.is_draft), drafted[str(c)], _Ratio(rollout, start)))
    return outcomes


class _Ratio:
    """pi / mu of what a rollout's last step committed within a length, from the engine's own records."""

    def __init__(self, rollout, start: int) -> None:
        self.rollout, self.start = rollout, start

    def __call__(self, length: int) -> float:
        span = slice(self.start, length)
        logs = sum(self.rollout.policy_logprobs[span]) - sum(self.rollout.behavior_logprobs[span])
        return float(np.exp(logs))
