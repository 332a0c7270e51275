"""A history in a file: what comes back, and what is refused."""

import re

import pytest
import safetensors.torch
import torch

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.rollout.drafters import history_file
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.drafters.history_file import FORMAT, load_history, save_history
from blockroll.types import Plan, Request, Sampling
from tests.engines import run
from tests.equality import assert_same_rollouts
from tests.models import VOCAB_SIZE, random_policy

PLAN = Plan(6, drafter="history")
PROMPTS = [(5, 9), (7,), (4, 4, 4)]


def requests(first_seed, **options):
    sampling = Sampling(max_tokens=20, ignore_eos=True, **options)
    return [
        Request(request_id=f"r{seed}", prompt_ids=PROMPTS[seed % 3], seed=seed, sampling=sampling)
        for seed in range(first_seed, first_seed + 6)
    ]


@pytest.fixture
def policy():
    return random_policy()


@pytest.fixture
def saved(tmp_path, policy):
    drafter = HistoryDrafts()
    finished = run(policy, requests(0), PLAN, drafters=[drafter])
    save_history(drafter, tmp_path / "history", policy)
    return tmp_path / "history", drafter, finished


def texts_of(drafter):
    return {tuple(texts.prompt): [tuple(text) for text in texts.ended] for texts in drafter.index.prompts}


def test_what_was_saved_comes_back_and_is_drafted_from(policy, saved):
    path, drafter, finished = saved
    loaded = load_history(path, policy)
    assert texts_of(loaded) == texts_of(drafter)
    assert sum(map(len, texts_of(loaded).values())) == len(finished) == 6
    assert loaded.index.job.num_tokens == drafter.index.job.num_tokens > 100
    first = Engine(policy, plan=PLAN, drafters=[loaded])
    first.submit(requests(10))
    assert sum(len(commit.token_ids) for commit in first.step().commits) >= 6
    drafts = sum(each.stats.num_drafted for each in first.abort([f"r{seed}" for seed in range(10, 16)]))
    assert drafts > 0


def test_seeds_that_served_before_the_file_draw_the_same_texts_behind_it(policy, saved):
    path, _, finished = saved
    again = run(policy, requests(0), PLAN, drafters=[load_history(path, policy)])
    assert_same_rollouts(finished, again, policy)
    assert all(rollout.stats.num_accepted > 0 for rollout in again.values())


def test_a_smaller_bound_keeps_what_was_used_last(policy, saved):
    path, drafter, _ = saved
    loaded = load_history(path, policy, max_tokens=50)
    assert 0 < loaded.index.num_tokens <= 50
    last = [*texts_of(drafter)][-1]
    assert [*texts_of(loaded)] == [last]
    with pytest.raises(InvalidInput, match="at least 1, got 0"):
        load_history(path, policy, max_tokens=0)


def test_a_text_that_runs_is_left_out(tmp_path, policy):
    drafter = HistoryDrafts()
    engine = Engine(policy, plan=PLAN, drafters=[drafter])
    engine.submit(requests(0))
    engine.step()
    save_history(drafter, tmp_path / "history", policy)
    assert texts_of(load_history(tmp_path / "history", policy)) == {}


class Words:
    """A tokenizer by its words alone."""

    def __init__(self, **words):
        self.words = words

    def get_vocab(self):
        return self.words


def test_a_history_of_another_tokenizer_or_vocabulary_is_refused(policy, saved, monkeypatch):
    path, _, _ = saved
    loaded = load_history(path, policy)
    monkeypatch.setattr(policy, "vocab_size", VOCAB_SIZE + 1)
    with pytest.raises(InvalidInput, match="of another tokenizer or vocabulary"):
        load_history(path, policy)
    monkeypatch.undo()
    monkeypatch.setattr(policy, "tokenizer", Words(a=0, b=1))
    with pytest.raises(InvalidInput, match="of another tokenizer or vocabulary"):
        load_history(path, policy)
    with pytest.raises(InvalidInput, match=r"plan history\(6\) has a history of another tokenizer"):
        Engine(policy, plan=PLAN, drafters=[loaded])
    save_history(loaded, path, policy)
    load_history(path, policy)
    monkeypatch.setattr(policy, "tokenizer", Words(a=1, b=0))
    with pytest.raises(InvalidInput, match="of another tokenizer or vocabulary"):
        load_history(path, policy)


def refused(path, policy):
    """The sentence of a refusal, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        load_history(path, policy)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused_in_one_line(policy, saved, kept):
    path, _, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "is no history that can be read" in refused(path, policy)


def test_a_file_with_one_other_byte_anywhere_is_refused_in_one_line(policy, saved):
    path, _, _ = saved
    data = path.read_bytes()
    for place in {*range(0, len(data), 37), len(data) - 1}:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :])
        with pytest.raises((CheckpointError, InvalidInput)) as caught:
            load_history(path, policy)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_something_else_is_refused_in_one_line(policy, tmp_path):
    refused(tmp_path / "none", policy)
    (tmp_path / "text").write_text("not a history")
    refused(tmp_path / "text", policy)
    refused(tmp_path, policy)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    assert "its format is None" in refused(tmp_path / "weights", policy)


def rewrite(path, policy, change):
    """The file with other columns, under a checksum that is right."""
    vocabulary, tensors = history_file._read(path)
    change(tensors)
    metadata = {
        "format": FORMAT,
        "vocabulary": vocabulary,
        "checksum": history_file._checksum(tensors),
    }
    safetensors.torch.save_file(tensors, path, metadata)


def poison(name, value, at=0):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (poison("tokens", VOCAB_SIZE), f"holds the token {VOCAB_SIZE}"),
        (poison("tokens", -1, 5), "holds the token -1"),
        (poison("text_lengths", 2**40), "lengths contradict"),
        (poison("text_lengths", -4), "lengths contradict"),
        (poison("num_texts", 3), "lengths contradict"),
        (poison("prompt_lengths", -2), "lengths contradict"),
        (lambda tensors: tensors.update(num_texts=tensors["num_texts"][1:]), "lengths contradict"),
        (lambda tensors: tensors.pop("num_texts"), "it holds"),
        (lambda tensors: tensors.update(tokens=tensors["tokens"].float()), "it holds"),
        (lambda tensors: tensors.update(tokens=tensors["tokens"][:, None]), "it holds"),
    ],
)
def test_a_file_poisoned_under_a_right_checksum_is_refused_in_one_line(policy, saved, change, named):
    path, _, _ = saved
    rewrite(path, policy, change)
    assert named in refused(path, policy)


def test_a_file_that_cannot_be_written_leaves_the_old_one(policy, saved, tmp_path):
    path, drafter, _ = saved
    before = path.read_bytes()
    (tmp_path / "history.partial").mkdir()
    with pytest.raises(CheckpointError, match=re.escape(f"cannot be written to {path}")):
        save_history(drafter, path, policy)
    assert path.read_bytes() == before
