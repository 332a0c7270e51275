"""A drafter that the package does not have, through the engine's one seam: tokens looked up in a list."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.rollout.audit.check import check_audit
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.drafting import Drafter
from blockroll.rollout.engine.engine import BareEngine
from blockroll.types import POINT_MASS, Draft, Law, Plan, PlanKind, Sampling
from tests.engines import PlansInTurn, causal_logprobs, make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import adapted_policy, prompts

FIXED = Plan(3, drafter="fixed")


class FixedTokens(Drafter):
    """Drafts what follows the last token in a list, as a history of other texts would."""

    name = "fixed"

    def __init__(self, token_ids):
        self.token_ids = list(token_ids)

    def propose(self, step):
        drafts = [self._behind(running.anchor)[: step.plan.num_drafts] for running in step.batch]
        padded = [[*each, *[0] * (step.plan.num_drafts - len(each))] for each in drafts]
        return Draft(
            token_ids_BK=torch.tensor(padded, dtype=torch.int64),
            law=POINT_MASS,
            num_drafts_B=torch.tensor([len(each) for each in drafts]),
        )

    def _behind(self, token_id):
        return self.token_ids[self.token_ids.index(token_id) + 1 :] if token_id in self.token_ids else []


def greedy(policy, plan, *drafters, max_tokens=24):
    requests = make_requests(prompts(4), Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    return run(policy, requests, plan, drafters=drafters)


def test_looked_up_tokens_are_verified_without_a_law_in_sight():
    policy = adapted_policy()
    plain = greedy(policy, Plan(0))
    drafter = FixedTokens(plain["r0"].token_ids)
    drafted = greedy(policy, FIXED, drafter)
    assert_same_rollouts(plain, drafted, policy)
    assert sum(rollout.stats.num_accepted for rollout in drafted.values()) > 0


def test_a_plan_of_another_drafter_says_its_kind_and_its_name():
    assert (FIXED.kind, FIXED.name, FIXED.forwards_per_step, FIXED.rows_per_forward) == (
        PlanKind.ONE_FORWARD,
        "fixed(3)",
        1,
        4,
    )
    assert Plan(3) != FIXED
    with pytest.raises(InvalidInput, match="levels belong to fused plans"):
        Plan(3, (0, 3), drafter="fixed")


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_drafters_take_turns_and_every_token_is_the_policys_own(weight):
    """Looked-up drafts have no rows, so a mixed law mixes at the steps of the masks alone."""
    policy = adapted_policy()
    sampling = Sampling(max_tokens=24, ignore_eos=True, law=Law(weight))
    turns = PlansInTurn(FIXED, Plan(3, (0, 3)), FIXED, Plan(3))
    finished = run(
        policy, make_requests(prompts(4), sampling), turns, drafters=[FixedTokens(range(policy.vocab_size))]
    )
    for rollout in finished.values():
        want = causal_logprobs(policy, rollout)
        assert torch.allclose(torch.tensor(rollout.policy_logprobs).double(), want, atol=1e-4)
        assert weight < 1 or rollout.behavior_logprobs == rollout.policy_logprobs


def test_an_audit_of_looked_up_drafts_passes_at_both_levels(tmp_path):
    policy = adapted_policy()
    requests = make_requests(prompts(4), Sampling(max_tokens=24, ignore_eos=True))
    plans = PlansInTurn(FIXED, Plan(3))
    run(
        policy,
        requests,
        plans,
        drafters=[FixedTokens(range(policy.vocab_size))],
        observers=[AuditWriter(tmp_path)],
    )
    report = check_audit(sorted(tmp_path.glob("*.parquet")), policy_of=lambda version: policy)
    assert report.problem is None
    assert report.num_rows == 4 * 24


def test_a_plan_whose_drafter_was_not_handed_in_is_refused():
    policy = adapted_policy()
    with pytest.raises(InvalidInput, match="asks for the drafter 'fixed', and this engine has 'mask_rows'"):
        Engine(policy, plan=FIXED)
    with pytest.raises(InvalidInput, match="asks for the drafter 'mask_rows', and this engine has none"):
        BareEngine(policy, plan=Plan(3))
    BareEngine(policy, plan=Plan(0))


def test_two_drafters_of_one_name_are_refused():
    with pytest.raises(InvalidInput, match="two drafters are called 'fixed'"):
        Engine(adapted_policy(), plan=FIXED, drafters=[FixedTokens([4]), FixedTokens([5])])
