"""Prompts that the context has no room for are found before a run starts, and treated by a stated rule."""

import dataclasses
import random

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops import prompt_order
from blockroll.rl_loops import run as run_module
from blockroll.rl_loops.prompt_order import ENDLESS_CHECKED, PromptOrder
from blockroll.rl_loops.prompts import load_prompts, read_prompts
from blockroll.rl_loops.tasks import Epochs, Task, from_rows, shuffled
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.pool.makers import make_pool
from tests.runs import config_for, even_share, run, save_policy, stop_after

SHORT = [{"prompt": f"{i}+{i}=?"} for i in range(5)]
LONG = [{"prompt": "1+" * 40 + "1=?"}, {"prompt": "2+" * 50 + "2=?"}]  # the context holds 64 tokens
TASK = from_rows(
    name="long", train=[*SHORT, *LONG], held_out=[SHORT[0], LONG[1], SHORT[1]], reward_fn=even_share
)


def config(tmp_path, policy_path, **options):
    return config_for(tmp_path, policy_path, plan="plain", steps=5, prompts_per_step=2, **options)


def samples(run_dir):
    return [row["prompt"] for row in read_lines(run_dir / "rollouts.jsonl")]


def test_by_default_a_run_skips_them_says_so_and_goes_to_its_end(tmp_path, policy_path, caplog):
    rows = run(config(tmp_path, policy_path), task=TASK).metrics
    assert len(rows) == 5
    assert rows[-1]["eval/num_rollouts"] == 2
    assert max(map(len, samples(tmp_path / "run"))) < 64
    assert "of the first 7 training prompts of task 'long' have more than 63 tokens" in caplog.text
    assert "1 of 3 prompts have more than 63 tokens" in caplog.text


def test_a_resumed_run_skips_the_same_prompts(tmp_path, policy_path):
    run(config(tmp_path, policy_path, name="whole"), task=TASK)
    broken = config(tmp_path, policy_path, name="broken")
    with pytest.raises(SystemExit):
        run(broken, task=TASK, callbacks=[stop_after(3, KeyboardInterrupt())])
    run(broken, task=TASK, resume=True)
    assert samples(tmp_path / "broken") == samples(tmp_path / "whole")


def test_under_truncate_the_last_tokens_are_gone_on_from(tmp_path, policy_path, monkeypatch):
    lengths = []
    learn = run_module.Run.learn

    def noting(self, drawn):
        lengths.extend(len(rollout.request.prompt_ids) for rollout in drawn.batch.rollouts)
        learn(self, drawn)

    monkeypatch.setattr(run_module.Run, "learn", noting)
    rows = run(config(tmp_path, policy_path, overlong_prompts="truncate"), task=TASK).metrics
    assert max(lengths) == 63
    assert rows[-1]["eval/num_rollouts"] == 3


@pytest.mark.parametrize("eval_every", [0, 2])
def test_under_error_the_run_does_not_start(tmp_path, policy_path, eval_every):
    subject = config(tmp_path, policy_path, overlong_prompts="error", eval_every=eval_every)
    with pytest.raises(InvalidInput, match=r"training prompts of task 'long' have more than 63 tokens"):
        run(subject, task=TASK)
    assert not subject.run_dir.exists()


def test_a_held_out_prompt_is_found_too(tmp_path, policy_path):
    subject = config(tmp_path, policy_path, overlong_prompts="error")
    task = dataclasses.replace(TASK, train_row=lambda seed, index: SHORT[index % 5])
    with pytest.raises(InvalidInput, match="held-out prompt 1 of task 'long'"):
        run(subject, task=task)
    assert not subject.run_dir.exists()


def test_a_task_of_which_nothing_fits_is_refused(tmp_path, policy_path):
    subject = config(tmp_path, policy_path, eval_every=0)
    with pytest.raises(InvalidInput, match="10000 of the first 10000 training prompts"):
        run(subject, task=dataclasses.replace(TASK, train_row=lambda seed, index: LONG[0]))


def test_skipped_rows_leave_the_others_in_their_order(tmp_path, policy_path):
    """Against a list with the long rows taken out."""
    subject = config(tmp_path, policy_path, eval_every=0)
    rng = random.Random(0)
    rows = [rng.choice(LONG) if rng.random() < 0.4 else {"prompt": f"{i}=?"} for i in range(200)]
    kept = [row for row in rows if row not in LONG]
    task = Task(
        name="any", train_row=lambda _, index: rows[index], eval_rows=lambda _: [], reward_fn=even_share
    )
    pool = make_pool(subject.policy, subject.rollout)
    order = PromptOrder(subject, task, pool)
    assert [order.rows(start, 2) for start in range(9)] == [kept[start : start + 2] for start in range(9)]


def test_a_conversion_leaves_out_what_a_task_has_too_long_and_goes_on(
    policy_path, caplog, monkeypatch, tmp_path
):
    (tmp_path / "mine.py").write_text(
        "from blockroll.rl_loops.tasks import Task\n"
        "def row(seed, index):\n"
        "    return {'prompt': f'{index}+' * (40 if index % 3 == 1 else 1) + '1=?'}\n"
        "def long(seed, index):\n"
        "    return {'prompt': '1+' * 40}\n"
        "some, none = (Task(name=each.__name__, train_row=each, eval_rows=None, reward_fn=None)\n"
        "    for each in (row, long))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    policy = HFPolicy.from_pretrained(policy_path, device="cpu")
    prompts = load_prompts("mine:some", policy, {})
    drawn = [policy.decode(list(prompts.token_ids(0, index))) for index in (0, 1, 2, 3, 4, 3)]
    assert drawn == ["0+1=?", "2+1=?", "3+1=?", "5+1=?", "6+1=?", "5+1=?"]
    assert caplog.text.count("those that are too long are left out") == 1
    with pytest.raises(
        InvalidInput, match="10000 prompts of task 'long' in a row, up to prompt 9999, leave no"
    ):
        load_prompts("mine:none", policy, {})


def test_an_epoch_of_a_long_prompts_file_is_shuffled_once(tmp_path, policy_path):
    """Counted, not timed: shuffling for every prompt costs the square of their number."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}=?"}}\n' for i in range(2_000)))
    prompts = load_prompts(str(path), HFPolicy.from_pretrained(policy_path, device="cpu"), {})
    before = shuffled.cache_info().misses
    drawn = [prompts.token_ids(0, index) for index in range(2_000)]
    assert len(set(drawn)) == 2_000
    assert shuffled.cache_info().misses == before + 1
    assert prompts.token_ids(0, 2_000) != drawn[0]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_prompt_may_hold_what_other_formats_end_lines_with(tmp_path, separator):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a{separator}b"}}\n\r\n{{"prompt": "c"}}', encoding="utf-8")
    assert read_prompts(path) == [f"a{separator}b", "c"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"prompt": 3}', b'{"prompt"', b"[" * 100_000])
def test_a_line_that_is_no_prompt_is_named_with_its_number(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "after a byte order mark"}\n' + content + b"\n")
    with pytest.raises(InvalidInput, match="line 2 of "):
        read_prompts(path)


def counted(task):
    """A task that counts how many of its rows are asked for."""
    asked = []

    def train_row(seed, index):
        asked.append(index)
        return task.train_row(seed, index)

    return dataclasses.replace(task, train_row=train_row), asked


class CountedEpochs(Epochs):
    asked = 0

    def __call__(self, seed, index):
        self.asked += 1
        return super().__call__(seed, index)


def test_of_a_run_of_millions_of_steps_only_so_many_prompts_are_read_before_it_starts(tmp_path, policy_path):
    subject = config(tmp_path, policy_path, eval_every=0)
    subject = dataclasses.replace(subject, train=dataclasses.replace(subject.train, steps=10**8))
    pool = make_pool(subject.policy, subject.rollout)
    task, asked = counted(Task(name="any", train_row=some_long, eval_rows=None, reward_fn=even_share))
    order = PromptOrder(subject, task, pool)
    assert len(asked) == ENDLESS_CHECKED
    fitting = [index for index in range(3 * ENDLESS_CHECKED) if index % 5]
    assert order.rows(2 * ENDLESS_CHECKED, 2) == [
        some_long(0, index) for index in fitting[2 * ENDLESS_CHECKED :][:2]
    ]

    rows = CountedEpochs([*SHORT, *LONG], name="long")
    order = PromptOrder(subject, dataclasses.replace(TASK, train_row=rows), pool)
    assert rows.asked == len(SHORT) + len(LONG)
    far = order.rows(10**8 * 5, 5)  # a whole epoch, of those that fit
    assert sorted(row["prompt"] for row in far) == [row["prompt"] for row in SHORT]
    assert rows.asked < 5 * (len(SHORT) + len(LONG))


def some_long(seed, index):
    return LONG[0] if index % 5 == 0 else {"prompt": f"{index}=?"}


def test_an_endless_task_beside_error_is_refused_where_the_run_would_draw_too_many(tmp_path, policy_path):
    subject = config(tmp_path, policy_path, eval_every=0, overlong_prompts="error")
    endless = dataclasses.replace(TASK, train_row=lambda seed, index: {"prompt": f"{index}=?"})
    subject = dataclasses.replace(subject, train=dataclasses.replace(subject.train, steps=10**6))
    with pytest.raises(
        InvalidInput, match=r"all 2,000,000 prompts .* task 'long' has no end: set it to 'skip'"
    ):
        run(subject, task=endless)
    assert not subject.run_dir.exists()


def test_long_prompts_behind_those_looked_at_are_skipped_with_a_word(
    tmp_path, policy_path, caplog, monkeypatch
):
    monkeypatch.setattr(prompt_order, "ENDLESS_CHECKED", 3)
    late = dataclasses.replace(
        TASK, train_row=lambda _, index: LONG[0] if index == 6 else {"prompt": f"{index}=?"}
    )
    run(config(tmp_path, policy_path, eval_every=0), task=late)
    assert caplog.text.count("training prompt 6 of task 'long' has 84 tokens; other rows take the place") == 1
    assert max(map(len, samples(tmp_path / "run"))) < 64


def test_a_prompt_as_long_as_a_longrope_boundary_is_found_before_a_run_starts(tmp_path, policy_path):
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
    save_policy(tmp_path / "longrope", 0, rope_parameters={**longrope, **factors})
    prompts = [{"prompt": "1" * length} for length in (5, 23, 30)]  # and a start token each
    task = from_rows(name="edge", train=prompts, held_out=prompts, reward_fn=even_share)
    strict = config(tmp_path, tmp_path / "longrope", overlong_prompts="error")
    with pytest.raises(InvalidInput, match="training prompts of task 'edge' have 24 tokens or more than 63"):
        run(strict, task=task)
    assert not strict.run_dir.exists()
    run(config(tmp_path, tmp_path / "longrope"), task=task)
    assert {len(prompt) for prompt in samples(tmp_path / "run")} == {5, 30}
    run(config(tmp_path, tmp_path / "longrope", overlong_prompts="truncate", name="cut"), task=task)
    assert {len(prompt) for prompt in samples(tmp_path / "cut")} == {5, 23, 30}


def test_a_column_called_like_an_argument_of_rewards_is_refused(tmp_path, policy_path):
    task = from_rows(
        name="t", train=[{"prompt": "1=?", "completions": "x"}], held_out=[], reward_fn=even_share
    )
    with pytest.raises(InvalidInput, match="column 'completions'"):
        run(config(tmp_path, policy_path), task=task)
