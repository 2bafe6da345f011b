"""A matrix product in fixed point: int8 times int8, summed in int32, and cast to int8 before anything is written.

    y = overflow(round((x @ w + b) / 2^s))       x: m·2^(−Fx), w: m·2^(−Fw), b: m·2^(−Fx−Fw), y: m·2^(−Fy)
    s = Fx + Fw − Fy

The bias is on the grid of the sums, so that adding it is exact; the shift rounds once; overflow saturates or wraps.
These are the modes of ap_fixed. Written as int8, results take a quarter of the traffic of the sums themselves.

When to use it: layers between which numbers stay in 8 bits, on TPUs and GPUs; the bits are those of hardware with such
words. When not: where the next operation needs the wide sums. On CPU and GPU it is what XLA makes of the equation, and
the cast is one more pass: on an H200 the library's product of int8 took a sixth of the kernel's time, sums written in
int32 and all, so that the GPU kernel runs only where it is named. There are no gradients: training goes through casts
of floats.

Over several devices: shard rows or columns. Sharded terms need the sums themselves, which only ``"xla"`` adds over
devices.

The modes are those of AMD's UG1399; the arithmetic is that of Dai et al., arXiv 2401.17544.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from kernels_pallas.arrays import vary_alike
from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.fixed_point_matmul import gpu, tpu, xla
from kernels_pallas.fixed_point_matmul.epilogue import OVERFLOWS, ROUNDINGS

__all__ = ["fixed_point_matmul"]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""
RUN = {"xla": xla.matmul, "pallas_tpu": tpu.matmul, "pallas_gpu": gpu.matmul}
SLOWER = ("pallas_gpu",)
"""Measured at one to 4096 rows: see docs/proving.md."""
MOST_TERMS = (2**31 - 1) // 2**14
"""int32 holds a sum of so many products."""


def _check(x: Array, w: Array, bias: Array | None, shift: Any, rounding: Any, overflow: Any, word: Any) -> None:
    for name, array, dtype in (("x", x, jnp.int8), ("w", w, jnp.int8), ("bias", bias, jnp.int32)):
        if array is not None and array.dtype != dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, expected {jnp.dtype(dtype)}")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0] or 0 in (*x.shape, *w.shape):
        raise ValueError(f"x has shape {x.shape} and w {w.shape}: expected [..., K] and [K, N], none of them zero")
    if w.shape[0] > MOST_TERMS:
        raise ValueError(f"there are {w.shape[0]} terms, expected at most {MOST_TERMS}: int32 might overflow")
    if bias is not None and bias.shape != w.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape}, expected {w.shape[1:]} as w is {w.shape}")
    for name, value, lo, hi in (("shift", shift, 0, 31), ("word", word, 2, 8)):
        if isinstance(value, bool) or not isinstance(value, int) or not lo <= value <= hi:
            raise ValueError(f"{name} is {value!r}, expected a Python integer from {lo} to {hi}")
    for name, value, known in (("rounding", rounding, ROUNDINGS), ("overflow", overflow, OVERFLOWS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def fixed_point_matmul(
    x: Shaped[Array, "*_"],
    w: Shaped[Array, "*_"],
    bias: Shaped[Array, "*_"] | None = None,
    *,
    shift: Any,
    rounding: Any = "rnd",
    overflow: Any = "sat",
    word: Any = 8,
    implementation: str | None = None,
) -> Shaped[Array, "*_"]:
    """Product, bias, shift and overflow in one pass: see the module.

    Args:
        x: raw integers [..., K], int8.
        w: raw integers [K, N], int8.
        bias: int32 [N] on the grid of the sums. Sums with it must stay inside int32; beyond they wrap.
        shift: s, 0 to 31; static.
        rounding: ``"rnd"``, ``"rnd_zero"``, ``"rnd_min_inf"``, ``"rnd_inf"``, ``"rnd_conv"``, ``"trn"`` or
            ``"trn_zero"``; ties of ``"rnd"`` go up.
        overflow: ``"sat"``, ``"sat_zero"``, ``"sat_sym"`` or ``"wrap"``.
        word: bits of the result, 2 to 8, one of them the sign.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        int8 [..., N]: the same bits from every implementation.

    Raises:
        ValueError: for shapes that do not fit, more terms than int32 holds, a shift, word or mode that is not
            known, an implementation that is unknown or cannot take the call.
        TypeError: for other dtypes.

    >>> x, w = jnp.array([[3, -1], [100, 100]], jnp.int8), jnp.array([[2], [1]], jnp.int8)
    >>> fixed_point_matmul(x, w, shift=1).tolist()
    [[3], [127]]
    """
    _check(x, w, bias, shift, rounding, overflow, word)
    refusals = {"pallas_tpu": tpu.refusal(x, w), "pallas_gpu": gpu.refusal(x, w)}
    name = resolve_implementation(implementation, AVAILABLE, refusals=refusals, slower=SLOWER)
    return run(name, x, w, bias, shift, rounding, overflow, word)


def run(
    name: str, x: Array, w: Array, bias: Array | None, shift: int, rounding: str, overflow: str, word: int,
    interpret: Any = False,
) -> Array:  # fmt: skip
    """An implementation by name, also inside ``jax.shard_map``."""
    rows = x.reshape(-1, x.shape[-1])
    if bias is None:
        rows, w = vary_alike(rows, w)
    else:
        rows, w, bias = vary_alike(rows, w, bias)
    y: Array = RUN[name](rows, w, bias, shift, rounding, overflow, word, interpret=interpret)
    return y.reshape(*x.shape[:-1], w.shape[1])
