"""Whole engines on Triton's kernels, interpreted: their texts are those of the definitions."""

from dataclasses import replace

import pytest

from blockroll.errors import InvalidInput
from blockroll.kernels import choice
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache import layouts
from blockroll.types import HISTORY, Law, Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import FAMILIES, adapted_policy, prompts

PLANS = {
    "plain": Plan(0),
    "two_forward": Plan(4),
    "fused": Plan(4, (0, 2, 4)),
    "history": Plan(4, drafter=HISTORY),
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
HEAD_DIM = 32  # the least that kernels serve
TARGET, MIXED = Law(1.0), Law(0.6)


def assert_as_defined(policy, plan, requests, **options):
    """Rollouts of kernels are those of the definitions, which never had a choice of another form."""
    options = {"max_batch_size": 8, **options}
    defined = run(policy, requests, plan, cache="pages", kernels="reference", **options)
    assert_same_rollouts(defined, run(policy, requests, plan, kernels="triton", **options), policy)


@pytest.fixture(scope="module")
def tiny():
    return HFPolicy.from_pretrained("tiny")


@pytest.fixture(scope="module")
def adapted():
    return adapted_policy(
        head_dim=HEAD_DIM, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )


def sums(tiny, samplings, count):
    texts = [f"{one}+{one * 3 % 17}-{one % 5}=?\n" for one in range(3, 3 + count)]
    made = make_requests([tuple(tiny.tokenizer(text).input_ids) for text in texts], samplings[0])
    return [replace(each, sampling=samplings[row % len(samplings)]) for row, each in enumerate(made)]


@pytest.mark.parametrize(
    ("plan", "law"),
    [
        ("plain", TARGET),
        ("fused", TARGET),
        ("two_forward", MIXED),
        pytest.param("two_forward", TARGET, marks=pytest.mark.slow),
    ],
    ids=["plain", "fused", "mixed", "two_forward"],
)
def test_texts_of_a_random_policy(adapted, plan, law):
    assert_as_defined(adapted, PLANS[plan], make_requests(prompts(2), Sampling(max_tokens=3, law=law)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:plan fused.* layout this policy was not trained for:UserWarning")
@pytest.mark.parametrize(
    ("plan", "law"),
    [*((plan, TARGET) for plan in PLANS), *((plan, MIXED) for plan in ("two_forward", "fused"))],
)
def test_texts_of_the_tiny_policy(tiny, plan, law):
    """Twenty requests; every other one under top-p, which a mixed law does not know."""
    samplings = [
        Sampling(max_tokens=5, law=law, **({} if law is MIXED else {"top_p": top_p})) for top_p in (1, 0.9)
    ]
    requests = sums(tiny, samplings, 20)
    assert_as_defined(tiny, PLANS[plan], requests, max_batch_size=20)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        pytest.param("two_forward", {"top_p": 0.9}, marks=pytest.mark.slow),
        ("history", {"top_k": 5, "min_p": 0.05}),
        pytest.param("two_forward", {"temperature": 0}, marks=pytest.mark.slow),
        pytest.param("plain", {"repetition_penalty": 1.3}, marks=pytest.mark.slow),
    ],
    ids=["top_p", "top_k_min_p", "greedy", "penalties"],
)
def test_texts_under_other_samplings(adapted, plan, options):
    assert_as_defined(adapted, PLANS[plan], make_requests(prompts(2), Sampling(max_tokens=4, **options)))


@pytest.mark.slow
@EACH_PLAN
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, plan):
    policy = adapted_policy(family, head_dim=HEAD_DIM)
    assert_as_defined(policy, plan, make_requests(prompts(4), Sampling(max_tokens=8)))


def test_requests_that_join_late_and_share_beginnings(adapted):
    """Fewer slots than requests, chunks of prompts, beginnings in pages of others."""
    beginning = prompts(1, seed=3, longest=12)[0] * 2
    requests = make_requests([(*beginning, *prompt) for prompt in prompts(3)], Sampling(max_tokens=2))
    assert_as_defined(adapted, PLANS["plain"], requests, max_batch_size=2, prefill_chunk=11, page_size=16)


def test_forwards_in_few_shapes_and_steps_read_late(adapted):
    requests = make_requests(prompts(2), Sampling(max_tokens=3))
    assert_as_defined(adapted, PLANS["plain"], requests, graphs="buckets", overlap="on")


def test_outside_of_an_engines_work_nothing_is_chosen(adapted):
    engine = Engine(adapted, plan=Plan(0), kernels="triton")
    engine.submit(make_requests(prompts(1), Sampling(max_tokens=2)))
    while engine.num_requests:
        engine.step()
        assert not choice.is_triton()
    assert str(engine.kernels).startswith("triton (Triton ")
    assert str(engine.kernels).endswith(", interpreted)")


def test_slots_are_refused(adapted):
    with pytest.raises(InvalidInput, match="kernels is 'triton', which reads keys in pages; set cache to"):
        Engine(adapted, plan=Plan(0), kernels="triton", cache="slots")


def test_heads_that_no_kernel_serves_are_refused_before_anything_runs():
    narrow = adapted_policy()
    with pytest.raises(InvalidInput, match="kernels is 'triton', and pages have 16 rows of heads of width 8"):
        Engine(narrow, plan=Plan(0), kernels="triton")


def test_auto_says_why_it_does_without_kernels(monkeypatch):
    """On a GPU, that is; here a device is taken for one."""
    monkeypatch.setattr(layouts, "choose", lambda kernels, device: choice.Chosen("triton", "a GPU"))
    engine = Engine(adapted_policy(), plan=Plan(0), kernels="auto", cache="pages")
    assert engine.kernels.form == "reference"
    assert "heads of width 8" in engine.kernels.reason
    in_slots = Engine(adapted_policy(head_dim=HEAD_DIM), plan=Plan(0), kernels="auto", cache="slots")
    assert str(in_slots.kernels) == "triton (a GPU; attention by torch, because the cache is in slots)"


def test_a_vocabulary_that_no_kernel_serves_is_refused_before_anything_runs(adapted, monkeypatch):
    monkeypatch.setattr(layouts, "LARGEST_VOCABULARY", 10)
    with pytest.raises(InvalidInput, match="the vocabulary has 24 tokens; Triton's kernels serve 10 at most"):
        Engine(adapted, plan=Plan(0), kernels="triton")
