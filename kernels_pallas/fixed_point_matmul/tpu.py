"""Pallas kernel for TPUs: blocks of int8 on the matrix unit, sums in VMEM, one byte for each result.

The grid goes over rows, columns and, innermost, terms. Few rows (decoding) get wide blocks of the matrix, so that the
time is that of reading it once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import kernel_output
from kernels_pallas.fixed_point_matmul.epilogue import finish

LANES = 128
SUBLANES = 32  # of int8
ROWS, COLUMNS = 512, 1024
FEW_ROWS = 64
TERMS = (2048, 1024, 512, 256)  # of a block: the first that divides their number


def up_to(size: int, step: int) -> int:
    """``size``, rounded up."""
    return -(-size // step) * step


def blocks_of(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Rows, terms and columns of a block."""
    rows = min(up_to(m, SUBLANES), ROWS)
    columns = min(up_to(n, LANES), COLUMNS)
    if k <= TERMS[0]:
        return rows, up_to(k, LANES), columns
    least = up_to(k, TERMS[-1])  # what is missing is filled with zeros
    choice = (2 * TERMS[0], *TERMS) if rows <= FEW_ROWS else TERMS[1:]
    return rows, next(t for t in choice if least % t == 0), columns


def refusal(x: Any, w: Any) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    del x, w
    return None


def _body(*refs: Any, steps: int, **modes: Any) -> None:
    x_ref, w_ref, *bias_ref, out_ref, sums_ref = refs
    step = pl.program_id(2)

    part = jax.lax.dot_general(x_ref[...], w_ref[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    def write(total: Array) -> None:
        out_ref[...] = finish(total, bias_ref[0][...] if bias_ref else None, **modes)

    if steps == 1:
        write(part)
        return

    @pl.when(step == 0)
    def _() -> None:
        sums_ref[...] = part

    @pl.when((step > 0) & (step < steps - 1))
    def _() -> None:
        sums_ref[...] += part

    @pl.when(step == steps - 1)
    def _() -> None:
        write(sums_ref[...] + part)


def matmul(
    x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    *, interpret: Any = False,
) -> Array:  # fmt: skip
    """int8 [M, N]; see `refusal` for what it takes."""
    (m, k), n = x.shape, w.shape[1]
    rows, terms, columns = blocks_of(m, k, n)
    short = -k % terms
    x = jnp.pad(x, ((0, rows - m if m < rows else 0), (0, short)))
    w = jnp.pad(w, ((0, short), (0, columns - n if n < columns else 0)))
    steps = w.shape[0] // terms
    operands = [x, w]
    specs = [
        pl.BlockSpec((rows, terms), lambda i, j, s: (i, s)),
        pl.BlockSpec((terms, columns), lambda i, j, s: (s, j)),
    ]
    if bias is not None:
        operands.append(jnp.pad(bias, (0, w.shape[1] - n))[None])
        specs.append(pl.BlockSpec((1, columns), lambda i, j, s: (0, j)))
    out = pl.pallas_call(
        functools.partial(_body, steps=steps, shift=shift, rounding=rounding, overflow=overflow, word=word),
        grid=(pl.cdiv(x.shape[0], rows), pl.cdiv(w.shape[1], columns), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, s: (i, j)),
        out_shape=kernel_output(operands, (x.shape[0], w.shape[1]), jnp.int8),
        scratch_shapes=[pltpu.VMEM((rows, columns) if steps > 1 else (8, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="fixed_point_matmul",
    )(*operands)
    return out[:m, :n]
