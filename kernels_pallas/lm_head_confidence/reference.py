"""The two numbers from all logits, naively."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.arrays import accumulator


def naive(hidden: Float[Array, "R D"], weight: Float[Array, "V D"], forbid: int = -1) -> tuple[Array, Array]:
    """Argmax without ``forbid`` (none if negative) and its probability under the softmax of all."""
    dtype = accumulator(hidden.dtype)
    logits = jnp.matmul(hidden.astype(dtype), weight.astype(dtype).T, precision="highest")
    allowed = jnp.where(jnp.arange(weight.shape[0]) == forbid, -jnp.inf, logits)
    token = jnp.argmax(allowed, -1).astype(jnp.int32)
    return token, jnp.take_along_axis(jax.nn.softmax(logits), token[:, None], -1)[:, 0].astype(jnp.float32)
