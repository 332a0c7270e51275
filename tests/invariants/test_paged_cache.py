"""A cache in pages by itself, without forwards: what is shared, copied, kept and taken."""

import pytest
import torch

from blockroll.rollout.engine.cache.pages import PagedCache
from blockroll.rollout.engine.cache.slots import SlotCache
from tests.invariants.test_pages import text
from tests.models import random_policy


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def write(cache: PagedCache, start: int, texts, *, num_rows: int = 0) -> None:
    """Commit tokens to slots start.., as forwards would that write so many rows."""
    cache.window(start, start + len(texts), num_rows or max(map(len, texts)))
    cache.commit(start, texts)


def count_copies(cache: PagedCache, monkeypatch) -> list[int]:
    copied: list[int] = []
    copy = cache.memory.copy

    def counting(sources, targets):
        copied.extend(targets)
        copy(sources, targets)

    monkeypatch.setattr(cache.memory, "copy", counting)
    return copied


def test_groups_of_long_prompts_take_under_a_third_of_the_pages_of_texts_apart(policy, monkeypatch):
    """8 groups of 8 rollouts, prompts of 1,000 tokens, 64 tokens each: the cache alone, without forwards."""
    cache = PagedCache(policy, page_size=16)
    copied = None
    for group in range(8):
        start = 8 * group
        cache.share(start, [start], [0])
        write(cache, start, [text(1000, seed=group)])
        copied = count_copies(cache, monkeypatch) if copied is None else copied
        cache.share(start, [start] * 8, [1000] * 8)
    assert not copied
    for step in range(64):
        write(cache, 0, [(4 + (slot + step) % 20,) for slot in range(64)], num_rows=1)
        if step == 0:
            assert len(copied) <= 64 - 8  # one page for each sibling, and one of them keeps it
    cache.check_integrity()
    apart = 64 * -(-1064 // 16)
    assert cache.num_pages_used < 0.3 * apart


def test_memory_follows_the_tokens_that_are_held_not_the_longest_text(policy):
    cache = PagedCache(policy, page_size=16)
    lengths = [900, *[20] * 31]
    cache.share(0, [0] * 32, [0] * 32)
    for slot, length in enumerate(lengths):
        write(cache, slot, [text(length, seed=slot)])
    slots = SlotCache(policy, num_slots=32, capacity=912)
    slots.window(0, 1, 1)
    assert cache.num_pages_used == sum(-(-length // 16) for length in lengths)
    assert cache.num_bytes < 0.2 * slots.num_bytes


def test_texts_that_have_ended_leave_by_their_last_use(policy):
    cache = PagedCache(policy, page_size=4, max_rows=4 * 16)
    cache.reserve(num_slots=1, capacity=4 * 16)
    old, used, new = (text(20, seed=seed) for seed in range(3))
    for each in (old, used, new):
        cache.share(0, [0], [0])
        write(cache, 0, [each])
        cache.release(0)
    source, num_rows = cache.longest_prefix(old)
    assert num_rows == 20
    cache.share(0, [source], [18])  # it is the one used last now
    cache.check_integrity()
    write(cache, 0, [text(11, seed=9)])
    cache.check_integrity()
    assert [cache.longest_prefix(each)[1] for each in (old, used, new)] == [20, 0, 20]


def test_texts_that_have_ended_take_no_memory_that_slots_would_not_take(policy):
    cache = PagedCache(policy, page_size=4, max_rows=10_000)
    cache.reserve(num_slots=2, capacity=32)
    for seed in range(20):
        cache.share(0, [0], [0])
        write(cache, 0, [text(30, seed=seed)])
        cache.release(0)
    assert cache.num_pages == 2 * 32 // 4
    assert cache.longest_prefix(text(30, seed=19))[1] == 30


@pytest.mark.parametrize("num_rows", [1, 5, 16])
def test_pages_that_are_said_to_be_spare_are_there(policy, num_rows):
    """Where there are plenty they are not counted one by one: then fewer are said, never more."""
    for max_rows in (200, 400, 1_600):
        cache = PagedCache(policy, page_size=4, max_rows=max_rows)
        for slot in range(5):
            cache.share(slot, [slot], [0])
            write(cache, slot, [text(4 * slot + 3, seed=slot)])
        cache.share(3, [3, 3, 3], [15, 13, 15])
        said = cache.spare(num_rows)
        cache.window(0, cache.num_open, num_rows)
        assert said <= max_rows // 4 - cache.num_pages_running
        assert said > 0 or max_rows == 200
        cache.check_integrity()


def test_what_a_text_shares_is_read_by_others_as_it_was(policy):
    """Values, not counts: rows written behind a shared beginning reach nobody else."""
    cache = PagedCache(policy, page_size=4)
    cache.share(0, [0], [0])
    fill(cache, 0, 1, num_rows=6, value=1.0)
    cache.commit(0, [(5,) * 6])
    cache.share(0, [0, 0, 0], [6, 5, 6])
    for slot in range(3):
        fill(cache, slot, slot + 1, num_rows=3, value=10.0 + slot)
        cache.commit(slot, [(7 + slot,) * 3])
        cache.check_integrity()
    for slot, shared in enumerate((6, 5, 6)):
        for rows in cache.committed(slot):
            assert (rows[:, :shared] == 1).all()
            assert (rows[:, shared:] == 10 + slot).all()


def fill(cache: PagedCache, start: int, stop: int, *, num_rows: int, value: float) -> None:
    window = cache.window(start, stop, num_rows)
    row = cache.memory.layer(0)[0]
    states = torch.full((stop - start, row.shape[1], num_rows, row.shape[3]), value)
    for layer in range(len(cache.memory.tensors) // 2):
        keys, _ = window.update(states, states, layer)
        assert keys.shape == (stop - start, row.shape[1], window.extent, row.shape[3])
