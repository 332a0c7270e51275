"""A tiny policy with everything that recurrent layers carry, beside attention: random weights, float64.

Each layer has a causal convolution over three rows, values half of which are delayed by a row, and a sum that
decays and forgets nothing wholly. A state that is wrong once is wrong ever after, so tokens tell.

Shapes: B requests, C tokens of each, R rows, K drafted tokens, L = K + 1 rows to verify, P levels, W width,
D head width, T taps, S keys, V vocabulary.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from blockroll.kernels.block_attention import RowLayout
from blockroll.policies.base import FusedRows, KVShape, StatePart
from blockroll.policies.layout import causal_rows, fused_rows, two_forward_rows
from blockroll.policies.segments import Parents, at_rows, before, convolve, last_rows, parents_of, scan
from blockroll.rollout.engine.cache.layouts import open_slots

WIDTH, HEAD, TAPS, NUM_LAYERS = 12, 6, 3, 2
DECAY = 0.9
EOS_ID = 2
POISON = 3  # a token whose embedding is NaN


class RecurrentPolicy:
    """Convolution, delay, decaying sum and attention; drafts by a mask embedding."""

    def __init__(self, *, vocab_size: int = 16, seed: int = 0, max_length: int = 160) -> None:
        self.vocab_size = vocab_size
        self.tokenizer = None
        self.max_length = max_length
        self.length_boundaries = ()
        self.eos_token_ids = (EOS_ID,)
        self.mask_token_id = None
        self.can_draft = True
        self.trained_drafts = 8
        self.trained_layouts = ("two_forward", "fused")
        self.device = torch.device("cpu")
        self.least_saved_rows = 1
        self.kv_shape = KVShape(num_layers=NUM_LAYERS, num_heads=1, width=HEAD, dtype=torch.float64)
        self.state_shape = tuple(
            StatePart(name=name, num_layers=NUM_LAYERS, shape=shape, dtype=torch.float64)
            for name, shape in {"conv": (TAPS - 1, WIDTH), "late": (1, HEAD // 2), "sum": (WIDTH,)}.items()
        )
        self.write_weights(seed)

    def write_weights(self, seed: int) -> None:
        """Other weights."""
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        self.embedding_VW = weights(self.vocab_size + 1, WIDTH)  # the last is the masks'
        self.embedding_VW[POISON] = torch.nan
        self.positions_SW = weights(self.max_length, WIDTH, scale=0.5)
        self.layers = [
            {
                "rows": weights(WIDTH, WIDTH, scale=0.4),
                "taps": weights(WIDTH, TAPS),
                "query": weights(WIDTH, HEAD, scale=0.4),
                "key": weights(WIDTH, HEAD, scale=0.4),
                "value": weights(WIDTH, HEAD - HEAD // 2, scale=0.4),
                "late": weights(WIDTH, HEAD // 2, scale=0.4),
                "out": weights(HEAD, WIDTH, scale=0.4),
                "mix": weights(WIDTH, WIDTH, scale=0.4),
            }
            for _ in range(NUM_LAYERS)
        ]
        self.head_WV = weights(WIDTH, self.vocab_size)

    def weights_changed(self):
        pass

    def model(self, input_ids, use_cache):
        """Logits of whole texts, as transformers' own forward would give them."""
        cache = open_slots(self, num_slots=len(input_ids), capacity=input_ids.shape[1])
        return SimpleNamespace(logits=self.verify_logits(input_ids, cache.window(0, *input_ids.shape)))

    def prefill(self, ids_BR, window):
        self._causal_rows(ids_BR, window)

    def verify_logits(self, ids_BR, window):
        return self.logits(self._causal_rows(ids_BR, window))

    def _causal_rows(self, ids_BR, window):
        return self.rows(ids_BR, causal_rows(ids_BR.shape[1]), window)

    def verify_packed(self, ids_BL, packing, window):
        return packing.pack(self.verify_logits(ids_BL, window))[0]

    def draft_logits(self, ids_BC, num_drafts, window):
        num_clean = ids_BC.shape[1]
        rows_BRW = self.rows(ids_BC, two_forward_rows(num_clean, num_drafts), window)
        return self.logits(rows_BRW[:, num_clean - 1 :])

    def fused_rows(self, ids_BL, levels, window):
        width = ids_BL.shape[1]
        rows_BRW = self.rows(ids_BL, fused_rows(width - 1, levels), window)
        return FusedRows(
            verify_logits_BLV=self.logits(rows_BRW[:, :width]),
            proposal_states_BPLW=rows_BRW[:, width:].reshape(len(ids_BL), len(levels), width, -1),
        )

    def proposal_logits(self, states_BKW):
        return self.logits(states_BKW)

    def parents(self, layout: RowLayout) -> Parents:
        return parents_of(layout)

    def logits(self, rows_BRW: Tensor) -> Tensor:
        """Float32; the poison is never drawn."""
        logits = (_normed(rows_BRW) @ self.head_WV).float()
        logits[..., POISON] -= 100
        return logits

    def rows(self, ids_BC: Tensor, layout: RowLayout, window) -> Tensor:
        """What the last layer gives (B, R, W)."""
        ids_BR = torch.nn.functional.pad(ids_BC, (0, layout.num_masks), value=self.vocab_size)
        positions_BR = layout.positions(window.lengths_B).clamp(max=self.max_length - 1)
        rows_BRW = self.embedding_VW[ids_BR] + self.positions_SW[positions_BR]
        is_text_BR = window.lengths_B[:, None] + torch.arange(layout.num_rows) >= 0
        mask_BRS = layout.mask(window.lengths_B, window.extent)[:, 0]
        for index in range(NUM_LAYERS):
            rows_BRW = rows_BRW + self._layer(index, rows_BRW, is_text_BR, mask_BRS, layout, window)
        return rows_BRW

    def _layer(self, index, rows_BRW, is_text_BR, mask_BRS, layout, window):
        weights, states = self.layers[index], window.states
        parents, clean = self.parents(layout), slice(layout.num_clean)
        normed_BRW = _normed(rows_BRW).where(is_text_BR[..., None], 0)
        inner_BRW = normed_BRW @ weights["rows"]
        late_BRD = normed_BRW @ weights["late"]
        seeds = {part.name: states.seed(part.name, index) for part in self.state_shape}

        local_BRW = convolve(inner_BRW, seeds["conv"], weights["taps"], parents)
        sums_BRW = scan(lambda past, row: DECAY * past + row, inner_BRW, seeds["sum"], parents)
        delayed_BRD = before(late_BRD, seeds["late"], parents)[:, :, 0]
        states.leave("conv", index, last_rows(inner_BRW[:, clean], seeds["conv"], states.rows_BC))
        states.leave("late", index, last_rows(late_BRD[:, clean], seeds["late"], states.rows_BC))
        states.leave("sum", index, at_rows(sums_BRW[:, clean], states.rows_BC))

        mixed_BRW = torch.tanh(local_BRW + sums_BRW)
        values_BRD = torch.cat([mixed_BRW @ weights["value"], delayed_BRD], dim=-1)
        keys_BHSD, values_BHSD = window.update(
            (mixed_BRW @ weights["key"])[:, None], values_BRD[:, None], index
        )
        scores_BRS = mixed_BRW @ weights["query"] @ keys_BHSD[:, 0].transpose(1, 2)
        shares_BRS = scores_BRS.masked_fill(~mask_BRS, -torch.inf).softmax(dim=-1)
        return shares_BRS @ values_BHSD[:, 0] @ weights["out"] + mixed_BRW @ weights["mix"]


def _normed(rows_BRW: Tensor) -> Tensor:
    return rows_BRW / rows_BRW.square().mean(dim=-1, keepdim=True).sqrt()
