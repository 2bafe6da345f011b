"""Pallas kernel for GPUs (Triton): programs share the vocabulary, and their statistics are merged.

A few dozen rows do not fill a GPU, a vocabulary does: each program takes a run of tokens for a block of rows, and keeps
maximum, sum and argmax of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.arrays import kernel_output
from kernels_pallas.lm_head_confidence.online import Stats, answer, merge, start, update

TILE = 128  # tokens of a product
DEPTH = 64  # of the width at a time, at most
ROWS = 64  # of a program, at most
MIN_ROWS = 16  # of a product on tensor cores
PROGRAMS = 528  # four for each multiprocessor of an H100


def _depth(width: int) -> int:
    return min(DEPTH, width & -width)


def refusal(hidden: Any, weight: Any) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    if hidden.dtype != weight.dtype or hidden.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtypes are {hidden.dtype} and {weight.dtype}, expected both float32, both bfloat16 or both float16"
    if _depth(weight.shape[1]) < 16:
        return f"weight has width {weight.shape[1]}, expected a multiple of 16"
    return None


def _body(h_ref: Any, w_ref: Any, *refs: Any, forbid: int, size: int, rows: int, tiles: int, depth: int) -> None:
    block, part = pl.program_id(0), pl.program_id(1)
    here = pl.ds(block * rows, rows)
    width = w_ref.shape[1]
    precision = jax.lax.Precision.HIGHEST if h_ref.dtype == jnp.float32 else None

    def turn(index: Array, stats: Stats) -> Stats:
        column = (part * tiles + index) * TILE + jnp.arange(TILE)
        token = jnp.minimum(column, size - 1)  # rows after the last are read again, and not counted

        def product(step: Array, logits: Array) -> Array:
            at = pl.ds(step * depth, depth)
            return logits + jax.lax.dot_general(
                h_ref[here, at], w_ref[token, at], (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip

        logits = jax.lax.fori_loop(0, width // depth, product, jnp.zeros((rows, TILE), jnp.float32))
        return update(stats, logits, column[None], forbid, size)

    stats = jax.lax.fori_loop(0, tiles, turn, start((rows, 1), jnp.dtype(jnp.int32), forbid))
    for ref, value in zip(refs, stats, strict=True):
        ref[here, pl.ds(part, 1)] = value


def confidence(
    hidden: Float[Array, "R D"], weight: Float[Array, "V D"], forbid: int, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Tokens and confidences of all rows; see `refusal` for what it takes."""
    count, width = hidden.shape
    size = weight.shape[0]
    rows = min(ROWS, max(MIN_ROWS, pl.next_power_of_2(count)))
    blocks = -(-count // rows)
    total_tiles = -(-size // TILE)
    parts = min(total_tiles, max(1, PROGRAMS // blocks))
    tiles = -(-total_tiles // parts)
    parts = -(-total_tiles // tiles)
    padded = jnp.pad(hidden, ((0, blocks * rows - count), (0, 0)))
    shape = functools.partial(kernel_output, [hidden, weight], (blocks * rows, parts))
    stats = pl.pallas_call(
        functools.partial(_body, forbid=forbid, size=size, rows=rows, tiles=tiles, depth=_depth(width)),
        grid=(blocks, parts),
        out_shape=(*(shape(dtype=jnp.float32) for _ in range(3)), shape(dtype=jnp.int32)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="lm_head_confidence",
    )(padded, weight)
    token, found = answer(merge(Stats(*stats), 1))
    return token[:count], found[:count]
