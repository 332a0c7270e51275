"""The memory of pages: keys and values of every layer, and nothing of whose they are.

Shapes: P pages, H key-value heads, D head width, N pages or rows that are named.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from blockroll.kernels.transfer import sent
from blockroll.policies.base import Policy


class PageMemory:
    """Keys and then values, layer by layer (P, H, page_size, D); no pages until `allocate`."""

    def __init__(self, policy: Policy, page_size: int) -> None:
        self._policy, self.page_size = policy, page_size
        self.tensors: list[Tensor] = []
        self.times_taken = 0  # how often its tensors were made anew

    def __len__(self) -> int:
        """Pages."""
        return len(self.tensors[0]) if self.tensors else 0

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._policy.device

    @property
    def num_heads(self) -> int:
        """Key-value heads."""
        return self._policy.kv_shape.num_heads

    @property
    def num_bytes(self) -> int:
        """Of all pages."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_of_another(self) -> bool:
        """Whether forwards multiply in another precision now than it was allocated for."""
        return bool(self.tensors) and self.tensors[0].dtype != self._policy.kv_shape.dtype

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        return self.tensors[index], self.tensors[index + len(self.tensors) // 2]

    def allocate(self, num_pages: int) -> None:
        """Take memory for so many pages, zeroed."""
        row = self._policy.kv_shape
        shape = (num_pages, row.num_heads, self.page_size, row.width)
        self.times_taken += 1
        with torch.inference_mode(False):  # ordinary tensors, for code in that mode and outside of it
            self.tensors = [
                torch.zeros(shape, dtype=row.dtype, device=self._policy.device)
                for _ in range(2 * row.num_layers)
            ]

    def grow(self, num_pages: int) -> None:
        """Have so many pages; what the first of them hold stays."""
        more = num_pages - len(self)
        self.times_taken += 1
        with torch.inference_mode(False):
            self.tensors = [F.pad(each, (0, 0, 0, 0, 0, 0, 0, more)) for each in self.tensors]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Pages `targets`, different ones and none of the sources, hold what `sources` do."""
        device = self._policy.device
        sources_N, targets_N = sent([sources, targets], device)
        for tensor in self.tensors:
            tensor[targets_N] = tensor[sources_N]

    def fill(self, pages: Sequence[int], value: float) -> None:
        """Overwrite whole pages."""
        for tensor in self.tensors:
            tensor[pages] = value

    def fill_rows(self, rows_PS: Tensor, value: float) -> None:
        """Overwrite rows: where this boolean tensor (P, page_size) holds."""
        for tensor in self.tensors:
            tensor.transpose(1, 2)[rows_PS.to(tensor.device)] = value

    def rows(self, pages: Sequence[int], num_rows: int) -> tuple[Tensor, ...]:
        """The first rows (H, num_rows, D) that lie in these pages, tensor by tensor; copies."""
        pages_N = torch.tensor(pages, dtype=torch.int64, device=self._policy.device)
        return tuple(tensor[pages_N].transpose(0, 1).flatten(1, 2)[:, :num_rows] for tensor in self.tensors)
