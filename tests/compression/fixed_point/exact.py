"""Fixed point in exact rational arithmetic, slowly: what the library is compared with."""

import math
from fractions import Fraction

import numpy as np

HALF = Fraction(1, 2)

ROUND = {
    "rnd": lambda v: math.floor(v + HALF),
    "rnd_min_inf": lambda v: math.ceil(v - HALF),
    "rnd_zero": lambda v: (1 if v > 0 else -1) * math.ceil(abs(v) - HALF),
    "rnd_inf": lambda v: (1 if v > 0 else -1) * math.floor(abs(v) + HALF),
    "rnd_conv": round,
    "trn": math.floor,
    "trn_zero": math.trunc,
}


def exact_cast(value: Fraction, fmt) -> int:
    """Raw integer of one number."""
    m = ROUND[fmt.rounding](value * Fraction(2) ** fmt.frac)
    hi = 2 ** (fmt.word - fmt.signed) - 1
    lo = -hi - 1 if fmt.signed else 0
    match fmt.overflow:
        case "wrap":
            return (m - lo) % 2**fmt.word + lo
        case "sat":
            return min(max(m, lo), hi)
        case "sat_zero":
            return m if lo <= m <= hi else 0
        case _:
            return min(max(m, -hi if fmt.signed else 0), hi)


def exact_casts(values, fmt) -> np.ndarray:
    """Raw integers of an array of floats or Fractions."""
    values = np.asarray(values)
    flat = [exact_cast(Fraction(v), fmt) for v in values.ravel().tolist()]
    return np.array(flat, np.int64).reshape(values.shape)
