"""What ops refuse at their doors: asked on the host, of shapes and types alone, so no device is waited for.

Shapes: B requests, L rows, K drafted tokens, N rows in all, U edited tokens, V vocabulary.
"""

import torch
from torch import Tensor

from blockroll.errors import InvalidInput
from blockroll.kernels.philox import Uniforms
from blockroll.kernels.rows.edits import Edits, Mix
from blockroll.kernels.rows.logit_rows import LogitRows
from blockroll.kernels.rows.packed import PackedRows
from blockroll.kernels.rows.truncation import Cut
from blockroll.types import Rows

_LOGITS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_columns(name: str, given: Uniforms, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise InvalidInput unless this is a tensor of such a shape and type."""
    if given.dtype != dtype or given.shape != shape:
        raise InvalidInput(f"{name} is {_form(given)}: give {_name(dtype)} {shape}")


def check_rows(name: str, rows: Rows | Tensor, shape: tuple[int, int, int]) -> None:
    """Raise InvalidInput unless these are laws of (B, L) positions over V tokens, whose parts fit them."""
    if tuple(rows.shape) != shape:
        raise InvalidInput(f"{name} has shape {tuple(rows.shape)}: give {shape}, a row for each position")
    if isinstance(rows, Tensor):
        if rows.dtype != torch.float64:
            raise InvalidInput(f"{name} is {_form(rows)}: give float64 probabilities, or rows of logits")
    elif isinstance(rows, LogitRows):
        _check_parts(name, rows.logits_BLV, rows.temperature_B, rows.cut, rows.edits, shape)
        if rows.mix is not None:
            _check_mix(name, rows.mix, shape)
    elif isinstance(rows, PackedRows):
        _check_parts(name, rows.packed.logits_NV, rows.temperature_B, rows.cut, rows.edits, shape)


def _check_parts(
    name: str,
    logits: Tensor,
    temperature_B: Tensor,
    cut: Cut | None,
    edits: Edits | None,
    shape: tuple[int, int, int],
) -> None:
    if logits.dtype not in _LOGITS:
        allowed = ", ".join(_name(each) for each in _LOGITS)
        raise InvalidInput(f"{name} has logits of {_name(logits.dtype)}: give one of {allowed}")
    size, num_rows, _ = shape
    if temperature_B.shape != (size,) or not temperature_B.is_floating_point():
        raise InvalidInput(f"{name} has temperatures {_form(temperature_B)}: give float64 {(size,)}")
    if cut is not None and not all(each.shape == (size,) for each in cut[:3]):
        given = ", ".join(_form(each) for each in cut[:3])
        raise InvalidInput(f"{name} has top-k, top-p and min-p {given}: give each as float64 {(size,)}")
    if edits is not None:
        ids_BU, logits_BLU = edits
        if ids_BU.dtype != torch.int64 or logits_BLU.shape != (size, num_rows, *ids_BU.shape[1:]):
            raise InvalidInput(
                f"{name} has edited tokens {_form(ids_BU)} with logits {_form(logits_BLU)}: give int64 "
                f"({size}, U) and float64 ({size}, {num_rows}, U)"
            )


def _check_mix(name: str, mix: Mix, shape: tuple[int, int, int]) -> None:
    size, num_rows, vocab_size = shape
    drafts = mix.draft_logits_BKV
    is_fit = len(drafts) == size and drafts.shape[1] <= num_rows and drafts.shape[2] == vocab_size
    if not is_fit or mix.weight_B.shape != (size,) or mix.num_drafts_B.shape != (size,):
        raise InvalidInput(
            f"{name} mixes draft rows {_form(drafts)} by weights {_form(mix.weight_B)} and numbers of drafts "
            f"{_form(mix.num_drafts_B)}: give ({size}, at most {num_rows}, {vocab_size}), {(size,)} and "
            f"{(size,)}"
        )


def _form(given: Uniforms) -> str:
    return f"{_name(given.dtype)} {tuple(given.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
