"""The attention of kernels/layers, as every kind of processor computes it that this one can stand in for."""

from ctypes import addressof

import pytest
import torch

from blockroll.kernels.layers.build import Model
from tests.numerics.test_layer_products import NEEDS, library_for

BATCH, KEY_HEADS, ROOM = 2, 2, 120


def attended(library, query_BHRD, keys_BGSD, values_BGSD, sees_BRS, num_keys, *, cap, num_threads):
    """(B, R, H, D)."""
    batch, heads, rows, width = query_BHRD.shape
    model = Model(heads=heads, key_heads=keys_BGSD.shape[1], head_width=width)
    out = query_BHRD.new_full((batch, rows, heads, width), torch.nan)
    space = torch.full((batch * heads * rows * (num_keys + 4 + width),), torch.nan)
    library.attend(
        addressof(model), query_BHRD.data_ptr(), keys_BGSD.data_ptr(), values_BGSD.data_ptr(), batch, rows,
        num_keys, keys_BGSD.stride(0), keys_BGSD.stride(1), sees_BRS.data_ptr(), rows, rows * num_keys,
        width**-0.5, cap, space.data_ptr(), out.data_ptr(), num_threads,
    )  # fmt: skip
    return out


def definition(query_BHRD, keys_BGSD, values_BGSD, sees_BRS, *, cap):
    group = query_BHRD.shape[1] // keys_BGSD.shape[1]
    keys, values = (each.double().repeat_interleave(group, dim=1) for each in (keys_BGSD, values_BGSD))
    scores = query_BHRD.double() @ keys.transpose(2, 3) * query_BHRD.shape[-1] ** -0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    weights = scores.masked_fill(~sees_BRS.bool()[:, None], -torch.inf).softmax(dim=-1)
    return (weights @ values).transpose(1, 2)


@pytest.mark.parametrize("processor", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("group", "rows", "width", "cap"), [(1, 1, 64, 0.0), (3, 1, 64, 0.0), (3, 5, 64, 3.0), (2, 9, 48, 0.0)]
)
def test_rows_attend_to_the_keys_that_they_see(processor, dtype, group, rows, width, cap):
    """Of any number, the first ones unseen by some texts, in room for more whose numbers are nobody's."""
    library = library_for(dtype, processor)
    torch.manual_seed(width + rows)
    query = torch.randn(BATCH, group * KEY_HEADS, rows, width).to(dtype)
    for num_keys in (rows, 31 + rows, 64, 97, 111):
        keys, values = (torch.randn(BATCH, KEY_HEADS, ROOM, width).to(dtype) for _ in range(2))
        sees = torch.ones(BATCH, rows, num_keys, dtype=torch.uint8).tril(num_keys - rows)
        sees[1, :, : min(37, num_keys - rows)] = 0
        keys[:, :, num_keys:], values[:, :, num_keys:] = torch.nan, torch.nan
        for num_threads in (1, 2):
            given = (query, keys, values, sees)
            found = attended(library, *given, num_keys, cap=cap, num_threads=num_threads).double()
            held = (keys[:, :, :num_keys], values[:, :, :num_keys])
            expected = definition(query, *held, sees, cap=cap)
            bound = torch.finfo(torch.float32).eps * (width + num_keys)
            allowed = bound * (1 + expected.abs()) + torch.finfo(dtype).eps * expected.abs()
            assert ((found - expected).abs() <= allowed).all(), (num_keys, num_threads)
