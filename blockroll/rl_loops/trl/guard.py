"""The guard under a TRL trainer: tested after every update, acted on from the next generation on.

    GRPOTrainer(..., rollout=RolloutConfig(mix_weight=0.5), callbacks=[GuardCallback(WatchConfig(...))])

Ranks send what they have seen to rank 0, as sums and few numbers. It alone holds evidence, decides, and tells
the others, so that no rank acts otherwise. Rollouts of an evaluation are no evidence of anything here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainerCallback

from blockroll.config import RolloutConfig, WatchConfig
from blockroll.errors import ConfigError, InvalidInput
from blockroll.rl_loops.trl.placement import forward_dtype
from blockroll.rl_loops.trl.together import together
from blockroll.rl_loops.watch.guard import Mode
from blockroll.rl_loops.watch.shadow import lossless
from blockroll.rl_loops.watch.watch import Watch, acceptance_rates, looked_at, ratio_bets
from blockroll.rollout.calibration.bets import Bets
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.types import PLAIN, Plan, Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a rank has seen since the last decision."""

    evidence: Evidence  # of its engines
    ratios: Bets
    learner: Bets
    acceptance: tuple[tuple[str, float], ...]  # of its rollouts, in the order they were asked for
    mode: Mode  # that it draws in
    is_lossless: bool  # whether all of its rollouts were


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What rank 0 has decided."""

    metrics: dict[str, Any]
    mode: Mode  # from the next generation on
    action: str | None  # None: nothing new


class GuardCallback(TrainerCallback):
    """Watches one of blockroll's trainers, which finds it among its callbacks. One per rank and trainer."""

    def __init__(self, config: WatchConfig | None = None, *, lift: bool = False) -> None:
        """`lift`: end a fallback that a checkpoint brings back.

        ConfigError for tests that need shadow rollouts: a trainer draws none.
        """
        self.config = config or WatchConfig()
        _check(self.config, lift)
        self._lifts = lift
        self._trainer: Any = None
        self._mode: Mode = "as_asked"
        self._held: Plan | None = None
        self._texts: dict[str, Any] = {}  # of the latest decision
        self._is_policy = False  # whether the batch that is learned from was drawn from the policy itself

    @property
    def mode(self) -> Mode:
        """How the next completions are drawn, the same on every rank."""
        return self._mode

    def bind(self, trainer: Any) -> None:
        """The trainer is made: from now on this guard is its own. InvalidInput if it is another's already."""
        if self._trainer is not None:
            raise InvalidInput(
                "this GuardCallback is another trainer's, whose evidence it holds: give each trainer its own"
            )
        self._trainer = trainer
        self._watch = Watch(self.config, dtype=str(forward_dtype(trainer)).removeprefix("torch."))
        trainer._views["train"].on_log_weights = self._compare
        self._begin()

    def looked_at(self, rollout: RolloutConfig) -> RolloutConfig:
        """With replicas that look at their own steps, unless the config says otherwise."""
        return looked_at(rollout, self.config)

    def note(self, rollouts: Sequence[Rollout], *, is_training: bool) -> None:
        """A round has ended, in which this rank drew these. All ranks call it, once all have drawn."""
        evidence = self._trainer.rollouts.placement.pool.take_evidence()
        if not is_training:
            return
        self._has_rounds = True
        self._evidence += evidence
        self._rollouts += rollouts
        self._is_policy = all(rollout.request.sampling.is_policy for rollout in rollouts)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """InvalidInput under a trainer that has not found this guard."""
        if self._trainer is None or self._trainer.args is not args:
            raise InvalidInput(
                "GuardCallback watches the rollouts of blockroll's trainers, and this trainer has not found "
                "it: import GRPOTrainer or RLOOTrainer from blockroll.rl_loops.trl, and pass "
                "callbacks=[GuardCallback(...)] where the trainer is made"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is made. Nothing is decided where it learned once more from rollouts that were seen."""
        if not self._has_rounds:
            return
        accelerator = self._trainer.accelerator
        ranks: list[Seen] = gather_object([self._take()])
        told: list[Outcome | None] = [None]
        with together(accelerator, "deciding what the guard does"):
            if accelerator.is_main_process:
                told = [self._decide(ranks, state.global_step)]
        if accelerator.num_processes > 1:
            broadcast_object_list(told)
        (outcome,) = told
        assert outcome is not None, "rank 0 has told what it decided"
        with together(accelerator, "doing what the guard has decided"):
            self._follow(outcome.mode)
        self._note_metrics(outcome.metrics)
        if outcome.action is not None:
            control.should_log = True
        if outcome.action == "stop":
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # under save_strategy "best" it would decide what is saved

    def told(self) -> dict[str, Any]:
        """Texts for the line of an update that is logged; what was decided stands in one of them."""
        texts = self._texts
        self._texts = {**texts, "guard/action": None, "guard/said": None}
        return texts

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from; of rank 0, which holds the evidence."""
        return self._watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's guard; None: it had none. All ranks call it.

        CheckpointError if that was of other tests or alphas.
        """
        is_main = self._trainer.accelerator.is_main_process
        if state is not None:
            self._watch.load_state_dict(state)
        elif is_main:
            log.warning("the checkpoint has no guard: this one begins here, with nothing of earlier steps")
        if self._lifts:
            lifted = self._watch.guard.lift(0)
            if is_main:
                log.warning("Guard: %s", "no fallback to lift" if lifted is None else lifted.said)
        self._follow(self._watch.mode)
        self._begin()

    def _begin(self) -> None:
        """Nothing is seen yet of rollouts in the mode in force."""
        self._has_rounds = False  # whether any was noted since the last decision
        self._evidence = Evidence()  # of these rounds,
        self._rollouts: list[Rollout] = []  # and what they drew
        self._learner = Bets.none()

    def _compare(self, log_weights_N: Tensor) -> None:
        """The learner's log-probabilities less the reported ones, of tokens that its very weights drew."""
        if self._is_policy:
            self._learner += self._watch.difference_bets(np.asarray(log_weights_N.double().cpu()))

    def _take(self) -> Seen:
        seen = Seen(
            evidence=self._evidence,
            ratios=ratio_bets(self._rollouts),
            learner=self._learner,
            acceptance=tuple(acceptance_rates(self._rollouts)),
            mode=self._mode,
            is_lossless=all(rollout.law.weight == 1 for rollout in self._rollouts),
        )
        self._begin()
        return seen

    def _decide(self, ranks: Sequence[Seen], step: int) -> Outcome:
        modes = [each.mode for each in ranks]
        assert set(modes) == {self._watch.mode}, f"ranks draw {modes}, the guard has {self._watch.mode}"
        assert self._watch.mode == "as_asked" or all(each.is_lossless for each in ranks), (
            f"in mode {self._watch.mode} of the guard rollouts were drawn under a mixed law"
        )
        self._watch.observe_calibration(sum((each.evidence for each in ranks), Evidence()))
        self._watch.observe_ratios(sum((each.ratios for each in ranks), Bets.none()))
        self._watch.observe_learner(sum((each.learner for each in ranks), Bets.none()))
        self._watch.observe_acceptance([rate for each in ranks for rate in each.acceptance])
        metrics = self._watch.decide(step)
        return Outcome(metrics=metrics, mode=self._watch.mode, action=metrics["guard/action"])

    def _follow(self, mode: Mode) -> None:
        """Rollouts are drawn in this mode from the next generation on."""
        rollouts = self._trainer.rollouts
        self._mode = mode
        rollouts.sampling = rollouts.asked if mode == "as_asked" else lossless(rollouts.asked)
        plan = PLAIN if mode == "plain" else None
        if plan != self._held:
            rollouts.placement.pool.hold_plan(plan)
            self._held = plan

    def _note_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Numbers go through the trainer's log, sums over the run as they are now; texts wait for a line."""
        for name, value in metrics.items():
            if name.startswith("guard/"):
                self._texts[name] = value
            elif name.startswith("drift/"):
                self._trainer._metrics["train"][name] = [value]
            else:
                self._trainer._metrics["train"][name].append(value)


def _check(config: WatchConfig, lift: bool) -> None:
    shadows = [
        name
        for name, is_asked in (
            ("watch.reward", config.reward != "off"),
            ("watch.shadow_share", config.shadow_share > 0),
            ("watch.lift='evidence'", config.lift == "evidence"),
        )
        if is_asked
    ]
    if shadows:
        raise ConfigError(
            f"{', '.join(shadows)}: this needs shadow rollouts, which a TRL trainer does not draw. Leave "
            "watch.reward off, watch.shadow_share 0 and watch.lift 'by_hand' or 'never', or train by "
            "blockroll's own loop (blockroll train), which draws them"
        )
    if lift and config.lift == "never":
        raise ConfigError("lift=True ends a fallback, and watch.lift='never' says that they are for good")


def find_guard(callbacks: Sequence[TrainerCallback]) -> GuardCallback | None:
    """The guard among a trainer's callbacks, if there is one. InvalidInput for several."""
    found = [callback for callback in callbacks if isinstance(callback, GuardCallback)]
    if len(found) > 1:
        raise InvalidInput(f"a trainer has one guard, got {len(found)}: put all tests into one WatchConfig")
    return found[0] if found else None
