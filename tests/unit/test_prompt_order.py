"""Prompts that the context has no room for are found before a run starts, and treated by a stated rule."""

import dataclasses
import random

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops import run as run_module
from blockroll.rl_loops.prompt_order import PromptOrder
from blockroll.rl_loops.prompts import load_prompts, read_prompts
from blockroll.rl_loops.tasks import Task, from_rows, shuffled
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.pool.makers import make_pool
from tests.runs import config_for, even_share, run, stop_after

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
    assert "of the first 14 training prompts of task 'long' have more than 63 tokens" in caplog.text
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
    assert caplog.text.count("prompts that are too long are left out") == 1
    with pytest.raises(
        InvalidInput, match="10000 prompts of task 'long', from prompt 0 on, have more than 63"
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


def test_a_column_called_like_an_argument_of_rewards_is_refused(tmp_path, policy_path):
    task = from_rows(
        name="t", train=[{"prompt": "1=?", "completions": "x"}], held_out=[], reward_fn=even_share
    )
    with pytest.raises(InvalidInput, match="column 'completions'"):
        run(config(tmp_path, policy_path), task=task)
