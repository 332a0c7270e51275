"""A short form of the experiment on constraints."""

import json

import pytest

from benchmarks.constraints import constrained, is_valid
from blockroll.policies.hf import HFPolicy
from blockroll.types import Plan


def test_constrained_outputs_are_judged_whole():
    policy = HFPolicy.from_pretrained("tiny")
    rows = constrained(policy, [Plan(0), Plan(4)], count=6)
    assert [(row["plan"], row["constraint"]) for row in rows] == [
        ("plain", "regex"),
        ("plain", "json schema"),
        ("two_forward(4)", "regex"),
        ("two_forward(4)", "json schema"),
    ]
    assert all(row["valid"] == row["outputs"] == 6 for row in rows)
    json.dumps(rows)


def test_an_output_that_its_length_cuts_off_counts_as_invalid():
    (regex, _) = constrained(HFPolicy.from_pretrained("tiny"), [Plan(0)], count=4, max_tokens=10)
    assert regex["valid"] == 0


@pytest.mark.parametrize(
    ("kind", "text", "verdict"),
    [
        ("regex", "Monday, 1 May, 1999", True),
        ("regex", "Monday, 01 May, 1999", False),
        ("json schema", '{"animal": "cat", "legs": 4, "colors": []}', True),
        ("json schema", '{"animal": "cat", "legs": 4, "colors": ["green"]}', False),
        ("json schema", '{"animal": "cat", "legs": 4.5, "colors": []}', False),
        ("json schema", '{"animal": "cat", "legs": 4', False),
    ],
)
def test_validity_is_decided_without_the_library_that_enforces_it(kind, text, verdict):
    assert is_valid(kind, text) == verdict
