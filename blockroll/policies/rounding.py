"""How far rounding alone moves a policy's logits: the bound of what two equal forwards may differ by."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def nudged_inputs(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Numbers that leave the input embedding are one rounding step of a type larger or smaller, at random."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps

    def nudge(module: nn.Module, inputs: tuple[Tensor, ...], embeddings_BRW: Tensor) -> Tensor:
        signs_BRW = torch.randint(2, embeddings_BRW.shape, generator=generator) * 2 - 1
        return embeddings_BRW * (1 + step * signs_BRW).to(embeddings_BRW)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()
