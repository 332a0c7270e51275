"""`block_attention` in Triton, interpreted: what is counted out by hand, and the same bits beside others."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.block_attention import Packing, RowLayout, block_attention, reference
from blockroll.kernels.choice import using
from blockroll.kernels.pages import Pages
from blockroll.policies.layout import causal_rows, fused_rows
from tests.kernels.far_apart import far_apart
from tests.numerics.attention_by_hand import LAYOUTS, Numbers, by_hand, numbers, paged

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDTH = 32
LENGTHS = (0, 33)
OPTIONS = [{}, {"scaling": 0.3, "softcap": 2.0, "sliding_window": 3}]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _memory_is_poisoned():
    """What nobody writes is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(layout, *, heads=(2, 1), width=WIDTH, lengths=LENGTHS, dtype=torch.float32):
    return numbers(layout, heads=heads, width=width, lengths=lengths, dtype=dtype)


def attended(given, layout, lengths=LENGTHS, *, pages=None, size=16, **options):
    pages = paged(given.prefix, size=size) if pages is None else pages
    with using("triton"):
        return block_attention(given.query, *given.new, pages, layout, torch.tensor(lengths), **options)


def assert_near(found, want, dtype=torch.float32):
    assert found.dtype == dtype
    assert found.shape == want.shape
    assert (found.double() - want).abs().max() < BOUNDS[dtype]  # of NaN this is false


def alone(given, request):
    """The same request without the others."""
    return Numbers(
        given.query[request : request + 1],
        [each[request : request + 1] for each in given.new],
        [[each[request]] for each in given.prefix],
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in LAYOUTS), *((name, OPTIONS[1]) for name in ("causal", "two-forward", "fused"))],
    ids=str,
)
def test_rows_attend_to_what_is_counted_out_by_hand(name, options):
    layout = LAYOUTS[name]
    given = drawn(layout)
    assert_near(attended(given, layout, **options), by_hand(given, layout, LENGTHS, **options))


@pytest.mark.parametrize("option", [{"softcap": 1.5}, {"sliding_window": 1}, {"sliding_window": 20}], ids=str)
def test_a_soft_cap_and_a_window_alone(option):
    layout = fused_rows(3, (1, 3))
    given = drawn(layout)
    assert_near(attended(given, layout, **option), by_hand(given, layout, LENGTHS, **option))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_every_width_and_type(width, dtype):
    layout, lengths = fused_rows(2, (-1, 1)), (5, 17)
    given = drawn(layout, width=width, lengths=lengths, dtype=dtype)
    assert_near(attended(given, layout, lengths), by_hand(given, layout, lengths), dtype)


@pytest.mark.parametrize(("size", "heads"), [(16, (16, 1)), (32, (2, 2)), (64, (5, 1)), (128, (7, 1))])
def test_every_page_size_at_its_edges_and_any_number_of_heads(size, heads):
    layout, lengths = fused_rows(1, (0,)), (size, size + 1)
    given = drawn(layout, heads=heads, lengths=lengths)
    assert_near(attended(given, layout, lengths, size=size), by_hand(given, layout, lengths))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_a_prefix_are_merged(dtype, options):
    layout, lengths = fused_rows(1, (1,)), (256, 257, 700)
    given = drawn(layout, lengths=lengths, dtype=dtype)
    assert_near(
        attended(given, layout, lengths, size=128, **options),
        by_hand(given, layout, lengths, **options),
        dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", [8192, 8193, 20000])
def test_chunks_that_grow_with_a_prefix_are_merged(length):
    layout = causal_rows(2)
    given = drawn(layout, lengths=(length, 70))
    assert_near(attended(given, layout, (length, 70), size=128), by_hand(given, layout, (length, 70)))


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 40)])
def test_rows_of_a_whole_prompt_attend_tile_by_tile(dtype, window):
    layout, lengths = causal_rows(80), (0, 100)
    given = drawn(layout, lengths=lengths, dtype=dtype)
    found = attended(given, layout, lengths, size=64, sliding_window=window)
    assert_near(found, by_hand(given, layout, lengths, sliding_window=window), dtype)


@pytest.mark.slow
def test_a_thousand_rows_and_blocks_of_a_hundred():
    for layout, lengths in (
        (causal_rows(1000), (0, 513)),
        (RowLayout(num_clean=90, width=100, levels=(7, 89)), (3, 40)),
    ):
        given = drawn(layout, lengths=lengths, dtype=torch.bfloat16)
        for window in (None, 64):
            found = attended(given, layout, lengths, sliding_window=window)
            assert_near(found, by_hand(given, layout, lengths, sliding_window=window), torch.bfloat16)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_before_a_text_are_seen_by_none(options):
    layout, lengths = causal_rows(20), (-17, 0, -20, -2)
    given = drawn(layout, lengths=lengths)
    want = by_hand(given, layout, lengths, **options)
    for each in (given.query, *given.new):
        each[0, :, :17] = each[2] = each[3, :, :2] = torch.nan
    assert_near(attended(given, layout, lengths, **options), want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_rows_attend_as_those_of_the_rectangle(options):
    layout, counts = causal_rows(24), (24, 1)
    given, packing = drawn(layout), Packing.of(counts, 24, CPU)
    whole = by_hand(given, layout, LENGTHS, **options)
    want = torch.cat([rows[:count] for rows, count in zip(whole, counts, strict=True)])[None]
    assert_near(
        attended(packed(given, packing), layout, pages=paged(given.prefix), packing=packing, **options), want
    )


def packed(given, packing):
    query, *new = (packing.pack(each.transpose(1, 2)).transpose(1, 2) for each in (given.query, *given.new))
    return Numbers(query, new, given.prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_alone_is_the_same_bit_for_bit(dtype):
    layout, lengths = fused_rows(2, (0, 2)), (0, 270)
    given = drawn(layout, lengths=lengths, dtype=dtype)
    together = attended(given, layout, lengths, size=32, sliding_window=100)
    for request, length in enumerate(lengths):
        found = attended(alone(given, request), layout, (length,), size=32, sliding_window=100)
        assert torch.equal(found[0], together[request])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN
def test_nan_in_one_request_changes_no_bit_of_another():
    layout = fused_rows(1, (0,))
    given = drawn(layout)
    want = attended(given, layout)
    for each in (given.query, *given.new, *(prefix[1] for prefix in given.prefix)):
        each[-1:] = torch.nan
    found = attended(given, layout)
    assert torch.equal(found[0], want[0])
    assert found[1].isnan().all()


def test_a_packed_request_alone_is_the_same_bit_for_bit_whatever_rows_others_have():
    layout, counts = causal_rows(24), (24, 2)
    given = drawn(layout, dtype=torch.bfloat16)
    together, first = packed(given, Packing.of(counts, 24, CPU)), 0
    found = attended(together, layout, pages=paged(given.prefix), packing=Packing.of(counts, 24, CPU))
    for request, count in enumerate(counts):
        own = Packing.of((count,), 30, CPU)
        one = alone(given, request)
        by_itself = attended(
            packed(one, own),
            causal_rows(30),
            LENGTHS[request : request + 1],
            pages=paged(one.prefix),
            packing=own,
        )
        assert torch.equal(by_itself[0], found[0, first : first + count])
        first += count


def test_a_wider_table_and_poison_in_every_page_behind_a_prefix_change_no_bit():
    layout = fused_rows(2, (1,))
    given = drawn(layout)
    want = attended(given, layout, pages=paged(given.prefix, poison=0.0))
    pages = paged(given.prefix)
    pages.keys_NGZD[pages.table_BT[0, 0]] = pages.values_NGZD[pages.table_BT[0, 0]] = torch.nan
    table = torch.cat([pages.table_BT, pages.table_BT[:1, :1].expand(2, 40)], dim=1)
    wide = Pages(keys_NGZD=pages.keys_NGZD, values_NGZD=pages.values_NGZD, table_BT=table)
    assert torch.equal(attended(given, layout, pages=wide), want)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_rows_are_the_same_bit_for_bit_whatever_masks_hold(dtype):
    layout = fused_rows(3, (-1, 2))
    given = drawn(layout, dtype=dtype)
    want = attended(given, layout)[:, :4]
    for each in (given.query, *given.new):
        each[:, :, 4:] = torch.nan
    assert torch.equal(attended(given, layout)[:, :4], want)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row of NaN
def test_a_block_is_the_same_bit_for_bit_whatever_later_drafts_and_other_blocks_hold():
    layout = fused_rows(3, (0, 3, -1))
    given = drawn(layout)
    want = attended(given, layout)
    for each in (given.query, *given.new):
        each[:, :, 1:4] = each[:, :, 8:12] = torch.nan
    found = attended(given, layout)
    assert torch.equal(found[:, 4:8], want[:, 4:8])
    assert torch.equal(found[:, 12:], want[:, 12:])


def test_keys_out_of_every_rows_window_are_not_read():
    layout, lengths = causal_rows(3), (300,)
    given = drawn(layout, lengths=lengths)
    want = attended(given, layout, lengths, sliding_window=7)
    for prefix in given.prefix:
        prefix[0][:, :294] = torch.nan
    assert torch.equal(attended(given, layout, lengths, sliding_window=7), want)


def test_rows_are_taken_as_a_model_lays_them_and_elsewhere_copied():
    layout = fused_rows(1, (0,))
    given = drawn(layout)
    want = attended(given, layout)
    together = torch.cat([given.query, *given.new], dim=1).transpose(1, 2).contiguous()  # (B, R, H, D)
    for row in (together, torch.nn.functional.pad(together, (0, 1))[..., :-1]):
        query, key, value = row.transpose(1, 2).split([2, 1, 1], dim=1)
        assert torch.equal(attended(Numbers(query, [key, value], given.prefix), layout), want)


def test_pages_that_no_int32_tells_apart_are_read(monkeypatch):
    torch.use_deterministic_algorithms(False)  # or all of the memory would be written
    layout, lengths = causal_rows(1), (40,)
    given = drawn(layout, lengths=lengths, dtype=torch.bfloat16)
    near = paged([given.prefix[0]] * 2)
    far = far_apart(near.keys_NGZD, monkeypatch)
    pages = Pages(keys_NGZD=far, values_NGZD=far, table_BT=near.table_BT)
    want = by_hand(Numbers(given.query, given.new, [given.prefix[0]] * 2), layout, lengths)
    assert near.table_BT[0, :3].max() > 2
    assert_near(attended(given, layout, lengths, pages=pages), want, torch.bfloat16)


def test_the_host_asks_a_device_for_no_number(monkeypatch):
    layout = fused_rows(1, (0,))
    given, pages = drawn(layout), None
    pages = paged(given.prefix)
    attended(given, layout, pages=pages)  # integers of a layout are sent once

    def asked(*arguments):
        raise AssertionError("the host waits for a number")

    lengths = torch.tensor(LENGTHS)
    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    with using("triton"):
        block_attention(given.query, *given.new, pages, layout, lengths, sliding_window=9)


def test_triton_runs_where_it_is_chosen_and_nowhere_else(monkeypatch):
    layout = causal_rows(2)
    given = drawn(layout)
    monkeypatch.setattr(reference, "paged_attention", lambda *_: pytest.fail("the definition ran"))
    attended(given, layout)
    with pytest.raises(pytest.fail.Exception, match="the definition ran"):
        block_attention(given.query, *given.new, paged(given.prefix), layout, torch.tensor(LENGTHS))


def test_without_requests_or_rows_there_is_nothing():
    for layout, lengths in ((causal_rows(2), ()), (RowLayout(num_clean=0), (3,))):
        given = drawn(causal_rows(2), lengths=(3,))
        given = Numbers(
            given.query[: len(lengths), :, : layout.num_rows],
            [each[: len(lengths), :, : layout.num_rows] for each in given.new],
            given.prefix,
        )
        pages = paged(given.prefix)
        pages = Pages(
            keys_NGZD=pages.keys_NGZD, values_NGZD=pages.values_NGZD, table_BT=pages.table_BT[: len(lengths)]
        )
        found = attended(given, layout, torch.tensor(lengths, dtype=torch.int64).tolist(), pages=pages)
        assert found.shape == (len(lengths), layout.num_rows, 2, WIDTH)


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((4, 1, 16, 48), torch.float32, "heads of width 48"),
        ((4, 1, 8, 32), torch.float32, r"pages have 8 rows .* serve \(16, 32, 64, 128\) rows"),
        ((4, 1, 16, 32), torch.float64, "torch.float64; Triton's kernels"),
    ],
)
def test_pages_that_no_tile_is_cut_for_are_refused(shape, dtype, sentence):
    held = torch.zeros(shape, dtype=dtype)
    pages = Pages(keys_NGZD=held, values_NGZD=held, table_BT=torch.zeros(1, 1, dtype=torch.int64))
    given = drawn(causal_rows(1), width=shape[3], lengths=(0,), dtype=dtype)
    with pytest.raises(InvalidInput, match=sentence):
        attended(given, causal_rows(1), (0,), pages=pages)


@pytest.mark.parametrize("change", ["another stride", "columns"])
def test_pages_whose_rows_lie_otherwise_are_refused(change):
    held = torch.zeros(4, 1, 16, 32)
    values = torch.zeros(4, 2, 16, 32)[:, :1] if change == "another stride" else held.mT.contiguous().mT
    keys = held if change == "another stride" else values
    pages = Pages(keys_NGZD=keys, values_NGZD=values, table_BT=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="rows that are contiguous and begin at multiples of 16"):
        attended(drawn(causal_rows(1), lengths=(0,)), causal_rows(1), (0,), pages=pages)
