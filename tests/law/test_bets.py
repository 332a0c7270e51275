"""The laws of the guard's evidence: what a bet is worth on average, exactly, and how often it deceives.

H0 of a test: each value has, given the past, a mean inside the claim. Then every factor of a bet has mean at
most 1 (exact, on tables), an e-process reaches 1 / alpha with probability at most alpha, whoever looks after
every step (exact, over all sequences of a coin; and simulated), and faults are found.
"""

import itertools
import math

import numpy as np
import pytest

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.rl_loops.watch import e_process
from blockroll.rl_loops.watch.e_process import EProcess
from blockroll.rollout.calibration.bets import NUM_BETS, Bets
from blockroll.rollout.calibration.confidence import ConfidenceSequence

VALUES = np.array([0.0, 0.1, 0.35, 0.8, 1.0])


def laws(count=40, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(len(VALUES), 0.5), size=count)


def worth(value, low, high):
    """Of each bet on one value."""
    return np.exp(Bets.on(np.array([value]), low, high).log_wealth_2G)


@pytest.mark.parametrize("law", laws(), ids=str)
def test_every_factor_has_mean_at_most_1_under_its_claim_and_exactly_1_at_its_edge(law):
    mean = float(law @ VALUES)
    exact = sum(p * worth(y, mean, mean) for p, y in zip(law, VALUES, strict=True))
    assert np.abs(exact - 1).max() < 1e-9
    wide = sum(p * worth(y, mean - 0.05, mean + 0.05) for p, y in zip(law, VALUES, strict=True))
    assert (wide <= 1 + 1e-9).all()
    outside = sum(p * worth(y, mean / 2, mean / 2) for p, y in zip(law, VALUES, strict=True))
    assert (outside[0] > 1).all(), "a mean above its claim makes the bets above it grow"


def test_ratios_of_laws_have_mean_1_and_bets_on_them_too():
    target, behavior = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    ratios = target / behavior
    worths = [np.exp(Bets.on_ratios(np.array([w])).log_wealth_2G[0]) for w in ratios]
    assert np.abs(behavior @ np.array(worths) - 1).max() < 1e-12


def reach(probability, *, claim, threshold, steps):
    """P(evidence reaches the threshold within so many steps), over all sequences of a coin."""
    total = 0.0
    for sequence in itertools.product([0, 1], repeat=steps):
        process = EProcess("both")
        for value in sequence:
            process.add(Bets.on(np.array([value]), claim, claim))
        if process.log_e_max >= math.log(threshold):
            total += math.prod(probability if value else 1 - probability for value in sequence)
    return total


def mean_e(probability, *, claim, steps):
    total = 0.0
    for sequence in itertools.product([0, 1], repeat=steps):
        process = EProcess("both")
        for value in sequence:
            process.add(Bets.on(np.array([value]), claim, claim))
        total += math.prod(probability if v else 1 - probability for v in sequence) * math.exp(process.log_e)
    return total


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5])
def test_an_e_process_with_fresh_starts_has_mean_1_and_deceives_no_more_often_than_it_may(probability):
    assert mean_e(probability, claim=probability, steps=8) == pytest.approx(1.0, abs=1e-9)
    for threshold in (1.5, 2.0, 4.0):
        assert reach(probability, claim=probability, threshold=threshold, steps=8) <= 1 / threshold
    assert mean_e(0.9, claim=probability, steps=8) > 1


def test_planted_starts_that_cost_nothing_are_noticed(monkeypatch):
    """Without their weights every start is a free try."""

    honest = EProcess._log_e

    def unweighed(self):
        return honest(self) + math.log(self._num_starts)

    monkeypatch.setattr(EProcess, "_log_e", unweighed)
    with pytest.raises(AssertionError):
        test_an_e_process_with_fresh_starts_has_mean_1_and_deceives_no_more_often_than_it_may(0.3)


def test_evidence_of_parts_adds_up_whatever_the_order():
    values = np.random.default_rng(0).random(60)
    whole = Bets.on(values, 0.4, 0.5)
    parts = Bets.none() + Bets.on(values[40:], 0.4, 0.5) + Bets.on(values[:40], 0.4, 0.5)
    assert parts.num_values == whole.num_values == 60
    assert np.allclose(parts.log_wealth_2G, whole.log_wealth_2G, atol=1e-12)
    assert parts.excess == pytest.approx(whole.excess)


def alarms(num_runs, num_steps, *, alpha, value_of, sides="both", claim=(0.5, 0.5), per_step=4, seed=0):
    """Steps at which runs cross, None where they never do."""
    generator = np.random.default_rng(seed)
    crossed = []
    for _ in range(num_runs):
        process, found = EProcess(sides), None
        for step in range(num_steps):
            process.add(Bets.on(value_of(generator, step, per_step), *claim))
            if process.log_e >= -math.log(alpha):
                found = step
                break
        crossed.append(found)
    return crossed


def test_false_alarms_stay_within_alpha_though_every_step_is_looked_at():
    """Binomial: of 300 runs at alpha 0.1 at most 30 + 3.3 standard deviations may cross."""
    crossed = alarms(300, 200, alpha=0.1, value_of=lambda g, _, n: g.random(n))
    assert sum(step is not None for step in crossed) <= 30 + 3.3 * math.sqrt(300 * 0.1 * 0.9)


def test_planted_a_test_that_is_looked_at_as_if_once_alarms_too_often(monkeypatch):
    """What a z-test at every step would do; the same bound must notice it."""

    def z_test(self):
        spread = math.sqrt(self.num_values / 12)
        p = math.erfc(abs(self.excess) / spread / math.sqrt(2)) if self.num_values else 1.0
        return -math.log(max(p, 1e-300))

    monkeypatch.setattr(EProcess, "_log_e", z_test)
    with pytest.raises(AssertionError):
        test_false_alarms_stay_within_alpha_though_every_step_is_looked_at()


def test_a_fault_that_comes_late_is_found_about_as_soon_as_one_that_comes_at_once():
    def late(generator, step, count):
        return (generator.random(count) < (0.5 if step < 300 else 0.7)).astype(float)

    def early(generator, _, count):
        return (generator.random(count) < 0.7).astype(float)

    at_once = alarms(20, 400, alpha=0.01, value_of=early)
    afterwards = alarms(20, 600, alpha=0.01, value_of=late)
    assert None not in at_once + afterwards
    delays = [step - 300 for step in afterwards]
    assert np.median(delays) < 4 * np.median(at_once) + 20


def test_planted_evidence_without_fresh_starts_is_late(monkeypatch):
    monkeypatch.setattr(e_process, "is_start", lambda step: step == 0)
    with pytest.raises(AssertionError):
        test_a_fault_that_comes_late_is_found_about_as_soon_as_one_that_comes_at_once()


def test_starts_get_rarer_in_a_long_run():
    starts = [step for step in range(100_000) if e_process.is_start(step)]
    assert len(starts) < 1_000
    assert starts[:64] == [*range(64)]


def test_a_confidence_sequence_covers_the_mean_at_all_times_at_once():
    generator, missed = np.random.default_rng(0), 0
    for _ in range(200):
        sequence = ConfidenceSequence(0.1)
        draws = generator.beta(2, 5, size=150)
        is_covered = True
        for value in draws:
            sequence.add(float(value))
            is_covered &= sequence.low <= 2 / 7 <= sequence.high
        missed += not is_covered
        assert sequence.high - sequence.low < 0.25
    assert missed <= 20 + 3.3 * math.sqrt(200 * 0.1 * 0.9)


@pytest.mark.parametrize("value", [math.nan, -0.01, 1.01, math.inf])
def test_values_outside_their_bounds_are_refused_with_advice(value):
    with pytest.raises(InvalidInput, match="scale it by its bounds"):
        Bets.on(np.array([0.5, value]), 0.5, 0.5)
    with pytest.raises(InvalidInput, match="scale it by its bounds"):
        ConfidenceSequence(0.05).add(value)


def test_what_had_no_probability_is_evidence_without_end():
    process = EProcess("above")
    process.add(Bets.on_ratios(np.array([math.inf, 1.0])))
    process.add(Bets.on_ratios(np.array([1.0])))
    assert process.log_e == math.inf
    with pytest.raises(InvalidInput, match="at least 0"):
        Bets.on_ratios(np.array([math.nan]))


def test_evidence_goes_on_from_what_was_kept_of_it():
    generator = np.random.default_rng(1)
    whole, first = EProcess("below"), EProcess("below")
    steps = [Bets.on(generator.random(3), 0.6, 1.0) for _ in range(100)]
    for bets in steps[:50]:
        whole.add(bets)
        first.add(bets)
    second = EProcess("below")
    second.load_state_dict(first.state_dict())
    for bets in steps[50:]:
        whole.add(bets)
        second.add(bets)
    assert second.log_e == whole.log_e
    assert second.log_e_max == whole.log_e_max
    assert np.shape(whole.state_dict()["total"]) == (2, NUM_BETS)
    with pytest.raises(CheckpointError, match="sides"):
        EProcess("above").load_state_dict(first.state_dict())
    sequence = ConfidenceSequence(0.05)
    sequence.add(0.3)
    with pytest.raises(CheckpointError, match="alpha"):
        ConfidenceSequence(0.1).load_state_dict(sequence.state_dict())
