"""Pallas kernel for TPUs: tiles of the output matrix stream through VMEM, statistics stay there.

A grid step takes one tile of the vocabulary for all rows, which are few: the time is that of reading the matrix once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.arrays import kernel_output
from kernels_pallas.lm_head_confidence.online import Stats, answer, start, update

LANES = 128
TILE_BYTES = 2 * 2**20  # of the matrix; two are in flight
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel may use by default on the smallest chip


def tile_columns(width: int, item: int) -> int:
    """Tokens of a tile: a multiple of the lanes."""
    return max(LANES, TILE_BYTES // (width * item) // LANES * LANES)


def _rows(rows: int, item: int) -> int:
    sublanes = 32 // item
    return -(-rows // sublanes) * sublanes


def refusal(hidden: Any, weight: Any) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    if hidden.dtype != weight.dtype or hidden.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtypes are {hidden.dtype} and {weight.dtype}, expected both float32 or both bfloat16"
    size, width = weight.shape
    if size >= 2**24:
        return f"the vocabulary has {size} tokens, expected less than 2**24: places are worked in float32"
    item = weight.dtype.itemsize
    rows = _rows(max(1, hidden.size // width), item)
    tile = tile_columns(width, item)
    needed = 2 * tile * width * item + 2 * rows * width * item + 4 * rows * (3 * tile + 4 * LANES)
    if needed > VMEM_BYTES:
        return f"{rows} rows of {width} need {needed} bytes of VMEM, expected at most {VMEM_BYTES}: pass fewer rows"
    return None


def _body(
    h_ref: Any, w_ref: Any, top_ref: Any, total_ref: Any, best_ref: Any, place_ref: Any, *, forbid: int, size: int
) -> None:
    turn = pl.program_id(0)
    refs = (top_ref, total_ref, best_ref, place_ref)
    rows, tile = h_ref.shape[0], w_ref.shape[0]

    @pl.when(turn == 0)
    def _() -> None:
        for ref, value in zip(refs, start((rows, 1), jnp.dtype(jnp.float32), forbid), strict=True):
            ref[...] = value

    precision = jax.lax.Precision.HIGHEST if h_ref.dtype == jnp.float32 else None
    logits = jax.lax.dot_general(
        h_ref[...], w_ref[...], (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    column = turn * tile + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
    stats = update(Stats(*(ref[...] for ref in refs)), logits, column.astype(jnp.float32), forbid, size)
    for ref, value in zip(refs, stats, strict=True):
        ref[...] = value


def confidence(
    hidden: Float[Array, "R D"], weight: Float[Array, "V D"], forbid: int, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Tokens and confidences of all rows; see `refusal` for what it takes."""
    count, width = hidden.shape
    size, item = weight.shape[0], weight.dtype.itemsize
    rows, tile = _rows(count, item), min(tile_columns(width, item), -(-size // LANES) * LANES)
    padded = jnp.pad(hidden, ((0, rows - count), (0, 0)))
    # Outputs whose block does not move stay in VMEM until the last step: they are the running statistics.
    outputs = [kernel_output([hidden, weight], (rows, 1), jnp.float32) for _ in Stats._fields]
    stats = pl.pallas_call(
        functools.partial(_body, forbid=forbid, size=size),
        grid=(-(-size // tile),),
        in_specs=[pl.BlockSpec((rows, width), lambda i: (0, 0)), pl.BlockSpec((tile, width), lambda i: (i, 0))],
        out_specs=[pl.BlockSpec((rows, 1), lambda i: (0, 0)) for _ in outputs],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="lm_head_confidence",
    )(padded, weight)
    token, found = answer(Stats(*stats))
    return token[:count, 0], found[:count, 0]
