"""A Hugging Face causal LM as a policy, through transformers' own extension points.

The causal path is the model's ordinary forward plus its output head, because that is what learners
recompute. Families are listed in `loading.FAMILIES`; `check_policy` tells whether a checkpoint keeps the
contract.

Shapes: B requests, R rows per request, K drafted tokens, L = K + 1 rows to verify, P levels, W hidden width,
V vocabulary.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockroll.errors import InvalidInput
from blockroll.kernels.block_attention import AttendedRows, BlockRows, Packing, RowLayout
from blockroll.policies import attention
from blockroll.policies.adapter import DraftAdapter, chat_template_hash, has_adapter
from blockroll.policies.base import FusedRows, KVShape, KVWindow, StatePart
from blockroll.policies.compiled import Compile, CompiledLayers
from blockroll.policies.ends import end_token_ids
from blockroll.policies.growing_window import GrowingWindow
from blockroll.policies.layout import causal_rows, fused_rows, two_forward_rows
from blockroll.policies.loading import (
    FAMILIES,
    check_family,
    load_model,
    load_tokenizer,
    no_progress_bar,
    resolve_checkpoint,
)
from blockroll.policies.packing import least_saved_rows
from blockroll.policies.positions import context_of, use_text_rotary
from blockroll.policies.prepacked import PackedLinears, Prepack
from blockroll.policies.trained import trained_drafts_of

_PROBE_TOKENS = 16
_PROBE_MASKS = 4

P = ParamSpec("P")
T = TypeVar("T")


def _without_gradients(
    method: Callable[Concatenate["HFPolicy", P], T],
) -> Callable[Concatenate["HFPolicy", P], T]:
    """In inference mode, with packed weights; under autocast with neither: it keeps no cast of a weight for
    the next forward in inference mode, and casts the weights that it multiplies with."""

    @wraps(method)
    def run(self: "HFPolicy", /, *args: P.args, **kwargs: P.kwargs) -> T:
        is_autocast = torch.is_autocast_enabled(self.device.type)
        if is_autocast:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        with torch.inference_mode(), self.packed.serving():
            return method(self, *args, **kwargs)

    return run


class HFPolicy:
    """A causal LM on one device that drafts with an adapter, or when its config says it was trained to."""

    state_shape: tuple[StatePart, ...] = ()  # in the families that are served attention alone looks back

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prepack: Prepack = "auto",
        compile: Compile = "auto",
    ) -> None:
        """Take over `model`: it is set to evaluation mode and to blockroll's attention.

        `prepack` says whether decoding multiplies with packed copies of the linear weights, which take as
        much memory again (`prepacked.py`): `auto` where that is measured to be faster, `on` or `off`.
        `compile` says whether few rows go through layers by compiled code (`compiled.py`): `auto` where that
        is measured to be faster, `on` or `off`. InvalidInput for `on` where nothing can be packed, or the
        layers are of another shape; MissingDependency where it needs a C compiler and there is none.
        """
        check_family(model.config.model_type)
        attention.register()
        model.set_attn_implementation(attention.ATTENTION_NAME)
        self.model = model
        self.model.train(False)
        self.output_head: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.device = model.device
        self.vocab_size = int(model.config.vocab_size)
        context = context_of(model.config)
        self.max_length, self.length_boundaries = context.max_length, context.boundaries
        self._rotary = use_text_rotary(model)
        self.eos_token_ids = end_token_ids(model, tokenizer)
        self.adapter: DraftAdapter | None = None
        section = trained_drafts_of(model.config)
        self.mask_token_id: int | None = section.get("mask_token_id")
        self.trained_drafts = 0
        self.trained_layouts: tuple[str, ...] = ()
        self.describe_drafts(section.get("block_sizes", ()), section.get("layouts", ()))
        # transformers 5.24 renamed the argument; the old name is gone from 5.40.
        arguments = inspect.signature(model.base_model.forward).parameters
        self._cache_keyword = "cache" if "cache" in arguments else "past_key_values"
        self._sliding_window: int | None = getattr(model.config, "sliding_window", None)
        is_by_type = FAMILIES[model.config.model_type] == "by_layer_type"
        self._layer_types: tuple[str, ...] = tuple(model.config.layer_types) if is_by_type else ()
        self.final_softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.least_saved_rows = least_saved_rows(model, model.config.num_hidden_layers)
        self.packed = PackedLinears(model, prepack, self._probe_logits)
        self.compiled = CompiledLayers(
            model,
            compile,
            self._cache_keyword,
            law=self._probe_rows,
            draft_law=partial(self._probe_rows, num_masks=_PROBE_MASKS),
        )

    @property
    def can_draft(self) -> bool:
        """Whether it has masks: an adapter's, or a mask token it was trained with."""
        return self.adapter is not None or self.mask_token_id is not None

    @property
    def kv_shape(self) -> KVShape:
        """What a cache must hold of every token, in the precision that forwards multiply in now."""
        kind = self.device.type
        is_autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_autocast else self.model.dtype
        return KVShape.of(self.model.config, dtype)

    @property
    def stock_attention(self) -> str:
        """The implementation a learner trains with: transformers' fused attention knows no soft cap."""
        return "eager" if getattr(self.model.config, "attn_logit_softcapping", None) else "sdpa"

    def use_adapter(self, adapter: DraftAdapter) -> None:
        """Draft with this adapter, made for this policy's model, from now on. Masks are no token then."""
        if self.adapter is not None:
            self.adapter.remove()
        self.adapter = adapter
        self.mask_token_id = None
        self.describe_drafts(adapter.config.block_sizes, adapter.config.layouts)

    def warn_of_another_chat_template(self) -> None:
        """Drafts are learned on prompts as one template writes them; say so if the tokenizer has another."""
        trained = self.adapter.config.chat_template_hash if self.adapter else None
        if trained and self.tokenizer is not None and trained != chat_template_hash(self.tokenizer):
            warnings.warn(
                "the draft adapter was trained on prompts of another chat template than this tokenizer's: "
                "the law stays exact, but fewer drafts may be accepted; convert again to adapt it",
                stacklevel=3,
            )

    def describe_drafts(self, block_sizes: Sequence[int], layouts: Sequence[str]) -> None:
        """Say what the policy is trained to draft from now on."""
        self.trained_drafts = max(block_sizes, default=0)
        self.trained_layouts = tuple(layouts)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = torch.float32,
        with_tokenizer: bool = True,
        adapter: str | Path | None = None,
        prepack: Prepack = "auto",
        compile: Compile = "auto",
    ) -> Self:
        """Load a checkpoint folder; `tiny` is the policy that ships with blockroll.

        `adapter` is the folder of a draft adapter; one that lies beside the weights is used unasked.
        """
        folder = resolve_checkpoint(path)
        model = load_model(folder, device=device, dtype=dtype)
        tokenizer = load_tokenizer(folder) if with_tokenizer else None
        policy = cls(model, tokenizer, prepack=prepack, compile=compile)
        if adapter is not None or has_adapter(folder):
            policy.use_adapter(DraftAdapter.from_pretrained(adapter or folder, model))
            policy.warn_of_another_chat_template()
        return policy

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face checkpoint folder, the draft adapter beside the weights."""
        with no_progress_bar():
            self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.adapter is not None:
            self.adapter.save_pretrained(folder)

    def weights_changed(self) -> None:
        """Make copies of weights anew: the weights have been written, in whatever way."""
        self.packed.refresh()
        self.compiled.weights_changed()

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens, special ones left out."""
        if self.tokenizer is None:
            raise InvalidInput("this policy was loaded without a tokenizer; stop strings and text need one")
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    @_without_gradients
    def prefill(self, ids_BR: Tensor, window: KVWindow, *, num_tokens_B: Tensor | None = None) -> None:
        """Write keys and values of prompt rows, of texts that have so many tokens; no logits are computed."""
        num_rows = ids_BR.shape[1]
        if num_tokens_B is None:
            num_tokens_B = window.lengths_B + num_rows + 1  # with the anchor
        self.hidden(ids_BR, causal_rows(num_rows), window, num_tokens_B=num_tokens_B)

    @_without_gradients
    def verify_logits(
        self, ids_BR: Tensor, window: KVWindow, *, num_tokens_B: Tensor | None = None
    ) -> Tensor:
        """Causal logits, float32 (B, R, V): row i is the law of the token after row i.

        Row 0 is the last token that is settled, unless the texts are said to have `num_tokens_B` tokens.
        """
        layout = causal_rows(ids_BR.shape[1])
        return self.logits(self.hidden(ids_BR, layout, window, num_tokens_B=num_tokens_B))

    @_without_gradients
    def verify_packed(self, ids_BL: Tensor, packing: Packing, window: KVWindow) -> Tensor:
        """Causal logits of the rows of `packing`, float32 (N, V): no other row is computed."""
        layout = causal_rows(packing.width)
        return self.logits(self.hidden(ids_BL, layout, window, packing=packing)[0])

    @_without_gradients
    def draft_logits(self, ids_BC: Tensor, num_drafts: int, window: KVWindow) -> Tensor:
        """Float32 (B, K + 1, V): the causal law of the token after the anchor, then the law of each draft."""
        num_clean = ids_BC.shape[1]
        layout = two_forward_rows(num_clean, num_drafts)
        hidden_BRW = self.hidden(ids_BC, layout, window, num_tokens_B=window.lengths_B + num_clean)
        return self.logits(hidden_BRW[:, num_clean - 1 :])

    @_without_gradients
    def fused_rows(self, ids_BL: Tensor, levels: tuple[int, ...], window: KVWindow) -> FusedRows:
        """Verify the anchor and K drafts, and propose after each level, in one forward."""
        width = ids_BL.shape[1]
        hidden_BRW = self.hidden(ids_BL, fused_rows(width - 1, levels), window)
        return FusedRows(
            verify_logits_BLV=self.logits(hidden_BRW[:, :width]),
            proposal_states_BPLW=hidden_BRW[:, width:].reshape(len(ids_BL), len(levels), width, -1),
        )

    @_without_gradients
    def proposal_logits(self, states_BKW: Tensor) -> Tensor:
        """Logits of the chosen proposal's states, float32 (B, K, V)."""
        return self.logits(states_BKW)

    def hidden(
        self,
        ids_BC: Tensor,
        layout: RowLayout,
        window: KVWindow,
        *,
        num_tokens_B: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """States (B, R, W) of the clean rows' tokens and of the masks behind them.

        `num_tokens_B` are the tokens of each text that are settled, which decide its rotary factors where
        they depend on its length; None: those behind which the window stands, and one more.
        With a `packing`, of rows without masks, it is the states (1, N, W) of its rows.
        """
        if num_tokens_B is None:
            num_tokens_B = window.lengths_B + 1
        # Rows past the context are never committed, and must not stretch a scaled rotary embedding.
        positions_BR = layout.positions(window.lengths_B).clamp(max=self.max_length - 1)
        return self.forward_rows(
            ids_BC,
            num_masks=layout.num_masks,
            positions_BR=positions_BR,
            rows=BlockRows.of(layout, window.lengths_B, window.extent, packing, window.pages),
            window=window,
            num_tokens_B=num_tokens_B,
        )

    def forward_rows(
        self,
        ids_BC: Tensor,
        *,
        num_masks: int,
        positions_BR: Tensor,
        rows: AttendedRows,
        window: KVWindow,
        num_tokens_B: Tensor | None = None,
    ) -> Tensor:
        """States (B, R, W) of C tokens and `num_masks` masks, which see what `rows` says; where these are
        packed, (1, N, W). The texts have `num_tokens_B` tokens; None: as many as their positions say."""
        num_clean = ids_BC.shape[1]
        adapter = self.adapter if num_masks else None
        # An adapter's embedding goes over whatever stands there.
        mask_id = 0 if adapter else self.mask_token_id
        if num_masks and mask_id is None:
            raise InvalidInput(
                "this policy cannot draft: it has neither a draft adapter nor a mask token; "
                "use a plan without mask rows, or make an adapter with `blockroll convert`"
            )
        ids_BR = nn.functional.pad(ids_BC, (0, num_masks), value=mask_id)
        packing = rows.packing
        if packing is not None:
            assert not num_masks, "masks follow the tokens of a rectangle"
            ids_BR, positions_BR = packing.pack(ids_BR), packing.pack(positions_BR)
            if num_tokens_B is not None:
                num_tokens_B = num_tokens_B[packing.request_N][None]
        with contextlib.ExitStack() as stack:
            if self._rotary is not None:
                stack.enter_context(self._rotary.of_texts(num_tokens_B))
            attended = attention.Attended(rows=rows, sliding_windows=self._sliding_windows)
            if not torch.is_autocast_enabled(self.device.type) and window.pages is None:
                states_BRW = self.compiled.states(
                    ids_BR,
                    positions_BR,
                    window,
                    attended,
                    adapter=self.adapter,
                    num_clean=num_clean,
                )
                if states_BRW is not None:
                    return states_BRW
            inputs = {"input_ids": ids_BR}
            if adapter is not None:
                stack.enter_context(adapter.on_rows(num_clean))
                embeddings_BRW = self.model.get_input_embeddings()(ids_BR)
                inputs = {"inputs_embeds": adapter.embed(embeddings_BRW, num_clean)}
            # Or else transformers would make a mask of its own.
            unread = torch.empty((1, 1, 1, 1), dtype=torch.bool, device=self.device)
            output = self.model.base_model(
                **inputs,
                position_ids=positions_BR,
                attention_mask=dict.fromkeys(self._layer_types, unread) if self._layer_types else unread,
                use_cache=True,
                attended=attended,  # transformers hands it to our attention, in every layer
                **{self._cache_keyword: window},
            )
        hidden_BRW: Tensor = output.last_hidden_state
        return hidden_BRW

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of hidden states (..., W), as the model's own forward computes them."""
        is_autocast = torch.is_autocast_enabled(self.device.type)
        logits = None if is_autocast else self.compiled.logits(self.output_head, hidden)
        if logits is None:
            # A head that is kept in higher precision than the layers takes its input in that precision.
            logits = self.output_head(hidden.to(self.output_head.weight.dtype))
        if self.final_softcap is not None:
            logits = torch.tanh(logits / self.final_softcap) * self.final_softcap
        return logits.float()

    def _probe_rows(self, num_masks: int = 0) -> Tensor:
        """Logits of a few rows of two texts and, behind them, of one and of masks, as decoding runs them."""
        ids_BT = self._probe_ids().view(2, -1)
        window, rows = GrowingWindow(2), []
        for ids_BR, masks in ((ids_BT[:, :-1], 0), (ids_BT[:, -1:], num_masks)):
            layout = two_forward_rows(ids_BR.shape[1], masks)
            rows.append(self.logits(self.hidden(ids_BR, layout, window.grown(layout.num_rows))))
        return torch.cat(rows, dim=1)

    def _probe_ids(self) -> Tensor:
        """A few tokens spread over the vocabulary, an even number."""
        length = min(_PROBE_TOKENS, self.max_length // 2 * 2)
        return torch.arange(1, length + 1, device=self.device) * self.vocab_size // (length + 1)

    def _probe_logits(self) -> Tensor:
        """Of a few tokens spread over the vocabulary, by a forward without a cache."""
        ids_1T = self._probe_ids()[None]
        return self.logits(self.model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state)

    @property
    def _sliding_windows(self) -> list[int | None]:
        """Of each layer."""
        if not self._layer_types:
            return [self._sliding_window] * self.model.config.num_hidden_layers
        return [self._sliding_window if kind == "sliding_attention" else None for kind in self._layer_types]
