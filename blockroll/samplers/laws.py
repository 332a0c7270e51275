"""The laws of a batch: what each request draws by, drafts by and mixes by, given the rows of a forward.

    target = truncate(softmax(edit(w z_policy + (1 - w) z_draft) / T))

where `edit` adds biases, takes penalties, runs logits processors and masks what must not follow. It is
applied at every position that is verified, with the prefix that position really has: committed text, then the
drafts before it. A draft row is drawn before its prefix is settled: penalties go by the committed text, and
what must not follow is left out as if the drafts before were all to stand. What a draft was drawn from is
recorded, and any draft law is verified exactly.

Shapes: B requests, K drafted tokens, L target rows, N tokens behind the committed text, V vocabulary.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blockroll.errors import RequestFailed
from blockroll.kernels.block_verify import chosen_logprobs
from blockroll.kernels.draft_draw import draw_draft
from blockroll.kernels.philox import Uniforms
from blockroll.kernels.rows import Cut, Edits, LogitRows, Logits, Mix, PackedLogits, PackedRows, rectangle
from blockroll.kernels.transfer import fetch
from blockroll.samplers.brought import allowed_rows, processed
from blockroll.samplers.forbidden import Forbidden
from blockroll.samplers.processing import even_where_empty
from blockroll.samplers.text import Text, Touched, is_touched
from blockroll.types import POINT_MASS, Draft, Guide, Rows, Verdict


class TargetRows(NamedTuple):
    """What positions are committed by."""

    law: Rows  # (B, L, V)
    is_empty_BL: Tensor | None  # rows that nothing may follow, held by a uniform law; None if there is none

    @property
    def probs_BLV(self) -> Tensor:
        """All probabilities, float64."""
        return self.law.dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """The laws of a batch: float64 (B,), and the texts they go by where any is processed."""

    temperature_B: Tensor
    draft_temperature_B: Tensor
    weight_B: Tensor
    is_mixed: bool  # whether any request mixes,
    has_greedy: bool  # or decodes greedily
    certain_draft: Tensor | bool  # whose drafts are point masses, bool (B,); True or False if the same of all
    processing: "_Processing | None"
    failed: dict[int, str]  # by row of the batch: what its request brought along raised; the row is empty
    is_policy_B: Tensor | None  # which requests draw from the policy at its temperature; None: all of them

    @classmethod
    def of(cls, texts: Sequence[Text], *, vocab_size: int, device: torch.device) -> "Laws":
        """Read once a step, for a batch in the order of its rows."""
        scales = tuple(text.scales for text in texts)
        temperature_B, draft_temperature_B, weight_B = _columns(scales, device)
        kinds = set(scales)
        is_certain = {temperature == 0 for _, temperature, _ in kinds}
        is_processed = any(text.is_processed for text in texts)
        failed: dict[int, str] = {}
        return cls(
            temperature_B=temperature_B,
            draft_temperature_B=draft_temperature_B,
            weight_B=weight_B,
            is_mixed=any(weight < 1 for _, _, weight in kinds),
            has_greedy=any(temperature == 0 for temperature, _, _ in kinds),
            certain_draft=is_certain.pop() if len(is_certain) == 1 else draft_temperature_B == 0,
            processing=_Processing.of(texts, vocab_size, device, failed) if is_processed else None,
            failed=failed,
            is_policy_B=None
            if all(text.is_policy for text in texts)
            else _flags(tuple([text.is_policy for text in texts]), device),
        )

    @property
    def edits_rows(self) -> bool:
        """Whether rows are edited before they are laws, and must be finite for that."""
        return self.processing is not None and self.processing.may_be_empty

    def draw(self, logits_BKV: Tensor, uniforms_BK: Uniforms, num_drafts_B: Tensor) -> Draft:
        """Drafts from their rows, processed as far as the committed text decides."""
        given = (logits_BKV, self.draft_temperature_B, uniforms_BK, num_drafts_B)
        if self.processing is None:
            return draw_draft(*given, certain=self.certain_draft)
        return self.processing.draw(*given, self.certain_draft)

    def target_rows(
        self, logits_BLV: Logits, between_BN: Tensor, draft_logits_BKV: Tensor | None, num_drafts_B: Tensor
    ) -> TargetRows:
        """The law of every row, the last one behind all N tokens that follow the text; packed unless edited.

        Draft row i is mixed into target row i where a request mixes and has a draft there; None: no rows.
        """
        cut = None if self.processing is None else self.processing.cut
        is_mixed = self.is_mixed and draft_logits_BKV is not None
        rows: LogitRows | PackedRows
        if isinstance(logits_BLV, PackedLogits) and not is_mixed:
            rows = PackedRows(logits_BLV, self.temperature_B, self.has_greedy, cut)
        else:
            rows = LogitRows(rectangle(logits_BLV), self.temperature_B, self.has_greedy, cut)
            if is_mixed and draft_logits_BKV is not None and draft_logits_BKV.shape[1]:
                rows = replace(rows, mix=Mix(draft_logits_BKV, self.weight_B, num_drafts_B))
        if self.processing is None:
            return TargetRows(rows, None)
        return self.processing.target_rows(rows, between_BN, num_drafts_B)

    def note_empty(self, is_empty_B: Tensor, why: str) -> None:
        """What was settled there is no token that a guide or a processor may be asked to go by."""
        if self.processing is not None and self.processing.is_edited_by_host:
            (is_empty,) = fetch([is_empty_B])
            for slot in np.flatnonzero(is_empty).tolist():
                self.failed.setdefault(slot, why)

    def policy_logprobs(self, logits: Sequence[Logits], verdict: Verdict) -> Tensor:
        """Of every committed token under the policy, float64 (B, L); `logits` are all rows, in parts.

        Where a request draws from the policy they are those of the law it was drawn from, bit for bit. Cells
        behind the committed tokens hold no log-probability of the policy.
        """
        logprobs_BL = verdict.behavior_logprobs_BL
        if self.is_policy_B is None:
            return logprobs_BL
        offsets_L = torch.arange(logprobs_BL.shape[1], device=logprobs_BL.device)
        is_asked_BL = (offsets_L < verdict.num_committed_B[:, None]) & ~self.is_policy_B[:, None]
        computed_BL = chosen_logprobs(logits, is_asked_BL, verdict.token_ids_BL, self.temperature_B)
        return torch.where(is_asked_BL, computed_BL, logprobs_BL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Processing:
    """Edits and truncation of a batch; per request, float64 (B,)."""

    texts: Sequence[Text]
    cut: Cut | None  # None: no request is truncated,
    touched: Touched | None  # no bias or penalty changes any logit,
    forbidden: Forbidden | None  # and no token is forbidden
    is_edited_by_host: bool  # whether any request's rows are edited one at a time
    may_be_empty: bool  # whether a row may have no token left
    failed: dict[int, str]

    @classmethod
    def of(
        cls, texts: Sequence[Text], vocab_size: int, device: torch.device, failed: dict[int, str]
    ) -> "_Processing":
        samplings = [text.sampling for text in texts]
        cuts = [(each.top_k, each.top_p, each.min_p) for each in samplings]
        is_forbidding = any(text.is_forbidding for text in texts)
        is_edited_by_host = any(text.is_edited_by_host for text in texts)
        # As many biases as tokens may leave none.
        is_biased = any(len(sampling.logit_bias) >= vocab_size for sampling in samplings)
        return cls(
            texts=texts,
            cut=_cut(tuple(cuts), device) if any(each != _UNCUT for each in cuts) else None,
            touched=Touched.of(texts, device) if is_touched(texts) else None,
            forbidden=Forbidden.of(texts, device) if is_forbidding else None,
            is_edited_by_host=is_edited_by_host,
            may_be_empty=is_forbidding or is_edited_by_host or is_biased,
            failed=failed,
        )

    def draw(
        self,
        logits_BKV: Tensor,
        temperature_B: Tensor,
        uniforms_BK: Uniforms,
        num_drafts_B: Tensor,
        certain: Tensor | bool,
    ) -> Draft:
        """As `Laws.draw`, of rows that are still to be edited."""
        edits: Edits | None = None
        law = LogitRows(logits_BKV, temperature_B, certain is not False, self.cut)
        no_tokens_B0 = torch.empty((len(self.texts), 0), dtype=torch.int64, device=uniforms_BK.device)
        if self.touched is not None:
            edits = self.touched.edits(law, no_tokens_B0)
        if not self.may_be_empty or not law.shape[1]:
            given = (logits_BKV, temperature_B, uniforms_BK, num_drafts_B)
            return draw_draft(*given, cut=self.cut, edits=edits, certain=certain)
        # One position after another: masks depend on the drafts before.
        rows = replace(law, edits=edits).editable()
        paths = self._paths(num_drafts_B) if self.is_edited_by_host else []
        tokens_BK = no_tokens_B0
        for place in range(rows.shape[1]):
            span = slice(place, place + 1)
            for row, path in paths:
                if row not in self.failed:
                    with self._request(row):
                        path.mask(rows[row, span])
            if self.forbidden is not None:
                self.forbidden.mask_unless_empty(rows[:, span], tokens_BK)
            even_where_empty(rows[:, span])
            given = (rows[:, span], temperature_B, uniforms_BK[:, span], num_drafts_B)
            drawn_B1 = draw_draft(*given, cut=self.cut, certain=certain).token_ids_BK
            tokens_BK = torch.cat([tokens_BK, drawn_B1], dim=1)
            if paths:
                (drawn,) = fetch([drawn_B1])
                for row, path in paths:
                    path.extend(int(drawn[row, 0]))
        return Draft(
            token_ids_BK=tokens_BK,
            law=POINT_MASS if certain is True else replace(law, logits_BLV=rows),
            num_drafts_B=num_drafts_B,
            certain_B=certain if isinstance(certain, Tensor) else None,
        )

    def _paths(self, num_drafts_B: Tensor) -> list[tuple[int, "_DraftPath"]]:
        """Of the requests whose guides go along with their drafts."""
        (num_drafts,) = fetch([num_drafts_B])
        return [
            (row, _DraftPath(text.guide, int(num_drafts[row])))
            for row, text in enumerate(self.texts)
            if text.guide is not None
        ]

    def target_rows(
        self, law: LogitRows | PackedRows, between_BN: Tensor, num_drafts_B: Tensor
    ) -> TargetRows:
        """As `Laws.target_rows`, of rows that are still to be edited."""
        if self.touched is not None:
            law = replace(law, edits=self.touched.edits(law, between_BN))
        if not self.may_be_empty:
            return TargetRows(law, None)
        law = law.padded() if isinstance(law, PackedRows) else law
        rows = law.editable()
        if self.forbidden is not None:
            self.forbidden.mask(rows, between_BN)
        if self.is_edited_by_host:
            self._edit_by_host(rows, between_BN, num_drafts_B)
        is_empty_BL = even_where_empty(rows)
        return TargetRows(replace(law.as_they_are(), logits_BLV=rows), is_empty_BL)

    def _edit_by_host(self, rows: Tensor, between_BN: Tensor, num_drafts_B: Tensor) -> None:
        """Edit, in place, what guides and processors say; where there are drafts, these are waited for."""
        behind: Iterable[tuple[list[int], int]] = itertools.repeat(([], 1))
        if between_BN.shape[1]:
            between, num_drafts = fetch([between_BN, num_drafts_B])
            behind = zip(between.tolist(), (num_drafts + 1).tolist(), strict=True)
        for row, (rows_LV, text, (between_N, num_reached)) in enumerate(
            zip(rows, self.texts, behind, strict=False)
        ):
            if row in self.failed:
                rows_LV[0] = -torch.inf
            elif text.is_edited_by_host:
                reached_LV = rows_LV[:num_reached]
                num_between = len(between_N) - (len(rows_LV) - len(reached_LV))
                with self._request(row):
                    _edit_rows(reached_LV, text, between_N[:num_between])

    @contextmanager
    def _request(self, row: int) -> Iterator[None]:
        """Around what a request brings along: what it raises is that request's failure alone."""
        try:
            yield
        except RequestFailed as error:
            self.failed[row] = f"{RequestFailed.__name__}: {error}"


@lru_cache(maxsize=256)
def _columns(scales: tuple[tuple[float, float, float], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, draft temperature and weight, float64 (B,): mostly those of the step before."""
    return tuple(torch.tensor(scales, dtype=torch.float64, device=device).T.contiguous())


@lru_cache(maxsize=256)
def _flags(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Bool (B,)."""
    return torch.tensor(flags, device=device)


_UNCUT = (0, 1, 0)  # top-k, top-p and min-p that are off


@lru_cache(maxsize=256)
def _cut(cuts: tuple[tuple[float, float, float], ...], device: torch.device) -> Cut:
    """That of the batch."""
    top_k, top_p, min_p = torch.tensor(cuts, dtype=torch.float64, device=device).T.contiguous()
    return Cut(top_k, top_p, min_p, is_everywhere=_UNCUT not in cuts)


def _edit_rows(rows_LV: Tensor, text: Text, between: Sequence[int]) -> None:
    """Edit, in place, the rows of one request that can be reached, the last one behind all of `between`."""
    first = len(between) - (len(rows_LV) - 1)
    if text.guide is not None:
        try:
            allowed_NV = allowed_rows(text.guide, between, first, rows_LV.shape[1])
        except RequestFailed:
            rows_LV[0] = -torch.inf
            raise
        # Rows behind a draft that is not allowed are never reached: that draft is rejected.
        rows_LV = rows_LV[: len(allowed_NV)]
        rows_LV.masked_fill_(~allowed_NV.to(rows_LV.device, non_blocking=True), -torch.inf)
    if not text.sampling.logits_processors:
        return
    for num_drafts, row_V in enumerate(rows_LV, start=first):
        try:
            ids_1T = text.ids(between[:num_drafts], row_V.device)
            row_V.copy_(processed(text.sampling.logits_processors, ids_1T, row_V))
        except RequestFailed:
            row_V.fill_(-torch.inf)  # a row behind a draft that is rejected fails nobody
            raise


class _DraftPath:
    """The drafts of one request as they are drawn: its guide goes along with them."""

    def __init__(self, guide: Guide, num_drafts: int) -> None:
        self._guide = guide
        self._num_drafts = num_drafts  # rows behind them hold no meaning
        self._drafts: list[int] = []
        self._allowed_V: Tensor | None = None  # behind the drafts so far
        self._is_allowed = True  # whether the guide allows all of them

    def mask(self, row_1V: Tensor) -> None:
        """Leave out, in place, what is certain to be rejected; of a row that would be empty, nothing."""
        if len(self._drafts) >= self._num_drafts or not self._is_allowed:
            return
        self._allowed_V = allowed_rows(self._guide, self._drafts, len(self._drafts), row_1V.shape[1])[0]
        if self._allowed_V.any():
            row_1V.masked_fill_(~self._allowed_V.to(row_1V.device, non_blocking=True), -torch.inf)

    def extend(self, token_id: int) -> None:
        """This draft was drawn."""
        if self._allowed_V is not None:
            self._is_allowed = self._is_allowed and bool(self._allowed_V[token_id])
        self._drafts.append(token_id)
