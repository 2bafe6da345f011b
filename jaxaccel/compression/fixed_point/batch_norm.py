"""Batch normalisation as hardware has it: one product and one sum for each entry.

    a = γ/√(var + ε),   b = β − mean·a,   y = cast(a·x + b)

a and b are constants of each channel, in formats of their own; product and sum are exact, and there is one cast. Train
with the statistics of the batch, folded and cast the same way (gradients pass straight through), and use running
statistics for evaluation and hardware.

Source: arXiv 2401.17544, which quantises these layers too.
"""

from typing import Any

import jax
from jax import Array

from jaxaccel.compression.fixed_point.formats import FixedPoint, check_int32, largest_magnitude
from jaxaccel.compression.fixed_point.operators import align_add, apply, requantise


def fold_batch_norm(
    mean: Array, var: Array, *, scale: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> tuple[Array, Array]:
    """The scale a and shift b that batch normalisation is, in floats.

    Args:
        mean: [C], of the batch or running.
        var: [C], biased, as normalisation uses it.
        scale: γ [C]; 1 if ``None``.
        bias: β [C]; 0 if ``None``.
        eps: ε.

    >>> import jax.numpy as jnp
    >>> a, b = fold_batch_norm(jnp.array([2.0]), jnp.array([4.0]), scale=jnp.array([3.0]), eps=0.0)
    >>> a.tolist(), b.tolist()
    ([1.5], [-3.0])
    """
    a = jax.lax.rsqrt(var + eps)
    if scale is not None:
        a = a * scale
    b = -mean * a
    return a, b if bias is None else b + bias


def qbatchnorm(
    x: Any, a: Any, b: Any, *, x_fmt: FixedPoint, a_fmt: FixedPoint, b_fmt: FixedPoint, out_fmt: FixedPoint
) -> Array:
    """``cast(a·x + b)`` with exact product and sum.

    Args:
        x: raw integers or floats [..., C].
        a: the same kind [C].
        b: the same kind [C].
        x_fmt: format of ``x``.
        a_fmt: of ``a``.
        b_fmt: of ``b``.
        out_fmt: of the result.

    Returns:
        int32, or floats with straight-through gradients.

    Raises:
        ValueError: if int32 could overflow, or some operands are raw and others not.

    >>> import jax.numpy as jnp
    >>> f = FixedPoint(8, 4)
    >>> qbatchnorm(jnp.array([1.5]), jnp.array([2.0]), jnp.array([0.25]), x_fmt=f, a_fmt=f, b_fmt=f, out_fmt=f).tolist()
    [3.25]
    """
    frac = x_fmt.frac + a_fmt.frac
    product_max = largest_magnitude(x_fmt) * largest_magnitude(a_fmt)
    widths = f"{x_fmt.word} times {a_fmt.word} bits"
    check_int32("the product", product_max, widths)
    what = f"{widths} at frac {frac}, and {b_fmt.word} bits at frac {b_fmt.frac}"

    def integer(x: Array, a: Array, b: Array) -> Array:
        total = align_add(b, b_fmt, largest_magnitude(b_fmt), x * a, frac, product_max, what)
        return requantise(total, frac=max(frac, b_fmt.frac), out_fmt=out_fmt)

    operands = [("x", x, x_fmt), ("a", a, a_fmt), ("b", b, b_fmt)]
    return apply(integer, lambda x, a, b: x * a + b, operands, lambda: out_fmt)
