"""Rows of a measurement are complete, honest and comparable. No test looks at a time."""

import dataclasses
import itertools
import json
import math
import threading
from importlib.metadata import version

import pytest
import torch

from blockroll.bench.bench import TRANSFORMERS, BenchOptions, Judge, run_bench, to_record
from blockroll.bench.pass_at_k import pass_at_k
from blockroll.bench.reference import REFERENCES, ReferenceTask, generate_stock
from blockroll.bench.rows import BenchRow, percentile, with_speed
from blockroll.bench.subjects import EngineSubject, TransformersSubject, Wave
from blockroll.bench.table import bench_table
from blockroll.bench.workload import Workload, cut_to_length, make_waves, random_prompts
from blockroll.cli.speed import numbers, split_plans, whole_numbers
from blockroll.errors import InvalidInput
from blockroll.policies.loading import load_model, resolve_checkpoint
from blockroll.rl_loops.figures import save_bench
from blockroll.rollout.engine.engine import Engine
from blockroll.rollout.planning.acceptance import AcceptanceByPosition
from blockroll.rollout.planning.planner import Planner
from blockroll.types import PLAIN, Law, Plan, Sampling
from tests.engines import make_requests, run
from tests.models import EOS_ID, prompts, random_policy

OPTIONS = BenchOptions(batches=(1, 3), repeats=2, rollouts=4, max_tokens=(6,))
PLANS = [PLAIN, Plan(4)]
# 5.4 fails as soon as OpenTelemetry is installed; 5.24 was seen to work.
MAY_LACK_CONTINUOUS_BATCHING = tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)
FUSED = Plan(4, (0, 2, 4))
WORKLOAD = Workload(batch=3, temperature=1.0, prompt_tokens=None, max_tokens=6)


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
        assert row.share_by_plan == {row.plan: 1.0}
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


def test_a_queue_is_submitted_at_once_and_decoded_as_places_get_free(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(2,), rollouts=9, queue=3)
    waves = make_waves(prompts(5), dataclasses.replace(WORKLOAD, batch=2), 1, options)
    assert [len(wave) for wave in waves] == [6, 6]
    rows = run_bench(policy, prompts(5), [PLAIN, Plan(4)], options, policy_path=path, against=("generate",))
    assert {(row.rollouts, row.queue) for row in rows} == {(12, 3)}
    short = dataclasses.replace(options, queue=1, rollouts=12)
    again = run_bench(policy, prompts(5), [PLAIN], short, policy_path=path)
    assert again[0].num_tokens == rows[0].num_tokens  # the same requests, and a batch changes no token


def test_transformers_is_measured_on_the_same_prompts(saved):
    policy, path = saved
    rows = run_bench(policy, prompts(5), [PLAIN], OPTIONS, policy_path=path, against=("generate",))

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
    rows = run_bench(policy, prompts(5), PLANS, options, policy_path=path, against=("generate",))

    assert {row.mean_length for row in rows} == {6.0}


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
        (("wild",), False, {}, "generate, continuous_batching, assisted, each once; got wild"),
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


def test_the_grid_is_spanned_and_every_row_states_its_whole_setting(saved):
    policy, path = saved
    options = BenchOptions(
        batches=(1, 2),
        temperatures=(1.0, 0.5),
        prompt_tokens=(3, 9),
        max_tokens=(2, 5),
        mix_weights=(1.0, 0.5),
        repeats=1,
        rollouts=2,
        queue=1,
        seed=7,
    )
    rows = run_bench(policy, prompts(5), [PLAIN, FUSED], options, policy_path=path)

    subjects = [("plain", "target"), ("fused(4,[0,2,4])", "target"), ("fused(4,[0,2,4])", "mixed(0.5)")]
    assert [
        (row.temperature, row.prompt_tokens, row.max_tokens, row.batch, row.plan, row.law) for row in rows
    ] == [
        (*workload, *subject)
        for workload in itertools.product((1.0, 0.5), (3, 9), (2, 5), (1, 2))
        for subject in subjects
    ]
    for row in rows:
        assert row.skipped is None
        assert row.prompts == "text cut to length"
        assert row.context == row.prompt_tokens
        assert (row.repeats, row.rollouts, row.seed) == (1, 2, 7)
        assert row.mean_length <= row.max_tokens
        assert row.speedup_over_plain is not None


def test_a_mixed_law_is_drawn_from_and_changes_the_tokens(saved):
    policy, _ = saved
    subject = EngineSubject(policy, Plan(4), law=Law(0.5), batch=3, max_length=20)
    (mixed, *_), (target, *_) = (
        make_waves(prompts(5), WORKLOAD, 0, OPTIONS, law=law) for law in (Law(0.5), Law())
    )
    assert [dataclasses.replace(request, sampling=target[0].sampling) for request in mixed] == target

    tokens = []
    for requests in (mixed, target):
        wave = subject.decode(requests)
        assert {rollout.law for rollout in wave.rollouts} == {requests[0].sampling.law}
        tokens.append({rollout.request.request_id: rollout.token_ids for rollout in wave.rollouts})
    assert tokens[0] != tokens[1]


def test_a_mixed_law_without_a_greedy_form_is_skipped_by_name(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(2,), temperatures=(0.0,), mix_weights=(0.5,))
    plain, mixed = run_bench(policy, prompts(5), PLANS, options, policy_path=path)

    assert plain.skipped is None
    assert mixed.law == "mixed(0.5)"
    assert mixed.skipped == "law mixed(0.5) has no greedy form"
    assert mixed.tokens_per_s is None


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


def test_every_way_of_transformers_is_measured_or_says_why_not(saved):
    policy, path = saved
    num_threads = threading.active_count()
    options = dataclasses.replace(OPTIONS, batches=(1, 2), ignore_eos=True)
    rows = run_bench(policy, prompts(5), [PLAIN], options, policy_path=path, against=tuple(REFERENCES))

    cells = {(row.plan, row.batch): row for row in rows}
    names = ["transformers_generate", "transformers_continuous_batching", "transformers_assisted(10)"]
    assert list(cells) == [(name, batch) for batch in (1, 2) for name in ("plain", *names)]
    for (plan, batch), row in cells.items():
        if plan == names[2] and batch == 2:
            assert "batch_size = 1" in row.skipped
            assert row.tokens_per_s is row.speedup_over_plain is row.latency_ms_p50 is None
        elif plan == names[1] and MAY_LACK_CONTINUOUS_BATCHING and row.skipped is not None:
            assert row.tokens_per_s is None
        else:
            assert row.skipped is None
            assert row.mean_length == 6.0
            assert row.latency_ms_p50 <= row.latency_ms_p99
            assert row.acceptance_rate is None
            assert row.law == "target"
    assert threading.active_count() == num_threads


@pytest.mark.parametrize("name", REFERENCES)
def test_every_way_of_transformers_draws_the_greedy_tokens_that_plain_draws(saved, name):
    if name == "continuous_batching" and MAY_LACK_CONTINUOUS_BATCHING:
        pytest.skip("older releases of transformers cannot always decode continuously")
    policy, path = saved
    texts = prompts(1 if name == "assisted" else 6)
    requests = make_requests(texts, Sampling(temperature=0.0, max_tokens=8))
    plain = run(policy, requests, PLAIN)
    task = ReferenceTask(
        batch=6, longest_prompt=12, max_tokens=8, temperature=0.0, eos_token_ids=policy.eos_token_ids
    )
    random_state = torch.get_rng_state()
    reference = REFERENCES[name](load_model(resolve_checkpoint(path)), task)
    try:
        for seed in (0, 1):
            completions = {
                completion.index: tuple(completion.token_ids)
                for completion in reference.complete(texts, seed=seed)
            }
            assert completions == {
                index: plain[request.request_id].token_ids for index, request in enumerate(requests)
            }
    finally:
        reference.close()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_a_reference_refuses_is_a_reason_in_its_own_words():
    def refuse():
        raise RuntimeError("no such device")

    subject = TransformersSubject("transformers_wild", refuse)

    assert subject.warm_up([]) == "RuntimeError: no such device"
    subject.close()


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 5.0), (90, 9.0), (91, 10.0), (95, 10.0), (99, 10.0), (0, 1.0), (100, 10.0)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent, expected):
    values = [float(value) for value in (7, 1, 10, 3, 5, 2, 9, 4, 8, 6)]

    assert percentile(values, percent) == expected
    assert percentile([4.0], percent) == 4.0


def test_a_row_has_the_figures_of_known_waves(blank_row):
    plain = [[Wave(num_tokens=100, duration_s=duration, latencies_s=(1.0,))] for duration in (1.0, 2.0)]
    # 200 requests in 2 repeats, that end after 1, 2, ... 200 milliseconds.
    latencies = [[(i + 1 + 100 * repeat) / 1000 for i in range(100)] for repeat in range(2)]
    repeats = [[Wave(num_tokens=300, duration_s=1.0, latencies_s=tuple(column))] for column in latencies]
    row = with_speed(blank_row, repeats, plain)

    assert row.tokens_per_s_all == (300.0, 300.0)
    assert (row.speedup_min, row.speedup_over_plain, row.speedup_max) == (3.0, 4.5, 6.0)
    figures = (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99)
    assert figures == pytest.approx((100.0, 190.0, 198.0))
    assert row.mean_length == 3.0
    assert with_speed(blank_row, repeats, ()).speedup_over_plain is None


@pytest.fixture
def blank_row(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(1,), repeats=1, rollouts=1)
    (row,) = run_bench(policy, prompts(2), [PLAIN], options, policy_path=path)
    names = [field.name for field in dataclasses.fields(BenchRow)]
    figures = dict.fromkeys(names[names.index("skipped") :])
    return dataclasses.replace(row, **{**figures, "tokens_per_s_all": ()})


@pytest.mark.parametrize("plan", [Plan(4), FUSED], ids=lambda plan: plan.name)
def test_acceptance_by_position_is_what_a_hand_count_of_the_records_gives(saved, plan):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(3,), max_tokens=(20,))
    (row,) = run_bench(policy, prompts(5), [plan], options, policy_path=path)

    records = []
    engine = Engine(policy, plan=plan, observer=records.append)
    workload = dataclasses.replace(WORKLOAD, max_tokens=20)
    for wave in make_waves(prompts(5), workload, 0, options):
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


def test_a_planner_is_measured_under_every_law_and_each_law_has_its_own(saved):
    policy, path = saved
    planner = Planner([Plan(2), FUSED])
    options = dataclasses.replace(OPTIONS, batches=(2,), max_tokens=(20,), mix_weights=(1.0, 0.5), repeats=1)
    judge = Judge(is_correct=lambda index, token_ids: True, num_prompts=1, num_samples=1, k=1)
    rows = run_bench(policy, prompts(5), [PLAIN, planner], options, policy_path=path, judge=judge)

    assert [(row.plan, row.law) for row in rows] == [
        ("plain", "target"), ("auto", "target"), ("auto", "mixed(0.5)")
    ]  # fmt: skip
    for row in rows[1:]:
        assert row.speedup_over_plain is not None
        assert len(row.acceptance_by_position) == len(row.accepted_at_least) == 4
        assert row.pass_at_1 == 1.0
    json.dumps([to_record(row) for row in rows], allow_nan=False)


def test_acceptance_without_steps_is_unknown():
    acceptance = AcceptanceByPosition(2)

    assert acceptance.conditional == acceptance.at_least == (None, None)


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


def test_every_record_is_json_without_nan(saved):
    policy, path = saved
    options = BenchOptions(
        batches=(1, 2),
        temperatures=(0.0, 1.0),
        mix_weights=(1.0, 0.5),
        max_tokens=(1,),
        repeats=1,
        rollouts=1,
        queue=1,
    )
    judge = Judge(is_correct=lambda index, token_ids: False, num_prompts=1, num_samples=1, k=1)
    rows = run_bench(
        policy,
        prompts(2),
        [PLAIN, Plan(4), FUSED],
        options,
        policy_path=path,
        judge=judge,
        against=("generate", "assisted"),
    )

    records = [json.loads(json.dumps(to_record(row), allow_nan=False)) for row in rows]
    assert len({frozenset(record) for record in records}) == 1
    assert {record["skipped"] is None for record in records} == {True, False}
    assert all((record["tokens_per_s"] is None) == (record["skipped"] is not None) for record in records)


def test_a_table_and_a_picture_show_every_row_also_of_skipped_subjects(saved, tmp_path):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(1, 2), mix_weights=(1.0, 0.5), repeats=1)
    rows = run_bench(policy, prompts(5), [*PLANS, FUSED], options, policy_path=path, against=("assisted",))
    table = bench_table(rows, title="t")
    assert table.row_count == len(rows) == 12
    assert [column.header for column in table.columns][:3] == ["plan", "law", "batch"]
    assert "not measured: assisted(10) at batch 2: " in table.caption

    save_bench([to_record(row) for row in rows], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    save_bench([to_record(row) for row in rows if row.plan == "plain"], tmp_path / "plain.png")
    assert (tmp_path / "plain.png").stat().st_size > 1000


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
