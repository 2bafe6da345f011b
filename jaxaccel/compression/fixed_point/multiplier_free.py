"""Weights with few ones: products become shifts and additions, and the multipliers of an FPGA are free for other work.

    m = s·Σ_{j ≤ K} 2^{e_j},   m·x = s·Σ_j (x << e_j)          K shifts, K − 1 additions

Integers are sign and magnitude, so −m costs what m does. K = 1 leaves powers of two; K = W − 1 is no restriction. It
brings no speed on CPU, GPU or TPU, where multipliers are there anyway: count what it saves in hardware (`adders`).

Which integer with K ones replaces another is not given in the paper (Dai et al., arXiv 2401.17544); both choices here
are ours. Signed digits (`csd`) need about a third fewer terms than ones do, and an adder that can subtract; the canonical
form is Reitwiesner's (Advances in Computers 1, 1960).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jaxaccel.compression.fixed_point.formats import check_word


def check_hot(k: Any, word: Any, mode: Any) -> None:
    """Raise ``ValueError`` unless ``k`` is a positive integer and ``mode`` is known."""
    check_word(word, False)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}, expected a positive integer")
    if mode not in ("nearest", "truncate"):
        raise ValueError(f"mode is {mode!r}, expected 'nearest' or 'truncate'")


def _integers(m: Any) -> tuple[Array, Array]:
    """Sign, and magnitude as uint32."""
    m = jnp.asarray(m)
    if not jnp.issubdtype(m.dtype, jnp.integer):
        raise ValueError(f"m has dtype {m.dtype}, expected integers")
    return m < 0, jnp.abs(m.astype(jnp.int32)).astype(jnp.uint32)


def _leading(magnitude: Array) -> Array:
    """The highest one alone; 0 of 0."""
    top = jnp.uint32(31) - jnp.minimum(jax.lax.clz(magnitude), jnp.uint32(31))
    return (jnp.uint32(1) << top) & magnitude


def k_hot(m: Any, *, k: int, word: int, mode: str = "nearest") -> Int[Array, "*S"]:
    """Integers of at most K ones in place of others.

    Args:
        m: raw integers of a format of W bits.
        k: K, how many ones a magnitude may have.
        word: W. Magnitudes stay up to 2^(W−1) − 1; −2^(W−1) has one 1 and stays as it is.
        mode: ``"nearest"``: the closest integer, of two the smaller magnitude. ``"truncate"``: the K leading ones, which
            is cheaper and biased to zero.

    Returns:
        int32.

    Raises:
        ValueError: for a ``k``, ``word`` or ``mode`` as described, or if ``m`` holds no integers.

    >>> k_hot(jnp.array([7, -11, 5]), k=1, word=5).tolist()
    [8, -8, 4]
    >>> k_hot(jnp.array([7, -11, 5]), k=2, word=5, mode="truncate").tolist()
    [6, -10, 5]
    """
    check_hot(k, word, mode)
    negative, magnitude = _integers(m)
    left, last = magnitude, jnp.zeros_like(magnitude)
    for _ in range(min(k, word)):
        one = _leading(left)
        left, last = left - one, jnp.where(one > 0, one, last)
    below = magnitude - left
    if mode == "nearest":
        # Between ``below`` and the next integer with as few ones, the last of them carried, all have more.
        above = below + last
        fits = above <= jnp.uint32(2 ** (word - 1) - 1)
        below = jnp.where((left > 0) & fits & (above - magnitude < left), above, below)
    kept = below.astype(jnp.int32)
    return jnp.where(negative, -kept, kept)
