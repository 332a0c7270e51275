"""The TRL examples in a short form, and the README's three lines."""

import re
from pathlib import Path

import pytest

from examples import trl_grpo, trl_reasoning_gym, trl_tools

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
    "ignore:'pin_memory' argument is set as true:UserWarning",  # a default of transformers, without a GPU
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def rows(trainer):
    return [row for row in trainer.state.log_history if "reward" in row]


def test_the_stock_script_with_three_lines_more_leaves_a_report(tmp_path):
    trainer = trl_grpo.main(["--steps", "2", "--output-dir", str(tmp_path), "--plan", "two_forward"])
    assert [row["rollout/tokens_per_forward"] > 2 for row in rows(trainer)] == [True, True]
    assert (tmp_path / "blockroll" / "report.html").is_file()


def test_a_reasoning_gym_task_is_scored_by_its_own_rules(tmp_path):
    trainer = trl_reasoning_gym.main(["--steps", "1", "--output-dir", str(tmp_path)])
    assert rows(trainer)[0]["reward"] > 0.05


@pytest.mark.slow
def test_a_policy_plays_through_its_tool_and_learns_from_its_own_tokens_only(tmp_path):
    trainer = trl_tools.main(["--steps", "2", "--imitation-steps", "100", "--output-dir", str(tmp_path)])
    for row in rows(trainer):
        assert row["tools/call_frequency"] > 0.3
        # Half of the completions have a second turn, and each but the first of a prompt shares all of it.
        assert row["rollout/prefix_hit_rate"] > 0.8
        # Were an environment's tokens taken for the policy's, their ratios would be far from 1.
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
        assert row["rollout_corr/rollout_is_min"] == pytest.approx(1, abs=1e-3)


def test_the_readmes_three_lines_are_those_of_the_example():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = (ROOT / "examples" / "trl_grpo.py").read_text()
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 3
    for line in added:
        assert line.split("  #")[0].rstrip(",").replace('"auto"', "given.plan") in code, line
