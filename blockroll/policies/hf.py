"""A Hugging Face causal LM as a policy, through transformers' own extension points.

The causal path is the model's ordinary forward plus its output head, because that is what learners
recompute. Supported now: Llama and Qwen3.

Shapes: B requests, R rows per request, K drafted tokens, W hidden width, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from blockroll.errors import InvalidInput
from blockroll.policies import attention
from blockroll.policies.base import KVWindow

TINY_POLICY_DIR = Path(__file__).parent / "tiny_policy"
FAMILIES = ("llama", "qwen3")


class HFPolicy:
    """A causal LM on one device that drafts when its config says it was trained to."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Take over `model`: it is set to evaluation mode and to blockroll's attention."""
        family = model.config.model_type
        if family not in FAMILIES:
            raise InvalidInput(
                f"model family {family!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        attention.register()
        model.set_attn_implementation(attention.ATTENTION_NAME)
        self.model = model
        self.model.train(False)
        self.output_head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.device = model.device
        self.vocab_size = int(model.config.vocab_size)
        self.max_length = int(model.config.max_position_embeddings)
        self.eos_token_ids = _eos_token_ids(model)
        section: dict[str, Any] = getattr(model.config, "blockroll", None) or {}
        self.mask_token_id: int | None = section.get("mask_token_id")
        # transformers 5.24 renamed the argument; the old name is gone from 5.40.
        arguments = inspect.signature(model.base_model.forward).parameters
        self._cache_keyword = "cache" if "cache" in arguments else "past_key_values"
        self.trained_drafts = max(section.get("block_sizes", ()), default=0)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = torch.float32,
        with_tokenizer: bool = True,
    ) -> Self:
        """Load a checkpoint folder; `tiny` is the policy that ships with blockroll."""
        folder = resolve_checkpoint(path)
        model = load_model(folder, device=device, dtype=dtype)
        tokenizer = load_tokenizer(folder) if with_tokenizer else None
        return cls(model, tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face checkpoint folder."""
        with _no_progress_bar():
            self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special ones left out."""
        if self.tokenizer is None:
            raise InvalidInput("this policy was loaded without a tokenizer; stop strings and text need one")
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    @torch.inference_mode()
    def prefill(self, ids_BR: Tensor, window: KVWindow) -> None:
        """Write keys and values of prompt rows; no logits are computed."""
        self._hidden(ids_BR, window, horizon_BR=window.positions_BR)

    @torch.inference_mode()
    def verify_logits(self, ids_BR: Tensor, window: KVWindow) -> Tensor:
        """Causal logits, float32 (B, R, V): row i is the law of the token after row i."""
        hidden_BRW = self._hidden(ids_BR, window, horizon_BR=window.positions_BR)
        return self._logits(hidden_BRW)

    @torch.inference_mode()
    def draft_logits(self, anchors_B: Tensor, num_drafts: int, window: KVWindow) -> Tensor:
        """Logits of the mask rows, float32 (B, K, V): row i is the law of the i-th draft after the anchor."""
        if self.mask_token_id is None:
            raise InvalidInput(
                "this policy has no mask token: it was not trained to draft, use the plain plan"
            )
        ids_BR = anchors_B[:, None].repeat(1, num_drafts + 1)
        ids_BR[:, 1:] = self.mask_token_id
        # Masks see up to the last mask; the anchor stays causal, so its keys and values are clean.
        horizon_BR = window.positions_BR[:, -1:].repeat(1, num_drafts + 1)
        horizon_BR[:, 0] = window.positions_BR[:, 0]
        hidden_BRW = self._hidden(ids_BR, window, horizon_BR=horizon_BR)
        return self._logits(hidden_BRW[:, 1:])

    def _hidden(self, ids_BR: Tensor, window: KVWindow, *, horizon_BR: Tensor) -> Tensor:
        keys_S = torch.arange(window.extent, device=ids_BR.device)
        mask_B1RS = (keys_S <= horizon_BR[..., None])[:, None]
        output = self.model.base_model(
            input_ids=ids_BR,
            position_ids=window.positions_BR,
            attention_mask=mask_B1RS,
            use_cache=True,
            **{self._cache_keyword: window},
        )
        hidden_BRW: Tensor = output.last_hidden_state
        return hidden_BRW

    def _logits(self, hidden_BRW: Tensor) -> Tensor:
        logits_BRV: Tensor = self.output_head(hidden_BRW)
        return logits_BRV.float()


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a supported checkpoint; `tiny` names the shipped policy. Nothing is ever downloaded."""
    folder = TINY_POLICY_DIR if str(path) == "tiny" else Path(path)
    if not (folder / "config.json").is_file():
        raise InvalidInput(
            f"no checkpoint at {str(path)!r}: give a folder with config.json, or 'tiny' for the shipped one"
        )
    _check_family(AutoConfig.from_pretrained(folder).model_type)
    return folder


def load_model(
    folder: Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = torch.float32
) -> PreTrainedModel:
    """The causal LM of a checkpoint folder, with transformers' default attention."""
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with _no_progress_bar():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    nn.Module.to(model, resolve_device(device))
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_checkpoint(path))
    return tokenizer


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the accelerator if there is one (CUDA and ROCm are both `cuda` to torch), else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """One bar per replica and shard would drown the run's own."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise InvalidInput(f"model family {family!r} is not supported; supported are {', '.join(FAMILIES)}")


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
