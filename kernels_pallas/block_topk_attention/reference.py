"""The equation, naively: full logits, boolean masks of what is kept, softmax over the kept logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float

from kernels_pallas.block_topk_attention.plan import aligned, check_integer


def _visible(logits: Float[Array, "*b N T S"], length: ArrayLike | None) -> Array:
    """Keys that each query may see, as [*b, 1, T, 1]."""
    queries, size = logits.shape[-2:]
    if length is None:
        length = jnp.arange(size - queries, size) + 1
    length = jnp.asarray(length)
    return jnp.broadcast_to(length, (*logits.shape[:-3], queries))[..., None, :, None]


def _group_mean(logits: Float[Array, "*b N T S"], num_kv_heads: int) -> Float[Array, "*b K T S"]:
    """Mean of the logits over the query heads of a group; a head with NaN logits has no vote."""
    heads = logits.shape[-3]
    check_integer("num_kv_heads", num_kv_heads, 1)
    if heads % num_kv_heads:
        raise ValueError(f"num_kv_heads is {num_kv_heads}, which does not divide the {heads} heads of logits")
    grouped = logits.reshape(*logits.shape[:-3], num_kv_heads, heads // num_kv_heads, *logits.shape[-2:])
    return jnp.where(jnp.isnan(grouped), 0, grouped).mean(-3)


def _largest(scores: Float[Array, "*b m"], candidate: Bool[Array, "*b m"], count: int) -> Bool[Array, "*b m"]:
    """The ``count`` largest candidates along the last axis; of equal ones the earlier."""
    scores = jnp.where(candidate, jnp.maximum(scores, jnp.finfo(scores.dtype).min), -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return candidate & (rank < count)


def _to_heads(keep: Bool[Array, "*b K T S"], heads: int) -> Bool[Array, "*b N T S"]:
    return jnp.repeat(keep, heads // keep.shape[-3], axis=-3)


def local_mask(
    logits: Float[Array, "*b N T S"], *, num_local: int, num_sink: int = 4, length: ArrayLike | None = None
) -> Bool[Array, "*b N T S"]:
    """Keep the first ``num_sink`` and the latest ``num_local`` keys: the sliding-window baseline.

    Args:
        logits: scaled q·k; only the shape matters.
        num_local: latest keys that are kept.
        num_sink: first keys that are kept.
        length: keys that each query sees, its own included, broadcastable to [*b, T]; causal by default (the last query
            sees all S keys).

    Returns:
        True where a key is kept.

    >>> local_mask(jnp.zeros((1, 1, 6)), num_local=2, num_sink=1).astype(int)[0, 0].tolist()
    [1, 0, 0, 0, 1, 1]
    """
    check_integer("num_local", num_local, 0)
    check_integer("num_sink", num_sink, 0)
    visible, position = _visible(logits, length), jnp.arange(logits.shape[-1])
    keep = (position < visible) & ((position < num_sink) | (position >= visible - num_local))
    return jnp.broadcast_to(keep, logits.shape)


def topk_mask(
    logits: Float[Array, "*b N T S"],
    *,
    num_kv_heads: int,
    topk: int,
    num_sink: int = 4,
    num_local: int = 0,
    length: ArrayLike | None = None,
) -> Bool[Array, "*b N T S"]:
    """Oracle top-k: keep the ``topk`` keys with the largest logits, the sink and the local keys.

    The logits are averaged over the query heads that share a KV head, so a group keeps the same keys. It reads every
    key to choose, so it is a bound for methods that do not.

    Args:
        logits: scaled q·k [*b, N, T, S].
        num_kv_heads: K; query head n belongs to group n // (N/K).
        topk: keys that are chosen between sink and local ones.
        num_sink: first keys that are always kept.
        num_local: latest keys that are always kept.
        length: keys that each query sees, its own included, broadcastable to [*b, T]; causal by default.

    Returns:
        True where a key is kept; everything a query sees, where that is no more than the budget.

    >>> logits = jnp.array([[[0.0, 3.0, 1.0, 2.0, 0.0]]])
    >>> topk_mask(logits, num_kv_heads=1, topk=2, num_sink=1).astype(int)[0, 0].tolist()
    [1, 1, 0, 1, 0]
    """
    check_integer("topk", topk, 1)
    fixed = local_mask(logits[..., :1, :, :], num_local=num_local, num_sink=num_sink, length=length)
    visible, position = _visible(logits, length), jnp.arange(logits.shape[-1])
    scores = _group_mean(logits, num_kv_heads)
    candidate = jnp.broadcast_to((position < visible) & ~fixed, scores.shape)
    return _to_heads(fixed | _largest(scores, candidate, topk), logits.shape[-3])


def block_topk_mask(
    logits: Float[Array, "*b N T S"],
    *,
    num_kv_heads: int,
    block_size: int = 16,
    num_blocks: int = 64,
    num_sink: int = 4,
    num_local: int = 0,
    block_offset: int | None = None,
    length: ArrayLike | None = None,
) -> Bool[Array, "*b N T S"]:
    """Block top-k: keep the ``num_blocks`` blocks with the largest mean logits, what lies before them and the tail.

    Args:
        logits: scaled q·k [*b, N, T, S].
        num_kv_heads: K; query head n belongs to group n // (N/K), whose logits are averaged.
        block_size: keys of a block.
        num_blocks: blocks that are chosen.
        num_sink: first keys that are always kept.
        num_local: latest keys that are always kept, with those of the block that they cut (up to block_size − 1 more).
        block_offset: first key that can be chosen; all before it are kept. By default ``num_sink`` rounded up to whole
            blocks (aligned with pages); ``num_sink`` is the layout of the paper's code.
        length: keys that each query sees, its own included, broadcastable to [*b, T]; causal by default.

    Returns:
        True where a key is kept; everything a query sees, where that is no more than the budget.

    >>> logits = jnp.array([[[0.0, 0.0, 1.0, 1.0, 0.0, 3.0, 0.0]]])
    >>> block_topk_mask(logits, num_kv_heads=1, block_size=2, num_blocks=1, num_sink=2).astype(int)[0, 0].tolist()
    [1, 1, 0, 0, 1, 1, 1]
    """
    check_integer("block_size", block_size, 1)
    check_integer("num_blocks", num_blocks, 1)
    check_integer("num_sink", num_sink, 0)
    check_integer("num_local", num_local, 0)
    offset = aligned(num_sink, block_size) if block_offset is None else block_offset
    check_integer("block_offset", offset, num_sink)
    visible, position = _visible(logits, length), jnp.arange(logits.shape[-1])
    scores = _group_mean(logits, num_kv_heads)
    # Blocks are counted from `offset`; the last one, if it is cut by the end, can never be full.
    total = max(-(-(logits.shape[-1] - offset) // block_size), 1)
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, max(offset + total * block_size - logits.shape[-1], 0))]
    padded = jnp.pad(scores, padding)[..., offset : offset + total * block_size]
    means = padded.reshape(*padded.shape[:-1], total, block_size).mean(-1)
    end = offset + (jnp.arange(total) + 1) * block_size
    full = end <= visible - num_local
    chosen = _largest(means, jnp.broadcast_to(full, means.shape), num_blocks)
    tail = offset + full.sum(-1, keepdims=True) * block_size
    block = jnp.clip((position - offset) // block_size, 0, total - 1)
    inside = jnp.take_along_axis(chosen, jnp.broadcast_to(block, (*chosen.shape[:-1], block.size)), -1)
    keep = (position < offset) | (position >= tail) | inside
    return _to_heads(keep & (position < visible), logits.shape[-3])


def masked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    keep: Bool[Array, "B N T S"],
    scale: ArrayLike | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax over the kept logits only: oᵢ = Σⱼ pᵢⱼ vⱼ, pᵢⱼ = keepᵢⱼ·exp(sᵢⱼ) / Σₗ keepᵢₗ·exp(sᵢₗ), in float32 or 64.

    Rows that keep nothing are zero. Keys and values that no query keeps may hold anything.

    >>> q = jnp.ones((1, 1, 1, 2))
    >>> k = v = jnp.array([[[[1.0, 0.0]], [[jnp.nan, jnp.nan]]]])
    >>> masked_attention(q, k, v, jnp.array([[[[True, False]]]])).tolist()
    [[[[1.0, 0.0]]]]
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    groups = query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    used = keep.any((1, 2))[:, :, None, None]
    key, value = (jnp.where(used, jnp.asarray(x, dtype), 0) for x in (key, value))
    key, value = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(dtype) * scale, key, precision="highest")
    logits = jnp.where(keep, logits, -jnp.inf)
    top = jnp.where(keep.any(-1, keepdims=True), jax.lax.stop_gradient(logits.max(-1, keepdims=True)), 0)
    weight = jnp.where(keep, jnp.exp(logits - top), 0)
    weight = weight / jnp.where(keep.any(-1, keepdims=True), weight.sum(-1, keepdims=True), 1)
    return jnp.einsum("bnts,bsnv->btnv", weight, value, precision="highest").astype(query.dtype)
