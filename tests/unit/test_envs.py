"""Environments of other libraries in the shape that TRL asks for: real ones, and ones that misbehave."""

import asyncio
import inspect
import re
import string
import threading
import time

import gymnasium
import pytest
from transformers.utils import get_json_schema

from blockroll.errors import EnvironmentFailed, InvalidInput
from blockroll.rl_loops.envs import from_gymnasium, from_reasoning_gym, with_time_limit

TEXT = gymnasium.spaces.Text(64, min_length=0, charset=string.printable)


class Guess(gymnasium.Env):
    """Guess a digit that the seed decides, in three tries."""

    action_space = observation_space = TEXT

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.wanted, self.tries = str(self.np_random.integers(10)), 0
        return "Guess a digit.", {}

    def step(self, action):
        self.tries += 1
        is_right = action == self.wanted
        return "right" if is_right else "wrong", 1.0 if is_right else -0.25, is_right, self.tries == 3, {}


class Misbehaving(Guess):
    """Hangs on one word and raises on another; every instance has a number."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.hangs = threading.Event()

    def step(self, action):
        if action == "hang":
            self.hangs.wait(5)
        if action == "crash":
            raise OSError("no such door")
        return super().step(action)


def test_an_episode_keeps_terminated_and_truncated_apart_and_sums_rewards():
    env = from_gymnasium(Guess)()
    assert env.reset(seed=3) == "Guess a digit."
    wanted = env._keeper.env.wanted
    wrong = next(digit for digit in string.digits if digit != wanted)
    assert env.act(wrong) == "wrong"
    assert not env.is_terminated
    assert env.act(wanted) == "right\nThe episode is over."
    assert (env.is_terminated, env.is_truncated, env.get_reward()) == (True, False, 0.75)
    assert env.act(wanted) == "The episode is over."
    assert env.get_reward() == 0.75
    env.reset(seed=3)
    assert [env.act(wrong) for _ in range(3)][-1] == "wrong\nThe episode was cut off after 3 steps."
    assert (env.is_terminated, env.is_truncated, env.get_reward()) == (False, True, -0.75)


def test_equal_rows_start_equal_episodes_and_other_rows_others():
    factory = from_gymnasium(Guess)
    wanted = []
    for row in ({"prompt": "a"}, {"prompt": "a"}, *({"prompt": str(n)} for n in range(8))):
        env = factory()
        env.reset(**row)
        wanted.append(env._keeper.env.wanted)
    assert wanted[0] == wanted[1]
    assert len(set(wanted)) > 2


def test_a_slow_step_ends_its_episode_by_name_and_the_next_has_a_new_environment():
    env = from_gymnasium(Misbehaving, timeout_s=0.2)()
    env.reset()
    start, before = time.monotonic(), Misbehaving.made
    with pytest.raises(EnvironmentFailed, match=r"Misbehaving\.step took more than 0\.2 s"):
        env.act("hang")
    assert time.monotonic() - start < 4
    assert (env.is_truncated, env.get_reward(), env.act("7")) == (True, None, "The episode is over.")
    assert env.reset() == "Guess a digit."
    assert Misbehaving.made == before + 1
    assert env.failure is None


def test_a_crash_names_the_environment_and_its_cause():
    env = from_gymnasium(Misbehaving)()
    env.reset()
    with pytest.raises(EnvironmentFailed, match=r"Misbehaving\.step raised OSError: no such door"):
        env.act("crash")
    assert env.failure == "Misbehaving.step raised OSError: no such door"


def test_an_episode_that_cannot_start_says_so_and_leaves_the_batch_alone(caplog):
    class Closed(Guess):
        def reset(self, *, seed=None, options=None):
            raise ConnectionError("server is gone")

    env = from_gymnasium(Closed)()
    assert "Closed.reset raised ConnectionError: server is gone" in env.reset()
    assert env.get_reward() is None
    assert "server is gone" in caplog.text


def test_spaces_that_are_not_text_are_refused():
    with pytest.raises(InvalidInput, match=r"CartPoleEnv has observation_space Box"):
        from_gymnasium(lambda: gymnasium.make("CartPole-v1").unwrapped)().reset()
    with pytest.raises(InvalidInput, match="timeout_s must be above 0, got 0"):
        from_gymnasium(Guess, timeout_s=0)


def test_trl_sees_one_tool_with_a_schema():
    schema = get_json_schema(from_gymnasium(Guess)().act)["function"]
    assert schema["name"] == "act"
    assert schema["parameters"]["properties"] == {"text": {"type": "string", "description": "The action."}}


def test_a_reasoning_gym_task_scores_by_its_own_rules():
    task = from_reasoning_gym("chain_sum", size=6, seed=1, min_terms=2, max_terms=2)
    again = from_reasoning_gym("chain_sum", size=6, seed=1, min_terms=2, max_terms=2)
    assert task.dataset["prompt"] == again.dataset["prompt"]
    answers, index = task.dataset["answer"], task.dataset["index"]
    assert task.reward(completions=answers, index=index) == [1.0] * 6
    assert max(task.reward(completions=["x"] * 6, index=index)) < 1
    as_messages = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert task.reward(completions=as_messages, index=index) == [1.0] * 6


def test_a_reply_that_the_scorer_cannot_read_is_left_out_and_counted():
    task = from_reasoning_gym("chain_sum", size=2, seed=1)
    logged = {}
    scores = task.reward(
        completions=[[{"role": "assistant", "content": None}], task.dataset["answer"][1]],
        index=[0, 1],
        log_metric=lambda name, value: logged.update({name: value}),
    )
    assert scores == [None, 1.0]
    assert logged == {"reward/failed": 1.0}


class Vault:
    """An environment of TRL's kind, with a tool that waits and one that waits without blocking."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.opened, self.owner = 0, threading.get_ident()
        self.hangs = threading.Event()

    def reset(self, code="7", **row):
        if code == "lost":
            raise LookupError("no such vault")
        self.opened, self.code = 0, code
        return "A vault."

    def enter(self, digit: str) -> str:
        """Try a digit.

        Args:
            digit: One digit.
        """
        assert threading.get_ident() == self.owner
        if digit == "x":
            self.hangs.wait(5)
        self.opened += digit == self.code
        return "open" if digit == self.code else "shut"

    async def listen(self, seconds: float) -> str:
        """Listen at the door.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return "tick"

    def get_reward(self) -> float:
        return self.opened / len(self.code)


def test_trls_own_environments_keep_their_tools_and_answers_behind_the_limit():
    factory = with_time_limit(Vault, timeout_s=5)
    env, other = factory(), factory()
    assert type(env) is type(other)
    public = inspect.getmembers(type(env), inspect.isfunction)
    assert {name for name, _ in public if not name.startswith("_")} == {
        "reset",
        "enter",
        "listen",
        "get_reward",
    }
    plain, limited = (get_json_schema(each.enter)["function"] for each in (Vault(), env))
    assert plain == limited
    assert inspect.iscoroutinefunction(env.listen)
    assert env.reset(code="3", prompt="row") == "A vault."
    assert (env.enter("1"), env.enter(digit="3"), env.get_reward()) == ("shut", "open", 1.0)
    assert (env.opened, other.opened) == (1, 0)
    assert asyncio.run(env.listen(0.01)) == "tick"
    with pytest.raises(AttributeError):
        env.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("misuse", "cause"),
    [
        (lambda env: env.enter("x"), r"Vault\.enter took more than 0\.2 s"),
        (lambda env: asyncio.run(env.listen(5)), r"Vault\.listen took more than 0\.2 s"),
        (lambda env: env.enter(), r"Vault\.enter raised TypeError: .*digit"),
    ],
    ids=["hangs", "waits", "raises"],
)
def test_an_environment_of_trls_own_that_fails_ends_its_episode_by_name_only(misuse, cause):
    env = with_time_limit(Vault, timeout_s=0.2)()
    env.reset()
    start, before = time.monotonic(), Vault.made
    with pytest.raises(EnvironmentFailed, match=cause):
        misuse(env)
    assert time.monotonic() - start < 4
    assert re.match(cause, env.failure)
    assert (env.enter("7"), env.get_reward()) == ("The episode is over.", None)
    assert asyncio.run(env.listen(5)) == "The episode is over."
    assert env.reset() == "A vault."
    assert (Vault.made, env.failure, env.enter("7"), env.get_reward()) == (before + 1, None, "open", 1.0)


def test_an_episode_that_cannot_start_or_be_scored_has_no_reward(caplog):
    env = with_time_limit(Vault)()
    assert "Vault.reset raised LookupError: no such vault" in env.reset(code="lost")
    assert env.get_reward() is None
    env.reset(code="")
    assert env.get_reward() is None
    assert "Vault.get_reward raised ZeroDivisionError" in caplog.text


def test_an_environment_that_cannot_be_made_is_an_error_before_training():
    def closed():
        raise ConnectionError("server is gone")

    with pytest.raises(EnvironmentFailed, match=r"environment\.construction raised ConnectionError: server"):
        with_time_limit(closed)()
