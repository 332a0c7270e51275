"""What rollouts count of their steps is what a hand count of the steps' records gives."""

import dataclasses
from collections import Counter

import pytest

from blockroll.rollout.audit.files import audit_files, read_audit
from blockroll.rollout.audit.writer import KINDS, AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.mask_rows import MaskRows
from blockroll.rollout.engine.running import RunningRequest
from blockroll.types import HISTORY, Plan, RequestStep, Sampling, counted
from tests.engines import PlansInTurn, make_requests, run
from tests.invariants.test_engine import joining_and_leaving
from tests.models import prompts, random_policy

FUSED = Plan(4, (0, 2, 4))
PLANS = {
    "plain": Plan(0),
    "two_forward": Plan(4),
    "fused": FUSED,
    "history": Plan(4, drafter=HISTORY),
    "in_turn": PlansInTurn(FUSED, Plan(4, (0, 4)), Plan(4), Plan(0)),
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


class HandCount:
    """An engine's observer: every request-step as the record of its step has it, in order."""

    def __init__(self):
        self.steps = {}
        self._left = {}  # by request: plan and accepted drafts of its step before

    def __call__(self, trace):
        rows = zip(
            trace.request_ids,
            trace.draft.num_drafts_B.tolist(),
            trace.verdict.num_committed_B.tolist(),
            trace.verdict.is_draft_BL.tolist(),
            trace.num_kept,
            strict=True,
        )
        for name, num_drafts, num_committed, is_draft_L, num_kept in rows:
            before, num_accepted = self._left.get(name, (Plan(0), 0))
            level = None
            if trace.plan.levels and before.levels:
                level = max(each for each in before.levels if each <= num_accepted)
            is_draft = tuple(is_draft_L[:num_committed])
            step = RequestStep(trace.plan, level, num_drafts, is_draft, num_kept)
            self.steps.setdefault(name, []).append(step)
            self._left[name] = (trace.plan, sum(is_draft))


def in_slots(policy, plan, sampling):
    hand = HandCount()
    rollouts = run(policy, joining_and_leaving(sampling), plan, max_batch_size=5, observers=(hand,))
    return hand.steps, rollouts


def differing(hand, rollouts):
    """Whose counts are not those of its records, in the order of their first."""
    return [
        name
        for name, rollout in rollouts.items()
        if rollout.stats.steps != tuple(Counter(hand[name]).items())
    ]


@EACH_PLAN
def test_counts_are_those_of_the_records(policy, plan):
    hand, rollouts = in_slots(policy, plan, Sampling())
    assert differing(hand, rollouts) == []
    for name, rollout in rollouts.items():
        stats, steps = rollout.stats, hand[name]
        assert sum(step.num_kept for step in steps) == len(rollout.token_ids)
        assert stats.num_drafted == sum(step.num_drafts for step in steps)
        assert stats.num_accepted == sum(sum(step.is_draft[: step.num_kept]) for step in steps)
        assert stats.num_verify_steps == sum(step.num_drafts > 0 for step in steps)
        assert dict(stats.steps_by_plan) == Counter(step.plan for step in steps)
    steps = counted(rollout.stats.steps for rollout in rollouts.values())
    if plan in (Plan(4), FUSED):
        assert any(step.num_kept < len(step.is_draft) for step in steps), "no step was cut by an end"
    if plan == FUSED:
        assert {step.level for step in steps} == {None, 0, 2, 4}


@pytest.mark.parametrize("fault", ["the next proposal's level", "cut drafts count", "steps of a kind once"])
def test_counts_that_are_wrong_are_found(policy, monkeypatch, fault):
    commit = RunningRequest.commit

    def wrong(self, token_ids, is_draft, *columns, level, proposal, **options):
        before = dict(self._steps)
        if fault == "the next proposal's level":
            level = getattr(proposal, "level", None)
        done = commit(self, token_ids, is_draft, *columns, level=level, proposal=proposal, **options)
        if fault == "cut drafts count":
            self._steps = {step._replace(num_kept=len(step.is_draft)): n for step, n in self._steps.items()}
        if fault == "steps of a kind once":
            self._steps = {**self._steps, **before}
        return done

    monkeypatch.setattr(RunningRequest, "commit", wrong)
    hand, rollouts = in_slots(policy, FUSED, Sampling())
    assert len(differing(hand, rollouts)) >= 3


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=24), Sampling(max_tokens=24, draft_temperature=0)])
@pytest.mark.parametrize("name", ["plain", "two_forward", "fused", "history"])
def test_recovered_and_extra_tokens_are_those_of_the_audit(policy, tmp_path, name, sampling):
    writer = AuditWriter(tmp_path)
    requests = make_requests(prompts(12), sampling)
    rollouts = run(policy, requests, PLANS[name], observers=(writer,), max_batch_size=4)
    writer.flush()
    kinds = Counter(
        KINDS[code] for path in audit_files(tmp_path) for code in read_audit(path).numbers_N["kind"]
    )
    steps = counted(rollout.stats.steps for rollout in rollouts.values())
    for kind, number in (
        ("accepted", "num_accepted"),
        ("recovered", "num_recovered"),
        ("extra", "num_extra"),
    ):
        assert sum(getattr(step, number) * count for step, count in steps.items()) == kinds[kind], kind
    assert (name == "plain") == (kinds["plain"] > 0)
    assert (name == "plain") == (kinds["recovered"] == 0)


def test_counts_survive_preemption(policy):
    plan, requests = Plan(4), make_requests(prompts(6), Sampling(max_tokens=24, ignore_eos=True))
    hand = HandCount()
    longest = max(len(request.prompt_ids) for request in requests) + 24
    engine = Engine(
        policy, plan=plan, cache="pages", page_size=4, max_cache_rows=2 * longest, observers=(hand,)
    )
    engine.submit(requests)
    rollouts = {}
    while engine.num_requests:
        rollouts |= {each.request.request_id: each for each in engine.step().finished}
    assert sum(rollout.stats.num_preempted for rollout in rollouts.values()) > 0
    assert differing(hand.steps, rollouts) == []


def test_counts_go_on_in_a_request_that_resumes_elsewhere(policy):
    plan, (request,) = FUSED, make_requests(prompts(1), Sampling(max_tokens=40, ignore_eos=True))
    hand = HandCount()
    engine = Engine(policy, plan=plan, observers=(hand,))
    engine.submit([request])
    for _ in range(3):
        engine.step()
    (aborted,) = engine.abort([request.request_id])
    assert aborted.stats.steps == tuple(Counter(hand.steps["r0"]).items())

    again = HandCount()
    resumed = run(
        policy, [dataclasses.replace(request, prefix=aborted.as_prefix())], plan, observers=(again,)
    )
    steps = Counter([*hand.steps["r0"], *again.steps["r0"]])
    assert dict(resumed["r0"].stats.steps) == steps
    assert sum(step.num_kept * count for step, count in steps.items()) == 40


def test_only_a_fused_step_drafts_from_a_proposal_that_a_step_has_left(policy, monkeypatch):
    """The step behind a fused one finds its proposal in place, but does not draft from it."""
    plans = PlansInTurn(FUSED, Plan(4))
    monkeypatch.setattr(
        MaskRows, "levels", lambda self, step: [getattr(each.proposal, "level", None) for each in step.batch]
    )
    hand, rollouts = in_slots(policy, plans, Sampling())
    assert differing(hand, rollouts)
