"""The story of a run: what happened, from rows alone, whatever they have or lack."""

import pytest

from blockroll.rl_loops.watch.figures import acceptance_by_position
from blockroll.rl_loops.watch.rows import Stretch, counted, evidence_of, stretches
from blockroll.rl_loops.watch.story import duration, last_words, story
from tests.watch_rows import SAID, TESTS, guarded_rows, plain_row


def told(rows, topic, **others):
    return [each.text for each in story(rows, **others) if each.topic == topic]


def alarms(rows):
    return [each.text for each in story(rows) if each.is_alarm]


def test_a_quiet_run_without_a_guard_is_told_without_an_alarm():
    rows = [plain_row(step) for step in range(1, 21)]
    assert told(rows, "Progress", asked_steps=20) == [
        "20 steps are done. They took 1 min 0 s, without evaluations and checkpoints."
    ]
    assert told(rows, "Progress", asked_steps=30)[0].startswith("20 of 30 steps are done.")
    assert told(rows, "Guard") == ["None watched this run."]
    assert told(rows, "Losses") == ["None: nothing failed, was refused or had to be drawn again."]
    assert alarms(rows) == []


def test_reward_is_told_from_where_to_where():
    rows = [plain_row(step, reward=step / 10) for step in range(1, 11)]
    assert told(rows, "Reward") == [
        "On training prompts it went from 0.300 to 0.800 (means of the first and the last 5 steps)."
    ]
    rows[0]["eval/initial_reward"], rows[-1]["eval/reward"] = 0.2, 0.9
    assert told(rows, "Reward")[0] == "On held-out prompts it went from 0.200 to 0.900."


def test_rewards_that_are_missing_or_teach_nothing_are_told():
    rows = [
        plain_row(1, reward=None, frac_reward_zero_std=None),
        plain_row(2, reward=float("nan")),
        plain_row(3, frac_reward_zero_std=1.0),
    ]
    assert told(rows, "Reward")[1:] == [
        "2 steps had no rollout with a reward.",
        "In 1 step every group was rewarded alike, which teaches nothing.",
    ]


def test_speed_is_that_of_the_bench_or_of_the_run_or_not_known():
    rows = [plain_row(1)]
    cells = {("plain", 1): 100.0, ("fused(8)", 1): 250.0, ("plain", 16): 900.0, ("fused(8)", 16): 1800.0}
    speed = [{"plan": plan, "batch": batch, "tokens_per_s": s} for (plan, batch), s in cells.items()]
    assert told(rows, "Speed", speed=speed) == [
        "Measured in times plain's tokens per second: fused(8) 2.50 at batch 1, fused(8) 2.00 at batch 16."
    ]
    assert told(rows, "Speed") == ["Not measured against plain."]
    rows = [plain_row(1, **{"rollout/speedup_achieved": 1.75})]
    assert told(rows, "Speed") == ["Steps brought 1.75 times the tokens per second of plain ones."]
    rows = [plain_row(1, **{"rollout/acceptance_rate": None})]
    assert told(rows, "Drafts") == ["None were made: every rollout was decoded plain."]


def test_what_the_guard_said_and_did_is_told_with_the_reward_before_and_after():
    rows = guarded_rows(60, 40)
    spoke, fallback, shadow = told(rows, "Guard")
    assert spoke == f"After step 40: {SAID}."
    assert alarms(rows) == [spoke]
    assert fallback.startswith("Rollouts of steps 41 to 60 were drawn lossless, to the end. Reward was 0.3")
    assert "in the 10 steps before, 0.5" in fallback
    assert shadow.startswith("1320 shadow rollouts took 12 s beside 2 min 0 s of all others. ")
    assert last_words(rows) == (40, SAID)
    assert last_words(rows[:39]) is None


def test_a_fallback_that_is_lifted_ends_and_another_one_is_another():
    modes = ["as_asked", "lossless", "lossless", "plain", "as_asked", None, "lossless"]
    rows = [plain_row(step, **{"guard/mode": mode}) for step, mode in enumerate(modes, start=1)]
    assert stretches(rows) == [
        Stretch(mode="lossless", first=2, last=3),
        Stretch(mode="plain", first=4, last=4),
        Stretch(mode="lossless", first=7, last=7),
    ]
    assert "Rollouts of step 4 were drawn plain, then as asked again." in told(rows, "Guard")[2]


def test_a_guard_that_never_spoke_is_told_with_its_nearest_test():
    (silence, _) = told(guarded_rows(39, 40), "Guard")
    assert silence.startswith(
        "It watched 12 tests and had nothing to say. Nearest was reward: log e at most 3.1"
    )
    assert "of 3.00 after 858 values" in silence
    assert told([plain_row(1, **{"guard/mode": "as_asked"})], "Guard") == ["It had no data for any test."]


def test_a_guard_that_warns_at_every_step_does_not_fill_the_page():
    rows = [
        plain_row(
            step, **{"guard/mode": "as_asked", "guard/action": "warn", "guard/said": f"warning {step}."}
        )
        for step in range(1, 101)
    ]
    texts = told(rows, "Guard")
    assert texts == [
        *(f"After step {step}: warning {step}." for step in range(1, 6)),
        "It spoke 94 more times.",
        "After step 100: warning 100.",
    ]


def test_what_was_lost_and_recovered_is_counted_across_a_resume():
    rows = [
        plain_row(1, **{"rollout/failed_total": 1.0, "engine/redispatch_total": 3.0}),
        plain_row(2, **{"rollout/failed_total": 2.0, "engine/redispatch_total": 1.0}),
        plain_row(3, **{"rollout/failed_total": 2.0, "engine/redispatch_total": 2.0}),
    ]
    assert counted(rows, "engine/redispatch_total") == 5
    assert alarms(rows) == [
        "2 rollouts failed.",
        "5 requests drawn again by another replica, with the same seeds.",
    ]
    assert told([{"step": 1, "reward": 0.5}], "Losses") == ["Not recorded."]


def test_tests_come_with_their_highest_evidence_nearest_first():
    states = evidence_of(guarded_rows(60, 40))
    assert {state.name for state in states} == set(TESTS)
    first = states[0]
    assert (first.name, first.spoke_at, first.num_values) == ("reward", 38, 1320)
    assert first.highest == pytest.approx(3.2)
    assert all(state.spoke_at is None and state.nearness < 1 for state in states[1:])


def test_a_test_whose_evidence_fell_again_or_began_anew_has_spoken_all_the_same():
    def rows(*steps):
        return [
            plain_row(step, **{f"drift/reward/{key}": value for key, value in zip(KEYS, each, strict=True)})
            for step, each in enumerate(steps, start=1)
        ]

    (fell,) = evidence_of(rows((1.0, 1.0, 3.0, 10), (4.0, 4.0, 3.0, 20), (2.0, 4.0, 3.0, 30)))
    assert (fell.log_e, fell.highest, fell.spoke_at) == (2.0, 4.0, 2)
    (anew,) = evidence_of(rows((4.0, 4.0, 3.0, 10), (0.5, 0.5, 4.1, 5)))
    assert (anew.highest, anew.threshold, anew.num_values, anew.spoke_at) == (0.5, 4.1, 5, 1)


def test_a_lift_is_told_and_no_alarm():
    rows = guarded_rows(6, 3)
    rows[4] |= {"guard/action": "lift", "guard/said": "the fallback is lifted by evidence"}
    assert "After step 5: the fallback is lifted by evidence." in told(rows, "Guard")
    assert alarms(rows) == [f"After step 3: {SAID}."]


KEYS = ("log_e", "log_e_max", "threshold", "n")


def test_acceptance_by_position_needs_a_position():
    assert acceptance_by_position([plain_row(1)]) is None
    assert acceptance_by_position([plain_row(1, **{"rollout/spec_accept_rate_pos_1": None})]) is None
    assert acceptance_by_position(guarded_rows(3)) is not None


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.21, "3.2 s"), (42, "42 s"), (200, "3 min 20 s"), (7505, "2 h 5 min")]
)
def test_times_are_in_words(seconds, words):
    assert duration(seconds) == words
