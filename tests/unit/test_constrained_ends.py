"""A completion under a constraint ends where the constraint allows it, whoever would end it."""

import re

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR, load_model, load_tokenizer
from blockroll.rollout.engine.running import StopRule
from blockroll.samplers.constraints import JsonSchema, Regex
from blockroll.types import Plan, Sampling
from tests import engines
from tests.engines import make_requests

pytestmark = pytest.mark.filterwarnings("ignore:plan fused.* drafts in a layout")
PLANS = [Plan(0), Plan(4), Plan(4, (0, 4))]
PATTERN = "[ab]{4}\n[ab]{2,4}"
PROMPTS = [(6 + index,) for index in range(8)]


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    """A chat policy: its turns end with a token that only the tokenizer names."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.eos_token = "<mask>"
    made = HFPolicy(load_model(TINY_POLICY_DIR, device="cpu"), tokenizer)
    assert set(made.eos_token_ids) == {2, tokenizer.eos_token_id}
    return made


def matches(policy, rollout, pattern=PATTERN):
    return re.fullmatch(pattern, policy.tokenizer.decode(rollout.token_ids, skip_special_tokens=True))


def run(policy, requests, plan):
    return engines.run(policy, requests, plan, decode=policy.decode)


def encoded(policy, text):
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_every_end_token_ends_a_constrained_text_once_and_only_where_it_is_complete(policy, plan):
    for end in policy.eos_token_ids:
        sampling = Sampling(constraint=Regex(PATTERN), max_tokens=30, logit_bias={end: 30.0})
        for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
            assert rollout.finish_reason == "stop"
            assert matches(policy, rollout)
            assert rollout.token_ids[7:] == (end,)  # at once where it may end
            assert not {*rollout.token_ids[:-1]} & {*policy.eos_token_ids}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("stop", [{"stop": ("\n",)}, {"stop": ("a",)}, {"stop_token_ids": (14,)}, "newline"])
def test_stop_strings_and_stop_tokens_end_a_constrained_text_only_where_it_is_complete(policy, plan, stop):
    if stop == "newline":
        stop = {"stop_token_ids": tuple(encoded(policy, "\n"))}
    sampling = Sampling(constraint=Regex(PATTERN), max_tokens=30, **stop)
    for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
        assert rollout.finish_reason == "stop"
        assert matches(policy, rollout)


def test_a_stop_string_ends_a_text_as_soon_as_the_constraint_accepts_it(policy):
    (a,) = encoded(policy, "a")
    sampling = Sampling(constraint=Regex("[ab]{3}[ab]*"), max_tokens=30, stop=("a",), logit_bias={a: 50.0})
    (rollout,) = run(policy, make_requests([(7,)], sampling), PLANS[1]).values()
    assert policy.decode(list(rollout.token_ids)) == "aaa"


def test_a_special_stop_token_ends_a_complete_text_and_no_other(policy):
    pad = policy.tokenizer.pad_token_id
    sampling = Sampling(
        constraint=Regex(PATTERN), max_tokens=30, stop_token_ids=(pad,), logit_bias={pad: 30.0}
    )
    for plan in PLANS:
        for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
            assert rollout.token_ids[7:] == (pad,)
            assert matches(policy, rollout)


@pytest.mark.parametrize("constraint", [Regex(r"[\s\S]*"), Regex(".{5}"), JsonSchema({"type": "string"})])
def test_special_tokens_are_never_text(policy, constraint):
    start = constraint.start(policy.vocab_size, policy.tokenizer, frozenset({2}))
    allowed_V = start.allowed((), 0)[0]
    assert not allowed_V[[i for i in policy.tokenizer.all_special_ids if i != 2]].any()
    assert bool(allowed_V[2]) == (constraint == Regex(r"[\s\S]*"))


def test_without_the_rule_a_stop_string_would_cut_a_text_that_is_not_complete(policy, monkeypatch):
    monkeypatch.setattr(StopRule, "_may_end", lambda self, new, guide: True)
    sampling = Sampling(constraint=Regex(PATTERN), max_tokens=30, stop=("a",))
    rollouts = run(policy, make_requests(PROMPTS, sampling), PLANS[0]).values()
    assert not all(matches(policy, rollout) for rollout in rollouts)


def test_a_tokenizer_that_the_grammar_cannot_read_is_refused_by_name():
    class Slow:
        all_special_ids = ()

    with pytest.raises(InvalidInput, match="need a tokenizer that llguidance reads, got Slow"):
        Regex("a").start(10, Slow(), frozenset({1}))


def test_every_end_token_ends_a_free_text(policy):
    for end in policy.eos_token_ids:
        sampling = Sampling(max_tokens=30, logit_bias={end: 50.0})
        for plan in PLANS:
            (rollout,) = run(policy, make_requests([(7,)], sampling), plan).values()
            assert (rollout.token_ids, rollout.finish_reason) == ((end,), "stop")
