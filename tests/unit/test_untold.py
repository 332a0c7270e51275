"""Texts that wait for a replica in another process."""

from collections import deque

import pytest

from blockroll.rollout.pool.untold import UntoldTexts
from blockroll.types import FinishedText


def text(*token_ids):
    return FinishedText((1, 2), token_ids)


def test_what_waits_is_taken_once_in_its_order():
    untold = UntoldTexts(100)
    untold.add([text(3), text(4)])
    untold.add([text(5)])
    assert untold.take() == (text(3), text(4), text(5))
    assert untold.take() == ()


def test_an_interrupt_while_texts_are_taken_hinders_none_that_come_later():
    class Interrupted(deque):
        def clear(self):
            super().clear()
            raise KeyboardInterrupt

    untold = UntoldTexts(9)
    untold.add([text(3), text(4)])
    untold._texts = Interrupted(untold._texts)
    with pytest.raises(KeyboardInterrupt):
        untold.take()
    untold._texts = deque(untold._texts)
    untold.add([text(5), text(6)])
    assert untold.take() == (text(6),), "6 tokens more are counted than wait"
    untold.add([text(3), text(4), text(5)])
    assert untold.take() == (text(3), text(4), text(5))


def test_the_latest_texts_within_the_bound_wait():
    untold = UntoldTexts(9)
    untold.add([text(3), text(4), text(5), text(6, 7)])
    assert untold.take() == (text(5), text(6, 7)), "3 and 4 tokens; three more would be above 9"
    untold.add([text(*range(8))])
    assert untold.take() == (), "one that is longer than the bound does not wait"
    untold.add([text(3)])
    assert untold.take() == (text(3),)
