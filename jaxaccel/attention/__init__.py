"""Attention: mechanisms that cost less per token, or that learn more from the same context.

Layout is that of `jax.nn.dot_product_attention`: queries [B, T, N, H], keys and values [B, S, K, H].
"""

from jaxaccel.attention.block_topk_attention import (
    BlockTopKCache,
    append,
    block_topk_attention,
    block_topk_decode,
    block_topk_mask,
    block_topk_partial,
    extend,
    init_cache,
    local_mask,
    prefill,
    select_blocks,
    topk_mask,
    update_centroids,
)
from jaxaccel.attention.local_linear_attention import (
    DecodeState,
    LLACache,
    LLAState,
    LocalLinearAttention,
    lla_finish,
    lla_merge,
    lla_partial,
    local_linear_attention,
    local_linear_decode,
)

__all__ = [
    "BlockTopKCache",
    "DecodeState",
    "LLACache",
    "LLAState",
    "LocalLinearAttention",
    "append",
    "block_topk_attention",
    "block_topk_decode",
    "block_topk_mask",
    "block_topk_partial",
    "extend",
    "init_cache",
    "lla_finish",
    "lla_merge",
    "lla_partial",
    "local_linear_attention",
    "local_linear_decode",
    "local_mask",
    "prefill",
    "select_blocks",
    "topk_mask",
    "update_centroids",
]
