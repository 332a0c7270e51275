"""TRL's trainers with our rollouts: what stays TRL's, and what the metrics can see."""

import dataclasses
import logging
import math
from contextlib import nullcontext

import pytest
import torch
import trl

from blockroll.config import RolloutConfig
from blockroll.errors import (
    ReplicaError,
)
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer
from blockroll.rl_loops.trl import GRPOTrainer, RLOOTrainer
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.files import audit_files
from tests.command_line import save_random_policy
from tests.trl_trainers import PROBLEMS, ROWS, logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)


def test_every_metric_of_the_stock_trainer_is_logged_and_ours_beside_it(tmp_path):
    stock, ours = logs(trainer(tmp_path, trl.GRPOTrainer)), logs(trainer(tmp_path))
    assert stock[0].keys() <= ours[0].keys()
    for name in (
        "sampling/importance_sampling_ratio/mean",
        "sampling/surprisal_minus_entropy/mean",
        "rollout/acceptance_rate",
        "rollout/tokens_per_forward",
        "rollout/generated_tok_s",
        "rollout/duration_s",
        "rollout/weight_version",
        "rollout/plan/two_forward(8)",
        "rollout_corr/rollout_is_mean",
        "rollout_corr/kl",
        "perf/weight_sync_s",
    ):
        assert math.isfinite(ours[0][name]), name
    assert [row["rollout/weight_version"] for row in ours] == [0, 1]


def test_a_trainer_whose_policy_has_no_drafts_says_so_once(tmp_path, caplog):
    bare = save_random_policy(tmp_path / "bare", can_draft=False)
    with caplog.at_level(logging.WARNING):
        logs(trainer(tmp_path, model=bare, rollout=RolloutConfig(plan="auto"), options={"max_steps": 1}))
    (said,) = [record.message for record in caplog.records if "from history alone" in record.message]
    assert "blockroll convert" in said


def test_lossless_rollouts_are_the_learners_own_law_at_every_version(tmp_path):
    rows = logs(trainer(tmp_path, options={"max_steps": 3, "per_device_train_batch_size": 32}))
    for row in rows:
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3)
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
    gap = rows[-1]["sampling/surprisal_minus_entropy/run_mean"]
    assert abs(gap) < 4 * rows[-1]["sampling/surprisal_minus_entropy/run_se"]


def test_mixed_precision_draws_the_law_that_the_learner_computes_in_it(tmp_path):
    """TRL's own default: float32 weights, and a forward in bfloat16."""
    made = trainer(tmp_path, options={"bf16": True}, rollout=RolloutConfig(plan="two_forward", audit="all"))
    assert made.model.dtype == torch.float32
    for row in logs(made):
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.1)
        assert row["sampling/sampling_logp_difference/mean"] < 0.02
    first = HFPolicy.from_pretrained("tiny")
    audit = audit_files(tmp_path / "blockroll" / "audit")
    report = check_audit(audit, policy_of=lambda version: None if version else first)
    assert report.passed, report.problem
    assert report.recomputed == {0: report.rows_by_version[0]}


def test_a_wrong_logprob_is_seen_before_truncation_hides_it(tmp_path):
    made = trainer(tmp_path)
    generate = made.rollouts.generate

    def shifted(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[lp - 0.3] for (lp,) in row] for row in done.logprobs])

    made.rollouts.generate = shifted
    row = logs(made)[0]
    assert row["rollout_corr/rollout_is_mean"] == pytest.approx(math.exp(0.3), abs=1e-3)
    assert row["rollout_corr/kl"] == pytest.approx(-0.3, abs=1e-3)
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(0.3, abs=1e-3)


def test_a_wrong_logprob_of_a_batch_that_trl_scores_is_seen_before_truncation_hides_it(tmp_path):
    made = trainer(tmp_path)
    made._scores_by_report = False
    generate = made.rollouts.generate

    def shifted(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[lp - 0.3] for (lp,) in row] for row in done.logprobs])

    made.rollouts.generate = shifted
    row = logs(made)[0]
    assert row["rollout_corr/rollout_is_mean"] == pytest.approx(math.exp(0.3), abs=1e-3)
    # After TRL's truncation by sequence nothing is left but zeros.
    assert row["sampling/importance_sampling_ratio/mean"] == 0
    assert row["grad_norm"] == 0


def test_a_wrong_sampler_that_reports_the_policys_logprobs_is_seen_in_surprisal(tmp_path):
    made = trainer(tmp_path, options={"per_device_train_batch_size": 64})
    made.rollouts.sampling = dataclasses.replace(made.rollouts.sampling, temperature=1.6)
    generate = made.rollouts.generate

    def reporting_the_policy(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[math.nan] for _ in row] for row in done.logprobs])

    made.rollouts.generate = reporting_the_policy
    row = logs(made)[0]
    assert row["sampling/importance_sampling_ratio/mean"] == 1
    assert row["sampling/surprisal_minus_entropy/mean"] > 4 * row["sampling/surprisal_minus_entropy/se"]


@pytest.mark.parametrize("cls", [GRPOTrainer, pytest.param(RLOOTrainer, marks=pytest.mark.slow)])
def test_iterations_accumulation_and_evaluation_work_as_in_the_stock_trainer(tmp_path, cls):
    made = trainer(
        tmp_path,
        cls,
        options={
            "num_iterations": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_eval_batch_size": 16,
        },
        eval_dataset=ROWS.select(range(8)),
    )
    rows = logs(made)
    generated = [row for row in rows if "rollout/duration_s" in row]
    assert [row["rollout/weight_version"] for row in generated] == [0, 1]
    # Only before the first update are the weights those that drew the tokens.
    assert ["sampling/surprisal_minus_entropy/mean" in row for row in rows] == [True, False, True, False]
    evaluation = next(row for row in made.state.log_history if "eval_reward" in row)
    assert 0 <= evaluation["eval_reward"] <= 1
    assert evaluation["eval_rollout/acceptance_rate"] > 0


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_other_seeds_other_tokens(tmp_path):
    first, again, other = (logs(trainer(tmp_path, options={"seed": seed})) for seed in (3, 3, 4))
    same = ("completions/mean_length", "reward", "entropy", "rollout/acceptance_rate")
    assert [[row[name] for name in same] for row in first] == [[row[name] for name in same] for row in again]
    assert first[0]["entropy"] != other[0]["entropy"]


def test_weights_that_are_not_finite_end_the_step_by_name(tmp_path):
    made = trainer(tmp_path)
    with torch.no_grad():
        next(made.model.parameters()).fill_(math.nan)
    with pytest.raises(ReplicaError, match=r"request train-0-0-0-0 of step 0 .*NonFiniteLogits"):
        made.train()


def test_a_later_turn_stays_in_its_group_and_computes_only_what_is_new(tmp_path):
    rollouts = trainer(tmp_path).rollouts
    rollouts.sync_weights()
    rollouts.begin_round()
    encode = load_tokenizer("tiny")
    prompts = [encode(problem.prompt)["input_ids"] for problem in PROBLEMS[:2] for _ in range(2)]
    done = rollouts.generate(prompts, None, 2, nullcontext())
    texts = [
        [*prompt, *ids, 50, 51] for prompt, ids in zip(done.prompt_ids, done.completion_ids, strict=True)
    ]
    rollouts.generate(texts[::-1], None, 1, nullcontext())
    first, later = rollouts.rollouts[:4], rollouts.rollouts[4:]
    groups = [rollout.request.group_id for rollout in first]
    assert len(set(groups)) == 2
    assert [rollout.request.group_id for rollout in later] == groups[::-1]
    assert {rollout.stats.num_prefilled for rollout in later} == {2}
