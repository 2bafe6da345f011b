"""Pallas kernels for TPUs: one pass over the activations, rows whole in VMEM.

A grid step takes a run of tokens of one sample: it reads x and the pending branches once, and writes x′ and h once.
Gates, shift and scale of a sample are one small block that stays while its tokens pass. In the backward pass the
gradients of that block are summed in VMEM over the tokens of a sample.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.modulated_residual.problem import dtype_refusal, normed, pull

LANES = 128
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel may use by default on the smallest chip
MOST_BRANCHES = 16
CHUNK = 18432  # elements worked at a time: intermediate results of more do not stay in registers
CHUNKS = 4  # of a step: enough that reading hides what a step costs


def _sublanes(dtype: Any) -> int:
    return 32 // jnp.dtype(dtype).itemsize


def _token_bytes(width: int, item: int, branches: int, *, backward: bool) -> int:
    """Bytes of VMEM for a token: blocks twice buffered, and rows in float32."""
    lanes = -(-width // LANES) * LANES
    blocks = 3 + branches + (branches + 1 if backward else 0)
    return lanes * (2 * blocks * item + 4 * 6)


def _tokens(x: Shaped, branches: int, *, backward: bool) -> int:
    """Tokens of a step: all of a sample, or a multiple of a tile's rows; 0 if not even that fits."""
    least = _sublanes(x.dtype)
    mods = 16 * (branches + 2) * -(-x.shape[2] // LANES) * LANES * 4
    fit = (VMEM_BYTES - mods) // _token_bytes(x.shape[2], x.dtype.itemsize, branches, backward=backward)
    most = min(fit, CHUNKS * _chunk(x.shape[2], x.dtype))
    if x.shape[1] <= most:
        return x.shape[1]
    # A divisor of the tokens if there is one that is not small: no step then reaches past the end.
    steps = range(most // least * least, 0, -least)
    return next((t for t in steps if x.shape[1] % t == 0 and 2 * t >= steps[0]), max(steps, default=0))


def refusal(x: Shaped, branches: Sequence[Shaped], gates: Sequence[Shaped], shift: Shaped, scale: Shaped) -> str | None:
    """Why the kernels cannot take a call, or ``None``."""
    if reason := dtype_refusal((x, *branches), (jnp.float32, jnp.bfloat16)):
        return reason
    if reason := dtype_refusal((*gates, shift, scale), (jnp.float32, jnp.bfloat16)):
        return reason
    if len(branches) > MOST_BRANCHES:
        return f"there are {len(branches)} branches, expected at most {MOST_BRANCHES}"
    if _tokens(x, len(branches), backward=True) < 1:
        return f"rows of {x.shape[2]} with {len(branches)} branches do not fit in {VMEM_BYTES} bytes of VMEM"
    return None


def _chunk(width: int, dtype: Any) -> int:
    """Tokens worked at a time."""
    return max(8, CHUNK // width // _sublanes(dtype) * _sublanes(dtype))


def _chunks(tokens: int, chunk: int, body: Callable[[int, int], None]) -> None:
    """``body(start, size)`` for all tokens of a block, written out: the compiler overlaps one with the next."""
    for start in range(0, tokens, chunk):
        body(start, min(chunk, tokens - start))


def _stream(x_ref: Any, branch_refs: Sequence[Any], mods_ref: Any, rows: Any, dtype: Any) -> Array:
    """x′ of some rows, rounded."""
    total = x_ref[0, rows].astype(jnp.float32)
    for k, ref in enumerate(branch_refs):
        total = total + mods_ref[0, k : k + 1] * ref[0, rows].astype(jnp.float32)
    return total.astype(dtype)


def _modulated(new: Array, mods_ref: Any, branches: int, eps: float) -> Array:
    unit, _ = normed(new.astype(jnp.float32), new.shape[-1], eps)
    return unit * (1 + mods_ref[0, branches + 1 :]) + mods_ref[0, branches : branches + 1]


def _body(mods_ref: Any, x_ref: Any, *refs: Any, branches: int, eps: float) -> None:
    new_ref, h_ref = refs[branches:]

    def rows_of(start: int, size: int) -> None:
        rows = pl.ds(start, size)
        new = _stream(x_ref, refs[:branches], mods_ref, rows, new_ref.dtype)
        new_ref[0, rows] = new
        h_ref[0, rows] = _modulated(new, mods_ref, branches, eps).astype(h_ref.dtype)

    _chunks(x_ref.shape[1], _chunk(x_ref.shape[2], x_ref.dtype), rows_of)


def _rows_body(
    order_ref: Any, count_ref: Any, mods_ref: Any, x_ref: Any, *refs: Any, branches: int, eps: float, limit: int
) -> None:
    del order_ref
    new_ref = refs[branches]
    computes = pl.program_id(0) < jnp.minimum(count_ref[0], limit)

    @pl.when(computes)
    def _() -> None:
        _body(mods_ref, x_ref, *refs, branches=branches, eps=eps)

    @pl.when(jnp.logical_not(computes))
    def _() -> None:
        def rows_of(start: int, size: int) -> None:
            rows = pl.ds(start, size)
            new_ref[0, rows] = _stream(x_ref, refs[:branches], mods_ref, rows, new_ref.dtype)

        _chunks(x_ref.shape[1], _chunk(x_ref.shape[2], x_ref.dtype), rows_of)


def _modulations(gates: Sequence[Array], shift: Array, scale: Array) -> Array:
    """[B, K + 2, D] float32: gates, shift, scale."""
    return jnp.stack([*gates, shift, scale], 1).astype(jnp.float32)


def forward(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """x′ and h; see `refusal` for what it takes."""
    samples, length, width = x.shape
    mods = _modulations(gates, shift, scale)
    tokens = _tokens(x, len(branches), backward=False)
    block = pl.BlockSpec((1, tokens, width), lambda b, t: (b, t, 0))
    out = kernel_output([x, *branches, mods], x.shape, x.dtype)
    new, h = pl.pallas_call(
        functools.partial(_body, branches=len(branches), eps=eps),
        grid=(samples, -(-length // tokens)),
        in_specs=[pl.BlockSpec((1, *mods.shape[1:]), lambda b, t: (b, 0, 0)), *[block] * (1 + len(branches))],
        out_specs=[block, block],
        out_shape=[out, out],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="modulated_residual",
    )(mods, x, *branches)
    return new, h


def forward_rows(
    x: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    eps: float,
    order: Array,
    count: Array,
    limit: int,
    *,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """x′ of all samples and h of those that compute, which come first in ``order``.

    The others name the last block of h again, so that nothing is copied for them.
    """
    samples, length, width = x.shape
    mods = _modulations(gates, shift, scale)
    tokens = _tokens(x, len(branches), backward=False)
    tiles = -(-length // tokens)

    def sample(g: Any, t: Any, order: Any, count: Any) -> tuple[Any, Any, int]:
        return order[g], t, 0

    def place(g: Any, t: Any, order: Any, count: Any) -> tuple[Any, Any, int]:
        last = jnp.maximum(jnp.minimum(count[0], limit) - 1, 0)
        return jnp.minimum(g, last), jnp.where(g > last, tiles - 1, t), 0

    block = pl.BlockSpec((1, tokens, width), sample)
    like = functools.partial(kernel_output, [x, *branches, mods, order, count])
    new, h = pl.pallas_call(
        functools.partial(_rows_body, branches=len(branches), eps=eps, limit=limit),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(samples, tiles),
            in_specs=[
                pl.BlockSpec((1, *mods.shape[1:]), lambda g, t, order, count: (order[g], 0, 0)),
                *[block] * (1 + len(branches)),
            ],
            out_specs=[block, pl.BlockSpec((1, tokens, width), place)],
        ),
        out_shape=[like(x.shape, x.dtype), like((limit, length, width), x.dtype)],
        # In order: a block of h must not be named by two cores at once.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="modulated_residual_rows",
    )(order, count[None], mods, x, *branches)
    return new, h


def _backward_body(
    mods_ref: Any, new_ref: Any, into_new_ref: Any, into_h_ref: Any, *refs: Any, branches: int, eps: float, length: int
) -> None:
    branch_refs, x_ref, into_refs, mods_out = refs[:branches], refs[branches], refs[branches + 1 : -1], refs[-1]
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _() -> None:
        mods_out[...] = jnp.zeros_like(mods_out)

    tokens, width = new_ref.shape[1:]

    def rows_of(start: int, size: int) -> None:
        rows = pl.ds(start, size)
        # The last block may reach past the last token, where there is anything at all.
        row = tile * tokens + start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)

        def read(ref: Any) -> Array:
            value = ref[0, rows].astype(jnp.float32)
            return value if length % tokens == 0 else jnp.where(row < length, value, 0)

        into_h = read(into_h_ref)
        unit, inverse = normed(read(new_ref), width, eps)
        mods_out[0, branches : branches + 1] += jnp.sum(into_h, 0, keepdims=True)
        mods_out[0, branches + 1 :] += jnp.sum(into_h * unit, 0, keepdims=True)
        slope = pull(unit, inverse, mods_ref[0, branches + 1 :], read(into_new_ref), into_h, width)
        x_ref[0, rows] = slope.astype(x_ref.dtype)
        for k, (ref, out_ref) in enumerate(zip(branch_refs, into_refs, strict=True)):
            out_ref[0, rows] = (mods_ref[0, k : k + 1] * slope).astype(out_ref.dtype)
            mods_out[0, k : k + 1] += jnp.sum(slope * read(ref), 0, keepdims=True)

    _chunks(tokens, _chunk(width, new_ref.dtype), rows_of)


def backward(
    new: Array,
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Array,
    scale: Array,
    into_new: Array,
    into_h: Array,
    eps: float,
    *,
    interpret: Any = False,
) -> tuple[Array, list[Array], Array]:
    """Gradients of x, of the branches, and of gates, shift and scale [B, K + 2, D] float32; ``new`` is x′."""
    samples, length, width = new.shape
    mods = _modulations(gates, shift, scale)
    tokens = _tokens(new, len(branches), backward=True)
    block = pl.BlockSpec((1, tokens, width), lambda b, t: (b, t, 0))
    small = pl.BlockSpec((1, *mods.shape[1:]), lambda b, t: (b, 0, 0))
    like = functools.partial(kernel_output, [new, *branches, mods, into_new, into_h])
    into_x, *into_branches, into_mods = pl.pallas_call(
        functools.partial(_backward_body, branches=len(branches), eps=eps, length=length),
        grid=(samples, -(-length // tokens)),
        in_specs=[small, *[block] * (3 + len(branches))],
        out_specs=[*[block] * (1 + len(branches)), small],
        out_shape=[*[like(new.shape, new.dtype)] * (1 + len(branches)), like(mods.shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="modulated_residual_backward",
    )(mods, new, into_new, into_h, *branches)
    return into_x, into_branches, into_mods
