"""What a TRL trainer logs of tokens that its own weights drew: all of them, once, and no others."""

import math

import pytest
import torch
import trl
from peft import LoraConfig

from blockroll.config import RolloutConfig
from blockroll.rl_loops.trl import trainers
from blockroll.rl_loops.trl.metrics import PADDING
from tests.params import slow_beyond
from tests.trl_trainers import ROWS, even_share, logs, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
SURPRISAL = "sampling/surprisal_minus_entropy"
PLAIN = RolloutConfig(plan="plain", check_sync="off")


def counting(made):
    """Tokens that the trainer draws from now on, by mode."""
    drawn = {"train": 0, "eval": 0}
    generate = made.rollouts.generate

    def counted(**arguments):
        done = generate(**arguments)
        drawn["train" if made.model.training else "eval"] += sum(map(len, done.completion_ids))
        return done

    made.rollouts.generate = counted
    return drawn


def num_counted(made, mode):
    return made._views[mode]._run_sums[0].item()


def reused(folder, **options):
    """Each batch is learned from twice, with an evaluation between."""
    return trainer(
        folder,
        rollout=PLAIN,
        reward_funcs=even_share,
        eval_dataset=ROWS.select(range(4)),
        options={
            "num_iterations": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 16,
            **options,
        },
    )


def test_tokens_of_an_older_policy_are_not_counted_after_an_evaluation_between(tmp_path):
    made = reused(tmp_path)
    drawn = counting(made)
    rows = logs(made)
    assert [f"{SURPRISAL}/mean" in row for row in rows] == [True, False, True, False]
    assert num_counted(made, "train") == drawn["train"]
    assert num_counted(made, "eval") == drawn["eval"]
    last = [row for row in made.state.log_history if f"eval_{SURPRISAL}/run_mean" in row][-1]
    assert abs(last[f"eval_{SURPRISAL}/run_mean"]) < 4 * last[f"eval_{SURPRISAL}/run_se"]
    assert abs(rows[2][f"{SURPRISAL}/run_mean"]) < 4 * rows[2][f"{SURPRISAL}/run_se"]


def test_counting_them_as_on_policy_is_caught(tmp_path):
    """Planted: the version of the last sync stands for the one that drew the batch."""
    made = reused(tmp_path)
    compute_loss = made._compute_loss

    def as_if_drawn_now(model, inputs):
        versions = inputs["drawn_versions"]
        now = torch.where(versions >= 0, made.rollouts.version, versions)
        return compute_loss(model, {**inputs, "drawn_versions": now})

    made._compute_loss = as_if_drawn_now
    made.add_callback(SyncAfterStep(made))
    rows = logs(made)
    assert f"{SURPRISAL}/mean" in rows[1]
    assert abs(rows[1][f"{SURPRISAL}/mean"]) > 4 * rows[1][f"{SURPRISAL}/se"]


class SyncAfterStep(trainers.AfterUpdate):
    """Replicas get the weights at once, as an evaluation between would have it."""

    def on_pre_optimizer_step(self, *arguments, **kwargs):
        pass

    def on_step_end(self, *arguments, **kwargs):
        self._trainer.rollouts.sync_weights()


def cut_short(folder, **options):
    """About half of the texts are longer than they may be, and TRL learns from the others alone."""
    return trainer(
        folder,
        rollout=PLAIN,
        options={
            "mask_truncated_completions": True,
            "max_completion_length": 34,
            "per_device_train_batch_size": 64,
            "max_steps": 4,
            "learning_rate": 0.0,
            **options,
        },
    )


@pytest.mark.slow
def test_texts_that_are_cut_off_count_with_every_token_that_was_drawn(tmp_path):
    made = cut_short(tmp_path)
    drawn = counting(made)
    rows = logs(made)
    assert 0.2 < rows[0]["completions/clipped_ratio"] < 0.8
    assert num_counted(made, "train") == drawn["train"]
    assert abs(rows[-1][f"{SURPRISAL}/run_mean"]) < 4 * rows[-1][f"{SURPRISAL}/run_se"]
    # Hidden from themselves, as TRL's own mask has it, those texts would have another law.
    assert all(row["rollout_corr/rollout_is_max"] == pytest.approx(1, abs=1e-3) for row in rows)


@pytest.mark.slow
def test_counting_complete_texts_alone_is_caught(tmp_path):
    """Planted: what TRL's mask keeps stands for what was drawn."""
    made = cut_short(tmp_path)
    compute_loss = made._compute_loss

    def kept_alone(model, inputs):
        kept = torch.where(inputs["completion_mask"].bool(), inputs["drawn_versions"], PADDING)
        return compute_loss(model, {**inputs, "drawn_versions": kept})

    made._compute_loss = kept_alone
    drawn = counting(made)
    made.train()
    assert 0 < num_counted(made, "train") < 0.8 * drawn["train"]


def test_training_values_are_never_in_a_row_of_an_evaluation(tmp_path):
    made = trainer(
        tmp_path,
        rollout=PLAIN,
        eval_dataset=ROWS.select(range(4)),
        options={
            "logging_steps": 3,
            "max_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": 16,
        },
    )
    drawn = counting(made)
    flush, sums = made._views["eval"].flush, []

    def flushed(*arguments, **options):
        sums.append(made._views["eval"]._sums[0].item())
        return flush(*arguments, **options)

    made._views["eval"].flush = flushed
    made.train()
    assert sum(sums) == drawn["eval"]
    assert num_counted(made, "train") == drawn["train"]


@pytest.mark.slow
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_the_runs_mean_goes_on_through_a_resume(tmp_path, logging_steps):
    def one(folder):
        return trainer(
            tmp_path / folder,
            rollout=PLAIN,
            reward_funcs=even_share,
            options={
                "max_steps": 6,
                "save_strategy": "steps",
                "save_steps": 2,
                "logging_steps": logging_steps,
            },
        )

    whole, resumed = one("whole"), one("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    mine, theirs = (
        [row for row in made.state.log_history if f"{SURPRISAL}/run_mean" in row][-1]
        for made in (resumed, whole)
    )
    assert mine["step"] == theirs["step"] == 6
    assert num_counted(resumed, "train") == num_counted(whole, "train")
    for name in ("run_mean", "run_se"):
        assert mine[f"{SURPRISAL}/{name}"] == pytest.approx(theirs[f"{SURPRISAL}/{name}"], abs=1e-4)


def dropping(model):
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3


NOISES = {
    "neftune": ({"neftune_noise_alpha": 20.0}, {}),
    "attention": ({}, {}),
    "lora": ({}, {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)}),
}


@pytest.mark.parametrize("noise", slow_beyond(1, NOISES))
def test_a_forward_that_draws_random_numbers_accuses_no_sampler(tmp_path, caplog, noise):
    options, arguments = NOISES[noise]
    made = trainer(
        tmp_path,
        rollout=PLAIN,
        eval_dataset=ROWS.select(range(4)),
        options={"per_device_eval_batch_size": 16, "max_steps": 1, **options},
        **arguments,
    )
    if noise == "attention":
        dropping(made.model)
    (row,) = logs(made)
    assert not [name for name in row if name.startswith(SURPRISAL)]
    assert "rollout_corr/rollout_is_mean" in row
    assert [
        record.getMessage()[:11] for record in caplog.records if "random numbers" in record.getMessage()
    ] == ["in training"]
    made.evaluate()
    row = made.state.log_history[-1]
    assert abs(row[f"eval_{SURPRISAL}/mean"]) < 4 * row[f"eval_{SURPRISAL}/se"]


@pytest.mark.slow
def test_taking_a_noisy_forward_for_the_sampling_law_is_caught(tmp_path, monkeypatch):
    """Planted: the forward is said to draw nothing."""
    monkeypatch.setattr(trainers, "random_state", lambda device: ())
    options = {"neftune_noise_alpha": 20.0, "max_steps": 1, "per_device_train_batch_size": 32}
    (row,) = logs(trainer(tmp_path, rollout=PLAIN, options=options))
    assert row[f"{SURPRISAL}/mean"] > 4 * row[f"{SURPRISAL}/se"]


def forwards(made, monkeypatch):
    """How often TRL computes log-probabilities, without a gradient and with one."""
    counts = {False: 0, True: 0}
    scored = trl.GRPOTrainer._get_per_token_logps_and_entropies

    def counted(self, *arguments, **options):
        counts[torch.is_grad_enabled()] += 1
        return scored(self, *arguments, **options)

    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    made.train()
    return counts[False], counts[True]


@pytest.mark.parametrize(
    ("rollout", "options", "expected"),
    [
        ({}, {}, (0, 2)),
        ({}, {"num_iterations": 2}, (0, 2)),
        ({}, {"bf16": True}, (2, 2)),
        ({}, {"neftune_noise_alpha": 5.0}, (2, 2)),
        ({"mix_weight": 0.5}, {"vllm_importance_sampling_mode": "token_truncate"}, (2, 2)),
        ({}, {"repetition_penalty": 1.1, "vllm_importance_sampling_mode": "token_truncate"}, (2, 2)),
    ],
    ids=["lossless", "reused", "bf16", "noisy", "mixed", "penalized"],
)
def test_lossless_float32_batches_are_not_scored_once_more(tmp_path, monkeypatch, rollout, options, expected):
    plan = "two_forward" if "mix_weight" in rollout else "plain"
    made = trainer(tmp_path, rollout=RolloutConfig(plan=plan, check_sync="off", **rollout), options=options)
    assert forwards(made, monkeypatch) == expected


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_leaving_the_scoring_out_changes_nothing_that_is_learned(tmp_path, num_iterations):
    options = {"num_iterations": num_iterations, "learning_rate": 1e-3, "max_steps": 4}
    ours = trainer(tmp_path / "ours", rollout=PLAIN, reward_funcs=even_share, options=options)
    scored = trainer(tmp_path / "scored", rollout=PLAIN, reward_funcs=even_share, options=options)
    scored._scores_by_report = False
    for mine, theirs in zip(logs(ours), logs(scored), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-3)
        for name in ("sampling_logp_difference/max", "importance_sampling_ratio/mean"):
            name = f"sampling/{name}"
            assert mine.get(name, math.nan) == pytest.approx(
                theirs.get(name, math.nan), abs=1e-3, nan_ok=True
            )
