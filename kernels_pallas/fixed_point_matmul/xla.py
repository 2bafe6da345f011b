"""Without Pallas: XLA's product of integers, then the epilogue.

XLA on CPU has fast loops for float32 only. There a product of more than a few rows is made of float32 products of up to
1024 terms, whose sums, at most 2^24 steps, are exact; the partial sums are added in int32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.fixed_point_matmul.epilogue import finish

EXACT_TERMS = 1024
"""So many products of int8 add up to at most 2^24, up to which float32 holds every integer."""


def int_dot(x: Array, w: Array) -> Array:
    """Exact int32 ``x @ w`` by XLA's own product of int8."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def float_dot(x: Array, w: Array) -> Array:
    """Exact int32 ``x @ w`` by products of float32."""
    total = jnp.zeros((x.shape[0], w.shape[1]), jnp.int32)
    for start in range(0, x.shape[1], EXACT_TERMS):
        at = slice(start, start + EXACT_TERMS)
        part = jax.lax.dot_general(
            x[:, at].astype(jnp.float32), w[at].astype(jnp.float32), (((1,), (0,)), ((), ())), jax.lax.Precision.HIGHEST
        )
        total = total + part.astype(jnp.int32)
    return total


def matmul(
    x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    *, interpret: Any = False,
) -> Array:  # fmt: skip
    """See the module of the op."""
    del interpret
    total = jax.lax.platform_dependent(x, w, cpu=float_dot, default=int_dot)
    return finish(total, bias, shift, rounding, overflow, word)
