"""Which blocks a step reads: the k blocks whose mean key has the largest product with the group's mean query."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Int

from kernels_pallas.arrays import accumulator
from kernels_pallas.block_topk_attention.plan import Layout, Plan


def block_means(key: Float[Array, "B _ _ H"], plan: Plan, layout: Layout) -> Float[Array, "B K M H"]:
    """Mean of the keys of every block, read from the whole cache."""
    axis = layout.index("S")
    full = jax.lax.slice_in_dim(key, plan.phase, plan.phase + plan.total * plan.block_size, axis=axis)
    shape = (*key.shape[:axis], plan.total, plan.block_size, *key.shape[axis + 1 :])
    means = full.reshape(shape).mean(axis + 1, dtype=accumulator(key.dtype))
    return means.swapaxes(1, 2) if layout == "BSKH" else means


def group_mean(query: Float[Array, "B 1 N H"], num_kv_heads: int) -> Float[Array, "B K H"]:
    """Mean query of each group. A head that is not finite has no vote: it shall not disturb its group's others."""
    batch, _, heads, size = query.shape
    grouped = query.reshape(batch, num_kv_heads, heads // num_kv_heads, size).astype(accumulator(query.dtype))
    return jnp.where(jnp.isfinite(grouped).all(-1, keepdims=True), grouped, 0).mean(2)


def choose(
    query: Float[Array, "B 1 N H"],
    centroids: Float[Array, "B K M H"],
    length: Int[Array, "B"],
    plan: Plan,
    scale: ArrayLike,
) -> Int[Array, "B K k"]:
    """`select_blocks` after all checks; ``scale`` may hold what turns cached sums into means."""
    mean = group_mean(jax.lax.stop_gradient(query), centroids.shape[1]) * scale
    centroids = jax.lax.stop_gradient(centroids)
    # Mean of the group's logits over the block = mean query · mean key: one product per KV head, not per query head.
    scores = jnp.einsum("bkh,bkmh->bkm", mean, centroids.astype(mean.dtype), preferred_element_type=mean.dtype)
    # A block with a NaN key that counts is chosen first: the fault shows in the output instead of being hidden.
    lowest, highest = jnp.finfo(mean.dtype).min, jnp.finfo(mean.dtype).max
    scores = jnp.nan_to_num(scores, nan=highest, posinf=highest, neginf=lowest)
    block = jnp.arange(plan.total)
    tail = plan.tail_block(length)[:, None, None]
    scores = jnp.where((block >= plan.first) & (block < tail), scores, -jnp.inf)
    best = jax.lax.top_k(scores, plan.num_blocks)[1]
    # Where there are fewer candidates than places, -inf came last; those places hold no block.
    return jnp.where((best >= plan.first) & (best < tail), best, -1).astype(jnp.int32)


def pages(
    blocks: Int[Array, "B K k"], length: Int[Array, "B"], plan: Plan
) -> tuple[Int[Array, "B K n"], Int[Array, "B K n"], Int[Array, "B K n"]]:
    """All that a step reads, as n slices of ``block_size`` positions: chosen blocks, tail, sink.

    Returns:
        First position of each slice (inside of the cache), and of it the positions [low, high) that count: no position
        counts twice. A slice with high ≤ low is empty.
    """
    size = plan.block_size
    shape = blocks.shape[:2]
    full = plan.phase + blocks * size
    tail = plan.tail_start(length)[:, None, None] + jnp.arange(plan.tail_blocks) * size
    sink = jnp.arange(-(-plan.offset // size)) * size
    tail, sink = (jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (tail, sink))
    end = length[:, None, None]
    start = jnp.concatenate([full, tail, sink], -1)
    end_of = (jnp.where(blocks < 0, 0, full + size), jnp.broadcast_to(end, tail.shape))
    high = jnp.concatenate([*end_of, jnp.broadcast_to(jnp.minimum(end, plan.offset), sink.shape)], -1)
    high = jnp.minimum(high, start + size)
    inside = jnp.clip(start, 0, plan.size - size)
    return inside.astype(jnp.int32), start.astype(jnp.int32), high.astype(jnp.int32)
