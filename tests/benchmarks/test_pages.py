"""A short form of the experiment on the layouts of a cache."""

import json

from benchmarks import pages


def test_both_layouts_have_a_row_of_their_speed_and_of_their_memory(policy):
    (speed,) = pages.speed(policy, 2, 40, repeats=1)
    assert (speed["batch"], speed["context"], speed["pairs"]) == (2, 40, 1)
    assert speed["pages_to_slots"] > 0
    slots, paged = (pages.memory(policy, layout, count=24)[0] for layout in pages.LAYOUTS)
    assert slots["most_tokens_held"] == paged["most_tokens_held"]
    assert paged["peak_bytes"] < slots["peak_bytes"]
    assert 1 < paged["running_rows_per_token"] < 2 < slots["running_rows_per_token"]
    json.dumps((speed, slots, paged))
