"""Signals to a real run: the command in a process of its own, two Ray replicas that get the signal too."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

CONFIG = """
name: long
policy: {path: tiny}
rollout: {backend: ray, num_replicas: 2, max_tokens: 24}
train: {steps: 500, prompts_per_step: 2, group_size: 2, eval_every: 0, checkpoint_every: 0}
"""


@pytest.fixture
def run(tmp_path):
    """A training run in a process group of its own, as a shell starts it, that has done its first step."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, "-m", "blockroll.cli", "train", "run.yaml"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "runs/long/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run has not done a step in two minutes"
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


def family_of(process):
    """Its descendants, two of which are replicas."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert sum("ReplicaActor" in " ".join(each.cmdline()) for each in family) == 2
    return family


def assert_ended(process, folder, family, *, number, timeout):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 128 + number, output
    assert "blockroll train --resume runs/long" in output
    assert "Traceback" not in output
    assert list((folder / "runs/long/checkpoints").glob("step_*"))
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []


@pytest.mark.slow
def test_ctrl_c_ends_a_run_within_ten_seconds_leaves_no_process_and_says_how_to_resume(run, tmp_path):
    family = family_of(run)
    os.killpg(run.pid, signal.SIGINT)
    assert_ended(run, tmp_path, family, number=signal.SIGINT, timeout=10)


@pytest.mark.slow
def test_a_scheduler_that_terminates_replicas_as_well_ends_a_run_in_the_same_way(run, tmp_path):
    family = family_of(run)
    os.killpg(run.pid, signal.SIGTERM)
    assert_ended(run, tmp_path, family, number=signal.SIGTERM, timeout=60)
