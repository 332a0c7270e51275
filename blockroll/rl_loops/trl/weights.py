"""A policy that decodes with a trainer's weights, while the trainer's model stays as it is.

Where the trainer's parameters lie whole on this device (one process, DDP, ZeRO 1 and 2) the policy's modules
hold the very same tensors. Where they are sharded, or a base and an update beside it (FSDP2, ZeRO 3, PEFT),
the policy has weights of its own; every sync gathers the trainer's, one after the other, on all ranks.

Both are shells of the bare architecture: the trainer's config, with embeddings and head tied only if the
trained model really multiplies with the same weights.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.positions import context_of
from blockroll.rl_loops.trl.modules import (
    base_model,
    find_places,
    gathered,
    has_tuners,
    is_tied,
    with_updates,
)
from blockroll.rollout.pool.weight_sync import named_weights


def are_whole(trainer: Any) -> bool:
    """Whether the parameters of the trainer's model are what a forward multiplies with, on this device."""
    return not (has_tuners(trainer.model) or trainer._dist.is_fsdp or trainer._dist.is_zero3)


def check_supported(trainer: Any) -> None:
    """InvalidInput for what cannot be decoded from."""
    if getattr(trainer.model, "is_quantized", False):
        raise InvalidInput(
            "quantized weights cannot be decoded from yet; load the model without quantization_config"
        )
    if context_of(base_model(trainer.model).config).boundaries:
        raise InvalidInput(
            "the model's rope type is longrope, whose factors depend on the longest row of a forward: TRL's "
            "padded batches would train each text by the length of its neighbours. Train it with "
            "`blockroll train`, whose learner goes by each text's own length"
        )
    if trainer._dist.is_fsdp and trainer._dist.fsdp_version != 2:
        raise InvalidInput("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config")
    if trainer._dist.is_fsdp and has_tuners(trainer.model):
        raise InvalidInput(
            "PEFT under FSDP is not supported: adapters cannot be merged in shards; use DDP for LoRA, or "
            "FSDP2 without PEFT"
        )
    for config in getattr(trainer.model, "peft_config", {}).values():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise InvalidInput(
                f"PEFT's {config.peft_type.value} puts learned states in front of every text, which are no "
                "weights of the model and cannot be decoded from; use LoRA or another method that changes "
                "weights"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise InvalidInput(
                "an activated LoRA (alora_invocation_tokens) changes weights for a part of each text, and "
                "cannot be merged into them; leave alora_invocation_tokens out"
            )


def sharing_policy(model: PreTrainedModel, tokenizer: Any) -> HFPolicy:
    """A policy on the very parameters and buffers of `model`; what an optimizer changes, it decodes with."""
    bare = bare_architecture(model)
    held: dict[str, Any] = {place.name: place.tensor for place in find_places(bare, model)}
    return HFPolicy(_filled(bare, model, lambda name, _: held[name]), tokenizer)


def share_again(policy: HFPolicy, model: PreTrainedModel) -> None:
    """After whatever happened to `model`: a sharing policy holds its parameters, not ones it had before.

    InvalidInput if embeddings and head were tied and are not now, or if PEFT's layers lie around parameters:
    their updates would need weights of the policy's own.
    """
    if policy.model.config.tie_word_embeddings and not is_tied(model):
        raise InvalidInput(
            "the trainer's embeddings and output head were tied when the trainer was made and are not now; "
            "make the trainer after changing the model"
        )
    for place in find_places(policy.model, model):
        if place.tuners:
            raise InvalidInput(
                f"PEFT's layers were put around {place.name} after the trainer was made, and the replica "
                "holds the model's own weights without them; make the trainer after changing the model"
            )
        path, _, attribute = place.name.rpartition(".")
        owner = policy.model.get_submodule(path)
        if getattr(owner, attribute) is not place.tensor:
            setattr(owner, attribute, place.tensor)
    if policy.model.config.tie_word_embeddings:
        policy.model.tie_weights()


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

    return HFPolicy(_filled(bare_architecture(model), model, own), tokenizer)


def full_weights(trainer: Any, bare: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `named_weights(bare)` names, as the trainer's forward multiplies with it: gathered, updates added.

    `bare` is a module of `bare_architecture(model)`. All ranks must iterate. A tensor keeps its values: what
    is gathered or merged for a moment is copied.
    """
    places = find_places(bare, base_model(trainer.model))
    for _, together in groupby(places, key=lambda place: id(place.owner)):
        group = list(together)
        with gathered(trainer, group), with_updates(group[0].tuners, group[0].owner):
            for place in group:
                tensor = place.tensor
                whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
                is_passing = bool(place.tuners) or trainer._dist.is_zero3
                yield place.name, whole.clone() if is_passing else whole


@torch.no_grad()
def copy_weights(trainer: Any, policy: HFPolicy) -> None:
    """Bring a copying policy to the trainer's weights. All ranks must call it.

    InvalidInput if embeddings and head were one tensor when the policy was made, and are two now. An error
    of this rank alone is raised once every tensor was gathered, so that no other rank waits for it.
    """
    if policy.model.config.tie_word_embeddings and not is_tied(base_model(trainer.model)):
        raise InvalidInput(
            "the trainer's embeddings and output head multiplied with the same weights when the trainer was "
            "made and do not now; make the trainer after changing the model and its PEFT adapters"
        )
    error: Exception | None = None
    own = dict(named_weights(policy.model))
    for name, tensor in full_weights(trainer, policy.model):
        if error is None:
            try:
                own[name].copy_(tensor)
            except Exception as failure:  # noqa: BLE001 raised below, once the other ranks are served
                error = failure
    if error is not None:
        raise error


def bare_architecture(model: PreTrainedModel) -> PreTrainedModel:
    """The model's architecture on the meta device, tied only if the model is tied in fact."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and is_tied(model)
    with torch.device("meta"):
        shell: PreTrainedModel = _architecture(model)(config)
    shell.generation_config = model.generation_config
    return shell


def _filled(
    shell: PreTrainedModel, model: PreTrainedModel, parameter_for: Callable[[str, nn.Parameter], Any]
) -> PreTrainedModel:
    """The bare architecture with parameters from the function, and the model's own buffers."""
    buffers = dict(model.named_buffers())
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, module in shell.named_modules():
        prefix = f"{name}." if name else ""
        for key, placeholder in module.named_parameters(recurse=False):
            if id(placeholder) not in made:
                made[id(placeholder)] = parameter_for(prefix + key, placeholder)
            setattr(module, key, made[id(placeholder)])
        for key, _ in list(module.named_buffers(recurse=False)):
            module._buffers[key] = buffers[prefix + key]
    return shell


def _architecture(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class as transformers wrote it: FSDP puts one of its own in front."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
