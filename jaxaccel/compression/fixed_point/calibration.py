"""Binary points from data: where training starts, and all that quantisation after training has.

    F0 = W − 1 − ⌈log2 max|x|⌉                       ``"max"``: the largest number just fits
    F  = argmin over F0 − 1 .. F0 + 4 of Σ (x − cast(x))²      ``"mse"``: finer steps, and the largest saturate

``"mse"`` is clearly better for few bits, and never worse in squared error. Without sign, W takes the place of W − 1.

The start is not given in the paper (Dai et al., arXiv 2401.17544); both rules are common ones.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxaccel.compression.fixed_point.casting import as_floats, cast_and_mask
from jaxaccel.compression.fixed_point.formats import FixedPoint

SEARCH = (0, -1, 1, 2, 3, 4)
"""Steps from F0, of equal errors the first."""


def calibrate(
    tree: Any,
    *,
    word: int | Any,
    method: str | Any = "mse",
    channel_axis: int | None = None,
    signed: bool | Any = True,
    rounding: str | Any = "rnd",
    overflow: str | Any = "sat",
) -> Any:
    """A float f for each array of a tree: parameters, or activations of a batch. Feed them to `trainable_cast`.

    Args:
        tree: array, or pytree of arrays; ``None`` stays.
        word: W.
        method: ``"mse"`` or ``"max"``. A largest number that is next to a power of two may saturate by one step.
        channel_axis: an axis whose entries get a point each, in arrays that have it. The shape of f broadcasts to that
            of its array: [C] for the last axis, [C, 1] for the one before.
        signed: see `FixedPoint`.
        rounding: see `FixedPoint`.
        overflow: see `FixedPoint`; the cast whose error is measured.

    Returns:
        The tree with float32 whole numbers, in [W − 32, W + 31]. Where all is 0, F0 is W − 1 (or W).

    Raises:
        ValueError: for widths and modes that are not known, an empty array, and, outside ``jit``, NaN or infinity.

    >>> calibrate({"w": jnp.array([0.3, -0.9]), "b": jnp.array([3.0])}, word=4)["b"].tolist()
    1.0
    """
    kind = FixedPoint(word, 0, signed, rounding, overflow)
    if method not in ("mse", "max"):
        raise ValueError(f"method is {method!r}, expected 'mse' or 'max'")
    return jax.tree.map(lambda x: _one(as_floats(x), kind, method, channel_axis), tree)


def _one(x: Array, kind: FixedPoint, method: str, channel_axis: int | None) -> Float[Array, "*S"]:
    if x.size == 0:
        raise ValueError(f"an array has shape {x.shape}, expected at least one entry")
    finite = jnp.isfinite(x).all()
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError("an array holds NaN or infinity, expected finite numbers")
    return _search(x, kind, method, channel_axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _search(x: Array, kind: FixedPoint, method: str, channel_axis: int | None) -> Float[Array, "*S"]:
    axes = tuple(range(x.ndim))
    shape: tuple[int, ...] = ()
    if channel_axis is not None and -x.ndim <= channel_axis < x.ndim:
        at = channel_axis % x.ndim
        axes = axes[:at] + axes[at + 1 :]
        shape = (x.shape[at], *(1,) * (x.ndim - at - 1))
    largest = jnp.max(jnp.abs(x), axes).reshape(shape)
    mantissa, exponent = jnp.frexp(largest)
    # largest = mantissa·2^exponent with mantissa in [1/2, 1): an exact ⌈log2⌉, which a rounded logarithm is not.
    ceiling = jnp.where(largest > 0, exponent - (mantissa == 0.5), 0)

    def clamp(F: Array) -> Array:
        return jnp.clip(F, kind.word - 32, kind.word + 31).astype(jnp.int32)

    start = kind.word - kind.signed - ceiling
    if method == "max":
        return clamp(start).astype(jnp.float32)
    tried = jnp.stack([clamp(start + step) for step in SEARCH])

    def error(F: Array) -> Array:
        # Relative to the largest entry: squares of tiny numbers would vanish.
        off = (cast_and_mask(x, F, kind, x.dtype)[0] - x) / jnp.where(largest > 0, largest, 1)
        return jnp.sum(off**2, axes).reshape(shape)

    errors = jax.lax.map(error, tried)
    best = jnp.argmin(errors, 0)
    return jnp.take_along_axis(tried, best[None], 0)[0].astype(jnp.float32)
