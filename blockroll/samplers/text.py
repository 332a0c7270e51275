"""What the law of a request depends on besides its rows, and which logits that changes.

Shapes: B requests, N tokens behind the committed text, L rows, U tokens whose logits change, T tokens of a
text, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blockroll.samplers.edits import Edits
from blockroll.samplers.growing import IdBuffer, TokenCounts
from blockroll.samplers.packed import PackedRows
from blockroll.samplers.processing import added_by_row, completed_by, penalize
from blockroll.samplers.rows import LogitRows
from blockroll.types import Guide, Sampling


@dataclass(slots=True, kw_only=True)
class Text:
    """What the law of a request depends on besides its rows; grows as tokens are committed."""

    sampling: Sampling
    prompt_ids: Sequence[int]
    token_ids: list[int]  # committed
    end_token_ids: frozenset[int] = frozenset()  # masked before `min_tokens`
    guide: Guide | None = None
    scales: tuple[float, float, float] = field(init=False)  # temperature, draft temperature, weight
    # Both grow with the text: what is counted once is never counted again.
    _counts: TokenCounts | None = field(init=False, default=None)
    _ids: IdBuffer | None = field(init=False, default=None)
    is_processed: bool = field(init=False)
    is_policy: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        draft_temperature = (
            sampling.temperature if sampling.draft_temperature is None else sampling.draft_temperature
        )
        assert sampling.law.weight is not None, "Sampling refuses a law that is none"
        self.scales = (sampling.temperature, draft_temperature, sampling.law.weight)
        self.is_processed = sampling.is_processed
        self.is_policy = sampling.is_policy

    def ids(self, between: Sequence[int], device: torch.device) -> Tensor:
        """Prompt, completion and these tokens behind it, int64 (1, T)."""
        if self._ids is None:
            self._ids = IdBuffer(self.prompt_ids, device)
        return self._ids.with_completion(self.token_ids, between)

    def restart(self, guide: Guide | None) -> None:
        """Count anew, and go on with this guide, which stands behind what was committed."""
        self.guide, self._counts, self._ids = guide, None, None

    def completed_by(self, between: Sequence[int]) -> list[int]:
        """The tokens that would complete a forbidden sequence behind this text and the tokens after it."""
        words = self.sampling.bad_words_ids
        if not words:
            return []
        reach = max(map(len, words))
        text = [*self.token_ids[-reach:], *between]
        if len(self.token_ids) < reach:
            text = [*self.prompt_ids[-reach:], *text]
        return completed_by(text, words)

    @property
    def is_edited_by_row(self) -> bool:
        """Whether its rows are edited one at a time, by tokens known to the host."""
        sampling = self.sampling
        return bool(
            self.guide is not None
            or sampling.logits_processors
            or sampling.bad_words_ids
            or len(self.token_ids) < sampling.min_tokens
        )

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence and frequency."""
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)

    def touched(self, between: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that bias or penalties touch behind this text and some of the tokens after it, int64 (U,).

        With them, float64 (3, U): how often prompt and completion hold them, the completion alone, and their
        bias. A token may stand there twice.
        """
        bias, ids_U, counts_2U = self.sampling.logit_bias, np.array([*self.sampling.logit_bias]), None
        if self.penalties != _NO_PENALTIES:
            if self._counts is None:
                self._counts = TokenCounts(self.prompt_ids)
            own_U, own_2U = self._counts.with_completion(self.token_ids)
            others = [*bias, *between]
            ids_U = np.concatenate([own_U, np.array(others, dtype=np.int64)])
            counts_2U = np.concatenate([own_2U, self._counts.of(others)], axis=1)
        found_3U = np.zeros((3, len(ids_U)))
        if counts_2U is not None:
            found_3U[:2] = counts_2U
        if bias:
            found_3U[2] = [bias.get(token_id, 0.0) for token_id in ids_U.tolist()]
        return ids_U, found_3U


_NO_PENALTIES = (1, 0, 0)


def is_touched(texts: Sequence[Text]) -> bool:
    """Whether a bias or a penalty changes any logit."""
    return any(text.penalties != _NO_PENALTIES or text.sampling.logit_bias for text in texts)


def edits_of(texts: Sequence[Text], rows: LogitRows | PackedRows, between_BN: Tensor) -> Edits:
    """The logits that biases and penalties change: of rows of which the last is behind all N tokens.

    With N = 0 every row goes by the committed text. Few tokens of a row change: they alone are looked at.
    """
    touched = [text.touched(between) for text, between in zip(texts, between_BN.tolist(), strict=True)]
    width = max(1, *(len(ids_U) for ids_U, _ in touched))
    ids_BU, found_3BU = np.zeros((len(texts), width), dtype=np.int64), np.zeros((3, len(texts), width))
    for row, (ids_U, found_3U) in enumerate(touched):
        if len(ids_U):  # behind them stands the first of them again
            ids_BU[row], found_3BU[:, row] = ids_U[0], found_3U[:, :1]
            ids_BU[row, : len(ids_U)], found_3BU[:, row, : len(ids_U)] = ids_U, found_3U
    device = between_BN.device
    ids, (seen_BU, completed_BU, bias_BU) = (
        torch.from_numpy(ids_BU).to(device),
        torch.from_numpy(found_3BU).to(device),
    )
    num_rows = rows.shape[1] if between_BN.shape[1] else 1
    added_BLU = added_by_row(ids, between_BN, num_rows)
    penalties_B3 = torch.tensor([text.penalties for text in texts], dtype=torch.float64, device=device)
    edited_BLU = penalize(
        rows.logits_of(ids) + bias_BU[:, None],
        seen_BU[:, None] + added_BLU > 0,
        completed_BU[:, None] + added_BLU,
        *penalties_B3.unbind(dim=1),
    )
    return Edits(ids, edited_BLU)
