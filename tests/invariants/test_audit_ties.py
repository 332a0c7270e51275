"""Another machine's rounding decides a cut between near equals otherwise: counted, and no bad row."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from blockroll.rollout.audit import recompute
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.ties import is_cut_close
from blockroll.types import Law, Plan, Sampling
from tests.invariants.test_audit import audited
from tests.models import adapted_policy

pytestmark = pytest.mark.filterwarnings("ignore:plan .* drafts")


def in_pairs(nudge=1.0):
    """A policy whose tokens come in pairs of equal logits, each second one's times `nudge`."""
    policy = adapted_policy("llama")
    head = policy.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        head.weight[1::2] = head.weight[::2] * nudge
    return policy


@pytest.fixture(scope="module")
def policies():
    """One with equal pairs, and the same as another machine might round it."""
    return in_pairs(), in_pairs(1 + 1e-6)


CUTS = {
    "top_k": Sampling(max_tokens=20, top_k=3),
    "top_p": Sampling(max_tokens=20, top_p=0.7),
    "both": Sampling(max_tokens=20, top_k=3, top_p=0.99),
    "mixed": Sampling(max_tokens=20, top_k=3, law=Law(0.5), allow_truncated_mix=True),
    "penalized": Sampling(max_tokens=20, top_k=3, repetition_penalty=1.3, temperature=0.8),
}


@pytest.mark.parametrize("plan", [Plan(0), Plan(4)], ids=lambda plan: plan.name)
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_between_near_equals_is_counted_and_no_bad_row(policies, tmp_path, plan, name):
    policy, other = policies
    _, paths = audited(policy, tmp_path, plan, CUTS[name])
    assert check_audit(paths, policy_of=lambda version: policy).passed
    report = check_audit(paths, policy_of=lambda version: other)
    assert report.problem is None, report.problem
    assert 0 < report.num_near_ties <= report.num_rows


def test_taking_no_cut_for_close_is_caught(policies, tmp_path, monkeypatch):
    """Planted: every cut counts as one that rounding cannot move."""
    monkeypatch.setattr(recompute, "is_cut_close", lambda probs_BV, sampling: np.zeros(len(probs_BV), bool))
    policy, other = policies
    _, paths = audited(policy, tmp_path, Plan(4), CUTS["top_k"])
    assert not check_audit(paths, policy_of=lambda version: other).passed


def test_another_law_is_a_bad_row_where_no_cut_is_close(policies, tmp_path, monkeypatch):
    """Recorded with one more pair of tokens than the file says: between pairs no two are near equals."""
    policy, _ = policies
    _, paths = audited(policy, tmp_path, Plan(4), Sampling(max_tokens=20, top_k=6))
    assert check_audit(paths, policy_of=lambda version: policy).passed
    read = recompute.AuditedRequest.sampling
    monkeypatch.setattr(recompute.AuditedRequest, "sampling", lambda request: replace(read(request), top_k=4))
    assert not check_audit(paths, policy_of=lambda version: policy).passed


@pytest.mark.parametrize(
    ("probs", "options", "expected"),
    [
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2}, False),
        ([0.4, 0.3, 0.29999, 0.00001], {"top_k": 2}, True),
        ([0.4, 0.3, 0.29999, 0.00001], {"top_k": 1}, False),
        ([1.0, 0.0, 0.0, 0.0], {"top_k": 2}, False),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.70001}, True),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.72}, False),
        ([0.4, 0.20001, 0.2, 0.19999], {"top_p": 0.55}, True),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 3, "top_p": 4 / 9}, True),
        ([0.4, 0.3, 0.2, 0.1], {"min_p": 0.50001}, True),
        ([0.4, 0.3, 0.2, 0.1], {"min_p": 0.6}, False),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 4, "top_p": 1.0}, False),
    ],
)
def test_a_cut_is_close_where_two_near_equals_lie_on_its_sides(probs, options, expected):
    assert is_cut_close(np.array([probs]), Sampling(**options)).tolist() == [expected]
