"""Conjugate gradients for a tile of rows, inside a TPU kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.local_linear_attention.tpu_pieces import row_dot, widen


def conjugate_gradient(
    matvec: Callable[[jax.Array], jax.Array],
    x_ref: Any,
    r_ref: Any,
    p_ref: Any,
    rz_ref: Any,
    goal_ref: Any,
    *,
    max_iters: int,
    rtol: float,
    inverse_diagonal: Any = None,
) -> jax.Array:
    """Solves A x = r for every row of a tile; stops when all rows have converged.

    A row has converged when r·z ≤ rtol² r₀·z₀ (z = r, or r over the diagonal); it is then left alone (α = 0), so that
    it stays converged and no flag has to be carried.

    Args:
        matvec: p [R, L] -> A p [R, L].
        x_ref: receives the solution [R, L].
        r_ref: holds the right-hand side [R, L], later the residual.
        p_ref: scratch [R, L], the direction.
        rz_ref: scratch [R, 128], r·z.
        goal_ref: scratch [R, 128], rtol² r₀·z₀.
        max_iters: most iterations.
        rtol: relative residual.
        inverse_diagonal: of A, [R, L], for Jacobi's preconditioner.

    Returns:
        Iterations that the tile ran, a scalar.
    """
    width = x_ref.shape[1]

    def precondition(r: jax.Array) -> jax.Array:
        return r if inverse_diagonal is None else r * inverse_diagonal[...]

    def unconverged() -> jax.Array:
        # A float: a boolean cannot be carried through a loop on a TPU.
        return jnp.max(jnp.where(rz_ref[...] > goal_ref[...], 1.0, 0.0))

    r = r_ref[...]
    z = precondition(r)
    x_ref[...] = jnp.zeros_like(x_ref)
    p_ref[...] = z
    rz = row_dot(r, z)
    rz_ref[...] = rz
    goal_ref[...] = rz * (rtol * rtol)

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        iteration, _ = carry
        p = p_ref[...]
        ap = matvec(p)
        curvature = row_dot(p, ap)
        rz = rz_ref[...]
        active = (rz > goal_ref[...]) & (curvature > 0)
        step_size = jnp.where(active, rz / jnp.where(active, curvature, 1.0), 0.0)
        x_ref[...] += widen(step_size, width) * p
        r = r_ref[...] - widen(step_size, width) * ap
        r_ref[...] = r
        z = precondition(r)
        # A row with no curvature left is done too: its goal is what it has.
        new = jnp.where(active, row_dot(r, z), jnp.minimum(rz, goal_ref[...]))
        p_ref[...] = z + widen(jnp.where(active, new / jnp.where(active, rz, 1.0), 0.0), width) * p
        rz_ref[...] = new
        return iteration + 1, unconverged()

    iterations, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < max_iters) & (carry[1] > 0.5), step, (jnp.int32(0), unconverged())
    )
    return iterations
