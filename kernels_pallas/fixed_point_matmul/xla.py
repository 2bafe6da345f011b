"""Without Pallas: XLA's product of integers, then the epilogue, which it fuses where it can.

XLA on CPU has fast loops for int8, but not for one row: that is multiplied as two, four times as fast. On GPUs one row
is no product of the library's but a slower loop of XLA's own: it is multiplied as eight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.fixed_point_matmul.epilogue import finish


def int_dot(x: Array, w: Array) -> Array:
    """Exact int32 ``x @ w`` by XLA's own product of int8."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def no_fewer(x: Array, w: Array, rows: int) -> Array:
    """The product of one row as that of several, of which the others are zero."""
    return int_dot(jnp.pad(x, ((0, rows - 1), (0, 0))), w)[:1] if x.shape[0] == 1 else int_dot(x, w)


def matmul(
    x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    *, interpret: Any = False,
) -> Array:  # fmt: skip
    """See the module of the op."""
    del interpret
    few = {"cpu": functools.partial(no_fewer, rows=2), "cuda": functools.partial(no_fewer, rows=8)}
    total = jax.lax.platform_dependent(x, w, **few, default=int_dot)
    return finish(total, bias, shift, rounding, overflow, word)
