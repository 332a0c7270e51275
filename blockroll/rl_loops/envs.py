"""Environments for TRL: its own classes behind a time limit, gymnasium's with strings, reasoning-gym's tasks.

What an environment says reaches the policy as text and is masked by TRL; what it does wrong (too slow,
crashed) ends its episode under its own name and never a whole batch.
"""

import asyncio
import inspect
import logging
import threading
import zlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any

from blockroll.errors import EnvironmentFailed, InvalidInput, MissingDependency

logger = logging.getLogger(__name__)

OVER = "The episode is over."


def with_time_limit(factory: Callable[[], Any], *, timeout_s: float = 60.0) -> Callable[[], Any]:
    """The same `environment_factory`, whose environments neither hang a batch nor end it.

    Construction, `reset`, `get_reward` and every tool have `timeout_s`. A call that takes longer or raises
    ends the episode: its tools then answer that it is over, its reward is None, which TRL leaves out, and the
    next `reset` starts in a new environment. Everything else is the environment's own.
    """
    _check_limit(timeout_s)
    classes: dict[type, type] = {}  # TRL compares types, so equal environments need one class

    def make() -> Any:
        keeper = _Keeper(factory, timeout_s)
        keeper.start()
        kind = type(keeper.env)
        return classes.setdefault(kind, _limited(kind))(keeper)

    return make


def from_gymnasium(
    make: Callable[[], Any], *, timeout_s: float = 60.0
) -> Callable[[], "GymnasiumEnvironment"]:
    """An `environment_factory` from a gymnasium environment whose observations and actions are strings.

    Equal rows of the dataset start equal episodes: the seed is the row's `seed`, or derived from the row.
    Time limits are those of `with_time_limit`.
    """
    _check_limit(timeout_s)
    return partial(GymnasiumEnvironment, make, timeout_s=timeout_s)


class _Keeper:
    """Keeps one environment in a thread of its own, and replaces both when a call goes wrong.

    A thread that hangs cannot be killed: it is left behind with its environment.
    """

    def __init__(self, make: Callable[[], Any], timeout_s: float) -> None:
        self.env: Any = None
        self.failure: str | None = None  # what went wrong in the episode
        self.timeout_s = timeout_s
        self._make = make
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] | None = None

    def start(self) -> None:
        """Have an environment for a new episode; EnvironmentFailed if none can be made."""
        if self.env is None or self.failure is not None:
            self._leave_thread()
            self.env, self.failure = None, None
            self.env = self.call("construction", self._make)

    def call(self, name: str, call: Callable[[], Any]) -> Any:
        """The call's result; EnvironmentFailed names what went wrong."""
        done: Future[Any] = Future()
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_work, args=(self._calls,), daemon=True, name="environment").start()
        self._calls.put((call, done))
        try:
            return done.result(self.timeout_s)
        except Exception as error:
            raise self._failed(name, error, is_late=not done.done()) from error

    async def wait(self, name: str, coroutine: Awaitable[Any]) -> Any:
        """The same for a coroutine, in the loop of whoever waits for it."""
        task = asyncio.ensure_future(coroutine)
        done, _ = await asyncio.wait([task], timeout=self.timeout_s)
        if not done:
            task.cancel()
            raise self._failed(name, TimeoutError(), is_late=True)
        try:
            return task.result()
        except Exception as error:
            raise self._failed(name, error, is_late=False) from error

    def _failed(self, name: str, error: Exception, *, is_late: bool) -> EnvironmentFailed:
        where = f"{'environment' if self.env is None else type(self.env).__name__}.{name}"
        if is_late:
            self.failure = f"{where} took more than {self.timeout_s:g} s"
        else:
            self.failure = f"{where} raised {type(error).__name__}: {error}"
        return EnvironmentFailed(f"{self.failure}; its episode is over")

    def _leave_thread(self) -> None:
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None

    __del__ = _leave_thread


def _work(calls: "SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    """Run calls in their order; what an environment binds to its thread stays there."""
    while (each := calls.get()) is not None:
        call, done = each
        try:
            done.set_result(call())
        except Exception as error:  # noqa: BLE001 foreign code: raised again where the result is awaited
            done.set_exception(error)
        del each, call, done


class _LimitedEnvironment:
    """Stands for an environment of TRL's kind; `_limited` adds the tools of its class."""

    def __init__(self, keeper: _Keeper) -> None:
        self._keeper = keeper

    @property
    def failure(self) -> str | None:
        """What went wrong in the episode; None if nothing did."""
        return self._keeper.failure

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._keeper.env, name)

    def reset(self, **row: Any) -> Any:
        """Start an episode; its first observation, or what went wrong: the batch then goes on without it."""
        try:
            self._keeper.start()
            return self._keeper.call("reset", partial(self._keeper.env.reset, **row))
        except EnvironmentFailed as failure:
            logger.warning("%s", failure)
            return str(failure)


def _limited(kind: type) -> type:
    """A class with the public methods of `kind`, their signatures and docstrings, each behind the limit."""
    methods = {
        name: _limited_method(name, method)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name != "reset"
    }
    return type(kind.__name__, (_LimitedEnvironment,), {"__doc__": kind.__doc__, **methods})


def _limited_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    if name == "get_reward":
        return _limited_reward(method)
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def limited_coroutine(self: Any, *args: Any, **kwargs: Any) -> Any:
            keeper: _Keeper = self._keeper
            if keeper.failure is not None:
                return OVER
            return await keeper.wait(name, getattr(keeper.env, name)(*args, **kwargs))

        return limited_coroutine

    @wraps(method)
    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        keeper: _Keeper = self._keeper
        if keeper.failure is not None:
            return OVER
        return keeper.call(name, partial(getattr(keeper.env, name), *args, **kwargs))

    return limited


def _limited_reward(method: Callable[..., Any]) -> Callable[..., Any]:
    """None for an episode that has failed, or fails while its reward is asked for."""
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def get_reward_later(self: Any) -> Any:
            keeper: _Keeper = self._keeper
            try:
                return None if keeper.failure else await keeper.wait("get_reward", keeper.env.get_reward())
            except EnvironmentFailed as failure:
                logger.warning("%s", failure)
                return None

        return get_reward_later

    @wraps(method)
    def get_reward(self: Any) -> Any:
        keeper: _Keeper = self._keeper
        try:
            return None if keeper.failure else keeper.call("get_reward", keeper.env.get_reward)
        except EnvironmentFailed as failure:
            logger.warning("%s", failure)
            return None

    return get_reward


class GymnasiumEnvironment:
    """One episode after another, in the shape that TRL asks for: `reset`, the tool `act`, `get_reward`."""

    def __init__(self, make: Callable[[], Any], *, timeout_s: float) -> None:
        self._keeper = _Keeper(make, timeout_s)
        self._keeper.start()
        _require_text(self._keeper.env)
        self._total = 0.0
        self._num_steps = 0
        self._is_terminated = self._is_truncated = False

    @property
    def is_terminated(self) -> bool:
        """Whether the episode reached an end of its own."""
        return self._is_terminated

    @property
    def is_truncated(self) -> bool:
        """Whether the episode was cut off, by its environment or by a failure."""
        return self._is_truncated or self.failure is not None

    @property
    def failure(self) -> str | None:
        """What went wrong in the episode; None if nothing did."""
        return self._keeper.failure

    def reset(self, **row: Any) -> str:
        """Start an episode; its first observation, or what went wrong: the batch then goes on without it."""
        self._total, self._num_steps = 0.0, 0
        self._is_terminated = self._is_truncated = False
        seed = row.get("seed")
        if seed is None:
            seed = zlib.crc32(repr(sorted(row.items(), key=lambda item: item[0])).encode())
        keeper = self._keeper
        try:
            keeper.start()
            observation, _ = keeper.call("reset", partial(keeper.env.reset, seed=int(seed)))
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
        if self.failure or self._is_terminated or self._is_truncated:
            return OVER
        keeper = self._keeper
        observation, reward, terminated, truncated, _ = keeper.call("step", partial(keeper.env.step, text))
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
        return None if self.failure else self._total

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, str):
            raise InvalidInput(
                f"{type(self._keeper.env).__name__} observed {type(observation).__name__} {observation!r}; a "
                "policy reads text: wrap it, so that observations are strings"
            )
        return observation


def _check_limit(timeout_s: float) -> None:
    if not timeout_s > 0:
        raise InvalidInput(f"timeout_s must be above 0, got {timeout_s}")


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
