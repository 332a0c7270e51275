"""On a GPU attention gives the same bits beside whatever else, and keys are turned as models turn them."""

import pytest
import torch

from blockroll.kernels.block_attention import Packing, block_attention
from blockroll.kernels.cache_write import cache_write, places_of
from blockroll.kernels.choice import using
from blockroll.kernels.pages import Pages
from blockroll.policies.layout import causal_rows, fused_rows

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
LENGTHS = (0, 17, 300, 5000)
EACH_TYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(layout, dtype, heads=(8, 2), width=128):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(GPU, dtype)

    table_BT = torch.randperm(4 * 320, generator=generator).view(4, 320).to(GPU) + 1
    keys, values = (normal(4 * 320 + 1, heads[1], 16, width) for _ in range(2))
    new = [normal(4, each, layout.num_rows, width) for each in (heads[0], heads[1], heads[1])]
    return new, Pages(keys_NGZD=keys, values_NGZD=values, table_BT=table_BT)


def attended(new, pages, layout, lengths=LENGTHS, **options):
    with using("triton"):
        return block_attention(*new, pages, layout, torch.tensor(lengths, device=GPU), **options)


@EACH_TYPE
@pytest.mark.parametrize("layout", [causal_rows(1), fused_rows(3, (0, 3)), causal_rows(200)], ids=str)
@pytest.mark.parametrize("window", [None, 1000])
def test_a_request_alone_is_the_same_bit_for_bit(layout, dtype, window):
    new, pages = drawn(layout, dtype)
    together = attended(new, pages, layout, sliding_window=window)
    for request, length in enumerate(LENGTHS):
        own = slice(request, request + 1)
        used = Pages(
            keys_NGZD=pages.keys_NGZD,
            values_NGZD=pages.values_NGZD,
            table_BT=pages.table_BT[own, : max(1, -(-length // 16))],
        )
        found = attended([each[own] for each in new], used, layout, (length,), sliding_window=window)
        assert torch.equal(found[0], together[request])


@EACH_TYPE
def test_a_packed_request_alone_is_the_same_bit_for_bit(dtype):
    counts, layout = (1, 9, 2, 1), causal_rows(9)
    new, pages = drawn(layout, dtype)
    packing = Packing.of(counts, 9, GPU)
    packed = [packing.pack(each.transpose(1, 2)).transpose(1, 2) for each in new]
    together, first = attended(packed, pages, layout, packing=packing), 0
    for request, count in enumerate(counts):
        own = slice(request, request + 1)
        used = Pages(keys_NGZD=pages.keys_NGZD, values_NGZD=pages.values_NGZD, table_BT=pages.table_BT[own])
        rows = [each[own, :, :count] for each in new]
        by_itself = Packing.of((count,), count, GPU)
        found = attended(rows, used, causal_rows(count), LENGTHS[own], packing=by_itself)
        assert torch.equal(found[0], together[0, first : first + count])
        first += count


@EACH_TYPE
def test_clean_rows_are_the_same_bit_for_bit_whatever_masks_and_pages_behind_hold(dtype):
    layout = fused_rows(3, (-1, 2))
    new, pages = drawn(layout, dtype)
    want = attended(new, pages, layout)[:, :4]
    for each in new:
        each[:, :, 4:] = torch.nan
    for held in (pages.keys_NGZD, pages.values_NGZD):
        held[0] = torch.nan
        held[pages.table_BT[:, 313:]] = torch.nan
        for request, length in enumerate(LENGTHS):
            held[pages.table_BT[request, length // 16], :, length % 16 :] = torch.nan
    assert torch.equal(attended(new, pages, layout)[:, :4], want)


@EACH_TYPE
def test_keys_are_turned_as_the_definition_turns_them(dtype):
    (_, key, value), pages = drawn(causal_rows(5), dtype)
    angles = torch.rand(4, 5, 64, device=GPU) * 100
    rotary = tuple(each(torch.cat([angles, angles], dim=-1)).to(dtype) for each in (torch.cos, torch.sin))
    index = torch.tensor([[length + row for row in range(3)] for length in LENGTHS], device=GPU)
    written = []
    for form in ("reference", "triton"):
        held = [torch.zeros_like(pages.keys_NGZD) for _ in range(2)]
        scratch = tuple(torch.zeros(4, 2, 2, 128, dtype=dtype, device=GPU) for _ in range(2))
        over, turned = Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=pages.table_BT), key.clone()
        with using(form):
            places = places_of(pages.table_BT, 16, index)
            cache_write(turned, value, over, places, scratch=scratch, rotary=rotary)
        written.append([turned, *held, *scratch])
    for defined, found in zip(*written, strict=True):
        # Float32 products may be added in one step; those of bfloat16 are rounded before.
        torch.testing.assert_close(found, defined, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
