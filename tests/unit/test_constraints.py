"""Regular expressions and JSON schemas: guides, real rollouts against whole parses, and the door."""

import dataclasses
import json
import pickle
import re

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.samplers.constraints import JsonSchema, Regex
from blockroll.types import Plan, Request, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts

pytestmark = pytest.mark.filterwarnings("ignore:plan fused.* drafts in a layout")
PLANS = [Plan(0), Plan(4), Plan(4, (0,)), Plan(4, (0, 4))]
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return HFPolicy.from_pretrained("tiny")


def start(policy, constraint):
    return constraint.start(policy.vocab_size, policy.tokenizer, frozenset(policy.eos_token_ids))


def ids(policy, text: str) -> list[int]:
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def is_valid(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    return (
        len(value["name"]) <= 8
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "bb"}
    )


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_output_matches_in_every_plan(policy, plan):
    """An output cut by its length counts as invalid."""
    prompts = [(6 + index % 50,) for index in range(12)]
    dates = Sampling(constraint=Regex(DATE), max_tokens=40)
    for rollout in run(policy, make_requests(prompts, dates), plan).values():
        assert rollout.finish_reason == "stop", rollout
        assert re.fullmatch(DATE, policy.decode(list(rollout.token_ids[:-1])))
    objects = Sampling(constraint=JsonSchema(SCHEMA), max_tokens=200, temperature=1.5)
    for rollout in run(policy, make_requests(prompts, objects, seed=1), plan).values():
        assert rollout.finish_reason == "stop", rollout
        assert is_valid(policy.decode(list(rollout.token_ids[:-1])))


@pytest.mark.parametrize("plan", PLANS[1:3], ids=lambda plan: plan.name)
def test_what_the_grammar_forces_is_committed_in_whole_blocks(policy, plan):
    """Drafts are masked by the drafts before them, so forced text is drafted right by any policy."""
    forced = "the answer to this question is: "
    sampling = Sampling(constraint=Regex(forced + "[0-9]{2}"), max_tokens=60)
    (rollout,) = run(policy, make_requests([(6,)], sampling), plan).values()
    assert re.fullmatch(forced + "[0-9]{2}", policy.decode(list(rollout.token_ids)))
    drafted = plan.num_drafts if plan.layout == "fused" else plan.num_drafts + 1
    blocks = -(-len(forced) // drafted)
    assert sum(count for _, count in rollout.stats.steps_by_plan) <= blocks + 3


def test_constrained_and_free_requests_share_a_batch(policy):
    free, bound = Sampling(max_tokens=30), Sampling(max_tokens=30, constraint=Regex(DATE))
    mixed = [
        Request(request_id=f"r{index}", prompt_ids=(7,), seed=index, sampling=bound if index % 2 else free)
        for index in range(6)
    ]
    together = run(policy, mixed, Plan(4))
    alone = {}
    for request in mixed:
        alone |= run(policy, [request], Plan(4))
    assert_same_rollouts(alone, together, policy)


def test_a_request_resumes_in_the_middle_of_its_text(policy):
    sampling = Sampling(constraint=Regex(DATE), max_tokens=40)
    (request,) = make_requests([(7,)], sampling)
    (whole,) = run(policy, [request], Plan(0)).values()
    cut = dataclasses.replace(
        whole.as_prefix(),
        token_ids=whole.token_ids[:4],
        policy_logprobs=whole.policy_logprobs[:4],
        behavior_logprobs=whole.behavior_logprobs[:4],
        policy_versions=whole.policy_versions[:4],
    )
    (rollout,) = run(policy, [dataclasses.replace(request, prefix=cut)], Plan(4)).values()
    assert re.fullmatch(DATE, policy.decode(list(rollout.token_ids[:-1])))
    wrong = dataclasses.replace(cut, token_ids=tuple(ids(policy, "2x24")))
    with pytest.raises(InvalidInput, match="a prefix to resume from must satisfy"):
        run(policy, [dataclasses.replace(request, prefix=wrong)], Plan(4))


@pytest.mark.parametrize("constraint", [Regex(DATE), JsonSchema(SCHEMA)])
def test_a_constraint_travels_to_another_process(policy, constraint):
    (request,) = make_requests([(7,)], Sampling(constraint=constraint, max_tokens=60))
    arrived = pickle.loads(pickle.dumps(request))
    assert arrived == request
    assert_same_rollouts(*(run(policy, [each], Plan(4)) for each in (request, arrived)), policy)


def test_a_guide_walks_along_drafts_and_back(policy):
    guide = start(policy, Regex("ab(c|d)"))
    a, b, c, d = ids(policy, "abcd")
    (end,) = policy.eos_token_ids
    rows = guide.allowed([a, b, c, end], 0)
    assert [row.nonzero().flatten().tolist() for row in rows] == [[a], [b], sorted([c, d]), [end], [end]]
    assert torch.equal(guide.allowed([a, b, c, end], 2), rows[2:])
    assert torch.equal(guide.allowed([], 0), rows[:1])
    assert len(guide.allowed([a, c, b], 0)) == 2  # nothing is reached behind a draft that is not allowed
    guide.advance([a])
    assert torch.equal(guide.allowed([b], 0), rows[1:3])
    with pytest.raises(InvalidInput, match="is not allowed by the constraint"):
        guide.advance([d])


def test_past_an_ignored_end_only_end_tokens_follow(policy):
    sampling = Sampling(constraint=Regex("ab"), max_tokens=6, ignore_eos=True)
    for plan in PLANS:
        (rollout,) = run(policy, make_requests([(7,)], sampling), plan).values()
        assert rollout.token_ids == (*ids(policy, "ab"), *policy.eos_token_ids * 4)


def test_rows_past_the_tokenizer_are_never_allowed(policy):
    guide = Regex(".*").start(policy.vocab_size + 37, policy.tokenizer, frozenset(policy.eos_token_ids))
    mask = guide.allowed((), 0)[0]
    assert len(mask) == policy.vocab_size + 37
    assert mask.any()
    assert not mask[policy.vocab_size :].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex("a("), "regular expression 'a\\(' cannot be used"),
        (lambda: Regex("[^\\s\\S]"), "cannot be (used|satisfied)"),
        (lambda: JsonSchema("{"), "a JSON schema must be JSON"),
        (lambda: JsonSchema({"type": "nonsense"}), "JSON schema .* cannot be used"),
        (
            lambda: JsonSchema({"type": "string", "minLength": 5, "maxLength": 2}),
            "cannot be (used|satisfied)",
        ),
    ],
)
def test_a_grammar_that_is_none_or_cannot_be_satisfied_is_refused_at_the_door(policy, make, message):
    with pytest.raises(InvalidInput, match=message):
        run(policy, make_requests([(7,)], Sampling(constraint=make())), Plan(0))


def test_a_policy_without_tokenizer_or_end_is_refused(policy):
    with pytest.raises(InvalidInput, match="the policy has no tokenizer"):
        Regex("a").start(10, None, frozenset({1}))
    with pytest.raises(InvalidInput, match="needs an end token"):
        Regex("a").start(policy.vocab_size, policy.tokenizer, frozenset())


def test_empty_support_after_truncation_with_a_constraint_keeps_the_constraint(policy):
    """Masks come first: the best token that is allowed always stays."""
    sampling = Sampling(constraint=Regex(DATE), top_k=1, top_p=0.1, min_p=1.0, max_tokens=20)
    (rollout,) = run(policy, make_requests([(7,)], sampling), Plan(4)).values()
    assert re.fullmatch(DATE, policy.decode(list(rollout.token_ids[:-1])))
