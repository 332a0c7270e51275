"""Where an engine's texts end: strings by its policy's tokenizer, and nothing before `min_tokens`."""

import pytest

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.types import Plan, Sampling
from tests.engines import make_requests, run
from tests.models import random_policy

PLANS = [Plan(0), Plan(4), Plan(4, (0, 2, 4))]
PROMPTS = [(1, 8 + index) for index in range(6)]
pytestmark = pytest.mark.filterwarnings("ignore:plan fused.* drafts in a layout")


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return HFPolicy.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def letter(policy) -> int:
    (token_id,) = policy.tokenizer("a", add_special_tokens=False)["input_ids"]
    return token_id


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_an_engine_looks_for_stop_strings_in_what_its_policys_own_tokenizer_writes(policy, letter, plan):
    sampling = Sampling(max_tokens=20, stop=("aaa",), logit_bias={letter: 60.0})
    for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
        assert (rollout.token_ids, rollout.finish_reason) == ((letter,) * 3, "stop")
    mask = policy.mask_token_id
    sampling = Sampling(max_tokens=20, stop=("<mask>",), logit_bias={mask: 60.0})  # special tokens are shown
    for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
        assert (rollout.token_ids, rollout.finish_reason) == ((mask,), "stop")


def test_an_engine_without_any_tokenizer_refuses_stop_strings():
    with pytest.raises(InvalidInput, match="'r0' has stop strings, but the engine has no tokenizer"):
        run(random_policy(), make_requests([(5,)], Sampling(stop=("a",))), Plan(0))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("end", ["string", "stop token", "end token"])
def test_nothing_ends_a_text_within_min_tokens_and_what_comes_behind_them_does(policy, letter, plan, end):
    eos = policy.eos_token_ids[0]
    options = {
        "string": {"stop": ("aa",), "logit_bias": {letter: 60.0}},
        "stop token": {"stop_token_ids": (letter,), "logit_bias": {letter: 60.0}},
        "end token": {"logit_bias": {eos: 60.0}},
    }[end]
    for min_tokens in (0, 7):
        sampling = Sampling(max_tokens=20, min_tokens=min_tokens, **options)
        for rollout in run(policy, make_requests(PROMPTS, sampling), plan).values():
            assert rollout.finish_reason == "stop"
            at_once = 2 if end == "string" else 1
            assert len(rollout.token_ids) == (min_tokens + 1 if min_tokens else at_once)
