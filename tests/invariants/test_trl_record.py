"""What a TRL trainer with our rollouts leaves: checkpoints, metrics, report, audit."""

import pytest

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.files import audit_files
from tests.equality import assert_same_weights
from tests.trl_trainers import aligned, drawn_by_step, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


@pytest.mark.slow
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path):
    whole = aligned(tmp_path / "whole")
    want = drawn_by_step(whole)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in (folder / "blockroll").iterdir()} == {
        "draft_adapter.json",
        "draft_adapter.safetensors",
        "rollout_state.pt",
    }
    resumed = aligned(tmp_path / "resumed")
    got = drawn_by_step(resumed)
    resumed.train(resume_from_checkpoint=str(folder))
    assert sorted(got) == [2, 3]
    assert got == {step: want[step] for step in (2, 3)}
    mine, theirs = (made.rollouts.placement.policy.adapter for made in (resumed, whole))
    assert_same_weights(theirs.state_dict(), mine.state_dict())


def test_the_output_folder_holds_every_logged_step_and_a_page(tmp_path):
    trainer(tmp_path).train()
    lines = read_lines(tmp_path / "blockroll" / "metrics.jsonl")
    assert [row["step"] for row in lines if "reward" in row] == [1, 2]
    page = (tmp_path / "blockroll" / "report.html").read_text()
    assert "GRPOTrainer on" in page
    assert "Reward against acceptance" in page


def test_the_audit_of_a_trainers_rollouts_lies_beside_its_report_and_passes(tmp_path):
    config = RolloutConfig(plan="two_forward", audit="all")
    made = trainer(tmp_path, rollout=config, options={"save_strategy": "steps", "save_steps": 1})
    made.train()
    audit = tmp_path / "blockroll" / "audit"
    report = check_audit(audit_files(audit))
    assert report.passed, report.problem
    assert report.num_rows > 500
    assert {path.name[:14] for path in audit.iterdir()} == {"version-000000", "version-000001"}
    assert not [path for path in audit.iterdir() if "version-000002" in path.name]
    (audit / "version-000002-replica-0-00001.parquet").touch()  # of a version that is made again
    resumed = trainer(tmp_path, rollout=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = check_audit(audit_files(audit))
    assert again.passed, again.problem
    # What was drawn behind the checkpoint is dropped, drawn again, and stands there once.
    assert again.rows_by_version == report.rows_by_version


@pytest.mark.slow
def test_an_audit_lies_where_the_config_says_and_is_resumed_there(tmp_path):
    audit = tmp_path / "elsewhere"
    config = RolloutConfig(plan="two_forward", audit="all", audit_dir=str(audit))
    made = trainer(tmp_path, rollout=config, options={"save_strategy": "steps", "save_steps": 1})
    made.train()
    report = check_audit(audit_files(audit))
    assert set(report.rows_by_version) == {0, 1}
    trainer(tmp_path, rollout=config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = check_audit(audit_files(audit))
    assert again.passed, again.problem
    assert again.rows_by_version == report.rows_by_version
    assert not (tmp_path / "blockroll" / "audit").exists()


@pytest.mark.slow
def test_a_run_from_the_start_does_not_write_between_the_rows_of_another(tmp_path):
    config = RolloutConfig(plan="two_forward", audit="all")
    made = trainer(tmp_path, rollout=config, options={"max_steps": 1})
    made.train()
    made.train()  # its own rows are no other run's
    files = audit_files(tmp_path / "blockroll" / "audit")
    other = trainer(tmp_path, rollout=config, options={"max_steps": 1})
    with pytest.raises(InvalidInput, match=r"audit holds the audit of another run.*resume_from_checkpoint"):
        other.train()
    assert audit_files(tmp_path / "blockroll" / "audit") == files
