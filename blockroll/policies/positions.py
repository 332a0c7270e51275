"""How long a text may become, and rotary factors that depend on how long it is.

`longrope` takes one set of factors for texts up to a length and another for longer ones, and `dynamic`
stretches its factors with every token past a length. Both change the keys of all earlier positions, so a
text that crosses such a boundary has no one law: what it was drawn by, token for token, is not what a forward
of the whole text gives. A text therefore ends at the next boundary above its prompt. On either side every
forward of it, of a prefix or of the whole, has the same factors: those that transformers takes for that text
alone.

Shapes: B texts, R rows of a forward, D head width.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blockroll.errors import InvalidInput

logger = logging.getLogger(__name__)

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Positions that a config serves."""

    max_length: int  # tokens of the longest text
    boundaries: tuple[int, ...] = ()  # ascending; no text goes from at most this many tokens to more

    @property
    def note(self) -> str:
        """A sentence for the log; empty where every text may become as long as the longest."""
        if not self.boundaries:
            return ""
        lengths = " and ".join(map(str, self.boundaries))
        return (
            f"longrope changes the factors of all positions of a text that becomes longer than {lengths} "
            "tokens; texts whose prompt is shorter end there"
        )


def context_of(config: PretrainedConfig) -> Context:
    """What `rope_parameters` and `max_position_embeddings` say together.

    YaRN serves `factor * original_max_position_embeddings`, or `max_position_embeddings` where that is more
    (model cards leave it alone); so do llama3 and longrope unless `max_position_embeddings` is above the
    original, which says the scaled context itself. A linear factor multiplies `max_position_embeddings`,
    except where parameters are given by layer type: those families have the scaled context there. Texts of
    a `dynamic` config end at `max_position_embeddings`.

    Raises InvalidInput for a rope type that is not known here, and for parameters that give other widths than
    that of a head: no family served rotates a part of one.
    """
    plain = int(config.max_position_embeddings)
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layer = _by_layer_type(parameters)
    sets = list(by_layer.values()) or [parameters]
    for each in sets:
        if _type_of(each) not in _ROPE_TYPES:
            raise InvalidInput(
                f"rope type {_type_of(each)!r} is not supported; supported are {', '.join(_ROPE_TYPES)}. "
                "Correct rope_parameters (or rope_scaling) in config.json"
            )
    for layer_type, each in by_layer.items() or [(None, parameters)]:
        if _type_of(each) != "default":  # each family computes that itself, for whole heads
            _check_rotary(config, each, layer_type)
    longest = max(_scaled(each, plain, is_by_layer=bool(by_layer)) for each in sets)
    if any(_type_of(each) == "dynamic" for each in sets):
        longest = plain
    if longest < 2:
        raise InvalidInput(
            f"config.json says a context of {longest} tokens; correct max_position_embeddings or the factor "
            "of rope_parameters"
        )
    boundaries = {_original(each, plain) for each in sets if _type_of(each) == "longrope"}
    return Context(
        max_length=longest, boundaries=tuple(sorted(each for each in boundaries if each < longest))
    )


class TextRotary(nn.Module):
    """A model's rotary embedding whose longrope factors are those of each text, not of the longest one."""

    def __init__(self, stock: nn.Module, config: PretrainedConfig) -> None:
        """`stock` goes on serving layer types of other rope types."""
        super().__init__()
        self._stock = stock
        self._factors: dict[str | None, _LongFactors] = {}
        by_layer = _by_layer_type(config.rope_parameters)
        for layer_type, parameters in by_layer.items():
            if _type_of(parameters) == "longrope":
                self._factors[layer_type] = _long_factors(config, layer_type)
        if not by_layer:
            self._factors[None] = _long_factors(config, None)
        self._num_tokens_B: Tensor | None = None

    @contextmanager
    def of_texts(self, num_tokens_B: Tensor | None) -> Iterator[None]:
        """The texts of the forwards within have so many tokens; None: as many as their positions say.

        Where rows of several texts stand behind one another, (1, N): of the text of each row.
        """
        before, self._num_tokens_B = self._num_tokens_B, num_tokens_B
        try:
            yield
        finally:
            self._num_tokens_B = before

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, R, D) in the type of `x`, as the family's own module computes them."""
        factors = self._factors.get(layer_type)
        if factors is None:
            stocked: tuple[Tensor, Tensor] = self._stock(x, position_ids, layer_type)
            return stocked
        num_tokens_B = self._num_tokens_B
        if num_tokens_B is None:
            num_tokens_B = position_ids.amax(dim=-1) + 1
        if num_tokens_B.dim() == 1:
            num_tokens_B = num_tokens_B[:, None]
        is_long = (num_tokens_B > factors.boundary)[..., None]
        short, long = (each.to(x.device) for each in (factors.short, factors.long))
        angles = position_ids[..., None].float() * torch.where(is_long, long, short)
        both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos() * factors.scaling, both.sin() * factors.scaling
        return cos.to(x.dtype), sin.to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LongFactors:
    """Inverse frequencies, float32 (D / 2)."""

    boundary: int  # tokens of the longest text with short factors
    short: Tensor
    long: Tensor
    scaling: float


def use_text_rotary(model: PreTrainedModel) -> TextRotary | None:
    """Put per-text factors into a model with longrope; None for all others, which stay as they are."""
    context = context_of(model.config)
    if not context.boundaries:
        return None
    base: Any = model.base_model
    if not isinstance(base.rotary_emb, TextRotary):
        base.rotary_emb = TextRotary(base.rotary_emb, model.config)
        logger.warning("%s", context.note)
    rotary: TextRotary = base.rotary_emb
    return rotary


def _check_rotary(config: PretrainedConfig, parameters: Mapping[str, Any], layer_type: str | None) -> None:
    """InvalidInput where transformers makes no frequencies of them, or not those of a whole head."""
    where = "rope_parameters" if layer_type is None else f"rope_parameters[{layer_type!r}]"
    options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
    kind, compute = _type_of(parameters), ROPE_INIT_FUNCTIONS[_type_of(parameters)]
    try:
        # The second of longrope are those of long texts; other types read no length here.
        frequencies, scaling = compute(config, torch.device("cpu"), **options)
        others, _ = compute(config, torch.device("cpu"), seq_len=1 << 30, **options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = f"has no {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise InvalidInput(f"rope type {kind!r} {missing}; correct {where} in config.json") from error
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * len(frequencies) != width:
        part = parameters.get("partial_rotary_factor", 1.0)
        raise InvalidInput(
            f"rope type {kind!r} rotates {2 * len(frequencies)} of the {width} numbers of a head "
            f"(partial_rotary_factor is {part}), and no supported family rotates a part of a head; correct "
            f"{where} in config.json"
        )
    if not (torch.cat([frequencies, others]).isfinite().all() and math.isfinite(scaling)):
        raise InvalidInput(f"rope type {kind!r} gives NaN or infinity; correct {where} in config.json")


def _long_factors(config: PretrainedConfig, layer_type: str | None) -> _LongFactors:
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    boundary = _original(parameters, int(config.max_position_embeddings))
    options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
    device = torch.device("cpu")
    compute = ROPE_INIT_FUNCTIONS["longrope"]
    short, scaling = compute(config, device, **options)
    long, _ = compute(config, device, seq_len=boundary + 1, **options)
    return _LongFactors(boundary=boundary, short=short, long=long, scaling=scaling)


def _by_layer_type(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Parameters that are given apart for each type of layer; empty where one set serves all."""
    return {layer_type: each for layer_type, each in parameters.items() if isinstance(each, Mapping)}


def _type_of(parameters: Mapping[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def _original(parameters: Mapping[str, Any], plain: int) -> int:
    return int(parameters.get("original_max_position_embeddings") or plain)


def _scaled(parameters: Mapping[str, Any], plain: int, *, is_by_layer: bool) -> int:
    """The context of one set of parameters."""
    kind, original = _type_of(parameters), _original(parameters, plain)
    scaled = int((parameters.get("factor") or 1.0) * original)
    if kind == "yarn":
        return max(plain, scaled)
    if kind in ("llama3", "longrope"):
        return plain if plain > original else scaled
    if kind == "linear" and not is_by_layer:
        return scaled
    return plain
