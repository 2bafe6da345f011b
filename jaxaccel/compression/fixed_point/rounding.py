"""Exact rounding of numbers to integers of a few bits.

A number is taken apart into sign, magnitude and exponent, and rounded by shifts. Nothing is rounded twice, no value is
too large, subnormal numbers count, and all platforms give the same bits.

What training does all the time, ``rnd`` with saturation, gives the same bits in floats with a third of the operations:

    v = x·2^F,   r = ⌊v⌋,   m = r + [v − r ≥ ½]

All of it is exact: a power of two scales, v − r has no more digits than v, and r + 1 has not either where v has a
fraction. A number that is too small for floats is rounded to 0 anyway, one that is too large is outside of the range.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Int

from jaxaccel.compression.fixed_point.formats import FixedPoint, raw_range


class Parts(NamedTuple):
    """A number as ±magnitude·2^exponent."""

    negative: Bool[Array, "*S"]
    magnitude: Array  # uint32, or uint64 for float64; 0 for infinity and NaN
    digits: int  # bits that a magnitude has at most
    exponent: Int[Array, "*S"] | int  # int32
    infinite: Bool[Array, "*S"] | bool
    nan: Bool[Array, "*S"] | bool


def take_apart(x: Array) -> Parts:
    """Sign, magnitude and exponent of floats of 32 or 64 bits."""
    kind = jnp.finfo(x.dtype)
    unsigned = jnp.uint64 if kind.bits == 64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    stored, special = kind.nmant, 2**kind.nexp - 1
    biased = ((bits >> stored) & unsigned(special)).astype(jnp.int32)
    fraction = bits & unsigned(2**stored - 1)
    extreme = biased == special
    magnitude = jnp.where(biased > 0, fraction | unsigned(2**stored), fraction)
    exponent = jnp.maximum(biased, 1) - (special // 2 + stored)
    return Parts(
        (bits >> (kind.bits - 1)) != 0,
        jnp.where(extreme, unsigned(0), magnitude),
        stored + 1,
        exponent,
        extreme & (fraction == 0),
        extreme & (fraction != 0),
    )


def take_apart_int(m: Array) -> Parts:
    """The same of integers of at most 32 bits."""
    negative = m < 0
    bits = jax.lax.bitcast_convert_type(m.astype(jnp.int32), jnp.uint32)
    return Parts(negative, jnp.where(negative, ~bits + jnp.uint32(1), bits), 32, 0, False, False)


def _goes_up(rounding: str, negative: Array, half: Array, rest: Array, odd: Array) -> Array:
    """Whether the magnitude is rounded up; ``half``: the first digit cut off, ``rest``: whether others are set."""
    match rounding:
        case "rnd":
            return half & (~negative | rest)
        case "rnd_min_inf":
            return half & (negative | rest)
        case "rnd_zero":
            return half & rest
        case "rnd_inf":
            return half
        case "rnd_conv":
            return half & (rest | odd)
        case "trn":
            return negative & (half | rest)
        case _:  # trn_zero
            return jnp.zeros_like(half)


def fit(negative: Array, magnitude: Array, huge: Array, kind: FixedPoint | Any) -> tuple[Array, Array]:
    """Deal with overflow: the raw int32, and whether the number was inside the range.

    Args:
        negative: sign.
        magnitude: of the rounded integer, uint32 or uint64, or its low bits.
        huge: whether it has more bits than that.
        kind: width, sign and overflow mode, of a `FixedPoint` or other object; ``word`` may be a NumPy array.
    """
    lo, hi = (np.asarray(end) for end in raw_range(kind.word, kind.signed, kind.overflow))
    unsigned = magnitude.dtype.type
    outside = huge | (magnitude > jnp.where(negative, (-lo).astype(unsigned), hi.astype(unsigned)))
    low = magnitude.astype(jnp.uint32)
    m = jnp.where(negative, ~low + jnp.uint32(1), low)
    if kind.overflow == "wrap":
        if not kind.signed:
            return (m & hi.astype(np.uint32)).astype(jnp.int32), ~outside
        spare = np.asarray(32 - kind.word)
        shifted = jax.lax.bitcast_convert_type(m << spare.astype(np.uint32), jnp.int32)
        return shifted >> spare.astype(np.int32), ~outside
    bound = jnp.zeros((), jnp.int32)
    if kind.overflow != "sat_zero":
        bound = jnp.where(negative, lo.astype(np.int32), hi.astype(np.int32))
    return jnp.where(outside, bound, jax.lax.bitcast_convert_type(m, jnp.int32)), ~outside


def round_and_fit(parts: Parts, frac: Any, kind: FixedPoint | Any) -> tuple[Array, Array]:
    """Round ``±magnitude·2^(exponent + frac)`` to an integer, then deal with overflow.

    Args:
        parts: what ``take_apart`` gave.
        frac: F, an integer or int32 array that broadcasts.
        kind: width, sign and modes, as in `fit`.

    Returns:
        Raw int32, and whether the rounded integer was inside the range (false for NaN and infinity).
    """
    negative, magnitude, digits, exponent, infinite, nan = parts
    unsigned = magnitude.dtype.type
    bits = jnp.iinfo(magnitude.dtype).bits
    shift = exponent + jnp.asarray(frac, jnp.int32)

    source, cut = magnitude, jnp.clip(-shift, 0, digits + 1)
    if digits + 1 >= bits:
        # Shifts by all bits or more are not defined: two digits go first, and leave a trace of what they held.
        far = cut >= bits
        trace = ((magnitude & unsigned(3)) != 0).astype(magnitude.dtype)
        source = jnp.where(far, (magnitude >> 2) | trace, magnitude)
        cut = jnp.where(far, cut - 2, cut)
    cut = cut.astype(magnitude.dtype)
    quotient = source >> cut
    before = jnp.where(cut > 0, cut - unsigned(1), cut)
    half = (cut > 0) & (((source >> before) & unsigned(1)) != 0)
    rest = (source & ((unsigned(1) << before) - unsigned(1))) != 0
    up = _goes_up(kind.rounding, negative, half, rest, (quotient & unsigned(1)) != 0)
    rounded = quotient + up.astype(magnitude.dtype)

    grow = jnp.clip(shift, 0, bits)
    step = jnp.minimum(grow, bits - 1).astype(magnitude.dtype)
    huge = infinite | ((magnitude > (unsigned(2 ** (bits - 1) - 1) >> step)) & (shift > 0))
    grown = jnp.where(grow >= bits, unsigned(0), magnitude << step)
    m, inside = fit(negative, jnp.where(shift > 0, grown, rounded), huge, kind)
    return m, inside & jnp.logical_not(nan)


FAR = 60
"""Within so many places a number that is subnormal rounds to 0, whether the platform keeps it or not."""


def rounds_as_floats(kind: FixedPoint, frac: Any = 0) -> bool:
    """Whether `round_as_floats` takes a format; learned points are never far."""
    return kind.rounding == "rnd" and kind.overflow != "wrap" and int(np.max(np.abs(frac), initial=0)) <= FAR


def round_as_floats(x: Array, frac: Any, kind: FixedPoint) -> tuple[Array, Array]:
    """Raw integers as floats, and whether the rounded number was inside the range; NaN stays, and is outside."""
    v = x * power_of_two(frac, x.dtype)
    r = jnp.floor(v)
    m = r + jnp.where(v - r >= 0.5, 1, 0).astype(x.dtype)
    lo, hi = raw_range(kind.word, kind.signed, kind.overflow)
    inside = (m >= lo) & (m <= hi)
    if kind.overflow == "sat_zero":
        return jnp.where(inside | jnp.isnan(m), m, 0), inside
    return jnp.clip(m, lo, hi), inside


def divide_and_fit(m: Array, divisor: int, kind: FixedPoint | Any) -> tuple[Array, Array]:
    """Round ``m / divisor`` to an integer, then deal with overflow.

    Args:
        m: int32.
        divisor: 1 to 2^31.
        kind: width, sign and modes, as in `fit`.
    """
    parts = take_apart_int(m)
    by = jnp.uint32(divisor)
    quotient = parts.magnitude // by
    left = parts.magnitude - quotient * by
    half = left >= by - left
    rest = (left > 0) & (left != by - left)
    up = _goes_up(kind.rounding, parts.negative, half, rest, (quotient & 1) != 0)
    return fit(parts.negative, quotient + up.astype(jnp.uint32), jnp.zeros_like(half), kind)


def power_of_two(exponent: Any, dtype: DTypeLike = jnp.float32) -> Array:
    """2^exponent, exact, from its bits; exponents of normal numbers only (−126 to 127 for float32)."""
    kind = jnp.finfo(dtype)
    signed = jnp.int64 if kind.bits == 64 else jnp.int32
    biased = jnp.asarray(exponent, signed) + (2 ** (kind.nexp - 1) - 1)
    return jax.lax.bitcast_convert_type(biased << kind.nmant, jnp.dtype(dtype))
