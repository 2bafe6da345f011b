"""Thresholds that trees may split at, and tables as numbers of bins.

A column of numbers has thresholds t₀ ≤ t₁ ≤ …, and the bin of x is how many of them are smaller than x: x > t_b exactly
where its bin is larger than b. A column of categories (whole numbers) has the category t_b as bin b, and one bin more
for all others. NaN is larger than nothing and equal to nothing: it goes left at every split.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

METHODS = ("quantile", "uniform", "midpoint")


class Bins(NamedTuple):
    """Thresholds of ``D`` columns, at most ``B`` each; those that a column lacks are infinite."""

    thresholds: Float[Array, "D B"]  # ascending
    n_valid: Int[Array, "D"]  # int32, how many of them may be split at
    is_categorical: Bool[Array, "D"]


def _sort(column: Array) -> Array:
    """In ascending order, NaN last. As whole numbers: XLA's sort of floats takes six times as long on CPU."""
    bits = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(column), jnp.nan, column), jnp.int32)
    flip = 0x7FFFFFFF  # negative floats run backwards
    ordered = jnp.sort(jnp.where(bits < 0, bits ^ flip, bits))
    return jax.lax.bitcast_convert_type(jnp.where(ordered < 0, ordered ^ flip, ordered), jnp.float32)


def _quantile(column: Array, n_bins: int) -> tuple[Array, Array]:
    return _groups(_sort(column), n_bins)


def _groups(ordered: Array, n_bins: int) -> tuple[Array, Array]:
    known = jnp.sum(~jnp.isnan(ordered))
    size, larger = known // (n_bins + 1), known % (n_bins + 1)
    group = jnp.arange(1, n_bins + 1)
    last = group * size + jnp.minimum(group, larger) - 1
    picked = ordered[jnp.maximum(last, 0)]
    return jnp.where(known > 0, picked, jnp.inf), jnp.where(known > 0, n_bins, 0)


def _uniform(column: Array, n_bins: int) -> tuple[Array, Array]:
    low, high = jnp.nanmin(column), jnp.nanmax(column)
    step = (high - low) / n_bins
    picked = low + jnp.arange(n_bins, dtype=column.dtype) * step
    known = ~jnp.isnan(low)
    return jnp.where(known, picked, jnp.inf), jnp.where(known, n_bins, 0)


def _midpoint(column: Array, n_bins: int) -> tuple[Array, Array]:
    ordered = _sort(column)
    new = jnp.concatenate([~jnp.isnan(ordered[:1]), ordered[1:] > ordered[:-1]])
    distinct = new.sum()
    # Few values: between all of them. Many: after each of equally large groups, where the value changes.
    few = distinct <= n_bins + 1
    lower = jax.lax.cond(
        few,
        lambda: ordered[jnp.nonzero(new, size=n_bins, fill_value=0)[0]],
        lambda: _groups(ordered, n_bins)[0],
    )
    known = jnp.sum(~jnp.isnan(column))
    after = jnp.searchsorted(ordered[: len(column)], lower, side="right")
    upper = ordered[jnp.minimum(after, len(column) - 1)]
    middle = lower + (upper - lower) / 2
    middle = jnp.where(middle < upper, middle, lower)  # of two neighbouring floats
    fresh = jnp.concatenate([jnp.ones(1, bool), lower[1:] > lower[:-1]])
    usable = (after < known) & fresh & jnp.where(few, jnp.arange(n_bins) < distinct - 1, True)
    return jnp.sort(jnp.where(usable, middle, jnp.inf)), usable.sum()


def _categories(column: Array, weight: Array, n_bins: int) -> tuple[Array, Array, Array]:
    order = jnp.argsort(column)
    ordered = column[order]
    new = jnp.concatenate([~jnp.isnan(ordered[:1]), ordered[1:] > ordered[:-1]])
    place = jnp.where(jnp.isnan(ordered), -1, jnp.cumsum(new) - 1)
    rows = len(column)
    counts = jax.ops.segment_sum(jnp.ones(rows, weight.dtype), place, num_segments=rows)
    means = jax.ops.segment_sum(weight[order], place, num_segments=rows) / jnp.maximum(counts, 1)
    value = jax.ops.segment_max(ordered, place, num_segments=rows)
    best, which = jax.lax.top_k(jnp.where(counts > 0, means, -jnp.inf), min(n_bins, rows))
    kept = jnp.sort(jnp.where(best > -jnp.inf, value[which], jnp.inf))
    kept = jnp.pad(kept, (0, n_bins - len(kept)), constant_values=jnp.inf)
    return kept, jnp.sum(kept < jnp.inf), new.sum()


def _columns(categorical: Any, columns: int) -> tuple[int, ...]:
    chosen = () if categorical is None else tuple(int(c) for c in categorical)
    if any(not 0 <= c < columns for c in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"categorical is {chosen}, expected different columns of the {columns} of x")
    return chosen


def check_table(x: Any, columns: int | None = None) -> None:
    """Refuse what is no table ``[n, D]`` of reals, or holds infinities; NaN is allowed."""
    shape = jnp.shape(x)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"x has shape {shape}, expected [rows, columns] with at least one of each")
    if columns is not None and shape[1] != columns:
        raise ValueError(f"x has {shape[1]} columns, expected {columns}")
    if not isinstance(x, jax.core.Tracer) and np.isinf(np.asarray(x, np.float32)).any():
        raise ValueError("x holds infinities (of float32), expected finite numbers or NaN")


def has_categories(bins: Bins) -> bool:
    """Whether any column may be one of categories; under ``jit``, where that cannot be seen, yes."""
    kinds = bins.is_categorical
    return isinstance(kinds, jax.core.Tracer) or bool(np.asarray(kinds).any())


def fit_bins(
    x: Any,
    *,
    n_bins: Any = 255,
    method: str = "quantile",
    categorical: Sequence[int] | None = None,
    category_weight: Any = None,
) -> Bins:
    """Thresholds of every column.

    Args:
        x: table ``[n, D]``; NaN is left out. Categories are whole numbers below 2²⁴.
        n_bins: B, thresholds of a column; up to 255 bins are kept in a byte.
        method: ``"quantile"``: the largest value of each of B + 1 groups of equal size but the last, duplicates and
            all; ``"uniform"``: B equal steps from the smallest value on; ``"midpoint"``: between the last value of a
            group and the next one, and between all values where there are at most B + 1, which generalises better.
        categorical: columns of categories; static.
        category_weight: ``[n]``; of more than B categories those with the largest mean weight are kept.

    Raises:
        ValueError: for a table that is none, ``n_bins`` below 1, an unknown method, columns that do not exist, and more
            than B categories without a ``category_weight`` (which cannot be seen under ``jit``).

    The first two methods are those of GBRL, arXiv 2407.08250.

    Example:
        >>> fit_bins(jnp.array([[1.0], [2.0], [3.0], [4.0]]), n_bins=1).thresholds.tolist()
        [[2.0]]
        >>> fit_bins(jnp.array([[1.0], [2.0], [3.0]]), n_bins=2, method="midpoint").thresholds.tolist()
        [[1.5, 2.5]]
    """
    check_table(x)
    if isinstance(n_bins, bool) or not isinstance(n_bins, int):
        raise TypeError(f"n_bins is {n_bins!r}, expected an integer")
    if not 1 <= n_bins < 2**15:
        raise ValueError(f"n_bins is {n_bins}, expected 1 to {2**15 - 1}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    chosen = _columns(categorical, jnp.shape(x)[1])
    if category_weight is not None and jnp.shape(category_weight) != (jnp.shape(x)[0],):
        raise ValueError(f"category_weight has shape {jnp.shape(category_weight)}, expected ({jnp.shape(x)[0]},)")
    weight = jnp.ones(jnp.shape(x)[0]) if category_weight is None else jnp.asarray(category_weight, jnp.float32)
    bins, distinct = _fit(jnp.asarray(x, jnp.float32), weight, n_bins=n_bins, method=method, chosen=chosen)
    if category_weight is None and chosen and not isinstance(distinct, jax.core.Tracer) and distinct.max() > n_bins:
        raise ValueError(
            f"column {chosen[int(distinct.argmax())]} has {int(distinct.max())} categories, expected at most n_bins, "
            f"which is {n_bins}: raise it, or pass category_weight"
        )
    return bins


@functools.partial(jax.jit, static_argnames=("n_bins", "method", "chosen"))
def _fit(x: Array, weight: Array, *, n_bins: int, method: str, chosen: tuple[int, ...]) -> tuple[Bins, Array]:
    numeric = [c for c in range(x.shape[1]) if c not in chosen]
    thresholds = jnp.full((x.shape[1], n_bins), jnp.inf)
    n_valid, distinct = jnp.zeros(x.shape[1], jnp.int32), jnp.zeros(0, jnp.int32)
    if numeric:
        one = {"quantile": _quantile, "uniform": _uniform, "midpoint": _midpoint}[method]
        found, valid = jax.lax.map(lambda column: one(column, n_bins), x[:, jnp.array(numeric)].T)
        thresholds = thresholds.at[jnp.array(numeric)].set(found)
        n_valid = n_valid.at[jnp.array(numeric)].set(valid.astype(jnp.int32))
    if chosen:
        columns = x[:, jnp.array(chosen)].T
        found, valid, distinct = jax.vmap(lambda column: _categories(column, weight, n_bins))(columns)
        thresholds = thresholds.at[jnp.array(chosen)].set(found)
        n_valid = n_valid.at[jnp.array(chosen)].set(valid.astype(jnp.int32))
    return Bins(thresholds, n_valid, jnp.asarray(np.isin(np.arange(x.shape[1]), chosen))), distinct


def apply_bins(bins: Bins, x: Any) -> Shaped[Array, "D n"]:
    """Bins of a table's cells ``[D, n]``, uint8 for up to 255 thresholds, else int16.

    Raises:
        ValueError: for a table that is none, or has other columns.

    Example:
        >>> bins = fit_bins(jnp.array([[1.0], [2.0], [3.0], [4.0]]), n_bins=1)
        >>> apply_bins(bins, jnp.array([[2.0], [2.5], [jnp.nan]]))
        Array([[0, 1, 0]], dtype=uint8)
    """
    check_table(x, bins.thresholds.shape[0])
    return _apply(bins, jnp.asarray(x, jnp.float32))


@jax.jit
def _apply(bins: Bins, x: Array) -> Array:
    n_bins = bins.thresholds.shape[1]
    steps = n_bins.bit_length()
    ceiling = jnp.pad(bins.thresholds, ((0, 0), (0, 2**steps - n_bins)), constant_values=jnp.inf)

    def one(parts: tuple[Array, Array, Array]) -> Array:
        column, thresholds, is_categorical = parts
        # Thresholds below, by bisection; `jnp.searchsorted` takes six times as long on CPU.
        place = jnp.zeros(column.shape, jnp.int32)
        for step in (2**i for i in reversed(range(steps))):
            place = place + jnp.where(thresholds.at[place + step - 1].get(mode="promise_in_bounds") < column, step, 0)
        equal = thresholds[place] == column
        number = jnp.where(is_categorical & ~equal, n_bins, place)
        number = jnp.where(jnp.isnan(column) & ~is_categorical, 0, number)
        return number.astype(jnp.uint8 if n_bins <= 255 else jnp.int16)

    return jax.lax.map(one, (x.T, ceiling, bins.is_categorical))
