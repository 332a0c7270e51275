"""Engines measured in a process of their own: real child processes, good ones and bad ones."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from blockroll.bench import peer, peer_worker
from blockroll.bench.bench import run_bench, to_record
from blockroll.bench.peer import PeerProcess, start_peer
from blockroll.bench.reference import ReferenceTask
from blockroll.bench.subjects import make_peer_pool
from blockroll.bench.table import bench_table
from blockroll.errors import InvalidInput, PeerFailed
from blockroll.types import PLAIN, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_tokens
from tests.models import prompts
from tests.unit.bench import OPTIONS

pytestmark = pytest.mark.slow  # it starts some thirty processes
ONE_BATCH = dataclasses.replace(OPTIONS, batches=(3,), ignore_eos=True)
TASK = ReferenceTask(batch=3, longest_prompt=12, max_tokens=6, temperature=1.0, eos_token_ids=())
ANSWERS = """
import json, os, subprocess, sys, time
def say(**line):
    print(json.dumps(line), flush=True)
def give(index, count):
    say(index=index, token_ids=[5] * count, logprobs=[-1.0] * count)
task = json.loads(sys.stdin.readline())
most = task["max_tokens"]
say(ready=True, version="scripted 1.0")
waves = 0
for line in sys.stdin:
    wave = json.loads(line)
    if "forget" in wave:
        say(forgot=True)
        continue
    prompts, waves = wave["prompts"], waves + 1
    {fault}
    for index in range(len(prompts)):
        give(index, most)
    say(done=True, cpu_s=1.5)
"""


def scripted(fault="pass"):
    """A peer whose process answers as asked, but for its fault; it needs nothing that is installed."""
    command = [sys.executable, "-c", ANSWERS.format(fault=fault)]
    return PeerProcess("scripted", command, {}, TASK, advice="; `make peers` makes its environment")


def test_a_peer_is_measured_beside_plain_and_leaves_no_process(saved):
    policy, path = saved
    before = set(psutil.Process().children())
    rows = run_bench(
        policy, prompts(5), [PLAIN], ONE_BATCH, policy_path=path, against=("generate_process", "generate")
    )

    names = ["plain", "transformers_generate_process", "transformers_generate"]
    assert [row.plan for row in rows] == names
    for row in rows:
        assert row.skipped is None
        assert row.mean_length == 6.0
        assert len(row.tokens_per_s_all) == len(row.tokens_per_cpu_s_all) == ONE_BATCH.repeats
        assert row.tokens_per_cpu_s_min <= row.tokens_per_cpu_s <= row.tokens_per_cpu_s_max
        assert row.cpu_speedup_over_plain > 0
        assert row.setup_s > 0
    assert [row.version is not None for row in rows] == [False, True, False]
    assert to_record(rows[1])["version"].startswith("torch ")
    assert "transformers_generate_process: torch " in bench_table(rows, title="t").caption
    assert set(psutil.Process().children()) == before


def test_a_peer_draws_the_greedy_tokens_that_plain_draws(saved):
    policy, path = saved
    texts = prompts(6)
    requests = make_requests(texts, Sampling(temperature=0.0, max_tokens=8))
    task = ReferenceTask(
        batch=6, longest_prompt=12, max_tokens=8, temperature=0.0, eos_token_ids=policy.eos_token_ids
    )
    started = start_peer(
        "generate_process", task, folder=Path(path), dtype="float32", threads=1, python=Path("unused")
    )
    try:
        for seed in (0, 1):
            drawn = {each.index: tuple(each.token_ids) for each in started.complete(task, texts, seed=seed)}
    finally:
        started.close()

    named = {request.request_id: drawn[index] for index, request in enumerate(requests)}
    assert_same_tokens(run(policy, requests, PLAIN), named, policy)


def test_a_missing_environment_is_refused_before_anything_is_measured(saved, tmp_path):
    policy, path = saved
    with pytest.raises(InvalidInput, match=r"vllm needs an environment of its own.* run `make peers`"):
        run_bench(
            policy,
            prompts(2),
            [PLAIN],
            ONE_BATCH,
            policy_path=path,
            against=("vllm",),
            peers_python=tmp_path / "bin" / "python",
            on_row=lambda row: pytest.fail("nothing should have been measured"),
        )


def test_an_environment_without_vllm_is_one_line_and_the_rest_is_measured(saved):
    policy, path = saved
    rows = run_bench(
        policy,
        prompts(5),
        [PLAIN],
        ONE_BATCH,
        policy_path=path,
        against=("vllm",),
        peers_python=Path(sys.executable),
    )

    plain, missing = rows
    assert plain.tokens_per_s > 0
    assert missing.plan == "vllm"
    assert missing.skipped == (
        "the process of vllm failed: ModuleNotFoundError: No module named 'vllm'; `make peers` makes its "
        "environment"
    )
    assert missing.tokens_per_s is missing.setup_s is None


def test_a_peer_that_answers_as_asked_is_timed_by_its_own_processor_time():
    started = scripted()
    completions = list(started.complete(TASK, [[1], [2], [3]], seed=0))
    assert [each.index for each in completions] == [0, 1, 2]
    assert started.cpu_s() == 1.5
    list(started.complete(TASK, [[1]], seed=1))
    assert (started.cpu_s(), started.version) == (3.0, "scripted 1.0")
    started.close()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("give(0, most - 1)", "gave 5 tokens where 6 were asked for"),
        ("give(0, most + 1)", "gave 7 tokens where 6 were asked for"),
        ("give(0, 0)", "gave 0 tokens where 6 were asked for"),
        ("give(9, most)", "gave what was not asked for"),
        ("give(0, most); give(0, most)", "gave what was not asked for"),
        ("prompts.pop()", "gave no completion for 1 of 3 prompts"),
        ("say(index=0, token_ids=[5] * most, logprobs=[-1.0])", "gave 1 log-probabilities of 6 tokens"),
        (
            "say(index=0, token_ids=[5] * most, logprobs=[float('nan')] * most)",
            "log-probability that is not finite",
        ),
        ("print('Loading', flush=True)", "gave a line that is no JSON object: Loading"),
        ("print(7, flush=True)", "gave a line that is no JSON object: 7"),
        ("say(error='ValueError: too long')", "failed: ValueError: too long"),
        ("say(done=True)", "did not say its processor time"),
        ("give(0, most); sys.exit('no memory is left')", "ended by exit code 1: no memory is left"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9, as a process is when memory runs out"),
        ("say(error='1 error\\n  no such model')", "failed: 1 error no such model"),
        ("os.close(1); time.sleep(60)", "closed its output and goes on"),
        ("time.sleep(60)", "was silent for 1 s"),
    ],
)
def test_what_a_peer_does_wrong_is_one_line_that_names_it_and_says_what_to_do(fault, says, monkeypatch):
    monkeypatch.setattr(peer, "PATIENCE_S", 1.0)
    monkeypatch.setattr(peer, "PATIENCE_TO_END_S", 1.0)
    started = scripted(fault)
    with pytest.raises(PeerFailed) as failed:
        list(started.complete(TASK, [[1], [2], [3]], seed=0))
    started.close()

    message = str(failed.value)
    assert message.startswith("the process of scripted ")
    assert says in message
    assert message.endswith("; `make peers` makes its environment")
    assert "\n" not in message


def test_a_text_shorter_than_asked_is_whole_if_it_ends_in_an_end_token():
    task = dataclasses.replace(TASK, eos_token_ids=(5,))
    started = scripted("most = 2")
    assert [each.token_ids for each in started.complete(task, [[1]], seed=0)] == [[5, 5]]
    started.close()


def test_a_peer_that_ends_before_it_is_ready_says_its_last_words():
    command = [sys.executable, "-c", "raise SystemExit('no such processor')"]
    with pytest.raises(PeerFailed, match="ended by exit code 1: no such processor"):
        PeerProcess("early", command, {}, TASK)


def test_what_a_peer_does_while_it_waits_is_no_processor_time_of_its_waves():
    """Threads of a waiting engine are at work while others are measured: here one that never rests."""
    script = """
import json, sys, threading, time
from blockroll.bench import peer_worker
def burn():
    while True:
        sum(range(10_000))
class Restless:
    version = "restless"
    def __init__(self, task):
        threading.Thread(target=burn, daemon=True).start()
    def complete(self, wave):
        yield {"index": 0, "token_ids": [5] * 6, "logprobs": None}
peer_worker.ENGINES["restless"] = Restless
def answer(line):
    print(json.dumps(line), flush=True)
peer_worker.serve("restless", iter(sys.stdin), answer)
"""
    root = str(Path(peer.__file__).parents[2])
    started = PeerProcess("restless", [sys.executable, "-c", script], {"PYTHONPATH": root}, TASK)
    process = psutil.Process(started._process.pid)
    list(started.complete(TASK, [[1]], seed=0))
    before, measured = sum(process.cpu_times()[:2]), started.cpu_s()
    while sum(process.cpu_times()[:2]) < before + 0.5:
        time.sleep(0.05)
    waited = sum(process.cpu_times()[:2])
    list(started.complete(TASK, [[1]], seed=1))
    in_wave = sum(process.cpu_times()[:2]) - waited
    assert started.cpu_s() - measured < in_wave + 0.25
    started.close()


def test_what_the_processes_of_a_peer_take_is_its_processor_time(tmp_path):
    """Those that go on and those that have ended: an engine may do its work in another process."""
    script = """
import json, subprocess, sys
from blockroll.bench import peer_worker
BURN = "import time\\nwhile time.process_time() < 0.5: pass\\n"
class Delegating:
    version = "delegating"
    def __init__(self, task):
        pass
    def complete(self, wave):
        subprocess.run([sys.executable, "-c", BURN], check=True)
        living = subprocess.Popen(
            [sys.executable, "-c", BURN + "print(flush=True); input()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        living.stdout.readline()
        yield {"index": 0, "token_ids": [5] * 6, "logprobs": None}
peer_worker.ENGINES["delegating"] = Delegating
peer_worker.serve("delegating", iter(sys.stdin), lambda line: print(json.dumps(line), flush=True))
"""
    root = str(Path(peer.__file__).parents[2])
    started = PeerProcess("delegating", [sys.executable, "-c", script], {"PYTHONPATH": root}, TASK)
    list(started.complete(TASK, [[1]], seed=0))
    assert started.cpu_s() >= 0.9
    started.close()


def test_a_busy_machine_is_shared_out_alike_and_an_interrupt_reaches_the_bench_alone():
    started = scripted()
    process_id = started._process.pid
    assert os.getsid(process_id) == os.getsid(0)
    assert os.getpgid(process_id) != os.getpgid(0)
    started.close()


def test_a_peer_that_does_not_end_is_ended_with_all_it_has_started(monkeypatch):
    monkeypatch.setattr(peer, "PATIENCE_TO_END_S", 0.5)
    before = set(psutil.Process().children(recursive=True))
    started = scripted("subprocess.Popen(['sleep', '60'])\n    os.dup2(os.pipe()[0], 0)")
    list(started.complete(TASK, [[1]], seed=0))
    begun = set(psutil.Process().children(recursive=True)) - before
    assert len(begun) == 2
    started.close()
    deadline = time.monotonic() + 10
    while any(map(lives, begun)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, begun))


def lives(process):
    """Whether a process is there and has not ended: whose parent is gone may stay a zombie for a while."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_pool_keeps_a_process_from_task_to_task_and_ends_it_when_it_is_too_small(saved):
    policy, path = saved
    before = set(psutil.Process().children())
    pool = make_peer_pool(policy, path)
    processes = []
    for task in (TASK, dataclasses.replace(TASK, temperature=0.0), dataclasses.replace(TASK, batch=4)):
        reference = pool.reference("generate_process", task)
        assert len(list(reference.complete(prompts(4), seed=0))) == 4
        reference.close()
        processes.append(set(psutil.Process().children()) - before)
    assert processes[0] == processes[1] != processes[2]
    assert [len(each) for each in processes] == [1, 1, 1]
    pool.close()
    assert set(psutil.Process().children()) == before


def test_a_task_after_a_failure_has_a_new_process(saved, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(ANSWERS.format(fault="if wave['seed'] == 1: os._exit(4)"))
    monkeypatch.setattr(peer, "WORKER", worker)
    pool = make_peer_pool(*saved)
    reference = pool.reference("generate_process", TASK)
    with pytest.raises(PeerFailed, match="exit code 4"):
        list(reference.complete([[1]], seed=1))
    assert len(list(pool.reference("generate_process", TASK).complete([[1]], seed=0))) == 1
    pool.close()


def test_suffix_decoding_without_its_package_says_so(tmp_path):
    """The check comes before vLLM is imported, whose own words name another version of the package."""
    limits = {**dataclasses.asdict(TASK), "speculation": "suffix", "num_drafts": 0}
    with pytest.raises(ModuleNotFoundError, match="needs the package arctic-inference"):
        peer_worker.serve("vllm", iter([json.dumps(limits)]), print)


def test_a_peer_that_dies_while_it_is_measured_loses_its_own_row_alone(saved, tmp_path, monkeypatch):
    """Its warm-up and first repeat go well; whatever else is measured keeps every figure."""
    worker = tmp_path / "worker.py"
    worker.write_text(ANSWERS.format(fault="if waves == 4: os._exit(4)"))
    monkeypatch.setattr(peer, "WORKER", worker)
    policy, path = saved
    rows = run_bench(
        policy, prompts(5), [PLAIN], ONE_BATCH, policy_path=path, against=("generate_process", "generate")
    )

    plain, dead, stock = rows
    assert dead.skipped == "the process of generate_process ended by exit code 4"
    assert dead.tokens_per_s is None
    for row in (plain, stock):
        assert row.skipped is None
        assert len(row.tokens_per_s_all) == ONE_BATCH.repeats
    assert "not measured: generate_process at batch 3: the process of" in bench_table(rows, title="t").caption
