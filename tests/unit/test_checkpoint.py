"""Checkpoints that were damaged after they were written, and saves that fail."""

import hashlib
import json
import random
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockroll.errors import CheckpointError
from blockroll.rl_loops.checkpoint import STATE_FILE, checkpoints, load_checkpoint, save_checkpoint
from blockroll.rl_loops.learner import Learner
from blockroll.rl_loops.manifest import MANIFEST_FILE
from tests.runs import config_for, run, save_policy

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, STATE_FILE, "config.json", "generation_config.json", "tokenizer.json", MANIFEST_FILE)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(data) // 2, len(data))
    data[place] ^= 1
    path.write_bytes(data)


def write_a_text(path):
    path.write_text("not what you are looking for\n")


def remove(path):
    path.unlink()


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\n")


def change_weights(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage, WEIGHTS


def change_state(change):
    def damage(folder):
        state = torch.load(folder / STATE_FILE, weights_only=True)
        change(state)
        torch.save(state, folder / STATE_FILE)

    return damage, STATE_FILE


def break_json(name):
    def damage(folder):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(":", ";", 1))

    return damage, name


def first(tensors):
    return tensors[sorted(tensors)[0]]


def widen_moments(state):
    moments = state["learner"]["optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(3, 3)


def another_policys_weights(folder):
    shutil.copy(save_policy(folder.parent.parent / "other", seed=1) / WEIGHTS, folder / WEIGHTS)


def another_steps_manifest(folder):
    shutil.copy(folder.parent / "step_000002" / MANIFEST_FILE, folder / MANIFEST_FILE)


def another_steps_state(folder):
    shutil.copy(folder.parent / "step_000002" / STATE_FILE, folder / STATE_FILE)


def another_steps_content(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step_000002", folder)


def a_manifest_without_the_weights(folder):
    content = json.loads((folder / MANIFEST_FILE).read_text())
    del content["files"][WEIGHTS]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def forge_manifest(change):
    """With a checksum of its own that holds."""

    def forge(folder):
        content = json.loads((folder / MANIFEST_FILE).read_text())
        del content["sha256"]
        change(content)
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        (folder / MANIFEST_FILE).write_text(json.dumps({**content, "sha256": digest}, indent=1) + "\n")

    return forge, MANIFEST_FILE


def an_adapter_of_nobody(folder):
    (folder / "draft_adapter.safetensors").write_bytes(b"weights")


WAYS = (cut, empty, flip_a_bit, write_a_text, remove, lengthen)
DAMAGES = {
    f"{way.__name__} {name}": (lambda folder, way=way, name=name: way(folder / name), name)
    for way in WAYS
    for name in FILES
} | {
    "a tensor is missing": change_weights(lambda tensors: tensors.pop(sorted(tensors)[0])),
    "NaN in the weights": change_weights(lambda tensors: first(tensors).view(-1)[:1].fill_(float("nan"))),
    "weights of another shape": change_weights(lambda t: t.update({sorted(t)[0]: torch.zeros(3, 3)})),
    "weights of another policy": (another_policys_weights, WEIGHTS),
    "optimizer of another shape": change_state(widen_moments),
    "NaN in the optimizer": change_state(
        lambda state: state["learner"]["optimizer"]["state"][0]["exp_avg"].fill_(float("nan"))
    ),
    "no optimizer": change_state(lambda state: state["learner"].pop("optimizer")),
    "no random state": change_state(lambda state: state.pop("rng")),
    "another step's number": change_state(lambda state: state.update(step=3)),
    "another step's state": (another_steps_state, STATE_FILE),
    "another step's manifest": (another_steps_manifest, MANIFEST_FILE),
    "another step's content": (another_steps_content, MANIFEST_FILE),
    "a manifest without the weights": (a_manifest_without_the_weights, MANIFEST_FILE),
    "a manifest of a later format": forge_manifest(lambda content: content.update(format=2)),
    "a manifest without a format": forge_manifest(lambda content: content.pop("format")),
    "a manifest without files": forge_manifest(lambda content: content.pop("files")),
    "a manifest without checksums": forge_manifest(lambda content: content["files"][WEIGHTS].pop("sha256")),
    "broken json of the config": break_json("config.json"),
    "broken json of the tokenizer": break_json("tokenizer.json"),
    "broken json of the tokenizer's config": break_json("tokenizer_config.json"),
    "an adapter put beside it": (an_adapter_of_nobody, "draft_adapter.safetensors"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, policy_path):
    """The config of a run with checkpoints of steps 2 and 4."""
    config = config_for(tmp_path_factory.mktemp("finished"), policy_path, eval_every=0, plan="plain")
    run(config)
    return config


@pytest.fixture
def copy(tmp_path, finished, policy_path):
    """A copy of that run, to be damaged."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return config_for(tmp_path, policy_path, eval_every=0, plan="plain")


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line_that_names_the_file_and_the_newest_good_checkpoint(copy, damage, name):
    folder = checkpoints(copy.run_dir)[-1]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(copy.run_dir)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder / name) in text
    assert f"blockroll train --resume {copy.run_dir} --from step_000002" in text


def test_a_damaged_checkpoint_stops_a_resume_before_anything_is_changed(copy):
    flip_a_bit(checkpoints(copy.run_dir)[-1] / WEIGHTS)
    before = (copy.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*step_000002"):
        run(copy, resume=True)
    assert (copy.run_dir / "metrics.jsonl").read_bytes() == before
    assert [folder.name for folder in checkpoints(copy.run_dir)] == ["step_000002", "step_000004"]


def test_where_no_checkpoint_is_good_the_advice_is_another_run(copy):
    for folder in checkpoints(copy.run_dir):
        flip_a_bit(folder / STATE_FILE)
    with pytest.raises(CheckpointError, match=r"no other checkpoint of the run is good.*another name"):
        load_checkpoint(copy.run_dir)


def test_a_checkpoint_of_before_manifests_says_how_its_weights_can_be_used(copy):
    for folder in checkpoints(copy.run_dir):
        (folder / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"earlier version .* policy\.path="):
        load_checkpoint(copy.run_dir)


def test_an_untouched_checkpoint_loads_with_files_that_tools_hide_there(copy):
    (checkpoints(copy.run_dir)[-1] / ".DS_Store").write_bytes(b"")
    assert load_checkpoint(copy.run_dir).step == 4
    assert load_checkpoint(copy.run_dir, "step_000002").state["step"] == 2


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(copy):
    with pytest.raises(
        CheckpointError, match="no checkpoint 'step_000003'; there is step_000002, step_000004"
    ):
        load_checkpoint(copy.run_dir, "step_000003")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step_1000000", "step_999999", "step_000001", "step_x", ".unfinished-step_000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = [folder.name for folder in checkpoints(tmp_path)]
    assert found == ["step_000001", "step_999999", "step_1000000"]


def saved_again(config, *, step):
    """Save what the newest checkpoint holds once more, as of another step."""
    checkpoint = load_checkpoint(config.run_dir)
    policy = load_policy(checkpoint.folder)
    return save_checkpoint(config.run_dir, policy, {**checkpoint.state, "step": step}, keep=2)


def load_policy(folder):
    from blockroll.policies.hf import HFPolicy

    return HFPolicy.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("bytes_left", [0, 4_000, 12_000, 30_000])
def test_a_full_disk_leaves_the_older_checkpoints_in_force(copy, bytes_left):
    """Files may not grow past a limit of the operating system, which each writer meets at another place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*earlier checkpoints are untouched"):
            saved_again(copy, step=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.name for each in sorted((copy.run_dir / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004",
    ]
    assert load_checkpoint(copy.run_dir).step == 4
    saved_again(copy, step=6)
    assert load_checkpoint(copy.run_dir).step == 6


def test_weights_that_are_not_finite_are_not_saved(copy):
    checkpoint = load_checkpoint(copy.run_dir)
    policy = load_policy(checkpoint.folder)
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"embed_tokens.* holds NaN"):
        save_checkpoint(copy.run_dir, policy, {**checkpoint.state, "step": 6}, keep=1)
    assert load_checkpoint(copy.run_dir).step == 4


def test_a_learner_refuses_an_optimizer_of_other_shapes(copy, policy_path):
    from blockroll.config import TrainConfig
    from blockroll.rl_loops.algorithms import GRPO

    checkpoint = load_checkpoint(copy.run_dir)
    learner = Learner(load_policy(checkpoint.folder), TrainConfig(), GRPO())
    state = checkpoint.state["learner"]
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"exp_avg of tensor 0 has shape \(3, 3\)"):
        learner.load_state_dict(state)
    del state["optimizer"]["param_groups"][0]["params"][0]
    with pytest.raises(CheckpointError, match="belongs to another policy"):
        learner.load_state_dict(state)
