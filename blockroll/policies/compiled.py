"""Decoder layers by compiled code of blockroll's own, where a CPU decodes few rows.

A decode step should take the time of reading each weight once. The module tree takes two to five times that,
in hundreds of small operators. `kernels/layers` does in one call what stands between the attentions of two
layers, and reads the parameters where they lie: no copies, so no memory, and nothing to be made anew when
weights change.

Models whose layers are of the shape that `layer_shape.py` knows are served, after their log-probabilities
have been compared with those of the model's own forward; forwards with a draft adapter's masks are compared
apart, and served with copies of its updates (`compiled_updates.py`). What is wrapped, hooked, training, under
autocast, or of another type goes through the model's own modules.
"""

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from ctypes import CDLL, addressof
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockroll.errors import InvalidInput, MissingDependency
from blockroll.kernels.block_attention import BlockRows
from blockroll.kernels.layers import Layer, Model, UpdatedRows, layers_library
from blockroll.policies import attention
from blockroll.policies.adapter import DraftAdapter
from blockroll.policies.base import KVWindow
from blockroll.policies.compiled_attention import attended_rows
from blockroll.policies.compiled_law import is_same_law
from blockroll.policies.compiled_updates import MOST_PARTS, CompiledUpdates
from blockroll.policies.growing_window import GrowingWindow
from blockroll.policies.layer_shape import LayerShape, has_own_forward, layer_kinds
from blockroll.policies.layout import causal_rows
from blockroll.policies.prepacked import seconds_of

logger = logging.getLogger(__name__)

Compile = Literal["auto", "on", "off"]

_ROWS = (1, 8, 16, 32, 64, 128, 320)  # that are timed under `auto`
_ALL_ROWS = 1 << 62
_MOST_TIMED = 8  # layers
_TURNS = 3  # of each, one after the other, of which the best counts,
_MOST_TURNS = 9  # and more of them before modules are found faster
_LEAST_WIDTH = 64  # under `auto`, of the hidden states


class CompiledLayers:
    """One model's layers in compiled code. Whether they serve is decided at the first forward that asks."""

    def __init__(
        self,
        model: PreTrainedModel,
        compile: Compile,
        cache_keyword: str,
        *,
        law: Callable[[], Tensor],
        draft_law: Callable[[], Tensor],
    ) -> None:
        """`law` gives logits (..., V) of some rows of the model by forwards that ask here, `draft_law` of a
        row and of masks behind it.

        InvalidInput where it must be on and the model is of another shape; MissingDependency where there is
        no compiler.
        """
        self.compile: Compile = compile
        self._model, self._law, self._draft_law = model, law, draft_law
        self._cache_keyword = cache_keyword
        self._most_rows: int | None = 0 if compile == "off" else None  # None: not decided yet
        self._shape: LayerShape | None = None
        self._dtype: torch.dtype | None = None
        self._library: CDLL | None = None
        self._stamp: list[int] = []
        self._addresses: tuple[Model, list[Layer]] | None = None
        self._updates: CompiledUpdates | None = None
        self._kinds = list(layer_kinds(model.config))
        if compile == "on":
            shape = LayerShape.of(model)
            if shape is None or shape.dtype is None:
                raise InvalidInput(
                    "compile is 'on', but only layers of the well-known shape (RMS norms, a gated MLP), with "
                    "weights in float32 or bfloat16 on a CPU, run by compiled code; set it to 'auto', which "
                    "leaves others as they are"
                )
            layers_library(shape.dtype)

    @property
    def most_rows(self) -> int:
        """Rows of the largest forward that compiled layers serve; 0: they serve none."""
        return self._most_rows or 0

    def weights_changed(self) -> None:
        """Weights have been written, in whatever way: make anew what was made of the adapter's."""
        if self._updates is not None:
            self._updates.forget()

    def states(
        self,
        ids_BR: Tensor,
        positions_BR: Tensor,
        window: KVWindow,
        attended: attention.Attended,
        *,
        adapter: DraftAdapter | None,
        num_clean: int,
    ) -> Tensor | None:
        """Last hidden states (B, R, W), of packed rows (1, N, W); None: ask the model.

        Rows behind the first `num_clean` are masks of the `adapter`, if the policy has one.
        """
        is_first = self._most_rows is None
        has_masks = attended.rows.packing is None and num_clean < ids_BR.shape[1]
        if not self._serves(ids_BR.numel(), frozenset() if adapter is None else adapter.hook_ids):
            return None
        updates = None
        if adapter is not None and (has_masks or is_first):  # the first drafts shall not wait for it
            updates = self._served_updates(adapter)
        if not has_masks:
            updates = None
        elif adapter is not None and updates is None:
            return None
        shape = self._shape_here
        x_BRW = shape.base.embed_tokens(ids_BR)
        if x_BRW.dtype != self._dtype:
            return None
        if adapter is not None and updates is not None:
            x_BRW = adapter.embed(x_BRW, num_clean)
        return self._run(x_BRW, positions_BR, window, attended, updates, num_clean)

    def logits(self, head: nn.Module, states: Tensor) -> Tensor | None:
        """Float32 logits (..., V), rounded as the head's own are; None: ask the head."""
        num_rows = states.numel() // states.shape[-1]
        weight, bias = (head._parameters.get(name) for name in ("weight", "bias"))
        if (
            not self._most_rows
            or num_rows > self._most_rows
            or torch.is_grad_enabled()
            or type(head) is not nn.Linear
            or head._forward_hooks
            or head._forward_pre_hooks
            or has_own_forward(head)
            or weight is None
            or not (weight.dtype == states.dtype == self._dtype)
            or weight.device.type != "cpu"
            or not weight.is_contiguous()
        ):
            return None
        assert self._library is not None
        size, width = weight.shape
        states = states.contiguous()
        logits = torch.empty((*states.shape[:-1], size), dtype=torch.float32)
        self._library.product_of_rows(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            size,
            states.data_ptr(),
            num_rows,
            width,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits

    @property
    def _shape_here(self) -> LayerShape:
        assert self._shape is not None, "nothing is served before the shape is known"
        return self._shape

    def _serves(self, num_rows: int, allowed_hooks: Set[int]) -> bool:
        """Whether a forward of so many rows is run here; the first decides."""
        if self.compile == "off" or torch.is_grad_enabled() or num_rows == 0:
            return False
        if self._model.config._attn_implementation != attention.ATTENTION_NAME:
            return False
        if self._most_rows is None:
            try:
                self._decide(allowed_hooks)
            except BaseException:
                self._most_rows = None  # not decided: the next forward does
                raise
        if self._most_rows is None or num_rows > self._most_rows or self._shape is None:
            return False
        return self._shape.is_plain(allowed_hooks) and self._is_current()

    def _is_current(self) -> bool:
        """Whether addresses are of the weights as they are; where they lie in another type, nothing is."""
        stamp = self._shape_here.stamp()
        if stamp != self._stamp:
            dtype = self._shape_here.dtype
            if dtype is None or dtype != self._dtype:
                self._most_rows, self._shape = None, None  # decided anew by the next forward
                return False
            self._stamp, self._addresses = stamp, self._shape_here.addresses()
        return True

    def _decide(self, allowed_hooks: Set[int]) -> None:
        """Serve what is of the shape, gives the same law, and under `auto` takes less time."""
        self._most_rows = 0
        shape = LayerShape.of(self._model)
        dtype = None if shape is None else shape.dtype
        if shape is None or dtype is None or not shape.is_plain(allowed_hooks):
            if shape is not None and dtype is not None:
                self._most_rows = None  # a hook may go, and training may end
            return
        if self.compile == "auto" and shape.sizes["width"] < _LEAST_WIDTH:
            return
        try:
            self._library = layers_library(dtype)
        except MissingDependency as missing:
            logger.warning("layers are not compiled, and decoding is slower on this CPU: %s", missing)
            return
        self._shape, self._dtype, self._stamp, self._updates = shape, dtype, [], None

        def serve(is_on: bool) -> None:
            self._most_rows = _ALL_ROWS if is_on else 0

        if not is_same_law(self._model, dtype, self._law, serve, "compiled layers are off"):
            return
        self._most_rows = _ALL_ROWS if self.compile == "on" else self._faster_rows()
        logger.info("compiled layers serve forwards of up to %d rows", self._most_rows)

    def _served_updates(self, adapter: DraftAdapter) -> CompiledUpdates | None:
        """The updates of an adapter, if forwards with its masks are run here; the first one decides."""
        assert self._dtype is not None
        if self._updates is None or self._updates.adapter is not adapter:
            self._updates = CompiledUpdates.of(adapter, self._shape_here)
        updates = self._updates
        if updates is None or not updates.is_plain or not updates.refresh(self._dtype):
            return None
        if updates.is_compared:
            return updates if updates.serve else None
        updates.is_compared = True

        def serve(is_on: bool) -> None:
            updates.serve = is_on

        try:
            updates.serve = is_same_law(
                self._model, self._dtype, self._draft_law, serve, "compiled layers serve no masks"
            )
        except BaseException:
            updates.is_compared = False
            raise
        return updates if updates.serve else None

    def _faster_rows(self) -> int:
        """The most rows up to which all that were timed take no longer than the model's own modules."""
        runs = (self._compiled_once, self._own_once)
        most = 0
        for num_rows in _ROWS:
            turns: list[list[float]] = []
            while len(turns) < _MOST_TURNS:  # what else the machine does may slow either
                turns += [[seconds_of(partial(run, num_rows)) for run in runs] for _ in range(_TURNS)]
                compiled, own = map(min, zip(*turns, strict=True))
                if compiled <= own:
                    break
            else:
                return most
            most = num_rows
        return most

    def _compiled_once(self, num_rows: int) -> None:
        """Some layers, for the first token of so many texts."""
        x_BRW, positions_BR = self._first_rows(num_rows)
        rows = BlockRows.of(causal_rows(1), positions_BR[:, 0], 1)
        windows = [None] * min(_MOST_TIMED, self._shape_here.num_layers)
        attended = attention.Attended(rows=rows, sliding_windows=windows)
        self._run(x_BRW, positions_BR, GrowingWindow(num_rows), attended)

    def _own_once(self, num_rows: int) -> None:
        """The same by the model's own modules."""
        x_BRW, positions_BR = self._first_rows(num_rows)
        mask = torch.ones((num_rows, 1, 1, 1), dtype=torch.bool)
        window = GrowingWindow(num_rows)
        rotary = self._rotary(x_BRW, positions_BR)
        num_layers = min(_MOST_TIMED, self._shape_here.num_layers)
        for index, layer in enumerate(self._shape_here.base.layers[:num_layers]):
            x_BRW = layer(
                x_BRW,
                attention_mask=mask,
                position_embeddings=rotary[self._kinds[index]],
                position_ids=positions_BR,
                **{self._cache_keyword: window},
            )
        self._shape_here.base.norm(x_BRW)

    def _first_rows(self, num_rows: int) -> tuple[Tensor, Tensor]:
        ids_B1 = torch.arange(num_rows)[:, None] % self._model.config.vocab_size
        return self._shape_here.base.embed_tokens(ids_B1), torch.zeros_like(ids_B1)

    def _rotary(self, x_BRW: Tensor, positions_BR: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines (B, R, D) of each kind of layer, by the model's own module."""
        rotary = self._shape_here.base.rotary_emb
        parameters = getattr(self._model.config, "rope_parameters", None) or {}
        kinds = dict.fromkeys(self._kinds)
        if all(isinstance(parameters.get(kind), Mapping) for kind in kinds):
            made = {kind: rotary(x_BRW, positions_BR, kind) for kind in kinds}
        else:
            made = dict.fromkeys(kinds, rotary(x_BRW, positions_BR))
        return {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in made.items()}

    def _run(
        self,
        x_BRW: Tensor,
        positions_BR: Tensor,
        window: KVWindow,
        attended: attention.Attended,
        updates: CompiledUpdates | None = None,
        first_updated: int = 0,
    ) -> Tensor:
        """The first layers, as many as sliding windows are given, and the last norm, of each text with the
        updates on the rows from `first_updated` on. `x_BRW` is overwritten.
        """
        if not self._stamp:
            self._is_current()
        assert self._library is not None
        assert self._addresses is not None
        call, (model, layers) = self._library.between_attentions, self._addresses
        size, rows, width = x_BRW.shape
        num_rows, heads, key_heads, head_width, inner = size * rows, *(
            self._shape_here.sizes[name] for name in ("heads", "key_heads", "head_width", "inner")
        )  # fmt: skip
        x_BRW = x_BRW.contiguous()
        query_BHRD = x_BRW.new_empty((size, heads, rows, head_width))
        last_BRW = torch.empty_like(x_BRW)
        narrow = x_BRW.new_empty(num_rows * max(width, inner))
        widest = max((heads + 2 * key_heads) * head_width, 2 * inner, width)
        wide = torch.empty(num_rows * widest, dtype=torch.float32)
        space = [each.data_ptr() for each in (last_BRW, narrow, wide)]
        rotary = self._rotary(x_BRW, positions_BR)
        x, model_at, threads = x_BRW.data_ptr(), addressof(model), torch.get_num_threads()
        added: Sequence[int | None] = [None] * len(attended.sliding_windows)
        updated: int | None = None
        if updates is not None:
            numbers = x_BRW.new_empty(num_rows * max(width, heads * head_width, inner))
            reals = torch.empty(num_rows * MOST_PARTS * updates.rank, dtype=torch.float32)
            of_rows = UpdatedRows(first_updated, updates.rank, numbers.data_ptr(), reals.data_ptr())
            added, updated = updates.addresses, addressof(of_rows)
        before: int | None = None
        added_before: int | None = None
        seen: Tensor | None = None  # what rows have attended to in the layer before
        for index in range(len(attended.sliding_windows)):
            cos_BRD, sin_BRD = rotary[self._kinds[index]]
            after, given = addressof(layers[index]), None if seen is None else seen.data_ptr()
            # New ones for each layer: a window may keep what it is given.
            key_BGRD, value_BGRD = (x_BRW.new_empty((size, key_heads, rows, head_width)) for _ in range(2))
            made = (cos_BRD, sin_BRD, query_BHRD, key_BGRD, value_BGRD)
            at = [each.data_ptr() for each in made]
            call(
                model_at,
                before,
                after,
                added_before,
                added[index],
                updated,
                x,
                given,
                num_rows,
                rows,
                *at,
                *space,
                threads,
            )
            keys_BGSD, values_BGSD = window.update(key_BGRD, value_BGRD, index)
            seen = attended_rows(
                self._library,
                model_at,
                self._shape_here.attentions[index],
                query_BHRD,
                keys_BGSD,
                values_BGSD,
                attended,
                index,
            )
            before, added_before = after, added[index]
        given = None if seen is None else seen.data_ptr()
        rotated = [None] * 5
        call(
            model_at,
            before,
            None,
            added_before,
            None,
            updated,
            x,
            given,
            num_rows,
            rows,
            *rotated,
            *space,
            threads,
        )
        return last_BRW
