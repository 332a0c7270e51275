"""Grouped and skewed workloads, and the texts that a bench asks about."""

import dataclasses
import json
import statistics

import pytest

from blockroll.bench.bench import run_bench, to_record
from blockroll.bench.prompts import drawn_sums, gsm8k_questions, worked_text, worked_turns
from blockroll.bench.workload import TARGET, BenchOptions, Workload, make_waves, warm_up_wave
from blockroll.errors import InvalidInput
from blockroll.types import PLAIN, Plan
from tests.models import prompts

GROUPED = BenchOptions(
    batches=(4,), repeats=2, rollouts=4, max_tokens=(6,), shape="grouped", siblings=2, epochs=3
)
SKEWED = BenchOptions(batches=(4,), repeats=2, rollouts=200, max_tokens=(400,), shape="skewed")
WORKLOAD = Workload(batch=4, temperature=1.0, prompt_tokens=None, max_tokens=6)


def test_an_epoch_holds_the_siblings_of_each_prompt_and_comes_back_with_other_seeds():
    texts = prompts(5)
    repeats = [make_waves(texts, WORKLOAD, repeat, GROUPED) for repeat in range(2)]

    for repeat, epochs in enumerate(repeats):
        asked = [[request.prompt_ids for request in epoch] for epoch in epochs]
        first, second = texts[2 * repeat : 2 * repeat + 2]
        assert asked == [[first, first, second, second]] * 3
    requests = [request for epochs in repeats for epoch in epochs for request in epoch]
    assert len({request.seed for request in requests}) == len(requests) == 24
    assert len({request.request_id for request in requests}) == 24
    assert len({request.group_id for request in requests}) == 12  # a group of two in each epoch
    warm_up = warm_up_wave(texts, WORKLOAD, GROUPED, law=TARGET)
    assert len(warm_up) == 4
    assert not {request.seed for request in warm_up} & {request.seed for request in requests}


def test_an_epoch_fills_the_batch_and_warming_up_takes_no_more_than_that():
    wide = dataclasses.replace(WORKLOAD, batch=5)
    options = dataclasses.replace(GROUPED, rollouts=20)
    assert [len(epoch) for epoch in make_waves(prompts(3), wide, 0, GROUPED)] == [6, 6, 6]
    assert [len(epoch) for epoch in make_waves(prompts(3), wide, 0, options)] == [20, 20, 20]
    assert len(warm_up_wave(prompts(3), wide, options, law=TARGET)) == 5


def test_skewed_lengths_have_a_heavy_tail_and_do_not_depend_on_the_batch():
    long = dataclasses.replace(WORKLOAD, max_tokens=400)
    lengths = [
        request.sampling.max_tokens
        for wave in make_waves(prompts(5), long, 0, SKEWED)
        for request in wave
        if request.sampling.ignore_eos
    ]
    assert len(lengths) == 200
    assert min(lengths) >= 3
    assert 200 < max(lengths) <= 400
    assert 12 <= statistics.median(lengths) <= 23
    assert 35 <= statistics.mean(lengths) <= 60
    wider = make_waves(prompts(5), dataclasses.replace(long, batch=8), 0, SKEWED)
    assert [request.sampling.max_tokens for wave in wider for request in wave] == lengths


def test_grouped_rows_say_each_epoch_and_history_drafts_in_the_second(saved):
    policy, path = saved
    # With one repeat a row's speed lies between those of its epochs; medians over more need not.
    options = dataclasses.replace(GROUPED, max_tokens=(16,), temperatures=(0.0,), epochs=2, repeats=1)
    plans = [PLAIN, Plan(4, drafter="history")]
    rows = run_bench(policy, prompts(5), plans, options, policy_path=path, against=("generate",))

    for row in rows:
        assert (row.workload, row.siblings, row.epochs, row.rollouts) == ("grouped", 2, 2, 8)
        assert len(row.tokens_per_s_by_epoch) == len(row.tokens_per_cpu_s_by_epoch) == 2
        assert min(row.tokens_per_s_by_epoch) <= row.tokens_per_s <= max(row.tokens_per_s_by_epoch)
        assert to_record(row)["cpu"]
    plain, drafted, _ = rows
    assert plain.num_tokens == drafted.num_tokens
    assert drafted.acceptance_rate > 0
    assert 0 < drafted.acceptance_by_position[0] <= 1
    assert plain.acceptance_by_position is None


@pytest.mark.slow
def test_skewed_rows_count_each_length_of_every_subject(saved):
    policy, path = saved
    options = dataclasses.replace(SKEWED, rollouts=12, max_tokens=(24,))
    against = ("generate", "generate_process")
    rows = run_bench(policy, prompts(5), [PLAIN], options, policy_path=path, against=against)

    workload = dataclasses.replace(WORKLOAD, max_tokens=24)
    waves = [wave for repeat in (0, 1) for wave in make_waves(prompts(5), workload, repeat, options)]
    asked = sum(request.sampling.max_tokens for wave in waves for request in wave)
    assert [row.skipped for row in rows] == [None] * 3
    assert [row.num_tokens for row in rows] == [asked] * 3
    assert {(row.workload, row.ignore_eos, row.siblings, row.epochs) for row in rows} == {
        ("skewed", True, None, None)
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"siblings": 0}, "siblings and epochs must be at least 1, got 0 and 3"),
        ({"epochs": 0}, "siblings and epochs must be at least 1, got 2 and 0"),
        ({"shape": "skewed", "max_tokens": (2,)}, "give max_tokens of at least that"),
    ],
)
def test_a_workload_that_cannot_be_made_is_refused(changes, says):
    with pytest.raises(InvalidInput, match=says):
        dataclasses.replace(GROUPED, **changes)


def test_worked_sums_are_right_and_begin_alike_for_any_count():
    drawn = drawn_sums(3)
    assert drawn[:2] == drawn_sums(2)
    assert drawn != drawn_sums(3, seed=1)
    *shown, asked = worked_text(drawn[0]).split("\n\n")
    turns = worked_turns(drawn[0])
    assert [turn["role"] for turn in turns] == [*["user", "assistant"] * len(shown), "user"]
    for text, terms, question, answer in zip(shown, drawn[0], turns[::2], turns[1::2], strict=False):
        assert text == f"{question['content']}\nSolution: {answer['content']}"
        assert text.endswith(f"The answer is {sum(terms)}.")
    assert asked == f"{turns[-1]['content']}\nSolution:"


def test_questions_of_gsm8k_are_read_in_order_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "How many\u2028eggs?", "answer": "#### 3"}, {"question": "How much?", "answer": "4"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert list(gsm8k_questions(path)) == ["How many\u2028eggs?", "How much?"]
    for broken in ("{", "[]", '{"answer": "4"}', '{"question": 3}'):
        path.write_text(f"{json.dumps(rows[0])}\n{broken}\n")
        with pytest.raises(InvalidInput, match=r"line 2 of .* holds no text named question; give a file of"):
            list(gsm8k_questions(path))
    path.write_text("\n")
    with pytest.raises(InvalidInput, match="holds no question"):
        list(gsm8k_questions(path))
    with pytest.raises(InvalidInput, match=r"cannot be read: .*give a file of GSM8K"):
        list(gsm8k_questions(tmp_path / "nowhere.jsonl"))
