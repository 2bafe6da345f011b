"""Keys and values of the tokens so far, for decoding: a pytree that steps read and `append` extends.

A step never writes: it attends to the cache and to its own new tokens, and returns their keys and values. `append` then
stores those that count, one token of plain decoding, a whole prompt, or the accepted path of a tree. So nothing that a
rejected draft computed is ever in the cache.

Keys and values lie as [B, K, S, H]: XLA on CPU would transpose [B, S, K, H] at each step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Int

from jaxaccel.attention import BlockTopKCache, extend, init_cache


@dataclasses.dataclass(frozen=True)
class BlockTopK:
    """How steps read a long cache sparsely: see `jaxaccel.attention.block_topk_attention`."""

    num_blocks: int = 64
    """Blocks that a step reads besides the sink and the latest tokens."""
    block_size: int = 16
    """Tokens of a block."""
    num_sink: int = 16
    """First tokens that are always read."""
    num_local: int = 64
    """Latest tokens that are always read."""
    dense_layers: int = 1
    """First layers that read everything, as the authors keep them."""

    @property
    def budget(self) -> int:
        """Most tokens that a step reads of a layer."""
        sink = -(-self.num_sink // self.block_size) * self.block_size
        return sink + self.num_blocks * self.block_size + self.num_local + self.block_size


class NewTokens(NamedTuple):
    """What a step made of its n tokens, one entry per layer (or stacked [L, ...] for a scanned model)."""

    keys: Any  # [B, K, n, H], rotated
    values: Any  # [B, K, n, H]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("layers", "length", "position"), meta_fields=("sparse",)
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Cached tokens of B sequences, which may differ in length."""

    layers: Any  # per layer (keys, values), both [B, K, S, H], or a BlockTopKCache; or such a pair stacked [L, ...]
    length: Any  # int32 [B], slots in use
    position: Any  # int32 [B], position of the next token: more than `length` once a prompt was compressed
    sparse: BlockTopK | None = None  # static

    @property
    def size(self) -> int:
        """Slots S of each sequence."""
        first = self.layers[0]
        return first.size if isinstance(first, BlockTopKCache) else jax.tree.leaves(first)[0].shape[-2]


def empty_cache(
    num_layers: int,
    batch: int,
    size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: DTypeLike = jnp.float32,
    sparse: BlockTopK | None = None,
    stacked: bool = False,
) -> KVCache:
    """A cache of no tokens.

    Args:
        num_layers: L.
        batch: sequences B.
        size: slots S; rounded up to whole blocks with ``sparse``.
        num_kv_heads: K.
        head_dim: H.
        dtype: of keys and values.
        sparse: read it by blocks.
        stacked: for a model that scans over its layers.

    Raises:
        ValueError: for a size below 1, or ``sparse`` with ``stacked``.

    >>> empty_cache(2, 1, 16, 2, 8).size
    16
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 slot")
    zero = jnp.zeros(batch, jnp.int32)
    if sparse is None:
        shape = (*((num_layers,) if stacked else ()), batch, num_kv_heads, size, head_dim)
        pairs = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(1 if stacked else num_layers)]
        return KVCache(pairs[0] if stacked else tuple(pairs), zero, zero)
    if stacked:
        raise ValueError("a model that scans over its layers has no sparse cache: unstack its layers first")
    size = -(-size // sparse.block_size) * sparse.block_size

    def layer(i: int) -> Any:
        if i < sparse.dense_layers:
            return tuple(jnp.zeros((batch, num_kv_heads, size, head_dim), dtype) for _ in range(2))
        return init_cache(batch, size, num_kv_heads, head_dim, block_size=sparse.block_size, dtype=dtype, layout="BKSH")

    return KVCache(tuple(layer(i) for i in range(num_layers)), zero, zero, sparse)


SLICES = 32
"""On CPU, up to so many sequences each write their new token as a slice."""


def _store(rows: Array, new: Array, start: Int[Array, "B"]) -> Array:
    """Write ``new [B, K, m, H]`` into ``rows [B, K, S, H]`` from each sequence's start on; the rest is dropped."""
    new = new.astype(rows.dtype)
    batch, heads, count = new.shape[:3]
    if count == 1 and (batch == 1 or (batch <= SLICES and jax.default_backend() == "cpu")):
        # No scatter, which XLA's CPU backend runs element by element. A full cache keeps its last slot.
        for i in range(batch):
            at = (i, 0, jnp.minimum(start[i], rows.shape[2] - 1), 0)
            old = jax.lax.dynamic_slice(rows, at, (1, heads, 1, rows.shape[3]))
            one = jnp.where(start[i] < rows.shape[2], new[i : i + 1], old)
            rows = jax.lax.dynamic_update_slice(rows, one, at)
        return rows
    slots = start[:, None] + jnp.arange(count)
    where = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], slots[:, None])
    return rows.at[where].set(new, mode="drop", unique_indices=True)


def append(
    cache: KVCache,
    new: NewTokens,
    *,
    nodes: Int[Array, "B m"] | None = None,
    count: ArrayLike | None = None,
) -> KVCache:
    """Store new tokens after those that the cache holds.

    Args:
        cache: to extend. Give it away (``donate_argnums``), else all of it is copied.
        new: what the step returned.
        nodes: which of the n new tokens to store, in order; all by default. The path of a tree that was accepted.
        count: how many of them are real, a number or [B]; all by default. Others are stored nowhere, or in slots that
            do not count and are written again.

    Returns:
        The cache, longer by ``count``. Tokens for which there is no room are dropped: a caller must leave room.

    >>> cache = empty_cache(1, 1, 4, 1, 2)
    >>> one = jnp.ones((1, 1, 3, 2))
    >>> append(cache, NewTokens((one,), (one,)), count=2).length.tolist()
    [2]
    """
    tokens = jax.tree.leaves(new)[0].shape[-2] if nodes is None else nodes.shape[1]
    counts = jnp.broadcast_to(jnp.asarray(tokens if count is None else count, jnp.int32), cache.length.shape)
    # Slots depend on the count, though they are the same for all: so no write can come before what the count was made
    # from. XLA would else be free to write while others still read, and to be safe would copy the cache at each step.
    start = cache.length + jnp.minimum(counts, 0)

    def chosen(array: Array) -> Array:
        if nodes is None:
            return array
        return jnp.take_along_axis(array, nodes[:, None, :, None], 2)

    def layer(kept: Any, keys: Array, values: Array) -> Any:
        keys, values = chosen(keys), chosen(values)
        if isinstance(kept, BlockTopKCache):
            return extend(kept, keys.swapaxes(1, 2), values.swapaxes(1, 2), counts)
        return _store(kept[0], keys, start), _store(kept[1], values, start)

    if isinstance(new.keys, tuple | list):
        layers: Any = tuple(layer(*parts) for parts in zip(cache.layers, new.keys, new.values, strict=True))
    else:
        layers = jax.vmap(lambda kept, new: layer(kept, new.keys, new.values))(cache.layers, new)
    length = jnp.minimum(cache.length + counts, cache.size)
    return dataclasses.replace(cache, layers=layers, length=length, position=cache.position + counts)


def rewind(cache: KVCache, count: Int[Array, "B"]) -> KVCache:
    """The cache without the last ``count`` tokens of each sequence: their slots are written again.

    Raises:
        ValueError: for a cache that is read by blocks, whose summaries cannot forget a token.

    >>> cache = append(empty_cache(1, 1, 4, 1, 2), NewTokens((jnp.ones((1, 1, 3, 2)),), (jnp.ones((1, 1, 3, 2)),)))
    >>> rewind(cache, jnp.array([2])).length.tolist()
    [1]
    """
    if cache.sparse is not None:
        raise ValueError("a cache that is read by blocks cannot be rewound: its blocks' summaries keep what was stored")
    return dataclasses.replace(cache, length=cache.length - count, position=cache.position - count)
