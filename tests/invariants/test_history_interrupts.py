"""Ctrl-C while history learns a text that has ended: it is there once and whole, behind the next call."""

import random

import pytest

from blockroll.rollout.drafters import history, history_index, history_job
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.drafters.history_index import PromptTexts
from blockroll.rollout.drafters.history_job import JobTexts
from blockroll.rollout.engine import engine as engine_module
from blockroll.types import HISTORY, Plan, Sampling
from tests.engines import make_requests
from tests.equality import assert_same_rollouts
from tests.invariants.test_interrupts import InterruptedIn
from tests.models import random_policy

PLAN = Plan(4, drafter=HISTORY)
MODULES = (history, history_index, history_job, engine_module)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


def known(drafter: HistoryDrafts) -> dict:
    """All texts that it has learned; every count that it keeps is theirs."""
    drafter._end()
    index, job = drafter.index, drafter.index.job
    for texts in index.prompts:
        assert texts.num_tokens == len(texts.prompt) + sum(len(text.tokens) for text in texts._texts.values())
        assert texts.num_running == 0
        assert len([*texts.ended]) == len(texts._texts)
    assert index._num_tokens == index.num_tokens == sum(index._counted.values())
    assert index._counted.keys() == index._prompts.keys() >= index._idle.keys()
    assert job._num_waiting == sum(len(tokens) + 1 for _, tokens in job._waiting.values())
    job.learn()
    by_prompt = {tuple(texts.prompt): sorted(map(tuple, texts.ended)) for texts in index.prompts}
    of_the_job = " ".join(map(str, [*job._older.tokens, *job._newer.tokens])).split("-1")
    return {"by prompt": by_prompt, "of the job": sorted(of_the_job)}


def served(policy, interrupted, *, max_tokens: int):
    """Texts of three prompts, some of which are one and the same; several end in one step, one is aborted."""
    drafter = HistoryDrafts(max_tokens=max_tokens)
    engine = Engine(policy, plan=PLAN, max_batch_size=4, drafters=[drafter])
    prompts = [(5, 6, 7), (5, 6, 7), (8, 9, 4, 8, 9, 4), (8, 9, 4, 8, 9, 4), (11,)]
    engine.submit(make_requests(prompts, Sampling(temperature=0.5, max_tokens=4, ignore_eos=True)))
    engine.step()
    finished = {each.request.request_id: each for each in interrupted.run(lambda: engine.abort(["r1"]))}
    while engine.num_requests:
        for rollout in interrupted.run(engine.step).finished:
            assert finished.setdefault(rollout.request.request_id, rollout) is rollout
    return finished, known(drafter)


class InterruptedInFinished(InterruptedIn):
    """The same, only while texts that have ended are told."""

    def __call__(self, frame, event, argument) -> None:
        caller = frame
        while caller is not None and caller.f_code is not Engine._tell_drafters.__code__:
            caller = caller.f_back
        if caller is not None:
            super().__call__(frame, event, argument)


def interrupt_everywhere(policy, *, max_tokens: int = 1000, most: int = 25) -> None:
    counting = InterruptedInFinished(0, *MODULES)
    rollouts, want = served(policy, counting, max_tokens=max_tokens)
    assert counting.count > most
    for number in sorted(random.Random(0).sample(range(1, counting.count), most)):
        interrupted = InterruptedInFinished(number, *MODULES)
        got, learned = served(policy, interrupted, max_tokens=max_tokens)
        assert interrupted.count >= number
        assert learned == want, number
        assert_same_rollouts(rollouts, got, policy)


@pytest.mark.parametrize("max_tokens", [1000, 12], ids=["roomy", "narrow"])
def test_a_text_is_learned_once_and_whole_wherever_an_interrupt_comes(policy, max_tokens):
    interrupt_everywhere(policy, max_tokens=max_tokens)


def told_again_learned_again(drafter, rollout):
    """The planted bug: whoever is told twice keeps two texts."""
    followed = drafter._follow(rollout.request)
    del drafter._followed[rollout.request.request_id]
    drafter._read(followed, rollout.token_ids)
    drafter.index.close(followed.texts, followed.number)


def extended_bit_by_bit(texts, number, token_ids):
    """The planted bug: the count comes a call behind the tokens."""
    text = texts._texts[number]
    text.tokens.extend(token_ids)
    texts.num_tokens += len(token_ids)
    texts._unlearned[number] = None


def added_as_often_as_it_is_closed(job, tail, token_ids, text=None):
    """The planted bug: nothing says that the job has it."""
    text.is_in_job = False
    job.really_add(tail, token_ids, text)


@pytest.mark.parametrize(
    ("owner", "name", "plant"),
    [
        (HistoryDrafts, "finished", told_again_learned_again),
        (PromptTexts, "extend", extended_bit_by_bit),
        (JobTexts, "add", added_as_often_as_it_is_closed),
    ],
)
def test_planted_texts_that_are_learned_twice_or_half_are_noticed(policy, monkeypatch, owner, name, plant):
    monkeypatch.setattr(JobTexts, "really_add", JobTexts.add, raising=False)
    file = getattr(owner, name).__code__.co_filename
    monkeypatch.setattr(plant, "__code__", plant.__code__.replace(co_filename=file))
    monkeypatch.setattr(owner, name, plant)
    with pytest.raises(AssertionError):
        interrupt_everywhere(policy)
