"""Decoder layers of the well-known shape: RMS norms, rotation by halves, a gated MLP, residuals around both.

`LayerShape.of` looks at modules, not at the name of a family. What it finds is what the compiled code of
`kernels/layers` computes, as far as modules tell; whether the model computes that, its caller compares.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from blockroll.kernels.layers import Layer, Model
from blockroll.policies.prepacked import is_packed_forward

_DTYPES = (torch.float32, torch.bfloat16)
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_HEAD_NORMS = {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"}
_NORMS = {"norm_in": "input_layernorm", "norm_mlp_in": "post_attention_layernorm"}
_NORMS_BEHIND_PARTS = {  # one name stands for another place there
    "norm_in": "input_layernorm",
    "norm_attention": "post_attention_layernorm",
    "norm_mlp_in": "pre_feedforward_layernorm",
    "norm_mlp": "post_feedforward_layernorm",
}
_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    partial(F.gelu, approximate="tanh"),
)  # as the compiled code counts them
_CLOSE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAttention:
    """What a layer says of its attention."""

    module: nn.Module
    scaling: float
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A model's layers, by what they are made of."""

    base: Any  # the model without its head
    modules: tuple[tuple[nn.Module, str, nn.Module], ...]  # parent, name and module: all that is not called
    weights: tuple[tuple[str, nn.Module, str], ...]  # name in the compiled code, module, name of a parameter
    attentions: tuple["LayerAttention", ...]  # of each layer
    sizes: dict[str, int]  # of `Model`
    epsilon: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """None for models whose layers are of another shape."""
        base: Any = model.base_model
        if _names(base) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not len(base.layers):
            return None
        modules: list[tuple[nn.Module, str, nn.Module]] = [(base, "norm", base.norm)]
        weights: list[tuple[str, nn.Module, str]] = []
        norms = [base.norm]
        for index, layer in enumerate(base.layers):
            names = _names_of_layer(layer)
            if names is None:
                return None
            modules.append((base.layers, str(index), layer))
            modules += [(layer, name, child) for name, child in layer.named_children()]
            modules += [(part, name, child) for part in (layer.self_attn, layer.mlp)
                        for name, child in part.named_children()]  # fmt: skip
            for name, path in names.items():
                module = layer.get_submodule(path)
                weights.append((name, module, "weight"))
                if name in PROJECTIONS:
                    weights.append((f"{name}_bias", module, "bias"))
                else:
                    norms.append(module)
        adds_one, epsilon = _kind_of_norms(norms), _epsilon(base.norm)
        activation = _kind_of_activation(base.layers[0].mlp.act_fn)
        if adds_one is None or epsilon is None or activation is None:
            return None
        first, config = base.layers[0], model.config
        sizes = {
            "width": first.self_attn.q_proj.in_features,
            "heads": config.num_attention_heads,
            "key_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "head_width": first.self_attn.head_dim,
            "inner": first.mlp.gate_proj.out_features,
            "norm_adds_one": int(adds_one),
            "activation": activation,
        }
        if not all(_fits(layer, sizes) for layer in base.layers):
            return None
        return cls(
            base=base,
            modules=tuple(modules),
            weights=(*weights, ("norm_last", base.norm, "weight")),
            attentions=tuple(
                LayerAttention(
                    module=layer.self_attn,
                    scaling=layer.self_attn.scaling,
                    softcap=getattr(layer.self_attn, "attn_logit_softcapping", None),
                )
                for layer in base.layers
            ),
            sizes=sizes,
            epsilon=epsilon,
        )

    @property
    def num_layers(self) -> int:
        """All of the model."""
        return len(self.attentions)

    def is_plain(self, allowed_hooks: Set[int]) -> bool:
        """Whether calling the modules would compute what they are made of, and no more.

        Not where one is exchanged, trains, or has a hook, but for `allowed_hooks`, which do nothing now.
        """
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return False
        for parent, name, module in self.modules:
            if parent._modules.get(name) is not module or module.training or module._forward_pre_hooks:
                return False
            if module._forward_hooks and not module._forward_hooks.keys() <= allowed_hooks:
                return False
            if has_own_forward(module):
                return False
        return not self.base._forward_hooks and not self.base._forward_pre_hooks

    def stamp(self) -> list[int]:
        """Where the weights lie; another list after any has been moved or exchanged."""
        return [
            0 if (tensor := module._parameters[name]) is None else tensor.data_ptr()
            for _, module, name in self.weights
        ]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of all weights, if compiled code can read them where they lie."""
        tensors = [each for _, module, name in self.weights if (each := module._parameters[name]) is not None]
        dtype = tensors[0].dtype
        is_readable = all(
            type(each) is nn.Parameter  # no shard, and nothing that is computed of others
            and each.device.type == "cpu"
            and each.dtype == dtype
            and each.is_contiguous()
            for each in tensors
        )
        return dtype if is_readable and dtype in _DTYPES else None

    def addresses(self) -> tuple[Model, list[Layer]]:
        """The weights as they lie now."""
        layers: list[Layer] = []
        model = Model(epsilon=self.epsilon, **self.sizes)
        for name, module, key in self.weights:
            tensor = module._parameters[key]
            if name == "norm_in":
                layers.append(Layer())
            setattr(layers[-1] if name != "norm_last" else model, name, _address(tensor))
        return model, layers


def has_own_forward(module: nn.Module) -> bool:
    """Whether it computes by another forward than its class's; that of its packed weight is none."""
    own = module.__dict__.get("forward")
    return own is not None and not is_packed_forward(own)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _names(module: nn.Module) -> set[str]:
    """Of its modules; empty where it has parameters of its own besides."""
    return set() if module._parameters else {name for name, _ in module.named_children()}


def _names_of_layer(layer: nn.Module) -> dict[str, str] | None:
    """Modules of a layer by their names in the compiled code, norms first; None: another shape."""
    for norms in (_NORMS, _NORMS_BEHIND_PARTS):
        if _names(layer) == {"self_attn", "mlp", *norms.values()}:
            break
    else:
        return None
    if _names(layer.get_submodule("mlp")) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    attention = _names(layer.get_submodule("self_attn"))
    head_norms = _HEAD_NORMS if "q_norm" in attention else {}
    if attention != {path.split(".")[1] for path in (*PROJECTIONS.values(), *head_norms.values())
                     if path.startswith("self_attn")}:  # fmt: skip
        return None
    names = {**norms, **head_norms, **PROJECTIONS}
    projections = [layer.get_submodule(path) for path in PROJECTIONS.values()]
    return names if all(type(each) is nn.Linear for each in projections) else None


def _fits(layer: Any, sizes: dict[str, int]) -> bool:
    """Whether weights have the sizes that the compiled code reads."""
    width, inner = sizes["width"], sizes["inner"]
    queries, keys = (sizes[name] * sizes["head_width"] for name in ("heads", "key_heads"))
    attention, mlp = layer.self_attn, layer.mlp
    wanted = [
        (attention.q_proj, width, queries), (attention.k_proj, width, keys), (attention.v_proj, width, keys),
        (attention.o_proj, queries, width), (mlp.gate_proj, width, inner), (mlp.up_proj, width, inner),
        (mlp.down_proj, inner, width),
    ]  # fmt: skip
    return sizes["head_width"] % 2 == 0 and all(
        (module.in_features, module.out_features) == (of, to) for module, of, to in wanted
    )


def _epsilon(norm: nn.Module) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def _kind_of_norms(norms: list[nn.Module]) -> bool | None:
    """Whether they multiply by one more than their weight; None where one is of another kind, or no norm."""
    kind, epsilon = type(norms[0]), _epsilon(norms[0])
    if not all(
        type(each) is kind and _epsilon(each) == epsilon and each._parameters.keys() == {"weight"}
        for each in norms
    ):
        return None
    if epsilon is None:
        return None
    weight = norms[0]._parameters["weight"]
    if weight is None or weight.dim() != 1 or weight.device.type != "cpu":
        return None
    norm: Any = norms[0]
    with torch.no_grad():
        x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype)[None]
        found = norm(x).float()
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean() + epsilon)
        gaps = [float((found - scaled * (weight.float() + one)).abs().max()) for one in (0, 1)]
    return None if gaps[0] == gaps[1] else gaps[1] < gaps[0]


def _kind_of_activation(module: nn.Module) -> int | None:
    x = torch.linspace(-6, 6, 101)
    with torch.no_grad():
        found = module(x)
    for index, known in enumerate(_ACTIVATIONS):
        if float((found - known(x)).abs().max()) < _CLOSE:
            return index
    return None


def layer_kinds(config: Any) -> Iterator[str | None]:
    """Of each layer, as masks and rotary factors are told apart; None where all are alike."""
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    yield from kinds[: config.num_hidden_layers]
