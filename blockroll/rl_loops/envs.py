"""Environments of other libraries as TRL takes them: gymnasium's with strings, and reasoning-gym's tasks.

TRL environment classes need no adapter. What an environment says reaches the policy as text and is masked by
TRL; what it does wrong (too slow, crashed) ends its episode under its own name and never a whole batch.
"""

import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from functools import partial
from typing import Any

from blockroll.errors import EnvironmentFailed, InvalidInput, MissingDependency

logger = logging.getLogger(__name__)

OVER = "The episode is over."


def from_gymnasium(
    make: Callable[[], Any], *, timeout_s: float = 60.0
) -> Callable[[], "GymnasiumEnvironment"]:
    """An `environment_factory` from a gymnasium environment whose observations and actions are strings.

    Equal rows of the dataset start equal episodes: the seed is the row's `seed`, or derived from the row.
    """
    if not timeout_s > 0:
        raise InvalidInput(f"timeout_s must be above 0, got {timeout_s}")
    return partial(GymnasiumEnvironment, make, timeout_s=timeout_s)


class GymnasiumEnvironment:
    """One episode after another, in the shape that TRL asks for: `reset`, the tool `act`, `get_reward`.

    Every call has a time limit. A thread that hangs in it cannot be killed: it is left behind with its
    environment, and the next episode has a new one.
    """

    def __init__(self, make: Callable[[], Any], *, timeout_s: float) -> None:
        self._make = make
        self._timeout_s = timeout_s
        self._env: Any = None
        self._total = 0.0
        self._num_steps = 0
        self._is_terminated = self._is_truncated = False
        self._failure: str | None = None

    @property
    def is_terminated(self) -> bool:
        """Whether the episode reached an end of its own."""
        return self._is_terminated

    @property
    def is_truncated(self) -> bool:
        """Whether the episode was cut off, by its environment or by a failure."""
        return self._is_truncated or self._failure is not None

    @property
    def failure(self) -> str | None:
        """What went wrong in the episode; None if nothing did."""
        return self._failure

    def reset(self, **row: Any) -> str:
        """Start an episode; its first observation, or what went wrong: the batch then goes on without it."""
        self._total, self._num_steps, self._failure = 0.0, 0, None
        self._is_terminated = self._is_truncated = False
        if self._env is None:
            self._env = self._call("construction", self._make)
            _require_text(self._env)
        seed = row.get("seed")
        if seed is None:
            seed = zlib.crc32(repr(sorted(row.items(), key=lambda item: item[0])).encode())
        try:
            observation, _ = self._call("reset", partial(self._env.reset, seed=int(seed)))
        except EnvironmentFailed as failure:
            logger.warning("%s", failure)
            return str(failure)
        return self._text(observation)

    def act(self, text: str) -> str:
        """Act in the environment.

        Args:
            text: The action.

        Returns:
            What the environment answers.
        """
        if self._failure or self._is_terminated or self._is_truncated:
            return OVER
        observation, reward, terminated, truncated, _ = self._call("step", partial(self._env.step, text))
        self._num_steps += 1
        self._total += float(reward)
        self._is_terminated, self._is_truncated = bool(terminated), bool(truncated)
        answer = self._text(observation)
        if self._is_terminated:
            return f"{answer}\n{OVER}"
        if self._is_truncated:
            return f"{answer}\nThe episode was cut off after {self._num_steps} steps."
        return answer

    def get_reward(self) -> float | None:
        """Sum of the episode's rewards; None, which TRL leaves out, if it failed."""
        return None if self._failure else self._total

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result, from a thread of its own; EnvironmentFailed names what went wrong."""
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(call())
            except Exception as error:  # noqa: BLE001 foreign code: reported below
                done.set_exception(error)

        threading.Thread(target=work, daemon=True, name=f"environment {name}").start()
        env_name = type(self._env).__name__ if self._env is not None else "environment"
        try:
            return done.result(self._timeout_s)
        except FutureTimeout as late:
            cause = f"{env_name}.{name} took more than {self._timeout_s:g} s"
            self._env, self._failure = None, cause
            raise EnvironmentFailed(f"{cause}: its episode is over") from late
        except Exception as error:
            cause = f"{env_name}.{name} raised {type(error).__name__}: {error}"
            self._env, self._failure = None, cause
            raise EnvironmentFailed(f"{cause}; its episode is over") from error

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, str):
            raise InvalidInput(
                f"{type(self._env).__name__} observed {type(observation).__name__} {observation!r}; a policy "
                "reads text: wrap it, so that observations are strings"
            )
        return observation


def _require_text(env: Any) -> None:
    import gymnasium

    for name in ("observation_space", "action_space"):
        space = getattr(env, name)
        if not isinstance(space, gymnasium.spaces.Text):
            raise InvalidInput(
                f"{type(env).__name__} has {name} {space}; a policy reads and writes text, so both spaces "
                "must be gymnasium.spaces.Text: wrap the environment"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTask:
    """A reasoning-gym task as a trainer takes it."""

    dataset: Any  # datasets.Dataset with columns `prompt`, `answer`, `index`
    reward: Callable[..., list[float | None]]  # with TRL's signature


def from_reasoning_gym(
    name: str, *, size: int, seed: int = 0, prompt: Callable[[str], Any] = str, **options: Any
) -> ReasoningTask:
    """Questions of a reasoning-gym task, and its own scoring as a reward function.

    `prompt` makes of a question what the policy is asked, such as messages. A reply that the scorer cannot
    read gives None, which TRL leaves out, and counts in the metric `reward/failed`.
    """
    try:
        import reasoning_gym
    except ImportError as missing:
        raise MissingDependency(
            "reasoning-gym is not installed; install it with pip install 'blockroll[env]'"
        ) from missing
    from datasets import Dataset

    task = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    entries = list(task)
    rows = [
        {"prompt": prompt(entry["question"]), "answer": entry["answer"], "index": index}
        for index, entry in enumerate(entries)
    ]

    def score(completions: Sequence[Any], index: Sequence[int], **extras: Any) -> list[float | None]:
        scores: list[float | None] = []
        for completion, which in zip(completions, index, strict=True):
            reply = completion if isinstance(completion, str) else completion[-1]["content"]
            try:
                scores.append(float(task.score_answer(reply.strip(), entries[which])))
            except Exception:  # noqa: BLE001 foreign code: counted below
                scores.append(None)
        if log_metric := extras.get("log_metric"):
            log_metric("reward/failed", float(scores.count(None)))
        return scores

    score.__name__ = name
    return ReasoningTask(dataset=Dataset.from_list(rows), reward=score)
