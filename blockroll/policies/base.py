"""What the engine asks of a policy and of the key-value window it writes to.

Shapes: B requests, R rows (new tokens) per request, K drafted tokens, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor


class KVWindow(Protocol):
    """The rows of a cache that one forward reads and extends; hands every layer its keys and values."""

    positions_BR: Tensor  # int64, absolute position of each new row
    extent: int  # keys each layer returns; a row sees those whose index is at most its horizon

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows (B, H, R, D) of one layer and return all keys and values (B, H, extent, D)."""
        ...


class Policy(Protocol):
    """A causal LM that also drafts. Logits are float32, whatever the weights are."""

    vocab_size: int  # rows of the logits
    max_length: int  # positions the model was built for
    eos_token_ids: tuple[int, ...]
    mask_token_id: int | None  # None: the policy cannot draft
    trained_drafts: int  # largest K it was trained to draft; 0: none
    device: torch.device

    def prefill(self, ids_BR: Tensor, window: KVWindow) -> None:
        """Write keys and values of prompt rows; no logits are computed."""
        ...

    def verify_logits(self, ids_BR: Tensor, window: KVWindow) -> Tensor:
        """Causal logits (B, R, V) of the anchor and its drafts: row i is the law of the next token."""
        ...

    def draft_logits(self, anchors_B: Tensor, num_drafts: int, window: KVWindow) -> Tensor:
        """Logits (B, K, V) of K mask rows behind the anchor, each for its own position.

        The anchor is a causal row that sees no mask; mask rows see the prefix, the anchor and each other.
        """
        ...
