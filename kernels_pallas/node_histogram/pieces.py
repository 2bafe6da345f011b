"""What both kernels share: sums by products with rows of zeros and ones.

    H[f] = A·Eᵀ,   A[(k, j), i] = stats[i, k]·[node_i = j],   E[b, i] = [bins[f, i] = b]

Zeros and ones are exact in bfloat16, and a float32 number is the sum of three bfloat16 pieces: three passes of a matrix
unit that multiplies bfloat16 numbers and sums in float32 give float32 sums. A matrix unit does the N·B products of a
row and statistic that a scatter does not do, in less time than the scatter's one addition, as long as N·B is small.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PIECES = 3


def split(stats: Array) -> Array:
    """float32 [n, K] -> bfloat16 [3·K, n], pieces of all statistics one after the other, smallest last.

    ``reduce_precision``, as XLA may drop a pair of casts.
    """
    rest, parts = stats.T.astype(jnp.float32), []
    for _ in range(PIECES):
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.concatenate(parts)


def up_to(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def pad_rows(bins: Array, node: Array, stats: Array, multiple: int) -> tuple[Array, Array, Array]:
    """Rows filled up with ones that are in no node; bins and nodes as int32."""
    extra = -bins.shape[1] % multiple
    return (
        jnp.pad(bins.astype(jnp.int32), ((0, 0), (0, extra))),
        jnp.pad(node.astype(jnp.int32), (0, extra), constant_values=-1),
        jnp.pad(stats, ((0, extra), (0, 0))),
    )


def refusal(stats: Any, n_nodes: int, most: int) -> str | None:
    """Why a kernel cannot take a call, or ``None``."""
    if stats.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"stats has dtype {stats.dtype}, expected float32, bfloat16 or float16"
    if n_nodes * stats.shape[1] > most:
        return (
            f"there are {n_nodes} nodes of {stats.shape[1]} statistics, expected at most {most} of both together: "
            "products with zeros and ones would take longer than a scatter"
        )
    return None
