"""Checkpoint folders of supported families, read whole or not at all."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from blockroll.errors import CheckpointError, InvalidInput
from blockroll.policies.positions import context_of

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
TINY_POLICY_DIR = Path(__file__).parent / "tiny_policy"

# Whether the family takes one attention mask for all layers or one per kind of layer.
FAMILIES = {
    "llama": "one",
    "mistral": "one",
    "qwen2": "by_layer_type",
    "qwen3": "by_layer_type",
    "qwen3_moe": "one",
    "gemma2": "by_layer_type",
    "gemma3_text": "by_layer_type",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*", "*.model"]
_NAMED_AT_MOST = 3  # tensors that one message names


def check_family(family: str) -> None:
    """Raise InvalidInput for a family whose forward is not known to keep the contract."""
    if family not in FAMILIES:
        raise InvalidInput(
            f"model family {family!r} is not supported; supported are {', '.join(FAMILIES)}. To add it, "
            "list it in FAMILIES of policies/loading.py: `blockroll doctor --model` says whether it may stay"
        )


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a supported checkpoint: a folder, `tiny` for the shipped policy, or an id of the Hub.

    An id such as `org/name` is what transformers takes: its files come from the Hub's cache on this machine,
    or are downloaded to it first. A folder of that name goes before. InvalidInput if there is no checkpoint,
    or its family or positions are not served.
    """
    folder = TINY_POLICY_DIR if str(path) == "tiny" else Path(path)
    if not folder.exists() and _HUB_ID.fullmatch(str(path)):
        folder = _from_hub(str(path))
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"no checkpoint at {str(path)!r}: give a folder with config.json, an id of the Hugging Face Hub, "
            "or 'tiny' for the shipped one"
        )
    with _named(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder)
    check_family(config.model_type)
    _check_unquantized(folder, config)
    context_of(config)
    return folder


def _from_hub(repo_id: str) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # what the Hub, the network and the cache raise
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"no checkpoint at {repo_id!r}: there is no such folder, and no such model came from the Hugging "
            f"Face Hub ({type(error).__name__}: {reason}); give a folder with config.json, or 'tiny' for the "
            "shipped one"
        ) from error


def load_model(
    folder: Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = torch.float32
) -> PreTrainedModel:
    """The causal LM of a checkpoint folder, with transformers' default attention.

    Every weight comes from the folder. CheckpointError names those that are missing, have another shape, are
    not finite, or stand in the folder and in no layer: transformers draws missing weights at random, in each
    process others. A head tied to the embedding needs no weight of its own.
    """
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    _check_generation_config(folder)
    with _quiet(), _named(folder, "the weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    _check_whole(folder, model, info)
    _check_tied(folder, model)
    _check_finite(folder, model)
    nn.Module.to(model, resolve_device(device))
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. CheckpointError where it has none, or one that cannot be read."""
    folder = resolve_checkpoint(path)
    with _named(folder, "the tokenizer"):
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            # Early transformers 5 would make an empty one of the model's type.
            raise FileNotFoundError(f"there is no {', '.join(TOKENIZER_FILES)}")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the accelerator if there is one (CUDA and ROCm are both `cuda` to torch), else the CPU.

    InvalidInput for a device that torch does not know or that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InvalidInput(
            f"device {device!r} is none that torch knows: give 'auto', 'cpu', or an accelerator as 'cuda' or "
            "'cuda:1'"
        ) from None
    here = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if here is None else torch.accelerator.device_count()
    is_here = here is not None and chosen.type == here.type and (chosen.index or 0) < count
    if chosen.type != "cpu" and not is_here:
        others = f" and {count} of type {here.type!r}" if here is not None else " alone"
        raise InvalidInput(
            f"device {str(chosen)!r} is not here: torch can use the CPU{others}; 'auto' takes the best one"
        )
    return chosen


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """One bar per replica and shard would drown the run's own."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of a load: what it warns of is an error here, which names the tensors."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with no_progress_bar():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)


@contextmanager
def _named(folder: Path, part: str) -> Iterator[None]:
    """Say which checkpoint and which part of it cannot be read."""
    try:
        yield
    except Exception as error:  # a damaged file makes transformers raise anything
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise CheckpointError(
            f"{part} of the checkpoint in {folder} cannot be read: {reason}; copy or download it again"
        ) from error


def _check_unquantized(folder: Path, config: PretrainedConfig) -> None:
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InvalidInput(
            f"the checkpoint in {folder} is quantized ({method}), and only weights in float32, bfloat16 or "
            "float16 are served and synced: give the checkpoint that it was made from"
        )


def _check_generation_config(folder: Path) -> None:
    """transformers goes on without one that it cannot read, and without the end tokens that stand in it."""
    path = folder / "generation_config.json"
    if path.is_file():
        with _named(folder, path.name):
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("it holds no JSON object")


def _check_tied(folder: Path, model: PreTrainedModel) -> None:
    """transformers unties what the config ties where the file holds another head; other readers drop it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise CheckpointError(
            f"the checkpoint in {folder} holds lm_head.weight, which is not the embedding that its config "
            "ties it to: set tie_word_embeddings to false in config.json, if the head is right, or take "
            "lm_head.weight out of the file"
        )


def _check_whole(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """`info` is what transformers says of a load: names of tensors by what became of them."""
    unknown = [
        name
        for name in info["unexpected_keys"]
        if name.startswith((f"{model.base_model_prefix}.", "lm_head."))
    ]
    mismatched = [
        f"{name} (shape {tuple(found)}, the config needs {tuple(needed)})"
        for name, found, needed in sorted(info["mismatched_keys"])
    ]
    problems = [
        f"{what}: {_first(names)}"
        for what, names in (
            ("missing weights", sorted(info["missing_keys"])),
            ("weights of another shape", mismatched),
            ("weights that no layer of the config takes", sorted(unknown)),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint in {folder} is not the model that its config describes: {'; '.join(problems)}. "
            "Save the whole model with save_pretrained, or correct config.json (layers, biases, "
            "tie_word_embeddings)"
        )


def _check_finite(folder: Path, model: nn.Module) -> None:
    bad = [name for name, weight in model.state_dict().items() if not _is_finite(weight)]
    if bad:
        raise CheckpointError(
            f"the checkpoint in {folder} holds NaN or infinity in {_first(bad)}; every forward would be NaN: "
            "take an earlier checkpoint"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.numel() == 0:
        return True
    return bool(torch.stack(weight.aminmax()).isfinite().all())  # both are NaN where any number is


def _first(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")
