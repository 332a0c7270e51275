"""Draft alignment under a TRL trainer: when it learns, and that only drafts move."""

import math

import pytest
import torch
import trl

from blockroll.config import AlignmentConfig, DraftConfig
from blockroll.errors import (
    AdapterMismatch,
    CheckpointError,
)
from tests.models import adapted_policy
from tests.trl_trainers import aligned, logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


def test_alignment_trains_the_adapter_after_each_update_and_never_the_policy(tmp_path):
    made = aligned(tmp_path, learning_rate=0.0)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    adapter = made.rollouts.placement.policy.adapter
    drafts = [parameter.detach().clone() for parameter in adapter.parameters()]
    rows = logs(made)
    assert all(torch.equal(dict(made.model.named_parameters())[name], old) for name, old in before.items())
    assert not any(
        torch.equal(old, new)
        for old, new in zip(drafts, adapter.parameters(), strict=True)
        if new.abs().sum() > 0
    )
    assert [row["draft/num_steps"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["draft/loss"] < rows[0]["draft/loss"]


def test_completions_of_one_token_train_the_policy_and_have_nothing_to_draft(tmp_path):
    rows = logs(aligned(tmp_path, max_completion_length=1))
    for row in rows:
        assert row["completions/max_length"] == 1
        assert math.isfinite(row["loss"])
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
        assert not any(name.startswith("draft/") for name in row)


def test_alignment_by_acceptance_waits_until_acceptance_falls(tmp_path):
    made = aligned(
        tmp_path, alignment=AlignmentConfig(below=0.9, draft=DraftConfig(rank=4, block_sizes=(4,)))
    )
    alignment = made.rollouts.placement.alignment
    alignment.first_acceptance, alignment._acceptance = 0.5, 0.46
    assert not alignment.is_due(1)
    alignment._acceptance = 0.44
    assert alignment.is_due(1)


@pytest.mark.slow
def test_a_full_conversion_reports_how_its_gradient_lies_to_the_policys(tmp_path):
    draft = DraftConfig(conversion="full", block_sizes=(8,), layouts=("two_forward",), learning_rate=1e-5)
    made = aligned(tmp_path, alignment=AlignmentConfig(every=2, draft=draft))
    rows = logs(made)
    assert ["draft/policy_grad_cosine" in row for row in rows] == [False, True, False, True]
    assert all(-1 <= row.get("draft/policy_grad_cosine", 0) <= 1 for row in rows)
    assert ["draft/policy_kl" in row for row in rows] == [False, True, False, True]
    assert all(0 < abs(row.get("draft/policy_kl", 1e-6)) < 0.1 for row in rows)
    # The draft gradient does not leak into the next update of the policy.
    assert all(row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3) for row in rows)


def test_alignment_cannot_go_on_from_a_stock_trainers_checkpoint(tmp_path):
    stock = trainer(
        tmp_path, trl.GRPOTrainer, options={"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    )
    stock.train()
    with pytest.raises(CheckpointError, match="written without blockroll"):
        aligned(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_adapter_of_another_architecture_is_refused_and_one_beside_the_model_is_used(tmp_path):
    other = adapted_policy()
    other.adapter.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatch):
        trainer(tmp_path, adapter=tmp_path / "other")
