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
ROWS, COLUMNS = 512, 1024
FEW_ROWS = 64
TERMS = 2048


def blocks_of(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Rows, terms and columns of a block."""
    rows = min(m, ROWS)
    most = 2 * TERMS if rows <= FEW_ROWS else TERMS
    # As many as leave little of the last block empty; no array is filled up.
    sizes = [most, most // 2, most // 4]
    terms = k if k <= most else min(sizes, key=lambda t: (-(-k // t) * t > 1.05 * k, -t))
    return rows, terms, min(n, COLUMNS)


def refusal(x: Any, w: Any) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    del x, w
    return None


def _body(*refs: Any, steps: int, terms: int, **modes: Any) -> None:
    x_ref, w_ref, *bias_ref, out_ref, sums_ref = refs
    step = pl.program_id(2)

    last = terms - (steps - 1) * x_ref.shape[1]  # of the last block; what lies beyond is not read

    def part(count: int) -> Array:
        return jax.lax.dot_general(
            x_ref[:, :count], w_ref[:count], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )

    if steps == 1:
        out_ref[...] = finish(part(last), bias_ref[0][...] if bias_ref else None, **modes)
        return

    @pl.when(step == 0)
    def _() -> None:
        sums_ref[...] = jnp.broadcast_to(bias_ref[0][...] if bias_ref else 0, sums_ref.shape)

    @pl.when(step < steps - 1)
    def _() -> None:
        sums_ref[...] += part(x_ref.shape[1])

    @pl.when(step == steps - 1)
    def _() -> None:
        out_ref[...] = finish(sums_ref[...] + part(last), None, **modes)


def matmul(
    x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    *, interpret: Any = False,
) -> Array:  # fmt: skip
    """int8 [M, N]; see `refusal` for what it takes."""
    (m, k), n = x.shape, w.shape[1]
    rows, terms, columns = blocks_of(m, k, n)
    steps = pl.cdiv(k, terms)
    operands = [x, w]
    specs = [
        pl.BlockSpec((rows, terms), lambda i, j, s: (i, s)),
        pl.BlockSpec((terms, columns), lambda i, j, s: (s, j)),
    ]
    if bias is not None:
        operands.append(bias[None])
        specs.append(pl.BlockSpec((1, columns), lambda i, j, s: (0, j)))
    y: Array = pl.pallas_call(
        functools.partial(_body, steps=steps, terms=k, shift=shift, rounding=rounding, overflow=overflow, word=word),
        grid=(pl.cdiv(m, rows), pl.cdiv(n, columns), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, s: (i, j)),
        out_shape=kernel_output(operands, (m, n), jnp.int8),
        scratch_shapes=[pltpu.VMEM((rows, columns) if steps > 1 else (8, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="fixed_point_matmul",
    )(*operands)
    return y
