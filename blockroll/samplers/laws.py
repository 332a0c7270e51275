"""The laws of a batch: what each request draws by, drafts by and mixes by, given the rows of a forward.

    target = truncate(softmax(edit(w z_policy + (1 - w) z_draft) / T))

where `edit` adds biases, takes penalties, runs logits processors and masks what must not follow. It is
applied at every position that is verified, with the prefix that position really has: committed text, then the
drafts before it. A draft row is drawn before its prefix is settled: penalties go by the committed text, and
what must not follow is left out as if the drafts before were all to stand. What a draft was drawn from is
recorded, and any draft law is verified exactly.

Shapes: B requests, K drafted tokens, L target rows, N tokens behind the committed text, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from blockroll.errors import RequestFailed
from blockroll.samplers.brought import allowed_rows, processed
from blockroll.samplers.edits import Mix
from blockroll.samplers.lossless import chosen_logprobs, draw_draft
from blockroll.samplers.packed import Logits, PackedLogits, PackedRows, rectangle
from blockroll.samplers.processing import Cut, even_where_empty
from blockroll.samplers.rows import LogitRows, held
from blockroll.samplers.text import Text, edits_of, is_touched
from blockroll.types import POINT_MASS, Draft, Rows, Verdict


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
            else torch.tensor([text.is_policy for text in texts], device=device),
        )

    def draw(self, logits_BKV: Tensor, uniforms_BK: Tensor, num_drafts_B: Tensor) -> Draft:
        """Drafts from their rows, processed as far as the committed text decides."""
        if self.processing is None:
            return draw_draft(
                logits_BKV,
                self.draft_temperature_B,
                uniforms_BK,
                num_drafts_B,
                has_greedy=self.certain_draft is not False,
                all_greedy=self.certain_draft is True,
            )
        law = LogitRows(
            logits_BKV, self.draft_temperature_B, self.certain_draft is not False, self.processing.cut
        )
        return self.processing.draw(law, uniforms_BK, num_drafts_B, self.certain_draft)

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
            return TargetRows(held(rows), None)
        return self.processing.target_rows(rows, between_BN, num_drafts_B)

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
    cut: Cut | None  # None: no request is truncated
    is_touched: bool  # whether biases or penalties change any logit
    is_edited_by_row: bool  # whether any request's rows are edited one at a time
    failed: dict[int, str]

    @classmethod
    def of(
        cls, texts: Sequence[Text], vocab_size: int, device: torch.device, failed: dict[int, str]
    ) -> "_Processing":
        samplings = [text.sampling for text in texts]
        cuts = [(each.top_k, each.top_p, each.min_p) for each in samplings]
        # As many biases as tokens may leave none, and whole rows are looked at for that.
        is_by_row = any(
            text.is_edited_by_row or len(text.sampling.logit_bias) >= vocab_size for text in texts
        )
        return cls(
            texts=texts,
            cut=_cut(tuple(cuts), device) if any(each != (0, 1, 0) for each in cuts) else None,
            is_touched=is_touched(texts),
            is_edited_by_row=is_by_row,
            failed=failed,
        )

    def draw(
        self, law: LogitRows, uniforms_BK: Tensor, num_drafts_B: Tensor, is_certain: Tensor | bool
    ) -> Draft:
        """As `Laws.draw`, by the law of these logits."""
        if self.is_touched:
            no_tokens_B0 = torch.empty((len(self.texts), 0), dtype=torch.int64, device=uniforms_BK.device)
            law = replace(law, edits=edits_of(self.texts, law, no_tokens_B0))
        if not self.is_edited_by_row or not law.shape[1]:
            token_ids_BK, drawn_law = held(law).drawn(uniforms_BK)
            return self._draft(token_ids_BK, drawn_law, num_drafts_B, is_certain)
        # One position after another: masks depend on the drafts before.
        rows, law = law.editable(), law.as_they_are()
        paths = [
            (row, _DraftPath(text, num_drafts))
            for row, (text, num_drafts) in enumerate(zip(self.texts, num_drafts_B.tolist(), strict=True))
            if text.is_edited_by_row
        ]
        tokens: list[Tensor] = []
        for place in range(rows.shape[1]):
            span = slice(place, place + 1)
            for row, path in paths:
                if row not in self.failed:
                    with self._request(row):
                        path.mask(rows[row, span])
            even_where_empty(rows[:, span])
            tokens.append(held(replace(law, logits_BLV=rows[:, span])).drawn(uniforms_BK[:, span])[0])
            drawn = tokens[-1].tolist()
            for row, path in paths:
                path.extend(drawn[row])
        drawn_law = held(replace(law, logits_BLV=rows))
        return self._draft(torch.cat(tokens, dim=1), drawn_law, num_drafts_B, is_certain)

    @staticmethod
    def _draft(token_ids_BK: Tensor, law: Rows, num_drafts_B: Tensor, is_certain: Tensor | bool) -> Draft:
        return Draft(
            token_ids_BK=token_ids_BK,
            law=POINT_MASS if is_certain is True else law,
            num_drafts_B=num_drafts_B,
            certain_B=is_certain if isinstance(is_certain, Tensor) else None,
        )

    def target_rows(
        self, law: LogitRows | PackedRows, between_BN: Tensor, num_drafts_B: Tensor
    ) -> TargetRows:
        """As `Laws.target_rows`, of rows that are still to be edited."""
        if self.is_touched:
            law = replace(law, edits=edits_of(self.texts, law, between_BN))
        if not self.is_edited_by_row:
            return TargetRows(held(law), None)
        law = law.padded() if isinstance(law, PackedRows) else law
        rows = law.editable()
        behind = zip(between_BN.tolist(), (num_drafts_B + 1).tolist(), strict=True)
        for row, (rows_LV, text, (between, num_reached)) in enumerate(
            zip(rows, self.texts, behind, strict=True)
        ):
            if row in self.failed:
                rows_LV[0] = -torch.inf
            elif text.is_edited_by_row:
                reached_LV = rows_LV[:num_reached]
                num_between = len(between) - (len(rows_LV) - len(reached_LV))
                with self._request(row):
                    _edit_rows(reached_LV, text, between[:num_between])
        is_empty_BL = even_where_empty(rows)
        return TargetRows(held(replace(law.as_they_are(), logits_BLV=rows)), is_empty_BL)

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
def _cut(cuts: tuple[tuple[float, float, float], ...], device: torch.device) -> Cut:
    """That of the batch."""
    return Cut(*torch.tensor(cuts, dtype=torch.float64, device=device).T.contiguous())


def _edit_rows(rows_LV: Tensor, text: Text, between: Sequence[int]) -> None:
    """Edit, in place, the rows of one request that can be reached, the last one behind all of `between`."""
    sampling = text.sampling
    first = len(between) - (len(rows_LV) - 1)
    if text.guide is not None:
        try:
            allowed_NV = allowed_rows(text.guide, between, first, rows_LV[0])
        except RequestFailed:
            rows_LV[0] = -torch.inf
            raise
        # Rows behind a draft that is not allowed are never reached: that draft is rejected.
        rows_LV = rows_LV[: len(allowed_NV)]
        rows_LV.masked_fill_(~allowed_NV, -torch.inf)
    for num_drafts, row_V in enumerate(rows_LV, start=first):
        drafts = between[:num_drafts]
        if len(text.token_ids) + num_drafts < sampling.min_tokens:
            row_V[list(text.end_token_ids)] = -torch.inf
        row_V[text.completed_by(drafts)] = -torch.inf
        if sampling.logits_processors:
            try:
                ids_1T = text.ids(drafts, row_V.device)
                row_V.copy_(processed(sampling.logits_processors, ids_1T, row_V))
            except RequestFailed:
                row_V.fill_(-torch.inf)  # a row behind a draft that is rejected fails nobody
                raise


class _DraftPath:
    """The drafts of one request as they are drawn: each is masked by the text and the drafts before it."""

    def __init__(self, text: Text, num_drafts: int) -> None:
        self._text = text
        self._num_drafts = num_drafts  # rows behind them hold no meaning
        self._drafts: list[int] = []
        self._allowed_V: Tensor | None = None  # behind the drafts so far
        self._is_allowed = text.guide is not None  # whether the guide allows all of them

    def mask(self, row_1V: Tensor) -> None:
        """Leave out, in place, what is certain to be rejected; of a row that would be empty, nothing."""
        if len(self._drafts) >= self._num_drafts:
            return
        text, sampling = self._text, self._text.sampling
        mask_V = torch.zeros_like(row_1V[0], dtype=torch.bool)
        if self._is_allowed and text.guide is not None:
            self._allowed_V = allowed_rows(text.guide, self._drafts, len(self._drafts), mask_V)[0]
            mask_V |= ~self._allowed_V
        mask_V[text.completed_by(self._drafts)] = True
        if len(text.token_ids) + len(self._drafts) < sampling.min_tokens:
            mask_V[list(text.end_token_ids)] = True
        if not mask_V.all():
            row_1V.masked_fill_(mask_V, -torch.inf)

    def extend(self, token_ids: Sequence[int]) -> None:
        """These drafts were drawn: one, or none."""
        for token_id in token_ids:
            if self._allowed_V is not None:
                self._is_allowed = self._is_allowed and bool(self._allowed_V[token_id])
            self._drafts.append(token_id)
