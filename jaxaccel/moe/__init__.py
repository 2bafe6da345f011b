"""Mixtures of experts that save time where it is spent: at decoding, in the reading of weights."""

from jaxaccel.moe.adaptive_factor import AdaptiveFactor, AdaptiveFactorState, adaptive_factor
from jaxaccel.moe.block_ffn import BlockFFN, BlockFFNParams, Routing, block_ffn, block_ffn_init, route
from jaxaccel.moe.from_dense import cluster_neurons, from_dense
from jaxaccel.moe.losses import activation_locality_loss, chunk_sparsification_loss, neighbour_mask
from jaxaccel.moe.metrics import chunk_sparsity, dead_experts, reuse_ratio, token_sparsity

__all__ = [
    "AdaptiveFactor",
    "AdaptiveFactorState",
    "BlockFFN",
    "BlockFFNParams",
    "Routing",
    "activation_locality_loss",
    "adaptive_factor",
    "block_ffn",
    "block_ffn_init",
    "chunk_sparsification_loss",
    "chunk_sparsity",
    "cluster_neurons",
    "dead_experts",
    "from_dense",
    "neighbour_mask",
    "reuse_ratio",
    "route",
    "token_sparsity",
]
