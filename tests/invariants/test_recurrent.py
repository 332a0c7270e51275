"""A policy whose layers carry a state: whatever is drafted, shared, dropped or begun anew, no token tells.

Planted versions of what goes wrong in other engines, each by itself, must be noticed.
"""

import dataclasses
import itertools
import random

import pytest
import torch

from blockroll.kernels.block_attention import Packing
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.contract import Cache
from blockroll.rollout.engine.cache.layouts import open_slots
from blockroll.rollout.engine.cache.state import SlotStates
from blockroll.types import Plan, Request, Sampling
from tests.engines import PlansInTurn, make_requests, run
from tests.equality import assert_same_rollouts
from tests.recurrent_policy import RecurrentPolicy

PLAIN, TWO_FORWARD, HISTORY = Plan(0), Plan(3), Plan(4, drafter="history")
FUSED = [Plan(3, levels) for levels in [(0,), (0, 2), (0, 1, 2, 3)]]
DRAFTING = [TWO_FORWARD, *FUSED, HISTORY]
PLANS = pytest.mark.parametrize("plan", [PLAIN, TWO_FORWARD, FUSED[1], HISTORY], ids=lambda plan: plan.name)
MASKS = pytest.mark.parametrize("plan", [TWO_FORWARD, FUSED[1]], ids=lambda plan: plan.name)
GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def policy():
    return RecurrentPolicy()


def text(length: int, *, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.choice(range(4, 16)) for _ in range(length))


def prompts() -> list[tuple[int, ...]]:
    """Groups, prompts that begin alike, and one of a single token."""
    root = text(40, seed=1)
    return [root, root, (*root[:35], 5, 6), text(3, seed=2), text(25, seed=3), root, (7,), text(9, seed=4)]


def assert_states_are_cold(policy, cache: Cache) -> None:
    """Keys, values and states of every open slot are those of a fresh forward over the same tokens."""
    texts = [list(cache.tokens(slot)) for slot in range(cache.num_open)]
    longest = max(map(len, texts), default=0)
    if not longest:
        return
    fresh = open_slots(policy, num_slots=len(texts), capacity=longest)
    fresh.share(0, range(len(texts)), [len(text) - longest for text in texts])
    ids = torch.tensor([[*[0] * (longest - len(text)), *text] for text in texts])
    policy.prefill(ids, fresh.settled_window(0, len(texts), longest))
    fresh.commit(0, texts)
    for slot in range(len(texts)):
        for mine, cold in zip(cache.committed(slot), fresh.committed(slot), strict=True):
            torch.testing.assert_close(mine, cold, atol=1e-9, rtol=1e-9)


def finish(engine: Engine, requests, *, is_checked: bool = True) -> dict:
    """All rollouts; after every step the states are those of the texts."""
    engine.submit(requests)
    finished = {}
    while engine.num_requests:
        for rollout in engine.step().finished:
            finished[rollout.request.request_id] = rollout
        engine.check_integrity()
        if is_checked:
            assert_states_are_cold(engine.policy, engine._cache)
    return finished


@pytest.mark.parametrize("plan", DRAFTING, ids=lambda plan: plan.name)
def test_greedy_texts_are_those_of_plain_decoding(policy, plan):
    requests = make_requests(prompts(), GREEDY)
    plain, drafted = run(policy, requests, PLAIN), run(policy, requests, plan, max_batch_size=3)
    assert assert_same_rollouts(plain, drafted, policy) == []
    assert sum(rollout.stats.num_accepted for rollout in drafted.values()) > 20
    assert all(rollout.error is None for rollout in drafted.values())


def test_texts_drawn_by_the_coins_of_their_positions_are_those_of_plain_decoding(policy):
    sampling = Sampling(max_tokens=16, draft_temperature=0, ignore_eos=True)
    requests = make_requests(prompts(), sampling)
    plain = run(policy, requests, PLAIN)
    for plan in DRAFTING:
        assert assert_same_rollouts(plain, run(policy, requests, plan), policy) == []


def test_greedy_texts_do_not_tell_how_plans_took_turns(policy):
    requests = make_requests(prompts(), GREEDY)
    turns = PlansInTurn(FUSED[2], HISTORY, TWO_FORWARD, PLAIN, FUSED[1], FUSED[1])
    assert assert_same_rollouts(run(policy, requests, PLAIN), run(policy, requests, turns), policy) == []


# How the rows of a step are written, and what is left to commit from.


def verify(policy, cache, ids_BL):
    policy.verify_logits(ids_BL, cache.window(0, *ids_BL.shape))


def verify_behind_the_anchor(policy, cache, ids_BL):
    num_drafts = ids_BL.shape[1] - 1
    policy.draft_logits(ids_BL[:, :1], num_drafts, cache.window(0, len(ids_BL), num_drafts + 1))
    policy.verify_logits(ids_BL[:, 1:], cache.window(0, len(ids_BL), num_drafts, num_pending=1))


def verify_and_propose(policy, cache, ids_BL):
    size, width = ids_BL.shape
    levels = tuple(range(width))
    policy.fused_rows(ids_BL, levels, cache.window(0, size, width * (len(levels) + 1)))


def verify_packed(policy, cache, ids_BL):
    packing = Packing.of([ids_BL.shape[1]] * len(ids_BL), ids_BL.shape[1], policy.device)
    policy.verify_packed(ids_BL, packing, cache.packed_window(0, packing))


@pytest.mark.failure(28)
@pytest.mark.parametrize("write", [verify, verify_behind_the_anchor, verify_and_propose, verify_packed])
def test_after_every_sequence_of_accepted_counts_the_state_is_that_of_the_text(policy, write):
    """Three steps with up to two drafts: each of the 27 sequences has a slot."""
    num_drafts, num_steps = 2, 3
    sequences = list(itertools.product(range(num_drafts + 1), repeat=num_steps))
    cache = open_slots(policy, num_slots=len(sequences), capacity=48)
    rng = random.Random(0)
    start = [text(4, seed=slot) for slot in range(len(sequences))]
    policy.prefill(torch.tensor(start), cache.settled_window(0, len(start), 4))
    cache.commit(0, start)
    for step in range(num_steps):
        ids_BL = torch.tensor([[rng.randrange(4, 16) for _ in range(num_drafts + 1)] for _ in sequences])
        write(policy, cache, ids_BL)
        cache.commit(
            0, [ids[: 1 + sequence[step]] for ids, sequence in zip(ids_BL.tolist(), sequences, strict=True)]
        )
        cache.check_integrity()
        assert_states_are_cold(policy, cache)
        cache.fill_stale(1e3)
        for slot, sequence in enumerate(sequences):
            assert len(cache.tokens(slot)) == 4 + sum(sequence[: step + 1]) + step + 1


def proposals_and_drafts(policy, levels: tuple[int, ...]):
    """Logits of each level's proposal, and those of masks behind the same tokens in a forward alone."""
    start, num_drafts = [text(6, seed=slot) for slot in range(3)], 3
    ids_BL = torch.tensor([text(num_drafts + 1, seed=10 + slot) for slot in range(3)])
    cache = open_slots(policy, num_slots=3, capacity=48)
    policy.prefill(torch.tensor(start), cache.settled_window(0, 3, 6))
    cache.commit(0, start)
    width = num_drafts + 1
    fused = policy.fused_rows(ids_BL, levels, cache.window(0, 3, width * (len(levels) + 1)))
    for index, level in enumerate(levels):
        window = cache.window(0, 3, level + 1 + width)
        fresh = RecurrentPolicy.draft_logits(RecurrentPolicy(), ids_BL[:, : level + 1], width, window)
        yield policy.proposal_logits(fused.proposal_states_BPLW[:, index]), fresh[:, 1:]


def test_a_proposal_is_what_a_forward_behind_its_level_alone_drafts(policy):
    for proposed, drafted in proposals_and_drafts(policy, (0, 1, 2, 3)):
        torch.testing.assert_close(proposed, drafted, atol=1e-5, rtol=1e-5)


# Prefixes.


@MASKS
def test_a_group_computes_its_prompt_once(policy, plan):
    engine = Engine(policy, plan=plan)
    finished = finish(engine, make_requests([text(40, seed=1)] * 4, GREEDY))
    assert [finished[f"r{index}"].stats.num_prefilled for index in range(4)] == [39, 0, 0, 0]
    late = finish(engine, make_requests([text(40, seed=1)] * 2, GREEDY, seed=1))
    assert [each.stats.num_prefilled for each in late.values()] == [0, 0]
    assert [each.token_ids for each in late.values()] == [finished["r0"].token_ids] * 2


def test_a_sibling_that_joins_late_computes_nothing_of_its_prompt(policy):
    engine = Engine(policy, plan=TWO_FORWARD)
    requests = make_requests([text(40, seed=1)] * 2, GREEDY)
    engine.submit(requests[:1])
    for _ in range(3):
        engine.step()
    finished = finish(engine, requests[1:])
    assert finished["r1"].stats.num_reused == 39
    assert finished["r1"].token_ids == finished["r0"].token_ids


@MASKS
def test_the_next_turn_computes_only_what_is_new(policy, plan):
    engine = Engine(policy, plan=plan)
    first = finish(engine, make_requests([text(20 + index, seed=index) for index in range(3)], GREEDY))
    turns = [(*each.request.prompt_ids, *each.token_ids, *text(5, seed=9)) for each in first.values()]
    requests = make_requests(turns, GREEDY, seed=1)
    later = finish(engine, requests)
    # The last token of a turn has no row yet; the last of the answer is the anchor.
    assert [each.stats.num_prefilled for each in later.values()] == [5, 5, 5]
    assert_same_rollouts(run(policy, requests, plan), later, policy)


def test_a_text_goes_on_from_the_last_snapshot_before_it_differs(policy):
    """A prompt of 70 rows has states at every 32nd row and at its end."""
    engine = Engine(policy, plan=PLAIN)
    root = text(71, seed=1)
    finish(engine, make_requests([root], GREEDY))
    requests = make_requests([(*root[:length], *text(6, seed=length)) for length in (64, 63, 40, 9)], GREEDY)
    finished = finish(engine, requests)
    assert [finished[f"r{number}"].stats.num_reused for number in range(4)] == [64, 32, 32, 0]
    assert_same_rollouts(run(policy, requests, PLAIN), finished, policy)


def come_and_go(policy, plan, *, seed: int, **options) -> int:
    """Prompts that begin alike, next turns, aborts and changes of weights; how many rows were taken over."""
    rng = random.Random(seed)
    engine = Engine(policy, plan=plan, max_batch_size=5, **options)
    roots, known, rollouts = [text(34, seed=each) for each in range(3)], [], []
    for turn in range(30):
        parent = rng.choice([*roots, *known[-6:]])
        kept = rng.choice([len(parent), rng.randrange(len(parent))])
        request = Request(
            request_id=f"{turn}",
            prompt_ids=(*parent[:kept], *text(1 + rng.randrange(8), seed=100 + turn))[:90],
            seed=turn,
            sampling=dataclasses.replace(GREEDY, max_tokens=rng.randrange(1, 16)),
        )
        engine.submit([request])
        if turn % 7 == 6:
            rollouts += engine.abort([rng.choice(engine._scheduler.running or ("none",))])
        if turn % 11 == 10:
            engine.recompute_cache()
        for rollout in engine.step().finished:
            assert rollout.error is None
            whole = (*rollout.request.prompt_ids, *rollout.token_ids)
            known.append(whole)
            rollouts.append(rollout)
        assert_states_are_cold(policy, engine._cache)
    cold = run(policy, [rollout.request for rollout in rollouts], PLAIN)
    for rollout in rollouts:
        whole = cold[rollout.request.request_id].token_ids
        assert rollout.token_ids == whole[: len(rollout.token_ids)]
    return sum(rollout.stats.num_reused for rollout in rollouts)


@PLANS
def test_whatever_comes_and_goes_states_equal_a_cold_prefill(policy, plan):
    assert come_and_go(policy, plan, seed=0) > 100


@MASKS
def test_states_go_with_pages_as_they_go_with_slots(policy, plan):
    assert come_and_go(policy, plan, seed=1, cache="pages", page_size=4) > 100


# What must be noticed.


def commit_the_last_candidate(monkeypatch):
    real = SlotStates._column

    def last_column(self, slot, length):
        return min(len(self._columns[slot]), self._held[0].shape[2] - 1) if real(self, slot, length) else 0

    monkeypatch.setattr(SlotStates, "_column", last_column)


def begin_behind_rows_that_are_not_settled(monkeypatch):
    """The verifying forward of two-forward begins at the state before its anchor."""
    real = SlotStates.seed
    monkeypatch.setattr(
        SlotStates, "seed", lambda self, part, layer, slots, column: real(self, part, layer, slots, 0)
    )


@pytest.mark.parametrize(
    ("plant", "plan"),
    [
        *((commit_the_last_candidate, plan) for plan in DRAFTING),
        (begin_behind_rows_that_are_not_settled, TWO_FORWARD),
    ],
    ids=lambda each: getattr(each, "__name__", None) or each.name,
)
def test_planted_states_of_the_wrong_row_change_texts(policy, monkeypatch, plant, plan):
    plain = run(policy, make_requests(prompts(), GREEDY), PLAIN)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same_rollouts(plain, run(policy, make_requests(prompts(), GREEDY), plan), policy)


class SeededFromTheAnchor(RecurrentPolicy):
    def parents(self, layout):
        is_fused = len(layout.levels) > 1
        return super().parents(
            dataclasses.replace(layout, levels=(0,) * len(layout.levels)) if is_fused else layout
        )


class OneConvolution(RecurrentPolicy):
    def parents(self, layout):
        return tuple(range(-1, layout.num_rows - 1))


@pytest.mark.parametrize(
    ("planted", "wrong"), [(SeededFromTheAnchor, [1, 2, 3]), (OneConvolution, [0, 1, 2, 3])]
)
def test_planted_seeds_of_proposals_are_noticed(planted, wrong):
    pairs = proposals_and_drafts(planted(), (0, 1, 2, 3))
    gaps = [float((proposed - drafted).abs().max()) for proposed, drafted in pairs]
    assert [level for level, gap in enumerate(gaps) if gap > 1e-3] == wrong


def test_planted_rows_shared_without_their_state_are_refused(policy, monkeypatch):
    monkeypatch.setattr(SlotStates, "longest", lambda self, token_ids, most: most)
    with pytest.raises(AssertionError, match="rows are shared"):
        test_a_text_goes_on_from_the_last_snapshot_before_it_differs(policy)


def test_planted_rows_shared_with_the_state_of_another_length_change_texts(policy, monkeypatch):
    monkeypatch.setattr(SlotStates, "longest", lambda self, token_ids, most: most)
    monkeypatch.setattr(SlotStates, "_is_of", lambda self, slot, length: True)
    monkeypatch.setattr("tests.invariants.test_recurrent.assert_states_are_cold", lambda *arguments: None)
    with pytest.raises(AssertionError):
        come_and_go(policy, PLAIN, seed=0)
