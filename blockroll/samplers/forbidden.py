"""Tokens that must not follow: the last one of a bad word behind its others, and ends before `min_tokens`.

Which they are behind drafts depends on the drafts, and is decided where these are: the host reads none.

Shapes: B requests, N tokens behind the committed text, L rows, F rules, R tokens before the forbidden one,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blockroll.kernels.transfer import send

_ANY = -1  # stands before a shorter word
_NO_TOKEN = -2  # stands before the first token of a text
_ALWAYS = 1 << 62  # tokens that no completion has


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """What one way of sampling forbids: each token behind so many others, and how long."""

    token_F: np.ndarray  # int64
    before_FR: np.ndarray  # int64
    until_F: np.ndarray  # int64, tokens of the completion that stand before it is allowed


@lru_cache(maxsize=256)
def rules_of(
    bad_words_ids: tuple[tuple[int, ...], ...], end_token_ids: frozenset[int], min_tokens: int
) -> Rules:
    """The same object for the same options."""
    words = [(word, _ALWAYS) for word in bad_words_ids]
    if min_tokens:
        words += [((token_id,), min_tokens) for token_id in sorted(end_token_ids)]
    reach = max((len(word) for word, _ in words), default=1) - 1
    before = [[*[_ANY] * (reach + 1 - len(word)), *word[:-1]] for word, _ in words]
    return Rules(
        token_F=np.array([word[-1] for word, _ in words], dtype=np.int64),
        before_FR=np.array(before, dtype=np.int64).reshape(len(words), reach),
        until_F=np.array([until for _, until in words], dtype=np.int64),
    )


class Ruled(Protocol):
    """A text and what it forbids."""

    prompt_ids: Sequence[int]
    token_ids: list[int]
    rules: Rules


@dataclass(frozen=True, slots=True)
class Forbidden:
    """What must not follow the texts of a batch."""

    token_BF: Tensor  # int64
    before_BFR: Tensor  # int64
    until_BF: Tensor  # int64
    tail_BR: Tensor  # int64, the last tokens of each text
    num_tokens_B: Tensor  # int64, of the completions

    @classmethod
    def of(cls, texts: Sequence[Ruled], device: torch.device) -> "Forbidden":
        """Behind what is committed; the rules of a batch are sent once."""
        token_BF, before_BFR, until_BF = _table(tuple(text.rules for text in texts), device)
        reach = before_BFR.shape[2]
        tails = np.array([_tail(text, reach) for text in texts], dtype=np.int64).reshape(len(texts), reach)
        num_tokens = np.array([len(text.token_ids) for text in texts], dtype=np.int64)
        return cls(token_BF, before_BFR, until_BF, *send([tails, num_tokens], device))

    def mask(self, rows_BLV: Tensor, between_BN: Tensor) -> None:
        """Take them out of these rows, in place, of which the last one is behind all N tokens."""
        is_forbidden_BLF = self._is_forbidden(rows_BLV.shape[1], between_BN)
        limit_BLF = torch.where(is_forbidden_BLF, -torch.inf, torch.inf).to(rows_BLV.dtype)
        rows_BLV.scatter_reduce_(-1, self.token_BF[:, None].expand(limit_BLF.shape), limit_BLF, "amin")

    def mask_unless_empty(self, rows_B1V: Tensor, between_BN: Tensor) -> None:
        """The same of one row each, but of a row that would be empty nothing."""
        masked_B1V = rows_B1V.clone()
        self.mask(masked_B1V, between_BN)
        is_left_B11 = masked_B1V.amax(dim=-1, keepdim=True) > -torch.inf
        rows_B1V.copy_(torch.where(is_left_B11, masked_B1V, rows_B1V))

    def _is_forbidden(self, num_rows: int, between_BN: Tensor) -> Tensor:
        """Which tokens must not follow each row, bool (B, L, F)."""
        num_between, reach = between_BN.shape[1], self.tail_BR.shape[1]
        num_behind_L = torch.arange(num_between - num_rows + 1, num_between + 1, device=between_BN.device)
        num_tokens_BL = self.num_tokens_B[:, None] + num_behind_L
        is_forbidden_BLF = num_tokens_BL[..., None] < self.until_BF[:, None]
        if reach:
            text_BT = torch.cat([self.tail_BR, between_BN], dim=1)
            window_BLR = text_BT.unfold(1, reach, 1)[:, -num_rows:]
            before_B1FR = self.before_BFR[:, None]
            fits_BLFR = (window_BLR[:, :, None] == before_B1FR) | (before_B1FR == _ANY)
            is_forbidden_BLF &= fits_BLFR.all(dim=-1)
        return is_forbidden_BLF


@lru_cache(maxsize=64)
def _table(rules_B: tuple[Rules, ...], device: torch.device) -> list[Tensor]:
    """Of a batch, filled up with rules that forbid nothing."""
    most, reach = (max(rules.before_FR.shape[axis] for rules in rules_B) for axis in (0, 1))
    tokens, until = (np.zeros((len(rules_B), most), dtype=np.int64) for _ in range(2))
    before = np.full((len(rules_B), most, reach), _ANY)
    for row, rules in enumerate(rules_B):
        number, width = rules.before_FR.shape
        tokens[row, :number], until[row, :number] = rules.token_F, rules.until_F
        before[row, :number, reach - width :] = rules.before_FR
    return send([tokens, before, until], device)


def _tail(text: Ruled, reach: int) -> list[int]:
    """The last tokens of prompt and completion, so many."""
    tail = text.token_ids[-reach:] if reach else []
    missing = reach - len(tail)
    if missing:
        tail = [*text.prompt_ids[-missing:], *tail]
    return [*[_NO_TOKEN] * (reach - len(tail)), *tail]
