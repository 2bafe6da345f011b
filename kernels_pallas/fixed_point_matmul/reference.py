"""The equation in NumPy with 64 bits, as the modes are defined: what every implementation is tested against."""

from typing import Any

import numpy as np

_ROUND: dict[str, Any] = {
    "rnd": lambda v: np.floor(v + 0.5),
    "rnd_min_inf": lambda v: np.ceil(v - 0.5),
    "rnd_zero": lambda v: np.sign(v) * np.ceil(np.abs(v) - 0.5),
    "rnd_inf": lambda v: np.sign(v) * np.floor(np.abs(v) + 0.5),
    "rnd_conv": np.round,
    "trn": np.floor,
    "trn_zero": np.trunc,
}


def finish(total: Any, shift: int, rounding: str, overflow: str, word: int) -> Any:
    """int8 of integers that 32 bits hold: float64 holds them, their halves and their sums with one half."""
    m = _ROUND[rounding](np.asarray(total, np.float64) * 2.0**-shift).astype(np.int64)
    lo, hi = -(2 ** (word - 1)), 2 ** (word - 1) - 1
    if overflow == "wrap":
        m = (m - lo) % 2**word + lo
    elif overflow == "sat_zero":
        m = np.where((m < lo) | (m > hi), 0, m)
    else:
        m = np.clip(m, -hi if overflow == "sat_sym" else lo, hi)
    return m.astype(np.int8)


def reference(x: Any, w: Any, bias: Any, shift: int, rounding: str, overflow: str, word: int) -> Any:
    """The op on arrays [M, K], [K, N] and [N] or ``None``."""
    total = np.asarray(x, np.int64) @ np.asarray(w, np.int64)
    return finish(total if bias is None else total + np.asarray(bias, np.int64), shift, rounding, overflow, word)
