"""Block top-k attention without Pallas: gathers the chosen blocks, and nothing else, and attends to them."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Int

from kernels_pallas.arrays import accumulator
from kernels_pallas.block_topk_attention.plan import Layout, Plan
from kernels_pallas.block_topk_attention.select import pages


def _gather(array: Float[Array, "B _ _ W"], start: Int[Array, "B K n"], size: int, layout: Layout) -> Array:
    """Slices of ``size`` positions as [B, K, n, size, W].

    Batch and heads are batch axes of the gather, so that sharding over them needs no communication. XLA's CPU backend
    copies such slices at memory speed; so do row gathers and ``take_along_axis``, within the noise of the measurement.
    """

    def one(rows: Array, starts: Array) -> Array:
        return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, rows, slice_size=size))(starts)

    return jax.vmap(jax.vmap(one, in_axes=(1 if layout == "BSKH" else 0, 0)))(array, start)


def attend(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B _ _ _"],
    value: Float[Array, "B _ _ V"] | None,
    blocks: Int[Array, "B K k"],
    length: Int[Array, "B"],
    plan: Plan,
    scale: ArrayLike,
    layout: Layout,
) -> tuple[Float[Array, "B 1 N V"], Float[Array, "B 1 N"]]:
    """Softmax attention to the chosen blocks, the tail and the sink.

    Also returns the logarithm of each head's sum of weights, with which parts of a softmax are merged.
    """
    batch, _, heads, width = query.shape
    groups = blocks.shape[1]
    dtype = accumulator(query.dtype)
    start, low, high = pages(blocks, length, plan)
    position = start[..., None] + jnp.arange(plan.block_size)
    keep = ((position >= low[..., None]) & (position < high[..., None])).reshape(batch, groups, -1)

    def rows(array: Array) -> Array:
        # Slots that do not count may hold NaN: they are zeroed, not only weighted by zero (0·NaN is NaN).
        gathered = _gather(array, start, plan.block_size, layout).reshape(batch, groups, -1, array.shape[-1])
        return jnp.where(keep[..., None], gathered, 0).astype(dtype)

    if value is None:
        both = rows(key)
        keys, values = both[..., :width], both[..., width:]
    else:
        keys, values = rows(key), rows(value)
    scaled = query.reshape(batch, groups, heads // groups, width).astype(dtype) * jnp.asarray(scale, dtype)
    logits = jnp.einsum("bkrh,bklh->bkrl", scaled, keys)
    logits = jnp.where(keep[:, :, None], logits, -jnp.inf)
    some = keep.any(-1)[:, :, None, None]
    # Without stop_gradient the gradient through the maximum cancels, but costs.
    top = jnp.where(some, jax.lax.stop_gradient(logits.max(-1, keepdims=True)), 0)
    weight = jnp.where(keep[:, :, None], jnp.exp(logits - top), 0)
    total = jnp.where(some, weight.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bkrl,bklv->bkrv", weight, values) / total
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    return out.reshape(batch, 1, heads, values.shape[-1]).astype(query.dtype), lse.reshape(batch, 1, heads)
