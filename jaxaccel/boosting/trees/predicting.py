"""Values of rows in many trees: trees in chunks, rows and the trees of a chunk side by side."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxaccel.boosting.trees.deep import DeepTree
from jaxaccel.boosting.trees.growing import Tree

AnyTree = Tree | DeepTree

CELLS = 2**16
"""Rows·trees of a chunk, about: few rows are passed through many trees at once, many rows through one."""
LONGEST = 512
"""Most trees of a chunk: room for trees that are not grown yet costs nothing beyond the last chunk."""
Carry = TypeVar("Carry")


def _sides(tree: AnyTree, x: Array, place: Array) -> Array:
    """Whether rows go right at heap places: ``x [D, n]``, ``place [C, n]``, or ``[C, 1]`` if all rows share it."""
    feature, threshold, kind = (jnp.take_along_axis(a, place, 1) for a in tree[:3])
    if place.shape[1] == 1 and x.shape[1] > 1:
        value = x[jnp.maximum(feature[:, 0], 0)]
    else:
        value = x[jnp.maximum(feature, 0), jnp.arange(x.shape[1])]
    return jnp.where(kind, value == threshold, value > threshold) & (feature >= 0)


def _leaves(tree: AnyTree, x: Array) -> Array:
    """Leaves ``[C, n]`` of ``x [D, n]`` in ``C`` trees."""
    if isinstance(tree, DeepTree):
        return _deep_leaves(tree, x)
    trees, depth, oblivious = len(tree.feature), tree.depth, tree.oblivious
    node = jnp.zeros((trees, x.shape[1]), jnp.int32)
    for level in range(depth):
        place = jnp.full((trees, 1), level) if oblivious else node + (2**level - 1)
        node = 2 * node + _sides(tree, x, place)
    return node


def _deep_leaves(tree: DeepTree, x: Array) -> Array:
    """As many steps as the deepest row needs."""

    def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        node, child = carry
        node = jnp.where(child > 0, child + _sides(tree, x, node), node)
        return node, jnp.take_along_axis(tree.child, node, 1)

    node = jnp.zeros((len(tree.feature), x.shape[1]), jnp.int32)
    child = jnp.broadcast_to(tree.child[:, :1], node.shape)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] > 0), step, (node, child))[0]


def tree_leaves(tree: AnyTree, x: Float[Array, "n D"]) -> Int[Array, "*t n"]:
    """The leaf of each row, in one tree or in each of several; NaN goes left."""
    if tree.feature.ndim == 1:
        return _leaves(jax.tree.map(lambda a: a[None], tree), x.T)[0]
    return jax.lax.map(lambda t: _leaves(jax.tree.map(lambda a: a[None], t), x.T)[0], tree)


def fold_trees(
    trees: AnyTree,
    x: Float[Array, "n D"],
    step: Callable[[Carry, Any, Any, Any], Carry],
    initial: Carry,
    *,
    start: Any = 0,
    stop: Any = None,
) -> Carry:
    """``step(carry, values, number, inside)`` for chunks of trees from ``start`` to ``stop``, which may be traced.

    ``values [C, n, O]`` are those of C trees, ``number [C]`` says which, and ``inside [C]`` whether they are in the
    range and were not in an earlier chunk: values of the others are zero.
    """
    total, (n, _) = len(trees.feature), x.shape
    stop = total if stop is None else stop
    size = max(1, min(total, CELLS // n, LONGEST))
    columns = x.T

    def body(turn: Array, carry: Carry) -> Carry:
        # The last chunk overlaps the one before; what was seen must not count twice.
        begin = jnp.minimum(start + turn * size, total - size)
        chunk = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), trees)
        number = begin + jnp.arange(size)
        inside = (number >= start + turn * size) & (number < stop)
        leaf = _leaves(chunk, columns)
        value = jax.vmap(lambda values, place: values[place])(chunk.leaf_value, leaf)
        return step(carry, jnp.where(inside[:, None, None], value, 0), number, inside)

    turns = jnp.maximum(stop - start + size - 1, 0) // size
    return jax.lax.fori_loop(0, turns, body, initial)


def predict_trees(
    trees: AnyTree,
    x: Float[Array, "n D"],
    *,
    scale: Any = None,
    start: Any = 0,
    stop: Any = None,
) -> Float[Array, "n O"]:
    """Sum of the trees' values.

    Args:
        trees: T trees of one size, stacked; heaps of one depth, or deep trees with room for as many leaves.
        x: rows; NaN goes left.
        scale: factors ``[T, O]``, ``[T, 1]`` or a number.
        start: the first tree that counts; may be traced.
        stop: the one after the last.

    Example:
        >>> tree = Tree(*map(jnp.array, ([[0]], [[0.5]], [[False]], [[1.0]], [[[1.0], [2.0]]])))
        >>> predict_trees(tree, jnp.array([[0.0], [1.0]])).tolist()
        [[1.0], [2.0]]
    """
    outputs = trees.leaf_value.shape[-1]
    factor = jnp.ones((len(trees.feature), 1)) if scale is None else jnp.asarray(scale, trees.leaf_value.dtype)
    factor = jnp.broadcast_to(factor, (len(trees.feature), outputs))

    def step(total: Array, value: Array, number: Array, inside: Array) -> Array:
        del inside
        # One after the other: a row's sum must not depend on how many rows come with it.
        return jax.lax.scan(lambda t, v: (t + v, None), total, value * factor[number][:, None])[0]

    zeros = jnp.zeros((len(x), outputs), trees.leaf_value.dtype)
    return fold_trees(trees, x, step, zeros, start=start, stop=stop)


def feature_importances(trees: AnyTree, n_features: int) -> Float[Array, "D"]:
    """Share of each column in what splits gain, the mean over trees ``[..., M]``; sums to 1, or 0 without any split.

    It is impurity that is counted, of training rows: columns with many values are flattered.
    """
    feature, gain = (a.reshape(-1, a.shape[-1]) for a in (trees.feature, trees.gain))
    sums = jax.vmap(lambda f, g: jax.ops.segment_sum(g, f, num_segments=n_features))(feature, gain)
    total = sums.sum(1, keepdims=True)
    shares = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), 0).sum(0)
    return shares / jnp.maximum(shares.sum(), jnp.finfo(shares.dtype).tiny)
