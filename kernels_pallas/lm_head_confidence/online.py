"""Running statistics of logits that arrive in parts: what every implementation keeps instead of the logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where a maximum starts: finite, so that a difference of two is never NaN by itself."""


class Stats(NamedTuple):
    """Of all logits seen, for each row: arrays of one shape."""

    top: Array  # f32, their maximum, `forbid` among them
    total: Array  # f32, sum of exp(logit − top)
    best: Array  # f32, maximum of those that may be chosen
    place: Array  # where it is: int32 outside of kernels, float32 inside (exact below 2²⁴)


def merge(stats: Stats, axis: int) -> Stats:
    """One of many parts, which lie along ``axis`` in the order of the vocabulary: the first of equals wins."""
    top = stats.top.max(axis, keepdims=True)
    total = (stats.total * jnp.exp(stats.top - top)).sum(axis)
    first = jnp.argmax(stats.best, axis, keepdims=True)
    best, place = (jnp.take_along_axis(x, first, axis).squeeze(axis) for x in (stats.best, stats.place))
    return Stats(top.squeeze(axis), total, best, place)


def answer(stats: Stats) -> tuple[Array, Array]:
    """Token and confidence. A NaN among the logits is in the total; where all are −∞ there is no probability: NaN."""
    confidence = jnp.exp(stats.best - stats.top) / stats.total
    return stats.place.astype(jnp.int32), jnp.where(stats.total == 0, jnp.nan, confidence)


def update(stats: Stats, logits: Array, column: Array, forbid: int, size: int) -> Stats:
    """Add logits ``[R, C]`` of the tokens ``column [1, C]``; statistics are ``[R, 1]``. Columns from ``size`` are none.

    Where it runs in a kernel, reductions keep their axis and columns are floats: that is what its compiler has.
    """
    logits = jnp.where(column < size, logits, -jnp.inf)
    top = jnp.maximum(stats.top, logits.max(1, keepdims=True))
    total = stats.total * jnp.exp(stats.top - top) + jnp.exp(logits - top).sum(1, keepdims=True)
    allowed = logits if forbid < 0 else jnp.where(column == forbid, -jnp.inf, logits)
    best = allowed.max(1, keepdims=True)
    beyond = jnp.asarray(size, column.dtype)
    place = jnp.where(allowed == best, column, beyond).min(1, keepdims=True)
    # Later columns must be strictly better: of equal ones the first stays. NaN is never better, and is in the total.
    better = best > stats.best
    return Stats(top, total, jnp.where(better, best, stats.best), jnp.where(better, place, stats.place))


def start(shape: tuple[int, ...], place: jnp.dtype, forbid: int) -> Stats:
    """Of no logits at all. Where none is ever better the place stays: it must not be the forbidden one."""
    lowest = jnp.full(shape, LOWEST, jnp.float32)
    return Stats(lowest, jnp.zeros(shape, jnp.float32), lowest, jnp.full(shape, int(forbid == 0), place))
