"""Random forests and extra-trees: trees grown apart from each other, their values averaged.

Rows are drawn with replacement, as whole numbers that multiply their weights; those that a tree did not draw estimate
its error ("out of bag"). Every node sees columns of its own; extra-trees also draw one threshold for each of them.

Breiman, Random Forests, Machine Learning 45 (2001); Geurts, Ernst and Wehenkel, Machine Learning 63 (2006).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxaccel.boosting.losses import check_weight
from jaxaccel.boosting.trees.bins import Bins, apply_bins, has_categories
from jaxaccel.boosting.trees.deep import MAX_DEPTH, DeepTree, grow_deep_tree
from jaxaccel.boosting.trees.growing import check_depth
from jaxaccel.boosting.trees.predicting import predict_trees
from jaxaccel.boosting.trees.splitting import spread


class Forest(NamedTuple):
    """T trees of O outputs; `jaxaccel.boosting.trees.feature_importances` takes ``trees``."""

    trees: DeepTree  # [T, ...]
    centre: Float[Array, "O"]  # what was taken from targets, and is added to the trees' mean
    out_of_bag: Float[Array, "n O"]  # mean of the trees that did not draw a row; NaN if all did


def forest_fit(
    bins: Bins,
    x: Any,
    y: Any,
    key: Any,
    *,
    n_trees: Any = 100,
    max_depth: Any = 10,
    max_leaves: Any = None,
    min_data_in_leaf: Any = 1,
    feature_fraction: Any = 1.0,
    bootstrap: bool = True,
    random_thresholds: bool = False,
    sample_weight: Any = None,
    categorical: bool | None = None,
) -> Forest:
    """Fit a forest.

    Args:
        bins: thresholds, of `fit_bins`.
        x: table ``[n, D]``; NaN goes left at every split.
        y: reals ``[n, O]``; of labels, one-hot rows: splits then gain what Gini's impurity loses.
        key: of all that is drawn.
        n_trees: T.
        max_depth: of every tree, 1 to 64.
        max_leaves: of every tree, as `grow_deep_tree` has it; memory of the forest grows with it.
        min_data_in_leaf: least rows of a leaf, repeated ones counted as often as they were drawn.
        feature_fraction: share of columns drawn for each node.
        bootstrap: whether trees draw rows.
        random_thresholds: extra-trees.
        sample_weight: ``[n]``, not negative and not all zero.
        categorical: ``False`` says that no column is, and saves time under ``jit``; elsewhere it is looked up.

    Raises:
        ValueError: for settings out of range, and targets and weights that are not finite.

    Example:
        >>> from jaxaccel.boosting.trees import fit_bins
        >>> x, y = jnp.arange(4.0)[:, None], jnp.array([[0.0], [0], [1], [1]])
        >>> forest = forest_fit(fit_bins(x, n_bins=3), x, y, jax.random.key(0), n_trees=2, max_depth=1, bootstrap=False)
        >>> forest_predict(forest, x)[:, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    if isinstance(n_trees, bool) or not isinstance(n_trees, int) or n_trees < 1:
        raise ValueError(f"n_trees is {n_trees!r}, expected an integer of at least 1")
    binned = apply_bins(bins, x)
    n = binned.shape[1]
    if jnp.ndim(y) != 2 or jnp.shape(y)[0] != n or jnp.shape(y)[1] < 1:
        raise ValueError(f"y has shape {jnp.shape(y)}, expected [{n}, outputs] as x has {n} rows")
    y = jnp.asarray(y, jnp.float32)
    if not isinstance(y, jax.core.Tracer) and not bool(jnp.isfinite(y).all()):
        raise ValueError("y must be finite, got NaN or infinity")
    check_weight(sample_weight, n)
    weight = jnp.ones(n) if sample_weight is None else jnp.asarray(sample_weight, jnp.float32)
    settings = (
        check_depth(max_depth, MAX_DEPTH),
        max_leaves,
        float(min_data_in_leaf),
        float(feature_fraction),
        bool(random_thresholds),
    )
    kinds = has_categories(bins) if categorical is None else bool(categorical)
    return _fit(bins, binned, y, weight, key, n_trees=n_trees, bootstrap=bool(bootstrap), settings=settings,
                unit=sample_weight is None, categorical=kinds)  # fmt: skip


@functools.partial(jax.jit, static_argnames=("n_trees", "bootstrap", "settings", "unit", "categorical"))
def _fit(
    bins: Bins, binned: Array, y: Array, weight: Array, key: Array, *, n_trees: int, bootstrap: bool,
    settings: tuple[Any, ...], unit: bool, categorical: bool,
) -> Forest:  # fmt: skip
    depth, leaves, least, fraction, random = settings
    ordered = spread(binned, bins.thresholds.shape[1] + 1)
    n = len(weight)
    centre = weight @ y / weight.sum()
    y = y - centre
    # Rows of no weight are neither drawn nor counted: as if they were not there.
    present, size = jnp.argsort(weight <= 0, stable=True), jnp.sum(weight > 0)

    def one(sums: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], DeepTree]:
        rows, nodes = jax.random.split(jax.random.fold_in(key, number))
        count = jnp.ones(n)
        if bootstrap:
            drawn = present[jax.random.randint(rows, (n,), 0, size)]
            count = jax.ops.segment_sum((jnp.arange(n) < size).astype(count.dtype), drawn, num_segments=n)
        mass = (count * weight)[:, None]
        tree, leaf = grow_deep_tree(
            bins, binned, jnp.concatenate([mass * y, mass], 1), max_depth=depth, max_leaves=leaves,
            min_data_in_leaf=least, count=None if unit else jnp.where(weight > 0, count, 0), feature_fraction=fraction,
            random_thresholds=random, categorical=categorical, key=nodes, ordered=ordered,
        )  # fmt: skip
        out = (count == 0)[:, None]
        total, times = sums
        return (total + out * tree.leaf_value[leaf], times + out), tree

    (total, times), trees = jax.lax.scan(one, (jnp.zeros_like(y), jnp.zeros((n, 1))), jnp.arange(n_trees))
    outside = jnp.where(times > 0, total / jnp.maximum(times, 1) + centre, jnp.nan)
    return Forest(trees, centre, outside)


def forest_predict(forest: Forest, x: Any) -> Float[Array, "n O"]:
    """Mean of the trees: targets, or the probabilities of classes."""
    return _predict(forest.trees, forest.centre, jnp.asarray(x, jnp.float32))


@jax.jit
def _predict(trees: DeepTree, centre: Array, x: Array) -> Array:
    return centre + predict_trees(trees, x) / len(trees.feature)
