"""Forward kernel of local linear attention for GPUs (Triton).

A program handles a tile of rows of one key head: the queries of a group's heads, position by position, so that the
group shares every block of keys that is loaded. It passes over the keys once for softmax's numbers and the mean key,
once per iteration of the solver, and once over keys and values for the output. Weights are computed again in every
pass: to keep them would take more memory than a program has, and to load them longer than to compute them.

Products run on tensor cores in bfloat16 pieces, as on TPUs (`tpu_pieces`): one piece for bfloat16 inputs, two for
float16, three for float32, and two or three for the float32 numbers that the solve works on. Three passes of TF32 would
cost a float32 product as much, and plain float32 several times that: it has no tensor cores and fills the registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.dispatch import raise_refusal
from kernels_pallas.local_linear_attention import gpu_plan, tpu_rows
from kernels_pallas.local_linear_attention.gpu_backward import backward
from kernels_pallas.local_linear_attention.gpu_plan import Plan, Rows, plan_of, refusal
from kernels_pallas.local_linear_attention.gpu_tile import (
    LOG2E,
    LOWEST,
    MEAN,
    RESIDUAL,
    SOLUTION,
    Tile,
    barrier,
    row_sum,
)
from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options

__all__ = ["backward", "forward", "refusal"]


def _kernel(
    scale_ref: Any,
    last_ref: Any,
    ridge_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    plan: Plan,
    options: Options,
    interpret: bool,
) -> None:
    *probe_ref, out_ref, lse_ref, count_ref, vectors, pieces, shift_ref = refs
    sync = barrier(interpret)
    tile = Tile(plan, scale_ref[0] * LOG2E, last_ref[...], q_ref, k_ref, vectors, pieces, shift_ref, sync)
    blocks = tile.blocks()

    # Pass 1: the largest logit of each row, the sum of weights and the mean key.
    queries = tile.operand(q_ref)

    def center(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, omega, top = carry
        keys = tile.load(k_ref, j)
        s = tile.logits(j, queries, keys)
        new = jnp.maximum(top, jnp.max(s, axis=1))
        old, w = jnp.exp2(top - new), jnp.exp2(s - new[:, None])
        return tile.gather(total * old[:, None], w, keys), omega * old + row_sum(w), new

    none = jnp.zeros((plan.layout.tile,), jnp.float32)
    total, omega, top = lax.fori_loop(0, blocks, center, (tile.empty(plan.head), none, none + LOWEST))
    has_keys = tile.last >= 0
    omega = jnp.where(has_keys, omega, 1.0)
    inverse = 1.0 / omega
    vectors[MEAN] = total * inverse[:, None]
    lse_ref[...] = jnp.where(has_keys, top / LOG2E + jnp.log(omega), -jnp.inf)
    sync()

    # Rows without keys solve 0, and so do those that are not finite: their weights make the output NaN.
    can_solve = (has_keys & (omega > 0))[:, None]
    if options.solve:

        def residual(at: Any) -> tuple[()]:
            q = functools.reduce(jnp.add, [q_ref[n, :, at].astype(jnp.float32) for n in range(q_ref.shape[0])])
            vectors[RESIDUAL, :, at] = jnp.where(can_solve, q - vectors[MEAN, :, at], 0.0)
            return ()

        tile.columns(residual)
        count = tile.solve(options, top, inverse, ridge_ref[...])
    else:
        count = jnp.int32(0)
        vectors[SOLUTION] = jnp.where(can_solve, probe_ref[0][...], 0.0)
        sync()
    count_ref[...] = jnp.broadcast_to(count, (plan.layout.tile,))

    # Pass 2: Σ w (1 + x·c) v.
    tile.aim(lambda at: vectors[SOLUTION, :, at], pieces, shift_ref)
    rows, queries, shift = tile.operand(pieces), tile.operand(q_ref), shift_ref[...]

    def output(j: jax.Array, total: jax.Array) -> jax.Array:
        keys = tile.load(k_ref, j)
        w = tile.weights(j, queries, keys, top)
        return tile.gather(total, w * (1.0 + (tile.project(rows, keys) - shift[:, None])), tile.load(v_ref, j))

    total = lax.fori_loop(0, blocks, output, tile.empty(plan.value_head))
    out_ref[...] = (total * inverse[:, None]).astype(out_ref.dtype)


def forward(inputs: Inputs, options: Options, *, interpret: bool = False, **sizes: int) -> Forward:
    """Attention of all queries, and what the backward pass needs.

    Args:
        inputs: queries, keys, values and their numbers; ``mask`` must be None.
        options: static options; ``solver`` must be ``"cg"``.
        interpret: run on the CPU, for tests.
        sizes: see `plan_of`.

    Raises:
        ValueError: if the call is one that `refusal` refuses.
    """
    raise_refusal("pallas_gpu", refusal(inputs, options))
    plan = plan_of(inputs, options, **sizes)
    layout = plan.layout
    vector = Rows(jnp.float32, plan.head)
    probe = [] if inputs.probe is None else [(gpu_plan.pack_rows(inputs.probe, plan, plan.head), vector)]
    slots = (6 if options.preconditioner else 5) if options.solve else 2
    outputs = [
        Rows(inputs.q.dtype, plan.value_head),
        Rows(jnp.float32),
        Rows(jnp.int32),
        Rows(jnp.float32, plan.head, slots),
        Rows(jnp.bfloat16, plan.head, plan.precision.order),
        Rows(jnp.float32),
    ]
    kernel = functools.partial(_kernel, plan=plan, options=options, interpret=interpret)
    packed = gpu_plan.pack(inputs, options, plan)
    out, lse, iterations, vectors, *_ = gpu_plan.call_rows(
        kernel, plan, packed, probe, outputs, name="lla_forward", interpret=interpret
    )
    return Forward(
        out=tpu_rows.unpack_rows(out, layout)[..., : inputs.v.shape[-1]],
        x=tpu_rows.unpack_rows(vectors[:, :, SOLUTION], layout)[..., : layout.head],
        mean=tpu_rows.unpack_rows(vectors[:, :, MEAN], layout)[..., : layout.head],
        lse=tpu_rows.unpack_rows(lse, layout),
        iterations=tpu_rows.unpack_rows(iterations, layout),
    )
