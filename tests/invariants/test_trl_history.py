"""A TRL trainer's checkpoint keeps what its replicas look drafts up in."""

import logging

import pytest

from blockroll.config import RolloutConfig
from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import TINY_POLICY_DIR
from blockroll.rl_loops.trl.checkpoint import load_rollout_state
from blockroll.rollout.drafters.history_file import load_history, save_history
from blockroll.rollout.pool.pool import RolloutPool
from tests.trl_trainers import drawn_by_step, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",  # what TRL itself calls
)
HISTORY = RolloutConfig(plan="history(4)")
SAVED = {"save_strategy": "steps", "save_steps": 1}


def made(folder, rollout=HISTORY, **options):
    return trainer(folder, rollout=rollout, options={**SAVED, **options})


def index_of(trained):
    return trained.rollouts.placement.pool._members[0].replica.engine._drafters["history"].index


def texts_of(index):
    """By prompt, in no order: which sibling ends first depends on its drafts."""
    return {tuple(texts.prompt): sorted(map(tuple, texts.ended)) for texts in index.prompts}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two steps, both saved: the trainer, and what it has drawn."""
    folder = tmp_path_factory.mktemp("whole")
    trained = made(folder)
    drawn = drawn_by_step(trained)
    trained.train()
    return folder, trained, drawn


@pytest.fixture
def checkpoint(whole):
    """The first one of the two; its history comes back as it was."""
    folder = whole[0] / "checkpoint-1"
    path = folder / "blockroll" / "history_0.safetensors"
    before = path.read_bytes()
    yield folder
    path.write_bytes(before)


def test_each_checkpoint_holds_the_history_of_its_step(whole):
    folder, trained, drawn = whole
    policy = HFPolicy.from_pretrained(TINY_POLICY_DIR)
    for step in (1, 2):
        path = folder / f"checkpoint-{step}" / "blockroll" / "history_0.safetensors"
        kept = texts_of(load_history(path, policy).index)
        texts = sorted(text for texts in kept.values() for text in texts)
        assert texts == sorted(tuple(text) for each in range(step) for text in drawn[each])
    assert kept == texts_of(index_of(trained))


def test_a_resumed_run_goes_on_with_the_history_and_draws_the_same_tokens(whole, checkpoint, tmp_path):
    _, trained, drawn = whole
    resumed = made(tmp_path)
    again = drawn_by_step(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert again == {1: drawn[1]}
    assert texts_of(index_of(resumed)) == texts_of(index_of(trained)), "those of the first step are in it"


@pytest.mark.parametrize("data", [b"", b"poison", None], ids=["empty", "poisoned", "truncated"])
def test_a_damaged_history_is_refused_by_name(checkpoint, tmp_path, data):
    path = checkpoint / "blockroll" / "history_0.safetensors"
    path.write_bytes(path.read_bytes()[:-40] if data is None else data)
    with pytest.raises(CheckpointError, match=r"history_0\.safetensors is no history that can be read"):
        made(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_a_history_of_another_vocabulary_is_refused_by_name(checkpoint, tmp_path, monkeypatch):
    path = checkpoint / "blockroll" / "history_0.safetensors"
    policy = HFPolicy.from_pretrained(TINY_POLICY_DIR)
    known = load_history(path, policy)
    monkeypatch.setattr(policy, "tokenizer", None)
    save_history(known, path, policy)
    with pytest.raises(InvalidInput, match=r"history_0\.safetensors is of another tokenizer or vocabulary"):
        made(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_without_a_file_the_history_begins_empty_and_the_log_says_so(checkpoint, tmp_path, caplog):
    (checkpoint / "blockroll" / "history_0.safetensors").unlink()
    resumed = made(tmp_path)
    with caplog.at_level(logging.INFO, logger="blockroll"):
        load_rollout_state(resumed, checkpoint, views=resumed._views, audit=None, guard=None)
    assert [each.message for each in caplog.records if "there is no history in" in each.message]
    assert texts_of(index_of(resumed)) == {}


def test_a_trainer_whose_plan_asks_for_none_reads_and_writes_none(checkpoint, tmp_path):
    (checkpoint / "blockroll" / "history_0.safetensors").write_bytes(b"poison")
    plain = made(tmp_path, RolloutConfig(plan="plain"))
    plain.train(resume_from_checkpoint=str(checkpoint))
    assert not list(tmp_path.glob("checkpoint-*/blockroll/history_*"))
    assert (tmp_path / "checkpoint-2" / "blockroll" / "rollout_state.pt").is_file()


def test_a_pool_of_the_scripts_own_keeps_a_file_of_each_replica(tmp_path):
    with RolloutPool.from_pretrained("tiny", plan="history(4)", num_replicas=2) as pool:
        made(tmp_path, pool, max_steps=1).train()
        names = sorted(path.name for path in (tmp_path / "checkpoint-1" / "blockroll").glob("history_*"))
        assert names == ["history_0.safetensors", "history_1.safetensors"]


def test_a_colocated_trainer_begins_siblings_one_by_one_and_draws_the_same_tokens(whole, tmp_path):
    ordered = made(tmp_path, RolloutConfig(plan="history(4)", group_order="sibling_by_sibling"), max_steps=1)
    begun = []
    replica = ordered.rollouts.placement.pool._members[0].replica
    submit = replica.submit

    def recording(requests):
        begun.extend(request.request_id for request in requests)
        submit(requests)

    replica.submit = recording
    drawn = drawn_by_step(ordered)
    ordered.train()
    assert drawn == {0: whole[2][0]}
    siblings = [f"train-0-0-0-{group * 4 + sibling}" for sibling in range(4) for group in range(4)]
    assert begun[-16:] == siblings
