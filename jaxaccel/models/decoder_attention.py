"""How new tokens of a decoder attend: to each other, and to a cache of earlier ones.

Two sets of keys are never joined in memory: the softmax over both is written out, with one maximum for both.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.attention import (
    BlockTopKCache,
    block_topk_decode,
    block_topk_partial,
    lla_finish,
    lla_merge,
    lla_partial,
    local_linear_attention,
)
from jaxaccel.attention import append as append_block
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.kv_cache import BlockTopK

QUERY_BLOCK = 512
"""On CPU, prompts attend by so many queries at a time: scores of a long prompt need not be held at once."""


def grouped(queries: Float[Array, "B n N H"], heads: int) -> Float[Array, "B K m H"]:
    """Queries by key head: m = n·N/K rows, those of one token together."""
    batch, count, total, size = queries.shape
    split = queries.reshape(batch, count, heads, total // heads, size)
    return split.transpose(0, 2, 1, 3, 4).reshape(batch, heads, -1, size)


def ungrouped(rows: Float[Array, "B K m H"], count: int) -> Float[Array, "B n N H"]:
    """The inverse of `grouped`."""
    batch, heads, _, size = rows.shape
    split = rows.reshape(batch, heads, count, -1, size)
    return split.transpose(0, 2, 1, 3, 4).reshape(batch, count, -1, size)


def _scores(queries: Array, keys: Array) -> Array:
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    return jnp.einsum("bkmh,bksh->bkms", queries, keys, preferred_element_type=dtype) * queries.shape[-1] ** -0.5


def _weighted(weights: Array, values: Array) -> Array:
    return jnp.einsum("bkms,bksh->bkmh", weights.astype(values.dtype), values, preferred_element_type=weights.dtype)


def _own_part(
    queries: Array, keys: Array, values: Array, mask: Bool[Array, "n n"]
) -> tuple[Float[Array, "B K m H"], Float[Array, "B K m"]]:
    """Attention of the new tokens to each other, and the logarithm of its sum."""
    per_token = queries.shape[2] // mask.shape[0]
    scores = jnp.where(jnp.repeat(mask, per_token, 0), _scores(queries, keys), -jnp.inf)
    total = jax.nn.logsumexp(scores, -1)
    return _weighted(jnp.exp(scores - total[..., None]), values), total


def dense_step(
    queries: Float[Array, "B K m H"],
    keys: Float[Array, "B K n H"],
    values: Float[Array, "B K n H"],
    cached: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    length: Int[Array, "B"],
    mask: Bool[Array, "n n"],
) -> Float[Array, "B K m H"]:
    """Softmax attention to the ``length`` cached tokens, and to the new ones that ``mask`` lets each see."""
    per_token = queries.shape[2] // mask.shape[0]
    used = jnp.arange(cached[0].shape[2]) < length[:, None]
    old = jnp.where(used[:, None, None], _scores(queries, cached[0]), -jnp.inf)
    own = jnp.where(jnp.repeat(mask, per_token, 0), _scores(queries, keys), -jnp.inf)
    top = jnp.maximum(old.max(-1, keepdims=True), own.max(-1, keepdims=True))
    old, own = jnp.exp(old - top), jnp.exp(own - top)
    total = old.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)
    return (_weighted(old, cached[1]) + _weighted(own, values)) / total


def _sparse_step(
    queries: Array, keys: Array, values: Array, cached: BlockTopKCache, mask: Array, sparse: BlockTopK
) -> Array:
    """Block top-k: one token takes the op and its kernels; several share the blocks that the first one chooses."""
    budget: dict[str, Any] = {
        "num_blocks": sparse.num_blocks, "num_sink": sparse.num_sink, "num_local": sparse.num_local
    }  # fmt: skip
    if queries.shape[1] == 1:
        # `kv_cache.append` stores the same token again; XLA sees that both are one.
        stored = append_block(cached, keys.swapaxes(1, 2), values.swapaxes(1, 2))
        return block_topk_decode(queries, stored, **budget)
    out, total = block_topk_partial(queries, cached, **budget)
    heads = keys.shape[1]
    own, own_total = _own_part(grouped(queries, heads), keys, values, mask)
    own = ungrouped(own, queries.shape[1])
    own_total = ungrouped(own_total[..., None], queries.shape[1])[..., 0]
    share = jax.nn.sigmoid(own_total - total)[..., None]
    return (share * own + (1 - share) * out).astype(queries.dtype)


def _linear_step(
    queries: Array, keys: Array, values: Array, cached: Any, length: Array, mask: Array, ridge: float
) -> Array:
    """Local linear attention: one token merges the moments of cache and token; several solve over both."""
    old_keys, old_values, keys, values = (x.swapaxes(1, 2) for x in (*cached, keys, values))
    if queries.shape[1] == 1:
        state = lla_merge(lla_partial(queries, old_keys, old_values, length=length), lla_partial(queries, keys, values))
        return lla_finish(state, queries, ridge=ridge)
    batch, size = old_keys.shape[:2]
    used = jnp.broadcast_to((jnp.arange(size) < length[:, None])[:, None, None], (batch, 1, len(mask), size))
    both = jnp.concatenate([used, jnp.broadcast_to(mask, (batch, 1, *mask.shape))], -1)
    joined = (jnp.concatenate(pair, 1) for pair in ((old_keys, keys), (old_values, values)))
    out = local_linear_attention(queries, *joined, ridge=ridge, is_causal=False, mask=both)
    assert isinstance(out, jax.Array)
    return out


def attend_cached(
    queries: Float[Array, "B n N H"],
    keys: Float[Array, "B K n H"],
    values: Float[Array, "B K n H"],
    cached: Any,
    length: Int[Array, "B"],
    mask: Bool[Array, "n n"],
    config: DecoderConfig,
    sparse: BlockTopK | None,
) -> Float[Array, "B n N H"]:
    """Attention of n new tokens to one layer's cache and to each other.

    Args:
        queries: rotated.
        keys: of the new tokens, rotated, with as many heads as the cache has.
        values: of the new tokens.
        cached: a layer of a `KVCache`.
        length: slots in use.
        mask: which new token sees which.
        config: kind of attention.
        sparse: how a `BlockTopKCache` is read.
    """
    if isinstance(cached, BlockTopKCache):
        assert sparse is not None
        return _sparse_step(queries, keys, values, cached, mask, sparse)
    if config.attention == "local_linear":
        return _linear_step(queries, keys, values, cached, length, mask, config.attention_ridge)
    rows = dense_step(grouped(queries, keys.shape[1]), keys, values, cached, length, mask)
    return ungrouped(rows, queries.shape[1]).astype(queries.dtype)


def attend_new(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    config: DecoderConfig,
) -> Float[Array, "B T N H"]:
    """Causal attention among the tokens of a prompt; block top-k attends densely here, as it is meant to."""
    if config.attention == "local_linear":
        out = local_linear_attention(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), ridge=config.attention_ridge)
        assert isinstance(out, jax.Array)
        return out
    length = queries.shape[1]
    if length <= QUERY_BLOCK or jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), is_causal=True)
    # Blocks of queries see the keys up to their own end only: half of the work, and no [T, T] scores.
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        rows = grouped(queries[:, start:end], keys.shape[1])
        mask = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        scores = jnp.where(
            jnp.repeat(mask, rows.shape[2] // (end - start), 0), _scores(rows, keys[:, :, :end]), -jnp.inf
        )
        weights = jax.nn.softmax(scores, -1)
        parts.append(ungrouped(_weighted(weights, values[:, :, :end]), end - start))
    return jnp.concatenate(parts, 1).astype(queries.dtype)
