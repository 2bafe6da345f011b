"""Smaller models: weights in fewer bits, and students taught by larger models."""

from jaxaccel.compression.distillation import (
    init_projections,
    layerwise_kd_loss,
    logit_kd_loss,
    progressive_weights,
    uniform_layer_map,
)
from jaxaccel.compression.weight_only import Int8Weight, dequantize, linear, quantize, quantize_weights, take_rows

__all__ = [
    "Int8Weight",
    "dequantize",
    "init_projections",
    "layerwise_kd_loss",
    "linear",
    "logit_kd_loss",
    "progressive_weights",
    "quantize",
    "quantize_weights",
    "take_rows",
    "uniform_layer_map",
]
