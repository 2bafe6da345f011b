"""Decoding kernels of local linear attention for GPUs (Triton): one query per head, and one pass over the cache.

A program of the first kernel sums columns of Σ w [k | v] kᵀ of one head over a part of the cache; they stay in its
registers. Programs with other columns of the head, and with other heads of the group, are neighbours in the grid: the
first one brings keys and values from memory, the others find them in the level 2 cache. The second kernel, a program
per head, merges the parts and solves the H x H system in its registers: the dozens of small kernels that XLA would
launch for it take longer than reading the cache does.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import kernel_output
from kernels_pallas.dispatch import raise_refusal
from kernels_pallas.local_linear_attention import decode as xla_decode
from kernels_pallas.local_linear_attention.decode import DecodeState
from kernels_pallas.local_linear_attention.gpu_plan import MAX_SIZE, MIN_SIZE, is_hopper, pad_last, power_of_two
from kernels_pallas.local_linear_attention.gpu_tile import LOWEST, NN, add_product, pieces_of
from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.tpu_pieces import Precision, precision_of, split

PROGRAMS = 264  # two for each multiprocessor of an H100
STATE = 128 * 128  # moments in the registers of a program, a quarter of what a multiprocessor has
MAX_SOLVED = 128  # size of a system that a program's registers hold
TN = (((0,), (0,)), ((), ()))  # contracts the first axes


class Plan(NamedTuple):
    """How a step is cut up.

    Attributes:
        precision: pieces of operands.
        order: products of pieces i and j are formed where i + j < order.
        group: query heads per key head.
        columns: columns of the moments per program.
        tile: keys per turn.
        parts: programs that share a sequence's keys.
        warps: of a program.
    """

    precision: Precision
    order: int
    group: int
    columns: int
    tile: int
    parts: int
    warps: int


def plan_of(q: Any, k: Any, v: Any, parts: int | None = None) -> Plan:
    """Sizes for q [B, N, H], k [B, S, K, H], v [B, S, K, Hv]; parts that are given are taken."""
    batch, heads = q.shape[:2]
    slots, key_heads = k.shape[1:3]
    size, rows = power_of_two(k.shape[-1]), power_of_two(k.shape[-1]) + power_of_two(v.shape[-1])
    precision = precision_of(k.dtype)
    # More columns or keys spill, the compiler says: operands lie in registers, but for Hopper, in shared memory there.
    state = STATE if is_hopper() or precision.given == 1 else STATE // 2
    columns = min(size, max(MIN_SIZE, state // rows))
    tile = (64 if precision.given == 1 and rows <= 256 else 32) if is_hopper() else 16
    if parts is None:
        # A part's moments are written and read again: it has to be several times as many keys as those would be.
        parts = min(max(1, slots // (8 * size)), max(1, PROGRAMS // (batch * heads * (size // columns))))
    return Plan(
        precision=precision,
        # All products of two pieces: a mean is subtracted from them, and next to a single key nothing remains.
        order=min(precision.order + precision.given - 1, 3),
        group=heads // key_heads,
        columns=columns,
        tile=min(tile, power_of_two(slots)),
        parts=parts,
        warps=8 if columns * rows > state // 2 else 4,
    )


def refusal(q: Any, k: Any, v: Any, options: Options) -> str | None:
    """Why these kernels cannot take a call, or None."""
    dtype = jnp.dtype(k.dtype)
    if dtype.name not in ("bfloat16", "float16", "float32") or k.dtype != v.dtype or q.dtype.itemsize > 4:
        return (
            f"query, key and value have dtypes {q.dtype}, {k.dtype} and {v.dtype}; this kernel reads bfloat16, float16 "
            "or float32 caches"
        )
    for name, size in (("key", k.shape[-1]), ("value", v.shape[-1])):
        if size > MAX_SIZE:
            return f"{name} has head size {size}; this kernel takes at most {MAX_SIZE}"
    return None


def _kernel(
    length_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    top_ref: Any,
    weight_ref: Any,
    k_sum_ref: Any,
    v_sum_ref: Any,
    kk_ref: Any,
    vk_ref: Any,
    *,
    plan: Plan,
    slots: int,
) -> None:
    part, b = pl.program_id(1), pl.program_id(2)
    size, value_size, columns = kk_ref.shape[-1], vk_ref.shape[-2], plan.columns
    chunks = jnp.int32(size // columns)
    n, first = lax.div(pl.program_id(0), chunks), lax.rem(pl.program_id(0), chunks) * columns
    h = lax.div(n, jnp.int32(plan.group))
    tile, order, made = plan.tile, plan.order, plan.precision.order
    length = length_ref[b]
    q = q_ref[b, n]  # times the scale

    def operands(x: jax.Array) -> list[jax.Array]:
        return [x] if x.dtype == jnp.bfloat16 else pieces_of(x.astype(jnp.float32), plan.precision.given)

    def turn(index: jax.Array, state: tuple[jax.Array, ...], is_edge: bool) -> tuple[jax.Array, ...]:
        top, weight, k_sum, v_sum, kk, vk = state
        row = index * tile + jnp.arange(tile)
        slot = jnp.minimum(row, slots - 1) if is_edge else row
        used = row < length

        def load(ref: Any, *columns: Any) -> jax.Array:
            x = ref[b, slot, h, pl.ds(*columns)]
            # What lies in unused slots may be anything, and 0 · NaN is NaN.
            return jnp.where(used[:, None], x, jnp.zeros_like(x)) if is_edge else x

        k = load(k_ref, 0, size)
        mine = k if columns == size else load(k_ref, first, columns)
        keys, values = operands(k), operands(load(v_ref, 0, value_size))
        s = jnp.sum(k.astype(jnp.float32) * q[None, :], axis=1)
        if is_edge:
            s = jnp.where(used, s, -jnp.inf)
        new = jnp.maximum(top, jnp.max(s))
        w, decay = jnp.exp(s - new), jnp.exp(top - new)
        # Sums are products too: the pieces of w are the first rows of a small matrix, the others are zero.
        at = lax.broadcasted_iota(jnp.int32, (MIN_SIZE, tile), 0)
        rows = jnp.zeros((MIN_SIZE, tile), jnp.float32)
        for i, piece in enumerate(split(w, made)):
            rows = jnp.where(at == i, piece[None, :], rows)
        sums = [rows.astype(jnp.bfloat16)]
        weighted = pieces_of(mine.astype(jnp.float32) * w[:, None], made)
        return (
            new,
            weight * decay + jnp.sum(w),
            add_product(k_sum * decay, sums, operands(mine), order, NN),
            add_product(v_sum * decay, sums, values, order, NN),
            add_product(kk * decay, keys, weighted, order, TN),
            add_product(vk * decay, values, weighted, order, TN),
        )

    # The used slots, and not all of them, are shared out.
    turns = lax.div(length + (tile - 1), jnp.int32(tile))
    each = lax.div(turns + (plan.parts - 1), jnp.int32(plan.parts))
    start = jnp.minimum(part * each, turns)
    stop = jnp.minimum(start + each, turns)
    full = jnp.clip(lax.div(length, jnp.int32(tile)), start, stop)

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    state = (
        jnp.float32(LOWEST),
        jnp.float32(0),
        zeros(MIN_SIZE, columns),
        zeros(MIN_SIZE, value_size),
        zeros(size, columns),
        zeros(value_size, columns),
    )
    state = lax.fori_loop(start, full, lambda i, state: turn(i, state, False), state)
    top, weight, k_sum, v_sum, kk, vk = lax.fori_loop(full, stop, lambda i, state: turn(i, state, True), state)
    chunk = pl.ds(first, columns)
    # Programs with other columns of the same head write the same three values.
    top_ref[b, n, part] = top
    weight_ref[b, n, part] = weight
    v_sum_ref[b, n, part] = jnp.sum(v_sum, axis=0)
    k_sum_ref[b, n, part, chunk] = jnp.sum(k_sum, axis=0)
    kk_ref[b, n, part, :, chunk] = kk
    vk_ref[b, n, part, :, chunk] = vk


def _solve_kernel(
    q_ref: Any,
    ridge_ref: Any,
    top_ref: Any,
    weight_ref: Any,
    k_sum_ref: Any,
    v_sum_ref: Any,
    kk_ref: Any,
    vk_ref: Any,
    out_ref: Any,
    *,
    parts: int,
    options: Options,
) -> None:
    """The output of a head from the moments of the parts of its cache: what `decode.merge` and `finish` do."""
    n, b = pl.program_id(0), pl.program_id(1)
    size, value_size = kk_ref.shape[-1], vk_ref.shape[-2]

    def merged(ref: Any, *shape: int) -> jax.Array:
        def add(part: jax.Array, total: jax.Array) -> jax.Array:
            return total + ref[b, n, part] * jnp.exp(top_ref[b, n, part] - top)

        return lax.fori_loop(0, parts, add, jnp.zeros(shape, jnp.float32))

    top = lax.fori_loop(0, parts, lambda part, m: jnp.maximum(m, top_ref[b, n, part]), jnp.float32(LOWEST))
    weight = merged(weight_ref)
    inverse = jnp.where(weight == 0, 0.0, 1.0 / jnp.where(weight == 0, 1.0, weight))
    mean = merged(k_sum_ref, size) * inverse
    value_mean = merged(v_sum_ref, value_size) * inverse
    cov = merged(kk_ref, size, size) * inverse - mean[:, None] * mean[None, :]
    ridge = ridge_ref[b, n]
    b_vector = jnp.where(weight == 0, 0.0, q_ref[b, n] - mean)
    if options.preconditioner == "jacobi":
        eye = jnp.arange(size)[:, None] == jnp.arange(size)[None, :]
        scaling: Any = 1.0 / (jnp.sum(jnp.where(eye, cov, 0.0), axis=1) + ridge)
    else:
        scaling = 1.0

    z = b_vector * scaling
    rz = jnp.sum(b_vector * z)
    goal = rz * (options.rtol * options.rtol)

    def step(carry: Any) -> Any:
        count, x, r, p, rz = carry
        image = jnp.sum(cov * p[None, :], axis=1) + ridge * p
        curvature = jnp.sum(p * image)
        active = (rz > goal) & (curvature > 0)
        alpha = jnp.where(active, rz / jnp.where(active, curvature, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * image
        z = r * scaling
        # Where no curvature is left, the system has reached its precision: it is finished as well.
        new = jnp.where(active, jnp.sum(r * z), jnp.minimum(rz, goal))
        return count + 1, x, r, z + new / jnp.where(active, rz, 1.0) * p, new

    carry = (jnp.int32(0), jnp.zeros_like(mean), b_vector, z, rz)
    _, x, *_ = lax.while_loop(lambda c: (c[0] < options.max_iters) & (c[4] > goal), step, carry)
    slant = jnp.sum(merged(vk_ref, value_size, size) * x[None, :], axis=1) * inverse
    out_ref[b, n] = value_mean * (1.0 - jnp.sum(x * mean)) + slant


def _parts(
    q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array, scale: jax.Array, interpret: Any, parts: int | None
) -> tuple[Plan, jax.Array, tuple[jax.Array, ...]]:
    """Runs the first kernel: the plan, padded queries, and m, Σw, Σwk, Σwv, Σwkkᵀ, Σwvkᵀ of parts [B, N, parts]."""
    size, value_size = power_of_two(k.shape[-1]), power_of_two(v.shape[-1])
    # Copies of the cache, unless its sizes are powers of two already.
    k, v = pad_last(k, size), pad_last(v, value_size)
    q = pad_last(q.astype(jnp.float32), size)
    plan = plan_of(q, k, v, parts)
    batch, heads = q.shape[:2]
    arrays = (length.astype(jnp.int32), q * scale.astype(jnp.float32), k, v)
    shapes = [(), (), (size,), (value_size,), (size, size), (value_size, size)]
    moments = pl.pallas_call(
        functools.partial(_kernel, plan=plan, slots=k.shape[1]),
        grid=(heads * (size // plan.columns), plan.parts, batch),
        out_shape=[kernel_output(arrays, (batch, heads, plan.parts, *shape), jnp.float32) for shape in shapes],
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=2),
        interpret=interpret,
        name="lla_moments",
    )(*arrays)
    return plan, q, tuple(moments)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    ridge: jax.Array,
    options: Options,
    *,
    interpret: Any = False,
    parts: int | None = None,
) -> tuple[jax.Array, DecodeState | None]:
    """Outputs [B, N, Hv] (float32) of one query per sequence against its cache, and the moments where XLA solves.

    Args:
        q: [B, N, H].
        k: [B, S, K, H].
        v: [B, S, K, Hv].
        length: used slots, [B] int32.
        scale: of the logits.
        ridge: [B, N].
        options: of the solver.
        interpret: run on the CPU, for tests.
        parts: programs that share the keys of a head; ``None`` for as many as fill a GPU.
    """
    raise_refusal("pallas_gpu", refusal(q, k, v, options))
    if options.solver != "cg" or k.shape[-1] > MAX_SOLVED:
        state = partial_state(q, k, v, length, scale, interpret=interpret, parts=parts)
        return xla_decode.finish(state, q.astype(jnp.float32), ridge.astype(jnp.float32), options)[0], state
    plan, queries, moments = _parts(q, k, v, length, scale, interpret, parts)
    batch, heads, size = queries.shape
    arrays = (queries, ridge.astype(jnp.float32), *moments)
    value_size = moments[3].shape[-1]
    out = pl.pallas_call(
        functools.partial(_solve_kernel, parts=plan.parts, options=options),
        grid=(heads, batch),
        out_shape=kernel_output(arrays, (batch, heads, value_size), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8 if size * max(size, value_size) > STATE // 4 else 4),
        interpret=interpret,
        name="lla_solve",
    )(*arrays)
    return out[..., : v.shape[-1]], None


def partial_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    *,
    interpret: Any = False,
    parts: int | None = None,
) -> DecodeState:
    """Moments of the first ``length`` [B] of S keys and values, as `decode.partial_state` gives them."""
    raise_refusal("pallas_gpu", refusal(q, k, v, Options()))
    head, value_head = q.shape[-1], v.shape[-1]
    _, _, (top, *sums) = _parts(q, k, v, length, scale, interpret, parts)
    best = jnp.max(top, axis=2)
    decay = jnp.exp(top - best[:, :, None])
    weight, k_sum, v_sum, kk, vk = (jnp.sum(x * decay.reshape(*decay.shape, *[1] * (x.ndim - 3)), axis=2) for x in sums)
    return DecodeState(
        m=jnp.where(best <= LOWEST / 2, -jnp.inf, best),
        weight=weight,
        k_sum=k_sum[..., :head],
        v_sum=v_sum[..., :value_head],
        kk=kk[..., :head, :head],
        vk=vk[..., :value_head, :head],
    )
