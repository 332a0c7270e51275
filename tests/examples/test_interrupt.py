"""Ctrl-C on a real run: the command in a process of its own, two Ray replicas, a real signal."""

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


def test_ctrl_c_ends_a_run_within_ten_seconds_leaves_no_process_and_says_how_to_resume(run):
    family = psutil.Process(run.pid).children(recursive=True)
    assert sum("ReplicaActor" in " ".join(process.cmdline()) for process in family) == 2

    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=10)

    assert run.returncode == 130, output
    assert "blockroll train --resume runs/long" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
