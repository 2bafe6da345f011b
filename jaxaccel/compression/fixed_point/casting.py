"""Casts between floating and fixed point, bit for bit as ap_fixed makes them.

Numbers are rounded by shifts of integers (see `rounding`), because ``floor(v + 0.5)`` in float32 is wrong next to one
half, and a power of two from ``exp2`` is inexact on CPU.

Infinite numbers overflow: they saturate, or become 0 under ``sat_zero`` and ``wrap`` (their low bits are 0). NaN
becomes 0 as an integer; `cast`, whose results are floats, keeps it so that a broken training run can be seen.

Source: Dai et al., arXiv 2401.17544, and the modes of ap_fixed in AMD's UG1399.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Int

from jaxaccel.compression.fixed_point.formats import FixedPoint, Format, split_channels
from jaxaccel.compression.fixed_point.rounding import (
    power_of_two,
    round_and_fit,
    round_as_floats,
    rounds_as_floats,
    take_apart,
)


def as_floats(x: Any, name: str = "x") -> Array:
    """An array of floats of at least 32 bits.

    Raises:
        ValueError: for integers: whether they are values or raw words is not known.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}, expected floats; raw integers go through from_int or requantise")
    if x.dtype == jnp.bfloat16:
        # By its bits: a conversion may flush subnormal numbers.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_held(word: int, signed: bool, dtype: Any, frac: Any = 0) -> None:
    """Raise ``ValueError`` if ``dtype`` does not hold every word, or not at these static F."""
    kind = jnp.finfo(dtype)
    most = kind.nmant + 1 + signed
    if word > most:
        raise ValueError(
            f"word is {word}, and {jnp.dtype(dtype)} holds all words of up to {most} bits: use to_int, or another dtype"
        )
    for f in np.unique(np.asarray(frac)).tolist():
        if -f < kind.minexp or word - f > kind.maxexp:
            raise ValueError(f"frac is {f} and word {word}, which {jnp.dtype(dtype)} does not hold: take a wider dtype")


def to_int(x: Any, fmt: Format | Any) -> Int[Array, "*S"]:
    """Raw integers m of the numbers nearest to ``x`` in a format: ``x ≈ m·2^(−F)``.

    Args:
        x: floats of any width, any shape. NaN gives 0; infinity overflows.
        fmt: a format, or one for each channel of the last axis.

    Returns:
        int32.

    Raises:
        ValueError: if ``x`` holds integers, or channels do not fit.

    >>> to_int(jnp.array([0.3, -0.25, 9.0]), FixedPoint(4, 1)).tolist()
    [1, 0, 7]
    >>> to_int(jnp.array([0.3, -0.25, 8.99]), FixedPoint(8, 4, rounding="trn", overflow="wrap")).tolist()
    [4, -4, -113]
    """
    kind, frac = split_channels(fmt)
    x = as_floats(x)
    return round_and_fit(take_apart(x), _channels(frac, x.shape), kind)[0]


def _channels(frac: int | tuple[int, ...], shape: tuple[int, ...]) -> Any:
    if isinstance(frac, tuple) and (not shape or shape[-1] != len(frac)):
        raise ValueError(f"fmt has {len(frac)} channels, expected as many as the last axis of {shape} has")
    return np.asarray(frac, np.int32)


def from_int(m: Any, fmt: Format | Any, dtype: DTypeLike = jnp.float32) -> Array:
    """Values m·2^(−F) of raw integers, exact.

    Args:
        m: raw integers; they should be inside the format's range.
        fmt: a format, or one for each channel of the last axis.
        dtype: of the result.

    Raises:
        ValueError: if ``m`` holds no integers, or ``dtype`` does not hold every value of the format (float32: words of
            up to 25 bits).

    >>> from_int(jnp.array([1, 7]), FixedPoint(4, 1)).tolist()
    [0.5, 3.5]
    """
    kind, frac = split_channels(fmt)
    m = jnp.asarray(m)
    if not jnp.issubdtype(m.dtype, jnp.integer):
        raise ValueError(f"m has dtype {m.dtype}, expected integers")
    check_held(kind.word, kind.signed, dtype, frac)
    wide = jnp.promote_types(dtype, jnp.float32)
    return (m.astype(wide) * power_of_two(-_channels(frac, m.shape), wide)).astype(dtype)


def cast(x: Any, fmt: Format | Any, dtype: DTypeLike | None = None) -> Array:
    """The numbers nearest to ``x`` in a format: ``overflow(round(x·2^F))·2^(−F)``.

    Its gradient is the straight-through one: 1 where the rounded number is inside the range, else 0; 1 everywhere under
    ``wrap``. To learn F as well, see `trainable_cast`.

    Args:
        x: floats of any width, any shape. NaN stays NaN; infinity overflows.
        fmt: a format, or one for each channel of the last axis.
        dtype: of the result; float32 if ``None``, and float64 for float64. Less would not hold most formats.

    Raises:
        ValueError: if ``x`` holds integers, ``dtype`` does not hold every value of the format, or channels do not fit.

    >>> cast(jnp.array([0.3, -0.25, 9.0]), FixedPoint(4, 1)).tolist()
    [0.5, 0.0, 3.5]
    """
    kind, frac = split_channels(fmt)
    x = as_floats(x)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    check_held(kind.word, kind.signed, dtype, frac)
    _channels(frac, x.shape)
    return _cast(x, kind, frac, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _cast(x: Array, kind: FixedPoint, frac: int | tuple[int, ...], dtype: Any) -> Array:
    return cast_and_mask(x, np.asarray(frac, np.int32), kind, dtype)[0]


@_cast.defjvp
def _cast_jvp(kind: Any, frac: Any, dtype: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    q, inside = cast_and_mask(primals[0], np.asarray(frac, np.int32), kind, dtype)
    slope = tangents[0].astype(dtype)
    return q, slope if kind.overflow == "wrap" else jnp.where(inside, slope, 0)


def cast_and_mask(x: Array, frac: Any, kind: FixedPoint, dtype: Any) -> tuple[Array, Array]:
    """Values in a format, and where the rounded number was inside its range."""
    if x.dtype == dtype and not isinstance(frac, jax.core.Tracer) and rounds_as_floats(kind, np.asarray(frac)):
        m, inside = round_as_floats(x, frac, kind)
        return m * power_of_two(-jnp.asarray(frac), dtype), inside
    parts = take_apart(x)
    m, inside = round_and_fit(parts, frac, kind)
    wide = jnp.promote_types(dtype, jnp.float32)
    q = (m.astype(wide) * power_of_two(-jnp.asarray(frac), wide)).astype(dtype)
    return jnp.where(parts.nan, jnp.asarray(jnp.nan, dtype), q), inside
