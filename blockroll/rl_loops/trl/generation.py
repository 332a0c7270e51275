"""What a TRL trainer generates with: the two methods that it calls, over a pool of replicas.

TRL asks for completions of prompts that are token ids already. Before each batch the trainer's weights are
compared with those that the replicas got last, bit by bit: a policy version is the pool's own, and grows
whenever they differ, whatever the trainer's step is. A checkpoint begins a version too, so that what was
drawn after it can be told from what was drawn before. Seeds derive from the trainer's seed, the step, the
rank, which call of the step it is and the place in the batch, so a resumed run draws what the interrupted one
would have.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from blockroll.config import RolloutConfig
from blockroll.errors import InvalidInput, ReplicaError
from blockroll.rl_loops.advantages import FAILED_REASONS
from blockroll.rl_loops.trl.agreement import require_agreement
from blockroll.rl_loops.trl.arguments import sampling_of
from blockroll.rl_loops.trl.contract import TRAINER_PARTS
from blockroll.rl_loops.trl.fingerprint import Fingerprint
from blockroll.rl_loops.trl.placement import Placement, forward_dtype
from blockroll.rl_loops.trl.together import on_any, raise_together, together
from blockroll.rollout.engine.requests import derive_seed
from blockroll.samplers.constraints import Regex
from blockroll.types import Request, Rollout, Sampling, SamplingOptions
from blockroll.types.bounds import hints_of

TRL_NAMES = {"max_tokens": "max_completion_length"}  # options of sampling that TRL names otherwise


class Completions(NamedTuple):
    """What TRL takes from its engine, in its order; a log-probability stands in a list of its own."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[list[float]]]
    logprob_token_ids: None


class TrainerRollouts:
    """Stands where TRL's trainers keep their vLLM engine. One per rank."""

    def __init__(
        self, trainer: Any, placement: Placement, sampling: Sampling, *, check_sync: str = "first"
    ) -> None:
        """`check_sync` as in `RolloutConfig`."""
        self.placement = placement
        self.asked = sampling
        self.sampling = sampling  # in use: as asked, but where a guard has fallen back
        self.version = -1  # of the trainer's weights, as the pool serves them; -1 before the first sync
        self.rollouts: list[Rollout] = []  # of the round under way, in the order of their requests
        self.duration_s = 0.0  # that the round has generated for
        self.weight_sync_s = 0.0
        self._trainer = trainer
        self._calls: Counter[tuple[str, int]] = Counter()  # by mode and step
        self.trained: list[Rollout] = []  # of the latest batch that the trainer learns from
        self.is_met = False  # whether the ranks have met in the round under way, behind their first call
        self._error: BaseException | None = None  # of a tool loop's call in the round under way
        self._after = -1  # versions up to this one are those of a checkpoint
        self._served: Fingerprint = ()
        self._checks_of_run = {"off": 0, "first": 2, "every": math.inf}[check_sync]
        self.begin_run()
        self._compared: tuple[Any, bool] = ((), False)

    def begin_run(self) -> None:
        """A training or an evaluation begins: laws are compared anew, whatever was done to the model."""
        self._checks_left = self._checks_of_run
        self._begins_run = True

    def note_trained(self) -> None:
        """The round that ends here is one to learn from. All ranks call it."""
        self.trained = self.rollouts
        if self.placement.alignment is not None:
            self.placement.alignment.watch(self.trained)

    def begin_round(self) -> None:
        """All ranks start to generate for the same batch."""
        self.rollouts, self.duration_s, self.is_met = [], 0.0, False

    def end_round(self) -> None:
        """The batch is complete; a later turn of one of its texts would start from its prompt again.

        All ranks call it, and raise what one of them has met in a tool loop.
        """
        error, self._error = self._error, None
        raise_together(self._trainer.accelerator, error, "generating rollouts")
        self.placement.end_round(self.rollouts)

    def sync_weights(self) -> None:
        """Every replica decodes with the trainer's weights from now on. All ranks call it.

        Nothing is sent if the replicas hold them already.
        """
        start = time.perf_counter()
        accelerator = self._trainer.accelerator
        now: Fingerprint = ()
        with together(accelerator, "comparing weights"):
            now = self.placement.fingerprint()
        pool = self.placement.pool
        differs = now != self._served or pool.version != self.version or self.version <= self._after
        has_moved = on_any(accelerator, now != self._served)
        if on_any(accelerator, differs):
            self.version = self.placement.sync(after=self._after)
        if self._checks_left and (has_moved or self._begins_run):
            self._checks_left -= 1
            self._require_agreement()
        self._served, self._begins_run = now, False
        self.weight_sync_s = time.perf_counter() - start

    def _require_agreement(self) -> None:
        """Twice at least: an update that PEFT begins with is zero, and left out would not be missed."""
        gap = math.inf
        with together(self._trainer.accelerator, "comparing the generating policy with the trained one"):
            gap = self.placement.gap()
            require_agreement(gap, dtype=forward_dtype(self._trainer), version=self.version)

    def begin_version(self, after: int) -> None:
        """The next batch is drawn as a version above this one, with weights that may be the same."""
        self._after = after

    def are_weights_served(self) -> bool:
        """Whether the trainer's weights, of this rank, are now those that the replicas got last."""
        counters = tuple(each._version for each in self._trainer.model.parameters())
        key = (self._trainer.state.global_step, self.version, counters)
        if self._compared[0] != key:
            self._compared = (key, self.placement.fingerprint() == self._served)
        return self._compared[1]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any],
    ) -> Completions:
        """One completion for each prompt, which TRL has repeated already.

        An error on one rank, of any kind, is raised on all of them: in the first call of a round, which all
        ranks make, or at the end of the round, for the calls of a tool loop are each rank's own.
        """
        if images is not None:
            raise InvalidInput("prompts with images are not served: blockroll decodes text models")
        error: BaseException | None = None
        finished: list[Rollout] = []
        with profiler:
            start = time.perf_counter()
            try:
                finished = self._draw(prompts, num_generations)
            except BaseException as failure:  # noqa: BLE001 raised below, on every rank
                error = failure
            self.duration_s += time.perf_counter() - start
        if not self.is_met:
            self.is_met = True
            raise_together(self._trainer.accelerator, error, "generating rollouts")
        elif error is not None:
            return self._stand_in(prompts, error)
        self.rollouts += finished
        return Completions(
            prompt_ids=[list(prompt) for prompt in prompts],
            completion_ids=[list(rollout.token_ids) for rollout in finished],
            logprobs=[[[logprob] for logprob in rollout.behavior_logprobs] for rollout in finished],
            logprob_token_ids=None,
        )

    def _stand_in(self, prompts: Sequence[Sequence[int]], error: BaseException) -> Completions:
        """Completions that end at once, so that this rank reaches the end of the round, where it stops."""
        if self._trainer.accelerator.num_processes == 1:
            raise error
        self._error = self._error or error
        end = int(self._trainer.eos_token_ids[0])
        return Completions(
            prompt_ids=[list(prompt) for prompt in prompts],
            completion_ids=[[end] for _ in prompts],
            logprobs=[[[0.0]] for _ in prompts],
            logprob_token_ids=None,
        )

    def _group_before(self, prompt: Sequence[int]) -> str | None:
        """The group of the turn that this one goes on from, if it is not the first of its round."""
        for rollout in self.rollouts:
            text = (*rollout.request.prompt_ids, *rollout.token_ids)
            if len(text) < len(prompt) and tuple(prompt[: len(text)]) == text:
                return rollout.request.group_id
        return None

    def _draw(self, prompts: Sequence[Sequence[int]], num_generations: int) -> list[Rollout]:
        trainer = self._trainer
        mode, step = "train" if trainer.model.training else "eval", trainer.state.global_step
        words = (mode, step, trainer.accelerator.process_index, self._calls[mode, step])
        self._calls[mode, step] += 1
        label = "-".join(map(str, words))
        requests = [
            Request(
                request_id=f"{label}-{index}",
                group_id=self._group_before(prompt) or f"{label}-{index // num_generations}",
                prompt_ids=tuple(prompt),
                seed=derive_seed(trainer.args.seed, *words, index),
                sampling=self.sampling,
            )
            for index, prompt in enumerate(prompts)
        ]
        with trainer.accelerator.autocast():
            finished = {rollout.request.request_id: rollout for rollout in self.placement.generate(requests)}
        rollouts = [finished[request.request_id] for request in requests]
        failed = next((rollout for rollout in rollouts if rollout.finish_reason in FAILED_REASONS), None)
        if failed is not None:
            raise ReplicaError(
                f"request {failed.request.request_id} of step {step} ended as {failed.finish_reason!r}: "
                f"{failed.error}; TRL needs every completion, so the step cannot go on"
            )
        return rollouts


def trainer_sampling(trainer: Any, config: RolloutConfig) -> Sampling:
    """How a trainer's completions are drawn: its own arguments decide, and the config's mixed law.

    InvalidInput where the config says otherwise than they do, or where they ask for what nobody corrects.
    """
    args = trainer.args
    mine = _options(trainer)
    defaults = RolloutConfig()
    for name, value in mine.items():
        given = getattr(config, name)
        if given not in (value, getattr(defaults, name)):
            raise InvalidInput(
                f"RolloutConfig has {name}={given}, the trainer's arguments have "
                f"{TRL_NAMES.get(name, name)}={value}; set it there, and leave it out of RolloutConfig"
            )
    asked = sampling_of(args.generation_kwargs, args)
    if args.vllm_structured_outputs_regex is not None:
        asked["constraint"] = Regex(args.vllm_structured_outputs_regex)
    return config.sampling(
        **{**mine, **asked},
        stop_token_ids=tuple(trainer.eos_token_ids),
        allow_truncated_mix=not getattr(trainer, "vllm_importance_sampling_correction", False),
    )


def _options(trainer: Any) -> dict[str, Any]:
    """What a trainer says about sampling, under our names; None there is our default, which does nothing."""
    said = {}
    for name in hints_of(SamplingOptions):
        theirs = TRL_NAMES.get(name, name)
        if theirs in TRAINER_PARTS:
            value = getattr(trainer, theirs)
            said[name] = getattr(Sampling(), name) if value is None else value
    return said
