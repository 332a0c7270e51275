"""Where kernels find rows of logits, and what makes laws of them, by cell of requests and their rows.

Rows that are mixed or edited are copied with that in them, as float32 or float64 logits: kernels behind read
rows as they lie.

Shapes: B requests, L rows of each, K drafted tokens, N packed rows, U edited tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.builds import Build
from blockroll.kernels.rows.edits import Edits, Mix
from blockroll.kernels.rows.fused_builds import LOGITS, build
from blockroll.kernels.rows.logit_rows import DenseRows, LogitRows
from blockroll.kernels.rows.packed import PackedLogits, PackedRows
from blockroll.kernels.rows.tiles import Tiled, shape_of
from blockroll.kernels.rows.truncation import Cut
from blockroll.types import Rows

NOWHERE = -1  # stands where a cell has no row, or none that anybody asks for
_TYPES = (torch.float32, torch.bfloat16, torch.float64)
_WIDTH = 4096


@triton.jit(do_not_specialize=["num_rows", "vocab"])
def mix_rows(X, AT, DRAFTED, DRAFTED_AT, WEIGHT, OUT, num_rows, vocab, W: tl.constexpr):
    """Rows as they are, or w of them and 1 - w of a draft row where a draft was met."""
    cell = tl.program_id(0).to(tl.int64)
    ids_W = tl.program_id(1) * W + tl.arange(0, W)
    drafted = tl.load(DRAFTED_AT + cell)
    weight = tl.load(WEIGHT + cell // num_rows)
    x_W = tl.load(X + tl.load(AT + cell) + ids_W, mask=ids_W < vocab, other=0.0).to(OUT.dtype.element_ty)
    d_W = tl.load(DRAFTED + drafted + ids_W, mask=(ids_W < vocab) & (drafted >= 0), other=0.0)
    mixed_W = weight * x_W.to(tl.float64) + (1 - weight) * d_W.to(OUT.dtype.element_ty).to(tl.float64)
    x_W = tl.where(drafted >= 0, mixed_W.to(OUT.dtype.element_ty), x_W)
    tl.store(OUT + cell * vocab + ids_W, x_W, mask=ids_W < vocab)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows as kernels read them: addresses count elements of `logits`, in which ids follow on one another."""

    logits: Tensor
    shape: tuple[int, int, int]  # (B, L, V)
    at_BL: Tensor  # int64: where a row begins; NOWHERE: nobody asks for it
    is_aligned: bool  # whether 16 divides all of these
    temperature_B: Tensor  # float64
    is_dense: bool = False  # whether these are probabilities, float64
    has_greedy: bool = False  # whether any temperature is 0
    cut: Cut | None = None
    tiled: Tiled | None = None  # what kernels know already

    @property
    def is_wide(self) -> bool:
        """Whether kernels compute in float64."""
        return self.logits.dtype == torch.float64

    def read_as(self, dtype: torch.dtype) -> "Source":
        """The same rows in a wider type."""
        if dtype == self.logits.dtype:
            return self
        return replace(self, logits=self.logits.to(dtype), tiled=None)


def plain(rows: LogitRows) -> LogitRows:
    """The same rows, copied if they are mixed or edited."""
    if rows.mix is None and rows.edits is None:
        return rows
    dtype = torch.promote_types(_checked(rows.logits_BLV).dtype, torch.float32)
    if rows.mix is None:
        logits_BLV = rows.logits_BLV.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        logits_BLV = _mixed(rows.logits_BLV, rows.mix, dtype)
    if rows.edits is not None:
        ids_BLU = rows.edits.ids_BU[:, None].expand(rows.edits.logits_BLU.shape)
        logits_BLV.scatter_(2, ids_BLU, _finite(rows.edits, dtype))
    return replace(rows.as_they_are(), logits_BLV=logits_BLV)


def source_of(rows: Rows | Tensor, num_asked_B: Tensor | None = None) -> Source:
    """Of each request the first so many rows; None: all. InvalidInput where kernels cannot read them."""
    if isinstance(rows, LogitRows):
        return _of_logits(plain(rows), num_asked_B)
    if isinstance(rows, PackedRows):
        return _of_packed(rows, num_asked_B)
    if isinstance(rows, DenseRows):
        rows = rows.probs_BLV
    probs_BLV = rows if isinstance(rows, Tensor) else rows.dense()
    temperature_B = torch.ones(len(probs_BLV), dtype=torch.float64, device=probs_BLV.device)
    law = LogitRows(probs_BLV, temperature_B, False)
    return replace(_of_logits(law, num_asked_B), is_dense=True)


def source_of_chosen(logits_BLV: Tensor | PackedLogits, scale_B: Tensor, is_chosen_BL: Tensor) -> Source:
    """The chosen rows alone, at a temperature of each request that is not 0."""
    if isinstance(logits_BLV, PackedLogits):
        source = _of_packed(PackedRows(logits_BLV, scale_B, False), None)
    else:
        source = _of_logits(LogitRows(logits_BLV, scale_B, False), None)
    return replace(source, at_BL=torch.where(is_chosen_BL, source.at_BL, NOWHERE))


def _of_logits(rows: LogitRows, num_asked_B: Tensor | None) -> Source:
    logits_BLV = _checked(rows.logits_BLV)
    size, num_rows, vocab_size = logits_BLV.shape
    request_stride, row_stride, _ = logits_BLV.stride()
    at_BL = _places(size, num_rows, request_stride, row_stride, logits_BLV.device)
    return Source(
        logits=logits_BLV,
        shape=(size, num_rows, vocab_size),
        at_BL=_asked(at_BL, num_asked_B),
        is_aligned=_is_aligned(logits_BLV, request_stride, row_stride),
        temperature_B=rows.temperature_B.double(),
        has_greedy=rows.has_greedy,
        cut=rows.cut,
        tiled=rows.tiled,
    )


def _of_packed(rows: PackedRows, num_asked_B: Tensor | None) -> Source:
    packed, (size, num_rows, vocab_size) = rows.packed, rows.shape
    logits_NV, edits = _checked(packed.logits_NV), rows.edits
    offsets_L = torch.arange(num_rows, device=logits_NV.device)
    row_BL = packed.starts_B[:, None] + offsets_L
    is_row_BL = offsets_L < packed.num_rows_B[:, None]
    if edits is not None:
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        spare = len(logits_NV)  # cells without a row write there
        copied_NV = logits_NV.new_empty((spare + 1, vocab_size), dtype=dtype)
        copied_NV[:spare] = logits_NV
        at_BLU = torch.where(is_row_BL, row_BL, spare)[..., None] * vocab_size + edits.ids_BU[:, None]
        copied_NV.view(-1).scatter_(0, at_BLU.flatten(), _finite(edits, dtype).flatten())
        logits_NV = copied_NV
    stride = logits_NV.stride(0)
    return Source(
        logits=logits_NV,
        shape=(size, num_rows, vocab_size),
        at_BL=_asked(torch.where(is_row_BL, row_BL * stride, NOWHERE), num_asked_B),
        is_aligned=_is_aligned(logits_NV, stride),
        temperature_B=rows.temperature_B.double(),
        has_greedy=rows.has_greedy,
        cut=rows.cut,
    )


def _mixed(logits_BLV: Tensor, mix: Mix, dtype: torch.dtype) -> Tensor:
    """Draft row i enters row i, of requests that mix, where they have a draft there."""
    drafted = _checked(mix.draft_logits_BKV).to(logits_BLV.dtype)
    size, num_rows, vocab_size = logits_BLV.shape
    offsets_L = torch.arange(num_rows, device=drafted.device)
    num_met_B = mix.num_drafts_B.clamp(max=drafted.shape[1])
    is_met_BL = (offsets_L < num_met_B[:, None]) & (mix.weight_B < 1)[:, None]
    at_BL, drafted_at_BL = (
        _places(size, num_rows, *each.stride()[:2], each.device) for each in (logits_BLV, drafted)
    )
    mixed_BLV = torch.empty((size, num_rows, vocab_size), dtype=dtype, device=drafted.device)
    if size * num_rows:
        mix_rows[size * num_rows, triton.cdiv(vocab_size, _WIDTH)](
            *(logits_BLV, at_BL, drafted, torch.where(is_met_BL, drafted_at_BL, NOWHERE)),
            *(mix.weight_B.double(), mixed_BLV, num_rows, vocab_size),
            **_options(),
        )
    return mixed_BLV


def _finite(edits: Edits, dtype: torch.dtype) -> Tensor:
    """Logits that stand instead; what a float32 cannot hold is its largest."""
    return edits.logits_BLU.clamp(max=torch.finfo(dtype).max).to(dtype)


def _checked(logits: Tensor) -> Tensor:
    """InvalidInput unless kernels can read them."""
    if logits.dtype not in _TYPES:
        raise InvalidInput(
            f"logits are {str(logits.dtype).removeprefix('torch.')}: Triton's kernels read float32, bfloat16 "
            "and float64; convert them, or use kernels='reference'"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise InvalidInput(
            f"rows of logits have a stride of {logits.stride(-1)} between ids: Triton's kernels read ids "
            "that follow on one another; give rows that are contiguous"
        )
    shape_of(logits.shape[-1])
    return logits


def _asked(at_BL: Tensor, num_asked_B: Tensor | None) -> Tensor:
    if num_asked_B is None:
        return at_BL
    offsets_L = torch.arange(at_BL.shape[1], device=at_BL.device)
    return torch.where(offsets_L < num_asked_B[:, None], at_BL, NOWHERE)


def _is_aligned(logits: Tensor, *strides: int) -> bool:
    return logits.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


@lru_cache(maxsize=64)
def _places(size: int, num_rows: int, request_stride: int, row_stride: int, device: torch.device) -> Tensor:
    """Where rows of such a rectangle begin, int64 (B, L): made once."""
    requests_B1 = torch.arange(size, device=device)[:, None]
    return requests_B1 * request_stride + torch.arange(num_rows, device=device) * row_stride


def _options() -> dict[str, Any]:
    return {"W": _WIDTH, "num_warps": 8}


def builds() -> Iterator[Build]:
    """Every way in which this kernel ships."""
    for logits in LOGITS:
        yield build(mix_rows, f"mix {logits}", logits, _options())
