"""What a measurement is asked for: its requests, its prompts, its lists, and what it refuses."""

import dataclasses
import math

import pytest

from blockroll.bench.bench import Judge, run_bench
from blockroll.bench.subjects import EngineSubject
from blockroll.bench.workload import cut_to_length, make_waves, random_prompts
from blockroll.cli.lists import numbers, split_plans, whole_numbers
from blockroll.errors import InvalidInput
from blockroll.types import PLAIN, Law, Plan, Sampling
from tests.engines import make_requests
from tests.models import prompts, random_policy
from tests.unit.bench import OPTIONS, WORKLOAD


def test_repeats_draw_other_requests_and_equal_repeats_the_same():
    first, again, second = (make_waves(prompts(5), WORKLOAD, repeat, OPTIONS) for repeat in (0, 0, 1))

    assert first == again
    assert [len(wave) for wave in first] == [3, 3]
    seeds = [[request.seed for wave in waves for request in wave] for waves in (first, second)]
    assert not set(seeds[0]) & set(seeds[1])


def test_a_repeat_computes_its_prompts_again():
    """Nothing else that is measured keeps them: keys and values of the wave before would be unfair."""
    subject = EngineSubject(random_policy(), Plan(4), law=Law(), batch=3, max_length=48)
    requests = make_requests([tuple(range(4, 24))] * 2, Sampling(max_tokens=4))
    for wave in [subject.decode(requests) for _ in range(2)]:
        assert sorted(rollout.stats.num_reused for rollout in wave.rollouts) == [0, 19]


@pytest.mark.parametrize(
    ("plans", "changes", "advice"),
    [
        ([PLAIN, PLAIN], {}, "measured once"),
        ([], {}, "at least one prompt and one plan"),
        ([PLAIN], {"max_tokens": (500,)}, "max_tokens of at most"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_advice(saved, plans, changes, advice):
    policy, path = saved
    with pytest.raises(InvalidInput, match=advice):
        run_bench(policy, prompts(2), plans, dataclasses.replace(OPTIONS, **changes), policy_path=path)


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": (0,)},
        {"batches": ()},
        {"repeats": 0},
        {"rollouts": 0},
        {"max_tokens": (0,)},
        {"prompt_tokens": (4, 0)},
        {"temperatures": ()},
    ],
)
def test_options_below_one_are_refused(changes):
    with pytest.raises(InvalidInput, match="at least 1"):
        dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batches": (2, 2)}, "batch sizes is measured once"),
        ({"temperatures": (-1.0,)}, "0 means greedy"),
        ({"mix_weights": (1.5,)}, "between 0 and 1, got 1.5"),
        ({"mix_weights": (math.nan,)}, "between 0 and 1, got nan"),
        ({"prompt_source": "random"}, "give prompt_tokens"),
    ],
)
def test_options_out_of_range_are_refused_with_advice(changes, advice):
    with pytest.raises(InvalidInput, match=advice):
        dataclasses.replace(OPTIONS, **changes)


@pytest.mark.parametrize(
    ("against", "judge", "changes", "advice"),
    [
        (
            ("wild",),
            False,
            {},
            "generate, continuous_batching, assisted, vllm, vllm_ngram, .*each once; got wild",
        ),
        (("generate", "generate"), False, {}, "each once"),
        ((), True, {"prompt_tokens": (4,)}, "leave out prompt_tokens"),
        ((), True, {"ignore_eos": True}, "ignore_eos, or the judge"),
    ],
)
def test_references_and_judges_that_make_no_sense_are_refused(saved, against, judge, changes, advice):
    policy, path = saved
    judged = Judge(is_correct=lambda index, token_ids: True) if judge else None
    with pytest.raises(InvalidInput, match=advice):
        run_bench(
            policy,
            prompts(2),
            [PLAIN],
            dataclasses.replace(OPTIONS, **changes),
            policy_path=path,
            against=against,
            judge=judged,
        )


def test_prompts_cut_to_length_end_as_the_prompts_do():
    texts = [(1, 2, 3), (4, 5), (6,)]

    assert cut_to_length(texts, 2) == [(2, 3), (4, 5), (5, 6)]
    assert cut_to_length(texts, 7) == [(3, 4, 5, 6, 1, 2, 3), (5, 6, 1, 2, 3, 4, 5), (6, 1, 2, 3, 4, 5, 6)]


def test_random_prompts_have_the_length_and_hold_allowed_tokens_only(saved):
    drawn = random_prompts(20, 9, allowed_ids=(4, 6, 8), seed=0)
    assert drawn == random_prompts(20, 9, allowed_ids=(4, 6, 8), seed=0)
    assert drawn != random_prompts(20, 9, allowed_ids=(4, 6, 8), seed=1)
    assert {len(prompt) for prompt in drawn} == {9}
    assert {token_id for prompt in drawn for token_id in prompt} == {4, 6, 8}

    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(2,), prompt_tokens=(60,), prompt_source="random")
    (row,) = run_bench(policy, [], [PLAIN], options, policy_path=path)
    assert (row.prompts, row.context) == ("random", 60)


def test_plans_are_split_at_commas_outside_parentheses():
    text = "plain,two_forward, fused(8,[0,4,8]),fused,fused(2, [0, 2]),two_forward(3)"
    plans = [Plan.parse(part, default_drafts=4) for part in split_plans(text)]

    assert plans == [PLAIN, Plan(4), Plan(8, (0, 4, 8)), Plan(4, (0, 4)), Plan(2, (0, 2)), Plan(3)]


def test_lists_of_numbers_name_the_option_and_what_was_given():
    assert whole_numbers("--batch", "1, 8,64") == (1, 8, 64)
    assert numbers("--temperature", "0,0.7") == (0.0, 0.7)
    with pytest.raises(
        InvalidInput, match=r"--max-tokens takes whole numbers separated by commas, got '1,x'"
    ):
        whole_numbers("--max-tokens", "1,x")
    with pytest.raises(InvalidInput, match=r"--mix-weight takes numbers separated by commas, got '1,,2'"):
        numbers("--mix-weight", "1,,2")
