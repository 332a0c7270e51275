"""The plan that chooses itself, on the tiny policy: every batch and context, beside all fixed plans.

    python -m benchmarks.evidence speed grid

One thread, one process, in turns (benchmarks/turns.py), and against `generate`. Siblings share a prompt, as
in RL. In the shortest context the policy solves problems as it was taught to, each answer as long as it is,
and others take the places of those that have ended. Longer prompts are problems behind others that are worked
out, cut to length, with equally many tokens behind each: the policy has never seen such texts and drafts them
badly, so they show that drafts which do not pay are not drafted. The planner knows nothing of the machine
when the first cell begins, and keeps what it learns there.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.cells import measured
from benchmarks.history import groups
from benchmarks.rows import Row
from benchmarks.turns import PLAIN, figures, subjects, waves_in_turn
from benchmarks.workload import RUNS, K, causal_part, one_thread, prompts, trained_adapter
from blockroll.bench.reference import GenerateReference, ReferenceTask
from blockroll.bench.subjects import TRANSFORMERS, EngineSubject, ReferenceSubject, Subject
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_model, resolve_checkpoint
from blockroll.rl_loops.arithmetic import problems
from blockroll.rollout.planning.planner import Planner
from blockroll.types import Request, Sampling

AUTO = "auto"
FIXED = (PLAIN, f"history({K})", f"two_forward({K})", f"fused({K},[0,{K}])")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (64, 512, 2_048)  # tokens of the prompt, less what the context must hold behind it
PROMPTS = 4  # of one repeat: what is left of a batch are siblings
FEWEST_ROLLOUTS = {True: 16, False: 4}  # of one repeat, of texts as they are and of long ones
ROUNDS = {True: 2, False: 1}  # of a batch, in one repeat
AS_TAUGHT = 64  # the context of texts as the policy was taught them: prompt and answer fill it
GENERATE_ROWS = 8_192  # prompt tokens of a batch, above which `generate` has one repeat: it prefills them all


def grid(
    adapter: Path | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    repeats: int = 5,
    folder: Path | None = None,
) -> list[Row]:
    """Rows of every cell: plain twice, each fixed plan, `auto` and `generate`."""
    os.environ["BLOCKROLL_CACHE"] = str(RUNS / "cache")
    with one_thread():
        policy = causal_part(adapter or trained_adapter())
        cells: dict[str, Callable[[], list[Row]]] = {
            f"batch {batch}, context {context}, {repeats} repeats": partial(
                cell, policy, batch=batch, context=context, repeats=repeats
            )
            for context in contexts
            for batch in batches
        }
        return measured("speed_grid", cells, folder=folder)


def cell(policy: HFPolicy, *, batch: int, context: int, repeats: int) -> list[Row]:
    """One batch and context. Regret is how far `auto` stays behind the best fixed plan; 0: it does not."""
    is_as_taught = context <= AS_TAUGHT
    max_tokens = 64 if batch <= 16 or is_as_taught else 32
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=not is_as_taught)
    num_rollouts = max(ROUNDS[is_as_taught] * batch, FEWEST_ROLLOUTS[is_as_taught])
    length = 0 if is_as_taught else min(context, policy.max_length - max_tokens)
    count = min(PROMPTS, num_rollouts)
    rounds = []
    for index in range(repeats + 1):
        texts = (
            prompts(policy, count, seed=index)
            if is_as_taught
            else worked_prompts(policy, count, length, seed=index)
        )
        rounds.append([*groups(texts, sampling, index, siblings=num_rollouts // count)])
    length = max(len(request.prompt_ids) for requests in rounds for request in requests)
    with subjects(policy, (*FIXED, AUTO), batch=batch, max_length=length + max_tokens) as turns:
        waves = waves_in_turn(turns, rounds[1:], warm_up=rounds[0])
        predicted, counted = planner_of(turns[AUTO]).speedups
    about = {
        "policy": "tiny",
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "threads": 1,
        "batch": batch,
        "context": context,
        "prompt_tokens": length,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
    }
    rows = [{**about, "plan": name, **figures(found, waves[PLAIN])} for name, found in waves.items()]
    by_plan = {row["plan"]: row for row in rows}
    chosen = by_plan[AUTO]
    best = max((by_plan[name] for name in FIXED), key=lambda row: row["step_speedup"])
    regrets = 1 - np.divide(chosen["step_speedup_all"], best["step_speedup_all"])
    chosen |= {
        "best_fixed": best["plan"],
        "regret": float(np.median(regrets)),
        "regret_low": float(min(regrets)),
        "regret_high": float(max(regrets)),
        "predicted_speedup": predicted,
        "counted_speedup": counted,  # by its own model of what plain steps take
        "predicted_over_achieved": predicted / chosen["step_speedup"],
    }
    return [*rows, {**about, **against_generate(policy, rounds, batch, length, max_tokens)}]


def against_generate(
    policy: HFPolicy, rounds: Sequence[Sequence[Request]], batch: int, length: int, max_tokens: int
) -> Row:
    """`auto` over `generate`, in turns of their own, prefill included: siblings share one only with ours."""
    is_long = batch * length > GENERATE_ROWS
    ignores_eos = rounds[0][0].sampling.ignore_eos
    task = ReferenceTask(
        batch=batch,
        longest_prompt=length,
        max_tokens=max_tokens,
        temperature=1.0,
        eos_token_ids=() if ignores_eos else policy.eos_token_ids,
    )
    model = load_model(resolve_checkpoint("tiny"), device=policy.device, dtype=policy.model.dtype)
    stock = ReferenceSubject(TRANSFORMERS, partial(GenerateReference, model, task))
    with subjects(policy, (AUTO,), batch=batch, max_length=length + max_tokens) as turns:
        turns[AUTO].warm_up(rounds[0])
        refused = stock.warm_up(rounds[0][:1] if is_long else rounds[0])
        assert refused is None, refused
        both = {AUTO: turns[AUTO], TRANSFORMERS: stock}
        waves = waves_in_turn(both, rounds[1:2] if is_long else rounds[1:])
    row = figures(waves[TRANSFORMERS], waves[AUTO])
    ratios = [1 / each for each in row["speedup_all"]]
    return {
        "plan": TRANSFORMERS,
        **{name: value for name, value in row.items() if "speedup" not in name},
        "auto_over_it": float(np.median(ratios)),
        "auto_over_it_low": min(ratios),
        "auto_over_it_high": max(ratios),
    }


def planner_of(subject: Subject) -> Planner:
    """The planner of `auto`."""
    assert isinstance(subject, EngineSubject)
    planner = subject._engine.planner
    assert isinstance(planner, Planner)
    return planner


def worked_prompts(policy: HFPolicy, count: int, length: int, *, seed: int) -> list[tuple[int, ...]]:
    """So many problems, each behind others with their solutions; the last `length` tokens of all that."""
    assert policy.tokenizer is not None, "the prompts are text"
    drawn = problems(f"grid-{seed}", held_out=True)
    found = []
    for _ in range(count):
        text = next(drawn).prompt
        tokens: list[int] = policy.tokenizer(text)["input_ids"]
        while len(tokens) < length:
            shown = next(drawn)
            text = f"{shown.prompt}{shown.solution}\n{text}"
            tokens = policy.tokenizer(text)["input_ids"]
        found.append(tuple(tokens[-length:]))
    return found
