"""Forwards of few shapes, in the same buffers: what a graph would run, on any device."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.repeated import RepeatedPolicy, bucket
from blockroll.types import HISTORY, Plan, Sampling
from tests.engines import make_requests, run
from tests.equality import assert_same_rollouts
from tests.models import prompts, random_policy
from tests.recurrent_policy import RecurrentPolicy

PLANS = (Plan(0), Plan(4), Plan(4, (0, 2, 4)), Plan(4, drafter=HISTORY))


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def test_shapes_are_powers_of_two_and_halfway_between():
    assert [bucket(count) for count in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert all(count <= bucket(count) < 2 * count for count in range(1, 1000))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_repeated_forwards_give_the_rollouts_of_others(policy, plan):
    requests = make_requests(prompts(11), Sampling(max_tokens=12, repetition_penalty=1.1))
    plainly = run(policy, requests, plan, max_batch_size=5)
    repeated = run(policy, requests, plan, max_batch_size=5, cache="pages", page_size=4, graphs="buckets")
    assert_same_rollouts(plainly, repeated, policy)


def repeated_logits(policy, rows, *, spoil):
    """Verify logits of three requests in a shape for more; `spoil` writes where none of them is."""
    cache = PagedCache(policy, page_size=4, num_slots=len(rows))
    forwards = RepeatedPolicy(policy)
    ids_BR = torch.tensor(rows)
    policy.prefill(ids_BR[:, :-2], cache.window(0, len(rows), ids_BR.shape[1] - 2))
    cache.commit(0, ids_BR[:, :-2].tolist())
    window = cache.window(0, len(rows), 2)
    forwards.verify_logits(ids_BR[:, -2:], window)
    (shape,) = forwards._runs.values()
    fill = shape.fill

    def spoiled(ids, window):
        fill(ids, window)
        spoil(shape, len(rows))

    shape.fill = spoiled
    return forwards.verify_logits(ids_BR[:, -2:], window)


def test_what_fills_a_shape_changes_no_bit_of_a_request(policy):
    rows = [[(5 + 3 * request + row) % policy.vocab_size for row in range(9)] for request in range(5)]

    def write_others(shape, size):
        shape._ids_BC[size:] = 7

    def write_into_a_request(shape, size):
        shape._table_BT[size:] = shape._table_BT[0]  # the planted bug: it has the pages of another

    clean = repeated_logits(policy, rows, spoil=lambda shape, size: None)
    assert torch.equal(clean, repeated_logits(policy, rows, spoil=write_others))
    assert not torch.equal(clean, repeated_logits(policy, rows, spoil=write_into_a_request))


def test_few_shapes_serve_a_long_run(policy):
    engine = Engine(policy, plan=Plan(4), max_batch_size=16, cache="pages", graphs="buckets")
    for seed in range(3):
        engine.submit(make_requests(prompts(16), Sampling(max_tokens=20), seed=seed))
        while engine.num_requests:
            engine.step()
        seen = engine._forwards.num_shapes
    assert 2 <= seen <= 40
    engine.release_memory()
    assert engine._forwards.num_shapes == 0


def test_new_weights_are_met_by_new_graphs(policy):
    engine = Engine(policy, plan=Plan(0), cache="pages", graphs="buckets")
    engine.submit(make_requests(prompts(2), Sampling(max_tokens=4)))
    engine.step()
    engine.step()  # the first one's rows came with the prefill
    assert engine._forwards.num_shapes
    engine.change_weights(1)
    assert not engine._forwards.num_shapes


def test_graphs_of_layers_that_carry_states_are_refused():
    with pytest.raises(InvalidInput, match="layers of this policy carry states"):
        Engine(RecurrentPolicy(), plan=Plan(0), cache="pages", graphs="buckets")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"graphs": "on", "cache": "pages"}, "'cpu', where no graph can be captured"),
        ({"graphs": "buckets", "cache": "slots"}, "set cache to 'pages'"),
        ({"graphs": "always"}, "allowed are 'auto', 'on', 'off' and 'buckets'"),
    ],
)
def test_graphs_that_cannot_be_are_refused(policy, options, said):
    with pytest.raises(InvalidInput, match=said):
        Engine(policy, plan=Plan(0), **options)
