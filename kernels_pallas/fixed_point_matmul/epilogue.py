"""From a sum in int32 to a word of a few bits: add, shift with rounding, deal with overflow, all in integers.

What a shift by s cuts off is compared with one half, so that nothing is added that could overflow:

    q = ⌊a / 2^s⌋,   cut = a − q·2^s,   half = 2^(s−1)
    rnd: q + [cut ≥ half]         rnd_zero: ties towards zero        trn: q
    rnd_min_inf: q + [cut > half]   rnd_inf: ties away from zero       trn_zero: q + [a < 0 and cut ≠ 0]
    rnd_conv: ties to even
"""

import jax.numpy as jnp
from jax import Array

ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap")


def shifted(a: Array, shift: int, rounding: str) -> Array:
    """``a / 2^shift``, rounded; int32."""
    if shift == 0:
        return a
    q = a >> shift
    if rounding == "trn":
        return q
    if rounding == "rnd":  # the highest digit that is cut off
        return q + ((a >> (shift - 1)) & 1)
    cut, half = a & (2**shift - 1), 2 ** (shift - 1)
    if rounding == "rnd_min_inf":
        up = cut > half
    elif rounding == "rnd_zero":
        up = cut > jnp.where(a < 0, half - 1, half)
    elif rounding == "rnd_inf":
        up = cut > jnp.where(a < 0, half, half - 1)
    elif rounding == "rnd_conv":
        up = cut > jnp.where((q & 1) == 1, half - 1, half)
    else:
        up = cut > jnp.where(a < 0, 0, 2**shift - 1)
    return q + jnp.where(up, 1, 0)


def fitted(m: Array, word: int, overflow: str) -> Array:
    """``m`` in a signed word; int32."""
    hi = 2 ** (word - 1) - 1
    if overflow == "wrap":
        return (m << (32 - word)) >> (32 - word)
    if overflow == "sat_zero":
        return jnp.where((m < -hi - 1) | (m > hi), 0, m)
    return jnp.clip(m, -hi if overflow == "sat_sym" else -hi - 1, hi)


def finish(total: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int) -> Array:
    """int8 of a sum in int32."""
    if bias is not None:
        total = total + bias
    return fitted(shifted(total, shift, rounding), word, overflow).astype(jnp.int8)
