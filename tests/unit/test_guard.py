"""The guard as an object of its own: what it says, when, once; what it refuses; and that it goes on."""

import json
import math

import numpy as np
import pytest

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.rl_loops.watch.guard import Guard, Test

REWARD = Test(name="reward", alpha=0.05, action="lossless", claim="the mixed law does no harm", sides="below")
FAULT = Test(name="law", alpha=1e-6, action="stop", claim="tokens follow their law")
DRIFT = Test(name="drift", alpha=0.01, action="plain", claim="acceptance stays")


def bad(count=400):
    return np.full(count, 0.3)


def test_a_test_that_is_fed_what_its_claim_forbids_speaks_once_and_says_why():
    guard = Guard([REWARD, FAULT], lift="never")
    assert guard.decide(1) is None
    guard.observe("reward", bad(), low=0.495)
    decision = guard.decide(2)
    assert (decision.action, decision.tests, decision.step) == ("lossless", ("reward",), 2)
    assert guard.mode == "lossless"
    assert "the mixed law does no harm" in decision.said
    assert "from the next step on rollouts are lossless" in decision.said
    assert "400 values" in decision.said
    guard.observe("reward", bad(), low=0.495)
    assert guard.decide(3) is None
    assert guard.num_fallbacks == 1


def test_the_gravest_action_of_a_step_is_taken_and_a_milder_one_later_changes_nothing():
    guard = Guard([REWARD, DRIFT, FAULT])
    guard.observe("drift", bad(), low=0.6)
    assert guard.decide(1).action == "plain"
    guard.observe("reward", bad(), low=0.495)
    assert guard.decide(2).action == "lossless"
    assert guard.mode == "plain"
    guard.observe("law", bad(), low=0.6)
    assert guard.decide(3).action == "stop"
    both = Guard([REWARD, DRIFT])
    both.observe("reward", bad(), low=0.495)
    both.observe("drift", bad(), low=0.6)
    assert both.decide(1).action == "plain"
    assert set(both.decision.tests) == {"reward", "drift"}


def test_a_test_that_has_stopped_a_run_begins_anew_only_once_it_is_lifted():
    guard = Guard([FAULT])
    guard.observe("law", bad(), low=0.6)
    assert guard.decide(1).action == "stop"
    guard.observe("law", bad(), low=0.6)
    assert guard.decide(2) is None
    assert guard.lift(2).tests == ("law",)
    guard.observe("law", bad(), low=0.6)
    assert guard.decide(3).action == "stop"


def test_a_warning_changes_nothing():
    guard = Guard([Test(name="reward", alpha=0.05, action="warn", claim="no harm")])
    guard.observe("reward", bad(), low=0.495)
    assert guard.decide(1).action == "warn"
    assert guard.mode == "as_asked"


def test_attempts_share_one_alpha_and_a_lift_begins_the_test_anew():
    guard = Guard([REWARD], lift="by_hand")
    alphas = [guard.alpha("reward")]
    for step in range(1, 5):
        guard.observe("reward", bad(600), low=0.495)
        assert guard.decide(step).action == "lossless"
        assert guard.lift(step).action == "lift"
        assert guard.mode == "as_asked"
        assert guard.evidence["reward"].num_values == 0
        alphas.append(guard.alpha("reward"))
    assert alphas == pytest.approx([0.05 / (k * (k + 1)) for k in range(1, 6)])
    assert guard.alpha_spent == pytest.approx(sum(alphas[:-1]))
    assert guard.alpha_spent < 0.05
    assert guard.lift(9) is None


def test_evidence_that_nothing_was_lost_lifts_a_fallback_by_its_rule():
    guard = Guard([REWARD], lift="evidence")
    guard.observe_again(np.full(500, 0.6), high=0.495)  # none is counted before there is a fallback
    guard.observe("reward", bad(), low=0.495)
    guard.decide(1)
    guard.observe_again(np.full(10, 0.49), high=0.495)
    assert guard.decide(2) is None
    guard.observe_again(np.full(500, 0.6), high=0.495)
    decision = guard.decide(3)
    assert (decision.action, guard.mode) == ("lift", "as_asked")
    assert "by evidence that what it fell back from does no harm" in decision.said
    assert guard.decide(4) is None


def test_a_fallback_for_good_is_not_lifted_by_hand():
    guard = Guard([REWARD], lift="never")
    assert guard.alpha("reward") == 0.05
    with pytest.raises(InvalidInput, match="for good"):
        guard.lift(1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Guard([REWARD, REWARD]), "different names"),
        (lambda: Guard([REWARD, DRIFT], budget=0.05), "sum to 0.06, above the budget of 0.05"),
        (lambda: Guard([REWARD], lift="soon"), "lift must be one of never, by_hand, evidence"),
        (lambda: Test(name="t", alpha=0.0, action="warn", claim=""), "between 0 and 1"),
        (lambda: Test(name="t", alpha=0.1, action="panic", claim=""), "warn, lossless, plain, stop"),
        (lambda: Guard([REWARD]).observe("rewards", [0.5]), "no test 'rewards'; it has reward"),
        (lambda: Guard([REWARD]).observe("reward", [math.nan]), "between 0 and 1"),
        (lambda: Guard([REWARD]).observe("reward", [1.5]), "scale it by its bounds"),
        (lambda: Guard([REWARD]).observe("reward", [0.5], low=0.6, high=0.4), "at most its greatest"),
    ],
)
def test_what_it_cannot_do_is_refused_with_advice(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


def test_it_goes_on_from_json_and_refuses_other_tests_and_alphas():
    guard = Guard([REWARD, DRIFT])
    guard.observe("reward", np.full(40, 0.4), low=0.495)
    guard.observe("drift", bad(), low=0.6)
    guard.decide(1)
    state = json.loads(json.dumps(guard.state_dict()))
    again = Guard([REWARD, DRIFT])
    again.load_state_dict(state)
    assert again.state_dict() == guard.state_dict()
    for each in (guard, again):
        each.observe("reward", bad(60), low=0.495)
    assert again.metrics() == guard.metrics()
    changed = Test(name="drift", alpha=0.02, action="plain", claim="acceptance stays")
    for others, says in (
        ([REWARD], "no test 'drift'"),
        ([REWARD, DRIFT, FAULT], "a new test 'law'"),
        ([REWARD, changed], "of alpha 0.02, it was 0.01"),
    ):
        with pytest.raises(CheckpointError, match=says):
            Guard(others).load_state_dict(state)
    with pytest.raises(CheckpointError, match="lift 'never', it was 'by_hand'"):
        Guard([REWARD, DRIFT], lift="never").load_state_dict(state)


def test_metrics_are_of_tests_that_have_seen_something():
    guard = Guard([REWARD, DRIFT])
    guard.observe("reward", [0.5, 0.4], low=0.495)
    metrics = guard.metrics()
    assert metrics["drift/reward/n"] == 2
    assert metrics["drift/reward/threshold"] == pytest.approx(math.log(2 / 0.05))
    assert metrics["drift/fallback_total"] == metrics["drift/alpha_spent"] == 0
    assert metrics["guard/mode"] == "as_asked"
    assert not any("drift/drift" in name for name in metrics)
    assert guard.decide(1) is None
