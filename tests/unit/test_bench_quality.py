"""What a measurement says of drafts and answers: acceptance by position, pass@k."""

import dataclasses
import itertools
import math

import pytest

from blockroll.bench.bench import TRANSFORMERS, Judge, run_bench
from blockroll.bench.pass_at_k import pass_at_k
from blockroll.bench.workload import make_waves
from blockroll.errors import InvalidInput
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.types import PLAIN, Plan, RequestStep
from tests.models import prompts
from tests.unit.bench import OPTIONS, PLANS, WORKLOAD

FUSED = Plan(4, (0, 2, 4))


@pytest.mark.parametrize("plan", [Plan(4), FUSED], ids=lambda plan: plan.name)
def test_acceptance_by_position_is_what_a_hand_count_of_the_records_gives(saved, plan):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(3,), max_tokens=(20,))
    (row,) = run_bench(policy, prompts(5), [plan], options, policy_path=path)

    records = []
    engine = Engine(policy, plan=plan, observers=(records.append,))
    workload = dataclasses.replace(WORKLOAD, max_tokens=20)
    for repeat in range(options.repeats):
        for wave in make_waves(prompts(5), workload, repeat, options):
            engine.submit(wave)
        while engine.num_requests:
            engine.step()
    steps = [
        (
            int(record.draft.num_drafts_B[b]),
            record.verdict.is_draft_BL[b, : record.verdict.num_committed_B[b]],
        )
        for record in records
        for b in range(len(record.request_ids))
    ]
    assert row.num_verify_steps == len(steps)
    for i in range(1, plan.num_drafts + 1):
        reached = [bool(is_draft[i - 1]) for drafts, is_draft in steps if i <= min(drafts, len(is_draft))]
        assert row.acceptance_by_position[i - 1] == (sum(reached) / len(reached) if reached else None)
        at_least = [int(is_draft.sum()) >= i for _, is_draft in steps]
        assert row.accepted_at_least[i - 1] == sum(at_least) / len(steps)
    if plan.levels:
        assert len({drafts for drafts, _ in steps}) > 1


def test_acceptance_without_steps_is_unknown():
    plain = RequestStep(PLAIN, None, 0, (False,), 1)
    for counts in ({}, {plain: 3}):
        acceptance = AcceptanceByPosition(counts)
        assert acceptance.num_steps == 0
        assert acceptance.conditional == acceptance.length_shares == acceptance.at_least == ()


def test_a_position_that_no_step_reached_is_unknown():
    acceptance = AcceptanceByPosition({RequestStep(Plan(2, (0,)), 0, 2, (False,), 1): 3})

    assert acceptance.conditional == (0.0, None)
    assert acceptance.at_least == (0.0, 0.0)
    assert acceptance.length_shares == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples):
    for correct in range(num_samples + 1):
        outcomes = [True] * correct + [False] * (num_samples - correct)
        for k in range(1, num_samples + 1):
            subsets = [any(subset) for subset in itertools.combinations(outcomes, k)]
            assert pass_at_k(num_samples, correct, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_pass_at_k_is_unbiased(k):
    chance, num_samples = 0.3, 5
    mean = sum(
        math.comb(num_samples, correct)
        * chance**correct
        * (1 - chance) ** (num_samples - correct)
        * pass_at_k(num_samples, correct, k)
        for correct in range(num_samples + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(arguments):
    with pytest.raises(InvalidInput, match="0 <= correct <= samples"):
        pass_at_k(*arguments)


@pytest.mark.parametrize("changes", [{"k": 0}, {"k": 9}, {"num_prompts": 0}])
def test_a_judge_refuses_more_of_k_than_there_are_samples(changes):
    with pytest.raises(InvalidInput, match="a k from 1 to the samples"):
        Judge(is_correct=lambda index, token_ids: True, **changes)


def test_pass_at_k_is_measured_for_every_plan_and_law_by_the_judge(saved):
    policy, path = saved
    asked = []

    def is_correct(index, token_ids):
        asked.append((index, token_ids))
        return index == 0

    judge = Judge(is_correct=is_correct, num_prompts=3, num_samples=4, k=2)
    options = dataclasses.replace(OPTIONS, batches=(1, 3), mix_weights=(1.0, 0.5), repeats=1)
    rows = run_bench(policy, prompts(5), PLANS, options, policy_path=path, judge=judge, against=("generate",))

    for row in rows:
        figures = (row.pass_at_1, row.pass_at_k, row.pass_k, row.pass_samples, row.pass_prompts)
        if row.plan == TRANSFORMERS:
            assert figures == (None,) * 5
        else:
            assert figures == (pytest.approx(1 / 3), pytest.approx(1 / 3), 2, 4, 3)
    # Three subjects; batch sizes share what was drawn.
    assert len(asked) == 3 * 3 * 4
    assert len({token_ids for index, token_ids in asked[:12] if index == 1}) > 1
