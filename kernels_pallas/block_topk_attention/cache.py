"""The cache of keys and values, with the sum of the keys of every block kept up to date as tokens arrive."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Float, Int

from kernels_pallas.arrays import accumulator
from kernels_pallas.block_topk_attention.plan import Layout, Plan, check_integer, check_layout


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "centroid_sum", "length"),
    meta_fields=("block_size", "phase", "layout"),
)
@dataclasses.dataclass(frozen=True)
class BlockTopKCache:
    """Keys and values of B sequences, and what choosing blocks needs: a pytree.

    With layout ``"BSKH"`` keys and values are [B, S, K, ...], with ``"BKSH"`` they are [B, K, S, ...]; with
    ``"BKSHV"``, ``k`` holds both, [B, K, S, H + V], and ``v`` is None. Sums are always [B, K, M, H],
    M = ⌊(S − phase)/block_size⌋: every step reads all of them, head by head.
    """

    # Not annotated as arrays: `jax.tree.map` may put shardings or specifications in their places.
    k: Any  # keys [B, S, K, H] in any float dtype; slots from `length` on may hold anything
    v: Any  # values [B, S, K, V], likewise
    centroid_sum: Any  # [B, K, M, H], float32 or 64, sum of the keys that a block has so far
    length: Any  # [B], int32, tokens that are held
    block_size: int  # static: positions of a block
    phase: int  # static: position of block 0, in [0, block_size); 0 where blocks are aligned with pages
    layout: Layout  # static: order of the axes of k and v

    @property
    def size(self) -> int:
        """Positions that the cache has room for."""
        return self.k.shape[self.layout.index("S")]


def init_cache(
    batch: int,
    size: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    block_size: int = 16,
    block_offset: int = 0,
    dtype: DTypeLike = jnp.float32,
    layout: Layout = "BSKH",
) -> BlockTopKCache:
    """An empty cache.

    Args:
        batch: sequences B.
        size: positions S, a multiple of ``block_size``.
        num_kv_heads: K.
        head_dim: size of a key.
        value_dim: size of a value; that of a key by default.
        block_size: positions of a block.
        block_offset: where blocks start, modulo ``block_size``: 0 aligns them with pages; the number of sink tokens
            gives the layout of the paper's code.
        dtype: of keys and values.
        layout: ``"BSKH"`` as `jax.nn.dot_product_attention` has it; ``"BKSH"`` keeps the pages of a head together;
            ``"BKSHV"`` also keeps a key beside its value, so that a page is one piece of memory: best for TPUs, whose
            kernel takes no other where H is not a multiple of 128.

    Returns:
        A cache of zero tokens.

    Raises:
        ValueError: if a size is less than 1 or ``block_size`` does not divide ``size``.

    >>> init_cache(1, 64, num_kv_heads=2, head_dim=8).centroid_sum.shape
    (1, 2, 4, 8)
    """
    value_dim = head_dim if value_dim is None else value_dim
    for name, number in (("batch", batch), ("size", size), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim),
                         ("value_dim", value_dim), ("block_size", block_size)):  # fmt: skip
        check_integer(name, number, 1)
    check_integer("block_offset", block_offset, 0)
    check_layout(layout)
    phase = block_offset % block_size
    total = (size - phase) // block_size
    if size % block_size or not total:
        raise ValueError(
            f"block_size is {block_size}, which does not divide the cache's {size} positions into blocks from "
            f"position {phase} on: expected a multiple of {block_size}"
        )

    rows = (batch, size, num_kv_heads) if layout == "BSKH" else (batch, num_kv_heads, size)
    together = layout == "BKSHV"
    return BlockTopKCache(
        jnp.zeros((*rows, head_dim + value_dim if together else head_dim), dtype),
        None if together else jnp.zeros((*rows, value_dim), dtype),
        jnp.zeros((batch, num_kv_heads, total, head_dim), accumulator(jnp.dtype(dtype))),
        jnp.zeros(batch, jnp.int32),
        block_size,
        phase,
        layout,
    )


def plan_of(cache: BlockTopKCache, num_blocks: int, num_sink: int, num_local: int) -> Plan:
    """The static sizes of a step on a cache: blocks start at its phase, after at least ``num_sink`` positions."""
    check_integer("num_sink", num_sink, 0)
    over = max(num_sink - cache.phase, 0)
    offset = cache.phase + -(-over // cache.block_size) * cache.block_size
    return Plan.make(cache.size, cache.block_size, num_blocks, num_sink, num_local, offset)


def _check_rows(cache: BlockTopKCache, name: str, rows: Array, width: int, count: int | None) -> None:
    batch, heads = cache.centroid_sum.shape[:2]
    if (
        rows.ndim != 4
        or rows.shape[::2] != (batch, heads)
        or rows.shape[3] != width
        or count not in (None, rows.shape[1])
    ):
        expected = f"[{batch}, {'T' if count is None else count}, {heads}, {width}]"
        raise ValueError(f"{name} has shape {rows.shape}, expected {expected}")


def _check_pair(cache: BlockTopKCache, key: Array, value: Array, count: int | None) -> None:
    width = cache.centroid_sum.shape[-1]
    _check_rows(cache, "key", key, width, count)
    value_width = cache.k.shape[-1] - width if cache.v is None else cache.v.shape[-1]
    _check_rows(cache, "value", value, value_width, key.shape[1])


def _check_room(cache: BlockTopKCache, new: int) -> None:
    """Raise where a full cache is seen in time: lengths that are traced cannot be checked."""
    if not isinstance(cache.length, jax.core.Tracer) and (longest := int(cache.length.max())) + new > cache.size:
        raise ValueError(f"{new} new tokens do not fit: the cache holds {longest} of {cache.size}")


def _at(array: Array, position: Int[Array, "B T"], layout: Layout) -> Any:
    """Rows [B, T, K, ...] at positions of the S axis, to read or to write."""
    batch = jnp.arange(array.shape[0])[:, None]
    if layout == "BSKH":
        return array.at[batch, position]
    return array.at[batch[..., None], jnp.arange(array.shape[1]), position[..., None]]


def _store(array: Array, rows: Array, position: Int[Array, "B T"], layout: Layout) -> Array:
    """Write rows; positions past the end are dropped."""
    return _at(array, position, layout).set(rows.astype(array.dtype), mode="drop", unique_indices=True)


def _write(cache: BlockTopKCache, key: Array, value: Array, position: Array) -> tuple[Array, Array | None]:
    """Keys and values with new rows."""
    if cache.v is None:
        together = jnp.concatenate([key.astype(cache.k.dtype), value.astype(cache.k.dtype)], -1)
        return _store(cache.k, together, position, cache.layout), None
    return _store(cache.k, key, position, cache.layout), _store(cache.v, value, position, cache.layout)


def update_centroids(cache: BlockTopKCache, new_key: Float[Array, "_ _ _ _"]) -> BlockTopKCache:
    """Add one key per sequence, which is about to be stored at ``cache.length``, to the sum of its block.

    One row per KV head is read and written, whatever the length. The first key of a block replaces what the row held.
    A block's sum is used only when the block is full (`select_blocks` sees to it), so no query sees a mean that lacks
    keys or holds later ones.

    Args:
        cache: before the token is stored; keys, values and lengths are returned as they are. `append` does both.
        new_key: key of the new token, position encoding applied.

    Returns:
        The cache with new sums.
    """
    _check_rows(cache, "new_key", new_key, cache.centroid_sum.shape[-1], 1)
    sums, inside = cache.centroid_sum, cache.length - cache.phase
    # Before block 0 as after the last one: out of range, so that the write is dropped (a negative index would wrap).
    block = jnp.where(inside >= 0, inside // cache.block_size, sums.shape[2])[:, None]
    # Keys are rounded as they are stored: a sum is that of the keys that attention reads.
    rows = new_key.astype(cache.k.dtype).astype(sums.dtype)
    first = (inside % cache.block_size == 0)[:, None, None, None]
    summed = jnp.where(first, rows, _at(sums, block, "BKSH").get(mode="clip") + rows)
    return dataclasses.replace(cache, centroid_sum=_store(sums, summed, block, "BKSH"))


def append(
    cache: BlockTopKCache, new_key: Float[Array, "_ _ _ _"], new_value: Float[Array, "_ _ _ _"]
) -> BlockTopKCache:
    """Store one token per sequence: its key, its value, and its part in the mean of its block.

    Cost does not grow with S if the old cache is given away (``jax.jit(step, donate_argnums=...)``); else it is copied.
    Under ``jit`` lengths are not checked: a token for which there is no room is dropped, and the length stays S.

    Args:
        cache: to add to.
        new_key: key of the token, position encoding applied.
        new_value: its value.

    Returns:
        The cache, one token longer.

    Raises:
        ValueError: for shapes that do not fit, or (outside ``jit``) a cache that is full.

    >>> cache = append(init_cache(1, 8, 1, 2, block_size=4), jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)))
    >>> cache.length.tolist(), cache.centroid_sum[0, 0, :, 0].tolist()
    ([1], [1.0, 0.0])
    """
    _check_pair(cache, new_key, new_value, 1)
    _check_room(cache, 1)
    summed = update_centroids(cache, new_key).centroid_sum
    k, v = _write(cache, new_key, new_value, cache.length[:, None])
    return dataclasses.replace(cache, k=k, v=v, centroid_sum=summed, length=jnp.minimum(cache.length + 1, cache.size))


def extend(
    cache: BlockTopKCache,
    key: Float[Array, "_ _ _ _"],
    value: Float[Array, "_ _ _ _"],
    count: ArrayLike | None = None,
) -> BlockTopKCache:
    """Store T tokens per sequence, as after the prefill of a prompt or of a part of it.

    The sums of all blocks are passed through once; use `append` for single tokens.

    Args:
        cache: to add to; sequences may have different lengths.
        key: keys of the tokens, position encoding applied.
        value: their values.
        count: how many of the T tokens are real, a number or [B]; all by default. Those after are not stored.

    Returns:
        The cache, ``count`` tokens longer. Under ``jit``, tokens for which there is no room are dropped.

    Raises:
        ValueError: for shapes that do not fit, or (outside ``jit``) a cache without room.

    >>> cache = extend(init_cache(1, 8, 1, 2, block_size=4), jnp.ones((1, 5, 1, 2)), jnp.ones((1, 5, 1, 2)))
    >>> cache.length.tolist(), cache.centroid_sum[0, 0, :, 0].tolist()
    ([5], [4.0, 1.0])
    """
    _check_pair(cache, key, value, None)
    tokens = key.shape[1]
    if count is None:
        _check_room(cache, tokens)
    count = jnp.broadcast_to(jnp.asarray(tokens if count is None else count, jnp.int32), cache.length.shape)
    step = jnp.arange(tokens)
    position = jnp.where(step < count[:, None], cache.length[:, None] + step, cache.size + step)
    sums, inside = cache.centroid_sum, position - cache.phase
    # What blocks held that start from here on is forgotten; the block that is being filled goes on.
    start = cache.phase + jnp.arange(sums.shape[2]) * cache.block_size
    sums = jnp.where((start < cache.length[:, None])[:, None, :, None], sums, 0)
    block = jnp.where(inside >= 0, inside // cache.block_size, sums.shape[2])
    rows = key.astype(cache.k.dtype).astype(sums.dtype)
    sums = _at(sums, block, "BKSH").add(rows, mode="drop")
    k, v = _write(cache, key, value, position)
    length = jnp.minimum(cache.length + count, cache.size)
    return dataclasses.replace(cache, k=k, v=v, centroid_sum=sums, length=length)


def prefill(
    cache: BlockTopKCache,
    query: Float[Array, "B T N H"],
    key: Float[Array, "_ _ _ _"],
    value: Float[Array, "_ _ _ _"],
    count: ArrayLike | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N V"], BlockTopKCache]:
    """Dense causal attention over a prompt, which is stored in an empty cache: prefill is always dense.

    Args:
        cache: empty, as from `init_cache`: what it held is not seen by the queries.
        query: queries of the prompt.
        key: its keys, position encoding applied.
        value: its values, of the keys' size (as `jax.nn.dot_product_attention` wants them).
        count: real tokens of each prompt, a number or [B]; all T by default. Rows after them mean nothing.
        scale: of the logits; 1/√H by default.

    Returns:
        What `jax.nn.dot_product_attention` gives, and the cache that holds the prompt.

    >>> x = jnp.ones((1, 3, 1, 2))
    >>> out, cache = prefill(init_cache(1, 8, 1, 2, block_size=4), x, x, x)
    >>> out.shape, cache.length.tolist()
    ((1, 3, 1, 2), [3])
    """
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length.max()):
        raise ValueError(f"cache holds {int(cache.length.max())} tokens, expected an empty one; use extend")
    out = jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)
    return out, extend(cache, key, value, count)
