"""The union kernel without Pallas: a loop over the active experts alone, forward and backward.

The trip count of the loop is the number of active experts, known only at run time, and every turn slices contiguous
slabs of the weights. That is the whole trick: gathering ``up[ids]`` copies all weights that are used before it reads
them, and a scan with a condition slices every expert.

On CPU XLA copies a slab before it multiplies by it, with two threads where the product of a single row would use one;
the slab then comes from a cache. So one token takes one expert a turn, and is made to copy; several tokens take four
experts a turn, as a product of 64 rows is too small to be fast.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float

from kernels_pallas.arrays import accumulator, varying_zeros
from kernels_pallas.expert_ffn.problem import ACTIVATIONS, Activation, Active

GROUP = 4  # experts a turn, of several tokens
CROSSOVER = 0.6  # fraction of active experts from which on two large products take no longer than the loop


def most_active(experts: int) -> int:
    """Where the dense form takes over by default: between half of the experts (one token) and all (many), measured."""
    return max(1, int(CROSSOVER * experts))


def _at(array: Array, index: ArrayLike, dtype: jnp.dtype) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False).astype(dtype)


def forward(
    x: Float[Array, "T D"],
    up: Float[Array, "slabs de D"],
    down: Float[Array, "slabs de D"],
    scores: Float[Array, "T Ne"],
    union: Active,
    first: ArrayLike,
    activation: Activation,
) -> Float[Array, "T D"]:
    """The sum over the experts of ``union``; expert e is slab ``first`` + e."""
    dtype = accumulator(x.dtype)
    rows, columns = x.astype(dtype).T, scores.astype(dtype).T
    act, group = ACTIVATIONS[activation], GROUP if x.shape[0] > 1 else 1

    def body(turn: Array, out: Array) -> Array:
        slots = [group * turn + slot for slot in range(group)]
        experts = [union.ids[jnp.minimum(slot, union.number - 1)] for slot in slots]
        slab_up, slab_down = (
            jax.lax.optimization_barrier(jnp.concatenate([_at(w, first + e, dtype) for e in experts]))
            for w in (up, down)
        )
        hidden = act(jax.lax.dot_general(slab_up, rows, (((1,), (0,)), ((), ()))))
        hidden = hidden.reshape(group, -1, hidden.shape[1])
        weighted = [
            # The last turn's spare slots repeat an expert, and must add nothing even where it is not finite.
            jnp.where(slot < union.number, one * _at(columns, e, dtype), 0)
            for slot, e, one in zip(slots, experts, hidden, strict=True)
        ]
        return out + jax.lax.dot_general(jnp.concatenate(weighted), slab_down, (((0,), (0,)), ((), ())))

    zeros = varying_zeros((x, up, down, scores, union.number), x.shape, dtype)
    return jax.lax.fori_loop(0, -(-union.number // group), body, zeros).astype(x.dtype)


def backward(
    x: Float[Array, "T D"],
    up: Float[Array, "slabs de D"],
    down: Float[Array, "slabs de D"],
    scores: Float[Array, "T Ne"],
    union: Active,
    first: ArrayLike,
    grad: Float[Array, "T D"],
    activation: Activation,
) -> tuple[Array, Array, Array, Array]:
    """Gradients for x, up, down (of Ne slabs) and scores; those of experts outside ``union`` are zero, untouched."""
    dtype = accumulator(x.dtype)
    rows, columns, pulled = x.astype(dtype), scores.astype(dtype).T, grad.astype(dtype)
    act = ACTIVATIONS[activation]

    def body(turn: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        dx, dup, ddown, dscores = carry
        expert = union.ids[turn]
        slab_up, slab_down = (_at(w, first + expert, dtype) for w in (up, down))
        score = _at(columns, expert, dtype)[:, None]
        hidden, pull = jax.vjp(act, rows @ slab_up.T)
        back = pulled @ slab_down.T
        (dhidden,) = pull(score * back)
        put = jax.lax.dynamic_update_index_in_dim
        return (
            dx + dhidden @ slab_up,
            put(dup, (dhidden.T @ rows).astype(dup.dtype), expert, 0),
            put(ddown, ((score * hidden).T @ pulled).astype(ddown.dtype), expert, 0),
            put(dscores, (hidden * back).sum(1), expert, 0),
        )

    zeros = functools.partial(varying_zeros, (x, up, down, scores, union.number, grad))
    slabs = [zeros((columns.shape[0], *w.shape[1:]), w.dtype) for w in (up, down)]
    initial = (zeros(rows.shape, dtype), *slabs, zeros(columns.shape, dtype))
    dx, dup, ddown, dscores = jax.lax.fori_loop(0, union.number, body, initial)
    return dx.astype(x.dtype), dup, ddown, dscores.T.astype(scores.dtype)
