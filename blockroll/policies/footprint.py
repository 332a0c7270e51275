"""What a policy takes of memory, counted from its config and the shapes of its weights alone.

`bare_policy` is a policy without weights, so all of it can be said before anything is loaded. What weights,
copies and cache rows take is exact; what forwards take beside them is an estimate, named so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from blockroll.errors import CheckpointError
from blockroll.policies.adapter import ADAPTER_WEIGHTS, DraftAdapter, has_adapter, read_adapter_config
from blockroll.policies.base import KVShape, StatePart
from blockroll.policies.compiled import Compile
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import resolve_checkpoint
from blockroll.policies.prepacked import PACKED_DTYPES, Prepack

_LOGIT_BYTES = 4  # float32, whatever the weights are; a sampler's weights of the same row likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by what takes them."""

    weights: int  # parameters, tied ones once, and buffers
    packed: int  # copies of linear weights, if it is measured that decoding gains by them
    adapter: int  # a draft adapter's tensors, and the copy of them that compiled layers read
    kv_shape: KVShape
    state_shape: tuple[StatePart, ...]
    prefill_row: int  # about: what a layer holds of a row
    logits_row: int  # about: logits of a row, and the sampler's weights of it

    @classmethod
    def of(cls, policy: HFPolicy, device: torch.device) -> Self:
        """Of a policy, loaded or bare, on a device."""
        model, config = policy.model, policy.model.config
        itemsize = model.dtype.itemsize
        heads = config.num_attention_heads
        keys = policy.kv_shape.num_heads
        inner = config.intermediate_size
        if getattr(config, "num_experts_per_tok", None) and getattr(config, "moe_intermediate_size", None):
            inner = max(inner, config.num_experts_per_tok * config.moe_intermediate_size)
        # Two states, and beside them what attention or the gated MLP makes of a row.
        numbers = 2 * config.hidden_size + max(3 * (heads + keys) * policy.kv_shape.width, 3 * inner)
        return cls(
            weights=_bytes_of(model),
            packed=_packed_bytes(model, policy.packed.prepack, device),
            adapter=_adapter_bytes(policy, device),
            kv_shape=policy.kv_shape,
            state_shape=policy.state_shape,
            prefill_row=numbers * itemsize,
            logits_row=policy.vocab_size * (2 * _LOGIT_BYTES + (itemsize if itemsize < _LOGIT_BYTES else 0)),
        )

    @property
    def loaded(self) -> int:
        """All that is there before the first key is."""
        return self.weights + self.packed + self.adapter

    def forward(self, *, prefill_rows: int, logits_rows: int) -> int:
        """About what the larger takes: a prefill of so many rows, or a step with logits of so many."""
        return max(prefill_rows * self.prefill_row, logits_rows * self.logits_row)


def bare_policy(
    path: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    adapter: str | Path | None = None,
    prepack: Prepack = "auto",
    compile: Compile = "auto",
) -> HFPolicy:
    """The policy of a checkpoint without its weights: it answers for shapes and plans, and runs nothing.

    InvalidInput and AdapterMismatch as `HFPolicy.from_pretrained` raises them, as far as configs tell.
    """
    folder = resolve_checkpoint(path)
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.from_pretrained(folder), dtype=torch_dtype
        )
    policy = HFPolicy(model, prepack="off", compile="off")  # nothing here can run: "on" would be refused
    policy.packed.prepack, policy.compiled.compile = prepack, compile
    if adapter is not None or has_adapter(folder):
        config = read_adapter_config(Path(adapter or folder))
        with torch.device("meta"):
            policy.use_adapter(DraftAdapter(model, config))
    return policy


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights in a folder's safetensors files by their type, read from the headers alone."""
    found: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == ADAPTER_WEIGHTS:
            continue
        for name, tensor in _header(file).items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                found[tensor["dtype"]] = found.get(tensor["dtype"], 0) + end - begin
    return found


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > file.stat().st_size:
                raise ValueError(f"its header would have {size} bytes")
            header: dict[str, Any] = json.loads(opened.read(size))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; copy or download it again") from error
    return header


def _bytes_of(module: nn.Module) -> int:
    return sum(each.numel() * each.itemsize for each in (*module.parameters(), *module.buffers()))


def _packed_bytes(model: nn.Module, prepack: Prepack, device: torch.device) -> int:
    if prepack == "off" or device.type != "cpu":
        return 0
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    return sum(each.numel() * each.itemsize for each in weights if each.dtype in PACKED_DTYPES)


def _adapter_bytes(policy: HFPolicy, device: torch.device) -> int:
    if policy.adapter is None:
        return 0
    is_copied = device.type == "cpu" and policy.compiled.compile != "off"
    copied = policy.adapter.num_parameters * policy.model.dtype.itemsize if is_copied else 0
    return _bytes_of(policy.adapter) + copied
