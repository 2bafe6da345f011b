"""Gradients of keys and values on TPUs: a grid step handles a tile of keys and a tile of the rows that see them.

Keys lie along sublanes and rows along lanes, so that a row's numbers are used as they lie in HBM and sums over rows
are plain matrix products:

dv_j = Σ_i p (1 + a) dO_i,  dk_j = Σ_i (p (G − g) − p b) x_i − p (1 + a) y_i + scale ds q_i,
with a = x·c, b = y·c, G = dO·v, ds = p ((G − b)(1 + a) − g a − D).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import kernel_output
from kernels_pallas.local_linear_attention import tpu_rows
from kernels_pallas.local_linear_attention.tpu_pieces import (
    Precision,
    dot_keys,
    dot_weights,
    is_doubled,
    key_operands,
    split,
)
from kernels_pallas.local_linear_attention.tpu_rows import MASKED, Layout

ROWS = 256
KEYS = 512


def _kernel(
    first_ref: Any,
    scale_ref: Any,
    numbers_ref: Any,
    q_ref: Any,
    g_ref: Any,
    x_ref: Any,
    y_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_acc: Any,
    dv_acc: Any,
    *,
    layout: Layout,
    precision: Precision,
    solve: bool,
) -> None:
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    doubled, order, given = is_doubled(layout.head), precision.order, precision.given

    @pl.when(i == 0)
    def _() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def accumulate() -> None:
        scale = scale_ref[b]
        last, lse, shift_x, shift_y, g_mean, mean_h = (numbers_ref[0, 0, n : n + 1, :] for n in range(6))
        q, x = q_ref[0, 0].astype(jnp.float32), x_ref[0, 0]
        cotangent = g_ref[0, 0].astype(jnp.float32)
        k = [k_ref[0, 0, n] for n in range(given)]
        v = [v_ref[0, 0, n] for n in range(given)]

        def products(rows: jax.Array, pieces: int | None) -> jax.Array:
            return dot_keys(key_operands(rows, order, given, pieces=pieces, doubled=doubled), k, keys_first=True)

        def parts(rows: jax.Array, pieces: int) -> list[jax.Array]:
            return [part.astype(jnp.bfloat16) for part in split(rows, pieces)]

        s = products(q, given) * scale
        key = (lax.broadcasted_iota(jnp.int32, s.shape, 0) + j * layout.block).astype(jnp.float32)
        p = jnp.exp(jnp.where(key <= last, s - lse, MASKED))
        a = products(x, None) - shift_x
        pull = dot_keys(key_operands(cotangent, order, given, pieces=given, doubled=False), v, keys_first=True)
        weight = p * (1.0 + a)
        cotangents = parts(cotangent, given)
        dv_acc[...] += dot_weights(weight, cotangents, order)
        if solve:
            y = y_ref[0, 0]
            towards = products(y, None) - shift_y
            dk = dot_weights(p * (pull - g_mean - towards), parts(x, order), order)
            dk -= dot_weights(weight, parts(y, order), order)
            h = (pull - towards) * (1.0 + a) - g_mean * a
        else:
            dk = dot_weights(p * (pull - g_mean), parts(x, order), order)
            h = pull * (1.0 + a) - g_mean * a
        dk += dot_weights((p * (h - mean_h)) * scale, parts(q, given), order)
        dk_acc[...] += dk

    pl.when(i >= first_ref[b * layout.blocks + j])(accumulate)

    @pl.when(i == pl.num_programs(3) - 1)
    def _() -> None:
        dk_ref[0, 0] = dk_acc[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_acc[...].astype(dv_ref.dtype)


def first_tiles(last: jax.Array, layout: Layout) -> jax.Array:
    """First tile of rows that sees each block of keys, [B · blocks] int32; the number of tiles where none does.

    Rows see no fewer keys than the rows before them, padding aside.
    """
    seen = last.reshape(layout.batch, 1, layout.tiles, layout.tile).max(axis=3)
    start = jnp.arange(layout.blocks)[:, None] * layout.block
    return jnp.sum(lax.cummax(seen, axis=2) < start, axis=2).astype(jnp.int32).reshape(-1)


def key_gradients(
    last: jax.Array,
    scale: jax.Array,
    numbers: jax.Array,
    q: jax.Array,
    cotangent: jax.Array,
    x: jax.Array,
    y: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layout: Layout,
    precision: Precision,
    solve: bool,
    dtype: jnp.dtype,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys [B, K, S, L] and values [B, K, S, Lv].

    Args:
        last: last key of each row, [B, rows].
        scale: of the logits, [B].
        numbers: per row, [B, K, 8, rows]: last key, lse, x·k̄, y·k̄, g, and Σ p h less the cotangent of lse.
        q: queries, [B, K, rows, L].
        cotangent: of the outputs, [B, K, rows, Lv].
        x: probes, [B, K, rows, L].
        y: solutions of the second system, [B, K, rows, L].
        k: pieces of the keys, [B, K, pieces, S, L].
        v: pieces of the values, [B, K, pieces, S, Lv].
        layout: sizes; ``block`` keys and ``tile`` rows make a step.
        precision: pieces.
        solve: whether there is a y.
        dtype: of the gradients.
        interpret: run on the CPU.
    """
    L, Lv = q.shape[-1], v.shape[-1]
    arrays = (first_tiles(last, layout), scale, numbers, q, cotangent, x, y, k, v)

    def tile_of(b, h, j, i, first, scale):
        # Tiles that do not see the keys are not fetched: the index waits at the first one that does.
        return jnp.minimum(jnp.maximum(i, first[b * layout.blocks + j]), layout.tiles - 1)

    def rows(width):
        return pl.BlockSpec((1, 1, layout.tile, width), lambda b, h, j, i, *refs: (b, h, tile_of(b, h, j, i, *refs), 0))

    def keys(width):
        return pl.BlockSpec((1, 1, precision.given, layout.block, width), lambda b, h, j, i, *_: (b, h, 0, j, 0))

    def gradient(width):
        return pl.BlockSpec((1, 1, layout.block, width), lambda b, h, j, i, *_: (b, h, j, 0))

    numbers_spec = pl.BlockSpec(
        (1, 1, tpu_rows.NUMBERS, layout.tile), lambda b, h, j, i, *refs: (b, h, 0, tile_of(b, h, j, i, *refs))
    )
    shape = (layout.batch, layout.heads, layout.padded_keys)
    return pl.pallas_call(
        functools.partial(_kernel, layout=layout, precision=precision, solve=solve),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(layout.batch, layout.heads, layout.blocks, layout.tiles),
            in_specs=[numbers_spec, rows(L), rows(Lv), rows(L), rows(L), keys(L), keys(Lv)],
            out_specs=[gradient(L), gradient(Lv)],
            scratch_shapes=[pltpu.VMEM((layout.block, width), jnp.float32) for width in (L, Lv)],
        ),
        out_shape=[kernel_output(arrays, (*shape, width), dtype) for width in (L, Lv)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=int(tpu_rows.vmem_capacity() * 0.95),
        ),
        interpret=interpret,
        name="lla_backward_keys",
    )(*arrays)
