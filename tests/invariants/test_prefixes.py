"""Keys and values that one text takes over from another: the same law, fewer rows."""

import random

import pytest
import torch

from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine import admission
from blockroll.rollout.engine.cache.contract import ROW_STEP
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.cache.slots import SlotCache
from blockroll.rollout.engine.prefill import lay_out
from blockroll.types import Plan, Request, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.models import EOS_ID, FAMILIES, adapted_policy
from tests.params import slow_beyond

PLANS = pytest.mark.parametrize(
    "plan", [Plan(0), Plan(4), Plan(4, (0, 2, 4))], ids=["plain", "two_forward", "fused"]
)
IN_BOTH = pytest.mark.usefixtures("layout")
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)


@pytest.fixture
def policy():
    return adapted_policy()


@pytest.fixture
def forwards(policy, monkeypatch):
    """Each forward of the policy: its name, and the tokens it was given, padding included."""
    seen = []

    def counting(name, real):
        def forward(ids, *arguments):
            seen.append((name, ids.numel()))
            return real(ids, *arguments)

        return forward

    for name in ("prefill", "draft_logits", "verify_logits", "fused_rows"):
        monkeypatch.setattr(policy, name, counting(name, getattr(policy, name)))
    return seen


def text(length, *, seed=0):
    rng = random.Random(seed)
    return tuple(rng.choice(range(4, 24)) for _ in range(length))


def finish(engine, requests):
    engine.submit(requests)
    finished = {}
    while engine.num_requests:
        finished.update((rollout.request.request_id, rollout) for rollout in engine.step().finished)
    return finished


def assert_cache_is_cold(policy, engine):
    """What is held of every text equals a fresh prefill of the same tokens."""
    cache = engine._cache
    cache.check_integrity()
    for source in sources_of(cache):
        ids = torch.tensor(cache.tokens(source))
        if not len(ids):
            continue
        fresh = SlotCache(policy, num_slots=1, capacity=len(ids))
        policy.prefill(ids[None], fresh.window(0, 1, len(ids)))
        fresh.commit(0, [ids.tolist()])
        for mine, cold in zip(cache.committed(source), fresh.committed(0), strict=True):
            torch.testing.assert_close(mine, cold, atol=1e-4, rtol=1e-4)


def sources_of(cache):
    """Open slots, and all texts that are kept."""
    if isinstance(cache, PagedCache):
        return [*range(cache.num_open), *cache._kept]
    return range(cache.num_slots)


@IN_BOTH
def test_a_group_computes_its_prompt_and_its_first_draft_rows_once(policy, forwards):
    prompts = [text(30, seed=1)] * 4 + [text(21, seed=2)] * 4
    finished = finish(Engine(policy, plan=Plan(4)), make_requests(prompts, SAMPLING))
    assert forwards[:2] == [("draft_logits", 2 * 30), ("verify_logits", 8 * 4)]
    assert all(name != "prefill" for name, _ in forwards)
    stats = [finished[f"r{index}"].stats for index in range(8)]
    assert [each.num_prefilled for each in stats] == [29, 0, 0, 0, 20, 0, 0, 0]
    assert [each.num_reused for each in stats] == [0, 29, 29, 29, 0, 20, 20, 20]


@IN_BOTH
@PLANS
def test_the_next_turn_of_a_text_computes_only_what_is_new(policy, forwards, plan):
    engine = Engine(policy, plan=plan)
    first = finish(engine, make_requests([text(20 + 5 * index, seed=index) for index in range(4)], SAMPLING))
    forwards.clear()
    answer = text(6, seed=9)
    prompts = [(*each.request.prompt_ids, *each.token_ids, *answer) for each in first.values()]
    later = finish(engine, make_requests(prompts[::-1], SAMPLING, seed=1))
    # The last token of a turn and the answer have no rows yet; the last of the answer is the anchor.
    assert forwards[0] == ("draft_logits", 4 * (len(answer) + 1))
    assert {each.stats.num_prefilled for each in later.values()} == {len(answer)}
    cold = finish(Engine(policy, plan=plan), make_requests(prompts[::-1], SAMPLING, seed=1))
    assert_same_rollouts(later, cold, policy)


@PLANS
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_begin_together_get_the_tokens_of_texts_that_join(family, plan, monkeypatch):
    """Their first step starts from logits of the prefill, of texts much longer and shorter than others."""
    policy = adapted_policy(family)
    prompts = [text(length, seed=length) for length in (30, 2, 30, 17, 9, 2)]
    requests = make_requests(prompts, SAMPLING)
    together = finish(Engine(policy, plan=plan), requests)
    first = together["r0"].stats
    assert (first.num_prefilled, together["r2"].stats.num_prefilled) == (29, 0)
    monkeypatch.setattr(admission, "lay_out", apart)
    joined = finish(Engine(policy, plan=plan), requests)
    near_ties = assert_same_rollouts(together, joined, policy)
    assert near_ties or together["r0"].stats == joined["r0"].stats


def apart(chunk, bound, *, num_masks):
    return lay_out(chunk, bound)


@IN_BOTH
def test_a_long_text_among_held_ones_is_computed_alone(policy, forwards):
    """One forward for all would give each of them as many rows as it needs."""
    engine = Engine(policy, plan=Plan(4))
    turns = [text(30, seed=seed) for seed in range(6)]
    finish(engine, make_requests(turns, SAMPLING))
    forwards.clear()
    finish(engine, make_requests([*turns, text(60, seed=9)], SAMPLING))
    assert forwards[:2] == [("prefill", 59), ("draft_logits", 7)]


@PLANS
@pytest.mark.parametrize("family", slow_beyond(3, FAMILIES))
def test_whatever_comes_and_goes_held_rows_equal_a_cold_prefill(family, plan):
    come_and_go(family, plan)


@PLANS
@pytest.mark.parametrize("layout", ["pages"], indirect=True)
def test_in_pages_too_whatever_comes_and_goes_held_rows_equal_a_cold_prefill(layout, plan):
    come_and_go("llama", plan, num_turns=20)


def come_and_go(family, plan, *, num_turns=40):
    policy, rng = adapted_policy(family), random.Random(0)
    engine = Engine(policy, plan=plan, max_batch_size=5)
    roots, known = [text(20, seed=seed) for seed in range(3)], []
    num_reused = 0
    for turn in range(num_turns):
        parent = rng.choice([*roots, *known[-6:]])
        kept = rng.choice([len(parent), rng.randrange(len(parent))])
        prompt = (*parent[:kept], *text(1 + rng.randrange(8), seed=100 + turn))[:70]
        request = Request(
            request_id=f"{turn}",
            prompt_ids=prompt,
            seed=turn,
            sampling=Sampling(max_tokens=rng.randrange(1, 16), ignore_eos=True),
        )
        engine.submit([request])
        if turn % 7 == 6:
            engine.abort([rng.choice(engine._scheduler.running or ("none",))])
        for rollout in engine.step().finished:
            known.append((*rollout.request.prompt_ids, *rollout.token_ids))
            num_reused += rollout.stats.num_reused
        assert_cache_is_cold(policy, engine)
    assert num_reused > num_turns * ROW_STEP // 8


@IN_BOTH
def test_nothing_is_taken_over_from_weights_that_have_changed():
    policy = adapted_policy()
    engine = Engine(policy, plan=Plan(4))
    requests = make_requests([text(30)] * 3, SAMPLING)
    finish(engine, requests)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)
    engine.recompute_cache()
    warm = finish(engine, requests)
    cold = finish(Engine(policy, plan=Plan(4)), requests)
    assert_same_rollouts(warm, cold, policy)
    assert [warm[f"r{index}"].stats.num_reused for index in range(3)] == [0, 29, 29]


def test_rows_of_old_weights_would_be_noticed(monkeypatch):
    """The check above can fail: a cache that forgets nothing gives other log-probabilities."""
    monkeypatch.setattr(SlotCache, "invalidate", lambda self: self.close(0))
    with pytest.raises(AssertionError):
        test_nothing_is_taken_over_from_weights_that_have_changed()


@IN_BOTH
def test_rows_of_a_failed_request_are_never_taken_over(policy):
    engine = Engine(policy, plan=Plan(0))
    weight = policy.model.get_input_embeddings().weight
    kept = weight[7].clone()
    prompt = (*[each for each in text(30) if each != 7], 7, 9)
    with torch.no_grad():
        weight[7] = float("nan")
        (failed,) = finish(engine, make_requests([prompt], SAMPLING)).values()
        assert failed.finish_reason == "error"
        weight[7] = kept
    (whole,) = finish(engine, make_requests([prompt], SAMPLING)).values()
    assert whole.finish_reason == "length"
    assert whole.stats.num_reused == 0


@IN_BOTH
def test_a_long_text_beside_a_reused_one_finds_room(policy):
    """Every text gets as many new rows as the one that lacks most: a long prefix must leave room for them."""
    engine = Engine(policy, plan=Plan(0))
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    finish(engine, make_requests([text(88)], sampling))
    prompts = [(*text(88)[:60], *text(8, seed=3)), text(88, seed=5)]
    warm = finish(engine, make_requests(prompts, sampling))
    cold = finish(Engine(policy, plan=Plan(0)), make_requests(prompts, sampling))
    assert_same_rollouts(warm, cold, policy)
    assert_cache_is_cold(policy, engine)


@IN_BOTH
def test_an_end_token_inside_a_block_ends_what_is_held(policy):
    engine = Engine(policy, plan=Plan(4, (0, 2, 4)), max_batch_size=8)
    finished = finish(engine, make_requests([text(20, seed=seed) for seed in range(24)], Sampling()))
    assert sum(rollout.token_ids[-1] == EOS_ID for rollout in finished.values()) > 5
    assert_cache_is_cold(policy, engine)


@IN_BOTH
def test_memory_that_is_given_back_holds_nothing(policy, forwards):
    engine = Engine(policy, plan=Plan(0))
    for _ in range(2):
        finish(engine, make_requests([text(30)], SAMPLING))
        engine.release_memory()
    assert [num_tokens for name, num_tokens in forwards if name == "draft_logits"] == [30, 30]
