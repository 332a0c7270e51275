"""`cache_write` in Triton, interpreted: bit for bit what its definition writes, and nothing else."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.cache_write import cache_write, fused, places_of, reference
from blockroll.kernels.choice import using
from blockroll.kernels.pages import Pages
from tests.kernels.far_apart import far_apart
from tests.kernels.planted import planted
from tests.numerics.test_cache_write import turned_by_transformers

TABLE = torch.tensor([[4, 1, 6], [2, 7, 0], [5, 3, 0]])
ACROSS = [[14, 15, 16], [0, 1, 2], [31, 32, 33]]  # the edges of pages of 16 rows


def pages(size=16, heads=2, width=32, dtype=torch.float32):
    held = [torch.full((8, heads, size, width), torch.nan, dtype=dtype) for _ in range(2)]
    return Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=TABLE)


def drawn(num_rows, *, size=3, heads=2, width=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(size, heads, num_rows, width, generator=generator).to(dtype) for _ in range(2)]


def written(form, new, over, places, scratch=None, rotary=None):
    """All that a call may have changed."""
    key, value = (each.clone() for each in new)
    over = Pages(
        keys_NGZD=over.keys_NGZD.clone(), values_NGZD=over.values_NGZD.clone(), table_BT=over.table_BT
    )
    scratch = None if scratch is None else tuple(each.clone() for each in scratch)
    with using(form):
        cache_write(key, value, over, places, scratch=scratch, rotary=rotary)
    return [key, value, over.keys_NGZD, over.values_NGZD, *(scratch or ())]


def assert_alike(*given, **options):
    found, want = (written(form, *given, **options) for form in ("triton", "reference"))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_every_width_and_type(width, dtype):
    over, new = pages(width=width, dtype=dtype), drawn(3, width=width, dtype=dtype)
    assert_alike(new, over, places_of(TABLE, 16, torch.tensor(ACROSS)))


@pytest.mark.parametrize(("size", "heads"), [(16, 1), (32, 5), (64, 40), (128, 3)])
def test_every_page_size_at_its_edges_and_any_number_of_heads(size, heads):
    index = torch.tensor([[size - 1, size, 0], [0, 2 * size - 1, 1], [size - 1, size - 2, size]])
    assert_alike(drawn(3, heads=heads), pages(size, heads), places_of(TABLE, size, index))


def test_rows_one_behind_the_other_go_to_the_requests_that_are_named():
    index, requests = torch.tensor([[3, 4, 0, 16, 17]]), torch.tensor([[0, 0, 1, 2, 2]])
    places = places_of(TABLE, 16, index, request_BC=requests)
    assert_alike(drawn(5, size=1), pages(), places)


def test_rows_before_a_text_and_of_no_page_leave_zeros_where_nobody_reads():
    index = torch.tensor([[-2, -1, 0], [32, 33, 34], [-1, 0, 1]])
    new = drawn(3)
    new[0][0, :, 0] = new[1][1] = torch.nan
    assert_alike(new, pages(), places_of(TABLE, 16, index, has_gaps=True))


def test_page_0_is_a_page_where_there_are_no_gaps():
    table = torch.tensor([[0], [2], [1]])
    over = pages()
    over = Pages(keys_NGZD=over.keys_NGZD, values_NGZD=over.values_NGZD, table_BT=table)
    assert_alike(drawn(1), over, places_of(table, 16, torch.tensor([[1], [2], [3]])))


@pytest.mark.parametrize("num_placed", [0, 2])
def test_masks_go_to_scratch_and_to_no_page(num_placed):
    scratch = tuple(torch.zeros(3, 2, 5 - num_placed, 32) for _ in range(2))
    index = torch.tensor([[15, 16], [0, 1], [33, 32]])[:, :num_placed]
    assert_alike(drawn(5), pages(), places_of(TABLE, 16, index), scratch=scratch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_are_turned_in_place_as_a_model_turns_them(dtype):
    new = drawn(4, heads=3, width=64, dtype=dtype)
    positions = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3], [700, 701, 5, 9]])
    turned, rotary = turned_by_transformers(new[0], positions, dtype)
    scratch = tuple(torch.zeros(3, 3, 2, 64, dtype=dtype) for _ in range(2))
    places = places_of(TABLE, 16, torch.tensor([[3, 4], [0, 1], [32, 33]]))
    assert_alike(new, pages(16, 3, 64, dtype), places, scratch=scratch, rotary=rotary)
    found = written("triton", new, pages(16, 3, 64, dtype), places, scratch, rotary)
    assert torch.equal(found[0], turned)
    assert not torch.equal(found[0], new[0])


def test_bfloat16_keys_are_turned_as_closely_as_the_interpreter_rounds():
    """It cuts off where GPUs round to nearest: up to a unit of the last place in each product and sum."""
    new = drawn(2, dtype=torch.bfloat16)
    positions = torch.tensor([[3, 4], [0, 1], [700, 701]])
    turned, rotary = turned_by_transformers(new[0], positions, torch.bfloat16)
    places = places_of(TABLE, 16, torch.tensor([[3, 4], [0, 1], [32, 33]]))
    found = written("triton", new, pages(dtype=torch.bfloat16), places, rotary=rotary)
    assert (found[0].double() - turned.double()).abs().max() < 3 * 2**-7 * new[0].abs().max()
    written_rows = found[2][[4, 4, 2, 2, 0, 0], :, [3, 4, 0, 1, 0, 1]]
    assert torch.equal(written_rows, found[0].transpose(1, 2).flatten(0, 1))


def test_wide_keys_are_turned_as_they_are_and_rounded_to_the_pages():
    """Under autocast some norms give float32."""
    new = drawn(2)
    _, rotary = turned_by_transformers(new[0], torch.tensor([[3, 4], [0, 1], [7, 9]]), torch.float32)
    places = places_of(TABLE, 16, torch.tensor([[3, 4], [0, 1], [7, 9]]))
    for turn in (None, rotary):
        assert_alike(new, pages(dtype=torch.bfloat16), places, rotary=turn)


def test_rows_are_taken_as_a_model_lays_them_and_elsewhere_copied():
    new, index = drawn(3), torch.tensor(ACROSS)
    _, rotary = turned_by_transformers(new[0], index, torch.float32)
    together = torch.cat(new, dim=1).transpose(1, 2).contiguous()  # (B, R, G, D)
    scratch = tuple(torch.zeros(3, 2, 4, 40)[:, :, 2:3, :32] for _ in range(2))  # begin at no multiple of 16
    want = written("triton", new, pages(), places_of(TABLE, 16, index[:, :2]), scratch, rotary)
    for rows in (together, torch.nn.functional.pad(together, (0, 1))[..., :-1]):
        key, value = rows.transpose(1, 2).split(2, dim=1)
        over = pages()
        spare = tuple(torch.zeros(3, 2, 4, 40)[:, :, 2:3, :32] for _ in range(2))
        with using("triton"):
            cache_write(key, value, over, places_of(TABLE, 16, index[:, :2]), scratch=spare, rotary=rotary)
        for one, other in zip((key, value, over.keys_NGZD, over.values_NGZD, *spare), want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_pages_that_no_int32_tells_apart_are_written(monkeypatch):
    near = pages(heads=1, dtype=torch.bfloat16)
    far = [far_apart(each[:4], monkeypatch) for each in (near.keys_NGZD, near.values_NGZD)]
    table = torch.tensor([[3]])
    key, value = drawn(1, size=1, heads=1, dtype=torch.bfloat16)
    over = Pages(keys_NGZD=far[0], values_NGZD=far[1], table_BT=table)
    with using("triton"):
        cache_write(key, value, over, places_of(table, 16, torch.tensor([[7]])))
    for held, new in zip(far, (key, value), strict=True):
        assert torch.equal(held[3, 0, 7], new[0, 0, 0])
        assert held[:3].isnan().all()


def test_without_rows_nothing_is_written():
    index = torch.zeros((3, 0), dtype=torch.int64)
    assert_alike(drawn(0), pages(), places_of(TABLE, 16, index))


def test_triton_runs_where_it_is_chosen_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(reference, "write", lambda *_: pytest.fail("the definition ran"))
    given = (drawn(3), pages(), places_of(TABLE, 16, torch.tensor(ACROSS)))
    written("triton", *given)
    with pytest.raises(pytest.fail.Exception, match="the definition ran"):
        written("reference", *given)


def test_the_host_asks_a_device_for_no_number(monkeypatch):
    given = (*drawn(3), pages(), places_of(TABLE, 16, torch.tensor(ACROSS), has_gaps=True))

    def asked(*arguments):
        raise AssertionError("the host waits for a number")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    with using("triton"):
        cache_write(*given)


def test_pages_that_no_tile_is_cut_for_are_refused():
    held = torch.zeros(8, 2, 16, 48)
    over = Pages(keys_NGZD=held, values_NGZD=held, table_BT=TABLE)
    with pytest.raises(InvalidInput, match="heads of width 48"):
        written("triton", drawn(3, width=48), over, places_of(TABLE, 16, torch.tensor(ACROSS)))


FAULTS = {
    "the row behind": ("page_row * page_z + head", "page_row * page_z + page_z + head"),
    "a row less": ("row < num_placed\n", "row < num_placed - 1\n"),
    "masks in another order": ("(row - num_placed).to", "(num_placed + 1 - row).to"),
    "turned backwards": ("-wide_second_EH, COS", "wide_second_EH, COS"),
    "a product as it is": (".to(kind).to(tl.float32)).to(kind)", ").to(kind)"),
    "what nobody has": ("(has_gaps != 0) & (page == 0)", "page < 0"),
    "a head less": ("head_E1 < num_heads", "head_E1 < num_heads - 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "write_rows", planted(tmp_path, fused, *FAULTS[fault]).write_rows)
    with pytest.raises(AssertionError):
        _compared()


def _compared():
    test_keys_are_turned_in_place_as_a_model_turns_them(torch.float16)
    test_rows_before_a_text_and_of_no_page_leave_zeros_where_nobody_reads()
