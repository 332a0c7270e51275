"""What the experiments share: policies, prompts, requests, and runs that go on where they stopped."""

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from blockroll.config import ConvertConfig, DraftConfig, RunConfig
from blockroll.kernels.processor import processor_features
from blockroll.policies.hf import HFPolicy
from blockroll.rl_loops.arithmetic import problems, reward
from blockroll.rl_loops.convert import STATE_FILE, convert, load_convert_config
from blockroll.rl_loops.loop import load_run_config
from blockroll.rollout.drafters.engine import Engine
from blockroll.types import Plan, Request, Rollout, Sampling

RUNS = Path("runs") / "evidence"
SMOLLM2 = Path("runs") / "smollm2"  # where examples/smollm2.py works
ADAPTER = RUNS / "adapter"
K = 8
TWO_FORWARD = Plan(K)
BATCH = 64
LEARNING_TEMPERATURE = 1.5


def prompts(policy: HFPolicy, count: int, *, seed: int = 1) -> list[tuple[int, ...]]:
    """Held-out arithmetic prompts as tokens."""
    assert policy.tokenizer is not None, "evidence needs the policy's tokenizer"
    texts = (problem.prompt for problem in problems(seed, held_out=True))
    return [tuple(policy.tokenizer(text)["input_ids"]) for text in itertools.islice(texts, count)]


def requests(texts: Iterable[tuple[int, ...]], sampling: Sampling, *, seed: int = 0) -> list[Request]:
    """One request per prompt; seeds differ between calls with another `seed`."""
    return [
        Request(request_id=str(index), prompt_ids=text, seed=(seed << 32) + index, sampling=sampling)
        for index, text in enumerate(texts)
    ]


def decode(policy: HFPolicy, wanted: Sequence[Request], plan: Plan) -> list[Rollout]:
    """All rollouts, in the order of the requests."""
    engine = Engine(policy, plan=plan, max_batch_size=BATCH, max_length=512)
    engine.submit(wanted)
    finished: dict[str, Rollout] = {}
    while engine.num_requests:
        finished.update((rollout.request.request_id, rollout) for rollout in engine.step().finished)
    return [finished[request.request_id] for request in wanted]


def causal_part(adapter: Path | None = None) -> HFPolicy:
    """The shipped policy without a word of drafting, and with an adapter if one is given."""
    policy = HFPolicy.from_pretrained("tiny", adapter=adapter)
    if adapter is None:
        policy.mask_token_id = None
        policy.describe_drafts((), ())
    return policy


def trained_adapter(out: Path = ADAPTER, *, max_tokens: int = 400_000) -> Path:
    """An adapter for the shipped policy's causal part, made by `convert` once; a begun one goes on."""
    config = ConvertConfig(
        out=str(out),
        max_tokens=max_tokens,
        prompts_per_round=128,
        completion_tokens=64,
        max_batch_size=128,
        patience=1000,
        draft=DraftConfig(block_sizes=(K,), learning_rate=2e-3),
    )
    return converted(config, causal_part())


def converted(config: ConvertConfig, policy: HFPolicy | None = None) -> Path:
    """The folder of a conversion that is made once; a begun one goes on."""
    out = Path(config.out)
    is_begun = (out / STATE_FILE).is_file()
    convert(load_convert_config(out) if is_begun else config, resume=is_begun, policy=policy)
    return out


def acceptance_rate(rollouts: Iterable[Rollout]) -> float:
    """Accepted drafts per draft submitted to verify."""
    counts = [(rollout.stats.num_accepted, rollout.stats.num_drafted) for rollout in rollouts]
    return sum(accepted for accepted, _ in counts) / max(1, sum(drafted for _, drafted in counts))


def mean_reward(policy: HFPolicy, rollouts: Sequence[Rollout]) -> float:
    """Of the held-out problems that `prompts` asks, in order."""
    answers = [problem.answer for problem in itertools.islice(problems(1, held_out=True), len(rollouts))]
    rewards = [
        reward(policy.decode(list(rollout.token_ids)), answer)
        for rollout, answer in zip(rollouts, answers, strict=True)
    ]
    return float(np.mean(rewards))


def resumable(config: RunConfig) -> RunConfig:
    """The run's own config if it was begun, else the one given; a run without a checkpoint starts over."""
    if has_checkpoint(config.run_dir):
        return replace(load_run_config(config.run_dir), train=config.train)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    return config


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run can go on."""
    return any((run_dir / "checkpoints").glob("step_*"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Speed is measured on one torch thread."""
    with threads(1):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many torch threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def working_dtype() -> str:
    """What a real model is measured in here: bfloat16 where the processor multiplies it, else float32."""
    is_fast = any(name in processor_features() for name in ("avx512_bf16", "amx_bf16", "bf16mm"))
    return "bfloat16" if is_fast else "float32"


def has_smollm2(subject: str, experiment: str) -> bool:
    """Whether SmolLM2 lies where examples/smollm2.py leaves it; says so if not."""
    is_there = (SMOLLM2 / "adapter").is_dir()
    if not is_there:
        print(f"{subject}: {experiment} is left out: no {SMOLLM2 / 'adapter'}; run examples/smollm2.py first")
    return is_there
