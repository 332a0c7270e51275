"""The state of a run: one step at a time, and what a checkpoint keeps of it.

Policy version n is the weights after n updates. The rollouts of step n are drawn from version n - 1, and
no step starts before every replica has reported the learner's own checksum for that version.
"""

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockroll.config import RunConfig, to_mapping
from blockroll.errors import ConfigError, GuardStopped
from blockroll.rl_loops.advantages import Scores
from blockroll.rl_loops.checkpoint import save_checkpoint
from blockroll.rl_loops.collect import Batch, collect, evaluate
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.prompt_order import PromptOrder
from blockroll.rl_loops.publish import publish
from blockroll.rl_loops.tasks import Row, Task
from blockroll.rl_loops.watch.shadow import (
    Shadow,
    joined,
    lossless,
    rewards_by_group,
    shadow_metrics,
    shadowed,
)
from blockroll.rl_loops.watch.signals import step_metrics
from blockroll.rl_loops.watch.watch import Watch
from blockroll.rollout.audit.files import audit_mark
from blockroll.rollout.planning.reading import read_plan
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.types import PLAIN, Plan, Sampling

log = logging.getLogger(__name__)

SAMPLES_PER_STEP = 2
COUNTERS = ("rollout/failed_total", "reward/failed_total", "sync/checksum_fail_total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What one update learns from."""

    batch: Batch
    scores: Scores
    shadow: Shadow | None  # some of its prompts under the other law
    start: float  # of the step, by time.perf_counter


def train_name(step: int) -> str:
    """What the request ids of a step's rollouts begin with: no two of a run are equal."""
    return f"train step {step}"


def shadow_name(step: int) -> str:
    """The same of its shadow rollouts."""
    return f"shadow step {step}"


def eval_name(step: int) -> str:
    """The same for the evaluation that follows a step; step 0 is before the first."""
    return f"eval step {step}"


def rollout_sampling(config: RunConfig) -> Sampling:
    """How a run's rollouts are drawn; refuses truncation that its correction could not correct."""
    rollout, train = config.rollout, config.train
    is_allowed = train.truncated_rollouts == "allow"
    sampling = rollout.sampling(allow_truncated_mix=is_allowed or not train.importance_sampling_correction)
    if sampling.is_truncated and train.importance_sampling_correction and not is_allowed:
        raise ConfigError(
            f"rollout.{', '.join(sampling.truncation)} leaves out tokens that the policy could draw, so the "
            "weights pi/mu of the correction average to the mass that is left, not to 1; draw without "
            "truncation, or set train.truncated_rollouts=allow to correct all the same, or "
            "train.importance_sampling_correction=false"
        )
    return sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step leaves: its row of metrics, and a few rollouts to read."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]]


def audit_folder(config: RunConfig) -> Path:
    """Where a run's audit is written."""
    return Path(config.rollout.audit_dir or config.run_dir.resolve() / "audit")


class Run:
    """The state of a run, step by step: `draw`, `learn`, `finish`, `settle`.

    Invariant: but for the weights' own movement inside `learn`, the learner is always at the end of `step`,
    and what of that step is still to do is in `_unfinished`; so a checkpoint can be taken at any time.
    """

    def __init__(self, config: RunConfig, task: Task, pool: RolloutPool, learner: Learner) -> None:
        self.config = config
        self.task = task
        self.pool = pool
        self.learner = learner
        self.step = 0
        self._has_started = False
        self._saved_step = -1
        self._num_optimizer_steps = -1  # of the learner at the end of `step`
        self._unfinished: dict[str, Any] | None = (
            None  # the updated, not yet published step: its record so far
        )
        self._counters = dict.fromkeys(COUNTERS, 0.0)
        self._extra: dict[str, Any] = {}
        self._rng: dict[str, Any] = {}  # at the end of `step`: what a step cut off drew is drawn again
        self._audit: list[str] = []  # files of the audit then: later ones hold what is drawn again
        self._sampling = rollout_sampling(config)
        self.watch = Watch(config.watch, dtype=config.policy.dtype)
        self._held_plan: Plan | None = None
        self._watched: dict[str, Any] = {}  # the watch at the end of `step`
        self._prompts = PromptOrder(config, task, pool)
        self._eval_rows = self._prompts.eval_rows
        self._plan_name = read_plan(config.rollout.plan, learner.policy).name

    @property
    def has_unfinished_step(self) -> bool:
        """Whether `finish` and `settle` come next, not `draw`."""
        return self._unfinished is not None

    @property
    def is_torn(self) -> bool:
        """Whether an update was cut off: the weights are those of no step."""
        return self._has_started and self.learner.num_optimizer_steps != self._num_optimizer_steps

    def start(self, state: Mapping[str, Any] | None) -> None:
        """Take over a checkpoint's state, bring every replica to the learner's weights, and evaluate once.

        The learner is that of the checkpoint already.
        """
        if state is not None:
            self.step = int(state["step"])
            self._counters = {name: float(state["counters"][name]) for name in COUNTERS}
            self._extra = dict(state["extra"])
            self._unfinished = state["unfinished"]
            if "watch" in state:
                self.watch.load_state_dict(state["watch"])
            else:
                log.warning("Guard: the checkpoint has no evidence in it, so every test begins here")
            self._follow_guard()
            if self._unfinished is None:
                self._saved_step = self.step
                self._publish(self.step)
            _load_rng_state(state["rng"])
        else:
            self._publish(self.pool.version)
            if self._eval_rows:
                self._extra = {"eval/initial_reward": self._evaluate()["eval/reward"]}
        self._num_optimizer_steps = self.learner.num_optimizer_steps
        self._note_drawn()
        self._has_started = True

    def draw(self) -> Drawn:
        """Rollouts and rewards of the next step; nothing of the run changes, so this may be interrupted."""
        start = time.perf_counter()
        count = self.config.train.prompts_per_step
        rows, step = self._prompts.rows(self.step * count, count), self.step + 1
        batch = self._collect(train_name(step), rows, self._sampling_in_use, f"step {step}")
        scores = self.learner.algorithm.score(self.task.reward_fn, batch)
        return Drawn(batch=batch, scores=scores, shadow=self._draw_shadow(rows, step), start=start)

    def _draw_shadow(self, rows: Sequence[Row], step: int) -> Shadow | None:
        """Some prompts of a step under the other law; None: it has no such prompts."""
        share, seed = self.config.watch.shadow_share, self.config.seed
        places = shadowed(share, len(rows), seed=seed, step=step)
        if not places:
            return None
        other = lossless(self._sampling) if self.watch.mode == "as_asked" else self._sampling
        batch = self._collect(
            shadow_name(step), [rows[place] for place in places], other, f"shadow step {step}"
        )
        scores = self.learner.algorithm.score(self.task.reward_fn, batch)
        return Shadow(places=tuple(places), batch=batch, scores=scores)

    def _collect(self, name: str, rows: Sequence[Row], sampling: Sampling, seed_word: str) -> Batch:
        return collect(
            self.pool,
            rows,
            name=name,
            seed_words=(self.config.seed, seed_word),
            group_size=self.config.train.group_size,
            sampling=sampling,
            room=self._prompts.room,
        )

    @property
    def _sampling_in_use(self) -> Sampling:
        """As asked, or without mixing where the guard has fallen back."""
        return self._sampling if self.watch.mode == "as_asked" else lossless(self._sampling)

    def learn(self, drawn: Drawn) -> None:
        """One policy update. `finish` follows; whoever resumes before that finishes the step then."""
        batch, scores = drawn.batch, drawn.scores
        rewards = scores.rewards_B.tolist()
        generated = step_metrics(
            batch.rollouts, batch.rows, rewards, version=self.step, duration_s=batch.duration_s
        )
        seen = self._observe(drawn)
        if drawn.shadow is not None and self.config.watch.shadow_trains:
            batch, scores = joined(batch, scores, drawn.shadow)
        advantages = self.learner.algorithm.advantages(scores, batch.group_ids)
        update_start = time.perf_counter()
        learner_metrics = self.learner.update(
            batch.rollouts,
            advantages,
            on_laws=lambda learned, laws: self.watch.observe_laws(learned, laws.logprobs_N.cpu().numpy()),
        )
        now, step = time.perf_counter(), self.step + 1
        self._unfinished = {
            "metrics": {
                "step": step,
                "reward_std": advantages.reward_std,
                "frac_reward_zero_std": advantages.frac_zero_std,
                "policy_version": step - 1,
                "plan": self._plan_name,
                "kernels": self.pool.kernels,
                **generated,
                **learner_metrics,
                **seen,
                **self.watch.decide(step),
                "perf/update_s": now - update_start,
            },
            "samples": _samples(drawn.batch, rewards, step),
            "elapsed_s": now - drawn.start,
        }
        self._counters["rollout/failed_total"] += scores.num_rollouts_failed
        self._counters["reward/failed_total"] += scores.num_rewards_failed
        self._note_drawn()
        self.step = step
        self._num_optimizer_steps = self.learner.num_optimizer_steps

    def _observe(self, drawn: Drawn) -> dict[str, float]:
        """Tell the watch what was drawn; metrics of the shadow, if there is one."""
        self.watch.observe_calibration(self.pool.take_evidence())
        self.watch.observe_rollouts(drawn.batch.rollouts)
        shadow = drawn.shadow
        if shadow is None:
            return {"shadow/num_rollouts": 0.0} if self.config.watch.shadow_share else {}
        self.watch.observe_rollouts(shadow.batch.rollouts)
        size = self.config.train.group_size
        in_use, others = rewards_by_group(drawn.scores, size), rewards_by_group(shadow.scores, size)
        in_use = [in_use[place] for place in shadow.places]
        is_asked = self.watch.mode == "as_asked"
        self.watch.observe_pairs(*((in_use, others) if is_asked else (others, in_use)))
        return shadow_metrics(shadow, in_use, others)

    def _follow_guard(self) -> None:
        """Replicas decode as the guard's mode says, from their next step on."""
        plan = PLAIN if self.watch.mode == "plain" else None
        if plan != self._held_plan:
            self.pool.hold_plan(plan)
            self._held_plan = plan

    def check_guard(self) -> None:
        """GuardStopped if the step that has just ended is where the guard stops the run."""
        decision = self.watch.guard.decision
        if decision is not None and (decision.step, decision.action) == (self.step, "stop"):
            raise GuardStopped(f"the guard stops the run after step {self.step}: {decision.said}")

    def lift_guard(self) -> str:
        """End a fallback by hand, and say so; InvalidInput where the config says that it is for good."""
        lifted = self.watch.guard.lift(self.step)
        self._follow_guard()
        return "no test has spoken, so nothing is lifted" if lifted is None else lifted.said

    def finish(self) -> StepRecord:
        """Publish the update, and evaluate when it is time; `settle` follows once the record is written."""
        assert self._unfinished is not None, "no step is unfinished"
        config, so_far = self.config.train, self._unfinished
        start = time.perf_counter()
        sync_metrics = self._publish(self.step)
        metrics = {
            **so_far["metrics"],
            **sync_metrics,
            **self._totals(),
            "step_time": so_far["elapsed_s"] + time.perf_counter() - start,
            **self._extra,
        }
        if self._eval_rows and (self.step % config.eval_every == 0 or self.step == config.steps):
            metrics.update(self._evaluate())
        return StepRecord(metrics=metrics, samples=so_far["samples"])

    def settle(self) -> None:
        """The step's record is written. Saves when it is time."""
        self._unfinished, self._extra = None, {}
        self._note_drawn()
        self._follow_guard()
        every = self.config.train.checkpoint_every
        if every and self.step % every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of `step`, unless it is there, or the weights are those of no step."""
        if not self._has_started or self.is_torn or self._saved_step == self.step:
            return
        state = {
            "step": self.step,
            "policy_version": self.step,
            "config": to_mapping(self.config),
            "learner": self.learner.state_dict(),
            "rng": self._rng,
            "counters": self._totals(),
            "extra": self._extra,
            "unfinished": self._unfinished,
            "watch": self._watched,
            "audit": self._audit,
        }
        keep = self.config.train.keep_checkpoints
        save_checkpoint(
            self.config.run_dir,
            self.learner.policy,
            state,
            keep=keep,
            write_others=self.pool.save_history,
        )
        self._saved_step = self.step

    def _note_drawn(self) -> None:
        """What a resumed run does not draw again ends here."""
        self._rng = _rng_state()
        self._watched = self.watch.state_dict()
        self._audit = audit_mark(audit_folder(self.config))

    def _evaluate(self) -> dict[str, float]:
        """With the same seeds every time."""
        return evaluate(
            self.pool,
            self._eval_rows,
            self.task.reward_fn,
            name=eval_name(self.step),
            seed_words=(self.config.seed, "eval"),
            sampling=self._sampling_in_use,
            room=self._prompts.room,
        )

    def _totals(self) -> dict[str, float]:
        return {
            **self._counters,
            "sync/checksum_fail_total": self._counters["sync/checksum_fail_total"]
            + self.pool.num_refused_updates,
        }

    def _publish(self, version: int) -> dict[str, float]:
        """Hand the learner's weights to every replica; WeightSyncError unless all serve just these."""
        start = time.perf_counter()
        dtype = getattr(torch, self.config.policy.dtype)
        publish(self.pool, self.learner.named_tensors(), version=version, dtype=dtype)
        return {
            "sync/version": float(self.pool.version),
            "sync/engines_stale": float(sum(state != "READY" for state in self.pool.states)),
            "engine/healthy": float(sum(state == "READY" for state in self.pool.states)),
            "engine/redispatch_total": float(self.pool.num_redispatched),
            "engine/shared_texts_total": float(self.pool.num_shared_texts),
            "perf/weight_sync_s": time.perf_counter() - start,
        }


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _load_rng_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _samples(batch: Batch, rewards: list[float], step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": batch.rows[i]["prompt"],
            "completion": batch.completions[i],
            "reward": rewards[i],
            "num_tokens": len(batch.rollouts[i].token_ids),
            "num_accepted": batch.rollouts[i].stats.num_accepted,
            "finish_reason": batch.rollouts[i].finish_reason,
        }
        for i in range(min(SAMPLES_PER_STEP, len(batch.rollouts)))
    ]
