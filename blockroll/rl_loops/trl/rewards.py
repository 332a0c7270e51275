"""Reward functions of one rank among several: none raises where the other ranks would wait for this one."""

from functools import wraps
from typing import Any

from torch import nn
from trl.trainer.utils import is_async_callable

from blockroll.errors import InvalidInput


class RewardErrors:
    """Keeps the first error of a batch's reward functions, until all ranks can be told."""

    def __init__(self) -> None:
        self._first: BaseException | None = None

    def take(self) -> BaseException | None:
        """The error since the last time, if there was one."""
        error, self._first = self._first, None
        return error

    def guard(self, reward_func: Any) -> Any:
        """The same function, which gives None for every completion where it would raise."""
        if isinstance(reward_func, nn.Module):
            return reward_func
        if is_async_callable(reward_func):

            @wraps(reward_func, updated=())
            async def guarded_later(*, completions: list[Any], **kwargs: Any) -> list[Any]:
                try:
                    return _one_each(await reward_func(completions=completions, **kwargs), completions)
                except BaseException as error:  # noqa: BLE001 foreign code, Ctrl-C: raised on all ranks
                    return self._keep(error, completions)

            return guarded_later

        @wraps(reward_func, updated=())
        def guarded(*, completions: list[Any], **kwargs: Any) -> list[Any]:
            try:
                return _one_each(reward_func(completions=completions, **kwargs), completions)
            except BaseException as error:  # noqa: BLE001 foreign code, Ctrl-C: raised on all ranks
                return self._keep(error, completions)

        return guarded

    def keep(self, error: BaseException) -> None:
        """An error that was met around the functions, a reward model's among them."""
        self._first = self._first or error

    def _keep(self, error: BaseException, completions: list[Any]) -> list[None]:
        self.keep(error)
        return [None] * len(completions)


def _one_each(rewards: list[Any], completions: list[Any]) -> list[Any]:
    if len(rewards) != len(completions):
        raise InvalidInput(
            f"a reward function returned {len(rewards)} rewards for {len(completions)} completions; it must "
            "return one for each"
        )
    return rewards
