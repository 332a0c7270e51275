"""The draft adapter: what teaches a causal LM to draft without touching its weights.

A mask embedding, and low-rank updates that act on mask rows only, through hooks on the model's own modules.
Clean rows never meet it, so the causal policy is the same bit for bit with and without it. It belongs to
whoever decodes: the model's parameters, state dict and optimizer never see it.

Shapes: B requests, R rows per request, W hidden width, r rank.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockroll.errors import AdapterMismatch
from blockroll.kernels.lowrank_linear import lowrank_linear

ADAPTER_CONFIG = "draft_adapter.json"
ADAPTER_WEIGHTS = "draft_adapter.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What an adapter is and what it was trained for; kept beside its weights."""

    family: str  # model_type of the policy it was made for
    rank: int
    block_sizes: tuple[int, ...] = ()  # K it was trained with; none: untrained
    layouts: tuple[str, ...] = ()  # of `two_forward`, `fused`
    parent_hash: str | None = None  # of the weights it was trained on; shown, never required
    chat_template_hash: str | None = None  # of the template its prompts went through; none: text as it was
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # and what it was called with
    trained_tokens: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)  # losses, and measured tokens per step


class LowRank(nn.Module):
    """Adds up(down(x)) to what a module gives for x.

    Zero at the start, so that an untrained adapter changes nothing but the embedding.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.normal_(self.down, std=in_features**-0.5)

    def forward(self, x_BRI: Tensor, base_BRO: Tensor, first_row: int) -> Tensor:
        """What a module gives for `x_BRI`, with the update on rows `first_row`..; the rest stays."""
        return lowrank_linear(base_BRO, x_BRI, self.down, self.up, first_row=first_row)


class DraftAdapter(nn.Module):
    """Low-rank updates by module name, and the mask embedding (W,). Float32, whatever the model is."""

    def __init__(self, model: PreTrainedModel, config: AdapterConfig) -> None:
        """Fit the model's shapes and hook its modules; nothing acts before `on_rows`."""
        super().__init__()
        self.config = config
        self._first_row: int | None = None
        embeddings = model.get_input_embeddings()
        with torch.no_grad():
            every_token = torch.arange(model.config.vocab_size, device=model.device)
            mean_W = embeddings(every_token).float().mean(dim=0)
        self.mask_embedding = nn.Parameter(mean_W.clone())
        self.updates = nn.ModuleDict()  # made on the CPU, so that a seed means the same on every device
        self._handles = []
        for name, module, in_features, out_features in _targets(model):
            update = LowRank(in_features, out_features, config.rank)
            self.updates[_key(name)] = update
            self._handles.append(module.register_forward_hook(self._hook(update)))
        self.hook_ids = frozenset(handle.id for handle in self._handles)  # they do nothing outside `on_rows`
        self.to(model.device)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the adapter."""
        return sum(parameter.numel() for parameter in self.parameters())

    def update_of(self, path: str) -> LowRank | None:
        """What is added on mask rows to the output of a module, by its path in the model without its head."""
        if _key(path) not in self.updates:
            return None
        update = self.updates[_key(path)]
        return update if isinstance(update, LowRank) else None

    @contextmanager
    def on_rows(self, first_row: int) -> Iterator[None]:
        """Act on rows `first_row`.. of every forward of the model inside this block."""
        self._first_row = first_row
        try:
            yield
        finally:
            self._first_row = None

    def embed(self, embeddings_BRW: Tensor, first_row: int) -> Tensor:
        """The same embeddings with the mask embedding on rows `first_row`.. ."""
        mask_W = self.mask_embedding.to(embeddings_BRW.dtype)
        masks_BRW = mask_W.expand_as(embeddings_BRW[:, first_row:])
        return torch.cat([embeddings_BRW[:, :first_row], masks_BRW], dim=1)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `draft_adapter.safetensors` and `draft_adapter.json`; weights first, each by renaming."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        for name, data in (
            (ADAPTER_WEIGHTS, safetensors.torch.save(tensors)),
            (ADAPTER_CONFIG, json.dumps(asdict(self.config), indent=2).encode()),
        ):
            partial = folder / f"{name}.partial"
            partial.write_bytes(data)
            partial.rename(folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel) -> Self:
        """Load an adapter onto a model of the same architecture; AdapterMismatch names what does not fit."""
        folder = Path(folder)
        config = read_adapter_config(folder)
        family = model.config.model_type
        if config.family != family:
            raise AdapterMismatch(
                f"the draft adapter in {folder} was made for the family {config.family!r}, the policy is "
                f"{family!r}; convert this policy with `blockroll convert`"
            )
        tensors = _read_weights(folder / ADAPTER_WEIGHTS)
        adapter = cls(model, config)
        problems = _differences(adapter.state_dict(), tensors)
        if problems:
            adapter.remove()
            raise AdapterMismatch(
                f"the draft adapter in {folder} does not fit this policy: {'; '.join(problems[:3])}"
                + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
                + ". It fits any weights of the architecture it was made for"
            )
        adapter.load_state_dict(tensors)
        return adapter

    def _hook(self, update: LowRank) -> Any:
        def add_update(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
            if self._first_row is None:
                return output
            updated: Tensor = update(inputs[0], output, self._first_row)
            return updated

        return add_update


def has_adapter(folder: Path) -> bool:
    """Whether an adapter lies in this folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What the adapter in this folder was made and trained for."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise AdapterMismatch(f"no draft adapter in {folder}: it has no {ADAPTER_CONFIG}")
    try:
        read: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterMismatch(f"{path} cannot be read: {error}; copy the draft adapter again") from None
    try:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in read.items()
        }
        return AdapterConfig(**values)
    except (AttributeError, TypeError) as wrong:
        raise AdapterMismatch(f"{path} is not a draft adapter of this version: {wrong}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, all of them finite."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterMismatch(f"{path} cannot be read: {error}; copy the draft adapter again") from None
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterMismatch(f"{path} holds NaN or infinity in {name}: take an earlier draft adapter")
    return tensors


def parent_hash(model: nn.Module) -> str:
    """Of the names, shapes and bytes of every weight."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def chat_template_hash(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Of a tokenizer's chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.blake2b(str(template).encode(), digest_size=8).hexdigest() if template else None


def _targets(model: PreTrainedModel) -> list[tuple[str, nn.Module, int, int]]:
    """Modules that get an update: linears on (B, R, W) rows, and a mixture of experts as a whole.

    Experts see tokens regrouped, not rows in order, so no row of theirs can be told from another.
    """
    width = int(model.config.hidden_size)
    targets: list[tuple[str, nn.Module, int, int]] = []
    mixtures = [name for name, module in model.base_model.named_modules() if hasattr(module, "experts")]
    for name, module in model.base_model.named_modules():
        if name in mixtures:
            targets.append((name, module, width, width))
        elif any(name.startswith(f"{mixture}.") for mixture in mixtures):
            continue
        elif isinstance(module, nn.Linear):
            targets.append((name, module, module.in_features, module.out_features))
    return targets


def _key(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _differences(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in mine.keys() - theirs.keys()]
    problems += [f"{name} is not part of this architecture" for name in theirs.keys() - mine.keys()]
    problems += [
        f"{name} has shape {tuple(theirs[name].shape)}, this policy needs {tuple(mine[name].shape)}"
        for name in mine.keys() & theirs.keys()
        if mine[name].shape != theirs[name].shape
    ]
    return sorted(problems)
