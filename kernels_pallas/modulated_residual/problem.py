"""What both kernels share: statistics of a row, the gradient of a row, and how rows of a batch are put in order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Modulated(NamedTuple):
    """What `modulated_residual` gives."""

    x: Array  # [B, N, D] the residual stream with its pending branches, dtype of x
    h: Array  # [B, N, D] normalised and modulated, the input of the next branch, dtype of x


class ModulatedRows(NamedTuple):
    """What `modulated_residual_rows` gives."""

    x: Array  # [B, N, D] the residual stream of all samples, dtype of x
    h: Array  # [R, N, D] input of the next branch, of the samples that compute it; undefined past number
    rows: Array  # int32 [R] which samples these are; B past number
    number: Array  # int32 [] how many there are; above R, h is NaN


def normed(new: Array, width: int, eps: float) -> tuple[Array, Array]:
    """Rows without mean and with unit variance, and 1/σ [..., 1].

    Args:
        new: [..., W] float32, with W ≥ ``width``; what is past ``width`` is 0, and so it stays.
        width: D.
        eps: added to the variance.
    """
    inside = _inside(new, width)
    centred = new - jnp.sum(new, -1, keepdims=True) * (1 / width)
    if inside is not None:
        centred = jnp.where(inside, centred, 0)
    inverse = jax.lax.rsqrt(jnp.sum(centred * centred, -1, keepdims=True) * (1 / width) + eps)
    return centred * inverse, inverse


def _inside(rows: Array, width: int) -> Array | None:
    if rows.shape[-1] == width:
        return None
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1) < width


def pull(unit: Array, inverse: Array, scale: Array, into_new: Array, into_h: Array, width: int) -> Array:
    """Gradient with respect to x′ of rows whose normalised form is ``unit``, all float32 [..., W]."""
    slope = into_h * (1 + scale)
    mean = jnp.sum(slope, -1, keepdims=True) * (1 / width)
    along = jnp.sum(slope * unit, -1, keepdims=True) * (1 / width)
    inside = _inside(unit, width)
    out = inverse * (slope - mean - unit * along)
    return into_new + (out if inside is None else jnp.where(inside, out, 0))


def order_of(compute: Array, limit: int) -> tuple[Array, Array, Array]:
    """Samples that compute first, then the others [B]; ids of the first ``limit``, B past their number; the number."""
    samples = compute.shape[0]
    order = jnp.argsort(~compute, stable=True).astype(jnp.int32)
    count = jnp.sum(compute, dtype=jnp.int32)
    rows = jnp.where(jnp.arange(limit) < count, order[:limit], samples)
    return order, rows, count


def poison(scale: Array, count: Array, limit: int) -> Array:
    """``scale``, NaN where more samples compute than there is room for: an overflow must be seen."""
    return jnp.where(count > limit, jnp.asarray(jnp.nan, scale.dtype), scale)


def dtype_refusal(arrays: Any, allowed: tuple[Any, ...]) -> str | None:
    """Why a kernel cannot take the dtypes of a call, or ``None``."""
    found = sorted({str(a.dtype) for a in arrays})
    if len(found) > 1 or jnp.dtype(found[0]) not in [jnp.dtype(d) for d in allowed]:
        return f"dtypes are {', '.join(found)}, expected one of {', '.join(str(jnp.dtype(d)) for d in allowed)} for all"
    return None
