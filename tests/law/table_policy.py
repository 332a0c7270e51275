"""Tables of weights as a policy, for real engines: the keys in the cache are the tokens themselves.

Shapes: B requests, R rows, K drafted tokens, L = K + 1, P levels, S keys, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blockroll.policies.base import FusedRows, KVShape, StatePart
from tests.law.integrate import Tokens, Toy

LONGEST = 12


class TablePolicy:
    """A toy as a policy: tokens are their own keys, so the engine's cache holds the histories."""

    def __init__(self, toy: Toy, num_drafts: int) -> None:
        self.toy = toy
        self.vocab_size = toy.vocab_size
        self.tokenizer = None
        self.max_length = LONGEST
        self.eos_token_ids = ()
        self.mask_token_id = None
        self.can_draft = True
        self.trained_drafts = num_drafts
        self.trained_layouts = ("two_forward", "fused")
        self.length_boundaries = ()
        self.device = torch.device("cpu")
        self.state_shape = ()
        self.kv_shape = KVShape(num_layers=1, num_heads=1, width=1, dtype=torch.float64)

    def weights_changed(self):
        pass

    def prefill(self, ids_BR, window):
        self._histories(ids_BR, window)

    def verify_logits(self, ids_BR, window):
        histories = self._histories(ids_BR, window)
        return _logs([[self.toy.target_weights(h[: len(h) - n]) for n in _back(ids_BR)] for h in histories])

    def draft_logits(self, ids_BC, num_drafts, window):
        masks_BR = torch.full((len(ids_BC), num_drafts), -7)
        histories = self._histories(torch.cat([ids_BC, masks_BR], dim=1), window)
        known = [history[: len(history) - num_drafts] for history in histories]
        rows = [[self.toy.draft_weights(h, i) for i in range(num_drafts)] for h in known]
        return _logs([[self.toy.target_weights(h), *row] for h, row in zip(known, rows, strict=True)])

    def fused_rows(self, ids_BL, levels, window):
        width = ids_BL.shape[1]
        masks_BR = torch.full((len(ids_BL), width * len(levels)), -7)
        rows = self._histories(torch.cat([ids_BL, masks_BR], dim=1), window)
        histories = [history[: len(history) - width * len(levels)] for history in rows]
        verify = [[self.toy.target_weights(h[: len(h) - n]) for n in _back(ids_BL)] for h in histories]
        states = torch.zeros(len(ids_BL), len(levels), width, LONGEST + 2)
        for b, history in enumerate(histories):
            for p, level in enumerate(levels):
                known = history[: len(history) - (width - 1) + level]
                for j in range(width):
                    states[b, p, j, : len(known) + 2] = torch.tensor([j, len(known), *known])
        return FusedRows(verify_logits_BLV=_logs(verify), proposal_states_BPLW=states)

    def proposal_logits(self, states_BKW):
        return _logs([[self.toy.draft_weights(*_known(state)) for state in row] for row in states_BKW])

    def _histories(self, ids_BR: Tensor, window) -> list[Tokens]:
        keys, _ = window.update(ids_BR[:, None, :, None].double(), ids_BR[:, None, :, None].double(), 0)
        stop_B = (window.lengths_B + ids_BR.shape[1]).tolist()
        return [
            tuple(int(token) for token in keys[b, 0, 1:stop, 0].tolist()) for b, stop in enumerate(stop_B)
        ]


class RecurrentTablePolicy(TablePolicy):
    """The same, but what a row knows of its text is a state alone: its length, and its tokens."""

    def __init__(self, toy: Toy, num_drafts: int) -> None:
        super().__init__(toy, num_drafts)
        self.state_shape = (StatePart(name="text", num_layers=1, shape=(LONGEST + 1,), dtype=torch.float64),)

    def _histories(self, ids_BR: Tensor, window) -> list[Tokens]:
        nothing_B1R1 = torch.zeros_like(ids_BR[:, None, :, None]).double()
        window.update(nothing_B1R1, nothing_B1R1, 0)
        num_clean = int((ids_BR[0] >= 0).sum())
        asked_BC = window.states.rows_BC
        if asked_BC is None:
            asked_BC = torch.arange(num_clean).expand(len(ids_BR), -1)
        texts, left_BC = [], torch.zeros(*asked_BC.shape, LONGEST + 1, dtype=torch.float64)
        seeds, begins = window.states.seed("text", 0).tolist(), (-window.lengths_B).clamp(min=0).tolist()
        for b, (seed, begin) in enumerate(zip(seeds, begins, strict=True)):
            known = seed[1 : 1 + int(seed[0])]
            text = [int(token) for token in (*known, *ids_BR[b, begin:].tolist())]
            texts.append(tuple(text[1:]))
            for column, row in enumerate(asked_BC[b].tolist()):
                behind = text[: len(known) + row - begin + 1]
                left_BC[b, column, : len(behind) + 1] = torch.tensor([len(behind), *behind])
        window.states.leave("text", 0, left_BC)
        return texts


def _back(ids_BR: Tensor) -> range:
    return range(ids_BR.shape[1] - 1, -1, -1)


def _known(state: Tensor) -> tuple[Tokens, int]:
    slot, length, *rest = (int(value) for value in state.tolist())
    return tuple(rest[:length]), slot


def _logs(rows: Sequence[Sequence[Sequence[float]]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()
