"""`lowrank_linear`: the update on mask rows alone, in the type of x; earlier rows keep every bit."""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.lowrank_linear import lowrank_linear, reference

SHAPES = [(1, 1, 1, 1, 1), (2, 5, 3, 7, 2), (3, 17, 63, 65, 8)]  # B, R, I, O, r


def numbers(shape, dtype=torch.float64):
    batch, rows, width, out, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, rows, out), (batch, rows, width), (rank, width), (out, rank))
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_rows_from_the_first_on_get_the_plain_formula(shape, scale, with_gradient):
    base, x, down, up = numbers(shape)
    for first_row in range(shape[1] + 1):
        want = base.clone()
        for text in range(shape[0]):
            for row in range(first_row, shape[1]):
                want[text, row] += scale * (up @ (down @ x[text, row]))
        given = (base.clone(), x, down, up)
        with torch.set_grad_enabled(with_gradient):
            found = lowrank_linear(*given, first_row=first_row, scale=scale)
        torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
        assert torch.equal(found[:, :first_row], base[:, :first_row])


def test_gradients_are_those_of_the_plain_formula():
    given = [each.requires_grad_() for each in numbers((2, 5, 3, 4, 2))]
    for first_row in (0, 2, 5):
        assert torch.autograd.gradcheck(
            lambda *each, first_row=first_row: lowrank_linear(*each, first_row=first_row, scale=0.5), given
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16_it_is_within_its_rounding(shape):
    base, x, down, up = numbers(shape)
    rough = [each.bfloat16() for each in (base, x)]
    with torch.no_grad():
        found = lowrank_linear(*rough, down.float(), up.float(), first_row=0)
    want = lowrank_linear(base, x, down, up, first_row=0)
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).abs().max() < 0.05 * want.abs().max().clamp(min=1)


def test_what_earlier_rows_hold_reaches_none(monkeypatch):
    """And an update that acts on every row is found out."""
    base, x, down, up = numbers((2, 6, 3, 4, 2))
    x[:, :4] = torch.nan
    assert lowrank_linear(base, x, down, up, first_row=4).isfinite().all()
    real = reference.add_lowrank
    monkeypatch.setattr(reference, "add_lowrank", lambda *given: real(*given[:4], 0, given[5]))
    assert not lowrank_linear(base, x, down, up, first_row=4).isfinite().all()


@pytest.mark.parametrize(
    ("change", "first_row", "sentence"),
    [
        ({0: torch.zeros(2, 5, 9)}, 1, r"base\(x\) has shape \(2, 5, 9\)"),
        ({1: torch.zeros(2, 4, 3)}, 1, r"give \(B, R, O\), \(B, R, I\), \(r, I\) and \(O, r\)"),
        ({2: torch.zeros(3, 3)}, 1, r"down \(3, 3\)"),
        ({}, 6, "first_row is 6: it is 0 to 5"),
        ({}, -1, "first_row is -1"),
    ],
)
def test_shapes_and_rows_that_do_not_belong_are_refused(change, first_row, sentence):
    given = dict(enumerate(numbers((2, 5, 3, 7, 2)))) | change
    with pytest.raises(InvalidInput, match=sentence):
        lowrank_linear(*given.values(), first_row=first_row)
