"""Recorded rollouts of fixed plans stay what they were."""

import json

import pytest

from tests.golden.record import PATH, as_row, cases


@pytest.mark.filterwarnings("ignore:plan .* drafts")  # what no policy here was trained for
def test_recorded_rollouts_of_fixed_plans_stay_the_same():
    want = [json.loads(line) for line in PATH.read_text().splitlines()]
    got = [json.loads(json.dumps(as_row(name, each))) for name, rollouts in cases() for each in rollouts]
    assert [(row["case"], row["request"]) for row in got] == [(row["case"], row["request"]) for row in want]
    for before, after in zip(want, got, strict=True):
        for column in ("policy_logprobs", "behavior_logprobs"):
            assert after.pop(column) == pytest.approx(before.pop(column), abs=1e-4), before["case"]
        assert after == before
