"""Sums, products and dot products of fixed-point numbers: exact, then one cast.

    product   W = W1 + W2, F = F1 + F2         no rounding
    sum       I = max(I1, I2) + 1, F = max     points aligned, no rounding
    result    cast to ``out_fmt``

Every operator takes raw integers (int8, int16, int32) and gives int32, or takes floats and gives floats of the very
same numbers. Floats are cast to their formats first, which changes nothing if they are in them. Gradients of floats are
straight-through: those of the real operator where the result is inside the range of ``out_fmt`` (everywhere if it
wraps), else 0.

int32 holds all intermediate results; formats for which it might not are refused when the operator is called, by width.

Source: the arithmetic of arXiv 2401.17544; widths by UG1399.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxaccel.compression.fixed_point.casting import as_floats, cast_and_mask, from_int, to_int
from jaxaccel.compression.fixed_point.formats import (
    FixedPoint,
    Format,
    add_format,
    check_int32,
    largest_magnitude,
    multiply_format,
)
from jaxaccel.compression.fixed_point.rounding import divide_and_fit, round_and_fit, take_apart_int


def requantise(m: Any, *, frac: int | Sequence[int], out_fmt: FixedPoint) -> Array:
    """Cast raw integers: shift, round, deal with overflow. The epilogue of every operator.

    Args:
        m: integers of at most 32 bits that stand for ``m·2^(−frac)``.
        frac: their F, or one for each channel of the last axis.
        out_fmt: the format to cast to.

    Returns:
        int32.

    Raises:
        ValueError: if ``m`` holds no integers of at most 32 bits.

    >>> requantise(jnp.array([5, 6, -100]), frac=2, out_fmt=FixedPoint(4, 0)).tolist()
    [1, 2, -8]
    """
    m = jnp.asarray(m)
    if not jnp.issubdtype(m.dtype, jnp.integer) or m.dtype.itemsize > 4 or m.dtype == jnp.uint32:
        raise ValueError(f"m has dtype {m.dtype}, expected integers that int32 holds")
    shift = np.asarray(out_fmt.frac - np.asarray(frac), np.int32)
    return round_and_fit(take_apart_int(m.astype(jnp.int32)), shift, out_fmt)[0]


def apply(
    integer: Callable[..., Array],
    real: Callable[..., Array],
    operands: Sequence[tuple[str, Any, Format]],
    out_fmt: Callable[[], FixedPoint],
) -> Array:
    """``integer`` on raw operands; for floats on their raw integers, with the gradient of ``real``."""
    arrays = [jnp.asarray(x) for _, x, _ in operands]
    whole = [jnp.issubdtype(x.dtype, jnp.integer) for x in arrays]
    if all(whole):
        return integer(*(x.astype(jnp.int32) for x in arrays))
    if any(whole):
        kinds = ", ".join(f"{name} {x.dtype}" for (name, *_), x in zip(operands, arrays, strict=True))
        raise ValueError(f"operands are {kinds}, expected raw integers or floats, not both")
    fmt = out_fmt()

    @jax.custom_jvp
    def op(*args: Array) -> Array:
        dtype = jnp.result_type(*args)
        return from_int(integer(*(to_int(x, f) for x, (*_, f) in zip(args, operands, strict=True))), fmt, dtype)

    @op.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        y, slope = jax.jvp(real, primals, tangents)
        if fmt.overflow != "wrap":
            slope = jnp.where(cast_and_mask(y, fmt.frac, fmt, y.dtype)[1], slope, 0)
        return op(*primals), slope

    return op(*(as_floats(x, name) for x, (name, *_) in zip(arrays, operands, strict=True)))


def align_add(a: Array, a_fmt: FixedPoint, a_max: int, b: Array, b_frac: int, b_max: int, what: str) -> Array:
    """``a + b`` of raw integers, points aligned: F of the sum is the larger of both. Checked against int32."""
    left = max(0, b_frac - a_fmt.frac)
    right = max(0, a_fmt.frac - b_frac)
    check_int32("the sum", (a_max << left) + (b_max << right), what)
    return (a << left) + (b << right)


def qadd(a: Any, b: Any, *, a_fmt: FixedPoint, b_fmt: FixedPoint, out_fmt: FixedPoint | None = None) -> Array:
    """Sum of two arrays: points aligned, exact, then one cast. For shortcuts and biases.

    Args:
        a: raw integers or floats.
        b: the same, of a shape that broadcasts.
        a_fmt: format of ``a``.
        b_fmt: format of ``b``.
        out_fmt: format of the result; the exact one (`add_format`) if ``None``.

    Raises:
        ValueError: if int32 could overflow, or one operand is raw and the other is not.

    >>> qadd(jnp.array([3]), jnp.array([5]), a_fmt=FixedPoint(4, 1), b_fmt=FixedPoint(6, 2)).tolist()
    [11]
    """
    out = add_format(a_fmt, b_fmt) if out_fmt is None else out_fmt
    what = f"{a_fmt.word} and {b_fmt.word} bits at frac {a_fmt.frac} and {b_fmt.frac}"

    def integer(a: Array, b: Array) -> Array:
        total = align_add(a, a_fmt, largest_magnitude(a_fmt), b, b_fmt.frac, largest_magnitude(b_fmt), what)
        return requantise(total, frac=max(a_fmt.frac, b_fmt.frac), out_fmt=out)

    return apply(integer, jnp.add, [("a", a, a_fmt), ("b", b, b_fmt)], lambda: out)


def qmul(a: Any, b: Any, *, a_fmt: FixedPoint, b_fmt: FixedPoint, out_fmt: FixedPoint | None = None) -> Array:
    """Product of two arrays, entry by entry: exact, then one cast.

    Arguments and errors are those of `qadd`; the exact format is `multiply_format`.

    >>> qmul(jnp.array([3]), jnp.array([5]), a_fmt=FixedPoint(4, 1), b_fmt=FixedPoint(6, 2)).tolist()
    [15]
    """
    bound = largest_magnitude(a_fmt) * largest_magnitude(b_fmt)
    check_int32("the product", bound, f"{a_fmt.word} and {b_fmt.word} bits")
    out = multiply_format(a_fmt, b_fmt) if out_fmt is None else out_fmt

    def integer(a: Array, b: Array) -> Array:
        return requantise(a * b, frac=a_fmt.frac + b_fmt.frac, out_fmt=out)

    return apply(integer, jnp.multiply, [("a", a, a_fmt), ("b", b, b_fmt)], lambda: out)


def qmean(x: Any, *, axis: int | Sequence[int], fmt: FixedPoint, out_fmt: FixedPoint) -> Array:
    """Mean over axes, for pooling: exact sum, exact quotient, one cast.

    Where the number of entries is a power of two, that is a shift; else hardware needs a divider, and its own division
    must be told to round as ``out_fmt`` does (ap_fixed's truncates).

    Args:
        x: raw integers or floats.
        axis: one axis or several.
        fmt: format of ``x``.
        out_fmt: format of the result.

    Raises:
        ValueError: if int32 could overflow.

    >>> qmean(jnp.array([[1, 2, 4, 4]]), axis=-1, fmt=FixedPoint(4, 0), out_fmt=FixedPoint(6, 2)).tolist()
    [11]
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    shape = jnp.shape(x)
    count = int(np.prod([shape[a] for a in axes]))
    if count < 1:
        raise ValueError(f"x has shape {shape}, expected at least one entry along axis {axis}")
    up, down = max(0, out_fmt.frac - fmt.frac), max(0, fmt.frac - out_fmt.frac)
    what = f"{count} numbers of {fmt.word} bits at frac {fmt.frac}, for frac {out_fmt.frac},"
    check_int32("the mean", max((count * largest_magnitude(fmt)) << up, count << down), what)

    def integer(x: Array) -> Array:
        return divide_and_fit(jnp.sum(x, axes, jnp.int32) << up, count << down, out_fmt)[0]

    return apply(integer, lambda x: jnp.mean(x, axes), [("x", x, fmt)], lambda: out_fmt)
