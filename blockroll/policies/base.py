"""What the engine asks of a policy and of the key-value window it writes to.

Shapes: B requests, R rows (new tokens) per request, K drafted tokens, L = K + 1 rows to verify, P levels,
W hidden width, V vocabulary, N rows where requests differ in their number of rows, C rows of each request
whose states are asked for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from blockroll.kernels.block_attention import Packing
from blockroll.kernels.pages import Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """The keys of one token, and its values likewise."""

    num_layers: int
    num_heads: int  # key-value heads
    width: int  # of a head
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Self:
        """Of a causal LM with this config of transformers."""
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )

    @property
    def num_bytes(self) -> int:
        """Keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.num_heads * self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """One tensor that recurrent layers carry from row to row; zeros before a text's first row."""

    name: str
    num_layers: int  # that carry it, counted from 0 among themselves
    shape: tuple[int, ...]  # in one layer, of one text
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one text, over all layers."""
        return self.num_layers * math.prod(self.shape) * self.dtype.itemsize


class StateWindow(Protocol):
    """The states behind which the rows of one forward stand, and room for those that they leave.

    Rows that hold tokens leave states, masks none. Which state becomes the text's is decided later, by how
    many of its tokens are committed.
    """

    # int64 (B, C), the rows of each request whose states are asked for; None: all rows that hold tokens.
    rows_BC: Tensor | None

    def seed(self, name: str, layer_idx: int) -> Tensor:
        """The state before the first new row (B, ...), in the shape of that part; not to be changed."""
        ...

    def leave(self, name: str, layer_idx: int, states_BC: Tensor) -> None:
        """The states behind the rows that are asked for (B, C, ...)."""
        ...


class KVWindow(Protocol):
    """The rows of a cache that one forward reads and extends; hands every layer its keys and values."""

    # int64, committed rows of each request; the new rows lie behind them, in order. Below 0 for a text that
    # begins so many rows later: what stands before it is computed, and seen by nothing.
    lengths_B: Tensor
    extent: int  # keys each layer returns

    @property
    def states(self) -> StateWindow | None:
        """Recurrent states, beside the keys and values; None: of a policy that has none."""
        ...

    @property
    def pages(self) -> Callable[[int], Pages] | None:
        """Of each layer the pages that attention reads itself; None: `update` returns what it reads."""
        ...

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows (B, H, R, D) of one layer and return all keys and values (B, H, extent, D).

        Where attention reads pages, the new ones alone. What is given is the window's to keep: its caller
        writes nothing there afterwards.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRows:
    """What a fused forward gives: the target rows now, the proposals as states that cost no output head."""

    verify_logits_BLV: Tensor  # float32, row i is the law of the token after row i
    proposal_states_BPLW: Tensor  # slots 0..K of the proposal of each level, in the order of the levels


class Policy(Protocol):
    """A causal LM that also drafts. Logits are float32, whatever the weights are."""

    vocab_size: int  # rows of the logits
    tokenizer: Any | None  # of transformers; constraints on text need it
    max_length: int  # positions the model serves
    # Ascending; no text may go from at most so many tokens to more, because rotary factors change there.
    length_boundaries: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    mask_token_id: int | None  # None: its masks are no token, or it cannot draft
    trained_drafts: int  # largest K it was trained to draft; 0: none
    trained_layouts: tuple[str, ...]  # of `two_forward` and `fused`
    device: torch.device

    @property
    def can_draft(self) -> bool:
        """Whether it has masks to draft with."""
        ...

    @property
    def kv_shape(self) -> KVShape:
        """What a cache must hold of every token, in the precision that forwards multiply in now."""
        ...

    @property
    def state_shape(self) -> tuple[StatePart, ...]:
        """What a cache must hold of every text besides keys and values; (): attention is all there is."""
        ...

    def weights_changed(self) -> None:
        """The weights have been written: make anew whatever was made of them."""
        ...

    def prefill(self, ids_BR: Tensor, window: KVWindow, *, num_tokens_B: Tensor | None = None) -> None:
        """Write keys and values of prompt rows; no logits are computed.

        `num_tokens_B`, int64, are the tokens of each whole text, given where `length_boundaries` are; None:
        those up to these rows, and the anchor.
        """
        ...

    def verify_logits(self, ids_BR: Tensor, window: KVWindow) -> Tensor:
        """Causal logits (B, R, V) of the anchor and its drafts: row i is the law of the next token."""
        ...

    def draft_logits(self, ids_BC: Tensor, num_drafts: int, window: KVWindow) -> Tensor:
        """Logits (B, K + 1, V): the anchor's causal row, the law of the token after it, and then K masks'.

        The anchor is the last of the tokens (B, C). A mask's row is for its own position. Tokens see no mask,
        so their keys and values are clean; masks see the prefix, the tokens and each other.
        """
        ...

    def fused_rows(self, ids_BL: Tensor, levels: tuple[int, ...], window: KVWindow) -> FusedRows:
        """Verify the anchor and K drafts, and propose after each level, in one forward."""
        ...

    def proposal_logits(self, states_BKW: Tensor) -> Tensor:
        """Logits (B, K, V) of the chosen proposal's states."""
        ...


@runtime_checkable
class VerifiesPacked(Protocol):
    """What a policy may offer besides: forwards without the rows that would make a rectangle of the batch."""

    least_saved_rows: int  # that such a forward must leave out to take less time than one of the rectangle

    def verify_packed(self, ids_BL: Tensor, packing: Packing, window: KVWindow) -> Tensor:
        """As `verify_logits`, of the rows of `packing` alone: (N, V). Other ids have no meaning.

        `window` is of as many rows for each request, and takes packed states (1, H, N, D).
        """
        ...
