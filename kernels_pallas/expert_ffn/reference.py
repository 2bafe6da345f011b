"""The equation of the union kernel, expert by expert, and the dense form that it is measured against."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.arrays import accumulator
from kernels_pallas.expert_ffn.problem import ACTIVATIONS, Activation, check_activation


def naive(
    x: Float[Array, "T D"],
    up: Float[Array, "Ne de D"],
    down: Float[Array, "Ne de D"],
    scores: Float[Array, "T Ne"],
    active: Bool[Array, "Ne"] | None = None,
    activation: Activation = "silu",
) -> Float[Array, "T D"]:
    """The sum Σₑ scores[:, e] · (act(x·upₑᵀ)·downₑ) over the active experts; others count for nothing, NaN or not."""
    dtype = accumulator(x.dtype)
    if active is None:
        active = (scores != 0).any(0)
    out = jnp.zeros(x.shape, dtype)
    for expert in range(up.shape[0]):
        hidden = jnp.matmul(x.astype(dtype), up[expert].T.astype(dtype), precision="highest")
        one = jnp.matmul(ACTIVATIONS[activation](hidden), down[expert].astype(dtype), precision="highest")
        out += jnp.where(active[expert], scores[:, expert, None].astype(dtype) * one, 0)
    return out.astype(x.dtype)


def dense_expert_ffn(
    x: Float[Array, "*batch D"],
    up: Float[Array, "Ne de D"],
    down: Float[Array, "Ne de D"],
    scores: Float[Array, "*batch Ne"],
    *,
    activation: Activation = "silu",
) -> Float[Array, "*batch D"]:
    """The same sum over all experts as one pair of matrix products: what to use when most experts are active.

    y = (act(x·Uᵀ) ∘ scores)·V, with U and V the slabs of all experts on top of each other [Ne·de, D] (no copy). It
    reads all weights, is differentiable as often as one likes, and is the baseline of the speed of `expert_ffn`.

    Args:
        x: tokens [..., D].
        up: first matrices of the experts [Ne, de, D].
        down: second matrices [Ne, de, D].
        scores: weight of each expert for each token [..., Ne].
        activation: ``"silu"``, ``"gelu"`` (tanh form) or ``"relu"``.

    Returns:
        [..., D] in the dtype of ``x``; sums are float32, or float64 for float64.

    Raises:
        ValueError: if the activation is unknown.

    >>> x, weights = jnp.ones((3, 4)), jnp.ones((2, 5, 4))
    >>> dense_expert_ffn(x, weights, weights, jnp.array([[0.0, 1], [0, 0], [1, 1]]), activation="relu")[:, 0].tolist()
    [20.0, 0.0, 40.0]
    """
    check_activation(activation)
    dtype = accumulator(x.dtype)
    experts, size, width = up.shape
    tokens = x.reshape(-1, width).astype(dtype)
    # Tokens last: XLA's CPU products of few tokens are up to 1.5 times as fast that way round.
    hidden = ACTIVATIONS[activation](up.reshape(experts * size, width).astype(dtype) @ tokens.T)
    weighted = hidden.reshape(experts, size, -1) * scores.reshape(-1, experts).T[:, None].astype(dtype)
    flat = weighted.reshape(experts * size, -1)
    out = jax.lax.dot_general(flat, down.reshape(experts * size, width).astype(dtype), (((0,), (0,)), ((), ())))
    return out.astype(x.dtype).reshape(x.shape)
