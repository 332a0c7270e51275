"""What of a device's memory keys and values get: integers in, integers out."""

import pytest

from blockroll.errors import InvalidInput
from blockroll.rollout.engine.budget import CacheBudget, size
from blockroll.rollout.engine.room import CacheRoom

GB, MB = 10**9, 10**6


@pytest.mark.parametrize(
    ("given", "rows", "is_scarce"),
    [
        # Enough is free: its share of the whole device, as if nothing else were there.
        ({"total": 80 * GB, "free": 70 * GB, "share": 0.3}, 24_000, False),
        ({"total": 80 * GB, "free": 70 * GB, "share": 0.3, "forward": 46 * GB}, 24_000, False),
        # Less is free than its share: what a forward leaves of it.
        ({"total": 80 * GB, "free": 20 * GB, "share": 0.3}, 20_000, True),
        ({"total": 80 * GB, "free": 20 * GB, "share": 0.3, "forward": 5 * GB}, 15_000, True),
        # A forward is an estimate: it takes half at most.
        ({"total": 80 * GB, "free": 20 * GB, "share": 0.3, "forward": 19 * GB}, 10_000, True),
        ({"total": 80 * GB, "free": 20 * GB, "share": 0.3, "forward": 90 * GB}, 10_000, True),
        # Engines that share a device share what is free, and each has forwards of its own.
        ({"total": 80 * GB, "free": 60 * GB, "share": 0.3, "num_engines": 2}, 24_000, False),
        ({"total": 80 * GB, "free": 60 * GB, "share": 0.3, "num_engines": 4}, 15_000, True),
        ({"total": 80 * GB, "free": 60 * GB, "share": 0.3, "num_engines": 4, "forward": GB}, 14_000, True),
        # Rows that are given win over everything.
        ({"total": 80 * GB, "free": 1 * GB, "share": 0.3, "max_rows": 77_000}, 77_000, False),
        # Nothing is left.
        ({"total": 80 * GB, "free": -3 * GB, "share": 0.3}, 0, True),
    ],
)
def test_a_cache_gets_its_share_as_far_as_that_is_free(given, rows, is_scarce):
    budget = CacheBudget(row=MB, **given)
    assert (budget.rows, budget.is_scarce) == (rows, is_scarce)


@pytest.mark.parametrize(
    ("max_rows", "length", "rows", "slots"),
    [
        (0, 100, 128, 8),  # no bound: as many as run together
        (10_000, 100, 128, 8),
        (1_000, 100, 128, 7),
        (1_000, 103, 128, 7),  # the last length whose block fits the step of 16
        (1_000, 104, 128 + 16, 6),
        (1_000, 5_000, 512 + 32, 1),  # no text is longer than the context
        (127, 100, 128, 0),
    ],
)
def test_requests_that_run_together_are_those_whose_longest_texts_have_room(max_rows, length, rows, slots):
    room = CacheRoom(max_slots=8, max_rows=max_rows, block_rows=25, max_length=512)
    assert (room.rows_of(length), room.num_slots(room.rows_of(length))) == (rows, slots)


@pytest.mark.parametrize(
    ("max_rows", "page_size", "length", "rows", "texts"),
    [
        (0, 16, 100, 128, 8),
        (10_000, 16, 100, 128, 8),
        (1_000, 16, 100, 128, 7),  # 62 pages, 8 for each
        (1_000, 4, 100, 128, 7),
        (1_000, 4, 96, 124, 8),
        (1_000, 256, 100, 256, 3),
        (100, 256, 100, 256, 0),
    ],
)
def test_pages_have_room_for_as_many_texts_as_their_rows_fill(max_rows, page_size, length, rows, texts):
    room = CacheRoom(max_slots=8, max_rows=max_rows, block_rows=25, max_length=512, page_size=page_size)
    assert (room.rows_of(length), room.num_texts(length)) == (rows, texts)
    assert room.num_pages == max_rows // page_size


def test_a_device_without_room_for_the_shortest_text_is_refused_with_its_numbers():
    budget = CacheBudget(total=80 * GB, free=40 * MB, share=0.3, forward=GB, row=MB)
    budget.check(20)
    with pytest.raises(
        InvalidInput, match=r"take 21 MB, and there are 20 MB for them: memory_fraction 0\.3 of 80 GB"
    ):
        budget.check(21)
    given = CacheBudget(total=80 * GB, free=40 * GB, share=0.3, row=MB, max_rows=31)
    with pytest.raises(InvalidInput, match="max_cache_rows is 31, and a text of one token takes 32 rows"):
        given.check(32)


def test_bytes_are_said_in_words():
    assert [size(each) for each in (0, 999, 3072, 6_694_784, 12_345_678_901)] == [
        "0 bytes",
        "999 bytes",
        "3.07 kB",
        "6.69 MB",
        "12.3 GB",
    ]
