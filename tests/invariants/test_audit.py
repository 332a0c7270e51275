"""The audit: what is written is what was decided, every change is found, and a kill breaks no file."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from blockroll import cli
from blockroll.config import PolicyConfig, RolloutConfig, RunConfig, TrainConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.loop import train
from blockroll.rollout.audit import writer as audit_module
from blockroll.rollout.audit.check import TOLERANCE, check_audit
from blockroll.rollout.audit.files import audit_files, drop_audit, read_audit
from blockroll.rollout.audit.stats import audit_stats
from blockroll.rollout.audit.writer import KINDS, NUMBERS, AuditWriter, is_audited, row_checksums
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.samplers.constraints import Regex
from blockroll.types import Law, Plan, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.models import adapted_policy, prompts
from tests.params import slow_beyond

pytestmark = pytest.mark.filterwarnings("ignore:plan .* drafts")
PLANS = [Plan(0), Plan(4), Plan(4, (0,)), Plan(4, (0, 2, 4))]
SAMPLINGS = {
    "target": Sampling(max_tokens=20),
    "mixed": Sampling(max_tokens=20, law=Law(0.5)),
    "greedy": Sampling(max_tokens=20, temperature=0),
    "argmax drafts": Sampling(max_tokens=20, temperature=1.3, draft_temperature=0),
    "processed": Sampling(
        max_tokens=20, top_p=0.8, repetition_penalty=1.3, min_tokens=6, bad_words_ids=((5, 6), (9,))
    ),
}


@pytest.fixture(scope="module")
def policy():
    return adapted_policy("llama")


def audited(policy, folder, plan, sampling, *, count=10, **options):
    """Rollouts, and the files of their audit."""
    writer = AuditWriter(folder, **options)
    requests = make_requests(prompts(count), sampling)
    rollouts = run(policy, requests, plan, observers=(writer,), max_batch_size=4)
    writer.flush()
    return rollouts, audit_files(folder)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_an_audit_passes_at_both_levels_and_holds_every_token(policy, tmp_path, plan, name):
    rollouts, paths = audited(policy, tmp_path, plan, SAMPLINGS[name])
    report = check_audit(paths, policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.recomputed == {0: report.num_rows}
    assert report.largest_difference < TOLERANCE / 10
    (file,) = map(read_audit, paths)
    for request_id, rollout in rollouts.items():
        rows = file.numbers_N[[name == request_id for name in file.requests]]
        assert tuple(rows["token"]) == rollout.token_ids
        assert tuple(rows["behavior_logprob"]) == rollout.behavior_logprobs
        assert tuple(rows["policy_logprob"]) == rollout.policy_logprobs
        assert tuple(rows["version"]) == rollout.policy_versions
        assert (rows["kind"] == KINDS.index("accepted")).sum() == rollout.stats.num_accepted


@pytest.fixture(scope="module", params=["weights", "autocast"])
def in_bfloat16(request):
    """A policy that multiplies in bfloat16, and what its forwards run under."""
    policy = adapted_policy("llama", scale=0.3)
    if request.param == "weights":
        policy.model.bfloat16()
        return policy, nullcontext
    return policy, partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.parametrize("plan", slow_beyond(1, [Plan(4, (0, 2, 4)), Plan(0), Plan(4)]), ids=str)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_bfloat16_rounds_is_allowed_for_and_what_is_wrong_is_found(in_bfloat16, tmp_path, plan, name):
    policy, precision = in_bfloat16
    with precision():
        _, (path,) = audited(policy, tmp_path, plan, SAMPLINGS[name], count=16)
    report = check_audit([path], policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.recomputed == {0: report.num_rows}
    assert report.num_unknown_laws == (report.num_rows if name == "processed" else 0)  # it has top_p
    assert TOLERANCE < report.tolerance < 0.25
    assert not check_audit([path], policy_of=lambda _: adapted_policy("llama", scale=0.3, seed=1)).passed


def test_plans_may_change_at_every_step(policy, tmp_path):
    planner = PlansInTurn(Plan(4), Plan(0), Plan(4, (0, 2, 4)), Plan(2))
    _, paths = audited(policy, tmp_path, planner, SAMPLINGS["target"])
    report = check_audit(paths, policy_of=lambda version: policy)
    assert report.problem is None, report.problem


def test_what_holds_code_is_recomputed_as_far_as_the_file_tells(tmp_path):
    policy = HFPolicy.from_pretrained("tiny")
    sampling = Sampling(constraint=Regex("[0-9]{3,6}"), max_tokens=20)
    writer = AuditWriter(tmp_path)
    run(policy, make_requests([(7, 8)] * 3, sampling), Plan(4), observers=(writer,))
    report = check_audit(audit_files(tmp_path), policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.num_unknown_laws == report.num_rows


def change(path, column, index, value, *, with_checksum):
    """Write another value into one row; `with_checksum` is what a careful forger does."""
    file = read_audit(path)
    file.numbers_N[column][index] = value
    checksums = file.checksums_N
    if with_checksum:
        checksums = row_checksums(file.requests, file.numbers_N, file.infos)
    columns = {"request": pa.array(file.requests)}
    columns |= {name: pa.array(file.numbers_N[name]) for name in NUMBERS.names}
    columns["request_info"] = pa.array(file.infos, type=pa.string())
    columns["checksum"] = pa.array(checksums, type=pa.uint32())
    pq.write_table(
        pa.table(columns).replace_schema_metadata({"blockroll_audit": "2", "session": file.session}), path
    )


CHANGES = {
    "target_prob": lambda value: value * 0.9,
    "draft_prob": lambda value: value * 0.6,
    "behavior_logprob": lambda value: value - 0.05,
    "policy_logprob": lambda value: value - 0.05,
    "coin": lambda value: value / 2,
    "uniform": lambda value: value / 2,
    "token": lambda value: (value + 1) % 20,
    "draft": lambda value: (value + 1) % 20,
    "version": lambda value: value + 1,
    "attempt": lambda value: value + 1,
    "position": lambda value: value + 1,
    "low": lambda value: value - 0.1,
    "mass": lambda value: value * 0.9,
}


@pytest.mark.parametrize("with_checksum", [False, True])
@pytest.mark.parametrize("column", CHANGES)
def test_a_change_is_found_and_its_row_named(policy, tmp_path, column, with_checksum):
    """With a stale checksum by it; with a right one by the decisions, or by the policy."""
    _, (path,) = audited(policy, tmp_path, Plan(4), SAMPLINGS["target"])
    numbers = read_audit(path).numbers_N
    drawn = column in ("uniform", "low", "mass")
    fits = numbers["kind"] == KINDS.index("recovered" if drawn else "accepted")
    index = int(np.flatnonzero(fits & (numbers["position"] > 2))[0])
    change(path, column, index, CHANGES[column](numbers[column][index]), with_checksum=with_checksum)

    other = adapted_policy("llama", seed=1) if column == "version" else None
    report = check_audit([path], policy_of=lambda version: policy if version == 0 else other)
    assert not report.passed
    assert report.problem.file == path.name
    request = read_audit(path).requests[index]
    assert report.problem.request == request
    if column not in ("position", "version") or not with_checksum:
        # A version that rises too early shows where it falls again, one row behind.
        assert report.problem.row == index
    if not with_checksum:
        assert "checksum" in report.problem.what


def test_a_changed_checksum_is_found(policy, tmp_path):
    _, (path,) = audited(policy, tmp_path, Plan(4), SAMPLINGS["target"])
    table = pq.read_table(path)
    checksums = table["checksum"].to_numpy().copy()
    checksums[7] ^= 1
    where = table.schema.get_field_index("checksum")
    pq.write_table(table.set_column(where, "checksum", pa.array(checksums)), path)
    report = check_audit([path])
    assert report.problem.row == 7
    assert "checksum" in report.problem.what


def test_the_policy_of_another_version_does_not_pass(policy, tmp_path):
    _, paths = audited(policy, tmp_path, Plan(4), SAMPLINGS["target"])
    assert check_audit(paths).passed
    other = adapted_policy("llama", seed=1)
    report = check_audit(paths, policy_of=lambda version: other)
    assert "by the policy of version 0" in report.problem.what or "coin draws" in report.problem.what
    assert report.problem.row == 0
    gone = check_audit(paths, policy_of=lambda version: None)
    assert gone.passed
    assert gone.without_policy == [0]


def test_a_share_keeps_whole_requests_always_the_same(policy, tmp_path):
    rollouts, paths = audited(policy, tmp_path / "a", Plan(4), SAMPLINGS["target"], count=40, share=0.4)
    kept = {name for path in paths for name in read_audit(path).requests}
    assert kept == {name for name in rollouts if is_audited(name, 0.4)}
    assert 4 < len(kept) < 30
    assert check_audit(paths, policy_of=lambda version: policy).passed
    assert all(is_audited(name, 0.7) for name in kept)


def test_files_rotate_and_are_checked_together(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "_ROWS_HELD", 10)
    rollouts, paths = audited(policy, tmp_path, Plan(4), SAMPLINGS["target"], rows_per_file=40)
    assert len(paths) > 2
    report = check_audit(paths)
    assert report.passed
    assert report.num_rows == sum(len(rollout.token_ids) for rollout in rollouts.values())


def test_a_request_that_is_served_again_is_another(policy, tmp_path):
    """Evaluations ask for the same requests again and again, with the same coins."""
    writer = AuditWriter(tmp_path)
    for version in (0, 1):
        requests = make_requests(prompts(4), SAMPLINGS["target"])
        run(policy, requests, Plan(4), observers=(writer,), policy_version=version)
    report = check_audit(audit_files(tmp_path), policy_of=lambda version: policy)
    assert report.problem is None, report.problem
    assert report.num_requests == 8


def test_rows_of_two_versions_never_share_a_file(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_module, "_ROWS_HELD", 10)
    writer = AuditWriter(tmp_path, rows_per_file=30)
    engine = Engine(policy, plan=Plan(4), observers=(writer,), max_batch_size=4)
    engine.submit(make_requests(prompts(12), SAMPLINGS["target"]))
    for step in range(1000):
        if not engine.num_requests:
            break
        engine.step()
        if step == 5:
            engine.policy_version = 3
    files = [read_audit(path) for path in audit_files(tmp_path)]
    assert len(files) > 2
    assert all(len(set(file.numbers_N["version"])) == 1 for file in files)
    assert {int(file.numbers_N["version"][0]) for file in files} == {0, 3}
    assert check_audit(audit_files(tmp_path), policy_of=lambda version: policy).passed
    drop_audit(tmp_path, 2)
    assert {int(read_audit(path).numbers_N["version"][0]) for path in audit_files(tmp_path)} == {0}


@pytest.mark.slow
def test_a_killed_writer_leaves_files_that_pass(tmp_path):
    script = textwrap.dedent(f"""
        from blockroll import HFPolicy, Plan, Sampling
        from blockroll.rollout.audit import writer as audit
        from blockroll.rollout.drafters.engine import Engine
        from tests.engines import make_requests
        audit._ROWS_HELD = 50
        policy = HFPolicy.from_pretrained("tiny")
        writer = audit.AuditWriter({str(tmp_path)!r}, rows_per_file=100)
        engine = Engine(policy, plan=Plan(4), observers=(writer,), max_batch_size=4)
        engine.submit(make_requests([(7, 8)] * 5000, Sampling(max_tokens=50, ignore_eos=True)))
        while True:
            engine.step()
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.parquet"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (tmp_path / ".version-000000-replica-0-99999.parquet.partial").write_bytes(b"half")
    report = check_audit(audit_files(tmp_path))
    assert report.problem is None, report.problem
    assert report.num_rows >= 300
    assert report.unfinished[-1].endswith(".partial")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Two steps of training whose checkpoints are all kept."""
    config = RunConfig(
        name="audited",
        runs_dir=str(tmp_path_factory.mktemp("runs")),
        policy=PolicyConfig(path="tiny"),
        rollout=RolloutConfig(
            backend="local", num_replicas=2, audit="all", max_tokens=32, plan="two_forward(4)"
        ),
        train=TrainConfig(
            steps=2, prompts_per_step=4, group_size=4, eval_every=1, eval_prompts=4, checkpoint_every=1
        ),
    )
    train(config)
    return config


def blockroll(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_check_passes_on_a_run_at_both_levels_and_says_what_it_did(finished_run):
    result = blockroll("audit", "check", finished_run.run_dir)
    assert result.exit_code == 0, result.output
    assert "Level 1: every decision follows from the file." in result.stdout
    assert "Level 2: the laws are those of the policy, versions 0 to 2" in result.stdout
    found = json.loads(blockroll("audit", "check", finished_run.run_dir, "--json").stdout)
    assert found["passed"]
    assert set(found["recomputed_by_version"]) == {"0", "1", "2"}


def test_check_names_the_first_bad_row_and_exits_with_1(finished_run, tmp_path):
    (first, *_) = audit_files(finished_run.run_dir / "audit")
    copy = tmp_path / first.name
    copy.write_bytes(first.read_bytes())
    change(copy, "coin", 3, 0.123, with_checksum=False)
    result = blockroll("audit", "check", tmp_path, "--level", 1)
    assert result.exit_code == 1
    assert f"BAD ROW: {first.name}, row 3" in result.stdout


def test_stats_counts_all(finished_run):
    stats = json.loads(blockroll("audit", "stats", finished_run.run_dir, "--json").stdout)
    assert stats["rows"] == sum(stats["kinds"].values())
    assert stats["residual_uniforms"]["passed"]
    assert "perplexity" in blockroll("audit", "stats", finished_run.run_dir).stdout


def test_a_run_that_resumes_draws_the_rows_behind_its_checkpoint_again(finished_run):
    """Rows of the step that was cut off bear the checkpoint's own version, as those of its evaluation do."""
    folder = finished_run.run_dir / "audit"

    def drawn():
        rows = [(name, *row.tolist()) for name, row in _rows(folder)]
        assert len(set(rows)) == len(rows)
        return {(name, version) for name, version, _ in rows}

    before = drawn()
    train(finished_run, resume_from="step_000001")
    report = check_audit(audit_files(folder))
    assert report.problem is None, report.problem
    assert drawn() == before
    longer = dataclasses.replace(finished_run, train=dataclasses.replace(finished_run.train, steps=3))
    train(longer, resume=True)
    report = check_audit(audit_files(folder))
    assert report.problem is None, report.problem
    assert set(report.rows_by_version) == {0, 1, 2, 3}


def _rows(folder):
    for file in map(read_audit, audit_files(folder)):
        yield from zip(file.requests, file.numbers_N[["version", "position"]], strict=True)


def test_acceptance_by_position_is_that_of_the_rollouts(policy, tmp_path):
    rollouts, paths = audited(policy, tmp_path, Plan(4), Sampling(max_tokens=40, ignore_eos=True))
    found = audit_stats(paths)
    accepted = sum(rollout.stats.num_accepted for rollout in rollouts.values())
    assert found["kinds"]["accepted"] == accepted
    assert len(found["by_offset"]) == 5
    assert all(row["perplexity"] > 1 for row in found["by_offset"])


def test_a_pool_audits_where_it_is_told(tmp_path):
    with pytest.raises(InvalidInput, match="audit_dir names no folder"):
        RolloutPool.from_pretrained("tiny", audit="all")
    with RolloutPool.from_pretrained("tiny", audit="all", audit_dir=str(tmp_path)) as pool:
        list(pool.generate(pool.requests(["1+1=?\n"], Sampling(max_tokens=8), num_samples=3)))
    assert check_audit(audit_files(tmp_path)).num_requests == 3


def test_an_audit_that_a_given_pool_would_not_write_is_refused(finished_run, tmp_path):
    config = dataclasses.replace(finished_run, runs_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="make it with audit and audit_dir"):
        train(config, pool=RolloutPool.from_pretrained("tiny"))


def test_what_is_no_audit_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no audit in"):
        audit_files(tmp_path)
    broken = tmp_path / "version-000000-replica-0-00001.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(InvalidInput, match="cannot be read as an audit file"):
        read_audit(broken)
    pq.write_table(pa.table({"token": [1]}).replace_schema_metadata({"blockroll_audit": "7"}), broken)
    with pytest.raises(InvalidInput, match="has audit schema 7"):
        read_audit(broken)
    assert blockroll("audit", "check", tmp_path / "nowhere").exit_code == 2
    with pytest.raises(ConfigError, match="audit_share"):
        RolloutConfig(audit_share=0)
    with pytest.raises(InvalidInput, match="share of audited requests"):
        AuditWriter(tmp_path, share=math.nan)
