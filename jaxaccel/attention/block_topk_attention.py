"""Block top-k attention for decoding: read the few blocks of the KV cache that matter to the current token.

What it buys: a step of decoding reads S / block_size mean keys and num_blocks · block_size tokens in place of all S,
so the traffic of the cache, which is what long or repeated generation waits for, hardly grows with the context. The
selection is shared by the query heads of a group and costs one product per block and KV head; the sums of the blocks
are kept up to date as tokens arrive. Nothing is trained.

When to use it: decoding from caches of some thousand tokens and more, with a model that was trained densely; long
chains of thought, many trials of one prompt (`jaxaccel.forecasting` says what that saves). When not: prefill and
training, short contexts, and answers that depend on single tokens among unlike neighbours: a block is found by the
mean of its keys, and ``python -m experiments run block_topk_recall`` shows how recall suffers where the budget is
small. Keep the first layer dense, as the authors do.

    cache = init_cache(batch, size, num_kv_heads, head_dim)          # once
    out, cache = prefill(cache, query, key, value)                   # the prompt, densely
    cache = append(cache, new_key, new_value)                        # every step, before
    out = block_topk_decode(new_query, cache, num_blocks=64)         # attending

The op is `kernels_pallas.block_topk_attention`, with its equations; this module only gives it its place in the
library.

Source: Sadhukhan et al., Kinetics: Rethinking Test-Time Scaling Laws, arXiv 2506.05333.
"""

from kernels_pallas.block_topk_attention import (
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

__all__ = [
    "BlockTopKCache",
    "append",
    "block_topk_attention",
    "block_topk_decode",
    "block_topk_mask",
    "block_topk_partial",
    "extend",
    "init_cache",
    "local_mask",
    "prefill",
    "select_blocks",
    "topk_mask",
    "update_centroids",
]
