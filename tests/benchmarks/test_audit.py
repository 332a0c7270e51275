"""A short form of the experiment on the audit."""

import json

from benchmarks import audit


def test_the_audit_has_a_row_of_its_cost_per_plan_and_batch():
    rows = audit.cost(batches=(2,), repeats=1, rollouts=3)
    assert [(row["plan"], row["batch"]) for row in rows] == [("plain", 2), ("two_forward(8)", 2)]
    assert all(row["time_ratio"] > 0 and row["bytes_per_token"] > 10 for row in rows)
    json.dumps(rows)
