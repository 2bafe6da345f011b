"""Block top-k decoding as a Pallas kernel for TPUs: chosen pages go from HBM to VMEM, without a copy between.

A grid step is one KV head of one sequence. Numbers of pages and lengths are prefetched as scalars; with them a step
starts the copies of the pages of the next head, then waits for its own and attends to them in one go. A page of 16 rows
is too little for a pipelined block of Pallas (one per grid step); here all pages of a head are in flight at once.

What limits it: starting a copy takes the scalar unit about five cycles, as long as memory takes for 16 rows of 128
elements on a v5e, and longer than it takes on faster memory. Pages of 64 rows, and keys beside their values (one copy
instead of two), move it towards the bound of bytes:
``python -m kernels_pallas.prove block_topk_attention --target v5e --loops``.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import ArrayLike

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.block_topk_attention.plan import Layout, Plan

LANES = 128
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel may use by default on the smallest chip
SMEM_BYTES = 512 * 2**10  # half of the scalar memory
UNROLL = 8  # copies that are started per turn of the loop


def _sublanes(dtype: jnp.dtype) -> int:
    """Rows of a tile: a copy from HBM starts and ends at whole tiles."""
    return 32 // jnp.dtype(dtype).itemsize


def _pages(plan: Plan) -> int:
    """Pages of a buffer: chosen blocks, tail, sink, and as many more as make whole vectors of logits."""
    whole = LANES // math.gcd(LANES, plan.block_size)
    return -(-plan.rows // plan.block_size // whole) * whole


def refusal(query: Shaped, key: Shaped, value: Shaped | None, plan: Plan, layout: Layout) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    if layout == "BSKH":
        return (
            'layout is "BSKH"; on TPUs the rows of a head lie together only with "BKSH" and "BKSHV", and swapping axes '
            "would copy the whole cache"
        )
    given = [x.dtype for x in (query, key, value) if x is not None]
    if len(set(given)) > 1 or given[0] not in (jnp.float32, jnp.bfloat16):
        return f"dtypes are {', '.join(map(str, given))}, expected all float32 or all bfloat16"
    widths = [x.shape[-1] for x in (key, value) if x is not None]
    if any(width % LANES for width in widths):
        return (
            f"rows of {' and '.join(map(str, widths))} elements are stored transposed on TPUs, and turning them would "
            f'copy the whole cache: expected multiples of {LANES}; "BKSHV" puts keys and values of 64 side by side'
        )
    if plan.phase:
        return (
            f"block_offset is {plan.offset}, expected a multiple of block_size = {plan.block_size}: pages are aligned"
        )
    if plan.block_size % _sublanes(key.dtype):
        return f"block_size is {plan.block_size}, expected a multiple of {_sublanes(key.dtype)} for {key.dtype}"
    if (needed := 2 * _pages(plan) * plan.block_size * sum(widths) * key.dtype.itemsize) > VMEM_BYTES:
        return f"the budget of {plan.rows} rows needs {needed} bytes of VMEM twice buffered, expected {VMEM_BYTES}"
    if (needed := 4 * key.shape[0] * (key.shape[1] * plan.num_blocks + 1)) > SMEM_BYTES:
        return f"the block numbers need {needed} bytes of scalar memory, expected {SMEM_BYTES}"
    return None


def _body(
    page_ref: Any,
    length_ref: Any,
    q_ref: Any,
    *refs: Any,
    plan: Plan,
    heads: int,
) -> None:
    arrays = (len(refs) - 2) // 2
    caches, o_ref, buffers, sems = refs[:arrays], refs[arrays], refs[arrays + 1 : -1], refs[-1]
    v_buf = buffers[-1]  # also that of keys where they lie side by side
    size, chosen = plan.block_size, plan.num_blocks
    copied = chosen + plan.tail_blocks
    used = copied + plan.first
    turn, last = pl.program_id(1), pl.num_programs(1) - 1
    step = pl.program_id(0) * last + turn  # the head whose copies are started; the one before it is attended

    def copy(source: Array, slot: Array, target: Array | int, count: int) -> None:
        for hbm, buffer in zip(caches, buffers, strict=True):
            rows = hbm.at[pl.ds(source, count)]
            pltpu.make_async_copy(rows, buffer.at[slot, pl.ds(target, count)], sems.at[slot]).start()

    # The copies for a step start one step ahead of it, so that they run while the step before computes.
    @pl.when(turn < last)
    def _() -> None:
        slot = jax.lax.rem(turn, 2)

        def one(index: Array, _: None) -> None:
            copy(page_ref[step * copied + index], slot, index, 1)

        jax.lax.fori_loop(0, copied, one, None, unroll=min(UNROLL, copied))
        if plan.first:
            copy(step * (plan.size // size), slot, copied, plan.first)

    @pl.when(turn > 0)
    def _() -> None:
        slot = jax.lax.rem(turn - 1, 2)
        # The copies of a step share a semaphore, which counts bytes: one wait for all of a buffer.
        for buffer in buffers:
            rows = buffer.at[slot, pl.ds(0, used)]
            pltpu.make_async_copy(rows, rows, sems.at[slot]).wait()

        length = length_ref[jax.lax.div(step - 1, heads)]
        tail = plan.tail_start(length)
        # Blocks that are there come first.
        blocks = jnp.minimum(jax.lax.div(tail, size) - plan.first, chosen)

        # Values that do not count may be NaN, and a weight of zero does not help against it: they are zeroed. Mostly
        # these are in the tail's pages alone.
        def clear(page: Array | int, pages: int, count: Array | int) -> None:
            part = v_buf[slot, pl.ds(page, pages)].astype(jnp.float32)
            index = [jax.lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in (0, 1)]
            kept = index[0] * size + index[1] < count
            v_buf[slot, pl.ds(page, pages)] = jnp.where(kept, part, 0).astype(v_buf.dtype)

        if plan.tail_blocks:
            clear(chosen, plan.tail_blocks, length - tail)
        if plan.first:
            clear(copied, plan.first, length)
        if used < v_buf.shape[1]:
            clear(used, v_buf.shape[1] - used, 0)
        jax.lax.fori_loop(blocks, chosen, lambda index, _: clear(index, 1, 0), None)

        k_width = q_ref.shape[-1]
        v_width = -(-o_ref.shape[-1] // LANES) * LANES
        keys = buffers[0][slot, :, :, :k_width].reshape(-1, k_width)
        values = v_buf[slot, :, :, v_buf.shape[-1] - v_width :].reshape(-1, v_width)
        precision = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
        logits = dot(q_ref[0], keys, (((1,), (1,)), ((), ())))
        row = jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
        in_tail, in_sink = row - chosen * size, row - copied * size
        kept = (row < blocks * size) | ((in_tail >= 0) & (in_sink < 0) & (in_tail < length - tail))
        kept |= (in_sink >= 0) & (in_sink < jnp.minimum(length, plan.offset))
        logits = jnp.where(kept, logits, -jnp.inf)
        top = jnp.maximum(logits.max(1, keepdims=True), jnp.finfo(jnp.float32).min)
        weight = jnp.exp(logits - top)
        total = weight.sum(1, keepdims=True)
        out = dot(weight.astype(values.dtype), values, (((1,), (0,)), ((), ())))[:, v_width - o_ref.shape[-1] :]
        o_ref[0] = (out / jnp.where(total == 0, 1, total)).astype(o_ref.dtype)


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
    del layout  # BKSHV where there is no value, else BKSH
    batch, _, num_heads, width = query.shape
    heads, group = key.shape[1], num_heads // key.shape[1]
    out_width = key.shape[-1] - width if value is None else value.shape[-1]
    rows = -(-group // _sublanes(query.dtype)) * _sublanes(query.dtype)
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype).reshape(batch * heads, group, width)
    # Where a key and a value share a tile the query has zeros beside it: the product is that with the key.
    scaled = jnp.pad(scaled, ((0, 0), (0, rows - group), (0, -width % LANES)))
    caches = [x.reshape(-1, plan.block_size, x.shape[-1]) for x in (key, value) if x is not None]
    per_head = plan.size // plan.block_size
    tail = plan.tail_block(length)[:, None] + jnp.arange(plan.tail_blocks)
    tail = jnp.broadcast_to(tail[:, None], (batch, heads, plan.tail_blocks))
    # No block, or a tail that ends before: any page, as all steps wait for the same number of bytes.
    pages = jnp.clip(jnp.concatenate([blocks, tail], -1), 0, per_head - 1).reshape(batch * heads, -1)
    pages += per_head * jnp.arange(batch * heads)[:, None]
    steps = batch * heads
    parts = 2 - steps % 2  # a v5p has two cores

    def head(part: ArrayLike, turn: ArrayLike, *_: Any) -> tuple[ArrayLike, int, int]:
        return part * (steps // parts) + jnp.maximum(turn - 1, 0), 0, 0

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(parts, steps // parts + 1),
        in_specs=[
            pl.BlockSpec((1, rows, scaled.shape[-1]), head),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in caches),
        ],
        out_specs=pl.BlockSpec((1, rows, out_width), head),
        scratch_shapes=[
            *(pltpu.VMEM((2, _pages(plan), *x.shape[1:]), x.dtype) for x in caches),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    out = pl.pallas_call(
        functools.partial(_body, plan=plan, heads=heads),
        grid_spec=grid_spec,
        out_shape=kernel_output([query], (steps, rows, out_width), query.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),  # steps hand pages to the next one: these run in order
            disable_bounds_checks=True,  # pages are clipped above; checks are half of the work of starting a copy
        ),
        interpret=interpret,
        name="block_topk_decode",
    )(pages.astype(jnp.int32).reshape(-1), length, scaled, *caches)
    return out[:, :group].reshape(batch, 1, num_heads, out_width)
