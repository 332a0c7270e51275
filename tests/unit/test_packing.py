"""Which row stands where when each request has its own number of them."""

import random

import pytest
import torch

from blockroll.kernels.block_attention import Packing
from blockroll.policies.packing import least_saved_rows

CPU = torch.device("cpu")


def cells_of(packing):
    return sum(band.size * band.width for band in packing.bands)


def samples():
    draw = random.Random(3)
    for size in (1, 2, 5, 32):
        for longest in (1, 3, 17):
            yield [draw.choice([1, 1, 1, min(2, longest), draw.randint(1, longest)]) for _ in range(size)]
    yield [1] * 31 + [257]


@pytest.mark.parametrize("num_rows", list(samples()), ids=lambda rows: f"{len(rows)} of {max(rows)}")
@pytest.mark.parametrize("spare", [0, 3])
def test_every_row_comes_back_from_rectangles_and_bands(num_rows, spare):
    size, width, total = len(num_rows), max(num_rows) + spare, sum(num_rows)
    packing = Packing.of(num_rows, width, CPU)
    rectangle = torch.arange(size * width).view(size, width)
    own = [rectangle[slot, :count] for slot, count in enumerate(num_rows)]
    rows = packing.pack(rectangle)
    assert torch.equal(rows, torch.cat(own)[None])
    bands = packing.by_band(rows)
    assert torch.equal(packing.from_bands(bands), rows)
    assert packing.row_C.unique().tolist() == [*range(total)]
    for band, cells in zip(packing.bands, bands, strict=True):
        requests = torch.arange(size) if band.requests_B is None else band.requests_B
        assert cells.shape == (band.size, band.width)
        for request, got in zip(requests.tolist(), cells, strict=True):
            mine = own[request][band.first : band.first + band.width]
            assert len(mine) > 0
            assert torch.equal(got[: len(mine)], mine)
            assert (got[len(mine) :] == own[request][-1]).all()
    assert cells_of(packing) <= size * max(num_rows)


def test_one_request_with_many_rows_widens_attention_for_no_other():
    packing = Packing.of([1] * 20 + [3] * 11 + [17], 17, CPU)
    assert [(band.size, band.first, band.width) for band in packing.bands] == [(32, 0, 3), (1, 3, 14)]
    assert cells_of(packing) == 110 < 32 * 17


def test_requests_of_equal_numbers_are_one_band():
    assert [(band.size, band.width) for band in Packing.of([5] * 8, 5, CPU).bands] == [(8, 5)]
    assert [(band.size, band.width) for band in Packing.of([1, 2] * 4, 2, CPU).bands] == [(8, 2)]


def test_packing_must_save_some_rows_and_the_more_off_a_cpu_the_less_a_row_multiplies():
    def of(width, num_layers, device):
        layers = [torch.nn.Linear(width, width, device=device) for _ in range(num_layers)]
        return least_saved_rows(torch.nn.ModuleList(layers), num_layers)

    assert of(100, 3, "cpu") == of(10, 1, "cpu") == 12
    assert (of(4000, 8, "meta"), of(1000, 8, "meta")) == (250, 4000)
    assert least_saved_rows(torch.nn.ReLU(), 2) == 12
