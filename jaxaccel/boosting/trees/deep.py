"""`grow_deep_tree`: trees of any depth, by a compacted frontier of the nodes that may still be split.

A heap of depth d has room for 2^d leaves, whether there are rows for them or not. Here nodes are numbered as they come,
level by level, and each knows the place of its children. Only nodes that can gain are searched: those with rows enough
for two leaves, whose rows do not all want the same. A level takes as many chunks of C nodes as it needs, and a chunk
costs (rows + C·bins)·columns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxaccel.boosting.trees.bins import Bins
from jaxaccel.boosting.trees.growing import SLACK, check, leaf_values, prepare
from jaxaccel.boosting.trees.splitting import Best, Rules, best_splits, draw_columns, spread

MAX_DEPTH = 64
MOST_LEAVES = 2**16
PURE = 1e-6
"""Of the rows' own squares: impurity below it is rounding."""


class DeepTree(NamedTuple):
    """A tree with O outputs and room for L leaves, or several of them with one more axis in front; M is 2L − 1."""

    feature: Int[Array, "*t M"]  # int32; −1 at leaves and where there is no node
    threshold: Float[Array, "*t M"]  # rows above it go right; of categories, those that equal it
    is_categorical: Bool[Array, "*t M"]
    gain: Float[Array, "*t M"]  # what the split adds to the score; 0 where there is none
    child: Int[Array, "*t M"]  # the left child, the right one is next to it; 0 at leaves
    leaf_value: Float[Array, "*t M O"]  # of leaves, 0 elsewhere


def grow_deep_tree(
    bins: Bins,
    binned: Shaped[Array, "*_"],
    stats: Shaped[Array, "*_"],
    *,
    max_depth: Any,
    max_leaves: Any = None,
    score: str = "l2",
    reg_lambda: Any = 0.0,
    min_data_in_leaf: Any = 1,
    min_gain: Any = 0.0,
    count: Any = None,
    weight_counts: bool = False,
    feature_weights: Any = None,
    feature_mask: Any = None,
    feature_fraction: Any = 1.0,
    random_thresholds: bool = False,
    categorical: bool = True,
    key: Key[Array, ""] | None = None,
    implementation: str | None = None,
    ordered: Any = None,
) -> tuple[DeepTree, Int[Array, "n"]]:
    """Grow a tree as `grow_tree` does with ``policy="depthwise"``, but only where rows can be told apart.

    Args:
        bins: thresholds, of `fit_bins`.
        binned: the table in bins ``[D, n]``, of `apply_bins`.
        stats: sums and a weight of each row ``[n, K]``: see the package.
        max_depth: 1 to 64; static, as all but arrays.
        max_leaves: L, static; by default as many as ``max_depth`` and ``min_data_in_leaf`` allow, at most 65,536.
            Memory grows with it. Where a level wants more, the splits that gain most are made.
        score: ``"l2"``, ``"cosine"`` or ``"newton"``.
        reg_lambda: λ.
        min_data_in_leaf: least ``count`` of a side.
        min_gain: least gain.
        count: what is counted, whole numbers ``[n]``; the last statistic if ``None`` (for ``"newton"``, rows).
        weight_counts: says that the last statistic is whole numbers for ``"newton"`` as well.
        feature_weights: factors of scores ``[D]``.
        feature_mask: columns that may be used ``[D]``.
        feature_fraction: share of columns, drawn anew for each node. Up to a half only these are looked at.
        random_thresholds: one threshold for each node and column, drawn from those that are valid.
        categorical: ``False`` says that no column is, and saves time.
        key: of what is drawn.
        implementation: of `kernels_pallas.node_histogram`.
        ordered: ``spread(binned, B + 1)`` of `jaxaccel.boosting.trees.splitting`, where many trees share it.

    Returns:
        The tree, and the node that each row ends in.

    Raises:
        ValueError: for shapes that do not fit and settings out of range. Values of arrays are not looked at.

    Example:
        >>> from jaxaccel.boosting.trees import apply_bins, fit_bins
        >>> x, y = jnp.arange(20.0)[:, None], 2.0 ** jnp.arange(20)
        >>> bins = fit_bins(x, n_bins=19, method="midpoint")
        >>> tree, leaf = grow_deep_tree(bins, apply_bins(bins, x), jnp.stack([y, jnp.ones(20)], 1), max_depth=19)
        >>> bool((tree.leaf_value[leaf, 0] == y).all()), int((tree.feature >= 0).sum())
        (True, 19)
    """
    counted = count is not None or (score == "newton" and not weight_counts)
    rules = Rules(max_depth, "depthwise", score, reg_lambda, min_data_in_leaf, min_gain, counted, categorical,
                  bool(random_thresholds), implementation)  # fmt: skip
    check(bins, binned, stats, count, rules, key, feature_fraction, MAX_DEPTH)
    n = binned.shape[1]
    most = min(2**max_depth, max(1, int(n // max(1, min_data_in_leaf))), MOST_LEAVES)
    if max_leaves is not None:
        if isinstance(max_leaves, bool) or not isinstance(max_leaves, int) or max_leaves < 1:
            raise ValueError(f"max_leaves is {max_leaves!r}, expected an integer of at least 1")
        most = min(most, max_leaves)
    stats, weights, mask, drawn = prepare(bins, stats, count, counted, feature_weights, feature_mask, feature_fraction)
    ordered = spread(binned, bins.thresholds.shape[1] + 1) if ordered is None else ordered
    return _grow(bins, binned, ordered, stats, weights, mask, key, rules=rules, drawn=drawn, most=most)


def _chunk(rows: int, n_bins: int, widest: int) -> int:
    """Nodes of a chunk: so many that their cells cost about what passing over the rows does."""
    wanted = max(8, 2 * rows // n_bins)
    return min(1 << (wanted.bit_length() - 1), max(1, widest))


class _State(NamedTuple):
    level: Array
    base: Array  # number of the frontier's first node
    width: Array  # nodes of the frontier
    leaves: Array
    node: Array  # place of each row in the frontier; −1 once it is in a leaf
    leaf: Array  # number of that leaf
    tree: DeepTree  # without values


@functools.partial(jax.jit, static_argnames=("rules", "drawn", "most"))
def _grow(
    bins: Bins, binned: Array, ordered: Array, stats: Array, weights: Array, mask: Array, key: Any, *, rules: Rules,
    drawn: int, most: int,
) -> tuple[DeepTree, Array]:  # fmt: skip
    n, depth = binned.shape[1], rules.max_depth
    widest = min(most, 2 ** (depth - 1))
    # Few nodes at the top, many below: two sizes of chunks.
    chunk = _chunk(n, bins.thresholds.shape[1], widest)
    sizes = sorted({max(1, chunk // 8), chunk})
    room = widest + chunk
    total = 2 * most - 1
    weight = stats[:, -2] if rules.counted else stats[:, -1]
    sums = stats[:, :-2] if rules.counted else stats[:, :-1]
    own = jnp.where(weight > 0, jnp.sum(sums**2, 1) / jnp.where(weight > 0, weight, 1), 0)

    def level_step(state: _State, size: int) -> _State:
        live = _can_gain(state, stats, own, rules, room)
        rank = jnp.cumsum(live) - 1
        searched = jnp.sum(live)
        slot = jnp.zeros(room, jnp.int32).at[jnp.where(live, rank, room)].set(jnp.arange(room), mode="drop")
        place = jnp.clip(state.node, 0)
        row = jnp.where((state.node >= 0) & live[place], rank[place], -1)

        def search(turn: Array, best: Best) -> Best:
            here = row - turn * size
            here = jnp.where((here >= 0) & (here < size), here, -1)
            seed = None if key is None else jax.random.fold_in(key, turn)
            columns = draw_columns(seed, state.level, size, mask, weights, drawn, rules.random)
            every = jnp.ones(size, bool)
            none = jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0))
            found = best_splits(bins, ordered, here, stats, every, none, columns, rules)
            return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (turn * size,)), best, found)

        empty = Best(jnp.full(room, -jnp.inf, stats.dtype), jnp.zeros(room, jnp.int32), jnp.zeros(room, jnp.int32),
                     jnp.zeros(room, stats.dtype), jnp.zeros(room, bool))  # fmt: skip
        best = jax.lax.fori_loop(0, (searched + size - 1) // size, search, empty)
        return _split(state, best, slot, row, searched, bins, binned, rules, most)

    state = _State(
        jnp.int32(0), jnp.int32(0), jnp.int32(1), jnp.int32(1), jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32),
        DeepTree(jnp.full(total, -1, jnp.int32), jnp.full(total, jnp.inf), jnp.zeros(total, bool),
                 jnp.zeros(total, stats.dtype), jnp.zeros(total, jnp.int32), jnp.zeros((total, 0))),
    )  # fmt: skip
    for size in sizes:
        most_nodes = widest if size == sizes[-1] else size

        def goes_on(state: _State, most_nodes: int = most_nodes) -> Array:
            return (state.level < depth) & (state.width > 0) & (state.width <= most_nodes)

        state = jax.lax.while_loop(goes_on, functools.partial(level_step, size=size), state)
    leaf = jnp.where(state.node >= 0, state.base + state.node, state.leaf)
    value = leaf_values(jax.ops.segment_sum(stats, leaf, num_segments=total), rules)
    return state.tree._replace(leaf_value=value), leaf


def _can_gain(state: _State, stats: Array, own: Array, rules: Rules, room: int) -> Bool[Array, "W"]:
    """Nodes of the frontier that have rows for two leaves, and rows that differ."""
    at = jnp.where(state.node >= 0, state.node, room)
    sums = jax.ops.segment_sum(jnp.concatenate([stats, own[:, None]], 1), at, num_segments=room)
    squares, sums = sums[:, -1], sums[:, :-1]
    enough = sums[:, -1] >= 2 * max(1, rules.min_data_in_leaf)
    sums = sums[:, :-1] if rules.counted else sums
    weight = sums[:, -1]
    together = jnp.where(weight > 0, jnp.sum(sums[:, :-1] ** 2, 1) / jnp.where(weight > 0, weight, 1), 0)
    return (jnp.arange(room) < state.width) & enough & (squares - together > PURE * squares)


def _split(
    state: _State, best: Best, slot: Array, row: Array, searched: Array, bins: Bins, binned: Array, rules: Rules,
    most: int,
) -> _State:  # fmt: skip
    """Make the splits that gain enough, and pass rows on."""
    room = len(slot)
    rank = jnp.arange(room)
    gain = best.score - best.parent
    wanted = (rank < searched) & (best.score > -jnp.inf) & (gain >= rules.min_gain - SLACK * jnp.abs(best.parent))
    left_over = most - state.leaves

    def largest(_: None) -> Array:
        order = jnp.argsort(jnp.where(wanted, -gain, jnp.inf))
        return wanted & (jnp.zeros(room, jnp.int32).at[order].set(rank) < left_over)

    split = jax.lax.cond(jnp.sum(wanted) > left_over, largest, lambda _: wanted, None)
    number = jnp.cumsum(split) - 1
    made = jnp.sum(split)
    children = state.base + state.width + 2 * number
    at = jnp.where(split, state.base + slot, len(state.tree.feature))
    news = (best.feature, bins.thresholds[best.feature, best.bin], bins.is_categorical[best.feature],
            jnp.maximum(gain, 0), children)  # fmt: skip
    made_tree = [a.at[at].set(b.astype(a.dtype), mode="drop") for a, b in zip(state.tree[:5], news, strict=True)]
    tree = state.tree._replace(**dict(zip(DeepTree._fields, made_tree, strict=False)))
    place = jnp.clip(row, 0)
    goes_on = (row >= 0) & split[place]
    feature, limit = best.feature[place], best.bin[place]
    cell = binned[feature, jnp.arange(len(row))].astype(jnp.int32)
    right = cell > limit
    if rules.categorical:
        right = jnp.where(bins.is_categorical[feature], cell == limit, right)
    leaf = jnp.where((state.node >= 0) & ~goes_on, state.base + state.node, state.leaf)
    node = jnp.where(goes_on, 2 * number[place] + right, -1)
    return _State(state.level + 1, state.base + state.width, (2 * made).astype(jnp.int32),
                  state.leaves + made.astype(jnp.int32), node, leaf, tree)  # fmt: skip
