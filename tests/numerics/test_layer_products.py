"""The products of kernels/layers, as every kind of processor computes them that this one can stand in for."""

import platform

import pytest
import torch

from blockroll.errors import MissingDependency
from blockroll.kernels.layers import layers_library
from blockroll.kernels.processor import processor_features

# What code for a processor needs of the one that it runs on; "native" is the best of this one's.
NEEDS = {
    "native": (),
    "x86-64": (),
    "x86-64-v3": ("avx2", "fma", "bmi2"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
}
ROWS = (1, 2, 3, 5, 15, 16, 17, 33, 47, 72)


def library_for(dtype: torch.dtype, processor: str):
    """Skips what cannot be built or run here."""
    if processor != "native" and platform.machine() != "x86_64":
        pytest.skip("code for another kind of processor")
    if not all(f" {name} " in f"{processor_features()} ".replace("\n", " ") for name in NEEDS[processor]):
        pytest.skip(f"this processor does not run code for {processor}")
    try:
        return layers_library(dtype, processor)
    except MissingDependency as missing:
        pytest.skip(str(missing))


def product(library, weight, bias, x, num_threads):
    """Rows of x times the weight, (N, size)."""
    out = torch.full((len(x), len(weight)), torch.nan)
    library.product_of_rows(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), len(weight), x.data_ptr(),
        len(x), x.shape[1], out.data_ptr(), num_threads,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("processor", NEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "width"), [(192, 576), (96, 1536), (100, 96), (33, 64), (40, 70), (7, 33), (32, 32)]
)
def test_products_are_those_of_float64(processor, dtype, size, width):
    library = library_for(dtype, processor)
    torch.manual_seed(size + width)
    weight, bias = torch.randn(size, width).to(dtype), torch.randn(size).to(dtype)
    # Sums of so many numbers, then one rounding to the type.
    bound = torch.finfo(torch.float32).eps * width
    for rows in ROWS:
        x = torch.randn(rows, width).to(dtype)
        for own_bias, num_threads in ((None, 1), (bias, 2)):
            expected = x.double() @ weight.double().T + (0 if own_bias is None else own_bias.double())
            found = product(library, weight, own_bias, x, num_threads).double()
            allowed = bound * (1 + expected.abs()) + torch.finfo(dtype).eps * expected.abs()
            assert ((found - expected).abs() <= allowed).all(), (rows, num_threads)


@pytest.mark.parametrize("processor", NEEDS)
def test_a_row_is_the_same_beside_other_rows_of_nan(processor):
    library = library_for(torch.bfloat16, processor)
    torch.manual_seed(3)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    alone = product(library, weight, None, x, 1)
    x[5] = torch.nan
    beside = product(library, weight, None, x, 1)
    assert beside[5].isnan().all()
    others = [row for row in range(20) if row != 5]
    assert torch.equal(beside[others], alone[others])
