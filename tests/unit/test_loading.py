"""A checkpoint is read whole or refused by the names of its tensors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.ends import end_token_ids
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_model, load_tokenizer, resolve_checkpoint
from tests.models import EOS_ID, random_adapter, random_model


@pytest.fixture
def folder(tmp_path):
    model = random_model()
    del model.config.blockroll
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change, **config):
    """Rewrite the tensors of a checkpoint, and options of its config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))


def nothing(tensors):
    pass


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_the_checkpoint_lacks_is_named_and_not_made_up(folder, name):
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"missing weights: {name}\."):
        load_model(folder)


def test_many_missing_weights_are_counted(folder):
    edit(folder, nothing, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing weights: model\.layers\.2\..*, .*, .* and 6 more"):
        load_model(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    edit(folder, nothing, intermediate_size=48)
    with pytest.raises(
        CheckpointError, match=r"another shape: model\.layers\.0\.mlp\.down_proj\.weight \(shape \(32, 64\)"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_weight_that_no_layer_takes_is_named(folder, name):
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    with pytest.raises(CheckpointError, match=f"no layer of the config takes: {name}"):
        load_model(folder)


def test_a_value_head_beside_the_model_is_no_fault(folder):
    edit(folder, lambda tensors: tensors.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    edit(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(5, value))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.norm\.weight;"):
        load_model(folder, dtype="bfloat16")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_head_tied_to_the_embedding_needs_no_weight_of_its_own(tmp_path, family):
    model = random_model(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_head_that_the_config_ties_to_another_embedding_is_refused(tmp_path):
    model = random_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(24, 32)}))
    with pytest.raises(
        CheckpointError, match=r"holds lm_head\.weight, which is not the embedding that .* ties"
    ):
        load_model(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", "unheard-of"])
def test_a_quantized_checkpoint_is_refused_by_its_method(folder, method):
    edit(folder, nothing, quantization_config={"quant_method": method})
    with pytest.raises(InvalidInput, match=rf"is quantized \({method}\), and only weights in float32"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_end_tokens_are_not_lost_with_a_generation_config_that_cannot_be_read(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json of the checkpoint in .* cannot be read"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "config",
    [{"eos_token_id": "2"}, {"hidden_size": "32"}, {"max_position_embeddings": None}, {"vocab_size": 0}],
)
def test_a_config_that_makes_transformers_raise_anything_is_one_error_of_one_line(folder, config):
    edit(folder, nothing, **config)
    with pytest.raises(CheckpointError, match=r"cannot be read|is not the model") as caught:
        load_model(resolve_checkpoint(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    ["yes", {"mask_token_id": 24}, {"mask_token_id": "3"}, {"block_sizes": "4"}, {"layouts": 5}],
)
def test_what_a_config_says_of_drafts_is_checked_before_anything_drafts(section):
    model = random_model()
    model.config.blockroll = section
    with pytest.raises(InvalidInput, match=r"blockroll.* of (a|the) config"):
        HFPolicy(model)


def test_end_tokens_outside_the_vocabulary_are_named_in_a_warning(caplog):
    model = random_model()
    model.generation_config.eos_token_id = [EOS_ID, 99, 1000]
    assert end_token_ids(model, None) == (EOS_ID,)
    assert "end tokens 99, 1000 are outside the vocabulary of 24" in caplog.text


def test_an_adapter_may_lie_beside_the_weights(folder):
    random_adapter(HFPolicy.from_pretrained(folder, with_tokenizer=False)).save_pretrained(folder)
    assert HFPolicy.from_pretrained(folder, with_tokenizer=False).can_draft


@pytest.mark.parametrize(
    ("name", "content", "load"),
    [
        ("config.json", "{", resolve_checkpoint),
        ("model.safetensors", "not weights", load_model),
        ("model.safetensors", "", load_model),
        ("tokenizer.json", "{", load_tokenizer),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_of_one_kind_that_names_the_folder(
    folder, name, content, load
):
    load_tokenizer("tiny").save_pretrained(folder)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"of the checkpoint in {folder} cannot be read"):
        load(folder)


def test_an_unknown_family_lists_those_that_are_served_and_says_how_to_check_one(folder):
    edit(folder, nothing, model_type="gpt2")
    with pytest.raises(InvalidInput, match=r"'gpt2' is not supported; supported are llama, .*doctor --model"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, 2, (2, 6)), (4, 2, (4, 2, 6)), ([4, 2], [2, 5], (4, 2, 5, 6)), (99, 2, (2, 6))],
)
def test_end_tokens_are_those_of_generation_config_model_config_and_tokenizer(generation, config, expected):
    model = random_model()
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    tokenizer = load_tokenizer("tiny")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(6)
    assert end_token_ids(model, tokenizer) == expected
    assert HFPolicy(model, tokenizer).eos_token_ids == expected
    assert HFPolicy(random_model()).eos_token_ids == (EOS_ID,)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The Hub's cache of this machine, and nothing behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_checkpoint_of_the_hub_is_found_by_its_id(offline_hub):
    commit = "0" * 40
    cached = offline_hub / "models--acme--arithmetic"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(resolve_checkpoint("tiny"), cached / "snapshots" / commit)
    assert resolve_checkpoint("acme/arithmetic") == cached / "snapshots" / commit


def test_an_id_that_no_folder_and_no_hub_knows_is_refused_by_name(offline_hub):
    with pytest.raises(InvalidInput, match="no checkpoint at 'nobody/nothing': there is no such folder, and"):
        resolve_checkpoint("nobody/nothing")
