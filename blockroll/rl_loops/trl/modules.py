"""Where the tensors of a bare architecture lie in the model that a trainer trains.

PEFT puts modules of its own around the architecture's: layers that add an update to what they hold ("tuners":
LoRA, DoRA, trained rows of an embedding, target parameters), and wrappers with a trained copy beside the
original. Both trees are walked together, so that names come from the modules and never from how a library
spells them.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from blockroll.errors import InvalidInput
from blockroll.rollout.pool.weight_sync import named_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the trained model holds one tensor of the bare architecture."""

    name: str  # in the bare architecture
    owner: nn.Module  # in the trained model; the tensor is an attribute of it
    attribute: str
    tuners: tuple[Any, ...]  # layers around the owner whose updates the forward adds, outermost first

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, without the tuners' updates."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT wrapper if there is one."""
    if is_peft_model(model):
        model = model.get_base_model()  # type: ignore[operator]
    assert isinstance(model, PreTrainedModel), f"a trainer's model is a PreTrainedModel, not {type(model)}"
    return model


def has_tuners(model: nn.Module) -> bool:
    """Whether PEFT has put anything into the model, as a `PeftModel` or straight into a transformers one."""
    return is_peft_model(model) or any(map(_is_peft_layer, model.modules()))


def is_random_in_training(trainer: Any) -> bool:
    """Whether a forward in training draws random numbers: its law is not the one that generates.

    By what modules and arguments say; a forward that was run shows it for certain.
    """
    return getattr(trainer.args, "neftune_noise_alpha", None) is not None or any(
        (isinstance(module, _DropoutNd) and module.p > 0)
        or any(getattr(module, name, 0) for name in ("attention_dropout", "jitter_noise"))
        for module in (trainer.model, trainer.model.config, *trainer.model.modules())
    )


def find_places(bare: nn.Module, trained: nn.Module) -> list[Place]:
    """A place for each tensor that `named_weights(bare)` names, in its order.

    InvalidInput, by name, if the trained model lacks one, has it in another shape, or holds parameters that
    the bare architecture has no use for: a forward without them would be another policy's.
    """
    places = [_find(name, tensor.shape, trained) for name, tensor in named_weights(bare)]
    # Tied tensors stand once among the names of the bare architecture, and may be two in the trained model.
    known = {id(place.tensor) for place in places}
    inside = [module for module in trained.modules() if _is_peft_layer(module)]
    known.update(id(parameter) for module in inside for parameter in module.parameters())
    unused = [name for name, parameter in trained.named_parameters() if id(parameter) not in known]
    if unused:
        names = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        raise InvalidInput(
            f"the trainer's {type(trained).__name__} has parameters that a bare {type(bare).__name__} has no "
            f"use for: {names}; blockroll decodes with the model's own architecture and PEFT's layers only"
        )
    return places


def is_tied(trained: PreTrainedModel) -> bool:
    """Whether input embeddings and output head multiply with the same weights, whatever the config says."""
    embeddings, of_embeddings = find_module(trained.get_input_embeddings())
    head, of_head = find_module(trained.get_output_embeddings())  # type: ignore[no-untyped-call]
    if embeddings.weight is not head.weight:
        return False
    if not of_embeddings and not of_head:
        return True
    if len(of_embeddings) != 1 or len(of_head) != 1:
        return False
    # Rows that PEFT trains of a tied embedding are shared with the head by a layer that follows it.
    leader, follower = of_embeddings[0], of_head[0]
    is_following = getattr(follower, "tied_adapter", None) is leader
    return bool(
        is_following
        and follower.active_adapters == leader.active_adapters
        and follower.disable_adapters == leader.disable_adapters
    )


@contextmanager
def with_updates(tuners: Sequence[Any], owner: nn.Module) -> Iterator[None]:
    """The tuners' updates inside the owner's weights, as a forward adds them now: active, not switched off.

    Afterwards the weights are bit for bit what they were.
    """
    if not tuners:
        yield
        return
    before = [(each, each.data, each.data.clone()) for each in owner.parameters(recurse=False)]
    names_before = [list(tuner.merged_adapters) for tuner in tuners]
    merged: list[Any] = []
    taken_out: list[tuple[Any, list[str]]] = []
    try:
        for tuner in reversed(tuners):
            if tuner.disable_adapters and tuner.merged:
                taken_out.append((tuner, list(tuner.merged_adapters)))
                tuner.unmerge()
            elif not tuner.disable_adapters and not tuner.merged:
                merged.append(tuner)
                _merge(tuner)
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is inexact: the weights are put back below
            for tuner in merged:
                if tuner.merged:
                    tuner.unmerge()
        for tuner, names in taken_out:
            tuner.merge(adapter_names=names)
        for parameter, storage, values in before:
            storage.copy_(values)
            parameter.data = storage
        for tuner, names in zip(tuners, names_before, strict=True):
            tuner.merged_adapters = names  # some kinds cannot unmerge, and would leave their update out


def describe_tuners(model: nn.Module) -> tuple[Any, ...]:
    """Which updates a forward adds: what decides about it beside the tensors."""
    layers: list[Any] = [module for module in model.modules() if _is_peft_layer(module)]
    return tuple(
        (
            tuple(layer.active_adapters),
            bool(layer.disable_adapters),
            tuple(layer.merged_adapters),
            tuple(sorted((str(name), float(value)) for name, value in _scaling(layer).items())),
        )
        for layer in layers
    )


def find_module(module: nn.Module) -> tuple[Any, tuple[Any, ...]]:
    """What a module of the trained model comes down to, and the tuners that were met on the way."""
    tuners: list[Any] = []
    while _is_peft_layer(module):
        kind = type(module).__name__
        if kind == "TrainableTokensWrapper":
            module = module.token_adapter  # type: ignore[assignment]
        elif kind == "ModulesToSaveWrapper":
            module = _copy_in_use(module)
        elif kind == "LNTuningLayer":
            module = _norm_in_use(module)
        elif _is_tuner(module):
            tuners.append(module)
            module = module.base_layer  # type: ignore[assignment]
        else:
            raise InvalidInput(f"PEFT's {kind} cannot be decoded from: its forward is no plain layer's")
    return module, tuple(tuners)


def _find(name: str, shape: torch.Size, trained: nn.Module) -> Place:
    owner: Any = trained
    tuners: tuple[Any, ...] = ()
    *path, attribute = name.split(".")
    for part in path:
        below = owner._modules.get(part)
        if below is None:
            raise InvalidInput(
                f"the trainer's {type(trained).__name__} has no {name}: it is not the architecture that its "
                f"config describes; {type(owner).__name__} holds {', '.join(owner._modules) or 'no modules'}"
            )
        owner, tuners = find_module(below)
    found = owner._parameters.get(attribute, owner._buffers.get(attribute))
    if found is None:
        raise InvalidInput(
            f"the trainer's {type(owner).__name__} has no plain tensor {name}: weights that are computed "
            "from others (parametrizations) cannot be decoded from"
        )
    held = getattr(found, "ds_shape", found.shape)
    if tuple(held) != tuple(shape):
        raise InvalidInput(
            f"the trainer's {name} has shape {tuple(held)}, {tuple(shape)} is generated with: change the "
            "model before the trainer is made, its config too (after new tokens: vocab_size)"
        )
    return Place(name=name, owner=owner, attribute=attribute, tuners=tuners)


def _copy_in_use(wrapper: Any) -> nn.Module:
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper._adapters for name in names):
        original: nn.Module = wrapper.original_module
        return original
    copied: nn.Module = wrapper.modules_to_save[names[0]]
    return copied


def _norm_in_use(layer: Any) -> nn.Module:
    """A trained copy beside the original, which merging exchanges: there is no update to add."""
    original, copies = layer.base_layer, layer.ln_tuning_layers
    used: nn.Module = original
    if layer.merged and layer.disable_adapters:
        used = copies[layer.merged_adapters[0]]  # where the original lies then
    elif not layer.merged and not layer.disable_adapters and layer.active_adapters:
        used = copies[layer.active_adapters[0]]
    return used


def _merge(tuner: Any) -> None:
    try:
        tuner.merge()
    except Exception as refusal:
        raise InvalidInput(
            f"PEFT's {type(tuner).__module__.split('.')[-2]}.{type(tuner).__name__} cannot be merged, which "
            f"decoding with its updates needs: {str(refusal) or type(refusal).__name__}"
        ) from refusal


def _scaling(module: Any) -> dict[str, Any]:
    scaling = getattr(module, "scaling", None)
    return scaling if isinstance(scaling, dict) else {}


def _is_tuner(module: nn.Module) -> bool:
    tuners_utils = sys.modules.get("peft.tuners.tuners_utils")
    return tuners_utils is not None and isinstance(module, tuners_utils.BaseTunerLayer)


def _is_peft_layer(module: nn.Module) -> bool:
    other = sys.modules.get("peft.utils.other")
    return _is_tuner(module) or (other is not None and isinstance(module, other.AuxiliaryTrainingWrapper))


def gathered(trainer: Any, places: Sequence[Place]) -> ExitStack:
    """Whole tensors of one owner and of its tuners, where DeepSpeed keeps shards. All ranks enter it."""
    parameters = [place.tensor for place in places]
    parameters += [each for tuner in places[0].tuners for each in tuner.parameters()]
    stack = ExitStack()
    stack.enter_context(trainer._dist.gather_params(list({id(each): each for each in parameters}.values())))
    return stack
