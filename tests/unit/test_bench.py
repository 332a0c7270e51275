"""Rows of a measurement are complete, honest and comparable. No test looks at a time."""

import dataclasses
import json

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import load_model, resolve_checkpoint
from blockroll.policies.reference import generate_stock
from blockroll.rollout.bench import TRANSFORMERS, BenchOptions, make_waves, run_bench, to_record
from blockroll.types import PLAIN, Plan, Sampling
from tests.engines import make_requests, run
from tests.models import EOS_ID, prompts, random_policy

OPTIONS = BenchOptions(batches=(1, 3), repeats=2, rollouts=4, max_tokens=6)
PLANS = [PLAIN, Plan(4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    policy = random_policy()
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    return policy, str(folder)


def test_every_plan_and_batch_gives_one_row_with_every_figure(saved):
    policy, path = saved
    seen = []
    rows = run_bench(policy, prompts(5), PLANS, OPTIONS, policy_path=path, on_row=seen.append)

    assert seen == rows
    assert [(row.plan, row.batch) for row in rows] == [
        ("plain", 1),
        ("two_forward(4)", 1),
        ("plain", 3),
        ("two_forward(4)", 3),
    ]
    for row in rows:
        assert len(row.tokens_per_s_all) == OPTIONS.repeats
        assert row.tokens_per_s_min <= row.tokens_per_s <= row.tokens_per_s_max
        assert row.num_tokens > 0
        assert 1 <= row.context <= 12
        assert None not in (row.host_ms_per_step, row.forward_ms_per_step, row.sampler_ms_per_step)
        assert row.setting.policy == path
        if row.plan == "plain":
            assert row.acceptance_rate is None
            assert row.tokens_per_forward == 1.0
            assert (row.speedup_min, row.speedup_over_plain, row.speedup_max) == (1.0, 1.0, 1.0)
        else:
            assert 0.0 <= row.acceptance_rate <= 1.0
            assert 0.5 <= row.tokens_per_forward <= 2.5


def test_a_record_is_flat_json(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(1,))
    (row,) = run_bench(policy, prompts(2), [PLAIN], options, policy_path=path)

    record = json.loads(json.dumps(to_record(row), allow_nan=False))

    assert {
        "plan",
        "batch",
        "context",
        "tokens_per_s",
        "tokens_per_s_all",
        "acceptance_rate",
        "tokens_per_forward",
        "speedup_over_plain",
        "host_ms_per_step",
        "threads",
        "device",
        "dtype",
        "policy",
        "commit",
        "torch_version",
    } <= record.keys()
    assert "setting" not in record


def test_counts_do_not_depend_on_the_batch(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(1, 2, 4))
    rows = run_bench(policy, prompts(5), [Plan(4)], options, policy_path=path)

    assert len({(row.num_tokens, row.acceptance_rate, row.tokens_per_forward) for row in rows}) == 1


def test_transformers_is_measured_on_the_same_prompts(saved):
    policy, path = saved
    rows = run_bench(policy, prompts(5), [PLAIN], OPTIONS, policy_path=path, against_transformers=True)

    stock = [row for row in rows if row.plan == TRANSFORMERS]
    assert [row.batch for row in stock] == [1, 3]
    for row in stock:
        assert row.num_tokens > 0
        assert row.speedup_over_plain is not None
        assert row.acceptance_rate is None


def test_stock_generate_draws_the_greedy_tokens_that_plain_draws(saved):
    policy, path = saved
    requests = make_requests(prompts(6), Sampling(temperature=0.0, max_tokens=8))
    plain = run(policy, requests, PLAIN)

    stock = generate_stock(
        load_model(resolve_checkpoint(path)),
        [request.prompt_ids for request in requests],
        max_tokens=8,
        temperature=0.0,
        eos_token_ids=policy.eos_token_ids,
        seed=0,
    )

    assert stock == [list(plain[request.request_id].token_ids) for request in requests]


def test_ignored_end_tokens_make_every_completion_full_length(saved):
    policy, path = saved
    assert EOS_ID in policy.eos_token_ids
    options = dataclasses.replace(OPTIONS, ignore_eos=True)
    rows = run_bench(policy, prompts(5), PLANS, options, policy_path=path, against_transformers=True)

    assert {row.mean_length for row in rows} == {float(OPTIONS.max_tokens)}


def test_repeats_draw_other_requests_and_equal_repeats_the_same():
    first, again, second = (make_waves(prompts(5), 3, repeat, OPTIONS) for repeat in (0, 0, 1))

    assert first == again
    assert [len(wave) for wave in first] == [3, 3]
    seeds = [[request.seed for wave in waves for request in wave] for waves in (first, second)]
    assert not set(seeds[0]) & set(seeds[1])


@pytest.mark.parametrize(
    ("plans", "changes", "advice"),
    [
        ([PLAIN, PLAIN], {}, "measured once"),
        ([], {}, "at least one prompt and one plan"),
        ([PLAIN], {"max_tokens": 500}, "max_tokens of at most"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_advice(saved, plans, changes, advice):
    policy, path = saved
    with pytest.raises(InvalidInput, match=advice):
        run_bench(policy, prompts(2), plans, dataclasses.replace(OPTIONS, **changes), policy_path=path)


@pytest.mark.parametrize("changes", [{"batches": (0,)}, {"batches": ()}, {"repeats": 0}, {"rollouts": 0}])
def test_options_below_one_are_refused(changes):
    with pytest.raises(InvalidInput, match="at least 1"):
        dataclasses.replace(OPTIONS, **changes)
