"""Smaller models: weights and activations in fewer bits."""

from jaxaccel.compression.weight_only import Int8Weight, dequantize, linear, quantize_weights, take_rows

__all__ = ["Int8Weight", "dequantize", "linear", "quantize_weights", "take_rows"]
