"""What compiled layers are told of a model, and the library that `layers.c` makes for a type of weights."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from blockroll.kernels.compiler import built

SOURCE = Path(__file__).with_name("layers.c")
_WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("norm_in", "norm_q", "norm_k", "norm_attention", "norm_mlp_in", "norm_mlp")


class Layer(ctypes.Structure):
    """Addresses of a layer's weights; None where it has none."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in (*_WEIGHTS, *(f"{each}_bias" for each in _WEIGHTS), *_NORMS)
    ]


class LayerUpdates(ctypes.Structure):
    """Addresses of the low-rank updates of a layer's projections, those of the same rows as one."""

    _fields_ = [
        (f"{group}_{side}", ctypes.c_void_p)
        for group in ("qkv", "o", "gate_up", "down")
        for side in ("down", "up")
    ]


class UpdatedRows(ctypes.Structure):
    """Which rows of each text get updates, and space for the numbers of each of them."""

    _fields_ = [
        ("first", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("narrow_space", ctypes.c_void_p),
        ("wide_space", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """What all layers have in common."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "width", "heads", "key_heads", "head_width", "inner", "norm_adds_one", "activation"
            )
        ),
        ("epsilon", ctypes.c_float),
        ("norm_last", ctypes.c_void_p),
    ]  # fmt: skip


@cache
def layers_library(dtype: torch.dtype, processor: str = "native") -> ctypes.CDLL:
    """The compiled code for weights of a type, float32 or bfloat16; MissingDependency without a compiler.

    `processor` is one that the compiler knows, and this machine can run code for.
    """
    library = built(SOURCE, [f"-DNUMBER_BF16={int(dtype == torch.bfloat16)}"], processor)
    number, real, at, threads = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
    between, attend, product = library.between_attentions, library.attend, library.product_of_rows
    between.argtypes = [*[at] * 8, *[number] * 2, *[at] * 8, threads]
    attend.argtypes = [*[at] * 4, *[number] * 5, at, *[number] * 2, *[real] * 2, *[at] * 2, threads]
    product.argtypes = [*[at] * 2, number, at, *[number] * 2, at, threads]
    between.restype = attend.restype = product.restype = None
    return library
