"""Gradients of keys and values on GPUs: a program handles a tile of keys and passes over the rows that see them.

dv_j = Σ_i p (1 + a) dO_i,  dk_j = Σ_i (p (G − g) − p b) x_i − p (1 + a) y_i + scale ds q_i,
with a = x·c, b = y·c, G = dO·v, ds = p ((G − b)(1 + a) − g a − D).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import kernel_output
from kernels_pallas.local_linear_attention.gpu_plan import Packed, Plan, plan_of
from kernels_pallas.local_linear_attention.gpu_tile import LOG2E, NN, NT, add_product, pieces_of
from kernels_pallas.local_linear_attention.problem import Inputs, Options
from kernels_pallas.local_linear_attention.tpu_backward_keys import first_tiles


def _kernel(
    first_ref: Any,
    scale_ref: Any,
    last_ref: Any,
    lse_ref: Any,
    shift_x_ref: Any,
    shift_y_ref: Any,
    gain_ref: Any,
    d_ref: Any,
    q_ref: Any,
    g_ref: Any,
    x_ref: Any,
    y_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    plan: Plan,
    solve: bool,
) -> None:
    layout, order, scale = plan.layout, plan.precision.order, scale_ref[0]
    keys, values = ([ref[n] for n in range(plan.precision.given)] for ref in (k_ref, v_ref))
    key = lax.broadcasted_iota(jnp.int32, (layout.block, layout.tile), 0) + pl.program_id(2) * layout.block

    def products(a: Sequence[jax.Array], rows: Sequence[jax.Array]) -> jax.Array:
        return add_product(None, a, rows, order, NT)

    def gather(total: jax.Array, weights: jax.Array, rows: Sequence[jax.Array]) -> jax.Array:
        return add_product(total, pieces_of(weights, order), rows, order, NN)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        at = pl.ds(i * layout.tile, layout.tile)
        q, cotangents, x = ([ref[n, at, :] for n in range(ref.shape[0])] for ref in (q_ref, g_ref, x_ref))
        base, shift_x, gain, d = (ref[at][None, :] for ref in (lse_ref, shift_x_ref, gain_ref, d_ref))
        s = products(keys, q) * (scale * LOG2E) - base * LOG2E
        p = jnp.exp2(jnp.where(key <= last_ref[at][None, :], s, -jnp.inf) if plan.is_masked else s)
        reach = 1.0 + (products(keys, x) - shift_x)
        pull = products(values, cotangents)
        dv = gather(dv, p * reach, cotangents)
        if solve:
            y = [y_ref[n, at, :] for n in range(order)]
            pull -= products(keys, y) - shift_y_ref[at][None, :]
            dk = gather(dk, p * -reach, y)
        dk = gather(dk, p * (pull - gain), x)
        dk = gather(dk, p * (pull * reach - gain * (reach - 1.0) - d) * scale, q)
        return dk, dv

    start = tuple(jnp.zeros(ref.shape, jnp.float32) for ref in (dk_ref, dv_ref))
    dk, dv = lax.fori_loop(first_ref[0], layout.tiles, body, start)
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def key_gradients(
    inputs: Inputs,
    options: Options,
    packed: Packed,
    numbers: Sequence[jax.Array],
    cotangent: jax.Array,
    x: jax.Array,
    y: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys [B, K, S, head] and values [B, K, S, value_head].

    Args:
        inputs: the call.
        options: its options.
        packed: its arrays.
        numbers: per row, [B, K, rows]: lse, x·k̄, y·k̄, g, and Σ p h less the cotangent of lse.
        cotangent: pieces of the outputs' cotangents, [B, K, pieces, rows, value_head].
        x: pieces of the probes, [B, K, pieces, rows, head].
        y: pieces of the solutions of the second system, [B, K, pieces, rows, head].
        interpret: run on the CPU.
    """
    plan = plan_of(inputs, options, "keys")
    layout, block = plan.layout, plan.layout.block
    first = first_tiles(packed.last, layout).reshape(layout.batch, layout.blocks)
    arrays = (first, packed.scale, packed.last, *numbers, packed.q, cotangent, x, y, packed.k, packed.v)

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *array.shape[2:]), lambda b, h, j: (b, h, *[0] * (array.ndim - 2)))

    def keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, plan.precision.given, block, width), lambda b, h, j: (b, h, 0, j, 0))

    widths, dtypes = (plan.head, plan.value_head), (inputs.k.dtype, inputs.v.dtype)
    shape = (layout.batch, layout.heads, layout.padded_keys)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, solve=options.solve),
        grid=(layout.batch, layout.heads, layout.blocks),
        in_specs=[
            pl.BlockSpec((None, 1), lambda b, h, j: (b, j)),
            pl.BlockSpec((1,), lambda b, h, j: (b,)),
            pl.BlockSpec((None, layout.rows), lambda b, h, j: (b, 0)),
            *map(whole, arrays[3:-2]),
            *map(keys, widths),
        ],
        out_specs=[pl.BlockSpec((None, None, block, width), lambda b, h, j: (b, h, j, 0)) for width in widths],
        out_shape=[kernel_output(arrays, (*shape, width), dtype) for width, dtype in zip(widths, dtypes, strict=True)],
        compiler_params=plt.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name="lla_backward_keys",
    )(*arrays)
