"""`lowrank_linear` as a Triton kernel, interpreted, against the plain formula in float64.

The interpreter cuts 16-bit numbers off where GPUs round them.
"""

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.kernels.choice import using
from blockroll.kernels.lowrank_linear import fused, lowrank_linear, reference
from blockroll.policies.adapter import AdapterConfig, DraftAdapter
from tests.kernels.far_apart import far_apart
from tests.kernels.planted import planted
from tests.models import random_model

# B, R, I, O, r, first row
EVEN = [(3, 17, 64, 160, 32, 9), (1, 40, 192, 96, 16, 3), (2, 9, 128, 64, 64, 0), (2, 3, 64, 64, 128, 1)]
ODD = [(1, 1, 1, 1, 1, 0), (2, 5, 3, 7, 2, 1), (3, 17, 63, 65, 33, 8), (2, 6, 64, 48, 8, 4)]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _triton():
    with using("triton"), torch.no_grad():
        yield


def numbers(shape, dtype=torch.float32):
    batch, rows, width, out, rank, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((batch, rows, out), (batch, rows, width), (rank, width), (out, rank))
    base, x, down, up = (torch.randn(size, generator=generator) for size in sizes)
    return base.to(dtype), x.to(dtype), down / width**0.5, up / rank**0.5


def check(shape, dtype=torch.float32, scale=0.5):
    base, x, down, up = numbers(shape, dtype)
    first_row = shape[-1]
    want = base.double()
    for text in range(shape[0]):
        for row in range(first_row, shape[1]):
            want[text, row] += scale * (up.double() @ (down.double() @ x[text, row].double()))
    found = lowrank_linear(base.clone(), x, down, up, first_row=first_row, scale=scale)
    assert found.dtype == dtype
    assert torch.equal(found[:, :first_row], base[:, :first_row])
    torch.testing.assert_close(found.double(), want, atol=BOUNDS[dtype] * want.abs().max(), rtol=0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [*EVEN, *ODD], ids=str)
def test_rows_from_the_first_on_get_the_plain_formula(shape, dtype):
    check(shape, dtype)


def test_it_runs_in_place_and_rows_before_the_first_are_not_touched():
    """Also where they hold what is no number: on either side nothing of them is read."""
    base, x, down, up = numbers((2, 12, 64, 32, 16, 8))
    base[:, :8], x[:, :8] = torch.nan, torch.nan
    before = base.view(torch.int32).clone()
    found = lowrank_linear(base, x, down, up, first_row=8)
    assert found.data_ptr() == base.data_ptr()
    assert torch.equal(found.view(torch.int32)[:, :8], before[:, :8])
    assert found[:, 8:].isfinite().all()


@pytest.mark.parametrize("shape", [EVEN[0], ODD[2]], ids=str)
def test_many_rows_keep_their_columns_in_one_program(shape, monkeypatch):
    """And a row's bits do not depend on how columns are shared."""
    _, *factors = numbers(shape)
    shared = lowrank_linear(numbers(shape)[0], *factors, first_row=1)
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    assert torch.equal(lowrank_linear(numbers(shape)[0], *factors, first_row=1), shared)


def test_a_text_has_the_same_bits_alone():
    base, x, down, up = numbers((5, 9, 64, 64, 32, 4))
    everything = lowrank_linear(base.clone(), x, down, up, first_row=4)
    alone = lowrank_linear(base[:1].clone(), x[:1], down, up, first_row=4)
    assert torch.equal(alone, everything[:1])


def test_rows_may_lie_apart():
    base, x, down, up = numbers((3, 6, 64, 32, 16, 2))
    want = lowrank_linear(base.clone(), x, down, up, first_row=2)
    wide, apart = torch.full((3, 6, 80), torch.nan), torch.full((6, 3, 96), torch.nan)
    wide[:, :, :32], apart.transpose(0, 1)[:, :, :64] = base, x
    found = lowrank_linear(wide[:, :, :32], apart.transpose(0, 1)[:, :, :64], down, up, first_row=2)
    assert torch.equal(found, want)
    assert wide[:, :, 32:].isnan().all()


def test_texts_further_apart_than_an_int32_counts_are_found(monkeypatch):
    base, x, down, up = numbers((4, 2, 64, 32, 16, 1), torch.bfloat16)
    want = lowrank_linear(base.clone(), x, down, up, first_row=1)
    found = lowrank_linear(base.clone(), far_apart(x, monkeypatch), down, up, first_row=1)
    assert torch.equal(found, want)


def test_nothing_to_update_is_left_as_it_is():
    base, x, down, up = numbers((2, 5, 3, 7, 2, 0))
    assert torch.equal(lowrank_linear(base.clone(), x, down, up, first_row=5), base)
    given = (base.clone(), x, down[:0], up[:, :0])
    assert torch.equal(lowrank_linear(*given, first_row=0), base)
    assert lowrank_linear(base[:0], x[:0], down, up, first_row=0).shape == (0, 5, 7)


def test_with_gradients_the_definition_runs():
    given = [each.requires_grad_() for each in numbers((2, 5, 3, 7, 2, 1))]
    with torch.enable_grad():
        found = lowrank_linear(*given, first_row=1)
        gradients = torch.autograd.grad(found.sum(), given)
    assert torch.equal(found, reference.add_lowrank(*(each.detach().clone() for each in given), 1, 1.0))
    assert all(each.any() for each in gradients)


def test_autocast_multiplies_in_its_type():
    base, x, down, up = numbers((2, 5, 64, 32, 16, 1))
    low = base.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lowrank_linear(low.clone(), x, down, up, first_row=1)
    assert torch.equal(found, lowrank_linear(low.clone(), x.bfloat16(), down, up, first_row=1))


def test_a_draft_adapter_gives_what_it_gives_by_the_definition():
    """Through the hooks of a real model, on its mask rows."""
    model = random_model()
    adapter = DraftAdapter(model, AdapterConfig(family=model.config.model_type, rank=4))
    for update in adapter.updates.values():
        torch.nn.init.normal_(update.up, std=0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(12).view(2, 6)
    logits = []
    for form in ("reference", "triton"):
        with using(form), adapter.on_rows(3):
            logits.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    with using("triton"):
        plain = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain[:, :3], logits[1][:, :3])
    assert not torch.allclose(plain[:, 3:], logits[1][:, 3:], atol=1e-3)


PLANTED = {
    "an update of the rows from the beginning on": (
        "(first_row + rows % rows_of_text).to(tl.int64)",
        "(rows % rows_of_text).to(tl.int64)",
    ),
    "a width that is read beyond its end": (
        "some_x = tl.where((start + depth < width)[None, :], some_x, 0.0)",
        "pass",
    ),
    "a rank that is filled with its last row": (
        "product = tl.where((narrow < rank)[None, :], product, 0.0)",
        "pass",
    ),
    "a scale that is left out": ("+ scale * change", "+ change"),
}


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_kernel_with_one_line_wrong_is_found(wrong, tmp_path, monkeypatch):
    made = planted(tmp_path, fused, *PLANTED[wrong])
    monkeypatch.setattr(fused, "add_update", made.add_update)
    with pytest.raises(AssertionError):
        check(ODD[2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({0: torch.zeros(2, 5, 7).bfloat16()}, r"base\(x\) is torch.bfloat16"),
        (
            {0: torch.zeros(2, 5, 7).double(), 1: torch.zeros(2, 5, 3).double()},
            "x is multiplied in torch.float64",
        ),
        ({2: torch.zeros(2, 3).bfloat16()}, "down torch.bfloat16.*factors in float32"),
        ({1: torch.zeros(2, 3, 5).mT}, "rows of x_BRI are not contiguous"),
        ({3: torch.zeros(2, 7).T}, "rows of up_Or are not contiguous"),
        ({2: torch.zeros(129, 3), 3: torch.zeros(7, 129)}, "the rank is 129.*up to 128"),
    ],
)
def test_what_no_kernel_serves_is_refused_by_name(change, sentence):
    given = dict(enumerate(numbers((2, 5, 3, 7, 2, 1)))) | change
    with pytest.raises(InvalidInput, match=sentence):
        lowrank_linear(*given.values(), first_row=1)
