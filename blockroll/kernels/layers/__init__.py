"""Decoder layers in compiled code: `layers.c`, built on this machine."""

from blockroll.kernels.layers.build import Layer, LayerUpdates, Model, UpdatedRows, layers_library

__all__ = ["Layer", "LayerUpdates", "Model", "UpdatedRows", "layers_library"]
