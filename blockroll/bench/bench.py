"""Speed of decoding plans, measured against each other in one run.

Under each workload (batch, temperature, lengths) every subject decodes the same prompts with the same seeds.
A repeat decodes its rollouts in waves of `batch` times `queue` requests that are submitted together and
drained: what waits is decoded as places get free, or by `generate` batch after batch. Grouped, a wave is an
epoch: every prompt of the repeat with its siblings. Subjects take turns wave by wave (ABAB...), so that a
machine that slows down slows all of them. The speed of a repeat is committed tokens over wall time, and over
processor time, prefill included. Reported are medians over repeats with all values beside them; what a
subject needs to start and its first round, a warm-up, are not counted. Ratios against plain are taken within
a repeat.

Subjects share nothing. What one remembers of texts lives through the repeats of a workload and ends with it.

Acceptance by draft position and pass@k come from passes of their own that are not timed, on engines of their
own: the engines that are timed have no observer and judge nothing.
"""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blockroll.bench.pass_at_k import Judge, Passed
from blockroll.bench.peer import PEERS_PYTHON
from blockroll.bench.peer_pool import PeerPool
from blockroll.bench.reference import Reference, ReferenceTask
from blockroll.bench.rows import (
    BenchRow,
    Setting,
    describe_setting,
    to_record,
    with_passed,
    with_speed,
)
from blockroll.bench.subjects import (
    TRANSFORMERS,
    EngineSubject,
    ReferenceSubject,
    Subject,
    Wave,
    check_finite,
    load_references,
    make_peer_pool,
)
from blockroll.bench.workload import (
    TARGET,
    BenchOptions,
    Prompts,
    Workload,
    check_length,
    cut_to_length,
    make_waves,
    random_prompts,
    warm_up_wave,
)
from blockroll.errors import InvalidInput, PeerFailed
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.planning.planner import Planner
from blockroll.types import PLAIN, Law, Plan, Request, Rollout

__all__ = ["PEERS_PYTHON", "TRANSFORMERS", "BenchOptions", "BenchRow", "Judge", "run_bench", "to_record"]

NUM_RANDOM_PROMPTS = 256


def run_bench(
    policy: HFPolicy,
    prompts: Prompts,
    plans: Sequence[Plan | Planner],
    options: BenchOptions,
    *,
    policy_path: str,
    against: Sequence[str] = (),
    judge: Judge | None = None,
    peers: PeerPool | None = None,
    peers_python: Path = PEERS_PYTHON,
    on_row: Callable[[BenchRow], None] = lambda row: None,
) -> list[BenchRow]:
    """Measure every plan under every law and workload. `on_row` gets each row when its workload is done.

    Plain drafts nothing, so every law is the target to it: it is measured once, and so is each way of
    transformers and each peer that `against` names; peers with an environment of their own run on
    `peers_python`. `peers` keeps them for a next run of the same policy; without it they end with this one.
    What cannot be measured, or fails while it is, has a row that says why. `prompts` may be empty if they are
    random. `judge` adds pass@k of each plan and law.
    """
    if not (plans or against) or (options.prompt_source == "text" and not (prompts and all(prompts))):
        raise InvalidInput("a bench needs at least one prompt and one plan, and no prompt may be empty")
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names):
        raise InvalidInput(f"each plan is measured once, got {', '.join(names)}")
    if judge is not None and (options.prompt_tokens != (None,) or options.has_fixed_lengths):
        raise InvalidInput(
            "only whole answers to whole prompts can be judged; leave out prompt_tokens, random prompts, "
            "skewed lengths and ignore_eos, or the judge"
        )
    workloads = [
        (workload, _prompts_of(workload, prompts, options, policy)) for workload in options.workloads()
    ]
    for workload, chosen in workloads:
        check_length(chosen, workload.max_tokens, policy.max_length)
    pool = peers or make_peer_pool(policy, policy_path, python=peers_python)
    for workload, chosen in workloads:
        pool.make_room(_task(workload, chosen, options, policy))
    bench = _Bench(
        policy,
        plans,
        options,
        references=load_references(against, policy, policy_path, peers=pool, peers_python=peers_python),
        setting=describe_setting(policy, policy_path),
        judge=judge,
    )
    rows = []
    try:
        for workload, chosen in workloads:
            for row in bench.measure(workload, chosen):
                rows.append(row)
                on_row(row)
    finally:
        if peers is None:
            pool.close()
    return rows


class _Bench:
    """One run: what its workloads have in common.

    Rows of a workload begin with those of `_pairs`, in their order.
    """

    def __init__(
        self,
        policy: HFPolicy,
        plans: Sequence[Plan | Planner],
        options: BenchOptions,
        *,
        references: Mapping[str, Callable[[ReferenceTask], Reference]],
        setting: Setting,
        judge: Judge | None,
    ) -> None:
        laws = [Law(weight) for weight in options.mix_weights]
        # A planner that served two laws would choose for one by what the other accepts.
        self._pairs = [
            (copy.deepcopy(plan), law) for plan in plans for law in (laws if _drafts(plan) else [TARGET])
        ]
        self._policy = policy
        self._options = options
        self._references = references
        self._setting = setting
        self._judge = judge
        self._passed: dict[tuple[str, Law, float, int], Passed] = {}

    def measure(self, workload: Workload, prompts: Prompts) -> list[BenchRow]:
        """The rows of one workload: plans and laws first, then transformers."""
        rows = self._timed(workload, prompts)
        for index, (plan, law) in enumerate(self._pairs):
            if rows[index].skipped is None:
                rows[index] = self._judged(rows[index], plan, law, workload, prompts)
        return rows

    def _timed(self, workload: Workload, prompts: Prompts) -> list[BenchRow]:
        subjects = self._subjects(workload, prompts)
        failures: dict[tuple[str, str], str] = {}
        setups_s: dict[tuple[str, str], float] = {}
        try:
            for subject in subjects:
                start = time.perf_counter()
                reason = _warm_up(subject, prompts, workload, self._options)
                setups_s[_key(subject)] = time.perf_counter() - start
                if reason is not None:
                    failures[_key(subject)] = reason
            measured = _interleave(subjects, failures, prompts, workload, self._options)
        finally:
            for subject in subjects:
                subject.close()
        plain = measured.get((PLAIN.name, TARGET.name), ())
        rows = []
        for subject in subjects:
            row, key = self._blank_row(subject, workload, prompts), _key(subject)
            if key in failures:
                rows.append(replace(row, skipped=failures[key]))
            else:
                rows.append(with_speed(replace(row, setup_s=setups_s[key]), measured[key], plain))
        return rows

    def _subjects(self, workload: Workload, prompts: Prompts) -> list[Subject]:
        task = _task(workload, prompts, self._options, self._policy)
        return [
            *(
                EngineSubject(
                    self._policy,
                    plan,
                    law=law,
                    batch=workload.batch,
                    max_length=task.longest_prompt + task.max_tokens,
                )
                for plan, law in self._pairs
            ),
            *(
                ReferenceSubject(name, functools.partial(make, task))
                for name, make in self._references.items()
            ),
        ]

    def _blank_row(self, subject: Subject, workload: Workload, prompts: Prompts) -> BenchRow:
        options = self._options
        repeats = [make_waves(prompts, workload, repeat, options) for repeat in range(options.repeats)]
        requests = [request for waves in repeats for wave in waves for request in wave]
        return BenchRow(
            plan=subject.name,
            law=subject.law.name,
            batch=workload.batch,
            temperature=workload.temperature,
            prompts=options.prompts_in_words(workload.prompt_tokens),
            prompt_tokens=workload.prompt_tokens,
            context=round(statistics.median(len(request.prompt_ids) for request in requests)),
            max_tokens=workload.max_tokens,
            ignore_eos=options.has_fixed_lengths,
            workload=options.shape,
            siblings=options.siblings if options.shape == "grouped" else None,
            epochs=options.epochs if options.shape == "grouped" else None,
            repeats=options.repeats,
            rollouts=len(requests) // options.repeats,
            queue=options.queue,
            seed=options.seed,
            setting=self._setting,
            version=subject.version,
        )

    def _judged(
        self, row: BenchRow, plan: Plan | Planner, law: Law, workload: Workload, prompts: Prompts
    ) -> BenchRow:
        """Add what an untimed pass tells: pass@k."""
        if self._judge is not None:
            # A batch size changes no law, and under a fixed plan no token.
            key = (plan.name, law, workload.temperature, workload.max_tokens)
            if key not in self._passed:
                sampling = self._options.sampling(workload, law)
                requests = self._judge.requests(prompts, sampling, seed=self._options.seed)
                self._passed[key] = self._judge.passed(self._decode(plan, requests))
            row = with_passed(row, self._passed[key])
        return row

    def _decode(self, plan: Plan | Planner, requests: Sequence[Request]) -> list[Rollout]:
        """All rollouts of an engine of its own, in the order they end.

        A planner goes on from what it knows; what it learns here is left behind.
        """
        engine = Engine(
            self._policy,
            plan=copy.deepcopy(plan),
            max_batch_size=min(len(requests), max(self._options.batches)),
            max_length=max(len(request.prompt_ids) + request.sampling.max_tokens for request in requests),
        )
        engine.submit(requests)
        finished: list[Rollout] = []
        while engine.num_requests:
            finished.extend(engine.step().finished)
        check_finite(finished)
        return finished


def _interleave(
    subjects: Sequence[Subject],
    failures: dict[tuple[str, str], str],
    prompts: Prompts,
    workload: Workload,
    options: BenchOptions,
) -> dict[tuple[str, str], list[list[Wave]]]:
    """The waves of each subject's repeats, by its key; they take turns wave by wave.

    Who is in `failures` is left out. A peer that fails while it is measured goes in there, with the reason.
    """
    measured: dict[tuple[str, str], list[list[Wave]]] = {_key(subject): [] for subject in subjects}
    # A law that a workload cannot have, such as a mixed one without temperature, has no requests either.
    laws = {subject.law for subject in subjects if _key(subject) not in failures}
    for repeat in range(options.repeats):
        waves_of = {law: make_waves(prompts, workload, repeat, options, law=law) for law in laws}
        for repeats in measured.values():
            repeats.append([])
        for index in range(len(next(iter(waves_of.values()), ()))):
            for subject in subjects:
                if _key(subject) in failures:
                    continue
                try:
                    measured[_key(subject)][-1].append(subject.decode(waves_of[subject.law][index]))
                except PeerFailed as error:
                    failures[_key(subject)] = str(error)
    return measured


def _task(workload: Workload, prompts: Prompts, options: BenchOptions, policy: HFPolicy) -> ReferenceTask:
    """A workload as those that are not blockroll's take it."""
    return ReferenceTask(
        batch=workload.batch,
        longest_prompt=max(map(len, prompts)),
        max_tokens=workload.max_tokens,
        temperature=workload.temperature,
        eos_token_ids=() if options.has_fixed_lengths else tuple(policy.eos_token_ids),
    )


def _drafts(plan: Plan | Planner) -> bool:
    plans = plan.candidates if isinstance(plan, Planner) else (plan,)
    return any(each.num_drafts for each in plans)


def _key(subject: Subject) -> tuple[str, str]:
    return subject.name, subject.law.name


def _warm_up(subject: Subject, prompts: Prompts, workload: Workload, options: BenchOptions) -> str | None:
    if subject.law != TARGET and workload.temperature == 0:
        return f"law {subject.law.name} has no greedy form"
    return subject.warm_up(warm_up_wave(prompts, workload, options, law=subject.law))


def _prompts_of(workload: Workload, prompts: Prompts, options: BenchOptions, policy: HFPolicy) -> Prompts:
    if workload.prompt_tokens is None:
        return prompts
    if options.prompt_source == "text":
        return cut_to_length(prompts, workload.prompt_tokens)
    refused = {policy.mask_token_id, *policy.eos_token_ids}
    return random_prompts(
        NUM_RANDOM_PROMPTS,
        workload.prompt_tokens,
        allowed_ids=[token_id for token_id in range(policy.vocab_size) if token_id not in refused],
        seed=options.seed,
    )
