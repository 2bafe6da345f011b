"""Smaller models: weights in fewer bits, fewer layers and tokens, and students taught by larger models."""

from jaxaccel.compression.distillation import (
    init_projections,
    layerwise_kd_loss,
    logit_kd_loss,
    progressive_weights,
    uniform_layer_map,
)
from jaxaccel.compression.layers import (
    ImportanceState,
    accumulate_importance,
    finalize_importance,
    init_importance,
    layer_importance,
    prune_layers,
    select_layers,
    slice_mlp,
)
from jaxaccel.compression.tokens import prune_tokens, select_visual_tokens, token_relevance
from jaxaccel.compression.weight_only import Int8Weight, dequantize, linear, quantize, quantize_weights, take_rows

__all__ = [
    "ImportanceState",
    "Int8Weight",
    "accumulate_importance",
    "dequantize",
    "finalize_importance",
    "init_importance",
    "init_projections",
    "layer_importance",
    "layerwise_kd_loss",
    "linear",
    "logit_kd_loss",
    "progressive_weights",
    "prune_layers",
    "prune_tokens",
    "quantize",
    "quantize_weights",
    "select_layers",
    "select_visual_tokens",
    "slice_mlp",
    "take_rows",
    "token_relevance",
    "uniform_layer_map",
]
