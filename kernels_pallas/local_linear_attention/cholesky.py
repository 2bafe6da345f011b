"""Cholesky's solve for many small systems at once, in plain array operations.

The systems lie along the last axis, so that every step is a long vector operation: on a CPU this is as fast as LAPACK
called once a matrix, and it needs none of its library's calls, which wait for each other forever when several devices
of one process factor batches inside a loop (seen with jaxlib 0.10.2 on CPU).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PANEL = 8  # columns that are eliminated before the rest of the matrix is updated


def _factor(panel: Array) -> Array:
    """Columns of L from [..., n, w, R], the first w columns of what remains; what is above the diagonal is no use."""
    width = panel.shape[-2]
    index = jnp.arange(width)[:, None]

    def column(j: Array, panel: Array) -> Array:
        raw = lax.dynamic_index_in_dim(panel, j, panel.ndim - 2, keepdims=False)
        done = raw / jnp.sqrt(lax.dynamic_index_in_dim(raw, j, raw.ndim - 2))
        others = panel - done[..., :, None, :] * done[..., None, :width, :]
        return jnp.where(index == j, done[..., :, None, :], jnp.where(index > j, others, panel))

    # A loop: written out, XLA would compute the first columns again for each later one.
    return lax.fori_loop(0, width, column, panel)


def _back(panel: Array, x: Array) -> Array:
    """Unknowns of a panel, [..., w, R], from those of all later ones."""
    width = panel.shape[-2]
    right = panel[..., -1, :, :] - jnp.sum(panel[..., width:-1, :, :] * x[..., :, None, :], axis=-3)
    own: list[Array] = []  # last one first
    for j in reversed(range(width)):
        rest = right[..., j, :]
        for i, known in zip(range(width - 1, j, -1), own, strict=True):
            rest = rest - panel[..., i, j, :] * known
        own.append(rest / panel[..., j, j, :])
    return jnp.stack(own[::-1], axis=-2)


def solve_positive(matrices: Float[Array, "*B H H R"], b: Float[Array, "*B H R"]) -> Float[Array, "*B H R"]:
    """Solve A x = b for symmetric positive definite A, R systems for each of B; NaN where A is not positive definite.

    Args:
        matrices: [..., H, H, R]; what lies above the diagonal (second index larger than the first) is not used.
        b: [..., H, R].

    Returns:
        x, [..., H, R].
    """
    size = b.shape[-2]
    # With b as one more row, the factor's last row is the solution of L y = b.
    rest = jnp.concatenate([matrices, b[..., None, :, :]], axis=-3)
    panels = []
    for start in range(0, size, PANEL):
        width = min(PANEL, size - start)
        panel = _factor(rest[..., :width, :])
        below = panel[..., width:, :, :]
        update = sum(below[..., :, None, j, :] * below[..., None, :-1, j, :] for j in range(width))
        rest = rest[..., width:, width:, :] - update
        panels.append(panel)
    x = jnp.zeros((*b.shape[:-2], 0, b.shape[-1]), b.dtype)
    for panel in reversed(panels):
        x = jnp.concatenate([_back(panel, x), x], axis=-2)
    return x
