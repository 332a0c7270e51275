"""From what a step leaves to what the guard is told: which values, and what is claimed of them.

The claims, each of the mean of a value given all that came before:

    calibration/<functional>   as `rollout/calibration/observer.py` states them
    calibration/ratio          policy over behaviour law of a token, pi / mu: at most 1, whatever the law
    learner                    |log pi by the learner - by the replica| of a token, up to 1 nat: at most a
                               tolerance
    acceptance                 of a rollout by one plan under one law: within what its first rollouts leave
                               open, and a tolerance
    reward                     of a prompt, under the mixed law less under the lossless one: at least minus a
                               tolerance

Rewards are scaled by bounds that are fixed beforehand; what failed counts as the lower one in both arms.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blockroll.config import RolloutConfig, WatchConfig
from blockroll.errors import InvalidInput
from blockroll.rl_loops.watch.guard import Guard, Mode, Test
from blockroll.rollout.calibration.bets import Bets
from blockroll.rollout.calibration.confidence import ConfidenceSequence
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.calibration.observer import DEAD_BAND, FUNCTIONALS
from blockroll.types import Plan, Rollout

log = logging.getLogger(__name__)

WATCH_EVERY = 32  # of so many decoding steps a guard has one looked at, unless the config says otherwise
_MOST_NATS = 1.0  # of a difference of log-probabilities; a larger one counts as this
_TOLERANCES = {"float32": 0.005, "bfloat16": 0.05, "float16": 0.05}  # nats, by what replicas multiply in


class Watch:
    """The tests of one run. Fed once a step with all that the step drew, in a fixed order; then `decide`."""

    def __init__(self, config: WatchConfig, *, dtype: str = "float32") -> None:
        """`dtype` is that of the replicas' weights."""
        self.config = config
        self.tolerance = config.learner_tolerance or _TOLERANCES[dtype]
        self.guard = Guard(
            [*_tests(config, self.tolerance)],
            budget=config.alpha_budget - config.acceptance_alpha / 2 * (config.acceptance != "off"),
            lift=config.lift,
        )
        self._references: dict[str, ConfidenceSequence] = {}  # of acceptance, by kind
        self._rewards = ConfidenceSequence(config.reward_alpha)
        self._num_clipped = 0
        self._seen = Evidence()  # of the step under way

    @property
    def mode(self) -> Mode:
        """How the next rollouts are to be drawn."""
        return self.guard.mode

    def observe_calibration(self, evidence: Evidence) -> None:
        """What engines have bet on their own tokens, and seen of them (`RolloutPool.take_evidence`)."""
        self._seen += evidence
        if self.config.calibration != "off":
            for name, bets in evidence.bets.items():
                self.guard.add(f"calibration/{name}", bets)

    def observe_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        """Every rollout of the step that no error ended, whatever its reward."""
        self.observe_ratios(ratio_bets(rollouts))
        self.observe_acceptance(acceptance_rates(rollouts))

    def observe_ratios(self, bets: Bets) -> None:
        """`ratio_bets` of a step's rollouts, wherever they lie."""
        if self.config.calibration != "off":
            self.guard.add("calibration/ratio", bets)

    def observe_acceptance(self, rates: Sequence[tuple[str, float]]) -> None:
        """`acceptance_rates` of a step, in a fixed order: each is held against the first of its kind."""
        if self.config.acceptance == "off":
            return
        for kind in dict.fromkeys(kind for kind, _ in rates):
            reference = self._reference(kind)
            of_kind = [rate for each, rate in rates if each == kind]
            num_first = max(0, self.config.acceptance_reference - reference.num_values)
            for rate in of_kind[:num_first]:
                reference.add(rate)
            if of_kind[num_first:]:
                low = reference.low - self.config.acceptance_tolerance
                high = reference.high + self.config.acceptance_tolerance
                self.guard.observe("acceptance", of_kind[num_first:], low=low, high=high)

    def _reference(self, kind: str) -> ConfidenceSequence:
        """Acceptance of the first rollouts of a kind; half of the test's alpha is shared by all kinds."""
        if kind not in self._references:
            number = len(self._references) + 1
            alpha = self.config.acceptance_alpha / 2 / (number * (number + 1))
            self._references[kind] = ConfidenceSequence(alpha)
        return self._references[kind]

    def observe_laws(self, rollouts: Sequence[Rollout], logprobs_N: np.ndarray) -> None:
        """The learner's log-probabilities of every token, by the weights that the rollouts were asked of."""
        reported = [value for rollout in rollouts for value in rollout.policy_logprobs]
        differences_N = np.asarray(logprobs_N, dtype=np.float64) - np.array(reported)
        self.observe_learner(self.difference_bets(differences_N))

    def observe_learner(self, bets: Bets) -> None:
        """`difference_bets` of a step's tokens, wherever they lie."""
        if self.config.learner != "off":
            self.guard.add("learner", bets)

    def difference_bets(self, differences_N: np.ndarray) -> Bets:
        """On the learner's log-probability less the reported one, of each token; NaN is left out."""
        sizes_N = np.abs(differences_N)
        known_N = sizes_N[~np.isnan(sizes_N)].clip(max=_MOST_NATS) / _MOST_NATS
        return Bets.on(known_N, 0.0, self.tolerance / _MOST_NATS)

    def observe_pairs(
        self, asked: Sequence[Sequence[float | None]], lossless: Sequence[Sequence[float | None]]
    ) -> None:
        """Rewards of the groups of each prompt under the law that was asked for and under the lossless one.

        None, NaN and what lies below the bounds counts as the lower one, what lies above as the upper one.
        InvalidInput unless there are as many groups of each, none empty.
        """
        if len(asked) != len(lossless) or not all(map(len, (*asked, *lossless))):
            raise InvalidInput(
                f"shadow pairs need rewards of the same prompts under both laws, got {len(asked)} groups "
                f"under the one and {len(lossless)} under the other"
            )
        shares = [np.array([self._share(group) for group in arm]) for arm in (asked, lossless)]
        values = (1 + shares[0] - shares[1]) / 2
        edge = (1 - self.config.reward_tolerance) / 2
        for value in values.tolist():
            self._rewards.add(value)
        if self.config.reward == "off":
            return
        if self.mode == "as_asked":
            self.guard.observe("reward", values, low=edge)
        else:
            self.guard.observe_again(values, high=edge)

    def _share(self, rewards: Sequence[float | None]) -> float:
        """Mean of rewards, of what lies between the bounds."""
        low, high = self.config.reward_low, self.config.reward_high
        rewards_N = np.array([math.nan if reward is None else reward for reward in rewards], dtype=np.float64)
        num_outside = int(((rewards_N < low) | (rewards_N > high)).sum())
        if num_outside and not self._num_clipped:
            log.warning(
                "RewardBounds: a reward of a shadow pair lies outside watch.reward_low %g and reward_high "
                "%g: it counts as the nearer one, here and from now on",
                low,
                high,
            )
        self._num_clipped += num_outside
        return float(((np.nan_to_num(rewards_N, nan=low).clip(low, high) - low) / (high - low)).mean())

    def decide(self, step: int) -> dict[str, Any]:
        """Metrics of the step: all evidence, and what the guard does from the next step on."""
        mode = self.mode
        decision = self.guard.decide(step)
        if decision is not None:
            log.warning("Guard, step %d: %s", step, decision.said)
        seen, self._seen = self._seen, Evidence()
        found = {
            **_figures(seen),
            **self.guard.metrics(),
            "guard/mode": mode,
            "guard/action": None if decision is None else decision.action,
            "guard/said": None if decision is None else decision.said,
        }
        if self._rewards.num_values:
            scale = 2 * (self.config.reward_high - self.config.reward_low)
            for name in ("mean", "low", "high"):
                key = name if name == "mean" else f"cs_{name}"
                found[f"drift/reward/{key}"] = scale * (getattr(self._rewards, name) - 0.5)
            found["drift/reward/clipped_total"] = float(self._num_clipped)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {
            "guard": self.guard.state_dict(),
            "references": {kind: each.state_dict() for kind, each in self._references.items()},
            "rewards": self._rewards.state_dict(),
            "num_clipped": self._num_clipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. CheckpointError if that was of other tests or alphas."""
        self.guard.load_state_dict(state["guard"])
        self._references = {}
        for kind, reference in state["references"].items():
            self._references[kind] = ConfidenceSequence(reference["alpha"])
            self._references[kind].load_state_dict(reference)
        self._rewards.load_state_dict(state["rewards"])
        self._num_clipped = int(state["num_clipped"])


def _figures(seen: Evidence) -> dict[str, float]:
    """Metrics of a step's looked-at positions; none of what it had none of."""
    means = {name: total / count for name, (total, count) in seen.sums.items() if count}
    surprisals = {name: means.pop(f"{name}_surprisal", None) for name in ("target", "draft")}
    return {
        **{f"rollout/{name}": mean for name, mean in means.items()},
        **{
            f"rollout/block_perplexity_{name}": math.exp(mean)
            for name, mean in surprisals.items()
            if mean is not None
        },
    }


def looked_at(rollout: RolloutConfig, config: WatchConfig) -> RolloutConfig:
    """With one decoding step in `WATCH_EVERY` looked at where calibration is tested, if it says nothing."""
    if rollout.watch_every is not None:
        return rollout
    return dataclasses.replace(rollout, watch_every=0 if config.calibration == "off" else WATCH_EVERY)


def ratio_bets(rollouts: Sequence[Rollout]) -> Bets:
    """On policy over behaviour law of every token, of rollouts that no error ended."""
    pairs = [
        pair
        for rollout in _sound(rollouts)
        for pair in zip(rollout.policy_logprobs, rollout.behavior_logprobs, strict=True)
    ]
    ratios_N = np.exp(np.subtract(*np.array(pairs).T)) if pairs else np.empty(0)
    return Bets.on_ratios(ratios_N[~np.isnan(ratios_N)], 1.0 + DEAD_BAND)


def acceptance_rates(rollouts: Sequence[Rollout]) -> list[tuple[str, float]]:
    """Of each rollout without an error, by each plan that drafted: its kind, plan and law, and the rate."""
    rates = []
    for rollout in _sound(rollouts):
        counts: dict[Plan, tuple[int, int]] = {}
        for step, count in rollout.stats.steps:
            if step.num_drafts:
                accepted, drafted = counts.get(step.plan, (0, 0))
                counts[step.plan] = (accepted + count * step.num_accepted, drafted + count * step.num_drafts)
        rates += [
            (f"{plan.name}, {rollout.law.name}", accepted / drafted)
            for plan, (accepted, drafted) in counts.items()
        ]
    return rates


def _sound(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [rollout for rollout in rollouts if rollout.error is None]


def _tests(config: WatchConfig, tolerance: float) -> list[Test]:
    tests = []
    if config.calibration != "off":
        for name in (*FUNCTIONALS, "ratio"):
            tests.append(
                Test(
                    name=f"calibration/{name}",
                    alpha=config.calibration_alpha,
                    action=config.calibration,
                    claim="tokens follow the laws stated for them",
                    sides="above" if name in ("ratio", "rejected") else "both",
                )
            )
    if config.learner != "off":
        tests.append(
            Test(
                name="learner",
                alpha=config.learner_alpha,
                action=config.learner,
                claim=f"learner and replicas differ by at most {tolerance:g} nats a token",
                sides="above",
            )
        )
    if config.acceptance != "off":
        tests.append(
            Test(
                name="acceptance",
                alpha=config.acceptance_alpha / 2,  # the other half is the reference's own
                action=config.acceptance,
                claim=f"a plan's acceptance is that of its first {config.acceptance_reference} rollouts, "
                f"within {config.acceptance_tolerance:g}",
            )
        )
    if config.reward != "off":
        bounds = f"{config.reward_low:g} to {config.reward_high:g}"
        tests.append(
            Test(
                name="reward",
                alpha=config.reward_alpha,
                action=config.reward,
                claim="the mixed law earns no less than the lossless one, but for "
                f"{config.reward_tolerance:g} of {bounds}",
                sides="below",
            )
        )
    return tests
