"""Pallas kernel for GPUs (Triton): int8 on tensor cores, sums in registers, one byte for each result."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import kernel_output
from kernels_pallas.fixed_point_matmul.epilogue import finish

LEAST = 16  # rows of a product on tensor cores
FEW_ROWS = 32
PROGRAMS = 132  # one for each multiprocessor of an H100


def blocks_of(m: int, n: int) -> tuple[int, int, int]:
    """Rows, terms and columns of a program."""
    if m <= FEW_ROWS:
        return max(LEAST, int(pl.next_power_of_2(m))), 128, 32 if n <= 64 * PROGRAMS else 64
    return (128 if m > 64 else 64), 128, 128 if n > 64 else 64


def refusal(x: Any, w: Any) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    del x, w
    return None


def _body(*refs: Any, block: tuple[int, int, int], **modes: Any) -> None:
    x_ref, w_ref, *bias_ref, out_ref = refs
    rows, terms, columns = block
    at = pl.ds(pl.program_id(1) * rows, rows)
    across = pl.ds(pl.program_id(0) * columns, columns)

    def turn(index: Array, total: Array) -> Array:
        along = pl.ds(index * terms, terms)
        return total + jax.lax.dot_general(
            x_ref[at, along], w_ref[along, across], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )

    total = jax.lax.fori_loop(0, w_ref.shape[0] // terms, turn, jnp.zeros((rows, columns), jnp.int32))
    out_ref[at, across] = finish(total, bias_ref[0][across][None] if bias_ref else None, **modes)


def matmul(
    x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    *, interpret: Any = False,
) -> Array:  # fmt: skip
    """int8 [M, N]; see `refusal` for what it takes. Sizes that blocks do not divide are filled with zeros."""
    (m, k), n = x.shape, w.shape[1]
    block = rows, terms, columns = blocks_of(m, n)
    x = jnp.pad(x, ((0, -m % rows), (0, -k % terms)))
    w = jnp.pad(w, ((0, -k % terms), (0, -n % columns)))
    operands = [x, w] if bias is None else [x, w, jnp.pad(bias, (0, -n % columns))]
    few = m <= FEW_ROWS
    out = pl.pallas_call(
        functools.partial(_body, block=block, shift=shift, rounding=rounding, overflow=overflow, word=word),
        grid=(w.shape[1] // columns, x.shape[0] // rows),
        out_shape=kernel_output(operands, (x.shape[0], w.shape[1]), jnp.int8),
        compiler_params=plt.CompilerParams(num_warps=4 if few else 8, num_stages=4 if few else 3),
        interpret=interpret,
        name="fixed_point_matmul",
    )(*operands)
    return out[:m, :n]
