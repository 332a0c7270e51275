"""Whole runs on a tiny random policy: what they leave, and what stops them."""

import dataclasses
import io
import json
import signal

import pytest
from rich.console import Console

from blockroll.config import PolicyConfig
from blockroll.errors import CheckpointError, RunExists, WeightSyncError
from blockroll.policies.hf import HFPolicy, load_tokenizer
from blockroll.rl_loops.checkpoint import checkpoints, latest_checkpoint
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.loop import load_run_config, train
from blockroll.rl_loops.signals import interrupts_held
from blockroll.rl_loops.tasks import Task, from_rows
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.drafters.history_file import load_history
from blockroll.rollout.engine.requests import derive_seed
from blockroll.rollout.pool.makers import build_replica, make_pool
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica
from tests.params import slow_beyond
from tests.runs import TASK, config_for, run, save_policy, stop_after

REQUIRED = [
    "step",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "policy_version",
    "plan",
    "grad_norm",
    "learning_rate",
    "clip_ratio",
    "entropy",
    "rollout/acceptance_rate",
    "rollout/tokens_per_forward",
    "rollout/generated_tok_s",
    "rollout/duration_s",
    "rollout/failed_total",
    "reward/failed_total",
    "completions/mean_length",
    "sync/version",
    "sync/engines_stale",
    "sync/checksum_fail_total",
    "perf/weight_sync_s",
    "perf/update_s",
    "step_time",
    "rollout_corr/kl",
    "rollout_corr/rollout_is_mean",
    "rollout_corr/applied/rollout_is_mean",
    "sampling/sampling_logp_difference/max",
]


def test_a_run_leaves_config_metrics_samples_checkpoints_and_report(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)
    result = run(config)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [key for row in rows for key in REQUIRED if key not in row] == []
    assert [row["policy_version"] for row in rows] == [0, 1, 2, 3]
    assert [row["sync/version"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/reward" in row] == [2, 4]
    assert "eval/initial_reward" in rows[0]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert rows[0]["plan"] == "two_forward(3)"
    assert {row["rollout/plan/two_forward(3)"] for row in rows} == {1.0}
    assert load_run_config(config.run_dir) == dataclasses.replace(config, runs_dir=str(tmp_path.resolve()))
    assert [path.name for path in checkpoints(config.run_dir)] == ["step_000002", "step_000004"]
    assert {sample["step"] for sample in read_lines(config.run_dir / "rollouts.jsonl")} == {1, 2, 3, 4}
    assert result.report.is_file()
    assert result.policy_version == 4


def test_a_plan_that_chooses_itself_says_what_it_chose(tmp_path, policy_path):
    (row,) = run(config_for(tmp_path, policy_path, plan="auto", steps=1, eval_every=0)).metrics
    shares = {name: value for name, value in row.items() if name.startswith("rollout/plan/")}
    assert row["plan"] == "auto"
    assert shares["rollout/plan/plain"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_a_run_says_how_fast_its_choices_were_and_its_checkpoints_hold_the_history(tmp_path, policy_path):
    def num_tokens():
        policy = HFPolicy.from_pretrained(latest_checkpoint(config.run_dir), device="cpu")
        paths = [*latest_checkpoint(config.run_dir).glob("history_*")]
        return sum(load_history(path, policy).index.num_tokens for path in paths)

    config = config_for(tmp_path, policy_path, plan="history(4)", steps=1, eval_every=0)
    run(config)
    saved = num_tokens()
    rows = run(config_for(tmp_path, policy_path, plan="auto", steps=3, eval_every=0), resume=True).metrics
    assert all(row["rollout/speedup_predicted"] > 0 for row in rows[1:])
    assert all(row["rollout/speedup_achieved"] > 0 for row in rows[1:])
    assert 0 < saved < num_tokens(), "what was saved comes back, and grows"


def test_a_checkpoint_is_a_policy_that_still_drafts(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path, steps=1)
    run(config)
    policy = HFPolicy.from_pretrained(latest_checkpoint(config.run_dir), device="cpu")
    assert (policy.mask_token_id, policy.trained_drafts) == (3, 3)
    assert policy.tokenizer is not None


@pytest.mark.parametrize("plan", slow_beyond(1, ["two_forward", "plain"]))
def test_reward_rises_on_a_task_that_random_weights_can_learn(tmp_path, policy_path, plan):
    options = {"prompts_per_step": 4, "group_size": 16, "learning_rate": 2e-2, "lr_scheduler": "constant"}
    rows = run(config_for(tmp_path, policy_path, plan=plan, steps=16, eval_every=0, **options)).metrics
    assert sum(row["reward"] for row in rows[-3:]) / 3 > rows[0]["reward"] + 0.25


def test_an_interrupt_says_how_to_go_on_and_closes_the_pool(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)
    output = io.StringIO()
    closed = []
    replicas = [build_replica(config.policy, config.rollout)]
    pool = RolloutPool(replicas, tokenizer=load_tokenizer(policy_path), on_close=lambda: closed.append(True))
    with pytest.raises(SystemExit) as end:
        train(
            config,
            task=TASK,
            pool=pool,
            console=Console(file=output),
            callbacks=[stop_after(1, KeyboardInterrupt())],
        )
    assert end.value.code == 130
    assert f"blockroll train --resume {config.run_dir}" in output.getvalue().replace("\n", "")
    assert closed == [True]


def test_an_interrupt_during_an_update_waits_for_the_step_and_keeps_it(tmp_path, policy_path, monkeypatch):
    config = config_for(tmp_path, policy_path, checkpoint_every=0)
    update = Learner.update

    def interrupted_update(self, *arguments, **options):
        if self.num_optimizer_steps == 1:
            signal.raise_signal(signal.SIGINT)
        return update(self, *arguments, **options)

    monkeypatch.setattr(Learner, "update", interrupted_update)
    with pytest.raises(SystemExit):
        run(config)
    assert latest_checkpoint(config.run_dir).name == "step_000002"
    assert [row["step"] for row in read_lines(config.run_dir / "metrics.jsonl")] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait():
    reached = []

    @interrupts_held()
    def work():
        signal.raise_signal(signal.SIGINT)
        reached.append("after one")
        signal.raise_signal(signal.SIGINT)
        reached.append("after two")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["after one"]


def test_an_interrupt_before_any_step_is_done_leaves_a_checkpoint_of_the_start(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)

    def interrupt(**_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run(
            dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=0)),
            task=dataclasses.replace(TASK, reward_fn=interrupt),
        )
    assert latest_checkpoint(config.run_dir).name == "step_000000"


def test_a_run_folder_that_exists_is_refused_with_both_ways_out(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)
    config.run_dir.mkdir()
    with pytest.raises(RunExists, match=r"--resume .* another name"):
        run(config)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    config = config_for(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint"):
        run(config)
    assert not config.run_dir.exists()


def test_resuming_what_never_ran_or_another_run_is_refused(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path, steps=1)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(config, resume=True)
    run(config)
    with pytest.raises(CheckpointError, match=r"seed is 7, but .* started with 0"):
        run(dataclasses.replace(config, seed=7), resume=True)
    with pytest.raises(CheckpointError, match=r"train\.group_size is 8"):
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, group_size=8)), resume=True)


def test_a_reward_that_raises_is_counted_and_the_run_goes_on(tmp_path, policy_path):
    def sometimes(*, completion_ids, **_):
        if any(ids[0] % 2 for ids in completion_ids):
            raise ArithmeticError("odd")
        return [1.0] * len(completion_ids)

    rows = run(config_for(tmp_path, policy_path), task=dataclasses.replace(TASK, reward_fn=sometimes)).metrics
    assert len(rows) == 4
    assert rows[-1]["reward/failed_total"] >= rows[0]["reward/failed_total"] > 0
    assert rows[-1]["rollout/failed_total"] == 0


def test_rewards_get_the_columns_that_any_row_has_and_none_where_one_lacks_it(tmp_path, policy_path):
    seen = []

    def reward(*, completions, **columns):
        seen.append((len(completions), columns))
        return [float(len(text)) for text in completions]

    rows = [{"prompt": f"{i}=?", **({"hint": "add"} if i == 2 else {})} for i in range(3)]
    config = config_for(tmp_path, policy_path, plan="plain", steps=3, prompts_per_step=1, eval_every=0)
    for name, task in {
        "rows": from_rows(name="ragged", train=rows, held_out=[], reward_fn=reward),
        "own": Task(
            name="own", train_row=lambda _, index: rows[index], eval_rows=lambda _: [], reward_fn=reward
        ),
    }.items():
        seen.clear()
        run(dataclasses.replace(config, name=name), task=task)
        assert all(len(column) == count for count, columns in seen for column in columns.values())
        hints = [hint for _, columns in seen for hint in columns.get("hint", ())]
        num_none = 8 if name == "rows" else 0  # a task that is no list of rows knows those of its batch
        assert sorted(map(str, hints)) == sorted(["add"] * 4 + ["None"] * num_none)


def test_evaluations_have_request_ids_of_their_own_and_the_same_seeds(tmp_path, policy_path, monkeypatch):
    asked = []
    generate = RolloutPool.generate

    def noting(self, requests):
        requests = tuple(requests)
        asked.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(RolloutPool, "generate", noting)
    run(config_for(tmp_path, policy_path, plan="plain"))
    names = [request.request_id for request in asked]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {
        *(f"train step {step}" for step in (1, 2, 3, 4)),
        *(f"eval step {step}" for step in (0, 2, 4)),
    }
    seeds = [{r.seed for r in asked if r.request_id.startswith(f"eval step {step}/")} for step in (0, 2, 4)]
    assert seeds[0] == seeds[1] == seeds[2]


class DeafReplica(LocalReplica):
    """Loses the last bucket of every update."""

    def update(self, update):
        return super().update(dataclasses.replace(update, buckets=(*update.buckets[:-1], None)))


def test_a_run_stops_by_name_when_one_replica_misses_an_update(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)
    replicas = [build_replica(config.policy, config.rollout, replica_id=index) for index in range(2)]
    replicas[1] = DeafReplica(replicas[1].engine, replicas[1].engine.policy.model, replica_id=1)
    pool = RolloutPool(replicas, tokenizer=load_tokenizer(policy_path))
    with pytest.raises(WeightSyncError, match=r"version 1 .* replica 1 holds version 0.*BucketMissing"):
        run(config, pool=pool)
    assert pool.states == ("READY", "STALE")


def test_a_run_stops_by_name_when_a_bucket_is_corrupted_for_all(tmp_path, policy_path):
    def corrupt(update):
        return dataclasses.replace(update, buckets=tuple(bucket ^ 1 for bucket in update.buckets))

    config = config_for(tmp_path, policy_path)
    replicas = [build_replica(config.policy, config.rollout)]
    pool = RolloutPool(replicas, tokenizer=load_tokenizer(policy_path), transport=corrupt)
    with pytest.raises(WeightSyncError, match="ChecksumMismatch"):
        run(config, pool=pool)
    assert pool.version == 0


def test_a_pool_with_other_weights_than_the_learner_serves_nothing(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path)
    other = save_policy(tmp_path / "other", seed=1)
    pool = make_pool(PolicyConfig(path=str(other), device="cpu"), config.rollout)
    with pytest.raises(WeightSyncError, match=r"replica 0 .* started from weights"):
        run(config, pool=pool)


def test_wandb_goes_on_with_one_run_across_a_resume(tmp_path, policy_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(config_for(tmp_path, policy_path, steps=1), wandb=True)
    run(config)
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), resume=True)
    runs = [path.name for path in (config.run_dir / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len(runs) == 2
    assert set(runs) == {f"run-{(config.run_dir / 'wandb_run_id').read_text().strip()}.wandb"}


def test_seeds_are_63_bits_and_depend_on_every_word():
    seeds = {derive_seed(0, "step 1", prompt, sample) for prompt in range(20) for sample in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(1, 0)


def test_metrics_are_json_that_other_tools_can_read(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path, plan="plain", steps=1)
    run(config)
    text = (config.run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["rollout/acceptance_rate"] is None
    assert json.loads(text)["rollout/tokens_per_forward"] == 1.0
