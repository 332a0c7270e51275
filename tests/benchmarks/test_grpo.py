"""A short form of GRPO by TRL's trainer, ours in its place, and our loop."""

import json

import pytest

from benchmarks import grpo, readme_shows
from blockroll.policies.loading import TINY_POLICY_DIR


def test_every_arm_has_a_row_with_its_times_over_trls_and_over_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the loop's runs lie below
    rows = grpo.grpo(TINY_POLICY_DIR, seeds=(0,), steps=2, max_tokens=8, bf16=False, folder=tmp_path)
    assert {(row["by"], row["plan"]) for row in rows} == {*grpo.ARMS}
    assert [row["by"] for row in rows].count(grpo.TRL) == 2  # once beside each of ours
    for row in rows:
        assert len(row["reward"]) == len(row["generate_s"]) == len(row["step_s"]) == 2
        assert row["generate_over_trl"] > 0
        assert ("step_over_plain" in row) == (row["by"] != grpo.TRL)
    assert {row["step_over_plain"] for row in rows if row["plan"] == "plain"} == {1.0}
    json.dumps(rows)
    assert "| our loop | auto | " in readme_shows.grpo_table(rows)


def test_a_reward_falls_with_the_distance_of_the_first_answer_from_the_sum(tmp_path):
    first = grpo.problems(0, TINY_POLICY_DIR)[0]
    assert first["prompt"].endswith("\nSolution:")
    right = first["answer"]
    texts = [f"The answer is {right}. The answer is 1.", f"so the answer is {right + 3}", "nothing"]
    assert grpo.closeness(texts, [right] * 3) == [1.0, 0.25, 0.0]
    assert grpo.closeness([[{"role": "assistant", "content": texts[0]}]], [right]) == [1.0]
    assert grpo.problems(0, tmp_path) == grpo.problems(0, tmp_path) != grpo.problems(1, tmp_path)


def test_a_checkpoint_with_a_chat_template_is_asked_in_turns(tmp_path):
    (tmp_path / "chat_template.jinja").touch()
    (first, *_) = grpo.problems(0, tmp_path)
    assert [turn["role"] for turn in first["prompt"]] == ["user", "assistant", "user"]


def test_the_first_step_warms_up():
    run, base = ([{"step_s": each} for each in times] for times in ((9.0, 2.0, 3.0), (1.0, 1.0, 1.0)))
    assert grpo.over(run, base, "step_s") == pytest.approx(2.5)
