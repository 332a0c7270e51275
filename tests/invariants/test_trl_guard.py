"""The guard inside TRL's trainers: real faults in real trainings, found, acted on, kept, and gone on with."""

import dataclasses
import html

import pytest
import torch
import trl

from blockroll.config import RolloutConfig, WatchConfig
from blockroll.errors import CheckpointError, ConfigError, InvalidInput
from blockroll.rl_loops.tracking import read_lines
from blockroll.rl_loops.trl import GuardCallback, RLOOTrainer
from blockroll.rl_loops.trl.checkpoint import load_rollout_state
from blockroll.samplers import laws as laws_module
from tests.faults import planted, residual_is_the_target
from tests.trl_trainers import ROWS, even_share, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
DRAFTED = RolloutConfig(plan="two_forward", watch_every=1)
MIXED = dataclasses.replace(DRAFTED, mix_weight=0.5)
FAULTY = WatchConfig(calibration_alpha=0.005, acceptance="off")  # what is found in a few steps
FALLS_BACK = dataclasses.replace(FAULTY, calibration="lossless")


def guarded(folder, watch=None, *, rollout=DRAFTED, guard=None, options=None, writes_page=False, **arguments):
    """A trainer of short completions with a guard; the page takes a second, and few tests read it."""
    short = {"max_completion_length": 16, "per_device_train_batch_size": 32, "max_steps": 2}
    if rollout.mix_weight < 1:
        short["vllm_importance_sampling_mode"] = "token_truncate"
    guard = guard or GuardCallback(watch or WatchConfig())
    arguments.setdefault("reward_funcs", even_share)
    options = {**short, **(options or {})}
    made = trainer(folder, rollout=rollout, callbacks=[guard], options=options, **arguments)
    if not writes_page:
        made._record.write_report = lambda: None
    return made


def rows_of(folder):
    return [row for row in read_lines(folder / "blockroll" / "metrics.jsonl") if "loss" in row]


def weights_by_step(made):
    """The weights of the laws that completions are drawn from, by the trainer's step, as they come."""
    found = {}
    note = made.rollouts.note_trained

    def noting():
        note()
        found[made.state.global_step] = {rollout.law.weight for rollout in made.rollouts.trained}

    made.rollouts.note_trained = noting
    return found


def load(made, checkpoint):
    load_rollout_state(made, checkpoint, views=made._views, audit=None, guard=made._guard)


@pytest.fixture(scope="module")
def fallen(tmp_path_factory):
    """A run of a mixed law whose sampler breaks its law, with a guard that then draws from the policy."""
    folder = tmp_path_factory.mktemp("fallen")
    made = guarded(
        folder,
        FALLS_BACK,
        rollout=MIXED,
        options={"max_steps": 3, "save_strategy": "steps", "save_steps": 1},
    )
    weights = weights_by_step(made)
    with planted(residual_is_the_target):
        made.train()
    return folder, weights


def test_a_sound_run_is_watched_in_silence(tmp_path):
    made = guarded(tmp_path)
    made.train()
    rows = rows_of(tmp_path)
    assert [row["guard/mode"] for row in rows] == ["as_asked"] * 2
    assert {(row["guard/action"], row["guard/said"]) for row in rows} == {(None, None)}
    tokens = sum(len(rollout.token_ids) for rollout in made.rollouts.trained)
    for name in ("calibration/ratio", "learner"):
        assert rows[1][f"drift/{name}/n"] - rows[0][f"drift/{name}/n"] == tokens, "each token once"
    assert rows[1]["drift/calibration/accept/n"] > 50
    logged = [row for row in made.state.log_history if "loss" in row]
    assert [row["drift/alpha_spent"] for row in logged] == [0, 0]
    assert not any(name.startswith("guard/") for row in logged for name in row), "loggers take numbers"


def test_replicas_look_at_their_steps_unless_the_config_says_otherwise():
    unset, watch = RolloutConfig(), WatchConfig()
    assert GuardCallback(watch).looked_at(unset).watch_every == 32
    assert GuardCallback(watch).looked_at(DRAFTED).watch_every == 1
    assert GuardCallback(dataclasses.replace(watch, calibration="off")).looked_at(unset).watch_every == 0


def test_a_sampler_that_breaks_its_law_stops_the_training_with_a_checkpoint(tmp_path):
    made = guarded(tmp_path, FAULTY, options={"max_steps": 9, "logging_steps": 50}, writes_page=True)
    with planted(residual_is_the_target):
        made.train()
    stopped = made.state.global_step
    assert stopped < 9
    assert (tmp_path / f"checkpoint-{stopped}" / "blockroll" / "rollout_state.pt").is_file()
    (row,) = rows_of(tmp_path)
    assert (row["step"], row["guard/action"]) == (stopped, "stop")
    assert "calibration/rejected" in row["guard/said"]
    report = (tmp_path / "blockroll" / "report.html").read_text()
    assert f"After step {stopped}: {row['guard/said']}" in html.unescape(report)


def test_a_fallback_makes_the_next_completions_lossless(fallen):
    folder, weights = fallen
    rows = rows_of(folder)
    spoke = rows[0]["step"]
    assert (rows[0]["guard/mode"], rows[0]["guard/action"]) == ("as_asked", "lossless")
    assert [row["guard/mode"] for row in rows[1:]] == ["lossless"] * (len(rows) - 1)
    assert weights == {step: {0.5} if step < spoke else {1.0} for step in range(3)}
    # A mixed law has no policy to compare the learner with; the lossless one has.
    assert "drift/learner/n" not in rows[0]
    assert rows[-1]["drift/learner/n"] > 100
    assert rows[-1]["drift/fallback_total"] == 1


def test_a_fallback_and_its_evidence_outlive_a_resume(fallen, tmp_path):
    folder, _ = fallen
    resumed = guarded(tmp_path, FALLS_BACK, rollout=MIXED, options={"max_steps": 3})
    weights = weights_by_step(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert weights == {2: {1.0}}
    (row,), before = rows_of(tmp_path), rows_of(folder)[-1]
    assert (row["guard/mode"], row["guard/action"]) == ("lossless", None)
    assert row["drift/calibration/ratio/n"] == before["drift/calibration/ratio/n"]
    assert row["drift/fallback_total"] == 1


def test_a_guard_of_other_tests_is_refused_and_a_fallback_may_be_lifted(fallen, tmp_path, caplog):
    checkpoint = fallen[0] / "checkpoint-3"
    other = guarded(tmp_path, dataclasses.replace(FALLS_BACK, learner_alpha=0.01), rollout=MIXED)
    with pytest.raises(CheckpointError, match=r"test 'learner' of alpha 0\.01, it was 1e-06"):
        other.train(resume_from_checkpoint=str(checkpoint))
    kept = guarded(tmp_path, FALLS_BACK, rollout=MIXED)
    load(kept, checkpoint)
    assert kept.rollouts.sampling.law.weight == 1
    lifted = guarded(tmp_path, rollout=MIXED, guard=GuardCallback(FALLS_BACK, lift=True))
    load(lifted, checkpoint)
    assert lifted.rollouts.sampling.law.weight == 0.5
    assert "the fallback is lifted by hand" in caplog.text


def test_who_begins_or_ends_to_guard_a_run_is_told_so(fallen, tmp_path, caplog):
    checkpoint = fallen[0] / "checkpoint-3"
    load(trainer(tmp_path), checkpoint)
    assert "has a guard, and this trainer has none: nothing is tested any more" in caplog.text
    state = torch.load(checkpoint / "blockroll" / "rollout_state.pt", weights_only=True)
    assert state.pop("guard")["guard"]["mode"] == "lossless"
    (tmp_path / "blockroll").mkdir(exist_ok=True)
    torch.save(state, tmp_path / "blockroll" / "rollout_state.pt")
    caplog.clear()
    new = guarded(tmp_path)
    load(new, tmp_path)
    assert "the checkpoint has no guard: this one begins here" in caplog.text
    assert new._guard.mode == "as_asked"


class Deaf(GuardCallback):
    """Planted: decides, and changes nothing."""

    def _follow(self, mode):
        self._mode = mode


def test_a_fallback_that_is_not_followed_is_noticed_at_the_next_update(tmp_path):
    made = guarded(tmp_path, rollout=MIXED, guard=Deaf(FALLS_BACK), options={"max_steps": 4})
    with (
        planted(residual_is_the_target),
        pytest.raises(AssertionError, match=r"in mode lossless .* under a mixed law"),
    ):
        made.train()


@pytest.mark.slow
def test_a_fallback_to_plain_decodes_without_drafts(tmp_path):
    made = guarded(tmp_path, dataclasses.replace(FALLS_BACK, calibration="plain"), options={"max_steps": 3})
    with planted(residual_is_the_target):
        made.train()
    rows = rows_of(tmp_path)
    spoke = next(row["step"] for row in rows if row["guard/action"])
    assert [row.get("rollout/plan/plain", 0) for row in rows] == [float(row["step"] > spoke) for row in rows]


def test_a_wrong_logprob_is_told_by_the_learner(tmp_path):
    made = guarded(tmp_path, options={"max_steps": 1, "per_device_train_batch_size": 8})
    generate = made.rollouts.generate

    def shifted(**arguments):
        done = generate(**arguments)
        return done._replace(logprobs=[[[value - 0.3] for (value,) in row] for row in done.logprobs])

    made.rollouts.generate = shifted
    made.train()
    (row,) = rows_of(tmp_path)
    assert row["guard/action"] == "warn"
    assert "learner and replicas differ by at most 0.005 nats" in row["guard/said"]


class Indifferent(GuardCallback):
    """Planted: takes what an evaluation draws for what is learned from."""

    def note(self, rollouts, *, is_training):
        super().note(rollouts, is_training=True)


@pytest.mark.parametrize("cls", [GuardCallback, pytest.param(Indifferent, marks=pytest.mark.slow)])
def test_evaluations_are_no_evidence_and_old_rollouts_count_once(tmp_path, cls):
    """Each batch is learned from twice, with an evaluation after each update."""
    made = guarded(
        tmp_path,
        guard=cls(WatchConfig(acceptance_reference=16)),
        rollout=RolloutConfig(plan="plain", watch_every=1, check_sync="off"),
        eval_dataset=ROWS.select(range(4)),
        options={
            "num_iterations": 2,
            "max_steps": 4,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    )
    drawn = []
    note = made.rollouts.note_trained

    def noting():
        note()
        drawn.append(sum(len(rollout.token_ids) for rollout in made.rollouts.trained))

    made.rollouts.note_trained = noting
    made.train()
    rows = rows_of(tmp_path)
    assert [row["guard/mode"] for row in rows] == ["as_asked"] * 4
    decided = [row for row in rows if "drift/alpha_spent" in row]
    looked_at = [row["drift/calibration/surprisal/n"] for row in decided]  # a plain step has one position
    ratios = [row["drift/calibration/ratio/n"] for row in decided]
    if cls is Indifferent:
        assert looked_at[-1] > sum(drawn)
        assert ratios[-1] > sum(drawn)
    else:
        assert [row["step"] for row in decided] == [1, 3]
        assert looked_at == ratios == [drawn[0], sum(drawn)]
        assert [row["drift/learner/n"] for row in decided] == ratios
    evaluations = [row for row in read_lines(tmp_path / "blockroll" / "metrics.jsonl") if "eval_loss" in row]
    assert len(evaluations) == 4
    assert not any("guard/" in name or "drift/" in name for row in evaluations for name in row)


@pytest.mark.slow
def test_acceptance_that_falls_makes_the_next_completions_lossless(tmp_path, monkeypatch):
    """Drafts are drawn by an adapter that forgets what it knew after three updates."""
    watch = WatchConfig(
        calibration="off",
        learner="off",
        acceptance="lossless",
        acceptance_alpha=0.05,
        acceptance_reference=96,
    )
    made = guarded(tmp_path, watch, rollout=MIXED, options={"max_steps": 12})
    weights = weights_by_step(made)
    draw = laws_module.draw_draft

    def flat_at_last(logits, *arguments, **options):
        return draw(logits * (0.0 if made.state.global_step >= 4 else 1.0), *arguments, **options)

    monkeypatch.setattr(laws_module, "draw_draft", flat_at_last)
    made.train()
    rows = rows_of(tmp_path)
    spoke = next(row["step"] for row in rows if row["guard/action"])
    assert 4 < spoke < 12
    assert "acceptance is that of its first 96 rollouts" in rows[spoke - 1]["guard/said"]
    assert weights == {step: {0.5} if step < spoke else {1.0} for step in range(12)}


@pytest.mark.slow
def test_rloo_is_guarded_with_the_learner_too(tmp_path):
    made = guarded(tmp_path, cls=RLOOTrainer, options={"max_steps": 1})
    made.train()
    (row,) = rows_of(tmp_path)
    tokens = sum(len(rollout.token_ids) for rollout in made.rollouts.trained)
    assert row["drift/learner/n"] == row["drift/calibration/ratio/n"] == tokens
    assert row["guard/said"] is None


def test_a_trainer_that_has_not_found_its_guard_says_so_where_it_begins(tmp_path):
    stock = trainer(tmp_path, trl.GRPOTrainer, callbacks=[GuardCallback()])
    with pytest.raises(InvalidInput, match="import GRPOTrainer or RLOOTrainer from blockroll"):
        stock.train()
    late = trainer(tmp_path)
    late.add_callback(GuardCallback())
    with pytest.raises(InvalidInput, match="where the trainer is made"):
        late.train()
    guard = GuardCallback()
    guarded(tmp_path, guard=guard)
    with pytest.raises(InvalidInput, match="give each trainer its own"):
        guarded(tmp_path, guard=guard)
    with pytest.raises(InvalidInput, match="a trainer has one guard, got 2"):
        trainer(tmp_path, callbacks=[GuardCallback(), GuardCallback()])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reward": "warn", "shadow_share": 0.1}, r"watch\.reward, watch\.shadow_share: .*blockroll train"),
        ({"shadow_share": 0.1}, r"watch\.shadow_share: this needs shadow rollouts"),
        ({"lift": "evidence"}, r"watch\.lift='evidence': this needs shadow rollouts"),
    ],
)
def test_tests_that_need_shadow_rollouts_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        GuardCallback(WatchConfig(**options))


def test_a_fallback_for_good_is_not_lifted():
    with pytest.raises(ConfigError, match="says that they are for good"):
        GuardCallback(WatchConfig(lift="never"), lift=True)
