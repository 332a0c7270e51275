"""What the law of a request depends on besides its rows, and which logits that changes.

Shapes: B requests, N tokens behind the committed text, L rows, U tokens whose logits change, T tokens of a
text, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.rows import Edits, LogitRows, PackedRows
from blockroll.kernels.transfer import send
from blockroll.samplers.forbidden import Rules, rules_of
from blockroll.samplers.growing import IdBuffer, TokenCounts
from blockroll.samplers.processing import added_by_row, penalize
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
    rules: Rules = field(init=False)  # what they forbid

    def __post_init__(self) -> None:
        sampling = self.sampling
        draft_temperature = (
            sampling.temperature if sampling.draft_temperature is None else sampling.draft_temperature
        )
        assert sampling.law.weight is not None, "Sampling refuses a law that is none"
        self.scales = (sampling.temperature, draft_temperature, sampling.law.weight)
        self.is_processed = sampling.is_processed
        self.is_policy = sampling.is_policy
        self.rules = rules_of(sampling.bad_words_ids, self.end_token_ids, sampling.min_tokens)

    def ids(self, between: Sequence[int], device: torch.device) -> Tensor:
        """Prompt, completion and these tokens behind it, int64 (1, T)."""
        if self._ids is None:
            self._ids = IdBuffer(self.prompt_ids, device)
        return self._ids.with_completion(self.token_ids, between)

    def restart(self, guide: Guide | None) -> None:
        """Count anew, and go on with this guide, which stands behind what was committed."""
        self.guide, self._counts, self._ids = guide, None, None

    @property
    def is_forbidding(self) -> bool:
        """Whether any token must not follow it, or what is behind it, by the rules of its sampling."""
        sampling = self.sampling
        return bool(sampling.bad_words_ids or len(self.token_ids) < sampling.min_tokens)

    @property
    def is_edited_by_host(self) -> bool:
        """Whether its rows are edited one at a time, by code that asks for the tokens before them."""
        return self.guide is not None or bool(self.sampling.logits_processors)

    @property
    def goes_by_tokens(self) -> bool:
        """Whether its law asks which tokens stand before a row, beyond what the forward makes of them."""
        return self.is_edited_by_host or self.is_forbidding or self.penalties != _NO_PENALTIES

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence and frequency."""
        sampling = self.sampling
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)

    def touched(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that bias or penalties touch behind this text, int64 (U,).

        With them, float64 (3, U): how often prompt and completion hold them, the completion alone, and their
        bias. A token may stand there twice.
        """
        bias, ids_U, counts_2U = self.sampling.logit_bias, np.array([*self.sampling.logit_bias]), None
        if self.penalties != _NO_PENALTIES:
            if self._counts is None:
                self._counts = TokenCounts(self.prompt_ids)
            own_U, own_2U = self._counts.with_completion(self.token_ids)
            biased = [*bias]
            ids_U = np.concatenate([own_U, np.array(biased, dtype=np.int64)])
            counts_2U = np.concatenate([own_2U, self._counts.of(biased)], axis=1)
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


@dataclass(frozen=True, slots=True)
class Touched:
    """The tokens whose logits biases and penalties change, of a batch behind what is committed."""

    ids_BU: Tensor  # int64
    found_3BU: Tensor  # float64: how often prompt and completion hold them, the completion, and their bias
    penalties_3B: Tensor | None  # None: there are biases alone

    @classmethod
    def of(cls, texts: Sequence[Text], device: torch.device) -> "Touched":
        """Few tokens of a row change: they alone are looked at."""
        touched = [text.touched() for text in texts]
        width = max(1, *(len(ids_U) for ids_U, _ in touched))
        ids_BU, found_3BU = np.zeros((len(texts), width), dtype=np.int64), np.zeros((3, len(texts), width))
        for row, (ids_U, found_3U) in enumerate(touched):
            if len(ids_U):  # behind them stands the first of them again
                ids_BU[row], found_3BU[:, row] = ids_U[0], found_3U[:, :1]
                ids_BU[row, : len(ids_U)], found_3BU[:, row, : len(ids_U)] = ids_U, found_3U
        penalties = tuple(text.penalties for text in texts)
        has_penalties = any(each != _NO_PENALTIES for each in penalties)
        ids, found = send([ids_BU, found_3BU], device)
        return cls(ids, found, _penalties(penalties, device) if has_penalties else None)

    def edits(self, rows: LogitRows | PackedRows, between_BN: Tensor) -> Edits:
        """What stands in rows instead of their own logits, of which the last row is behind all N tokens.

        With N = 0 every row goes by the committed text.
        """
        ids_BU, found_3BU = self.ids_BU, self.found_3BU
        if self.penalties_3B is None:
            return Edits(ids_BU, rows.logits_of(ids_BU) + found_3BU[2][:, None])
        if between_BN.shape[1]:
            ids_BU = torch.cat([ids_BU, between_BN], dim=1)
            found_3BU = torch.cat([found_3BU, self._found_of(between_BN)], dim=2)
        num_rows = rows.shape[1] if between_BN.shape[1] else 1
        added_BLU = added_by_row(ids_BU, between_BN, num_rows)
        seen_BU, completed_BU, bias_BU = found_3BU
        edited_BLU = penalize(
            rows.logits_of(ids_BU) + bias_BU[:, None],
            seen_BU[:, None] + added_BLU > 0,
            completed_BU[:, None] + added_BLU,
            *self.penalties_3B,
        )
        return Edits(ids_BU, edited_BLU)

    def _found_of(self, between_BN: Tensor) -> Tensor:
        """The same of tokens behind the text, float64 (3, B, N): 0 of those that it does not touch."""
        is_known_BNU = between_BN[..., None] == self.ids_BU[:, None]
        place_BN = is_known_BNU.byte().argmax(dim=-1)
        found_3BN = self.found_3BU.gather(2, place_BN.expand(3, -1, -1))
        return torch.where(is_known_BNU.any(dim=-1), found_3BN, 0.0)


@lru_cache(maxsize=64)
def _penalties(penalties: tuple[tuple[float, float, float], ...], device: torch.device) -> Tensor:
    """Float64 (3, B): mostly those of the step before."""
    return torch.tensor(penalties, dtype=torch.float64, device=device).T.contiguous()
