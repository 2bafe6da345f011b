"""The systems of a tile of rows, (Σ p (k − k̄)(k − k̄)ᵀ + ridge·1) x = b: conjugate gradients, or Cholesky factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.local_linear_attention.cholesky import solve_positive
from kernels_pallas.local_linear_attention.problem import Options

HIGH = jax.lax.Precision.HIGHEST
CHUNK = 128  # keys whose outer products are held at once
COLUMNS = 16  # of a block of A that is computed from its diagonal down


class System(NamedTuple):
    """A tile of R rows for each head; p sums to one over S, or is zero for rows that see no key."""

    p: Array  # [..., R, S]
    k: Array  # [..., S, H]
    mean: Array  # [..., R, H]
    ridge: Array  # [..., R, 1]


def rows_keys(rows: Array, keys: Array) -> Array:
    """Products of rows [..., R, H] and keys [..., S, H]: [..., R, S]."""
    return jnp.einsum("...rh,...sh->...rs", rows, keys, precision=HIGH)


def weights_keys(weights: Array, keys: Array) -> Array:
    """Sums of keys [..., S, H] with weights [..., R, S]: [..., R, H]."""
    return jnp.einsum("...rs,...sh->...rh", weights, keys, precision=HIGH)


def dot(a: Array, b: Array) -> Array:
    """Σ over the last axis, which is kept."""
    return jnp.sum(a * b, axis=-1, keepdims=True)


def apply(system: System, u: Array) -> Array:
    """A u = Σ p (u·c) c + ridge·u with c = k − k̄, in two products and without c.

    Σ p (u·c) k̄ vanishes in exact arithmetic; subtracting it keeps the rounding of the first product out of the mean.
    """
    weights = system.p * (rows_keys(u, system.k) - dot(u, system.mean))
    total = weights_keys(weights, system.k) - jnp.sum(weights, -1, keepdims=True) * system.mean
    return total + system.ridge * u


def diagonal(system: System) -> Array:
    """Diagonal of A: [..., R, H]."""
    return weights_keys(system.p, system.k**2) - system.mean**2 + system.ridge


def conjugate_gradient(
    matvec: Callable[[Array], Array], b: Array, options: Options, inverse_diagonal: Array | None = None
) -> tuple[Array, Array]:
    """Solve A x = b for all rows; a row that has converged is left alone, and the loop ends when all have.

    Args:
        matvec: u -> A u.
        b: right-hand sides [..., R, H].
        options: ``max_iters`` and ``rtol``.
        inverse_diagonal: of A, for Jacobi's preconditioner.

    Returns:
        x, and the iterations that ran.
    """

    def precondition(r: Array) -> Array:
        return r if inverse_diagonal is None else r * inverse_diagonal

    z = precondition(b)
    start = dot(b, z)
    goal = start * options.rtol**2

    def unfinished(rz: Array) -> Array:
        return rz > goal  # false for NaN: a row that is not finite does not keep the others waiting

    def step(carry: Any) -> Any:
        count, x, r, direction, rz = carry
        image = matvec(direction)
        curvature = dot(direction, image)
        active = unfinished(rz) & (curvature > 0)
        alpha = jnp.where(active, rz / jnp.where(active, curvature, 1), 0)
        x, r = x + alpha * direction, r - alpha * image
        z = precondition(r)
        # A row whose curvature is no longer positive has reached its precision: it is finished as well.
        new = jnp.where(active, dot(r, z), jnp.minimum(rz, goal))
        direction = jnp.where(active, z + new / jnp.where(active, rz, 1) * direction, direction)
        return count + 1, x, r, direction, new

    count, x, *_ = jax.lax.while_loop(
        lambda carry: (carry[0] < options.max_iters) & unfinished(carry[4]).any(),
        step,
        (jnp.int32(0), jnp.zeros_like(b), b, z, start),
    )
    return x, count


def matrices(system: System) -> Array:
    """A itself on and below the diagonal, [..., H, H, R], from outer products of a few keys at a time.

    Second moments less the mean's: the keys have to be shifted so that their mean is not much larger than their spread.
    """
    *heads, keys, size = system.k.shape
    rows = system.p.shape[-2]
    chunk = min(CHUNK, keys)
    none = [(0, 0)] * len(heads)
    # Everything with keys or rows last, [..., H, S] and [..., H, H, R]: as the products here and the solver want it.
    k = jnp.pad(jnp.swapaxes(system.k, -1, -2), [*none, (0, 0), (0, -keys % chunk)])
    p = jnp.pad(jnp.swapaxes(system.p, -1, -2), [*none, (0, -keys % chunk), (0, 0)])
    starts = range(0, size, COLUMNS)  # blocks of columns, each from its diagonal down: 5/8 of the work for H = 64

    def outer(x: Array) -> Array:
        """Products of entries of [..., H, S], [..., *, S]; what is above the diagonal blocks is left out."""
        parts = [x[..., n:, None, :] * x[..., None, n : n + COLUMNS, :] for n in starts]
        return jnp.concatenate([part.reshape(*heads, -1, x.shape[-1]) for part in parts], axis=-2)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        k, p = part
        return total + jnp.einsum("...os,...sr->...or", outer(k), p, precision=HIGH), None

    mean = jnp.swapaxes(jnp.where(system.p.any(-1, keepdims=True), system.mean, 0), -1, -2)
    parts = k.reshape(*heads, size, -1, chunk), p.reshape(*heads, -1, chunk, rows)
    total, _ = jax.lax.scan(add, -outer(mean), (jnp.moveaxis(parts[0], -2, 0), jnp.moveaxis(parts[1], -3, 0)))
    columns, first = [], 0
    for n in starts:
        width = min(COLUMNS, size - n)
        block = total[..., first : first + (size - n) * width, :].reshape(*heads, size - n, width, rows)
        columns.append(jnp.pad(block, [*none, (n, 0), (0, 0), (0, 0)]))
        first += (size - n) * width
    ridge = jnp.swapaxes(system.ridge, -1, -2)[..., None, :, :]
    return jnp.concatenate(columns, axis=-2) + ridge * jnp.eye(size, dtype=system.k.dtype)[..., None]


def solve(system: System, b: Array, options: Options) -> tuple[Array, Array]:
    """Solve A x = b [..., R, H] by the chosen solver; also the iterations that ran."""
    if options.solver == "cholesky":
        return jnp.swapaxes(solve_positive(matrices(system), jnp.swapaxes(b, -1, -2)), -1, -2), jnp.int32(0)
    inverse = None if options.preconditioner is None else 1 / diagonal(system)
    return conjugate_gradient(lambda u: apply(system, u), b, options, inverse)
