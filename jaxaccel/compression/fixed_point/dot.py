"""Dot products of fixed-point numbers, by a wide accumulator or by one that is cast at every step.

An accumulator of hardware that is declared as a narrow ap_fixed is cast at *every* step, ``acc += w * x``. With
rounding that differs from one cast at the end more often than not, and once it saturates the order of terms matters.
`qdot` does both: ``accumulate="exact"`` for a wide accumulator, ``"stepwise"`` for the narrow one, in the order of
indices. With ``trn``, ``wrap`` and the F of the products the two are the same.

Source: the arithmetic of arXiv 2401.17544; widths by UG1399.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxaccel.compression.fixed_point.formats import (
    FixedPoint,
    Format,
    check_int32,
    dot_format,
    largest_magnitude,
    split_channels,
)
from jaxaccel.compression.fixed_point.operators import align_add, apply, requantise
from kernels_pallas.dispatch import resolve_implementation

FLOAT32_EXACT = 2**24
"""float32 holds all integers up to it, so sums that stay below are exact in any order."""


def check_dot(terms: int, x_kind: FixedPoint, w_kind: FixedPoint) -> int:
    """Largest magnitude of a sum of products.

    Raises:
        ValueError: if int32 does not hold it.
    """
    bound = terms * largest_magnitude(x_kind) * largest_magnitude(w_kind)
    check_int32("a sum", bound, f"{terms} products of {x_kind.word} and {w_kind.word} bits")
    return bound


@functools.partial(jax.jit, static_argnums=(2, 3))
def _int_dot(x: Array, w: Array, x_kind: FixedPoint, w_kind: FixedPoint) -> Array:
    """Exact int32 ``x @ w``, by whatever unit of the platform is exact and fast."""
    bound = check_dot(x.shape[-1], x_kind, w_kind)

    def contract(dtype: Any) -> Callable[[Array, Array], Array]:
        def product(x: Array, w: Array) -> Array:
            numbers = (((x.ndim - 1,), (0,)), ((), ()))
            wide = jnp.float32 if dtype == jnp.float32 else jnp.int32
            y = jax.lax.dot_general(
                x.astype(dtype), w.astype(dtype), numbers, jax.lax.Precision.HIGHEST, preferred_element_type=wide
            )
            return y.astype(jnp.int32)

        return product

    small = max(largest_magnitude(x_kind) - x_kind.signed, largest_magnitude(w_kind) - w_kind.signed) <= 127
    # XLA on CPU has fast loops for float32 and, from two rows on, for int8, which are faster still; none for int32.
    narrow = contract(jnp.int8 if small else jnp.int32)
    by_float = bound <= FLOAT32_EXACT and not (small and math.prod(x.shape[:-1]) > 1)
    return jax.lax.platform_dependent(x, w, cpu=contract(jnp.float32) if by_float else narrow, default=narrow)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _stepwise(x: Array, w: Array, x_fmt: FixedPoint, w_fmt: FixedPoint, acc: FixedPoint) -> Array:
    """``acc += x[k] * w[k]`` for each k in turn, cast at every step."""
    frac = x_fmt.frac + w_fmt.frac
    product_max = largest_magnitude(x_fmt) * largest_magnitude(w_fmt)
    what = f"an accumulator of {acc.word} bits at frac {acc.frac} and a product of {x_fmt.word} and {w_fmt.word} bits"

    def step(total: Array, terms: tuple[Array, Array]) -> tuple[Array, None]:
        product = terms[0][..., None] * terms[1]
        total = align_add(total, acc, largest_magnitude(acc), product, frac, product_max, f"{what} at frac {frac}")
        return requantise(total, frac=max(acc.frac, frac), out_fmt=acc), None

    # Taken from the operands, so that it varies over the same axes of a mesh.
    start = jnp.zeros_like(x[..., :1] * w[0])
    return jax.lax.scan(step, start, (jnp.moveaxis(x, -1, 0), w))[0]


def exact_matmul(x: Array, w: Array, *, x_fmt: FixedPoint, w_fmt: FixedPoint) -> Array:
    """``x @ w`` of floats that are fixed-point numbers, exact in float32 whatever the order: for training.

    All partial sums are multiples of 2^(−F1−F2), and at most 2^24 of them. Only words, signs and the number of terms
    count, so F may be learned.

    Args:
        x: floats [..., K], already cast.
        w: floats [K, N], already cast.
        x_fmt: word and sign of ``x``; its F is not looked at.
        w_fmt: of ``w``.

    Raises:
        ValueError: if float32 might not hold a sum.

    >>> f = FixedPoint(8, 5)
    >>> exact_matmul(jnp.ones((2, 3)), jnp.ones((3, 1)), x_fmt=f, w_fmt=f).tolist()
    [[3.0], [3.0]]
    """
    check_matmul_shapes(x, w)
    check_float32(x.shape[-1], x_fmt, w_fmt)
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)


def check_float32(terms: int, x_fmt: FixedPoint, w_fmt: FixedPoint) -> None:
    """Raise ``ValueError`` if a sum of so many products might not be exact in float32."""
    bound = terms * largest_magnitude(x_fmt) * largest_magnitude(w_fmt)
    if bound > FLOAT32_EXACT:
        raise ValueError(
            f"a sum of {terms} products of {x_fmt.word} and {w_fmt.word} bits can reach {bound} steps, expected at "
            "most 2^24: float32 would round it; take fewer bits, or qdot, whose sums are int32"
        )


def check_matmul_shapes(x: Any, w: Any) -> None:
    """Raise ``ValueError`` unless shapes are [..., K] and [K, N] or [K]."""
    shapes = jnp.shape(x), jnp.shape(w)
    if len(shapes[0]) < 1 or len(shapes[1]) not in (1, 2) or shapes[0][-1] != shapes[1][0] or not shapes[1][0]:
        raise ValueError(
            f"x has shape {shapes[0]} and w {shapes[1]}: expected [..., K] and [K, N] or [K], K at least 1"
        )


def qdot(
    x: Any,
    w: Any,
    *,
    x_fmt: FixedPoint,
    w_fmt: Format | Any,
    acc_fmt: FixedPoint | None = None,
    out_fmt: FixedPoint | None = None,
    accumulate: str = "exact",
    implementation: str | None = None,
) -> Array:
    """``x @ w`` in fixed point.

    Args:
        x: raw integers or floats [..., K].
        w: the same kind, [K, N] or [K].
        x_fmt: format of ``x``.
        w_fmt: format of ``w``, or N of them, one for each output (exact sums only).
        acc_fmt: format of the accumulator. An exact sum is cast to it once, if given.
        out_fmt: format of the result; ``acc_fmt`` if ``None``, and the exact sum with F = F1 + F2 if both are.
        accumulate: ``"exact"``: sum in int32, then cast; ``"stepwise"``: cast to ``acc_fmt`` after each term, in the
            order of k, one after the other. That is slow here; it is what narrow hardware does.
        implementation: ``"xla"``, or ``None``, which is the same.

    Returns:
        [..., N] or [...]: int32 raw integers, or floats, whose gradient is that of the exact sum where this is inside
        the range of the result, else 0.

    Raises:
        ValueError: if int32 could overflow, shapes do not fit, ``accumulate`` or ``implementation`` is unknown,
            ``"stepwise"`` has no ``acc_fmt``, or one operand is raw and the other is not.

    >>> f = FixedPoint(4, 2)
    >>> qdot(jnp.array([7, 3]), jnp.array([7, 1]), x_fmt=f, w_fmt=f).tolist()
    52
    >>> qdot(jnp.array([7, 3]), jnp.array([7, 1]), x_fmt=f, w_fmt=f, acc_fmt=FixedPoint(8, 2)).tolist()
    13
    """
    resolve_implementation(implementation, {"xla": ("cpu", "gpu", "tpu")})
    if accumulate not in ("exact", "stepwise"):
        raise ValueError(f"accumulate is {accumulate!r}, expected 'exact' or 'stepwise'")
    check_matmul_shapes(x, w)
    w_kind, w_frac = split_channels(w_fmt, "w_fmt")
    terms = jnp.shape(w)[0]
    if isinstance(w_frac, tuple) and (jnp.ndim(w) != 2 or len(w_frac) != jnp.shape(w)[1]):
        raise ValueError(f"w_fmt has {len(w_frac)} channels and w shape {jnp.shape(w)}, expected one for each output")
    final = acc_fmt if out_fmt is None else out_fmt
    frac = tuple(x_fmt.frac + f for f in w_frac) if isinstance(w_frac, tuple) else x_fmt.frac + w_frac

    def exact(x: Array, w: Array) -> Array:
        total = _int_dot(x, w, x_fmt, w_kind)
        if acc_fmt is not None:
            total = requantise(total, frac=frac, out_fmt=acc_fmt)
            return total if out_fmt is None else requantise(total, frac=acc_fmt.frac, out_fmt=out_fmt)
        return total if out_fmt is None else requantise(total, frac=frac, out_fmt=out_fmt)

    def stepwise(x: Array, w: Array) -> Array:
        if acc_fmt is None:
            raise ValueError("acc_fmt is None, expected the accumulator's format for accumulate='stepwise'")
        if isinstance(w_frac, tuple):
            raise ValueError("w_fmt has channels, expected one format for accumulate='stepwise'")
        total = _stepwise(x, w if w.ndim == 2 else w[:, None], x_fmt, w_kind, acc_fmt)
        total = total if w.ndim == 2 else total[..., 0]
        return total if out_fmt is None else requantise(total, frac=acc_fmt.frac, out_fmt=out_fmt)

    def real(x: Array, w: Array) -> Array:
        return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)

    def result_format() -> FixedPoint:
        if final is None and isinstance(w_frac, tuple):
            raise ValueError("out_fmt is None, expected a format for floats with channels")
        return dot_format(x_fmt, w_kind, terms) if final is None else final

    integer = exact if accumulate == "exact" else stepwise
    return apply(integer, real, [("x", x, x_fmt), ("w", w, w_fmt)], result_format)
