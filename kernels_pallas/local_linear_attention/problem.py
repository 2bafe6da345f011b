"""What every implementation of local linear attention takes and gives, and the checks that come before it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from kernels_pallas.arrays import accumulator

SOLVERS = ("cg", "cholesky")
PRECONDITIONERS = (None, "jacobi")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call.

    Attributes:
        is_causal: query row i sees the keys j <= i + offset.
        solver: ``"cg"`` or ``"cholesky"``.
        max_iters: most iterations of conjugate gradients.
        rtol: they stop for a row whose residual is at most this share of the right-hand side, in the 2-norm (with a
            preconditioner: in its norm).
        preconditioner: ``None`` or ``"jacobi"``.
        solve: False where a probe is given: x is an input then and nothing is solved.
        static_offset: the causal offset where it is a Python integer, so that keys above the diagonal are never read.
    """

    is_causal: bool = True
    solver: str = "cg"
    max_iters: int = 32
    rtol: float = 1e-6
    preconditioner: str | None = None
    solve: bool = True
    static_offset: int | None = None


class Inputs(NamedTuple):
    """The arrays of a call; *acc* is float32, or float64 for float64 inputs."""

    q: Array  # [B, T, N, H]
    k: Array  # [B, S, K, H], K divides N
    v: Array  # [B, S, K, Hv]
    scale: Array  # [] acc
    ridge: Array  # [B, T, N] acc
    offset: Array  # [] int32
    mask: Array | None = None  # bool, broadcastable to [B, N, T, S]
    probe: Array | None = None  # [B, T, N, H] acc


class Forward(NamedTuple):
    """What the forward pass gives; all but ``out`` is what the backward pass starts from."""

    out: Array  # [B, T, N, Hv], dtype of q
    x: Array  # [B, T, N, H] acc, (cov(k) + ridge)⁻¹ (q − mean), or the probe
    mean: Array  # [B, T, N, H] acc, Σ p k
    lse: Array  # [B, T, N] acc, log Σ exp(scale·q·k); −inf for rows that see no key
    iterations: Array  # [B, T, N] int32, iterations that the row's tile ran; 0 without conjugate gradients


class Cotangents(NamedTuple):
    """Cotangents of `Forward`'s differentiable outputs."""

    out: Array  # [B, T, N, Hv], dtype of q
    x: Array  # [B, T, N, H] acc
    lse: Array  # [B, T, N] acc


class Backward(NamedTuple):
    """What the backward pass gives; `kernels_pallas.local_linear_attention.vjp` makes the gradients of it."""

    solved: Array  # [B, T, N, H] acc, y = (cov(k) + ridge)⁻¹ t, or t itself where nothing is solved
    logit: Array  # [B, T, N, H] acc, Σ ds k
    dk: Array  # [B, S, K, H], dtype of k
    dv: Array  # [B, S, K, Hv], dtype of v


def unit(x: Array) -> Array:
    """Vectors over their norm, computed in the accumulator's precision; zero stays zero, and its gradient finite."""
    wide = x.astype(accumulator(x.dtype))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.where(square == 0, 1, square))).astype(x.dtype)


def is_known(value: object) -> bool:
    """Whether a value can be looked at: a number or array that is not traced."""
    return value is not None and not isinstance(value, jax.core.Tracer)


def check_options(solver: str, max_iters: int, rtol: float | int, preconditioner: str | None) -> None:
    """Raise ``ValueError`` for options that do not exist or make no sense."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    if not isinstance(max_iters, int) or isinstance(max_iters, bool) or max_iters < 1:
        raise ValueError(f"max_iters is {max_iters!r}, expected an integer of at least 1")
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol!r}, expected at least 0 and less than 1")
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner is {preconditioner!r}, expected None or 'jacobi'")
    if preconditioner is not None and solver != "cg":
        raise ValueError(f"preconditioner is {preconditioner!r}, which only solver 'cg' has, got solver {solver!r}")


def check_arrays(query: Array, key: Array, value: Array) -> None:
    """Raise where shapes or dtypes of query, key and value do not fit together."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}, expected four axes [batch, length, heads, size]")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")
    if key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]:
        raise ValueError(
            f"query, key and value have batches {query.shape[0]}, {key.shape[0]}, {value.shape[0]}: expected one size"
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"query has head size {query.shape[-1]}, but key has {key.shape[-1]}: expected equal ones")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value has shape {value.shape}, expected {key.shape[:3]} before its last axis: one value for every key"
        )
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"query, key and value have shapes {query.shape}, {key.shape}, {value.shape}: one is empty")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} heads, which the {key.shape[2]} heads of key do not divide")


def check_ridge(ridge: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raise unless ``ridge`` broadcasts to ``shape`` and is positive and finite where it is known."""
    try:
        fits = jnp.broadcast_shapes(jnp.shape(ridge), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"ridge has shape {jnp.shape(ridge)}, expected one that broadcasts to [B, T, N] = {shape}")
    if is_known(ridge):
        numbers = np.asarray(ridge, np.float64)
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            worst = numbers[~(np.isfinite(numbers) & (numbers > 0))].ravel()[0]
            raise ValueError(f"ridge is {worst:g} somewhere, expected positive and finite: the system is singular at 0")


def check_mask(mask: Array | None, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is boolean and broadcasts to ``shape`` = [B, N, T, S]."""
    if mask is None:
        return
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}, expected booleans, True where a key is seen")
    try:
        fits = mask.ndim == 4 and jnp.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {mask.shape}, expected four axes that broadcast to [B, N, T, S] = {shape}")


def refused_option(inputs: Inputs, options: Options) -> str | None:
    """Why no kernel of this op takes a call, or None; each has reasons of its own besides."""
    if inputs.mask is not None:
        return "mask is given; this kernel knows causal masks with an offset only"
    if options.solve and options.solver != "cg":
        return f"solver is {options.solver!r}; this kernel knows 'cg' only"
    return None
