"""Block top-k decoding as a Pallas kernel for GPUs (Triton): programs read chosen rows by their address.

A program attends one KV head of one sequence to a part of the rows that are kept, in tiles that gather several pages;
the parts are merged by their maxima and sums. Small batches are split so that they fill the GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.block_topk_attention.plan import Layout, Plan
from kernels_pallas.block_topk_attention.select import pages

TILE = 64  # rows of K and V per turn
PROGRAMS = 264  # two for each multiprocessor of an H100
MIN_ROWS = 16  # of a product on tensor cores


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def refusal(query: Shaped, key: Shaped, value: Shaped | None, plan: Plan, layout: Layout) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    del layout  # rows of a head are contiguous in both
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
    given = [x.dtype for x in (query, key, value) if x is not None]
    if len(set(given)) > 1 or given[0] not in dtypes:
        return f"dtypes are {', '.join(map(str, given))}, expected all float32, all bfloat16 or all float16"
    value_width = key.shape[-1] - query.shape[-1] if value is None else value.shape[-1]
    for name, width in (("key", query.shape[-1]), ("value", value_width)):
        if not _power_of_two(width) or not 16 <= width <= 256:
            return f"{name} has head size {width}, expected a power of two from 16 to 256"
    if not _power_of_two(plan.block_size):
        return f"block_size is {plan.block_size}, expected a power of two"
    return None


def _body(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    start_ref: Any,
    low_ref: Any,
    high_ref: Any,
    o_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    *,
    block_size: int,
    tile: int,
    tiles: int,
    layout: Layout,
) -> None:
    b, h, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, width = o_ref.shape[-2:]
    q = q_ref[b, h]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)

    def turn(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = carry
        row = (part * tiles + index) * tile + jnp.arange(tile)
        page = jax.lax.div(row, block_size)
        position = start_ref[b, h, page] + jax.lax.rem(row, block_size)
        kept = (position >= low_ref[b, h, page]) & (position < high_ref[b, h, page])
        if layout == "BSKH":
            k, v = k_ref[b, position, h, :], v_ref[b, position, h, :]
        else:
            first = q.shape[-1] if layout == "BKSHV" else 0
            k, v = k_ref[b, h, position, pl.ds(0, q.shape[-1])], v_ref[b, h, position, pl.ds(first, width)]
        logits = jnp.where(kept[None, :], dot(q, k, (((1,), (1,)), ((), ()))), -jnp.inf)
        new = jnp.maximum(top, logits.max(1))
        old = jnp.exp(top - new)
        weight = jnp.exp(logits - new[:, None])
        # Slots that do not count may hold NaN: zeroed, not only weighted by zero.
        v = jnp.where(kept[:, None], v, jnp.zeros_like(v))
        out = out * old[:, None] + dot(weight.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        return out, new, total * old + weight.sum(1)

    lowest = jnp.finfo(jnp.float32).min
    initial = (jnp.zeros((rows, width), jnp.float32), jnp.full(rows, lowest), jnp.zeros(rows, jnp.float32))
    out, top, total = jax.lax.fori_loop(0, tiles, turn, initial)
    o_ref[b, h, part] = out
    top_ref[b, h, part] = top
    sum_ref[b, h, part] = total


def attend(
    query: Array,
    key: Array,
    value: Array | None,
    blocks: Array,
    length: Array,
    plan: Plan,
    scale: Array,
    layout: Layout,
    *,
    interpret: Any = False,
) -> Array:
    """Softmax attention [B, 1, N, V] to the chosen blocks, the tail and the sink; see `refusal` for what it takes."""
    batch, _, num_heads, width = query.shape
    heads = blocks.shape[1]
    out_width = key.shape[-1] - width if value is None else value.shape[-1]
    group = num_heads // heads
    rows = max(MIN_ROWS, pl.next_power_of_2(group))
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype).reshape(batch, heads, group, width)
    scaled = jnp.pad(scaled, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    read: tuple[Array, ...] = pages(blocks, length, plan)
    total_tiles = -(-read[0].shape[-1] * plan.block_size // TILE)
    parts = min(total_tiles, max(1, -(-PROGRAMS // (batch * heads))))
    tiles = -(-total_tiles // parts)
    parts = -(-total_tiles // tiles)
    count = -(-parts * tiles * TILE // plan.block_size)
    # Pages that are added to fill the last tile are empty: low = high = 0.
    read = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, count - x.shape[-1]))) for x in read)
    shape = functools.partial(kernel_output, [query], dtype=jnp.float32)
    out, top, total = pl.pallas_call(
        functools.partial(_body, block_size=plan.block_size, tile=TILE, tiles=tiles, layout=layout),
        grid=(batch, heads, parts),
        out_shape=(
            shape((batch, heads, parts, rows, out_width)),
            shape((batch, heads, parts, rows)),
            shape((batch, heads, parts, rows)),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_topk_decode",
    )(scaled, key, key if value is None else value, *read)
    weight = jnp.exp(top - top.max(2, keepdims=True))
    total = (total * weight).sum(2)
    out = (out * weight[..., None]).sum(2) / jnp.where(total == 0, 1, total)[..., None]
    return out[:, :, :group].reshape(batch, 1, num_heads, out_width).astype(query.dtype)
