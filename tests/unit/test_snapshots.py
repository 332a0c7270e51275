"""States of texts at single lengths."""

import random

import torch

from blockroll.rollout.engine.cache.snapshots import Snapshots


def state(number: int) -> tuple[torch.Tensor, ...]:
    return (torch.tensor(number),)


def test_the_longest_beginning_of_a_text_is_found_as_random_texts_come_and_go():
    rng, held, known = random.Random(0), Snapshots(40), {}
    for number in range(400):
        text = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
        known.pop(tuple(text), None)
        known[tuple(text)] = number
        held.put(text, state(number))
        while len(known) > 40:
            del known[next(iter(known))]
        held.check_integrity()
        wanted, most = [rng.randrange(2) for _ in range(12)], rng.randrange(13)
        lengths = [len(each) for each in known if len(each) <= most and [*each] == wanted[: len(each)]]
        length, found = held.longest(wanted, most)
        assert length == max(lengths, default=0)
        if found is not None:
            key = tuple(wanted[:length])
            assert int(found[0]) == known[key]
            known[key] = known.pop(key)  # used last


def test_what_was_used_last_stays():
    held = Snapshots(2)
    held.put([1], state(1))
    held.put([2], state(2))
    assert held.longest([1, 5], 2)[0] == 1
    held.put([3], state(3))
    assert [held.longest([token], 1)[0] for token in (1, 2, 3)] == [1, 0, 1]


def test_a_later_state_of_the_same_text_takes_the_place_of_the_first():
    held = Snapshots(2)
    held.put([1, 2], state(1))
    held.put([1, 2], state(2))
    length, found = held.longest([1, 2, 3], 3)
    assert (length, len(held), int(found[0])) == (2, 1, 2)
    held.clear()
    assert held.longest([1, 2, 3], 3) == (0, None)
    held.check_integrity()
