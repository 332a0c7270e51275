"""Rows of a forward that stand behind one another, against texts written out one row at a time."""

import itertools

import pytest
import torch

from blockroll.policies.segments import (
    Segments,
    at_rows,
    before,
    convolve,
    draft_segments,
    fused_segments,
    last_rows,
    scan,
)

LAYOUTS = [
    draft_segments(1, 0),
    draft_segments(5, 0),
    draft_segments(1, 3),
    draft_segments(4, 2),
    draft_segments(0, 3),
    fused_segments(1, (0,)),
    fused_segments(3, (0, 2)),
    fused_segments(4, (0, 1, 2, 3, 4)),
]
LAYOUT = pytest.mark.parametrize("segments", LAYOUTS, ids=repr)
DEPTH, WIDTH, SIZE = 2, 3, 2


def path(segments: Segments, row: int) -> list[int]:
    """The rows of this forward that are a row's text, itself last: said by the words of each layout."""
    if row < segments.num_clean:
        return [*range(row + 1)]
    first = segments.num_clean
    for behind, num_masks in segments.blocks:
        if row < first + num_masks:
            return [*range(behind + 1), *range(first, row + 1)]
        first += num_masks
    raise AssertionError(row)


def rows_and_seed(segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_rows = len(segments.parents)
    rows = torch.randn(SIZE, num_rows, WIDTH, generator=generator, dtype=torch.float64)
    return rows, torch.randn(SIZE, DEPTH, WIDTH, generator=generator, dtype=torch.float64)


def texts(segments: Segments, rows: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    """By row, what stands before it and itself, the cached prefix first."""
    return [torch.cat([seed, rows[:, path(segments, row)]], dim=1) for row in range(len(segments.parents))]


@LAYOUT
def test_a_convolution_reads_the_text_of_each_row_and_nothing_else(segments):
    rows, seed = rows_and_seed(segments)
    taps = torch.randn(WIDTH, DEPTH + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = convolve(rows, seed, taps, segments)
    for row, text in enumerate(texts(segments, rows, seed)):
        want = sum(text[:, tap - DEPTH - 1] * taps[:, tap] for tap in range(DEPTH + 1))
        torch.testing.assert_close(got[:, row], want)
        torch.testing.assert_close(before(rows, seed, segments)[:, row], text[:, -DEPTH - 1 : -1])


@LAYOUT
def test_a_recurrence_goes_through_the_text_of_each_row(segments):
    rows, seed = rows_and_seed(segments)
    got = scan(lambda past, row: past * 0.5 + row, rows, seed[:, -1], segments)
    for row, text in enumerate(texts(segments, rows, seed)):
        want = text[:, DEPTH - 1]
        for step in range(DEPTH, text.shape[1]):
            want = want * 0.5 + text[:, step]
        torch.testing.assert_close(got[:, row], want)


@LAYOUT
def test_what_is_left_behind_a_row_goes_on_as_if_the_rows_were_there(segments):
    rows, seed = rows_and_seed(segments)
    left = last_rows(rows, seed, segments, None)
    assert left.shape[1] == segments.num_clean
    for row, text in enumerate(texts(segments, rows, seed)[: segments.num_clean]):
        torch.testing.assert_close(left[:, row], text[:, -DEPTH:])
    if segments.num_clean:
        asked = torch.tensor([[0, segments.num_clean - 1], [segments.num_clean - 1, 0]])
        some = last_rows(rows, seed, segments, asked)
        torch.testing.assert_close(some, at_rows(left, segments, asked))
        for request, column in itertools.product(range(2), range(2)):
            torch.testing.assert_close(some[request, column], left[request, asked[request, column]])


@LAYOUT
def test_no_row_of_another_proposal_reaches_a_proposal(segments):
    """Gradients find what a row reads, its own text and no more."""
    rows, seed = rows_and_seed(segments)
    rows.requires_grad_()
    out = scan(lambda past, row: past * 0.5 + row, rows, seed[:, -1], segments) + convolve(
        rows, seed, torch.ones(WIDTH, DEPTH + 1, dtype=torch.float64), segments
    )
    for row in range(len(segments.parents)):
        (gradient,) = torch.autograd.grad(out[:, row].sum(), rows, retain_graph=True)
        assert gradient.abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == path(segments, row)


def test_planted_rows_that_all_follow_one_another_are_noticed(monkeypatch):
    monkeypatch.setattr(
        Segments,
        "parents",
        property(lambda self: tuple(range(-1, self.num_clean - 1 + sum(n for _, n in self.blocks)))),
    )
    with pytest.raises(AssertionError):
        test_a_recurrence_goes_through_the_text_of_each_row(fused_segments(2, (0, 1)))
