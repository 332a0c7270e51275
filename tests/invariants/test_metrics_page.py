"""docs/metrics.md has every metric that is logged, and no other."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import trl

from blockroll.config import AlignmentConfig, DraftConfig, RolloutConfig, WatchConfig
from blockroll.rl_loops.envs import from_reasoning_gym
from blockroll.rl_loops.tasks import from_rows
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.trl import GuardCallback
from tests.runs import ROWS, config_for, even_share, run, save_policy
from tests.trl_trainers import ROWS as ROWS_OF_TRAINERS
from tests.trl_trainers import aligned, logs, trainer

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([^`]+)` \| (train|TRL|both) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)

FAMILIES = (
    "rollout/plan/<name>",
    "rollout/acceptance_rate/<drafter>",
    "rollout/acceptance_rate_level_<n>",
    "rollout/spec_accept_rate_pos_<k>",
    "rollout/spec_accept_length_share_<n>",
    "reward/by_source/<name>",
)
TEST = re.compile(r"drift/.+/(log_e|log_e_max|n|threshold)")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


def stated(who, page=None):
    """The names of the page's rows, alternatives written out."""
    rows = ROW.findall(PAGE.read_text() if page is None else page)
    names = [name for row, marked in rows if marked in (who, "both") for name in written_out(row)]
    assert len(names) == len({*names})
    return {*names}


def written_out(row):
    parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", row)]
    return ["".join(each) for each in itertools.product(*parts)]


def names_of(rows):
    return {named(name) for row in rows for name in row}


def named(name):
    """As the page has it: what differs from run to run is a part."""
    for family in FAMILIES:
        prefix, part = family.split("<")
        if name.startswith(prefix):
            return f"{prefix}<{part}"
    found = TEST.fullmatch(name)
    return name if found is None else f"drift/<test>/{found[1]}"


def test_every_row_of_the_table_is_read():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(ROW.findall(PAGE.read_text())) == len(lines) > 50
    assert written_out("a/{b,c}") == ["a/b", "a/c"]


def test_the_page_has_what_a_run_logs(tmp_path):
    rows = [{**row, "source": f"sum {len(row['prompt'])}"} for row in ROWS]
    task = from_rows(name="even", train=rows, held_out=rows[:3], reward_fn=even_share)
    policy = save_policy(tmp_path / "policy", 0, layouts=("fused",))
    config = config_for(tmp_path, policy, plan="fused", steps=2)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, mix_weight=0.5, watch_every=2),
        watch=WatchConfig(reward="warn", shadow_share=1.0),
    )
    run(config, task=task)
    assert names_of(read_lines(config.run_dir / "metrics.jsonl")) == stated("train")


@pytest.mark.slow
def test_the_page_has_what_a_trl_trainer_logs_beside_trl(tmp_path):
    steps = {"max_steps": 2}
    draft = DraftConfig(conversion="full", block_sizes=(8,), layouts=("two_forward",), learning_rate=1e-5)
    rows = ROWS_OF_TRAINERS.add_column("data_source", ["sums"] * len(ROWS_OF_TRAINERS))
    with pytest.warns(UserWarning, match="layout this policy was not trained for"):
        fused = trainer(
            tmp_path / "fused",
            rollout=RolloutConfig(plan="fused", watch_every=1),
            callbacks=[GuardCallback(WatchConfig(acceptance_reference=8))],
            train_dataset=rows,
            options=steps,
        )
    scored = []
    from_reasoning_gym("chain_sum", size=1).reward([""], [0], log_metric=lambda name, _: scored.append(name))
    ours = {
        *names_of(logs(aligned(tmp_path / "aligned", alignment=AlignmentConfig(draft=draft), **steps))),
        *names_of(logs(trainer(tmp_path / "auto", rollout=RolloutConfig(plan="auto"), options=steps))),
        *names_of(logs(fused)),
        *scored,
    }
    stock = names_of(logs(trainer(tmp_path / "stock", trl.GRPOTrainer, options=steps)))
    assert ours - stock == stated("TRL")
