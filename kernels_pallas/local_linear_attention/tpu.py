"""Forward kernel of local linear attention for TPUs.

One grid step handles a tile of rows of one key head. The head's keys lie in VMEM for all of its tiles. The tile's
weights w = exp(s·q·k − m) are computed once and kept in VMEM, so that an iteration of the solver is two products per
block of keys; where VMEM is too small for them they are computed again in every iteration (a third product).
Values are only needed after the solve: they arrive block by block, as further grid steps.
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
from kernels_pallas.local_linear_attention import tpu_rows
from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options
from kernels_pallas.local_linear_attention.tpu_backward import backward
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
from kernels_pallas.local_linear_attention.tpu_rows import MASKED, Layout, stack_rows
from kernels_pallas.local_linear_attention.tpu_tile import (
    COLUMNS,
    LAST,
    NORMAL,
    SHIFT,
    TOP,
    Tile,
    load_block,
    loop,
    row_sum,
)

__all__ = ["backward", "forward", "refusal"]


def _kernel(
    bounds_ref: Any,
    scale_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    probe_ref: Any,
    out_ref: Any,
    x_ref: Any,
    mean_ref: Any,
    stats_ref: Any,
    w_ref: Any,
    acc_ref: Any,
    r_ref: Any,
    p_ref: Any,
    inverse_ref: Any,
    qs_ref: Any,
    xs_ref: Any,
    col_ref: Any,
    out_acc_ref: Any,
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
    mean, x = mean_ref.at[0, 0], x_ref.at[0, 0]

    def center_and_solve() -> None:
        numbers = numbers_ref[0, 0]
        col_ref[LAST] = columns(numbers[0:1])
        tile.store(qs_ref, q_ref[0, 0].astype(jnp.float32), precision.given)

        # Pass 1: the largest logit of each row, then weights, their sum and the mean key.
        col_ref[TOP] = jnp.full((layout.tile, LANES), MASKED, jnp.float32)

        def top(j: jax.Array, is_edge: bool) -> None:
            s = tile.logits(j, is_edge)
            if is_cached:
                w_ref[j] = s
            best = functools.reduce(jnp.maximum, [s[:, n : n + LANES] for n in range(0, block, LANES)])
            col_ref[TOP] = jnp.maximum(col_ref[TOP], best)

        loop(0, full, lambda j: top(j, False))
        loop(full, some, lambda j: top(j, True))
        m = jnp.broadcast_to(jnp.max(col_ref[TOP], axis=1, keepdims=True), (layout.tile, LANES))
        m = jnp.where(m <= MASKED / 2, 0.0, m)  # a row without keys: its weights become exp(MASKED) = 0
        col_ref[TOP] = m
        col_ref[SHIFT] = jnp.zeros((layout.tile, LANES), jnp.float32)
        acc_ref[...] = jnp.zeros_like(acc_ref)

        def center(j: jax.Array) -> None:
            w = jnp.exp(w_ref[j] - widen(col_ref[TOP], block)) if is_cached else tile.exponentials(j)
            if is_cached:
                w_ref[j] = w
            col_ref[SHIFT] += fold(w)
            acc_ref[...] += dot_weights(w, tile.load_keys(j), order)

        loop(0, some, center)
        omega = row_sum(col_ref[SHIFT])
        has_keys = omega > 0
        inverse = jnp.where(has_keys, 1.0 / jnp.where(has_keys, omega, 1.0), 0.0)
        col_ref[NORMAL] = inverse
        mean[...] = acc_ref[...] * widen(inverse, L)
        is_empty = omega == 0  # false for NaN: a row that is not finite says so in its lse
        lse = jnp.where(is_empty, -jnp.inf, m + jnp.log(jnp.where(is_empty, 1.0, omega)))

        if options.solve:
            r = q_ref[0, 0].astype(jnp.float32) - mean[...]
            r_ref[...] = jnp.where(widen(inverse, L) > 0, r, 0.0)
            sums = out_acc_ref.at[:, :LANES]  # free until the values come
            iterations = tile.solve(
                options, some, mean, columns(numbers[1:2]), x, r_ref, p_ref, inverse_ref, sums, xs_ref
            )
        else:
            iterations = jnp.int32(0)
            x[...] = jnp.where(widen(inverse, L) > 0, probe_ref[0, 0], 0.0)
        stats_ref[0, 0] = stack_rows([row(lse), jnp.full((1, layout.tile), iterations.astype(jnp.float32))])
        tile.store(xs_ref, x[...])
        col_ref[SHIFT] = row_dot(x[...], mean[...]) * tile.half
        out_acc_ref[...] = jnp.zeros_like(out_acc_ref)

    pl.when(step == 0)(center_and_solve)

    # Pass 2: Σ w (1 + x·c) v over the blocks whose values are here.
    values = v_ref.shape[3] // block
    first = step * values

    def output(j: jax.Array) -> None:
        a = tile.project(xs_ref, tile.load_keys(j)) - widen(col_ref[SHIFT], block)
        out_acc_ref[...] += dot_weights(tile.weights(j) * (1.0 + a), load_block(v_ref, j - first, block), order)

    loop(first, jnp.minimum(some, first + values), output)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        out_ref[0, 0] = (out_acc_ref[...] * widen(col_ref[NORMAL], out_acc_ref.shape[1])).astype(out_ref.dtype)


def forward(
    inputs: Inputs,
    options: Options,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    tile: int | None = None,
    block: int = BLOCK,
    is_cached: bool | None = None,
) -> Forward:
    """Attention of all queries, and what the backward pass needs.

    Args:
        inputs: queries, keys, values and their numbers; ``mask`` must be None.
        options: static options; ``solver`` must be ``"cg"``.
        interpret: run on the CPU, for tests.
        tile: rows that share a tile; 256, or 128 where VMEM is small.
        block: keys of a block.
        is_cached: keep the weights of a tile in VMEM (4 bytes per row and key); ``None`` keeps them if they fit.

    Raises:
        ValueError: if the call is one that `refusal` refuses.
    """
    raise_refusal("pallas_tpu", refusal(inputs, options))
    plan = plan_of(inputs, tile, block, is_cached)
    layout = plan.layout
    q, k, v = inputs.q, inputs.k, inputs.v
    dtype = jnp.result_type(q, k, v)
    batch = layout.batch
    last = tpu_rows.last_keys(layout, jnp.broadcast_to(inputs.offset, (batch,)), options.is_causal)
    numbers = tpu_rows.pack_numbers([last, tpu_rows.pack_rows(inputs.ridge, layout, fill=1.0)], layout)
    queries = tpu_rows.pack_queries(q.astype(dtype), layout)
    keys = tpu_rows.pack_keys(to_lanes(k.astype(dtype)), layout)
    values = tpu_rows.pack_keys(pad_lanes(v.astype(dtype)), layout)
    probe = [] if inputs.probe is None else [tpu_rows.pack_rows(to_lanes(inputs.probe), layout)]
    arrays = (
        tpu_rows.key_bounds(last, layout),
        jnp.broadcast_to(inputs.scale, (batch,)).astype(jnp.float32),
        numbers,
        queries,
        keys,
        values,
        *probe,
    )
    shape_of = functools.partial(kernel_output, arrays)
    out, x, mean, stats = _call(plan, options, dtype, interpret, shape_of)(*arrays)
    head, value_head = layout.head, v.shape[-1]
    return Forward(
        out=tpu_rows.unpack_rows(out, layout)[..., :value_head].astype(q.dtype),
        x=tpu_rows.unpack_rows(x, layout)[..., :head],
        mean=tpu_rows.unpack_rows(mean, layout)[..., :head],
        lse=tpu_rows.unpack_rows(stats[:, :, 0], layout),
        iterations=tpu_rows.unpack_rows(stats[:, :, 1], layout).astype(jnp.int32),
    )


def _call(
    plan: Plan, options: Options, dtype: jnp.dtype, interpret: bool | pltpu.InterpretParams, shape_of: Callable
) -> Any:
    """The ``pallas_call`` of a plan."""
    layout = plan.layout
    tile, block = layout.tile, layout.block
    precision = precision_of(dtype)
    L, Lv = lanes(layout.head), plan.value_lanes
    doubled = is_doubled(layout.head)
    chunks = sum(chunk_counts(precision, None, doubled))
    q_chunks = sum(chunk_counts(precision, precision.given, doubled))

    def of_tile(width):
        return pl.BlockSpec((1, 1, tile, width), lambda b, h, i, s, *_: (b, h, i, 0))

    def of_numbers():
        return pl.BlockSpec((1, 1, tpu_rows.NUMBERS, tile), lambda b, h, i, s, *_: (b, h, 0, i))

    values = block * plan.values

    def value_index(b, h, i, s, bounds, scale):
        # A block that the tile does not see is not fetched: the index stays at the last one that it sees.
        seen = bounds[2 * (b * layout.tiles + i) + 1]
        return b, h, 0, jnp.minimum(s, jnp.maximum(lax.div(seen + plan.values - 1, plan.values) - 1, 0)), 0

    f32 = jnp.float32

    def kernel(bounds: Any, scale: Any, numbers: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
        probe, rest = (None, rest) if options.solve else (rest[0], rest[1:])
        _kernel(
            bounds, scale, numbers, q, k, v, probe, *rest,
            layout=layout, options=options, precision=precision, is_cached=plan.is_cached,
        )  # fmt: skip

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(layout.batch, layout.heads, layout.tiles, layout.padded_keys // values),
            in_specs=[
                of_numbers(),
                of_tile(L),
                # One buffer: the next head's keys are awaited once per head, a millionth of the head's work.
                pl.BlockSpec(
                    (1, 1, precision.given, layout.padded_keys, L),
                    lambda b, h, i, s, *_: (b, h, 0, 0, 0),
                    pipeline_mode=pl.Buffered(1),
                ),
                pl.BlockSpec((1, 1, precision.given, values, Lv), value_index),
                *([] if options.solve else [of_tile(L)]),
            ],
            out_specs=[of_tile(Lv), of_tile(L), of_tile(L), of_numbers()],
            scratch_shapes=[
                pltpu.VMEM((layout.blocks if plan.is_cached else 1, tile, block), f32),
                *[pltpu.VMEM((tile, L), f32)] * 3,
                pltpu.VMEM((tile, L) if options.preconditioner else (8, LANES), f32),
                pltpu.VMEM((q_chunks, tile, L), jnp.bfloat16),
                pltpu.VMEM((chunks, tile, L), jnp.bfloat16),
                pltpu.VMEM((COLUMNS, tile, LANES), f32),
                pltpu.VMEM((tile, Lv), f32),
            ],
        ),
        out_shape=[
            shape_of((layout.batch, layout.heads, layout.rows, Lv), dtype if dtype == jnp.bfloat16 else f32),
            *[shape_of((layout.batch, layout.heads, layout.rows, L), f32)] * 2,
            shape_of((layout.batch, layout.heads, tpu_rows.NUMBERS, layout.rows), f32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit,
        ),
        interpret=interpret,
        name="lla_forward",
    )
