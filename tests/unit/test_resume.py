"""Runs that are cut off anywhere and go on, from the newest checkpoint or an older one."""

import dataclasses
import io
import json
import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console

from blockroll.errors import CheckpointError, RunExists, RunInUse, WeightSyncError
from blockroll.rl_loops import run as run_module
from blockroll.rl_loops.algorithms import grpo
from blockroll.rl_loops.checkpoint import checkpoints, discard, latest_checkpoint, load_checkpoint
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.loop import load_run_config, train
from blockroll.rl_loops.run_lock import run_lock
from blockroll.rl_loops.tracking import read_lines
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.files import audit_files, read_audit
from tests.equality import assert_same_rows, assert_same_weights
from tests.params import slow_beyond
from tests.runs import TASK, config_for, even_share, run, stop_after, untimed, weights_of


def noisy(**arguments):
    """Rewards that draw from the state of `random`, as reward functions of users do."""
    return [reward + random.random() for reward in even_share(**arguments)]


NOISY = dataclasses.replace(TASK, reward_fn=noisy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, policy_path):
    """A run of five steps that nothing cuts off."""
    config = config_for(tmp_path_factory.mktemp("whole"), policy_path, steps=5)
    run(config, task=NOISY)
    return config


def assert_equal_runs(config, whole):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert_same_rows(*(untimed(read_lines(each.run_dir / name)) for each in (whole, config)))
    assert_same_weights(weights_of(whole.run_dir), weights_of(config.run_dir))
    states = [load_checkpoint(each.run_dir).state for each in (whole, config)]
    assert torch.equal(states[0]["rng"]["torch"], states[1]["rng"]["torch"])
    assert states[0]["rng"]["python"] == states[1]["rng"]["python"]
    assert states[0]["learner"]["num_optimizer_steps"] == states[1]["learner"]["num_optimizer_steps"] == 5


def fail_once(monkeypatch, owner, name, *, on_call, error, is_after=False):
    """Have the n-th call of a method raise, before or after it has done its work."""
    method, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(name)
        if len(calls) == on_call and not is_after:
            raise error
        result = method(*arguments, **options)
        if len(calls) == on_call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


PLACES = {
    "in a callback": None,
    "while rollouts are drawn": (run_module, "collect", 3, False),
    "while rewards are scored": (grpo, "score_rollouts", 3, True),
    "in the backward pass": (torch.autograd, "backward", 3, False),
    "when weights are published": (run_module, "publish", 4, False),
    "after weights were published": (run_module, "publish", 4, True),
    "in an evaluation": (run_module, "evaluate", 2, True),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("crash")], ids=["ctrl-c", "exception"])
@pytest.mark.parametrize("place", slow_beyond(4, PLACES))
def test_whatever_cuts_a_run_off_it_keeps_the_last_whole_step_and_goes_on_token_for_token(
    tmp_path, policy_path, whole, monkeypatch, place, error
):
    config = config_for(tmp_path, policy_path, steps=5, checkpoint_every=0)
    callbacks = [] if PLACES[place] else [stop_after(3, error)]
    with monkeypatch.context() as patch:
        if PLACES[place]:
            owner, name, call, is_after = PLACES[place]
            fail_once(patch, owner, name, on_call=call, error=error, is_after=is_after)
        with pytest.raises((SystemExit, RuntimeError)):
            run(config, task=NOISY, callbacks=callbacks)
    assert load_checkpoint(config.run_dir).step >= 2
    run(config, task=NOISY, resume=True)
    assert_equal_runs(config, whole)


def test_an_update_that_is_cut_off_keeps_the_checkpoint_before_it_and_says_so(
    tmp_path, policy_path, whole, monkeypatch
):
    config = config_for(tmp_path, policy_path, steps=5)
    output = io.StringIO()
    with monkeypatch.context() as patch:
        fail_once(patch, torch.optim.AdamW, "step", on_call=3, error=RuntimeError("crash"), is_after=True)
        with pytest.raises(RuntimeError, match="crash"):
            train(config, task=NOISY, console=Console(file=output))
    assert latest_checkpoint(config.run_dir).name == "step_000002"
    assert "Step 3 was cut off in its update." in output.getvalue()
    assert "Stopped by RuntimeError. To go on from step 2: blockroll train --resume" in output.getvalue()
    run(config, task=NOISY, resume=True)
    assert_equal_runs(config, whole)


def test_a_checkpoint_that_cannot_be_written_does_not_hide_what_ended_the_run(
    tmp_path, policy_path, monkeypatch
):
    config = config_for(tmp_path, policy_path, checkpoint_every=0)
    output = io.StringIO()

    def in_the_way(metrics):
        (config.run_dir / "checkpoints").write_text("a file where the folder should be")
        raise ArithmeticError("what ended the run")

    with pytest.raises(ArithmeticError, match="what ended the run"):
        train(config, task=TASK, console=Console(file=output), callbacks=[in_the_way])
    assert "No checkpoint of step 1" in output.getvalue()


def audited_rows(config):
    """(request, position) of every row of a run's audit, which must pass its check."""
    files = audit_files(config.run_dir / "audit")
    assert check_audit(files).passed, check_audit(files).problem
    return sorted(
        (request, int(position))
        for audit in map(read_audit, files)
        for request, position in zip(audit.requests, audit.numbers_N["position"], strict=True)
    )


def audited(config):
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, audit="all"))


CUTS = {
    "before its rewards": (grpo, "score_rollouts", 4, False),
    "in the backward pass": (torch.autograd, "backward", 3, False),
    "in an evaluation": (run_module, "evaluate", 2, True),
    "by a kill": None,
}


@pytest.mark.parametrize("cut", CUTS)
def test_after_a_resume_the_audit_holds_every_row_once(tmp_path, policy_path, monkeypatch, cut):
    """Rows of a step that was cut off bear the checkpoint's own version, and are drawn again."""
    whole = audited(config_for(tmp_path, policy_path, name="whole", steps=4))
    broken = audited(config_for(tmp_path, policy_path, name="broken", steps=4))
    run(whole)
    if CUTS[cut] is None:
        run(broken)
        discard(latest_checkpoint(broken.run_dir))  # as if what came after step 2 had never been saved
    else:
        owner, name, call, is_after = CUTS[cut]
        with monkeypatch.context() as patch:
            fail_once(patch, owner, name, on_call=call, error=RuntimeError("crash"), is_after=is_after)
            with pytest.raises(RuntimeError, match="crash"):
                run(broken)
    run(broken, resume=True)
    rows = audited_rows(broken)
    assert len(rows) == len(set(rows))
    assert rows == audited_rows(whole)


def test_an_older_checkpoint_can_be_gone_on_from_and_what_it_discards_is_said(tmp_path, policy_path, whole):
    config = config_for(tmp_path, policy_path, steps=5, checkpoint_every=1, keep_checkpoints=5)
    run(config, task=NOISY)
    output = io.StringIO()
    train(config, task=NOISY, resume_from="step_000002", console=Console(file=output))
    said = output.getvalue().replace("\n", " ")
    assert "Going on from step 2; discarding step_000003, step_000004, step_000005, metrics" in said
    assert "steps 3 to 5" in said
    assert [row["step"] for row in read_lines(config.run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert_equal_runs(config, whole)


def test_an_older_checkpoint_that_is_not_there_discards_nothing(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path, plan="plain", eval_every=0)
    run(config)
    with pytest.raises(CheckpointError, match="no checkpoint 'step_000003'"):
        run(config, resume_from="step_000003")
    assert [folder.name for folder in checkpoints(config.run_dir)] == ["step_000002", "step_000004"]


def test_a_line_that_a_kill_cut_short_is_gone_after_a_resume_and_no_step_is_there_twice(
    tmp_path, policy_path
):
    config = config_for(tmp_path, policy_path, plan="plain", eval_every=0, steps=5, checkpoint_every=4)
    with pytest.raises(SystemExit):
        run(config, callbacks=[stop_after(4, KeyboardInterrupt())])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (config.run_dir / name).open("a") as file:
            file.write(json.dumps({"step": 5})[:6])
    run(config, resume=True)
    assert [row["step"] for row in read_lines(config.run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def hold(run_dir, is_held):
    with run_lock(run_dir):
        is_held.set()
        time.sleep(120)


@pytest.fixture
def holder(tmp_path, policy_path):
    """A run, and another process that holds its folder."""
    config = config_for(tmp_path, policy_path, plan="plain", eval_every=0, steps=1)
    run(config)
    context = multiprocessing.get_context("spawn")
    is_held = context.Event()
    process = context.Process(target=hold, args=(config.run_dir, is_held))
    process.start()
    assert is_held.wait(60)
    yield config, process
    process.kill()
    process.join()


def test_a_second_process_on_a_run_folder_is_refused_until_the_first_is_gone(holder):
    config, process = holder
    with pytest.raises(RunInUse, match=f"in use by process {process.pid} on "):
        run(config, resume=True)
    process.kill()  # it lets go of nothing itself
    process.join()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    assert len(run(longer, resume=True).metrics) == 2


def test_a_folder_that_appears_while_a_run_gets_ready_is_not_taken_over(tmp_path, policy_path, monkeypatch):
    config = config_for(tmp_path, policy_path)
    init = Learner.__init__

    def meanwhile(self, *arguments, **options):
        config.run_dir.mkdir()
        init(self, *arguments, **options)

    monkeypatch.setattr(Learner, "__init__", meanwhile)
    with pytest.raises(RunExists, match="another process"):
        run(config)
    assert list(config.run_dir.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, policy_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        rows = run(
            config_for(tmp_path, policy_path, plan="plain", steps=2, eval_every=0),
            callbacks=[lambda metrics: signal.raise_signal(signal.SIGHUP)],
        ).metrics
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(rows) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_s_signal_saves_and_exits_with_its_number(tmp_path, policy_path, number):
    config = config_for(tmp_path, policy_path, plan="plain", eval_every=0, checkpoint_every=0)
    before = signal.signal(number, signal.SIG_DFL)  # whoever started the tests may have it ignored
    try:
        with pytest.raises(SystemExit) as end:
            run(config, callbacks=[lambda metrics: signal.raise_signal(number)])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number
    assert latest_checkpoint(config.run_dir).name == "step_000001"


def test_a_refused_update_keeps_the_step_that_was_learned(tmp_path, policy_path, whole, monkeypatch):
    config = config_for(tmp_path, policy_path, steps=5, checkpoint_every=0)
    refusal = WeightSyncError("refused")
    with monkeypatch.context() as patch:
        fail_once(patch, run_module, "publish", on_call=4, error=refusal)
        with pytest.raises(WeightSyncError):
            run(config, task=NOISY)
    assert load_checkpoint(config.run_dir).step == 3
    assert [row["step"] for row in read_lines(config.run_dir / "metrics.jsonl")] == [1, 2]
    run(config, task=NOISY, resume=True)
    assert_equal_runs(config, whole)


@pytest.fixture(scope="module")
def done(tmp_path_factory, policy_path):
    """A run that has gone to its end."""
    config = config_for(tmp_path_factory.mktemp("done"), policy_path, plan="plain", steps=2, eval_every=0)
    run(config)
    return config


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("train", {"learning_rate": 0.5}, r"train\.learning_rate = 0\.5 \(it was 0\.01\)"),
        ("train", {"steps": 1}, r"train\.steps = 1 \(it was 2\)"),
        ("train", {"minibatches": 2, "clip_epsilon": 0.1}, r"minibatches = 2 .*clip_epsilon = 0\.1"),
        ("rollout", {"num_replicas": 1}, r"rollout\.num_replicas = 1"),
        ("policy", {"dtype": "bfloat16"}, r"policy\.dtype = 'bfloat16'"),
    ],
)
def test_an_option_that_a_finished_run_has_no_step_for_is_refused_by_name(done, section, changes, named):
    before = (done.run_dir / "config.yaml").read_bytes(), (done.run_dir / "metrics.jsonl").read_bytes()
    changed = dataclasses.replace(done, **{section: dataclasses.replace(getattr(done, section), **changes)})
    with pytest.raises(CheckpointError, match=rf"has done step 2, .*no step is left for .*({named})"):
        run(changed, resume=True)
    assert before == (
        (done.run_dir / "config.yaml").read_bytes(),
        (done.run_dir / "metrics.jsonl").read_bytes(),
    )


def test_a_finished_run_that_nothing_changes_says_that_it_is_done(done, tmp_path):
    output = io.StringIO()
    train(done, task=TASK, resume=True, console=Console(file=output))
    assert "All 2 steps are done; a larger train.steps goes on." in output.getvalue().replace("\n", " ")
    shutil.copytree(done.run_dir, tmp_path / "moved")
    run(load_run_config(tmp_path / "moved"), resume=True)


def test_a_run_that_goes_on_says_which_options_are_others_and_uses_them(tmp_path, policy_path):
    config = config_for(tmp_path, policy_path, plan="plain", steps=2, eval_every=0, lr_scheduler="constant")
    run(config)
    longer = dataclasses.replace(config.train, steps=3, learning_rate=0.5)
    output = io.StringIO()
    rows = train(
        dataclasses.replace(config, train=longer), task=TASK, resume=True, console=Console(file=output)
    ).metrics
    said = output.getvalue().replace("\n", " ")
    assert "Going on from step 2 with train.steps = 3 (it was 2), train.learning_rate = 0.5" in said
    assert rows[-1]["learning_rate"] == 0.5
    with pytest.raises(CheckpointError, match=r"seed is 5, but .* was started with 0"):
        run(dataclasses.replace(config, seed=5), resume=True)
