"""The equation, as it is written: what every implementation is tested against."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.arrays import accumulator


def stream(x: Float[Array, "B N D"], branches: Sequence[Array], gates: Sequence[Array]) -> Float[Array, "B N D"]:
    """x′ = x + Σ_k g_k·C_k, summed in float32 at least, then rounded."""
    wide = accumulator(x.dtype)
    total = x.astype(wide)
    for branch, gate in zip(branches, gates, strict=True):
        total = total + gate.astype(wide)[:, None] * branch.astype(wide)
    return total.astype(x.dtype)


def modulate(
    new: Float[Array, "B N D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"], eps: float = 1e-6
) -> Float[Array, "B N D"]:
    """LN(x′)·(1 + scale) + shift, without learned weights in the norm."""
    wide = accumulator(new.dtype)
    centred = new.astype(wide) - jnp.mean(new.astype(wide), -1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + eps)
    return (normed * (1 + scale.astype(wide)[:, None]) + shift.astype(wide)[:, None]).astype(new.dtype)


def reference(
    x: Float[Array, "B N D"],
    branches: Sequence[Array],
    gates: Sequence[Array],
    shift: Float[Array, "B D"],
    scale: Float[Array, "B D"],
    eps: float = 1e-6,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """Both results of the op."""
    new = stream(x, branches, gates)
    return new, modulate(new, shift, scale, eps)
