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
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from blockroll.errors import RequestFailed
from blockroll.samplers.brought import allowed_rows, processed
from blockroll.samplers.growing import IdBuffer, TokenCounts
from blockroll.samplers.lossless import chosen_logprobs, draw_draft
from blockroll.samplers.packed import Logits, PackedLogits, PackedRows, rectangle
from blockroll.samplers.processing import Cut, completed_by, counts_by_row, even_where_empty, penalize
from blockroll.samplers.rows import LogitRows, Mix, held
from blockroll.types import POINT_MASS, Draft, Guide, Rows, Sampling, Verdict


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

    def counts(self, vocab_size: int, device: torch.device) -> Tensor:
        """How often prompt and completion hold each token, and the completion alone: float64 (2, V)."""
        if self._counts is None:
            self._counts = TokenCounts(self.prompt_ids, vocab_size, device)
        return self._counts.with_completion(self.token_ids)

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
        law = None
        if self.certain_draft is not True:
            has_greedy = self.certain_draft is not False
            law = LogitRows(logits_BKV, self.draft_temperature_B, has_greedy, self.processing.cut)
        drawn = self.processing.draw(logits_BKV, law, uniforms_BK, num_drafts_B)
        return drawn if isinstance(self.certain_draft, bool) else replace(drawn, certain_B=self.certain_draft)

    def target_rows(
        self, logits_BLV: Logits, between_BN: Tensor, draft_logits_BKV: Tensor | None, num_drafts_B: Tensor
    ) -> TargetRows:
        """The law of every row, the last one behind all N tokens that follow the text; packed unless edited.

        Draft row i is mixed into target row i where a request mixes and has a draft there; None: no rows.
        """
        cut = None if self.processing is None else self.processing.cut
        is_edited = self.processing is not None and self.processing.is_editing
        is_mixed = self.is_mixed and draft_logits_BKV is not None
        if isinstance(logits_BLV, PackedLogits) and not (is_edited or is_mixed):
            return TargetRows(PackedRows(logits_BLV, self.temperature_B, self.has_greedy, cut), None)
        rows = LogitRows(rectangle(logits_BLV), self.temperature_B, self.has_greedy, cut)
        if is_mixed and draft_logits_BKV is not None and draft_logits_BKV.shape[1]:
            rows = replace(rows, mix=Mix(draft_logits_BKV, self.weight_B, num_drafts_B))
        if self.processing is None or not is_edited:
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
    penalties_B3: Tensor | None  # repetition, presence, frequency; None: no request has any,
    seen_BV: Tensor | None  # and no counts are needed, of prompt and completion,
    completed_BV: Tensor | None  # and of the completion alone
    bias_BV: Tensor | None
    is_edited_by_row: bool  # whether any request's rows are
    failed: dict[int, str]

    @classmethod
    def of(
        cls, texts: Sequence[Text], vocab_size: int, device: torch.device, failed: dict[int, str]
    ) -> "_Processing":
        samplings = [text.sampling for text in texts]
        cuts = [(each.top_k, each.top_p, each.min_p) for each in samplings]
        cut = Cut(*torch.tensor(cuts, dtype=torch.float64, device=device).unbind(dim=1))
        penalties = [
            (each.repetition_penalty, each.presence_penalty, each.frequency_penalty) for each in samplings
        ]
        penalties_B3 = seen_BV = completed_BV = bias_BV = None
        if any(each != (1, 0, 0) for each in penalties):
            penalties_B3 = torch.tensor(penalties, dtype=torch.float64, device=device)
            counts = [text.counts(vocab_size, device) for text in texts]
            seen_BV, completed_BV = torch.stack(counts, dim=1).unbind()
        if any(each.logit_bias for each in samplings):
            bias_BV = torch.zeros((len(texts), vocab_size), dtype=torch.float64)
            for bias_V, each in zip(bias_BV, samplings, strict=True):
                for token_id, bias in each.logit_bias.items():
                    bias_V[token_id] = bias
            bias_BV = bias_BV.to(device)
        return cls(
            texts=texts,
            cut=cut if any(each != (0, 1, 0) for each in cuts) else None,
            penalties_B3=penalties_B3,
            seen_BV=seen_BV,
            completed_BV=completed_BV,
            bias_BV=bias_BV,
            is_edited_by_row=any(text.is_edited_by_row for text in texts),
            failed=failed,
        )

    def draw(
        self, logits_BKV: Tensor, law: LogitRows | None, uniforms_BK: Tensor, num_drafts_B: Tensor
    ) -> Draft:
        """As `Laws.draw`, by the law of these logits; None draws greedily: no cut moves a point mass."""
        rows = logits_BKV
        if self.is_editing:
            rows = self._edited(rows, torch.empty((len(rows), 0), dtype=torch.int64, device=rows.device))
        paths = [
            (row, _DraftPath(text, num_drafts))
            for row, (text, num_drafts) in enumerate(zip(self.texts, num_drafts_B.tolist(), strict=True))
            if text.is_edited_by_row
        ]
        # All positions at once, or one after another where masks depend on the drafts before.
        width = 1 if paths else max(rows.shape[1], 1)
        tokens: list[Tensor] = []
        drawn_law: Rows | None = None
        for start in range(0, max(rows.shape[1], 1), width):
            span = slice(start, start + width)
            for row, path in paths:
                if row not in self.failed:
                    with self._request(row):
                        path.mask(rows[row, span])
            drawable = rows[:, span]
            if self.is_editing:
                even_where_empty(drawable)
            if law is None:
                tokens.append(drawable.argmax(dim=-1))
            else:
                token_ids, drawn_law = held(replace(law, logits_BLV=drawable)).drawn(uniforms_BK[:, span])
                tokens.append(token_ids)
            if paths:
                drawn = tokens[-1].tolist()
                for row, path in paths:
                    path.extend(drawn[row])
        if law is not None and len(tokens) > 1:
            drawn_law = held(replace(law, logits_BLV=rows))
        return Draft(
            token_ids_BK=torch.cat(tokens, dim=1),
            law=POINT_MASS if drawn_law is None else drawn_law,
            num_drafts_B=num_drafts_B,
        )

    def target_rows(self, law: LogitRows, between_BN: Tensor, num_drafts_B: Tensor) -> TargetRows:
        """As `Laws.target_rows`, of rows that are still to be edited."""
        rows = self._edited(law.logits(), between_BN)
        if self.is_edited_by_row:
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
        return TargetRows(held(replace(law, logits_BLV=rows, mix=None)), is_empty_BL)

    @property
    def is_editing(self) -> bool:
        """Whether any logits change: rows of a batch that is only truncated stay as the forward gave them."""
        return self.is_edited_by_row or self.penalties_B3 is not None or self.bias_BV is not None

    @contextmanager
    def _request(self, row: int) -> Iterator[None]:
        """Around what a request brings along: what it raises is that request's failure alone."""
        try:
            yield
        except RequestFailed as error:
            self.failed[row] = f"{RequestFailed.__name__}: {error}"

    def _edited(self, logits_BLV: Tensor, between_BN: Tensor) -> Tensor:
        """Biases and penalties, on a float64 copy: the logits themselves give the policy's logprobs."""
        rows = logits_BLV.to(torch.float64, copy=True)
        if self.bias_BV is not None:
            rows += self.bias_BV[:, None]
        if self.penalties_B3 is None:
            return rows
        assert self.seen_BV is not None
        assert self.completed_BV is not None
        num_rows = rows.shape[1] if between_BN.shape[1] else 1  # drafts all go by the committed text
        return penalize(
            rows,
            counts_by_row(self.seen_BV, between_BN, num_rows) > 0,
            counts_by_row(self.completed_BV, between_BN, num_rows),
            *self.penalties_B3.unbind(dim=1),
        )


@lru_cache(maxsize=256)
def _columns(scales: tuple[tuple[float, float, float], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, draft temperature and weight, float64 (B,): mostly those of the step before."""
    return torch.tensor(scales, dtype=torch.float64, device=device).unbind(dim=1)


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
