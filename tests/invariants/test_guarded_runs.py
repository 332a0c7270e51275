"""Runs with a guard: real faults and real harm, found in a real loop, acted on, kept, and gone on with."""

import dataclasses
import html
import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from blockroll.config import WatchConfig
from blockroll.errors import CheckpointError, ConfigError, GuardStopped, InvalidInput
from blockroll.kernels.rows.weights import inverse_cdf
from blockroll.rl_loops.loop import load_run_config, train
from blockroll.rl_loops.tasks import from_rows
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.watch.watch import Watch
from blockroll.rollout.engine import step as decoding
from blockroll.rollout.pool.replica import LocalReplica
from tests.runs import ROWS, TASK, config_for, run, save_policy, untimed, weights_of


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "p", 0)


def guarded(tmp_path, policy_path, *, watch=None, mix_weight=0.2, watch_every=1, **options):
    config = config_for(
        tmp_path, policy_path, **{"eval_every": 0, "checkpoint_every": 0, "steps": 6, **options}
    )
    rollout = dataclasses.replace(config.rollout, mix_weight=mix_weight, watch_every=watch_every)
    return dataclasses.replace(config, rollout=rollout, watch=watch or WatchConfig())


def harmed_by_mixing(**_):
    """Of the rollouts that were collected last: what their law earns."""
    return [EARNS["mixed"] if weight < 1 else 1.0 for weight in LAWS.pop(0)]


LAWS: list = []
EARNS = {"mixed": 0.0}


@pytest.fixture
def harmful(monkeypatch):
    """A task whose reward is 0 under the mixed law and 1 under the lossless one."""
    from blockroll.rl_loops import run as run_module

    collect = run_module.collect

    def noting(pool, rows, **options):
        batch = collect(pool, rows, **options)
        LAWS.append([rollout.law.weight for rollout in batch.rollouts])
        return batch

    LAWS.clear()
    monkeypatch.setattr(run_module, "collect", noting)
    return from_rows(name="harmful", train=ROWS, held_out=ROWS[:3], reward_fn=harmed_by_mixing)


REWARD = WatchConfig(reward="lossless", shadow_share=1.0, acceptance="off", learner="off")


def modes(rows):
    return [row["guard/mode"] for row in rows]


def test_harm_is_found_by_shadow_pairs_and_the_next_step_is_lossless(tmp_path, policy_path, harmful):
    result = run(guarded(tmp_path, policy_path, watch=REWARD, steps=9), task=harmful)
    rows = result.metrics
    spoke = next(row["step"] for row in rows if row["guard/action"])
    assert 1 <= spoke < 9
    assert modes(rows) == ["as_asked"] * spoke + ["lossless"] * (9 - spoke)
    said = rows[spoke - 1]
    assert said["guard/action"] == "lossless"
    assert "earns no less than the lossless one" in said["guard/said"]
    assert said["drift/reward/log_e"] >= said["drift/reward/threshold"] == pytest.approx(math.log(40))
    assert said["drift/reward/cs_high"] < 0
    assert [row["reward"] for row in rows] == [0.0] * spoke + [1.0] * (9 - spoke)
    assert rows[-1]["shadow/reward"] == 0.0  # the law that was asked for goes on beside it
    assert rows[-1]["drift/fallback_total"] == 1
    assert all(row["shadow/num_rollouts"] == 12 for row in rows)
    assert "lossless" in result.report.read_text()


def test_without_harm_nothing_is_said_and_pairs_cover_zero(tmp_path, policy_path, monkeypatch, harmful):
    monkeypatch.setitem(EARNS, "mixed", 1.0)
    rows = run(guarded(tmp_path, policy_path, watch=REWARD, steps=4), task=harmful).metrics
    assert modes(rows) == ["as_asked"] * 4
    assert all(row["guard/said"] is None for row in rows)
    assert rows[-1]["drift/reward/cs_low"] <= 0 <= rows[-1]["drift/reward/cs_high"]


def test_a_guard_goes_on_where_its_run_was_cut_off(tmp_path, policy_path, harmful):
    whole = run(guarded(tmp_path, policy_path, name="whole", watch=REWARD, steps=9), task=harmful)
    cut = guarded(tmp_path, policy_path, name="cut", watch=REWARD, steps=9)

    def crash(metrics):
        if metrics["step"] == 2:
            raise RuntimeError("cut off")

    LAWS.clear()
    with pytest.raises(RuntimeError, match="cut off"):
        run(cut, task=harmful, callbacks=[crash])
    LAWS.clear()
    again = run(cut, task=harmful, resume=True)

    def comparable(rows):
        return [
            {key: value for key, value in row.items() if key != "shadow/duration_s"} for row in untimed(rows)
        ]

    assert comparable(again.metrics) == comparable(whole.metrics)
    assert all(
        torch.equal(weights_of(whole.run_dir)[name], tensor)
        for name, tensor in weights_of(again.run_dir).items()
    )
    LAWS.clear()
    others = dataclasses.replace(
        load_run_config(again.run_dir, ["train.steps=12"]),
        watch=dataclasses.replace(REWARD, reward_alpha=0.01),
    )
    with pytest.raises(CheckpointError, match=r"of alpha 0\.01, it was 0\.05"):
        run(others, task=harmful, resume=True)


def test_a_fallback_to_plain_holds_on_every_replica_and_is_lifted_by_hand(tmp_path, policy_path, harmful):
    watch = dataclasses.replace(REWARD, reward="plain")
    result = run(guarded(tmp_path, policy_path, watch=watch, steps=8, name="plain"), task=harmful)
    rows = result.metrics
    spoke = modes(rows).index("plain")
    assert rows[spoke - 1]["rollout/plan/two_forward(3)"] == 1
    assert all(row["rollout/plan/plain"] == 1 and row["reward"] == 1 for row in rows[spoke:])
    LAWS.clear()
    longer = load_run_config(result.run_dir, ["train.steps=10"])
    still = run(longer, task=harmful, resume=True).metrics
    assert [row["guard/mode"] for row in still[8:]] == ["plain"] * 2
    LAWS.clear()
    longest = load_run_config(result.run_dir, ["train.steps=11"])
    lifted = run(longest, task=harmful, resume=True, lift_guard=True).metrics
    assert lifted[10]["guard/mode"] == "as_asked"
    assert lifted[10]["rollout/plan/two_forward(3)"] == 1


def test_shadow_rollouts_may_train_each_under_its_own_law(tmp_path, policy_path):
    watch = WatchConfig(shadow_share=1.0, shadow_trains=True, acceptance="off")
    rows = run(guarded(tmp_path, policy_path, watch=watch, steps=2, learning_rate=1e-3)).metrics
    without = dataclasses.replace(watch, shadow_trains=False)
    alone = run(
        guarded(tmp_path, policy_path, watch=without, steps=2, learning_rate=1e-3, name="alone")
    ).metrics
    assert rows[0]["update/num_tokens"] > 1.5 * alone[0]["update/num_tokens"]
    assert rows[0]["reward"] == alone[0]["reward"]  # of the law in use
    # The lossless half weighs 1.
    assert rows[0]["rollout_corr/rollout_is_std"] < alone[0]["rollout_corr/rollout_is_std"]


def colder_than_it_says(monkeypatch):
    """Tokens of plain steps are drawn from the square of the law that is stated for them."""
    verify = decoding.verify_block

    def wrong(draft, target, uniforms_BL):
        rows_B = torch.arange(len(uniforms_BL))
        target_BV = target.at(rows_B, torch.zeros_like(rows_B))
        tokens_B1 = inverse_cdf(target_BV.square(), uniforms_BL[:, 0])[:, None]
        return dataclasses.replace(
            verify(draft, target, uniforms_BL),
            token_ids_BL=tokens_B1,
            behavior_logprobs_BL=target_BV.gather(1, tokens_B1).log(),
        )

    monkeypatch.setattr(decoding, "verify_block", wrong)


def test_a_sampler_that_breaks_its_law_stops_the_run_with_everything_saved(
    tmp_path, policy_path, monkeypatch
):
    colder_than_it_says(monkeypatch)
    config = guarded(tmp_path, policy_path, mix_weight=1.0, steps=40, prompts_per_step=8, plan="plain")
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(GuardStopped, match=r"calibration/surprisal.*the run stops"):
        train(config, task=TASK, console=console)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert rows[-1]["guard/action"] == "stop"
    assert len(rows) < 40
    assert f"To go on from step {len(rows)}" in console.file.getvalue()
    report = (config.run_dir / "report.html").read_text()
    assert f"After step {len(rows)}: {rows[-1]['guard/said']}" in html.unescape(report)


def test_a_replica_that_says_it_took_weights_and_did_not_is_found_by_the_learner(
    tmp_path, policy_path, monkeypatch
):
    """Checksums would notice; so the replica also reports what it was sent."""

    def pretending(self, update, own):
        self._renew(update.version)

    monkeypatch.setattr(LocalReplica, "_write", pretending)
    config = guarded(tmp_path, policy_path, mix_weight=1.0, steps=12, prompts_per_step=8)
    rows = run(dataclasses.replace(config, watch=WatchConfig(learner="warn", acceptance="off"))).metrics
    assert any("learner and replicas differ" in (row["guard/said"] or "") for row in rows)
    monkeypatch.undo()
    honest = dataclasses.replace(config, name="honest", watch=WatchConfig(acceptance="off"))
    assert all(row["guard/said"] is None for row in run(honest).metrics)


def test_bad_rewards_count_as_the_lower_bound_in_both_arms_and_constant_ones_say_nothing(caplog):
    watch = Watch(REWARD)
    watch.observe_pairs([[None, math.nan], [0.5, 0.5]], [[0.0, 0.0], [0.5, 0.5]])
    assert watch.decide(1)["drift/reward/mean"] == pytest.approx(0.0)
    for step in range(200):
        watch.observe_pairs([[1.0]] * 8, [[1.0]] * 8)
        assert watch.decide(step)["guard/said"] is None
    assert "RewardBounds" not in caplog.text
    watch.observe_pairs([[7.0]], [[-3.0]])
    assert "RewardBounds" in caplog.text
    assert watch.decide(201)["drift/reward/clipped_total"] == 2
    with pytest.raises(InvalidInput, match="same prompts under both laws"):
        watch.observe_pairs([[1.0]], [[1.0], [0.0]])
    with pytest.raises(InvalidInput, match="same prompts under both laws"):
        watch.observe_pairs([[]], [[1.0]])


def test_a_run_without_drafts_has_no_acceptance_to_test(tmp_path, policy_path):
    config = guarded(tmp_path, policy_path, mix_weight=1.0, steps=2, plan="plain")
    rows = run(config).metrics
    assert not any("drift/acceptance" in name for name in rows[-1])
    assert rows[-1]["drift/calibration/surprisal/n"] > 0


def test_acceptance_that_falls_is_told_once():
    watch = Watch(WatchConfig(acceptance_reference=100))
    generator = np.random.default_rng(0)
    said = []
    for step in range(60):
        rates = generator.random(16) * 0.4 + (0.5 if step < 30 else 0.2)
        watch.observe_acceptance([("plan", rate) for rate in rates.tolist()])
        said.append(watch.decide(step)["guard/said"])
    assert all(each is None for each in said[:30])
    assert sum(each is not None for each in said) == 1


def test_each_plan_is_held_against_its_own_acceptance():
    watch, generator = Watch(WatchConfig(acceptance_reference=100)), np.random.default_rng(0)
    for step in range(60):
        rates = [("one", rate) for rate in (generator.random(8) * 0.2 + 0.7).tolist()]
        if step > 10:
            rates += [("another", rate) for rate in (generator.random(8) * 0.2 + 0.1).tolist()]
        watch.observe_acceptance(rates)
        assert watch.decide(step)["guard/said"] is None
    again = Watch(WatchConfig(acceptance_reference=100))
    again.load_state_dict(watch.state_dict())
    again.observe_acceptance([("another", 0.8)] * 200)
    assert "acceptance" in again.decide(61)["guard/said"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reward": "lossless"}, "watch.shadow_share is 0"),
        ({"reward_low": 1.0, "reward_high": 1.0}, "must be below"),
        ({"reward_alpha": 0.0}, "reward_alpha"),
        ({"calibration": "panic"}, "calibration"),
    ],
)
def test_a_watch_that_cannot_be_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        WatchConfig(**options)


def test_a_shadow_under_the_same_law_is_refused(tmp_path, policy_path):
    with pytest.raises(ConfigError, match="both are the same"):
        guarded(tmp_path, policy_path, mix_weight=1.0, watch=WatchConfig(shadow_share=0.5))
