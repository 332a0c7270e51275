"""What a bench measures: blockroll's engine under a plan and a law, and what others offer."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from blockroll.bench.peer import PEERS, PEERS_PYTHON, check_peers
from blockroll.bench.peer_pool import PeerPool
from blockroll.bench.reference import LOOKUP_TOKENS, REFERENCES, Reference, ReferenceTask
from blockroll.errors import InvalidInput, NonFiniteLogits, PeerFailed
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_model, resolve_checkpoint
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.trace import EngineTimes
from blockroll.rollout.planning.planner import Planner
from blockroll.types import Law, Plan, Request, Rollout

TRANSFORMERS = "transformers_generate"
REFERENCE_NAMES = {  # what is asked for: what its rows are called
    "generate": TRANSFORMERS,
    "continuous_batching": "transformers_continuous_batching",
    "assisted": f"transformers_assisted({LOOKUP_TOKENS})",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """What decoding one batch gave; rollouts and times are None for a subject that reports neither."""

    num_tokens: int
    duration_s: float
    cpu_s: float  # processor time of all threads and processes that decode
    latencies_s: tuple[float, ...]  # of each request, from submission to its end
    rollouts: tuple[Rollout, ...] | None = None
    times: EngineTimes | None = None


class Subject(Protocol):
    """Something that decodes batches of requests."""

    name: str
    law: Law  # of the requests it is given

    @property
    def version(self) -> str | None:
        """Of what decodes; None: the row's setting says it."""
        ...

    def warm_up(self, requests: Sequence[Request]) -> str | None:
        """Decode once, uncounted; the reason if it cannot, None if it can."""
        ...

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to their end."""
        ...

    def close(self) -> None:
        """Free what decoding needed."""
        ...


class EngineSubject:
    """blockroll's engine under one plan or a planner, for requests of one law."""

    version = None

    def __init__(
        self, policy: HFPolicy, plan: Plan | Planner, *, law: Law, batch: int, max_length: int
    ) -> None:
        self.name = plan.name
        self.law = law
        # An accelerator runs behind the host; parts of a step can be told apart only if each is waited for.
        # The engine waits for it between the parts anyway, to look for logits that are not finite.
        clock = time.perf_counter if policy.device.type == "cpu" else _synchronized_clock
        self._engine = Engine(policy, plan=plan, max_batch_size=batch, max_length=max_length, clock=clock)

    def warm_up(self, requests: Sequence[Request]) -> str | None:
        """Decode once, uncounted; what fails here is an error."""
        self.decode(requests)
        return None

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to their end."""
        self._engine.reset_times()
        self._engine.forget_prefixes()
        finished: list[Rollout] = []
        latencies: list[float] = []
        start, cpu_start = time.perf_counter(), time.process_time()
        self._engine.submit(requests)
        while self._engine.num_requests:
            ended = self._engine.step().finished
            finished.extend(ended)
            latencies.extend([time.perf_counter() - start] * len(ended))
        duration_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        check_finite(finished)
        return Wave(
            num_tokens=sum(len(rollout.token_ids) for rollout in finished),
            duration_s=duration_s,
            cpu_s=cpu_s,
            latencies_s=tuple(latencies),
            rollouts=tuple(finished),
            times=self._engine.times,
        )

    def close(self) -> None:
        """The cache goes with the engine."""


class ReferenceSubject:
    """A way to decode that is not blockroll's, under the target law."""

    law = Law()

    def __init__(self, name: str, make_reference: Callable[[], Reference]) -> None:
        """`make_reference` is called by `warm_up`, so that what it refuses is a reason and no error."""
        self.name = name
        self.version: str | None = None
        self._make_reference = make_reference
        self._reference: Reference | None = None

    def warm_up(self, requests: Sequence[Request]) -> str | None:
        """Set up and decode once, uncounted; the reference's own words if it cannot."""
        try:
            self._reference = self._make_reference()
            self.version = self._reference.version
            self.decode(requests)
        except PeerFailed as error:
            return str(error)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def decode(self, requests: Sequence[Request]) -> Wave:
        """Decode all requests to the end of the last; each ends when its caller would get it."""
        assert self._reference is not None, "warm_up comes first"
        latencies: list[float] = []
        num_tokens = 0
        start, cpu_start = time.perf_counter(), self._reference.cpu_s()
        prompts = [request.prompt_ids for request in requests]
        most = [request.sampling.max_tokens for request in requests]
        for completion in self._reference.complete(prompts, seed=requests[0].seed, max_tokens=most):
            latencies.append(time.perf_counter() - start)
            num_tokens += len(completion.token_ids)
        return Wave(
            num_tokens=num_tokens,
            duration_s=time.perf_counter() - start,
            cpu_s=self._reference.cpu_s() - cpu_start,
            latencies_s=tuple(latencies),
        )

    def close(self) -> None:
        """Free what decoding needed."""
        if self._reference is not None:
            self._reference.close()
            self._reference = None


def make_peer_pool(policy: HFPolicy, path: str, *, python: Path = PEERS_PYTHON) -> PeerPool:
    """Of peers that load a policy's folder in its precision, with as many threads as this process has."""
    return PeerPool(
        folder=resolve_checkpoint(path),
        dtype=str(policy.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        python=python,
    )


def load_references(
    names: Sequence[str],
    policy: HFPolicy,
    path: str,
    *,
    peers: PeerPool,
    peers_python: Path,
) -> dict[str, Callable[[ReferenceTask], Reference]]:
    """By the names of their rows, how to set up each reference that is asked for.

    Those of this process have models of their own, with transformers' default attention, which continuous
    batching may change; peers load the same folder in the same precision.
    """
    unknown = [name for name in names if name not in REFERENCES and name not in PEERS]
    if unknown or len(set(names)) < len(names):
        raise InvalidInput(
            f"a bench measures against one or more of {', '.join((*REFERENCES, *PEERS))}, each once; got "
            f"{', '.join(names)}"
        )
    check_peers(names, device=policy.device.type, python=peers_python)
    folder, dtype = resolve_checkpoint(path), policy.model.dtype
    found: dict[str, Callable[[ReferenceTask], Reference]] = {}
    for name in names:
        if name in PEERS:
            found[PEERS[name].row] = functools.partial(peers.reference, name)
        else:
            model = load_model(folder, device=policy.device, dtype=dtype)
            found[REFERENCE_NAMES[name]] = functools.partial(REFERENCES[name], model)
    return found


def check_finite(rollouts: Sequence[Rollout]) -> None:
    """Raise NonFiniteLogits if a rollout failed: its tokens must not count."""
    for rollout in rollouts:
        if rollout.error is not None:
            raise NonFiniteLogits(f"a measured rollout failed: {rollout.error}")


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
