"""Gradient boosting of trees: each tree takes a Newton step on the loss of those before it.

    g = ∂L/∂F,  h = ∂²L/∂F²,  leaf = −Σ w·g / (Σ w·h + λ),  F ← F + learning_rate·tree(x)

The whole fit is one `jax.lax.scan` over rounds. A loss of K outputs grows K trees a round.

Friedman, Annals of Statistics 29 (2001); Chen and Guestrin, XGBoost, arXiv 1603.02754.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.boosting.losses import (
    Loss,
    check_weight,
    curvatures,
    encode_targets,
    get_loss,
    mean_loss,
    residuals,
)
from jaxaccel.boosting.trees.bins import Bins, apply_bins, has_categories
from jaxaccel.boosting.trees.growing import Tree, check_depth, grow_tree
from jaxaccel.boosting.trees.predicting import predict_trees
from jaxaccel.boosting.trees.splitting import spread


class BoostedTrees(NamedTuple):
    """An ensemble of T rounds with K trees each; leaf values are already scaled by the learning rate."""

    trees: Tree  # [K, T, ...], one output each
    initial: Float[Array, "K"]
    train_loss: Float[Array, "T"]  # after each round, weighted mean over all rows


def boosted_fit(
    bins: Bins,
    x: Any,
    y: Any,
    *,
    loss: str | Loss = "squared",
    n_trees: Any = 100,
    max_depth: Any = 6,
    learning_rate: Any = 0.1,
    reg_lambda: Any = 1.0,
    min_data_in_leaf: Any = 1,
    subsample: Any = 1.0,
    feature_fraction: Any = 1.0,
    sample_weight: Any = None,
    num_classes: int | None = None,
    categorical: bool | None = None,
    key: Any = None,
) -> BoostedTrees:
    """Fit boosted trees.

    Args:
        bins: thresholds, of `fit_bins`.
        x: table ``[n, D]``; NaN goes left at every split.
        y: targets, as `jaxaccel.boosting.losses.encode_targets` takes them.
        loss: name, or a `Loss`.
        n_trees: T, rounds.
        max_depth: of every tree.
        learning_rate: factor of every tree.
        reg_lambda: λ.
        min_data_in_leaf: least rows of a leaf, among those drawn.
        subsample: probability of a row to be seen by a round.
        feature_fraction: share of columns drawn for each node.
        sample_weight: ``[n]``, not negative and not all zero.
        num_classes: of softmax.
        categorical: ``False`` says that no column is, and saves time under ``jit``; elsewhere it is looked up.
        key: of what is drawn.

    Raises:
        ValueError: for settings out of range, targets and weights that are not finite, labels of one class,
            and losses that stop being finite (which cannot be seen under ``jit``).

    Example:
        >>> from jaxaccel.boosting.trees import fit_bins
        >>> x = jnp.arange(4.0)[:, None]
        >>> fit = boosted_fit(fit_bins(x, n_bins=3), x, jnp.array([0.0, 0, 1, 1]), n_trees=1, max_depth=1,
        ...                   learning_rate=1.0, reg_lambda=0.0)
        >>> boosted_predict(fit, x)[:, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    if isinstance(n_trees, bool) or not isinstance(n_trees, int) or n_trees < 1:
        raise ValueError(f"n_trees is {n_trees!r}, expected an integer of at least 1")
    if not _traced(learning_rate) and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}, expected above 0")
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample is {subsample}, expected above 0 and at most 1")
    if key is None and (subsample < 1 or feature_fraction < 1):
        raise ValueError("key is None, expected a key: rows or features are drawn")
    binned = apply_bins(bins, x)
    n = binned.shape[1]
    chosen = get_loss(loss)
    targets = encode_targets(y, loss, num_classes=num_classes)
    if targets.shape[0] != n:
        raise ValueError(f"y has {targets.shape[0]} rows, expected {n} as x has")
    check_weight(sample_weight, n)
    weight = jnp.ones(n) if sample_weight is None else jnp.asarray(sample_weight, jnp.float32)
    if loss in ("logistic", "softmax") and not _traced(weight) and not _traced(y):
        left = np.unique(np.asarray(y)[np.asarray(weight) > 0])
        if len(left) < 2:
            raise ValueError(f"y must hold at least two classes among rows of positive weight, got {left.tolist()}")
    # Kinds are kept apart: a depth of 2.0 must not find the program of 2.
    settings = (check_depth(max_depth), float(reg_lambda), float(min_data_in_leaf), float(feature_fraction))
    key = jax.random.key(0) if key is None else key
    kinds = has_categories(bins) if categorical is None else bool(categorical)
    # Second derivatives of 1 are counts already.
    unit = not chosen.newton and sample_weight is None
    fit = _fit(bins, binned, targets, weight, learning_rate, key, loss=chosen, n_trees=n_trees,
               subsample=float(subsample), settings=settings, unit=unit, categorical=kinds)  # fmt: skip
    if not _traced(fit.train_loss) and not np.isfinite(np.asarray(fit.train_loss)).all():
        raise ValueError("the loss is not finite: gradients are NaN or infinite, or targets too large for float32")
    return fit


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


@functools.partial(jax.jit, static_argnames=("loss", "n_trees", "subsample", "settings", "unit", "categorical"))
def _fit(
    bins: Bins, binned: Array, y: Array, weight: Array, rate: Any, key: Array, *, loss: Loss, n_trees: int,
    subsample: float, settings: tuple[Any, ...], unit: bool, categorical: bool,
) -> BoostedTrees:  # fmt: skip
    depth, penalty, least, fraction = settings
    initial = loss.initial(y, weight)
    ordered = spread(binned, bins.thresholds.shape[1] + 1)
    f = jnp.broadcast_to(initial, (len(weight), len(initial)))

    def one_round(f: Array, number: Array) -> tuple[Array, Any]:
        draw = jax.random.fold_in(key, number)
        seen = weight
        if subsample < 1:
            seen = weight * jax.random.bernoulli(jax.random.fold_in(draw, 0), subsample, weight.shape)
        slope, bend = -residuals(loss, f, y), curvatures(loss, f, y)

        def one_output(parts: Any) -> tuple[Tree, Array]:
            g, h, k = parts
            tree, leaf = grow_tree(
                bins, binned, jnp.stack([seen * g, seen * h], 1), max_depth=depth, score="newton", reg_lambda=penalty,
                min_data_in_leaf=least, count=None if unit else (seen > 0).astype(f.dtype), weight_counts=unit,
                feature_fraction=fraction, categorical=categorical, ordered=ordered,
                key=jax.random.fold_in(draw, k + 1),
            )  # fmt: skip
            tree = tree._replace(leaf_value=rate * tree.leaf_value)
            return tree, tree.leaf_value[leaf, 0]

        trees, values = jax.lax.map(one_output, (slope.T, bend.T, jnp.arange(f.shape[1])))
        f = f + values.T
        return f, (trees, mean_loss(loss, f, y, weight))

    _, (trees, losses) = jax.lax.scan(one_round, f, jnp.arange(n_trees))
    return BoostedTrees(jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), trees), initial, losses)


def boosted_predict(fit: BoostedTrees, x: Any, *, stop: Any = None) -> Float[Array, "n K"]:
    """Outputs F of the first ``stop`` rounds, all by default."""
    return _predict(fit, jnp.asarray(x, jnp.float32), stop)


@jax.jit
def _predict(fit: BoostedTrees, x: Array, stop: Any) -> Array:
    values = jax.lax.map(lambda tree: predict_trees(tree, x, stop=stop)[:, 0], fit.trees)
    return fit.initial + values.T
