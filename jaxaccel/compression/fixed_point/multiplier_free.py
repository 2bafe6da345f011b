"""Weights with few ones: products become shifts and additions, and the multipliers of an FPGA are free for other work.

    m = s·Σ_{j ≤ K} 2^{e_j},   m·x = s·Σ_j (x << e_j)          K shifts, K − 1 additions

Integers are sign and magnitude, so −m costs what m does. K = 1 leaves powers of two; K = W − 1 is no restriction. It
brings no speed on CPU, GPU or TPU, where multipliers are there anyway: count what it saves in hardware (`adders`).

Which integer with K ones replaces another is not given in the paper (Dai et al., arXiv 2401.17544); both choices here
are ours. Signed digits (`csd`) need about a third fewer terms than ones do, and adders that can subtract; the canonical
form is Reitwiesner's (Advances in Computers 1, 1960).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Int8

from jaxaccel.compression.fixed_point.formats import check_word


def check_hot(k: Any, word: Any, mode: Any, signed: Any = True) -> None:
    """Raise ``ValueError`` unless ``k`` is a positive integer and ``mode`` is known."""
    check_word(word, signed)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}, expected a positive integer")
    if mode not in ("nearest", "truncate"):
        raise ValueError(f"mode is {mode!r}, expected 'nearest' or 'truncate'")


def integers(m: Any) -> tuple[Array, Array]:
    """Sign, and magnitude as uint32."""
    m = jnp.asarray(m)
    if not jnp.issubdtype(m.dtype, jnp.integer):
        raise ValueError(f"m has dtype {m.dtype}, expected integers")
    return m < 0, jnp.abs(m.astype(jnp.int32)).astype(jnp.uint32)


def _leading(magnitude: Array) -> Array:
    """The highest one alone; 0 of 0."""
    top = jnp.uint32(31) - jnp.minimum(jax.lax.clz(magnitude), jnp.uint32(31))
    return (jnp.uint32(1) << top) & magnitude


def k_hot(
    m: Any, *, k: int | Any, word: int | Any, mode: str | Any = "nearest", signed: bool = True
) -> Int[Array, "*S"]:
    """Integers of at most K ones in place of others.

    Args:
        m: raw integers of a format of W bits.
        k: K, how many ones a magnitude may have.
        word: W. Magnitudes stay up to 2^(W−1) − 1; −2^(W−1) has one 1 and stays as it is.
        mode: ``"nearest"``: the closest integer, of two the smaller magnitude. ``"truncate"``: the K leading ones,
            which is cheaper and biased to zero.
        signed: whether one of the W bits is a sign; magnitudes go up to 2^W − 1 without.

    Returns:
        int32.

    Raises:
        ValueError: for a ``k``, ``word`` or ``mode`` as described, or if ``m`` holds no integers.

    >>> k_hot(jnp.array([7, -11, 5]), k=1, word=5).tolist()
    [8, -8, 4]
    >>> k_hot(jnp.array([7, -11, 5]), k=2, word=5, mode="truncate").tolist()
    [6, -10, 5]
    """
    check_hot(k, word, mode, signed)
    negative, magnitude = integers(m)
    left, last = magnitude, jnp.zeros_like(magnitude)
    for _ in range(min(k, word)):
        one = _leading(left)
        left, last = left - one, jnp.where(one > 0, one, last)
    below = magnitude - left
    if mode == "nearest":
        # Between ``below`` and the next integer with as few ones, the last of them carried, all have more.
        above = below + last
        fits = above <= jnp.uint32(2 ** (word - signed) - 1)
        below = jnp.where((left > 0) & fits & (above - magnitude < left), above, below)
    kept = below.astype(jnp.int32)
    return jnp.where(negative, -kept, kept)


def csd_digits(m: Any, *, word: int | Any) -> Int8[Array, "*S D"]:
    """Canonical signed digits: ``m = Σ_j d_j·2^j``, d_j in {−1, 0, 1}, no two neighbours both set.

    No other form with signed digits has fewer of them.

    Args:
        m: raw integers of a format of W bits.
        word: W.

    Returns:
        W + 1 digits, the lowest first.

    Raises:
        ValueError: for a ``word`` out of range, or if ``m`` holds no integers.

    >>> csd_digits(7, word=4).tolist()
    [-1, 0, 0, 1, 0]
    """
    check_word(word, False)
    negative, magnitude = integers(m)
    plus, minus = _signed_digits(magnitude)
    place = jnp.arange(word + 1, dtype=jnp.uint32)

    def bits(number: Array) -> Array:
        return ((number[..., None] >> place) & 1).astype(jnp.int8)

    digits = bits(plus) - bits(minus)
    return jnp.where(negative[..., None], -digits, digits)


def _signed_digits(magnitude: Array) -> tuple[Array, Array]:
    """Places of the digits 1, and of the digits −1."""
    half = magnitude >> 1
    together = magnitude + half
    changed = half ^ together
    return together & changed, half & changed


def csd(m: Any, *, k: int | Any, word: int | Any, signed: bool = True) -> Int[Array, "*S"]:
    """Integers of at most K signed digits in place of others: the K leading canonical ones.

    The largest error is about half of that of K ones. Where the result would leave the format, `k_hot` is taken, whose
    nearest integer has K ones and so K digits.

    Arguments and errors are those of `k_hot`.

    >>> csd(jnp.array([7, 14, 15]), k=1, word=5).tolist(), csd(jnp.array([7, 14, 15]), k=2, word=5).tolist()
    ([8, 8, 8], [7, 14, 15])
    """
    nearest = k_hot(m, k=k, word=word, signed=signed)
    negative, magnitude = integers(m)
    plus, minus = _signed_digits(magnitude)
    value = jnp.zeros_like(magnitude)
    for _ in range(min(k, word + 1)):
        digit = _leading(plus | minus)
        up = (digit & plus) > 0
        value = jnp.where(up, value + digit, value - digit)
        plus, minus = plus & ~digit, minus & ~digit
    fits = value <= jnp.uint32(2 ** (word - signed) - 1)
    kept = value.astype(jnp.int32)
    return jnp.where(fits, jnp.where(negative, -kept, kept), nearest)


def count_ones(m: Any, *, digits: str | Any = "ones") -> Int[Array, "*S"]:
    """Terms of each integer: ones of its magnitude, or its canonical signed digits.

    Args:
        m: integers.
        digits: ``"ones"`` or ``"csd"``.

    Raises:
        ValueError: for other ``digits``, or if ``m`` holds no integers.

    >>> count_ones(jnp.array([0, -7, 8])).tolist(), count_ones(7, digits="csd").tolist()
    ([0, 3, 1], 2)
    """
    if digits not in ("ones", "csd"):
        raise ValueError(f"digits is {digits!r}, expected 'ones' or 'csd'")
    _, magnitude = integers(m)
    if digits == "ones":
        return jax.lax.population_count(magnitude).astype(jnp.int32)
    plus, minus = _signed_digits(magnitude)
    return jax.lax.population_count(plus | minus).astype(jnp.int32)


class Cost(NamedTuple):
    """What a circuit of constant weights, all in parallel, consists of; int32 scalars."""

    shifts: Array  # terms; a shift by a constant is wiring
    adders: Array  # two-input additions of shifted inputs, to all outputs together
    multipliers: Array  # what it would take instead: weights that are neither 0 nor a power of two


def adders(w: Any, *, axis: int = 0, digits: str | Any = "ones") -> Cost:
    """Shifts and additions that ``x @ w`` takes with shifts for products, and the multipliers that they replace.

    An estimate by counting: tools share terms, put several small products into one DSP block, and use adders in blocks
    for multiplication as well.

    Args:
        w: raw integers; [K, N] for K inputs and N outputs.
        axis: the axis that is summed, K's.
        digits: ``"ones"``, or ``"csd"`` where adders may subtract.

    Raises:
        ValueError: as `count_ones` does.

    >>> [int(n) for n in adders(jnp.array([[3, 4], [1, 0]]))]
    [4, 2, 1]
    """
    terms = count_ones(w, digits=digits)
    each = terms.sum(axis)
    return Cost(terms.sum(), jnp.maximum(each - 1, 0).sum(), (count_ones(w) > 1).sum())
