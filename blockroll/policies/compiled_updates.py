"""A draft adapter's updates as compiled layers read them: projections of the same rows side by side.

They are copies in the model's type, as large as the adapter, for a projection back from few numbers is quick
only with its weight transposed. They are made anew when a tensor of the adapter has been written, moved or
exchanged.
"""

from ctypes import addressof
from typing import Self

import torch
from torch import Tensor, nn

from blockroll.kernels.layers import LayerUpdates
from blockroll.policies.adapter import DraftAdapter, LowRank
from blockroll.policies.layer_shape import PROJECTIONS, LayerShape

_GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
MOST_PARTS = 3  # projections of one group


class CompiledUpdates:
    """The updates of one adapter on the layers of one model."""

    def __init__(self, adapter: DraftAdapter, shape: LayerShape, updates: dict[str, LowRank]) -> None:
        self.adapter, self.shape, self.rank = adapter, shape, adapter.config.rank
        self._updates = updates  # by the projection's path in the model, in order
        self._modules = [shape.base.get_submodule(path) for path in updates]
        self._stamps: list[tuple[int, int]] = []
        self._stamped: list[Tensor] = []  # kept, so that nothing else comes to lie at these addresses
        self._copies: list[Tensor] = []  # that addresses point to
        self._layers: list[LayerUpdates] = []
        self._is_zero = True  # as at the start: nothing is changed
        self.is_compared = False  # with the model's own forward
        self.serve = False

    @classmethod
    def of(cls, adapter: DraftAdapter, shape: LayerShape) -> Self | None:
        """None for an adapter that updates other modules than the projections of these layers."""
        paths = [
            f"layers.{index}.{path}" for index in range(shape.num_layers) for path in PROJECTIONS.values()
        ]
        found = {path: adapter.update_of(path) for path in paths}
        updates = {path: update for path, update in found.items() if update is not None}
        if len(updates) < len(paths) or len(updates) < len(adapter.updates):
            return None
        return cls(adapter, shape, updates)

    @property
    def is_plain(self) -> bool:
        """Whether calling the modules on mask rows would add these updates, and do no more.

        Not where an update has a hook or another forward, or a projection has lost its own.
        """
        hook_ids = self.adapter.hook_ids
        for module, update in zip(self._modules, self._updates.values(), strict=True):
            if module._forward_hooks.keys().isdisjoint(hook_ids):
                return False
            if update._forward_hooks or update._forward_pre_hooks or "forward" in update.__dict__:
                return False
            if type(update) is not LowRank:
                return False
        return True

    @property
    def addresses(self) -> list[int]:
        """Of the copies of each layer's."""
        return [addressof(layer) for layer in self._layers]

    def refresh(self, dtype: torch.dtype) -> bool:
        """Make the copies anew where the adapter has been written since; False where it cannot be told."""
        parameters = [each for update in self._updates.values() for each in update._parameters.values()]
        if not all(map(_is_readable, parameters)):
            return False
        stamps = [(each._version, each.data_ptr()) for each in parameters if each is not None]
        if stamps != self._stamps:
            self._copy(dtype)
            self._stamps, self._stamped = stamps, [each.detach() for each in parameters if each is not None]
        return True

    def forget(self) -> None:
        """The adapter has been written, in whatever way: copies are made anew before they serve."""
        self._stamps = []

    def _copy(self, dtype: torch.dtype) -> None:
        self._copies, self._layers = [], []
        for index in range(self.shape.num_layers):
            layer = LayerUpdates()
            for group, names in _GROUPS.items():
                updates = [self._updates[f"layers.{index}.{PROJECTIONS[name]}"] for name in names]
                down = torch.cat([update.down.detach().to(dtype) for update in updates])
                up = torch.cat([update.up.detach().to(dtype).t() for update in updates], dim=1)
                for side, copy in (("down", down.contiguous()), ("up", up.contiguous())):
                    setattr(layer, f"{group}_{side}", copy.data_ptr())
                    self._copies.append(copy)
            self._layers.append(layer)
        is_zero = not any(bool(update.up.any()) for update in self._updates.values())
        if self._is_zero and not is_zero:
            self.is_compared = False  # comparing what changes nothing has shown nothing
        self._is_zero = is_zero


def _is_readable(parameter: Tensor | None) -> bool:
    # Of those made in inference mode writes are not counted.
    return type(parameter) is nn.Parameter and parameter.is_cpu and not parameter.is_inference()
