"""`cache_write` in Triton: keys and values of all rows in one launch, turned by their positions on the way.

Shapes: B requests, G key heads, R new rows, C of them written to pages, M masks behind those, D head width; a
program writes E heads of one row, in halves of D / 2.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockroll.kernels.builds import Build
from blockroll.kernels.cache_write import reference
from blockroll.kernels.cache_write.reference import Places
from blockroll.kernels.pages import HEAD_WIDTHS, Pages

_NUMBERS = 1024  # of one tensor, of a program: of each half 16 bytes of bfloat16 for 64 threads
_NUM_WARPS = 2
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_UNSPECIALIZED = ("num_rows", "num_placed", "num_heads", "has_gaps")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def write_rows(
    KEY, VALUE, COS, SIN, KEYS, VALUES, PAGE, ROW, SPARE_KEYS, SPARE_VALUES,
    key_b, key_g, key_r, value_b, value_g, value_r, angle_b, angle_r, page_n, page_g, page_z,
    spare_b, spare_g, spare_r, num_rows, num_placed, num_heads, has_gaps,
    D: tl.constexpr, HEADS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Each row of `KEY` and `VALUE` to its page or to scratch; rotated keys to `KEY` as well."""
    request = (tl.program_id(0) // num_rows).to(tl.int64)
    row = tl.program_id(0) % num_rows
    head_E1 = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_head_E1 = head_E1 < num_heads
    HALF: tl.constexpr = D // 2
    at_H = tl.arange(0, HALF)[None, :]

    from_EH = request * key_b + row.to(tl.int64) * key_r + head_E1.to(tl.int64) * key_g + at_H
    first_EH = tl.load(KEY + from_EH, mask=is_head_E1, other=0.0)
    second_EH = tl.load(KEY + from_EH + HALF, mask=is_head_E1, other=0.0)
    if ROTATED:
        angle_H = request * angle_b + row.to(tl.int64) * angle_r + at_H
        wide_first_EH, wide_second_EH = first_EH.to(tl.float32), second_EH.to(tl.float32)
        first_EH = _turned(wide_first_EH, -wide_second_EH, COS + angle_H, SIN + angle_H)
        second_EH = _turned(wide_second_EH, wide_first_EH, COS + angle_H + HALF, SIN + angle_H + HALF)
        tl.debug_barrier()  # all of a row is read before any of it is overwritten
        tl.store(KEY + from_EH, first_EH, mask=is_head_E1)
        tl.store(KEY + from_EH + HALF, second_EH, mask=is_head_E1)

    is_placed = row < num_placed
    at = request * num_placed + row
    page = tl.load(PAGE + at, mask=is_placed, other=1)
    page_row = tl.load(ROW + at, mask=is_placed, other=0)
    is_nobodys = (has_gaps != 0) & (page == 0)
    place_EH = page * page_n + page_row * page_z + head_E1.to(tl.int64) * page_g + at_H
    spare_row = (row - num_placed).to(tl.int64)
    spare_EH = request * spare_b + spare_row * spare_r + head_E1.to(tl.int64) * spare_g + at_H
    to_page, to_spare = is_head_E1 & is_placed, is_head_E1 & (row >= num_placed)
    _put(KEYS, SPARE_KEYS, place_EH, spare_EH, first_EH, is_nobodys, to_page, to_spare)
    _put(KEYS, SPARE_KEYS, place_EH + HALF, spare_EH + HALF, second_EH, is_nobodys, to_page, to_spare)
    from_EH = request * value_b + row.to(tl.int64) * value_r + head_E1.to(tl.int64) * value_g + at_H
    value_EH = tl.load(VALUE + from_EH, mask=is_head_E1, other=0.0)
    _put(VALUES, SPARE_VALUES, place_EH, spare_EH, value_EH, is_nobodys, to_page, to_spare)
    value_EH = tl.load(VALUE + from_EH + HALF, mask=is_head_E1, other=0.0)
    _put(VALUES, SPARE_VALUES, place_EH + HALF, spare_EH + HALF, value_EH, is_nobodys, to_page, to_spare)


@triton.jit
def _turned(x, across, COS, SIN):
    """x * cos + across * sin in the type of cosines; products are rounded as a model's are, in that type."""
    kind = COS.dtype.element_ty
    kept = (x * tl.load(COS).to(tl.float32)).to(kind).to(tl.float32)
    return (kept + (across * tl.load(SIN).to(tl.float32)).to(kind).to(tl.float32)).to(kind)


@triton.jit
def _put(HELD, SPARE, place, spare_place, x, is_nobodys, to_page, to_spare):
    """Half a row to where it belongs; of one that is nobody's, zeros."""
    kept = tl.where(is_nobodys, 0.0, x.to(tl.float32))
    tl.store(HELD + place, kept.to(HELD.dtype.element_ty), mask=to_page)
    tl.store(SPARE + spare_place, x.to(SPARE.dtype.element_ty), mask=to_spare)


def write(
    key_BGRD: Tensor,
    value_BGRD: Tensor,
    pages: Pages,
    places: Places,
    scratch: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """As the operation says."""
    size, heads, rows, width = key_BGRD.shape
    if not key_BGRD.numel():
        return
    held = pages.keys_NGZD
    if rotary is not None and key_BGRD.dtype != held.dtype:  # under autocast, where some norms give float32
        key_BGRD.copy_(reference.rotated(key_BGRD, *rotary))
        rotary = None
    key, value = (_aligned(each.to(held.dtype)) for each in (key_BGRD, value_BGRD))
    cos, sin = (key[:, 0], key[:, 0]) if rotary is None else _alike(rotary)
    spare = (key, value) if scratch is None else _alike(scratch)
    block = _NUMBERS // width
    write_rows[(size * rows, triton.cdiv(heads, block))](
        key, value, cos, sin, held, pages.values_NGZD, places.page_BC, places.row_BC, *spare,
        *key.stride()[:3], *value.stride()[:3], *cos.stride()[:2], *held.stride()[:3], *spare[0].stride()[:3],
        rows, places.page_BC.shape[1], heads, int(places.has_gaps),
        D=width, HEADS=block, ROTATED=rotary is not None, num_warps=_NUM_WARPS,
    )  # fmt: skip
    if rotary is not None and key is not key_BGRD:
        key_BGRD.copy_(key)
    if scratch is not None and spare is not scratch:
        for own, given in zip(spare, scratch, strict=True):
            given.copy_(own)


def _aligned(tensor: Tensor) -> Tensor:
    """As kernels are compiled for: rows are contiguous and begin at multiples of 16."""
    *outer, inner = tensor.stride()
    is_aligned = inner == 1 and not any(each % 16 for each in outer) and tensor.data_ptr() % 16 == 0
    return tensor if is_aligned else tensor.contiguous()


def _alike(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both laid out alike, and aligned; themselves where they are."""
    first, second = pair
    if first.stride() == second.stride() and _aligned(first) is first and _aligned(second) is second:
        return pair
    return first.contiguous(), second.contiguous()


def builds() -> Iterator[Build]:
    """For all types and widths, with and without rotation."""
    for name in _TYPES.values():
        for width in HEAD_WIDTHS:
            for is_rotated in (False, True):
                constants = {"D": width, "HEADS": _NUMBERS // width, "ROTATED": is_rotated}
                types = {
                    each: "constexpr"
                    if each in constants
                    else "i32"
                    if each.islower()
                    else "*i64"
                    if each in ("PAGE", "ROW")
                    else f"*{name}"
                    for each in write_rows.arg_names
                }
                yield Build(
                    label=f"{name} width {width}{' rotated' * is_rotated}",
                    kernel=write_rows,
                    types=types,
                    constants=constants,
                    num_warps=_NUM_WARPS,
                    aligned=frozenset(types.keys() - constants.keys() - set(_UNSPECIALIZED)),
                )
