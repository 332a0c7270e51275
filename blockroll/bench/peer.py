"""Engines that a bench measures in a process of their own: the bench's end of `peer_worker`'s lines.

vLLM has an environment of its own (`make peers`), because it pins other versions of torch and transformers.
Its start, its compilation and a first wave come before anything is timed. What crosses the border between the
processes, a few kilobytes of JSON a wave, is part of the peer's time; `generate_process` is there to say how
little that is.
"""

import ctypes.util
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import blockroll
from blockroll.bench.reference import Completion, ReferenceTask
from blockroll.errors import InvalidInput, PeerFailed

WORKER = Path(__file__).with_name("peer_worker.py")
PEERS_PYTHON = Path(blockroll.__file__).parents[1] / ".venv-peers" / "bin" / "python"
PATIENCE_TO_START_S = 900.0  # loading and compiling
PATIENCE_S = 600.0  # for the next completion
PATIENCE_TO_END_S = 10.0
NGRAM_DRAFTS = 5  # a step, as in vLLM's own examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to decode in a process of its own."""

    row: str  # name of its rows
    engine: str  # of the worker's ENGINES
    speculation: str | None = None  # vLLM's method; None: one token a forward
    num_drafts: int = 0  # a step; 0: the method chooses
    has_own_environment: bool = True  # False: runs in this one


PEERS = {  # what is asked for: what it is
    "vllm": Peer(row="vllm", engine="vllm"),
    "vllm_ngram": Peer(
        row=f"vllm_ngram({NGRAM_DRAFTS})", engine="vllm", speculation="ngram", num_drafts=NGRAM_DRAFTS
    ),
    "vllm_suffix": Peer(row="vllm_suffix", engine="vllm", speculation="suffix"),
    "generate_process": Peer(
        row="transformers_generate_process", engine="generate", has_own_environment=False
    ),
}


class PeerProcess:
    """A peer's process, from its start to `close`. Raises PeerFailed when it ends, hangs or errs.

    One task after another can be decoded by it, each within the `limits` that it was started for.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        limits: ReferenceTask,
        *,
        advice: str = "",
        **settings: Any,
    ) -> None:
        """`settings` are what a worker is told beside the limits; `advice` ends the message of a failure."""
        self.limits = limits
        self.has_failed = False
        self._name = name
        self._advice = advice
        self._buffer = b""
        self._cpu_s = 0.0
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        # A process group of its own: an interrupt at the terminal reaches the bench alone, which then closes
        # it. Not a session of its own: Linux may share processors out by session first (sched_autogroup), and
        # then a peer would get more of a busy machine than the bench does.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            process_group=0,
        )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            self._send({**asdict(limits), **settings})
            ready = self._receive(PATIENCE_TO_START_S)
            if "version" not in ready:
                raise self._failure(f"did not say its version: {_shortened(json.dumps(ready))}")
            self.version = str(ready["version"])
        except BaseException:
            self.close()
            raise

    def complete(
        self,
        task: ReferenceTask,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        max_tokens: Sequence[int] | None = None,
    ) -> Iterator[Completion]:
        """Decode all prompts together, as a task says; each completion comes when the peer gives it."""
        most = task.most_tokens(prompts, max_tokens)
        self._send(
            {
                "prompts": [list(prompt) for prompt in prompts],
                "max_tokens": list(most),
                "seed": seed,
                "batch": task.batch,
                "temperature": task.temperature,
                "eos_token_ids": list(task.eos_token_ids),
            }
        )
        waiting = dict(enumerate(most))
        while "done" not in (answer := self._receive(PATIENCE_S)):
            completion = self._checked(answer, waiting, task.eos_token_ids)
            del waiting[completion.index]
            yield completion
        self._cpu_s += self._cpu_of(answer)
        if waiting:
            raise self._failure(f"gave no completion for {len(waiting)} of {len(prompts)} prompts")

    def forget(self) -> None:
        """What the peer remembers of texts, so that no task profits from the one before."""
        self._send({"forget": True})
        if "forgot" not in (answer := self._receive(PATIENCE_S)):
            raise self._failure(f"did not forget: {_shortened(json.dumps(answer))}")

    def cpu_s(self) -> float:
        """Processor time of the peer's process, and of all it has started, in all waves so far."""
        return self._cpu_s

    def close(self) -> None:
        """End the process: by the end of its input, and by a signal if that does not do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_TO_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._selector.close()
        self._process.stdout.close()
        self._stderr.close()

    def _cpu_of(self, answer: Mapping[str, Any]) -> float:
        if "cpu_s" not in answer:
            raise self._failure(f"did not say its processor time: {_shortened(json.dumps(answer))}")
        return float(answer["cpu_s"])

    def _checked(
        self, answer: Mapping[str, Any], waiting: Mapping[int, int], ends: Sequence[int]
    ) -> Completion:
        """The completion of an answer, if it is one that was asked for: whole, and with sound numbers.

        `waiting` has the tokens that each completion not yet given may have.
        """
        index, token_ids, logprobs = (answer.get(key) for key in ("index", "token_ids", "logprobs"))
        if not isinstance(index, int) or index not in waiting or not isinstance(token_ids, list):
            raise self._failure(f"gave what was not asked for: {_shortened(json.dumps(answer))}")
        most = waiting[index]
        has_ended = len(token_ids) == most or bool(token_ids and token_ids[-1] in ends)
        if len(token_ids) > most or not has_ended:
            raise self._failure(f"gave {len(token_ids)} tokens where {most} were asked for")
        if logprobs is not None:
            if len(logprobs) != len(token_ids):
                raise self._failure(f"gave {len(logprobs)} log-probabilities of {len(token_ids)} tokens")
            if not all(math.isfinite(logprob) for logprob in logprobs):
                raise self._failure("gave a log-probability that is not finite")
        return Completion(index=index, token_ids=token_ids)

    def _send(self, line: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail_as_ended()

    def _receive(self, patience_s: float) -> dict[str, Any]:
        """The next line, which a peer that lives gives within `patience_s`."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + patience_s
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise self._failure(f"was silent for {patience_s:.0f} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                self._fail_as_ended()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._failure(
                f"gave a line that is no JSON object: {_shortened(line.decode('utf-8', 'replace'))}"
            )
        if "error" in answer:
            raise self._failure(f"failed: {_shortened(str(answer['error']))}")
        return answer

    def _fail_as_ended(self) -> NoReturn:
        """Raise what its exit and its last word say."""
        try:
            code = self._process.wait(PATIENCE_TO_END_S)
        except subprocess.TimeoutExpired:
            raise self._failure("closed its output and goes on") from None
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        if code == -signal.SIGKILL:
            how += ", as a process is when memory runs out (fewer --batch or --max-tokens need less)"
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        raise self._failure(f"ended by {how}" + (f": {_shortened(said[-1])}" if said else ""))

    def _failure(self, what: str) -> PeerFailed:
        self.has_failed = True
        return PeerFailed(f"the process of {self._name} {what}{self._advice}")


def start_peer(
    name: str, limits: ReferenceTask, *, folder: Path, dtype: str, threads: int, python: Path
) -> PeerProcess:
    """Start a peer's process for tasks within limits; it is ready when this returns."""
    peer = PEERS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["NUMBA_NUM_THREADS"] = str(threads)  # vLLM's n-gram lookup has threads of its own
    if peer.has_own_environment:
        environment = _of_another(environment, python)
    return PeerProcess(
        name,
        [str(python) if peer.has_own_environment else sys.executable, "-P", str(WORKER), peer.engine],
        environment,
        limits,
        advice="; `make peers` makes its environment" if peer.has_own_environment else "",
        model=str(folder.absolute()),
        dtype=dtype,
        threads=threads,
        speculation=peer.speculation,
        num_drafts=peer.num_drafts,
    )


def check_peers(names: Sequence[str], *, device: str, python: Path) -> None:
    """Refuse before anything is measured what could not be started: InvalidInput."""
    asked = [name for name in names if name in PEERS]
    if asked and device != "cpu":
        raise InvalidInput(f"{', '.join(asked)} is measured on a CPU only: give --device cpu, got {device}")
    missing = [name for name in asked if PEERS[name].has_own_environment]
    if missing and not python.is_file():
        raise InvalidInput(
            f"{', '.join(missing)} needs an environment of its own, and there is no {python}: run "
            "`make peers` in the source tree, or name its Python with --peers-python"
        )


def _of_another(variables: Mapping[str, str], python: Path) -> dict[str, str]:
    """What a process of vLLM's environment gets: nothing of this one's, and what vLLM advises for a CPU."""
    kept = {
        name: value
        for name, value in variables.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    openmp = python.absolute().parents[1] / "lib" / "libiomp5.so"
    preloaded = {"KMP_BLOCKTIME": "5"} if openmp.is_file() else {}
    libraries = [str(openmp)] if openmp.is_file() else []
    if allocator := ctypes.util.find_library("tcmalloc_minimal"):
        libraries.append(allocator)
    if libraries:
        preloaded["LD_PRELOAD"] = ":".join(libraries)
    # As everything that is measured: no thread is bound to a core, which something else may use.
    vllm = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    vllm["VLLM_PLUGINS"] = ""  # the package with suffix decoding would also patch what it knows of vLLM
    return {**preloaded, **vllm, **kept}


def _shortened(text: str) -> str:
    """In one line: some errors, as those of vLLM's checks of a model, say what is wrong in their second."""
    line = " ".join(text.split()) or "nothing"
    return line if len(line) <= 300 else f"{line[:300]} ..."
