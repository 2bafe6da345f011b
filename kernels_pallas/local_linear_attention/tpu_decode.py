"""Decoding kernel of local linear attention for TPUs: one query per head, and one pass over the cached keys and values.

A block of the cache adds Σ w (w k)[k | v]ᵀ to the moments of its head, which stay in VMEM; after the last block the
H x H systems of all heads of the sequence are solved there, eight at a time, so that their latencies overlap.

The kernel wants keys along lanes, [B, K, H, S]: then both products are ones that the matrix unit does without a
transposition, and heads of 64 fill whole lanes (a last axis of 64 is padded to 128 in HBM). `decode_lanes` takes such
a cache as it is and is the one to build a decoding loop on; `decode` takes [B, S, K, H] and transposes, which costs a
copy of the cache unless XLA lays out the cache that way to begin with.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import kernel_output
from kernels_pallas.dispatch import raise_refusal
from kernels_pallas.local_linear_attention import tpu_rows
from kernels_pallas.local_linear_attention.decode import DecodeState
from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.tpu_pieces import LANES, Precision, fold, precision_of, split
from kernels_pallas.local_linear_attention.tpu_rows import MASKED
from kernels_pallas.local_linear_attention.tpu_tile import loop

BLOCK = 8192  # keys per grid step: a step costs some hundred cycles by itself
PART = 4096  # most keys of a product, which hides the latencies of its start and end
EDGE = 512  # keys of a product that looks for the end of the used slots
WORK = 2**19  # most entries of a product's weighted keys
SYSTEMS = 8  # systems that are solved together: one row of a register each

ON_VECTOR_UNIT = 4  # most query heads per key head whose logits the vector unit computes

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))


def _products(a: jax.Array, pieces: list[jax.Array], dims: tuple, order: int, own: int) -> jax.Array:
    """float32 a [R, ...] in ``own`` pieces times the sum of bfloat16 pieces, where i + j < order.

    The pieces of a are stacked, as loading the other side into the matrix unit costs as much as 128 rows.
    """
    parts = [part.astype(jnp.bfloat16) for part in split(a, own)]
    terms = []
    for j, piece in enumerate(pieces):
        mine = parts[: order - j]
        stacked = mine[0] if len(mine) == 1 else jnp.concatenate(mine, axis=0)
        product = lax.dot_general(stacked, piece, dims, preferred_element_type=jnp.float32)
        terms += [product[i * a.shape[0] : (i + 1) * a.shape[0]] for i in range(len(mine))]
    total = terms[-1]
    for term in terms[-2::-1]:
        total = total + term
    return total


def _pieces(x: jax.Array, precision: Precision) -> list[jax.Array]:
    if precision.given == 1:
        return [x.astype(jnp.bfloat16)]
    return [part.astype(jnp.bfloat16) for part in split(x.astype(jnp.float32), precision.given)]


def _kernel(
    length_ref: Any,
    scale_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    group: int,
    heads: int,
    block: int,
    part: int,
    edge: int,
    precision: Precision,
    query_pieces: int,
    options: Options | None,
) -> None:
    b, h, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    if options is None:
        moments_ref, sums_ref, stats_ref = (ref.at[0] for ref in refs[:3])
        q_columns_ref, logits_ref, top_ref, omega_ref = refs[3:]
        base: Any = 0
    else:
        rhs_ref, ridge_ref, out_ref, moments_ref, sums_ref, stats_ref, system_ref = refs[:7]
        q_columns_ref, logits_ref, top_ref, omega_ref = refs[7:]
        base = h * group
    size, width = moments_ref.shape[1:]
    order = precision.order
    length = length_ref[b]
    rows = q_ref.shape[2]

    @pl.when(j == 0)
    def _() -> None:
        for g in range(group):
            moments_ref[base + g] = jnp.zeros((size, width), jnp.float32)
            sums_ref[base + g] = jnp.zeros(sums_ref.shape[1:], jnp.float32)
            stats_ref[base + g, 0:1] = jnp.full((1, LANES), MASKED, jnp.float32)
            stats_ref[base + g, 1:2] = jnp.zeros((1, LANES), jnp.float32)
        if group <= ON_VECTOR_UNIT:
            eye = _identity(size)
            for g in range(group):
                column = jnp.sum(jnp.where(eye, q_ref[0, 0, g : g + 1, :], 0.0), axis=1, keepdims=True)
                q_columns_ref[g] = jnp.broadcast_to(column, (size, LANES))

    def load(ref: Any, n: jax.Array, is_edge: bool) -> jax.Array:
        width = edge if is_edge else part
        x = ref[0, 0, :, pl.ds(pl.multiple_of(n * width, width), width)]
        if is_edge:  # what lies in unused slots may be anything, and 0 · NaN is NaN
            key = lax.broadcasted_iota(jnp.int32, x.shape, 1) + (j * block + n * edge)
            x = jnp.where(key < length, x.astype(jnp.float32), 0.0).astype(x.dtype)
        return x

    def row_logits(k: jax.Array) -> jax.Array:
        if group > ON_VECTOR_UNIT:
            return _products(q_ref[0, 0], _pieces(k, precision), _NN, order, query_pieces)
        # Few rows: the matrix unit would be busy with loading the keys.
        wide = k.astype(jnp.float32)
        s = [
            jnp.sum(wide * jnp.concatenate([q_columns_ref[g]] * (k.shape[1] // LANES), axis=1), axis=0, keepdims=True)
            for g in range(group)
        ]
        return jnp.concatenate([*s, *[s[0]] * (rows - group)], axis=0)

    def score(n: jax.Array, is_edge: bool) -> None:
        s = row_logits(load(k_ref, n, is_edge)) * scale_ref[b]
        if is_edge:
            key = lax.broadcasted_iota(jnp.int32, s.shape, 1) + (j * block + n * edge)
            s = jnp.where(key < length, s, MASKED)
        pieces = s.shape[1] // edge
        for i in range(pieces):
            logits_ref[n * pieces + i] = s[:, i * edge : (i + 1) * edge]
        best = functools.reduce(jnp.maximum, [s[:, at : at + LANES] for at in range(0, s.shape[1], LANES)])
        top_ref[...] = jnp.maximum(top_ref[...], best)

    def accumulate(n: jax.Array, is_edge: bool) -> None:
        k, v = load(k_ref, n, is_edge), load(v_ref, n, is_edge)
        pieces = k.shape[1] // edge
        s = jnp.concatenate([logits_ref[n * pieces + i] for i in range(pieces)], axis=1)
        w = jnp.exp(s - jnp.concatenate([top_ref[...]] * (k.shape[1] // LANES), axis=1))
        omega_ref[...] += fold(w)
        wide_k = k.astype(jnp.float32)
        weighted = jnp.concatenate([w, *[w[g : g + 1] * wide_k for g in range(group)]], axis=0)
        both = _pieces(jnp.concatenate([k, v], axis=0), precision)
        sums = _products(weighted, both, _NT, order, order)
        for g in range(group):
            sums_ref[base + g, 0:1] += sums[g : g + 1]
            moments_ref[base + g] += sums[rows + g * size : rows + (g + 1) * size]

    used = jnp.clip(length - j * block, 0, block)
    full = lax.div(used, jnp.int32(part))
    first, last = full * (part // edge), lax.div(used + (edge - 1), jnp.int32(edge))

    @pl.when(used > 0)
    def _() -> None:
        tops = [stats_ref[base + g, 0:1] for g in range(group)]
        old = jnp.concatenate([*tops, *[tops[0]] * (rows - group)], axis=0)
        top_ref[...] = old
        omega_ref[...] = jnp.zeros((rows, LANES), jnp.float32)
        loop(0, full, lambda n: score(n, False))
        loop(first, last, lambda n: score(n, True))
        m = jnp.broadcast_to(jnp.max(top_ref[...], axis=1, keepdims=True), old.shape)
        top_ref[...] = m
        decay = jnp.exp(old - m)
        wide = jnp.concatenate([decay] * -(-width // LANES), axis=1)[:, :width]
        for g in range(group):
            stats_ref[base + g, 0:1] = m[g : g + 1]
            sums_ref[base + g, 0:1] *= wide[g : g + 1]
            moments_ref[base + g] *= wide[g : g + 1]
        # With m known for the whole block, its parts do not wait for each other.
        loop(0, full, lambda n: accumulate(n, False))
        loop(first, last, lambda n: accumulate(n, True))
        omega = jnp.broadcast_to(jnp.sum(omega_ref[...], axis=1, keepdims=True), old.shape)
        for g in range(group):
            stats_ref[base + g, 1:2] = stats_ref[base + g, 1:2] * decay[g : g + 1] + omega[g : g + 1]

    if options is not None:
        is_last = (h == pl.num_programs(1) - 1) & (j == pl.num_programs(2) - 1)

        def finish(c: jax.Array) -> None:
            _finish(
                c * SYSTEMS, heads, rhs_ref, ridge_ref, out_ref, moments_ref, sums_ref, stats_ref, system_ref, options
            )

        loop(0, jnp.where(is_last, -(-heads // SYSTEMS), 0), finish)


def _identity(size: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (size, size), 0) == lax.broadcasted_iota(jnp.int32, (size, size), 1)


def _finish(
    first: jax.Array,
    heads: int,
    rhs_ref: Any,
    ridge_ref: Any,
    out_ref: Any,
    moments_ref: Any,
    sums_ref: Any,
    stats_ref: Any,
    system_ref: Any,
    options: Options,
) -> None:
    """Outputs of eight heads from their moments. Vectors are rows [8, H]; system n is [H, H]."""
    size, width = moments_ref.shape[1:]
    eye = _identity(size)
    start = pl.multiple_of(first, SYSTEMS)
    # Where fewer than eight are left, the last head fills up.
    mine = [jnp.minimum(first + n, heads - 1) for n in range(SYSTEMS)]

    def column(row: jax.Array) -> jax.Array:  # [1, H] -> [H, 1]
        return jnp.sum(jnp.where(eye, row, 0.0), axis=1, keepdims=True)

    def line(column: jax.Array) -> jax.Array:  # [H, 1] -> [1, H]
        return jnp.sum(jnp.where(eye, column, 0.0), axis=0, keepdims=True)

    ridge = ridge_ref[0, pl.ds(start, SYSTEMS)]
    inverses, means, diagonals = [], [], []
    for n, head in enumerate(mine):
        omega = stats_ref[head, 1:2, 0:1]
        inverse = jnp.where(omega > 0, 1.0 / jnp.where(omega > 0, omega, 1.0), 0.0)
        mean = sums_ref[head, 0:1] * inverse
        key_mean = mean[:, :size]
        cov = moments_ref[head][:, :size] * inverse - column(key_mean) * key_mean
        system = cov + jnp.where(eye, ridge[n : n + 1], 0.0)
        system_ref[n] = system
        inverses.append(inverse)
        means.append(mean)
        if options.preconditioner == "jacobi":
            diagonals.append(jnp.sum(jnp.where(eye, system, 0.0), axis=0, keepdims=True))
    seen = jnp.concatenate([jnp.broadcast_to(inverse, (1, size)) for inverse in inverses], axis=0) > 0
    rhs = rhs_ref[0, pl.ds(start, SYSTEMS)] - jnp.concatenate([mean[:, :size] for mean in means], axis=0)
    rhs = jnp.where(seen, rhs, 0.0)
    scaling = 1.0 / jnp.concatenate(diagonals, axis=0) if diagonals else 1.0

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=1, keepdims=True)

    z = rhs * scaling
    rz = dot(rhs, z)
    goal = rz * options.rtol**2

    def unfinished(rz: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(rz > goal, 1.0, 0.0))

    def step(carry: Any) -> Any:
        count, _, x, r, p, rz = carry
        ap = jnp.concatenate(
            [line(jnp.sum(system_ref[n] * p[n : n + 1], axis=1, keepdims=True)) for n in range(SYSTEMS)], axis=0
        )
        curvature = dot(p, ap)
        active = (rz > goal) & (curvature > 0)
        alpha = jnp.where(active, rz / jnp.where(active, curvature, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * ap
        z = r * scaling
        new = jnp.where(active, dot(r, z), jnp.minimum(rz, goal))
        p = z + jnp.where(active, new / jnp.where(active, rz, 1.0), 0.0) * p
        return count + 1, unfinished(new), x, r, p, new

    carry = (jnp.int32(0), unfinished(rz), jnp.zeros_like(rhs), rhs, z, rz)
    _, _, x, *_ = lax.while_loop(lambda c: (c[0] < options.max_iters) & (c[1] > 0.5), step, carry)

    outs = []
    for n, head in enumerate(mine):
        slope = x[n : n + 1]
        slant = jnp.sum(moments_ref[head][:, size:width] * column(slope), axis=0, keepdims=True) * inverses[n]
        key_mean, value_mean = means[n][:, :size], means[n][:, size:width]
        outs.append(value_mean * (1.0 - dot(slope, key_mean)) + slant)
    out_ref[0, pl.ds(start, SYSTEMS)] = jnp.concatenate(outs, axis=0)


def refusal(q: Any, k: Any, v: Any, options: Options) -> str | None:
    """Why this kernel cannot take a call, or None."""
    dtype = jnp.dtype(k.dtype)
    if dtype.name not in ("bfloat16", "float32") or k.dtype != v.dtype:
        return f"key and value have dtypes {k.dtype} and {v.dtype}; this kernel reads bfloat16 or float32 caches"
    if options.solver != "cg":
        return f"solver is {options.solver!r}; this kernel knows 'cg' only"
    return None


def _lanes_first(x: jax.Array) -> jax.Array:
    """[B, S, K, H] -> [B, K, H, S], H rounded up to whole registers."""
    rows = 32 // x.dtype.itemsize
    x = jnp.moveaxis(x, 1, 3)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % rows), (0, 0)])


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    ridge: jax.Array,
    options: Options,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    block: int = BLOCK,
) -> tuple[jax.Array, DecodeState | None]:
    """Outputs [B, N, Hv] (float32) of one query per sequence against its cache; no state.

    Args:
        q: [B, N, H].
        k: [B, S, K, H].
        v: [B, S, K, Hv].
        length: used slots, [B] int32.
        scale: of the logits.
        ridge: [B, N].
        options: of the solver.
        interpret: run on the CPU, for tests.
        block: keys per grid step.
    """
    raise_refusal("pallas_tpu", refusal(q, k, v, options))
    keys, values = _lanes_first(k), _lanes_first(v)
    out = decode_lanes(q, keys, values, length, scale, ridge, options, interpret=interpret, block=block)
    return out[..., : v.shape[-1]], None


def decode_lanes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    ridge: jax.Array,
    options: Options,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    block: int = BLOCK,
) -> jax.Array:
    """`decode` for a cache [B, K, H, S] and [B, K, Hv, S], H and Hv multiples of 16 (bfloat16) or 8 (float32)."""
    heads = q.shape[1]
    pad = [(0, 0), (0, -heads % SYSTEMS), (0, k.shape[2] - q.shape[2])]
    rhs = jnp.pad(q.astype(jnp.float32), pad)
    ridge = jnp.pad(ridge.astype(jnp.float32), pad[:2], constant_values=1.0)
    ridge = jnp.broadcast_to(ridge[:, :, None], rhs.shape)
    out = _call(q, k, v, length, scale, options, interpret, block, rhs, ridge)
    return out[:, :heads]


def partial_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    block: int = BLOCK,
) -> DecodeState:
    """Moments of the first ``length`` [B] of S keys and values, as `decode.partial_state` gives them."""
    raise_refusal("pallas_tpu", refusal(q, k, v, Options()))
    head, value_head = q.shape[2], v.shape[3]
    keys, values = _lanes_first(k), _lanes_first(v)
    size = keys.shape[2]
    moments, sums, stats = _call(q, keys, values, length, scale, None, interpret, block)
    m = stats[:, :, 0, 0]
    return DecodeState(
        m=jnp.where(m <= MASKED / 2, -jnp.inf, m),
        weight=stats[:, :, 1, 0],
        k_sum=sums[:, :, 0, :head],
        v_sum=sums[:, :, 0, size : size + value_head],
        kk=moments[:, :, :head, :head],
        vk=moments[:, :, :head, size : size + value_head].swapaxes(2, 3),
    )


def sizes_of(slots: int, rows: int, block: int = BLOCK) -> tuple[int, int, int]:
    """Keys of a grid step, of a product, and of one at the end of the used slots, for ``rows`` of weighted keys.

    >>> sizes_of(32768, 128), sizes_of(32768, 4 * 128), sizes_of(1100, 128), sizes_of(300, 128)
    ((8192, 4096, 512), (8192, 1024, 512), (1536, 1536, 512), (384, 384, 384))
    """
    edge = min(EDGE, -(-slots // LANES) * LANES, block)
    block = min(block, -(-slots // edge) * edge)
    part = min(max(edge, min(PART, WORK // rows) // edge * edge), block)
    return -(-block // part) * part, part, edge


def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    scale: jax.Array,
    options: Options | None,
    interpret: bool | pltpu.InterpretParams,
    block: int,
    *finishing: jax.Array,
) -> Any:
    """Runs the kernel on a cache whose keys lie along lanes."""
    batch, heads, head = q.shape
    key_heads, size, slots = k.shape[1:]
    value_size = v.shape[2]
    group, width = heads // key_heads, size + value_size
    precision = precision_of(k.dtype)
    block, part, edge = sizes_of(slots, group * size * precision.given, block)
    rows = -(-group // 8) * 8
    f32 = jnp.float32
    queries = q.astype(f32).reshape(batch, key_heads, group, head)
    queries = jnp.pad(queries, [(0, 0), (0, 0), (0, rows - group), (0, size - head)])
    query_pieces = 1 if q.dtype == jnp.bfloat16 else precision.order

    scale = jnp.broadcast_to(scale, (batch,)).astype(f32)
    arrays = (length.astype(jnp.int32), scale, queries, k, v, *finishing)

    def cache(size: int) -> pl.BlockSpec:
        def index(b: Any, h: Any, j: Any, length: Any, scale: Any) -> tuple[Any, ...]:
            # Blocks behind the used slots are not fetched: the index stays at the last one that is used.
            last = jnp.maximum(lax.div(length[b] + block - 1, block) - 1, 0)
            return b, h, 0, jnp.minimum(j, last)

        return pl.BlockSpec((1, 1, size, block), index)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, h, j, *_: (b, *[0] * len(shape)))

    in_specs = [pl.BlockSpec((1, 1, rows, size), lambda b, h, j, *_: (b, h, 0, 0)), cache(size), cache(value_size)]
    shapes = [(size, width), (8, width), (8, LANES)]
    if options is None:
        out_specs: Any = [pl.BlockSpec((1, group, *shape), lambda b, h, j, *_: (b, h, 0, 0)) for shape in shapes]
        out_shape: Any = [kernel_output(arrays, (batch, heads, *shape), f32) for shape in shapes]
        scratch = []
    else:
        padded = finishing[0].shape[1]
        in_specs += [whole(padded, size)] * 2
        out_specs = whole(padded, value_size)
        out_shape = kernel_output(arrays, (batch, padded, value_size), f32)
        scratch = [pltpu.VMEM((heads, *shape), f32) for shape in shapes] + [pltpu.VMEM((SYSTEMS, size, size), f32)]
    scratch += [
        pltpu.VMEM((group if group <= ON_VECTOR_UNIT else 1, size, LANES), f32),
        pltpu.VMEM((block // edge, rows, edge), f32),
        pltpu.VMEM((rows, LANES), f32),
        pltpu.VMEM((rows, LANES), f32),
    ]
    return pl.pallas_call(
        functools.partial(
            _kernel,
            group=group,
            heads=heads,
            block=block,
            part=part,
            edge=edge,
            precision=precision,
            query_pieces=query_pieces,
            options=options,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, key_heads, -(-slots // block)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=int(tpu_rows.vmem_capacity() * 0.95),
        ),
        interpret=interpret,
        name="lla_decode" if options is not None else "lla_moments",
    )(*arrays)
