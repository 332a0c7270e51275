"""Everything of a decoder layer but its attention, in compiled code: `layers.c`, built on this machine."""

from blockroll.kernels.layers.build import Layer, Model, layers_library

__all__ = ["Layer", "Model", "layers_library"]
