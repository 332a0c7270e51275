"""Rows of a forward that stand behind one another, against texts written out one row at a time."""

import itertools

import pytest
import torch

from blockroll.kernels.block_attention import RowLayout
from blockroll.policies.layout import causal_rows, fused_rows, two_forward_rows
from blockroll.policies.segments import at_rows, before, convolve, last_rows, parents_of, scan

LAYOUTS = [
    causal_rows(1),
    causal_rows(5),
    two_forward_rows(1, 3),
    two_forward_rows(4, 2),
    two_forward_rows(0, 3),
    fused_rows(1, (0,)),
    fused_rows(3, (0, 2)),
    fused_rows(4, (0, 1, 2, 3, 4)),
]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
DEPTH, WIDTH, SIZE = 2, 3, 2


def path(layout: RowLayout, row: int) -> list[int]:
    """The rows of this forward that are a row's text, itself last: said by the words of each layout."""
    if row < layout.num_clean:
        return [*range(row + 1)]
    block, slot = divmod(row - layout.num_clean, layout.width)
    return [*range(layout.levels[block] + 1), *range(row - slot, row + 1)]


def rows_and_seed(layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(SIZE, layout.num_rows, WIDTH, generator=generator, dtype=torch.float64)
    return rows, torch.randn(SIZE, DEPTH, WIDTH, generator=generator, dtype=torch.float64)


def texts(layout: RowLayout, rows: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    """By row, what stands before it and itself, the cached prefix first."""
    return [torch.cat([seed, rows[:, path(layout, row)]], dim=1) for row in range(layout.num_rows)]


def halved(past: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return past * 0.5 + row


@LAYOUT
def test_a_convolution_reads_the_text_of_each_row_and_nothing_else(layout):
    rows, seed = rows_and_seed(layout)
    taps = torch.randn(WIDTH, DEPTH + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = convolve(rows, seed, taps, parents_of(layout))
    for row, text in enumerate(texts(layout, rows, seed)):
        want = sum(text[:, tap - DEPTH - 1] * taps[:, tap] for tap in range(DEPTH + 1))
        torch.testing.assert_close(got[:, row], want)
        torch.testing.assert_close(before(rows, seed, parents_of(layout))[:, row], text[:, -DEPTH - 1 : -1])


@LAYOUT
def test_a_recurrence_goes_through_the_text_of_each_row(layout):
    assert_recurrence(layout, parents_of(layout))


def assert_recurrence(layout: RowLayout, parents: tuple[int, ...]) -> None:
    rows, seed = rows_and_seed(layout)
    got = scan(halved, rows, seed[:, -1], parents)
    for row, text in enumerate(texts(layout, rows, seed)):
        want = text[:, DEPTH - 1]
        for step in range(DEPTH, text.shape[1]):
            want = halved(want, text[:, step])
        torch.testing.assert_close(got[:, row], want)


@LAYOUT
def test_what_is_left_behind_a_row_goes_on_as_if_the_rows_were_there(layout):
    rows, seed = rows_and_seed(layout)
    num_clean = layout.num_clean
    left = last_rows(rows[:, :num_clean], seed, None)
    assert left.shape[1] == num_clean
    for row, text in enumerate(texts(layout, rows, seed)[:num_clean]):
        torch.testing.assert_close(left[:, row], text[:, -DEPTH:])
    if num_clean:
        asked = torch.tensor([[0, num_clean - 1], [num_clean - 1, 0]])
        some = last_rows(rows[:, :num_clean], seed, asked)
        torch.testing.assert_close(some, at_rows(left, asked))
        for request, column in itertools.product(range(2), range(2)):
            torch.testing.assert_close(some[request, column], left[request, asked[request, column]])


@LAYOUT
def test_no_row_of_another_proposal_reaches_a_proposal(layout):
    """Gradients find what a row reads: its own text, and no more."""
    rows, seed = rows_and_seed(layout)
    rows.requires_grad_()
    taps = torch.ones(WIDTH, DEPTH + 1, dtype=torch.float64)
    parents = parents_of(layout)
    out = scan(halved, rows, seed[:, -1], parents) + convolve(rows, seed, taps, parents)
    for row in range(layout.num_rows):
        (gradient,) = torch.autograd.grad(out[:, row].sum(), rows, retain_graph=True)
        assert gradient.abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == path(layout, row)


def test_planted_rows_that_all_follow_one_another_are_noticed():
    layout = fused_rows(2, (0, 1))
    with pytest.raises(AssertionError):
        assert_recurrence(layout, tuple(range(-1, layout.num_rows - 1)))
