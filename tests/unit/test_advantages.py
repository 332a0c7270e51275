"""Rewards and group advantages on small tables worked out by hand."""

import math

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.rl_loops.advantages import group_advantages, score_rollouts
from blockroll.rl_loops.tasks import ARITHMETIC, from_rows, load_task
from blockroll.types import Law, Request, Rollout, RolloutStats

NAN = math.nan


def rollout(name, finish_reason="stop"):
    return Rollout(
        request=Request(request_id=name, prompt_ids=(1,), seed=0),
        token_ids=(5, 6),
        policy_logprobs=(-1.0, -1.0),
        behavior_logprobs=(-1.0, -1.0),
        policy_versions=(0, 0),
        law=Law(),
        finish_reason=finish_reason,
        stats=RolloutStats(),
    )


def score(reward_fn, completions, finish_reasons=None):
    reasons = finish_reasons or ["stop"] * len(completions)
    rollouts = [rollout(str(i), reason) for i, reason in enumerate(reasons)]
    rows = [{"prompt": "p", "answer": i} for i in range(len(completions))]
    return score_rollouts(reward_fn, rows, rollouts, completions)


def test_an_advantage_is_the_reward_less_the_group_mean_over_the_group_deviation():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    result = group_advantages(rewards, ["a", "a", "a", "a", "b", "b"], epsilon=0.0)
    half = 0.5 / math.sqrt(1 / 3)
    root = 1 / math.sqrt(2)
    assert result.advantages_B.tolist() == pytest.approx([half, -half, -half, half, root, -root])
    assert result.reward_mean == pytest.approx(1.0)
    assert result.reward_std == pytest.approx((math.sqrt(1 / 3) + math.sqrt(2)) / 2)
    assert result.frac_zero_std == 0.0


def test_groups_are_found_by_name_and_not_by_place():
    rewards = torch.tensor([1.0, 7.0, 0.0, 5.0], dtype=torch.float64)
    result = group_advantages(rewards, ["a", "b", "a", "b"], epsilon=0.0)
    root = 1 / math.sqrt(2)
    assert result.advantages_B.tolist() == pytest.approx([root, root, -root, -root])


def test_a_group_of_equal_rewards_teaches_nothing_and_is_counted():
    result = group_advantages(torch.ones(4, dtype=torch.float64), ["a", "a", "b", "b"])
    assert result.advantages_B.tolist() == [0.0] * 4
    assert result.frac_zero_std == 1.0


def test_a_failed_reward_leaves_mean_and_deviation_of_its_group():
    rewards = torch.tensor([1.0, 0.0, NAN, 1.0, NAN], dtype=torch.float64)
    with_failures = group_advantages(rewards, ["a"] * 5)
    without = group_advantages(rewards[[0, 1, 3]], ["a"] * 3)
    assert with_failures.advantages_B[[0, 1, 3]].tolist() == without.advantages_B.tolist()
    assert with_failures.advantages_B[[2, 4]].tolist() == [0.0, 0.0]
    assert with_failures.is_valid_B.tolist() == [True, True, False, True, False]


def test_a_group_with_fewer_than_two_valid_rollouts_gets_zero_advantage():
    result = group_advantages(torch.tensor([1.0, NAN, NAN, NAN], dtype=torch.float64), ["a", "a", "b", "b"])
    assert result.advantages_B.tolist() == [0.0] * 4
    assert result.frac_zero_std == 1.0
    assert math.isnan(result.reward_std)


def test_the_reward_function_sees_trl_arguments_in_one_call():
    calls = []

    def reward_fn(**arguments):
        calls.append(arguments)
        return [0.0, 1.0]

    assert score(reward_fn, ["x", "y"]).rewards_B.tolist() == [0.0, 1.0]
    assert calls == [
        {
            "prompts": ["p", "p"],
            "completions": ["x", "y"],
            "completion_ids": [[5, 6], [5, 6]],
            "answer": [0, 1],
        }
    ]


def test_a_reward_that_raises_loses_only_its_own_rollout(caplog):
    def reward_fn(*, completions, **_):
        return [1.0 / int(text) for text in completions]

    scores = score(reward_fn, ["1", "0", "2", "x"])
    assert scores.rewards_B.tolist() == pytest.approx([1.0, NAN, 0.5, NAN], nan_ok=True)
    assert scores.num_rewards_failed == 2
    assert scores.errors[0] == "ZeroDivisionError: float division by zero"
    assert scores.errors[1].startswith("ValueError")
    assert "RewardFailed: 2 of 4" in caplog.text


def test_none_nan_and_infinite_rewards_are_failures(caplog):
    scores = score(lambda **_: [None, NAN, math.inf, 2], ["a", "b", "c", "d"])
    assert scores.is_valid_B.tolist() == [False, False, False, True]
    assert scores.num_rewards_failed == 3
    assert "None or not finite" in caplog.text


@pytest.mark.failure(30)
def test_failed_rollouts_are_never_shown_to_the_reward_function():
    seen = []

    def reward_fn(*, completions, **_):
        seen.extend(completions)
        return [1.0] * len(completions)

    scores = score(reward_fn, ["a", "b", "c", "d"], ["stop", "error", "length", "abort"])
    assert seen == ["a", "c"]
    assert scores.is_valid_B.tolist() == [True, False, True, False]
    assert (scores.num_rollouts_failed, scores.num_rewards_failed) == (2, 0)


@pytest.mark.failure(30)
def test_a_batch_of_failures_scores_nothing_and_goes_on():
    scores = score(lambda **_: pytest.fail("not called"), ["a"], ["error"])
    assert group_advantages(scores.rewards_B, ["a"]).advantages_B.tolist() == [0.0]


def test_a_reward_list_of_the_wrong_length_is_an_error():
    with pytest.raises(InvalidInput, match="2 rewards here, got 1"):
        score(lambda **_: [1.0], ["a", "b"])


def test_arithmetic_rows_depend_only_on_seed_and_index_and_never_on_held_out_problems():
    assert ARITHMETIC.train_rows(3, 0, 6)[4:] == ARITHMETIC.train_rows(3, 4, 2)
    assert ARITHMETIC.train_rows(3, 0, 6) != ARITHMETIC.train_rows(4, 0, 6)
    held_out = {row["prompt"] for row in ARITHMETIC.eval_rows(50)}
    assert len(held_out) == 50
    assert held_out.isdisjoint(row["prompt"] for row in ARITHMETIC.train_rows(0, 0, 300))


def test_a_finite_task_serves_every_row_once_per_epoch_in_another_order():
    rows = [{"prompt": str(i)} for i in range(20)]
    task = from_rows(name="toy", train=rows, held_out=rows[:2], reward_fn=lambda **_: [])
    first, second = task.train_rows(0, 0, 20), task.train_rows(0, 20, 20)
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(map(str, rows))
    assert first != second
    assert task.train_rows(0, 25, 3) == second[5:8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sums", "module:attribute"),
        ("no_such_module:task", "no module"),
        ("math:no_such_task", "no attribute"),
        ("math:pi", "must be a Task"),
    ],
)
def test_a_task_that_cannot_be_loaded_says_why(name, message):
    with pytest.raises(InvalidInput, match=message):
        load_task(name)


@pytest.mark.parametrize("prompt", ["", None, 3])
def test_a_row_without_a_text_prompt_is_an_error(prompt):
    task = from_rows(name="toy", train=[{"prompt": prompt}], held_out=[], reward_fn=lambda **_: [])
    with pytest.raises(InvalidInput, match="needs a 'prompt'"):
        task.train_rows(0, 0, 1)
