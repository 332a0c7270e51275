"""Laws of rows of logits by compiled code, `rows.c`: drawn from and read without a row of probabilities.

The definition is the torch code beside it (`logit_rows.py`), which serves where this does not: other devices,
other types than float32, no compiler.

Shapes: B requests, L rows of each, K drafts, N rows that are asked for, A tokens asked for of each, U edited
tokens, V vocabulary.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from blockroll.errors import MissingDependency
from blockroll.kernels.compiler import built

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("rows.c")
_NUMBERS = {
    "request_stride", "offset_stride", "vocab", "draft_request_stride", "draft_offset_stride", "num_edits",
    "edit_stride",
}  # fmt: skip


class _Rows(ctypes.Structure):
    """`rows` of the source; addresses are None where there is nothing."""

    _fields_ = [
        (name, ctypes.c_int64 if name in _NUMBERS else ctypes.c_void_p)
        for name in (
            "logits", "request_stride", "offset_stride", "vocab", "starts", "num_rows", "temperature",
            "top_k", "top_p", "min_p", "draft", "draft_request_stride", "draft_offset_stride", "weight",
            "num_drafts", "edit_ids", "edit_values", "num_edits", "edit_stride",
        )
    ]  # fmt: skip


class At(NamedTuple):
    """Which rows: each of a request and at an offset."""

    requests_N: Tensor  # int64
    offsets_N: Tensor


class Looked(NamedTuple):
    """What rows gave, float64 (N,): the token that a uniform drew, by inverse CDF, and where it was found."""

    token_ids_N: Tensor  # int64; of no meaning, as all but the last, where no uniform was given
    probs_N: Tensor  # of the token under the law of its row
    low_N: Tensor  # what lies before it in what it was drawn from,
    high_N: Tensor  # that with its own,
    mass_N: Tensor  # and all
    asked_NA: Tensor  # probabilities of the tokens that were asked for


class Judged(NamedTuple):
    """What became of the drafts of each request."""

    target_p_BK: Tensor  # of each draft that was looked at under its row, float64; NaN behind them
    num_accepted_B: Tensor  # int64
    final: Looked  # the token behind them; NaN where none was drawn


@cache
def rows_library() -> ctypes.CDLL | None:
    """The compiled code; None, and a warning, where no compiler builds it."""
    try:
        library = built(SOURCE)
    except MissingDependency as missing:
        logger.warning("tokens are drawn without compiled code, which is slower on this CPU: %s", missing)
        return None
    number, at, switch = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.rows_dense.argtypes = [at, at, at, number, number, at, switch]
    library.rows_drawn.argtypes = [*[at] * 3, *[number] * 2, *[at] * 2, number, switch, *[at] * 2, switch]
    library.rows_judged.argtypes = [*[at] * 2, *[number] * 3, *[at] * 4, number, *[at] * 5, switch]
    for function in (library.rows_dense, library.rows_drawn, library.rows_judged):
        function.restype = ctypes.c_int64
    return library


class RowTable:
    """Rows of float32 logits on a CPU, and what makes laws of them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        logits: Tensor,
        temperature_B: Tensor,
        *,
        packed: tuple[Tensor, Tensor] | None = None,
        cut: tuple[Tensor, Tensor, Tensor] | None = None,
        mix: tuple[Tensor, Tensor, Tensor] | None = None,
        edits: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`logits` (B, L, V), or (R, V) with first rows and numbers of rows (B,) in `packed`.

        `cut` is top-k, top-p and min-p, float64 (B,); `mix` draft logits (B, K, V), weights and numbers of
        drafts (B,); `edits` ids (B, U) and what stands there instead, float64 (B, L, U).
        """
        self._library, self._vocab_size = library, logits.shape[-1]
        self._kept: list[Tensor] = [logits]  # as long as their addresses are
        here = _Rows(logits=logits.data_ptr(), vocab=self._vocab_size)
        here.temperature = self._address(temperature_B, torch.float64)
        if packed is None:
            here.request_stride, here.offset_stride = logits.stride()[:2]
        else:
            here.offset_stride = logits.stride(0)
            here.starts, here.num_rows = (self._address(each, torch.int64) for each in packed)
        if cut is not None:
            here.top_k, here.top_p, here.min_p = (self._address(each, torch.float64) for each in cut)
        if mix is not None:
            draft_BKV, weight_B, num_drafts_B = mix
            self._kept.append(draft_BKV)
            here.draft = draft_BKV.data_ptr()
            here.draft_request_stride, here.draft_offset_stride = draft_BKV.stride()[:2]
            here.weight = self._address(weight_B, torch.float64)
            here.num_drafts = self._address(num_drafts_B.clamp(max=draft_BKV.shape[1]), torch.int64)
        if edits is not None:
            ids_BU, values_BLU = edits
            here.edit_ids = self._address(ids_BU, torch.int64)
            here.edit_values = self._address(values_BLU, torch.float64)
            here.num_edits, here.edit_stride = ids_BU.shape[1], values_BLU[0].numel()
        self._rows = here

    def dense(self, at: At | int, num_requests: int) -> Tensor:
        """All probabilities, float64 (N, V)."""
        places, count, _ = self._places(at, num_requests)
        probs_NV = torch.empty((count, self._vocab_size), dtype=torch.float64)
        lacking = self._library.rows_dense(
            ctypes.addressof(self._rows), *places, count, probs_NV.data_ptr(), torch.get_num_threads()
        )
        self._check_memory(lacking)
        return probs_NV

    def looked(
        self,
        at: At | int,
        num_requests: int,
        uniforms: Tensor | None = None,
        asked_NA: Tensor | None = None,
        *,
        logs: bool = False,
    ) -> Looked:
        """Of named rows, or of so many first ones of each request, one request after another.

        `uniforms` draw, one for each row; `logs`: what is asked for comes as natural logarithms, of rows
        that are neither cut, edited, mixed nor greedy, also where a probability is too small for float64.
        """
        places, count, kept = self._places(at, num_requests)
        num_asked = 0 if asked_NA is None else asked_NA.shape[-1]
        ids_N = torch.empty(count, dtype=torch.int64)
        figures = torch.empty((count, 4 + num_asked), dtype=torch.float64)
        given = [
            None if each is None else _as(each, dtype)
            for each, dtype in ((uniforms, torch.float64), (asked_NA, torch.int64))
        ]
        lacking = self._library.rows_drawn(
            ctypes.addressof(self._rows),
            *places,
            count,
            *(None if each is None else each.data_ptr() for each in given),
            num_asked,
            int(logs),
            ids_N.data_ptr(),
            figures.data_ptr(),
            torch.get_num_threads(),
        )
        del kept
        self._check_memory(lacking)
        return _looked(ids_N, figures)

    def judged(
        self,
        draft: "RowTable",
        token_ids_BK: Tensor,
        draft_p_BK: Tensor,
        num_drafts_B: Tensor,
        coins_BK: Tensor,
        uniforms_B: Tensor,
        *,
        num_rows: int,
    ) -> Judged:
        """Drafts against the first rows of each request, up to the first that coin * draft < target rejects.

        A request of which all these rows' drafts stand draws no token in them.
        """
        size, num_drafts = token_ids_BK.shape
        target_p_BK = torch.full((size, num_drafts), torch.nan, dtype=torch.float64)
        num_accepted_B, ids_B = torch.empty(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        figures_B4 = torch.full((size, 4), torch.nan, dtype=torch.float64)
        given = [
            *(_as(each, torch.int64) for each in (token_ids_BK, num_drafts_B)),
            *(_as(each, torch.float64) for each in (draft_p_BK, coins_BK, uniforms_B)),
        ]
        ids, counts, draft_p, coins, uniforms = (each.data_ptr() for each in given)
        lacking = self._library.rows_judged(
            *(ctypes.addressof(self._rows), ctypes.addressof(draft._rows), size, num_drafts, num_rows),
            *(ids, draft_p, counts, coins, given[3].stride(0), uniforms),
            *(each.data_ptr() for each in (target_p_BK, num_accepted_B, ids_B, figures_B4)),
            torch.get_num_threads(),
        )
        self._check_memory(lacking)
        return Judged(target_p_BK, num_accepted_B, _looked(ids_B, figures_B4))

    def _check_memory(self, lacking: int) -> None:
        """MemoryError where a thread did not get so many bytes; 0: all have."""
        if lacking:
            raise MemoryError(
                f"can't allocate memory: {lacking} bytes for a row of {self._vocab_size} logits of a thread"
            )

    def _places(
        self, at: At | int, num_requests: int
    ) -> tuple[tuple[int | None, int | None, int], int, list[Tensor]]:
        """What names rows, how many they are, and what must outlive the call."""
        if isinstance(at, int):
            return (None, None, at), num_requests * at, []
        kept = [_as(each, torch.int64) for each in at]
        return (kept[0].data_ptr(), kept[1].data_ptr(), 1), len(kept[0]), kept

    def _address(self, values: Tensor, dtype: torch.dtype) -> int:
        values = _as(values, dtype)
        self._kept.append(values)
        return values.data_ptr()


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As the compiled code reads them: it cannot tell another type, nor gaps between numbers."""
    return values.to(dtype).contiguous()


def _looked(ids_N: Tensor, figures: Tensor) -> Looked:
    probs_N, low_N, high_N, mass_N = figures[:, :4].unbind(dim=1)
    return Looked(ids_N, probs_N, low_N, high_N, mass_N, figures[:, 4:])
