"""Backward kernels of local linear attention for TPUs.

The first kernel takes a tile of rows, as the forward kernel does: values pass by once for g = Σ p G and t = Σ p G c,
then A y = t is solved with the weights in VMEM, then values pass by again for D = Σ p h and e = Σ ds k. The second
kernel (`tpu_backward_keys`) takes tiles of keys and needs six numbers and five vectors per row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import kernel_output
from kernels_pallas.dispatch import raise_refusal
from kernels_pallas.local_linear_attention import tpu_backward_keys, tpu_rows
from kernels_pallas.local_linear_attention.problem import Backward, Cotangents, Forward, Inputs, Options
from kernels_pallas.local_linear_attention.tpu_pieces import (
    LANES,
    Precision,
    chunk_counts,
    columns,
    dot_weights,
    fold,
    is_doubled,
    lanes,
    pad_lanes,
    precision_of,
    row,
    row_dot,
    to_lanes,
    widen,
)
from kernels_pallas.local_linear_attention.tpu_plan import BLOCK, Plan, plan_of, refusal
from kernels_pallas.local_linear_attention.tpu_rows import Layout, stack_rows
from kernels_pallas.local_linear_attention.tpu_tile import (
    COLUMNS,
    GRAD,
    LAST,
    NORMAL,
    SHIFT,
    SHIFT_Y,
    TOP,
    Tile,
    load_block,
    loop,
    project,
    row_sum,
    store_chunks,
)


def _kernel(
    bounds_ref: Any,
    scale_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    g_ref: Any,
    x_ref: Any,
    mean_ref: Any,
    dx_ref: Any,
    k_ref: Any,
    v_ref: Any,
    y_ref: Any,
    logit_ref: Any,
    stats_ref: Any,
    w_ref: Any,
    acc_ref: Any,
    r_ref: Any,
    p_ref: Any,
    inverse_ref: Any,
    qs_ref: Any,
    gs_ref: Any,
    xs_ref: Any,
    ys_ref: Any,
    col_ref: Any,
    sum_ref: Any,
    *,
    layout: Layout,
    options: Options,
    precision: Precision,
    is_cached: bool,
) -> None:
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    index = 2 * (b * layout.tiles + i)
    full, some = bounds_ref[index], bounds_ref[index + 1]
    block, L, order = layout.block, lanes(layout.head), precision.order
    tile = Tile(layout, precision, is_cached, scale_ref[b], k_ref, w_ref, qs_ref, col_ref, acc_ref)
    mean, y = mean_ref.at[0, 0], y_ref.at[0, 0]
    numbers = numbers_ref[0, 0]
    steps = pl.num_programs(3) // 2
    values = v_ref.shape[3] // block
    first = values * jnp.where(step < steps, step, step - steps)
    stop = jnp.minimum(some, first + values)

    def pull(j: jax.Array) -> jax.Array:  # G of block j
        return project(gs_ref, load_block(v_ref, j - first, block), precision, precision.given, False)

    def clear() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(step == 0)
    def _() -> None:
        col_ref[LAST] = columns(numbers[0:1])
        col_ref[TOP] = columns(numbers[2:3])
        col_ref[NORMAL] = jnp.ones((layout.tile, LANES), jnp.float32)
        tile.store(qs_ref, q_ref[0, 0].astype(jnp.float32), precision.given)
        store_chunks(gs_ref, g_ref[0, 0].astype(jnp.float32), precision, precision.given, False)
        clear()

    def gather(j: jax.Array, is_edge: bool) -> None:
        p = tile.exponentials(j, is_edge)
        if is_cached:
            w_ref[j] = p
        weighted = p * pull(j)
        sum_ref[...] += fold(weighted)
        acc_ref[...] += dot_weights(weighted, tile.load_keys(j), order)

    @pl.when(step < steps)
    def _() -> None:
        inner = jnp.clip(full, first, stop)
        loop(first, inner, lambda j: gather(j, False))
        loop(inner, stop, lambda j: gather(j, True))

    @pl.when(step == steps - 1)
    def _() -> None:
        g = row_sum(sum_ref[...])
        col_ref[GRAD] = g
        has_keys = (
            widen(col_ref[TOP], L) < tpu_rows.HUGE / 2
        )  # the x of a row without keys is zero, whatever its inputs
        t = jnp.where(has_keys, acc_ref[...] - widen(g, L) * mean[...] + dx_ref[0, 0], 0.0)
        if options.solve:
            r_ref[...] = t
            tile.solve(options, some, mean, columns(numbers[1:2]), y, r_ref, p_ref, inverse_ref, sum_ref, ys_ref)
            tile.store(ys_ref, y[...])
            col_ref[SHIFT_Y] = row_dot(y[...], mean[...]) * tile.half
        else:
            y[...] = t
            col_ref[SHIFT_Y] = jnp.zeros((layout.tile, LANES), jnp.float32)
        tile.store(xs_ref, x_ref[0, 0])
        col_ref[SHIFT] = row_dot(x_ref[0, 0], mean[...]) * tile.half
        clear()

    def scatter(j: jax.Array) -> None:
        keys = tile.load_keys(j)
        g = pull(j)
        a = tile.project(xs_ref, keys) - widen(col_ref[SHIFT], block)
        if options.solve:
            g -= tile.project(ys_ref, keys) - widen(col_ref[SHIFT_Y], block)
        weighted = tile.weights(j) * (g * (1.0 + a) - widen(col_ref[GRAD], block) * a)
        sum_ref[...] += fold(weighted)
        acc_ref[...] += dot_weights(weighted, keys, order)

    pl.when(step >= steps)(lambda: loop(first, stop, scatter))

    @pl.when(step == 2 * steps - 1)
    def _() -> None:
        d = row_sum(sum_ref[...]) - columns(numbers[3:4])
        logit_ref[0, 0] = acc_ref[...] - widen(d, L) * mean[...]
        stats_ref[0, 0] = stack_rows([row(col_ref[n]) for n in (SHIFT, SHIFT_Y, GRAD)] + [row(d)])


def backward(
    inputs: Inputs,
    options: Options,
    fwd: Forward,
    cot: Cotangents,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    tile: int | None = None,
    block: int = BLOCK,
    is_cached: bool | None = None,
) -> Backward:
    """Gradients, from what the forward pass left and the cotangents of its outputs.

    Args:
        inputs: of the forward pass.
        options: of the forward pass.
        fwd: its result.
        cot: cotangents.
        interpret: run on the CPU, for tests.
        tile: rows that share a tile.
        block: keys of a block.
        is_cached: keep the weights of a tile in VMEM; ``None`` keeps them if they fit.

    Raises:
        ValueError: if the call is one that `refusal` refuses.
    """
    raise_refusal("pallas_tpu", refusal(inputs, options))
    plan = plan_of(inputs, tile, block, is_cached, is_backward=True)
    layout = plan.layout
    dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    precision = precision_of(dtype)

    def pack(x: jax.Array, fill: float = 0.0) -> jax.Array:
        return tpu_rows.pack_rows(x, layout, fill)

    offset = jnp.broadcast_to(inputs.offset, (layout.batch,))
    scale = jnp.broadcast_to(inputs.scale, (layout.batch,)).astype(jnp.float32)
    last = tpu_rows.last_keys(layout, offset, options.is_causal)
    lse = pack(jnp.where(jnp.isneginf(fwd.lse), tpu_rows.HUGE, fwd.lse), tpu_rows.HUGE)
    numbers = tpu_rows.pack_numbers([last, pack(inputs.ridge, 1.0), lse, pack(cot.lse)], layout)
    q = tpu_rows.pack_queries(inputs.q.astype(dtype), layout)
    x, mean, dx = (pack(to_lanes(a)) for a in (fwd.x, fwd.mean, cot.x))
    cotangent = pad_lanes(cot.out.astype(dtype))
    cotangent = pack(cotangent if dtype == jnp.bfloat16 else cotangent.astype(jnp.float32))
    k = tpu_rows.pack_keys(to_lanes(inputs.k.astype(dtype)), layout)
    v = tpu_rows.pack_keys(pad_lanes(inputs.v.astype(dtype)), layout)
    arrays = (tpu_rows.key_bounds(last, layout), scale, numbers, q, cotangent, x, mean, dx, k, v)
    shape_of = functools.partial(kernel_output, arrays)
    y, logit, stats = _call(plan, options, precision, interpret, shape_of)(*arrays)
    row_numbers = [last, lse, *(stats[:, :, n] for n in range(4))]
    dk, dv = tpu_backward_keys.key_gradients(
        last, scale, tpu_rows.pack_numbers(row_numbers, layout), q, cotangent, x, y, k, v,
        layout=layout, precision=precision, solve=options.solve,
        dtype=dtype if dtype == jnp.bfloat16 else jnp.dtype(jnp.float32), interpret=interpret,
    )  # fmt: skip

    def unpack_keys(x: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, :, : layout.keys, : like.shape[-1]], 1, 2).astype(like.dtype)

    return Backward(
        solved=tpu_rows.unpack_rows(y, layout)[..., : layout.head],
        logit=tpu_rows.unpack_rows(logit, layout)[..., : layout.head],
        dk=unpack_keys(dk, inputs.k),
        dv=unpack_keys(dv, inputs.v),
    )


def _call(
    plan: Plan, options: Options, precision: Precision, interpret: bool | pltpu.InterpretParams, shape_of: Callable
) -> Any:
    """The ``pallas_call`` of the rows' kernel."""
    layout = plan.layout
    tile, block, f32, bf16 = layout.tile, layout.block, jnp.float32, jnp.bfloat16
    doubled = is_doubled(layout.head)
    L, Lv = lanes(layout.head), plan.value_lanes
    values = plan.values * block
    steps = layout.padded_keys // values

    def of_tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, tile, width), lambda b, h, i, s, *_: (b, h, i, 0))

    def of_numbers() -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, tpu_rows.NUMBERS, tile), lambda b, h, i, s, *_: (b, h, 0, i))

    def value_index(b: Any, h: Any, i: Any, s: Any, bounds: Any, scale: Any) -> tuple[Any, ...]:
        seen = bounds[2 * (b * layout.tiles + i) + 1]
        most = jnp.maximum(lax.div(seen + plan.values - 1, plan.values) - 1, 0)
        return b, h, 0, jnp.minimum(jnp.where(s < steps, s, s - steps), most), 0

    shape = (layout.batch, layout.heads, layout.rows)
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, options=options, precision=precision, is_cached=plan.is_cached),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(layout.batch, layout.heads, layout.tiles, 2 * steps),
            in_specs=[
                of_numbers(),
                of_tile(L),
                of_tile(Lv),
                *[of_tile(L)] * 3,
                pl.BlockSpec(
                    (1, 1, precision.given, layout.padded_keys, L),
                    lambda b, h, i, s, *_: (b, h, 0, 0, 0),
                    pipeline_mode=pl.Buffered(1),
                ),
                pl.BlockSpec((1, 1, precision.given, values, Lv), value_index),
            ],
            out_specs=[of_tile(L), of_tile(L), of_numbers()],
            scratch_shapes=[
                pltpu.VMEM((layout.blocks if plan.is_cached else 1, tile, block), f32),
                *[pltpu.VMEM((tile, L), f32)] * 3,
                pltpu.VMEM((tile, L) if options.preconditioner else (8, LANES), f32),
                pltpu.VMEM((sum(chunk_counts(precision, precision.given, doubled)), tile, L), bf16),
                pltpu.VMEM((sum(chunk_counts(precision, precision.given, False)), tile, Lv), bf16),
                *[pltpu.VMEM((sum(chunk_counts(precision, None, doubled)), tile, L), bf16)] * 2,
                pltpu.VMEM((COLUMNS, tile, LANES), f32),
                pltpu.VMEM((tile, LANES), f32),
            ],
        ),
        out_shape=[
            *[shape_of((*shape, L), f32)] * 2,
            shape_of((layout.batch, layout.heads, tpu_rows.NUMBERS, layout.rows), f32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
        ),
        interpret=interpret,
        name="lla_backward_rows",
    )
