"""Backward kernels of local linear attention for GPUs (Triton).

The first kernel takes a tile of rows, as the forward kernel does: a pass over keys and values for g = Σ p G and
t = Σ p G c, the solve A y = t, and a second pass for D = Σ p h and Σ ds k. The second kernel
(`gpu_backward_keys`) takes tiles of keys and reads six numbers and the vectors of every row that sees them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import raise_refusal
from kernels_pallas.local_linear_attention import gpu_backward_keys, gpu_plan, tpu_rows
from kernels_pallas.local_linear_attention.gpu_plan import Plan, Rows, plan_of, refusal
from kernels_pallas.local_linear_attention.gpu_tile import (
    IMAGE,
    LOG2E,
    MEAN,
    RESIDUAL,
    SOLUTION,
    Tile,
    barrier,
    row_sum,
)
from kernels_pallas.local_linear_attention.problem import Backward, Cotangents, Forward, Inputs, Options
from kernels_pallas.local_linear_attention.tpu_pieces import split_input


def _kernel(
    scale_ref: Any,
    last_ref: Any,
    ridge_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    g_ref: Any,
    x_ref: Any,
    mean_ref: Any,
    dx_ref: Any,
    lse_ref: Any,
    dlse_ref: Any,
    vectors: Any,
    x_pieces: Any,
    y_pieces: Any,
    shift_x_ref: Any,
    shift_y_ref: Any,
    gain_ref: Any,
    d_ref: Any,
    *,
    plan: Plan,
    options: Options,
    interpret: bool,
) -> None:
    sync = barrier(interpret)
    tile = Tile(plan, scale_ref[0] * LOG2E, last_ref[...], q_ref, k_ref, vectors, y_pieces, shift_y_ref, sync)
    blocks, base, head = tile.blocks(), lse_ref[...] * LOG2E, plan.head
    none = jnp.zeros((plan.layout.tile,), jnp.float32)

    def copy(at: Any) -> tuple[()]:
        vectors[MEAN, :, at] = mean_ref[:, at]
        return ()

    tile.columns(copy)
    tile.aim(lambda at: x_ref[:, at], x_pieces, shift_x_ref)
    queries, cotangents = tile.operand(q_ref), tile.operand(g_ref)

    def gather(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, gain = carry
        keys = tile.load(k_ref, j)
        weighted = tile.weights(j, queries, keys, base) * tile.project(cotangents, tile.load(v_ref, j))
        return tile.gather(total, weighted, keys), gain + row_sum(weighted)

    vectors[IMAGE], gain_ref[...] = lax.fori_loop(0, blocks, gather, (tile.empty(head), none))
    sync()
    gain = gain_ref[...]
    right = RESIDUAL if options.solve else SOLUTION

    def residual(at: Any) -> tuple[()]:
        t = vectors[IMAGE, :, at] - gain[:, None] * vectors[MEAN, :, at] + dx_ref[:, at]
        # The x of a row without keys is zero, whatever its inputs.
        vectors[right, :, at] = jnp.where((tile.last >= 0)[:, None], t, 0.0)
        return ()

    tile.columns(residual)
    if options.solve:
        tile.solve(options, base, none + 1.0, ridge_ref[...])
    tile.aim(lambda at: vectors[SOLUTION, :, at], y_pieces, shift_y_ref)

    queries, cotangents = tile.operand(q_ref), tile.operand(g_ref)
    xs, ys, shift_x, shift_y = tile.operand(x_pieces), tile.operand(y_pieces), shift_x_ref[...], shift_y_ref[...]
    gain = gain_ref[...]

    def scatter(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, d = carry
        keys = tile.load(k_ref, j)
        p = tile.weights(j, queries, keys, base)
        pull = tile.project(cotangents, tile.load(v_ref, j))
        if options.solve:
            pull -= tile.project(ys, keys) - shift_y[:, None]
        along = tile.project(xs, keys) - shift_x[:, None]
        weighted = p * (pull * (1.0 + along) - gain[:, None] * along)
        return tile.gather(total, weighted, keys), d + row_sum(weighted)

    vectors[IMAGE], d = lax.fori_loop(0, blocks, scatter, (tile.empty(head), none))
    d_ref[...] = d - dlse_ref[...]
    sync()
    d = d_ref[...]

    def center(at: Any) -> tuple[()]:
        vectors[IMAGE, :, at] -= d[:, None] * vectors[MEAN, :, at]
        return ()

    tile.columns(center)


def backward(
    inputs: Inputs,
    options: Options,
    fwd: Forward,
    cot: Cotangents,
    *,
    interpret: bool = False,
    **sizes: int,
) -> Backward:
    """Gradients, from what the forward pass left and the cotangents of its outputs.

    Args:
        inputs: of the forward pass.
        options: of the forward pass.
        fwd: its result.
        cot: cotangents.
        interpret: run on the CPU, for tests.
        sizes: see `plan_of`.

    Raises:
        ValueError: if the call is one that `refusal` refuses.
    """
    raise_refusal("pallas_gpu", refusal(inputs, options))
    plan = plan_of(inputs, options, "rows", **sizes)
    layout, precision = plan.layout, plan.precision
    number, vector = Rows(jnp.float32), Rows(jnp.float32, plan.head)
    pieces = Rows(jnp.bfloat16, plan.head, precision.order)
    packed = gpu_plan.pack(inputs, options, plan)
    cotangent = split_input(gpu_plan.pack_rows(cot.out, plan, plan.value_head), precision.given)
    lse = tpu_rows.pack_rows(jnp.where(jnp.isneginf(fwd.lse), tpu_rows.HUGE, fwd.lse), layout, tpu_rows.HUGE)
    rows = [
        (cotangent, Rows(jnp.bfloat16, plan.value_head, precision.given)),
        *((gpu_plan.pack_rows(a, plan, plan.head), vector) for a in (fwd.x, fwd.mean, cot.x)),
        (lse, number),
        (tpu_rows.pack_rows(cot.lse, layout), number),
    ]
    slots = Rows(jnp.float32, plan.head, 6 if options.preconditioner else 5)
    kernel = functools.partial(_kernel, plan=plan, options=options, interpret=interpret)
    vectors, x_pieces, y_pieces, *numbers = gpu_plan.call_rows(
        kernel,
        plan,
        packed,
        rows,
        [slots, pieces, pieces, *[number] * 4],
        name="lla_backward_rows",
        interpret=interpret,
    )
    dk, dv = gpu_backward_keys.key_gradients(
        inputs, options, packed, [lse, *numbers], cotangent, x_pieces, y_pieces, interpret
    )

    def unpack_keys(x: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, :, : layout.keys, : like.shape[-1]], 1, 2)

    return Backward(
        solved=tpu_rows.unpack_rows(vectors[:, :, SOLUTION], layout)[..., : layout.head],
        logit=tpu_rows.unpack_rows(vectors[:, :, IMAGE], layout)[..., : layout.head],
        dk=unpack_keys(dk, inputs.k),
        dv=unpack_keys(dv, inputs.v),
    )
