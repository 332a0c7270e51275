"""Rows of a measurement are complete, honest and comparable. No test looks at a time."""

import dataclasses
import itertools
import json

import pytest

from blockroll.bench.bench import BenchOptions, Judge, run_bench, to_record
from blockroll.bench.rows import BenchRow, percentile, with_speed
from blockroll.bench.subjects import EngineSubject, Wave
from blockroll.bench.table import bench_table
from blockroll.bench.workload import make_waves
from blockroll.rl_loops.figures import save_bench
from blockroll.rollout.planning.planner import Planner
from blockroll.types import PLAIN, Law, Plan
from tests.models import EOS_ID, prompts
from tests.unit.bench import OPTIONS, PLANS, WORKLOAD

FUSED = Plan(4, (0, 2, 4))


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


def test_no_request_is_measured_that_a_warm_up_has_decoded(saved, monkeypatch):
    """A drafter that remembers texts would know the answer, or be kept from it."""
    policy, path = saved
    decoded, decode = [], EngineSubject.decode

    def noted(subject, requests):
        decoded.extend((subject.name, request.request_id, request.seed) for request in requests)
        return decode(subject, requests)

    monkeypatch.setattr(EngineSubject, "decode", noted)
    options = dataclasses.replace(OPTIONS, batches=(2,), max_tokens=(24,), repeats=1, ignore_eos=True)
    plans = [PLAIN, Plan(4, drafter="history")]
    plain, drafted = run_bench(policy, prompts(3), plans, options, policy_path=path)
    assert len(decoded) == len({*decoded}) == 2 * (2 + 4)
    assert plain.acceptance_rate is None
    assert drafted.acceptance_rate is not None


def test_ignored_end_tokens_make_every_completion_full_length(saved):
    policy, path = saved
    assert EOS_ID in policy.eos_token_ids
    options = dataclasses.replace(OPTIONS, ignore_eos=True)
    rows = run_bench(policy, prompts(5), PLANS, options, policy_path=path, against=("generate",))

    assert {row.mean_length for row in rows} == {6.0}


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


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 5.0), (90, 9.0), (91, 10.0), (95, 10.0), (99, 10.0), (0, 1.0), (100, 10.0)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent, expected):
    values = [float(value) for value in (7, 1, 10, 3, 5, 2, 9, 4, 8, 6)]

    assert percentile(values, percent) == expected
    assert percentile([4.0], percent) == 4.0


def test_a_row_has_the_figures_of_known_waves(blank_row):
    plain = [
        [Wave(num_tokens=100, duration_s=duration, cpu_s=duration / 2, latencies_s=(1.0,))]
        for duration in (1.0, 2.0)
    ]
    # 200 requests in 2 repeats, that end after 1, 2, ... 200 milliseconds.
    latencies = [[(i + 1 + 100 * repeat) / 1000 for i in range(100)] for repeat in range(2)]
    repeats = [
        [Wave(num_tokens=300, duration_s=1.0, cpu_s=1.0, latencies_s=tuple(column))] for column in latencies
    ]
    row = with_speed(blank_row, repeats, plain)

    assert row.tokens_per_s_all == (300.0, 300.0)
    assert (row.speedup_min, row.speedup_over_plain, row.speedup_max) == (3.0, 4.5, 6.0)
    figures = (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99)
    assert figures == pytest.approx((100.0, 190.0, 198.0))
    assert row.mean_length == 3.0
    assert with_speed(blank_row, repeats, ()).speedup_over_plain is None


def test_the_speed_of_an_epoch_is_its_median_over_repeats(blank_row):
    row = dataclasses.replace(blank_row, epochs=2)
    repeats = [
        [Wave(num_tokens=100, duration_s=each, cpu_s=2 * each, latencies_s=(1.0,)) for each in durations]
        for durations in ((1.0, 10.0), (4.0, 2.0), (2.0, 5.0))
    ]
    row = with_speed(row, repeats, ())

    assert row.tokens_per_s_by_epoch == (50.0, 20.0)
    assert row.tokens_per_cpu_s_by_epoch == (25.0, 10.0)


@pytest.fixture
def blank_row(saved):
    policy, path = saved
    options = dataclasses.replace(OPTIONS, batches=(1,), repeats=1, rollouts=1)
    (row,) = run_bench(policy, prompts(2), [PLAIN], options, policy_path=path)
    names = [field.name for field in dataclasses.fields(BenchRow)]
    figures = dict.fromkeys(names[names.index("skipped") :])
    return dataclasses.replace(row, **{**figures, "tokens_per_s_all": ()})


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
        assert (row.acceptance_by_position is None) == (row.acceptance_rate is None)
        assert len(row.acceptance_by_position or ()) == len(row.accepted_at_least or ()) <= 4
        assert row.pass_at_1 == 1.0
    json.dumps([to_record(row) for row in rows], allow_nan=False)


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
