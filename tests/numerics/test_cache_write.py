"""`cache_write`: each row to the place of its text, masks to scratch, and nothing else changes."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from blockroll.errors import InvalidInput
from blockroll.kernels.cache_write import cache_write, places_of, reference
from blockroll.kernels.pages import Pages

HEADS, WIDTH = 2, 3
SEEDED = torch.Generator().manual_seed(0)
TABLE = torch.tensor([[4, 1, 6], [2, 7, 0], [5, 3, 0]])


def pages(size, dtype=torch.float32):
    held = [torch.full((8, HEADS, size, WIDTH), torch.nan, dtype=dtype) for _ in range(2)]
    return Pages(keys_NGZD=held[0], values_NGZD=held[1], table_BT=TABLE)


def rows(num_rows, size=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    return [torch.randn(size, HEADS, num_rows, WIDTH, generator=generator).to(dtype) for _ in range(2)]


def written_by_hand(new, page_size, index, requests, dtype=torch.float32):
    held = [torch.full((8, HEADS, page_size, WIDTH), torch.nan, dtype=dtype) for _ in range(2)]
    for tensor, given in zip(held, new, strict=True):
        for batch_row, (of_texts, of_requests) in enumerate(zip(index, requests, strict=True)):
            for row, (place, request) in enumerate(zip(of_texts, of_requests, strict=True)):
                page = TABLE[request, place // page_size] if place >= 0 else 0
                value = given[batch_row, :, row] if page else torch.zeros(())
                tensor[page, :, place % page_size] = value.to(dtype)
    return held


def assert_holds(found, want):
    for got, expected in zip((found.keys_NGZD, found.values_NGZD), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_the_pages_of_their_texts_across_their_edges(page_size, dtype):
    most = 2 * page_size - 1  # every text has two pages
    for num_rows in {1, 2, min(5, most)} & set(range(1, most + 1)):
        starts = [0, most - num_rows, (most - num_rows) // 2]
        index = [[start + row for row in range(num_rows)] for start in starts]
        new, held = rows(num_rows), pages(page_size, dtype)
        cache_write(*new, held, places_of(TABLE, page_size, torch.tensor(index)))
        requests = [[request] * num_rows for request in range(3)]
        assert_holds(held, written_by_hand(new, page_size, index, requests, dtype))


def test_rows_one_behind_the_other_go_to_the_requests_that_are_named():
    index, requests = [[3, 4, 0, 6, 7]], [[0, 0, 1, 2, 2]]
    new, held = rows(5, size=1), pages(4)
    places = places_of(TABLE, 4, torch.tensor(index), request_BC=torch.tensor(requests))
    cache_write(*new, held, places)
    assert_holds(held, written_by_hand(new, 4, index, requests))


def test_rows_before_a_text_and_of_no_page_leave_zeros_where_nobody_reads():
    index = [[-2, -1, 0], [8, 9, 10], [-1, 0, 1]]
    new, held = rows(3), pages(4)
    new[0][0, :, 0] = torch.nan
    cache_write(*new, held, places_of(TABLE, 4, torch.tensor(index), has_gaps=True))
    assert_holds(held, written_by_hand(new, 4, index, [[request] * 3 for request in range(3)]))


def test_masks_go_to_scratch_and_to_no_page():
    index = [[3, 4], [0, 1], [7, 6]]
    new, held = rows(7), pages(4)
    scratch = tuple(torch.zeros(3, HEADS, 5, WIDTH) for _ in range(2))
    cache_write(*new, held, places_of(TABLE, 4, torch.tensor(index)), scratch=scratch)
    assert_holds(held, written_by_hand(new, 4, index, [[request] * 2 for request in range(3)]))
    for spare, given in zip(scratch, new, strict=True):
        assert torch.equal(spare, given[:, :, 2:])


def turned_by_transformers(key, positions, dtype):
    """As Llama's layers turn keys at these positions, and the cosines and sines that they turn by."""
    width = key.shape[-1]
    angles = positions[..., None].float() * 1e4 ** -(torch.arange(0, width, 2) / width)
    cos, sin = (each(torch.cat([angles, angles], dim=-1)).to(dtype) for each in (torch.cos, torch.sin))
    return apply_rotary_pos_emb(key, key, cos, sin)[1], (cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_come_as_projected_are_turned_in_place_as_a_model_turns_them(dtype):
    places = places_of(TABLE, 4, torch.tensor([[3, 4], [0, 1], [7, 6]]))
    positions = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3], [7, 6, 5, 9]])
    keys, values = (torch.randn(3, HEADS, 4, 6, generator=SEEDED).to(dtype) for _ in range(2))
    turned, rotary = turned_by_transformers(keys, positions, dtype)
    assert not torch.equal(turned, keys)
    held = []
    for key, turn in ((keys, rotary), (turned.clone(), None)):
        kept, scratch = (
            [torch.zeros(*shape, 6, dtype=dtype) for _ in range(2)] for shape in ((8, 2, 4), (3, 2, 2))
        )
        over = Pages(keys_NGZD=kept[0], values_NGZD=kept[1], table_BT=TABLE)
        cache_write(key, values, over, places, scratch=(scratch[0], scratch[1]), rotary=turn)
        assert torch.equal(key, turned)
        held.append([*kept, *scratch])
    assert all(torch.equal(one, other) for one, other in zip(*held, strict=True))


@pytest.mark.parametrize(
    ("rotary", "sentence"),
    [
        ((torch.ones(3, 3, WIDTH), torch.ones(3, 4, WIDTH)), "cosines are"),
        ((torch.ones(3, 4, WIDTH), torch.ones(3, 4, WIDTH).double()), "sines are torch.float64"),
    ],
)
def test_angles_of_other_rows_or_another_type_are_refused(rotary, sentence):
    keys, values = rows(4)
    places = places_of(TABLE, 4, torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(InvalidInput, match=sentence):
        cache_write(keys, values, pages(4), places, rotary=rotary)


def test_scratch_of_another_type_is_refused():
    keys, values = rows(4)
    places = places_of(TABLE, 4, torch.zeros(3, 2, dtype=torch.int64))
    scratch = (torch.zeros(3, HEADS, 2, WIDTH, dtype=torch.float64),) * 2
    with pytest.raises(InvalidInput, match=r"scratch is torch\.float64"):
        cache_write(keys, values, pages(4), places, scratch=scratch)


@pytest.mark.parametrize("fault", ["the page before", "heads for rows"])
def test_rows_in_a_wrong_place_are_found_out(fault, monkeypatch):
    real_places, real_write = reference.places_of, reference.write
    if fault == "the page before":
        monkeypatch.setattr(
            reference, "places_of", lambda table, *rest: real_places(table.roll(1, dims=1), *rest)
        )
    else:
        monkeypatch.setattr(
            reference, "write", lambda key, value, *rest: real_write(key.flip(1), value, *rest)
        )
    with pytest.raises(AssertionError):
        test_rows_go_to_the_pages_of_their_texts_across_their_edges(4, torch.float32)


@pytest.mark.parametrize(
    ("index", "options", "sentence"),
    [
        (torch.zeros(3, 2), {}, "give int64"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, "the table of pages has 3"),
        (torch.zeros(1, 2, dtype=torch.int64), {"request_BC": torch.zeros(2)}, "one of each for every row"),
    ],
)
def test_indices_of_other_rows_are_refused(index, options, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        places_of(TABLE, 4, index, **options)


def test_rows_without_room_or_of_other_heads_are_refused():
    places = places_of(TABLE, 4, torch.zeros(3, 2, dtype=torch.int64))
    keys, values = rows(4)
    with pytest.raises(InvalidInput, match="there are 4 new rows, places for 2 and scratch for 0"):
        cache_write(keys, values, pages(4), places)
    with pytest.raises(InvalidInput, match="of as many heads"):
        cache_write(keys[:, :1], values[:, :1], pages(4), places)
    with pytest.raises(InvalidInput, match="places are of 3 requests"):
        cache_write(keys[:2], values[:2], pages(4), places)
