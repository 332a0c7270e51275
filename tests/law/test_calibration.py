"""Bets of an engine on its own tokens: silent while laws hold, loud under each planted fault.

Each fault is planted in a real engine, and the functional that must see it is named beside it.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from blockroll.rl_loops.watch.e_process import EProcess
from blockroll.rollout.calibration import observer as observer_module
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.calibration.observer import FIGURES, FUNCTIONALS, Calibration
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine.trace import Watcher
from blockroll.types import Law, Plan, Sampling
from tests.engines import make_requests, run
from tests.faults import (
    coin_of_the_rejected_draft_again,
    coin_that_drew_the_draft_accepts_it,
    draft_law_of_another_temperature,
    logprobs_of_another_temperature,
    residual_is_the_target,
    tokens_of_a_truncated_law,
)
from tests.models import adapted_policy, prompts

ALPHA = 1e-6
SAMPLING = Sampling(max_tokens=24, temperature=1.0)
HOT = dataclasses.replace(SAMPLING, draft_temperature=0.5)
PLANS = [Plan(0), Plan(3), Plan(3, (0, 1, 3)), Plan(3, drafter="history")]


@pytest.fixture(scope="module")
def policy():
    """Its drafts are far from its own law, so that both halves of the rule are at work."""
    return adapted_policy("llama", scale=1.0)


def evidence(policy, plan, sampling=SAMPLING, *, seeds=1, count=64):
    """An e-process of each functional, over all steps of some runs."""
    processes = {name: EProcess() for name in FUNCTIONALS}
    calibration = Calibration()
    drafters = [HistoryDrafts(max_tokens=10_000)] if plan.drafter == "history" else []
    for seed in range(seeds):
        requests = make_requests(prompts(count, seed=seed), sampling, seed=seed)
        watcher = Watcher(calibration, every=1)
        run(policy, requests, plan, observers=[watcher], drafters=drafters, max_batch_size=count)
        for name, bets in calibration.take().bets.items():
            processes[name].add(bets)
    return processes


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        HOT,
        dataclasses.replace(SAMPLING, temperature=0.7, top_p=0.9),
        dataclasses.replace(SAMPLING, law=Law(0.5)),
        dataclasses.replace(SAMPLING, temperature=0.0),
    ],
    ids=["lossless", "hot drafts", "truncated", "mixed", "greedy"],
)
def test_an_engine_that_keeps_its_laws_is_not_accused(policy, plan, sampling):
    processes = evidence(policy, plan, sampling)
    assert {name for name, each in processes.items() if each.log_e_max > math.log(1 / ALPHA)} == set()
    seen = {name for name, each in processes.items() if each.num_values}
    assert {"surprisal", "tail", "coins"} <= seen
    if plan.num_drafts and plan.drafter != "history" and sampling.temperature:
        assert seen == set(FUNCTIONALS)
    for name in seen:
        excess, count = processes[name].excess, processes[name].num_values
        assert abs(excess) / count < 5 / math.sqrt(count) + 2e-4, name


FUSED = Plan(3, (0, 1, 3))
FAULTS = [
    (residual_is_the_target, "draft_set", FUSED, SAMPLING),
    (residual_is_the_target, "rejected", FUSED, SAMPLING),
    (residual_is_the_target, "draft_set", FUSED, dataclasses.replace(SAMPLING, law=Law(0.5))),
    (logprobs_of_another_temperature, "surprisal", FUSED, SAMPLING),
    (draft_law_of_another_temperature, "draft", FUSED, HOT),
    (coin_of_the_rejected_draft_again, "residual", FUSED, SAMPLING),
    (coin_that_drew_the_draft_accepts_it, "reused", FUSED, SAMPLING),
    (tokens_of_a_truncated_law, "tail", Plan(0), dataclasses.replace(SAMPLING, temperature=0.5)),
]


@pytest.mark.parametrize(
    ("fault", "functional", "plan", "sampling"),
    FAULTS,
    ids=lambda each: str(getattr(each, "__name__", "") or each)[:40],
)
def test_a_planted_fault_is_found_by_the_functional_that_must_see_it(
    policy, monkeypatch, fault, functional, plan, sampling
):
    fault(monkeypatch.setattr)
    process = evidence(policy, plan, sampling, seeds=4, count=256)[functional]
    assert process.log_e_max > math.log(1 / ALPHA), f"{process.num_values} values, excess {process.excess}"


def test_a_functional_that_claims_too_much_accuses_an_engine_that_keeps_its_laws(policy, monkeypatch):
    monkeypatch.setattr(
        observer_module, "_mean_surprisal", lambda rows_NV: (rows_NV * rows_NV).sum(1) * 0 + 0.2
    )
    with pytest.raises(AssertionError):
        test_an_engine_that_keeps_its_laws_is_not_accused(policy, FUSED, SAMPLING)


def test_a_watcher_is_told_of_one_step_in_so_many_and_changes_no_token(policy):
    requests = make_requests(prompts(6), SAMPLING)
    told = []
    observed = run(policy, requests, Plan(0), observers=[Watcher(told.append, every=8)])
    alone = run(policy, requests, Plan(0))
    assert {name: each.token_ids for name, each in observed.items()} == {
        name: each.token_ids for name, each in alone.items()
    }
    assert len(told) == math.ceil(SAMPLING.max_tokens / 8)
    assert not Calibration().take().bets


def test_figures_of_looked_at_rows_are_those_of_the_formulae(policy):
    traces = []
    requests = make_requests(prompts(40), SAMPLING)
    run(policy, requests, Plan(3, (0, 3)), observers=[traces.append], max_batch_size=40)
    seen = Evidence()
    want = {name: [] for name in FIGURES}
    for trace in traces:
        calibration = Calibration(seed=5)
        calibration(trace)
        seen += calibration.take()
        offsets_B = np.random.Generator(np.random.Philox(5)).integers(0, trace.draft.num_drafts_B.numpy() + 1)
        for b, offset in enumerate(offsets_B):
            if offset >= int(trace.verdict.num_committed_B[b]):
                continue
            target_V, token = trace.target_probs_BLV[b, offset], trace.verdict.token_ids_BL[b, offset]
            want["target_entropy"].append(-(target_V * target_V.log()).sum())
            if offset < int(trace.draft.num_drafts_B[b]):
                draft_V = trace.draft.law.dense()[b, offset]
                want["draft_tv"].append(1 - torch.minimum(target_V, draft_V).sum())
                want["draft_kl"].append((target_V * (target_V / draft_V).log()).sum())
                want["target_surprisal"].append(-target_V[token].log())
                want["draft_surprisal"].append(-draft_V[token].log())
    for name, values in want.items():
        total, count = seen.sums[name]
        assert count == len(values) > 50, name
        assert total == pytest.approx(float(sum(values)), rel=1e-9), name
    assert seen.sums["draft_tv"][0] / seen.sums["draft_tv"][1] > 0.05
