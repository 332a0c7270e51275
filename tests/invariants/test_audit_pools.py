"""The audit of a pool: what several replicas of one pool have drawn, and what two pools have."""

import os
import signal
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest

from blockroll import RolloutPool
from blockroll.errors import AuditError
from blockroll.policies.loading import load_tokenizer
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.files import audit_files, read_audit
from blockroll.types import Sampling
from tests.engines import make_requests
from tests.models import prompts, random_model

SAMPLING = Sampling(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    random_model().save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return str(folder)


def audited(checkpoint, folder, **options):
    return RolloutPool.from_pretrained(
        checkpoint, plan="plain", audit="all", audit_dir=str(folder), num_replicas=2, **options
    )


def without_pools(folder):
    """As if every replica were a pool of its own."""
    for path in audit_files(folder):
        table = pq.read_table(path)
        metadata = {key: value for key, value in table.schema.metadata.items() if key != b"pool"}
        pq.write_table(table.replace_schema_metadata(metadata), path)


def servings(folder):
    """In how many sessions each request stands."""
    pairs = {(name, file.session) for file in map(read_audit, audit_files(folder)) for name in file.requests}
    return Counter(name for name, _ in pairs)


@pytest.mark.slow
@pytest.mark.failure(31)
def test_what_a_killed_replica_had_written_may_stand_again_in_the_file_of_another(
    ray_session, checkpoint, tmp_path
):
    requests = make_requests(prompts(8), SAMPLING)
    with audited(checkpoint, tmp_path, backend="ray", threads_per_replica=1) as pool:
        replica, victim = pool._members[1].replica, pool.health()[1].pid
        poll = replica.poll

        def killed_before_it_answers():
            while not list(tmp_path.glob("*-replica-1-*.parquet")):
                replica._calls.ask("poll", replica._client, ())
            os.kill(victim, signal.SIGKILL)
            time.sleep(0.5)
            return poll()

        replica.poll = killed_before_it_answers
        rollouts = list(pool.generate(requests))
        assert pool.states == ("READY", "DEAD")
    assert sorted(each.request.request_id for each in rollouts) == sorted(r.request_id for r in requests)
    assert 2 in servings(tmp_path).values()
    report = check_audit(audit_files(tmp_path))
    assert report.passed, report.problem
    without_pools(tmp_path)
    problem = check_audit(audit_files(tmp_path)).problem
    assert problem is not None
    assert "the row stands twice" in problem.what


def test_a_pool_may_be_asked_again_and_another_pool_must_not_draw_the_same_version(checkpoint, tmp_path):
    """Again, a request may lie at another replica; a second pool is a step that is drawn again."""
    requests = make_requests(prompts(4), SAMPLING)
    with audited(checkpoint, tmp_path) as pool:
        for again in (requests, requests[1:]):
            assert len(list(pool.generate(again))) == len(again)
    assert 2 in servings(tmp_path).values()
    report = check_audit(audit_files(tmp_path))
    assert report.passed, report.problem
    with audited(checkpoint, tmp_path) as pool:
        list(pool.generate(requests[:1]))
    problem = check_audit(audit_files(tmp_path)).problem
    assert problem is not None
    assert "the row stands twice" in problem.what
    assert problem.request == requests[0].request_id


@pytest.mark.parametrize("backend", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_an_audit_that_cannot_be_written_is_one_line_and_the_call_goes_on_after_it(
    ray_session, checkpoint, tmp_path, backend
):
    folder = tmp_path / "audit"
    requests = make_requests(prompts(3), SAMPLING)
    threads = {"threads_per_replica": 1} if backend == "ray" else {}
    with audited(checkpoint, folder, backend=backend, **threads) as pool:
        folder.write_text("no folder")
        calls = pool.generate(requests)
        with pytest.raises(AuditError, match=r"^\d+ rows of the audit could not be written to \S*audit: "):
            list(calls)
        folder.unlink()
        assert {len(each.token_ids) for each in calls} == {12}
    # Rows that waited for a folder are written, at the latest when the pool is closed.
    rows = {
        (name.partition("~")[0], position)  # drawn again, a request has a number behind its name
        for file in map(read_audit, audit_files(folder))
        for name, position in zip(file.requests, file.numbers_N["position"].tolist(), strict=True)
    }
    assert len(rows) == 3 * 12
    report = check_audit(audit_files(folder))
    assert report.passed, report.problem
