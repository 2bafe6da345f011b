"""Without Pallas: the vocabulary in parts, each part's logits reduced while they are in the cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.arrays import varying_zeros
from kernels_pallas.lm_head_confidence.online import Stats, answer, start, update

PART = 4096
"""Tokens of a part: logits of a few dozen rows then fit a core's cache."""
WHOLE = 2**21
"""So many logits, 8 MiB, are not worth a loop: a part of the matrix is copied before it is multiplied."""


def confidence(
    hidden: Float[Array, "R D"], weight: Float[Array, "V D"], forbid: int, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Tokens and confidences of all rows."""
    del interpret
    size, width = weight.shape
    part = size if hidden.shape[0] * size <= WHOLE else min(PART, size)
    # Products of 16-bit numbers are exact in float32. CPUs have no fast product of them: the part is widened there.
    narrow = jax.default_backend() != "cpu" and hidden.dtype == weight.dtype
    rows = hidden if narrow else hidden.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None

    def body(turn: Array, stats: Stats) -> Stats:
        # The last part overlaps the one before; what was seen is seen again and must not count twice.
        begin = jnp.minimum(turn * part, size - part)
        slab = jax.lax.dynamic_slice(weight, (begin, 0), (part, width))
        slab = slab if narrow else slab.astype(jnp.float32)
        logits = jax.lax.dot_general(
            rows, slab, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        column = begin + jnp.arange(part, dtype=jnp.int32)[None]
        return update(stats, logits, jnp.where(column < turn * part, size, column), forbid, size)

    zeros = varying_zeros((hidden, weight), (hidden.shape[0], 1), jnp.float32)
    first = jax.tree.map(lambda x: x + zeros.astype(x.dtype), start(zeros.shape, jnp.dtype(jnp.int32), forbid))
    stats = jax.lax.fori_loop(0, -(-size // part), body, first)
    token, found = answer(stats)
    return token[:, 0], found[:, 0]
