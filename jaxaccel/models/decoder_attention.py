"""How new tokens of a decoder attend: to each other, and to a cache of earlier ones.

Two sets of keys are never joined in memory: the softmax over both is written out, with one maximum for both.
"""

from typing import Any, NamedTuple

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

TILE = 256
"""On CPU, long prompts attend by tiles of so many queries and keys: all of [T, T] is never held."""
FEW, LONG = 4, 32
"""On CPU, up to so many queries that share at least so many keys each make a product of their own: XLA is fast with one
vector times a matrix, and slow with a few. For more queries, or few keys, the calls cost more."""


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


class Slots(NamedTuple):
    """One layer's keys and values of all S positions of a text whose tokens still change."""

    keys: Any  # [B, S, K, H], rotated
    values: Any  # [B, S, K, H]


def attend_all(
    queries: Float[Array, "B n N H"],
    keys: Float[Array, "B n K H"],
    values: Float[Array, "B n K H"],
    slots: Slots | None,
    positions: Int[Array, "B n"],
    key_mask: Bool[Array, "B S"] | None,
) -> tuple[Float[Array, "B n N H"], Slots]:
    """Attention without a causal mask: to each other, or to all slots once those of the n tokens are replaced.

    Args:
        queries: rotated.
        keys: rotated.
        values: of the same tokens.
        slots: of the whole text; ``None`` where the n tokens are all there is.
        positions: slots that the tokens replace. One beyond the last slot replaces nothing.
        key_mask: which slots, or tokens, are seen; all by default.

    Returns:
        What is mixed, and the slots afterwards.
    """
    if slots is not None:
        rows = jnp.arange(len(positions))[:, None]
        keys, values = (
            old.at[rows, positions].set(new.astype(old.dtype), mode="drop")
            for old, new in zip(slots, (keys, values), strict=True)
        )
    mask = None if key_mask is None else key_mask[:, None, None]
    return jax.nn.dot_product_attention(queries, keys, values, mask=mask), Slots(keys, values)


def _one_by_one(queries: int, keys: int) -> bool:
    return queries <= FEW and keys >= LONG and jax.default_backend() == "cpu"


def _scores(queries: Array, keys: Array) -> Array:
    dtype = jnp.promote_types(queries.dtype, jnp.float32)
    scale = queries.shape[-1] ** -0.5
    if _one_by_one(queries.shape[2], keys.shape[2]):
        rows = [queries[:, :, i] for i in range(queries.shape[2])]
        products = [jnp.einsum("bkh,bksh->bks", row, keys, preferred_element_type=dtype) for row in rows]
        return jnp.stack(products, 2) * scale
    return jnp.einsum("bkmh,bksh->bkms", queries, keys, preferred_element_type=dtype) * scale


def _weighted(weights: Array, values: Array) -> Array:
    dtype, weights = weights.dtype, weights.astype(values.dtype)
    if _one_by_one(*weights.shape[2:]):
        rows = [weights[:, :, i] for i in range(weights.shape[2])]
        return jnp.stack([jnp.einsum("bks,bksh->bkh", row, values, preferred_element_type=dtype) for row in rows], 2)
    return jnp.einsum("bkms,bksh->bkmh", weights, values, preferred_element_type=dtype)


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
    if queries.shape[1] <= 2 * TILE or jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(queries, keys.swapaxes(1, 2), values.swapaxes(1, 2), is_causal=True)
    return tiled_causal(queries, keys, values)


def tiled_causal(
    queries: Float[Array, "B T N H"], keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"]
) -> Float[Array, "B T N H"]:
    """Causal softmax attention by tiles, with a running maximum and sum; tiles above the diagonal are never computed.

    One scan over the pairs of tiles that are needed, which is compiled once whatever the length. Gradients compute a
    tile's scores again. For CPU: elsewhere `jax.nn.dot_product_attention` is as sparing.
    """
    length, heads = queries.shape[1], keys.shape[1]
    blocks = -(-length // TILE)
    padding = ((0, 0), (0, blocks * TILE - length))
    rows = grouped(jnp.pad(queries, (*padding, (0, 0), (0, 0))), heads)
    keys, values = (jnp.pad(part, (padding[0], (0, 0), padding[1], (0, 0))) for part in (keys, values))
    count = rows.shape[2] // blocks  # rows of a tile: its queries in all heads of a group
    token = jnp.arange(count) // (count // TILE)
    later = jnp.arange(TILE) > token[:, None]
    pairs = jnp.array([(i, j) for i in range(blocks) for j in range(i + 1)], jnp.int32)

    def tile(carry: Any, pair: Array) -> tuple[Any, None]:
        i, j = pair
        old = tuple(jax.lax.dynamic_slice_in_dim(part, i * count, count, 2) for part in carry)
        k, v = (jax.lax.dynamic_slice_in_dim(part, j * TILE, TILE, 2) for part in (keys, values))
        scores = _scores(jax.lax.dynamic_slice_in_dim(rows, i * count, count, 2), k)
        scores = jnp.where((i == j) & later, -jnp.inf, scores)
        top = jnp.maximum(old[1], scores.max(-1, keepdims=True))
        weights, fade = jnp.exp(scores - top), jnp.exp(old[1] - top)
        new = (old[0] * fade + _weighted(weights, v), top, old[2] * fade + weights.sum(-1, keepdims=True))
        stored = (jax.lax.dynamic_update_slice_in_dim(a, b, i * count, 2) for a, b in zip(carry, new, strict=True))
        return tuple(stored), None

    zeros = jnp.zeros(rows.shape, jnp.promote_types(rows.dtype, jnp.float32))
    first = (zeros, zeros[..., :1] - jnp.inf, zeros[..., :1])
    (out, _, total), _ = jax.lax.scan(jax.checkpoint(tile), first, pairs)
    return ungrouped(out / total, blocks * TILE)[:, :length].astype(queries.dtype)
