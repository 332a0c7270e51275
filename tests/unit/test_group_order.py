"""In which order requests of a call are handed out."""

import dataclasses

from blockroll.rollout.pool import group_order
from blockroll.rollout.pool.group_order import GroupOrder
from blockroll.types import Request


def asked(*groups):
    """Requests named by group and sibling; a prompt is that of its group's first letter."""
    return [
        Request(request_id=f"{name}{sibling}", prompt_ids=(ord(name[0]),), seed=0, group_id=name)
        for name, size in groups
        for sibling in range(size)
    ]


def names(parts):
    return [[request.request_id for request in part] for part in parts]


def test_groups_stay_together_unless_they_are_asked_sibling_by_sibling():
    assert names(GroupOrder().waiting(asked(("a", 2), ("b", 1)))) == [["a0", "a1"], ["b0"]]


def test_of_new_prompts_the_first_siblings_come_before_the_second_ones():
    order = GroupOrder(sibling_by_sibling=True)
    assert names(order.waiting(asked(("a", 3), ("b", 1), ("c", 2)))) == [
        ["a0"], ["b0"], ["c0"], ["a1"], ["c1"], ["a2"],
    ]  # fmt: skip
    assert names(order.waiting([])) == []


def test_a_request_without_a_group_is_one_of_its_own():
    alone = [Request(request_id=name, prompt_ids=(1,), seed=0) for name in ("x", "y")]
    assert names(GroupOrder(sibling_by_sibling=True).waiting(alone)) == [["x"], ["y"]]


def test_prompts_may_be_lists():
    order = GroupOrder(sibling_by_sibling=True)
    listed = [dataclasses.replace(request, prompt_ids=[ord("a")]) for request in asked(("a", 2))]
    assert names(order.waiting(listed)) == [["a0"], ["a1"]]
    assert names(order.waiting(asked(("a", 2)))) == [["a0", "a1"]]


def test_prompts_that_were_asked_before_stay_together():
    order = GroupOrder(sibling_by_sibling=True)
    order.waiting(asked(("a", 2)))
    later = names(order.waiting(asked(("a later", 2), ("b", 2))))
    assert later == [["a later0", "a later1"], ["b0"], ["b1"]]


def test_prompts_that_were_asked_longest_ago_are_forgotten(monkeypatch):
    monkeypatch.setattr(group_order, "_MOST_PROMPTS", 2)
    order = GroupOrder(sibling_by_sibling=True)
    for name in "abac":
        order.waiting(asked((name, 2)))
    assert names(order.waiting(asked(("a", 2)))) == [["a0", "a1"]]
    assert names(order.waiting(asked(("b", 2)))) == [["b0"], ["b1"]]


def test_higher_priorities_are_handed_out_first():
    requests = [
        dataclasses.replace(each, priority=int(each.group_id == "b"))
        for each in asked(("a", 2), ("b", 2), ("c", 1))
    ]
    assert names(GroupOrder().waiting(requests)) == [["b0", "b1"], ["a0", "a1"], ["c0"]]
    order = GroupOrder(sibling_by_sibling=True)
    assert names(order.waiting(requests)) == [["b0"], ["b1"], ["a0"], ["c0"], ["a1"]]
