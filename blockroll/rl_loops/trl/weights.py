"""A policy that decodes with a trainer's weights, while the trainer's model stays as it is.

Where the trainer's parameters lie whole on this device (one process, DDP, ZeRO 1 and 2) the policy's modules
hold the very same tensors. Where they are sharded, or a base and a LoRA beside it (FSDP2, ZeRO 3, PEFT), the
policy has weights of its own; every sync gathers the trainer's, one after the other, on all ranks.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from blockroll.errors import InvalidInput, ManifestMismatch
from blockroll.policies.hf import HFPolicy
from blockroll.rollout.pool.weight_sync import named_weights


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT wrapper if there is one."""
    if is_peft_model(model):
        model = model.get_base_model()  # type: ignore[operator]
    assert isinstance(model, PreTrainedModel), f"a trainer's model is a PreTrainedModel, not {type(model)}"
    return model


def are_whole(trainer: Any) -> bool:
    """Whether the parameters of the trainer's model are what a forward multiplies with, on this device."""
    return not (is_peft_model(trainer.model) or trainer._dist.is_fsdp or trainer._dist.is_zero3)


def check_supported(trainer: Any) -> None:
    """InvalidInput for what cannot be decoded from."""
    if getattr(trainer.model, "is_quantized", False):
        raise InvalidInput(
            "quantized weights cannot be decoded from yet; load the model without quantization_config"
        )
    if trainer._dist.is_fsdp and trainer._dist.fsdp_version != 2:
        raise InvalidInput("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config")
    if trainer._dist.is_fsdp and is_peft_model(trainer.model):
        raise InvalidInput(
            "PEFT under FSDP is not supported: adapters cannot be merged in shards; use DDP for LoRA, or "
            "FSDP2 without PEFT"
        )


def sharing_policy(model: PreTrainedModel, tokenizer: Any) -> HFPolicy:
    """A policy on the very parameters and buffers of `model`; what an optimizer changes, it decodes with."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return HFPolicy(_shell_of(model, lambda name, _: parameters[name]), tokenizer)


def copying_policy(model: PreTrainedModel, tokenizer: Any, dtype: torch.dtype) -> HFPolicy:
    """A policy with room for weights of its own, of no value yet, on the model's device."""
    device = next(model.parameters()).device

    def own(name: str, placeholder: nn.Parameter) -> nn.Parameter:
        try:
            return nn.Parameter(torch.empty(placeholder.shape, dtype=dtype, device=device), False)
        except torch.OutOfMemoryError as full:
            raise InvalidInput(
                f"a copy of the policy in {dtype} does not fit {device} beside the trainer: every replica "
                "holds the whole policy, there is no tensor parallelism; use placement='separate'"
            ) from full

    return HFPolicy(_shell_of(model, own), tokenizer)


def full_weights(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """What `named_weights` gives of the bare model: gathered, LoRA merged. All ranks must iterate.

    A tensor is good until the next one is asked for.
    """
    model = base_model(trainer.model)
    adapted = _tuner_layers(model) if is_peft_model(trainer.model) else {}
    for name, tensor in named_weights(model):
        owner = next((owner for owner in adapted if name.startswith(f"{owner}.")), None)
        if ".original_module." in f".{name}" or (
            owner is not None and not name.startswith(f"{owner}.base_layer.")
        ):
            continue
        bare_name = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        with trainer._dist.gather_params([tensor]), _merged(adapted[owner] if owner else None):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield bare_name, whole.detach()


@torch.no_grad()
def copy_weights(trainer: Any, policy: HFPolicy) -> None:
    """Bring a copying policy to the trainer's weights. All ranks must call it."""
    own = dict(named_weights(policy.model))
    for name, tensor in full_weights(trainer):
        target = own.pop(name, None)
        if target is None or target.shape != tensor.shape:
            raise ManifestMismatch(
                f"the trainer's {name} {tuple(tensor.shape)} has no place in a bare "
                f"{type(policy.model).__name__}; blockroll decodes with the model's own architecture only"
            )
        target.copy_(tensor)
    if own:
        raise ManifestMismatch(f"the trainer's model has no {', '.join(own)}")


def _shell_of(
    model: PreTrainedModel, parameter_for: Callable[[str, nn.Parameter], nn.Parameter]
) -> PreTrainedModel:
    """Another module of the same architecture: parameters from the function, buffers the model's own."""
    config = copy.deepcopy(model.config)
    buffers = dict(model.named_buffers())
    with torch.device("meta"):
        shell = _architecture(model)(config)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, module in shell.named_modules():
        prefix = f"{name}." if name else ""
        for key, placeholder in module.named_parameters(recurse=False):
            if id(placeholder) not in made:
                made[id(placeholder)] = parameter_for(prefix + key, placeholder)
            setattr(module, key, made[id(placeholder)])
        for key, _ in list(module.named_buffers(recurse=False)):
            module._buffers[key] = buffers[prefix + key]
    shell.generation_config = model.generation_config
    return shell


def _architecture(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class as transformers wrote it: FSDP puts one of its own in front."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """A PEFT layer's update inside its base weights, which afterwards are bit for bit what they were."""
    if layer is None:
        yield
        return
    base = layer.get_base_layer()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters(recurse=False)}
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        with torch.no_grad():
            for name, parameter in base.named_parameters(recurse=False):
                parameter.copy_(before[name])
