"""Recorded rollouts of fixed plans stay what they were, on whatever machine they are drawn again."""

import json
from dataclasses import replace

import pytest

from tests.equality import assert_same_rollouts
from tests.golden.record import PATH, cases, counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:plan .* drafts")  # what no policy here was trained for
def test_recorded_rollouts_of_fixed_plans_stay_the_same():
    rows = list(map(json.loads, PATH.read_text().splitlines()))
    num_rows, near_ties = 0, []
    for name, policy, drawn in cases():
        own = rows[num_rows : num_rows + len(drawn)]
        num_rows += len(drawn)
        assert [(row["case"], row["request"]) for row in own] == [(name, r.request.request_id) for r in drawn]
        recorded = [as_recorded(rollout, row) for rollout, row in zip(drawn, own, strict=True)]
        differing = assert_same_rollouts(recorded, drawn, policy)
        near_ties += [(name, request_id) for request_id in differing]
        for rollout, row in zip(drawn, own, strict=True):
            # Which drafts a greedy request accepts hangs on ties of draft logits, its tokens do not.
            if row["request"] not in differing and rollout.request.sampling.temperature > 0:
                assert counts(rollout) == row["counts"], (name, row["request"])
    assert num_rows == len(rows)
    assert len(near_ties) <= 2, near_ties


def as_recorded(rollout, row):
    """The rollout that a row was written from, by the request that drew it again."""
    return replace(
        rollout,
        token_ids=tuple(row["tokens"]),
        policy_logprobs=tuple(row["policy_logprobs"]),
        behavior_logprobs=tuple(row["behavior_logprobs"]),
        finish_reason=row["finish_reason"],
    )
