"""`grow_tree`: a tree level by level, all of whose sizes are static.

Nodes lie in a heap: the children of node i are 2i + 1 and 2i + 2, and a node that is not split sends every row left.
The work of a level is rows·features additions and features·nodes·bins scores. Levels are compiled in groups that
share the size of their widest, so that compile time grows with half the depth. A sibling's histogram is not derived by
subtraction: sums of float32 would lose digits, and XLA's sums pass over all rows either way.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxaccel.boosting.trees.bins import Bins
from jaxaccel.boosting.trees.splitting import SCORES, Rules, best_splits, draw_columns, spread

POLICIES = ("depthwise", "oblivious", "greedy")
MAX_DEPTH = 12
SLACK = 1e-6
"""Of a node's own score: a gain that is only so much below the least one is rounding."""


class Tree(NamedTuple):
    """A tree of depth d with O outputs, or several of them with one more axis in front.

    M is 2^d − 1, in the order of the heap; d of an oblivious tree, whose levels share a split (equal at depth 1).
    """

    feature: Int[Array, "*t M"]  # int32; −1 where nothing is split and every row goes left
    threshold: Float[Array, "*t M"]  # rows above it go right; of categories, those that equal it
    is_categorical: Bool[Array, "*t M"]
    gain: Float[Array, "*t M"]  # what the split adds to the score; 0 where there is none
    leaf_value: Float[Array, "*t L O"]  # L is 2^d, the first level's side is the most significant bit; 0 of no rows

    @property
    def depth(self) -> int:
        """The depth d."""
        return self.leaf_value.shape[-2].bit_length() - 1

    @property
    def oblivious(self) -> bool:
        """Whether levels share a split."""
        return self.feature.shape[-1] == self.depth


def _groups(depth: int) -> list[tuple[int, int]]:
    """Levels that share a loop, [first, last]: the small ones together, then pairs."""
    first = min(depth, 4)
    return [(0, first - 1), *((a, a) for a in range(first, depth))]


def check_depth(depth: Any, most: int = MAX_DEPTH) -> int:
    """The depth, if trees can have it."""
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"max_depth is {depth!r}, expected an integer")
    if not 1 <= depth <= most:
        raise ValueError(f"max_depth is {depth}, expected 1 to {most}")
    return depth


def check(
    bins: Bins, binned: Any, stats: Any, count: Any, rules: Rules, key: Any, fraction: Any, most: int = MAX_DEPTH
) -> None:
    """Refuse shapes that do not fit and settings out of range."""
    columns = bins.thresholds.shape[0]
    if jnp.ndim(binned) != 2 or len(binned) != columns or jnp.shape(binned)[1] < 1:
        raise ValueError(f"binned has shape {jnp.shape(binned)}, expected [{columns}, rows] of apply_bins")
    rows = jnp.shape(binned)[1]
    if jnp.ndim(stats) != 2 or len(stats) != rows or jnp.shape(stats)[1] < 2:
        raise ValueError(f"stats has shape {jnp.shape(stats)}, expected [{rows}, K], K at least 2: sums and a weight")
    if count is not None and jnp.shape(count) != (rows,):
        raise ValueError(f"count has shape {jnp.shape(count)}, expected ({rows},)")
    check_depth(rules.max_depth, most)
    if rules.policy not in POLICIES:
        raise ValueError(f"policy is {rules.policy!r}, expected one of {', '.join(POLICIES)}")
    if rules.score not in SCORES:
        raise ValueError(f"score is {rules.score!r}, expected one of {', '.join(SCORES)}")
    for name in ("reg_lambda", "min_data_in_leaf", "min_gain"):
        if not 0 <= getattr(rules, name) < float("inf"):
            raise ValueError(f"{name} is {getattr(rules, name)}, expected 0 or more")
    if not 0 < fraction <= 1:
        raise ValueError(f"feature_fraction is {fraction}, expected above 0 and at most 1")
    if rules.random and rules.policy == "oblivious":
        raise ValueError("random_thresholds is True, expected False for oblivious trees: nodes share a threshold")
    if key is None and (fraction < 1 or rules.random):
        raise ValueError("key is None, expected a key: features or thresholds are drawn")


def prepare(
    bins: Bins, stats: Any, count: Any, counted: bool, feature_weights: Any, feature_mask: Any, fraction: Any
) -> tuple[Array, Array, Array, int]:
    """Statistics with a count where one is needed, factors of columns, those that may be used, and how many are drawn.

    Raises:
        ValueError: for factors or a mask of another length.
    """
    columns, n = len(bins.n_valid), len(stats)
    stats = stats.astype(jnp.promote_types(stats.dtype, jnp.float32))
    if counted:
        count = jnp.ones(n, stats.dtype) if count is None else jnp.asarray(count, stats.dtype)
        stats = jnp.concatenate([stats, count[:, None]], 1)
    for name, value in (("feature_weights", feature_weights), ("feature_mask", feature_mask)):
        if value is not None and jnp.shape(value) != (columns,):
            raise ValueError(f"{name} has shape {jnp.shape(value)}, expected ({columns},)")
    weights = jnp.ones(columns) if feature_weights is None else jnp.asarray(feature_weights, stats.dtype)
    mask = jnp.ones(columns, bool) if feature_mask is None else jnp.asarray(feature_mask, bool)
    return stats, weights, mask, max(1, round(float(fraction) * columns))


def leaf_values(sums: Float[Array, "L K"], rules: Rules) -> Float[Array, "L O"]:
    """Values of leaves from their sums of statistics; 0 of no rows."""
    sums = sums[:, :-1] if rules.counted else sums
    newton = rules.score == "newton"
    bottom = sums[:, -1:] + (rules.reg_lambda if newton else 0)
    value = jnp.where(bottom > 0, sums[:, :-1] / jnp.where(bottom > 0, bottom, 1), 0)
    return -value if newton else value


def grow_tree(
    bins: Bins,
    binned: Shaped[Array, "*_"],
    stats: Shaped[Array, "*_"],
    *,
    max_depth: Any,
    policy: str = "depthwise",
    score: str = "l2",
    reg_lambda: Any = 0.0,
    min_data_in_leaf: Any = 0,
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
) -> tuple[Tree, Int[Array, "n"]]:
    """Grow a tree on statistics of rows.

    Args:
        bins: thresholds, of `fit_bins`.
        binned: the table in bins ``[D, n]``, of `apply_bins`.
        stats: sums and a weight of each row ``[n, K]``: see the package. Rows of zeros are not there.
        max_depth: d, 1 to 12; static, as all but arrays.
        policy: ``"depthwise"``: a node is split if that gains at least ``min_gain`` and leaves rows on both sides.
            ``"oblivious"``: the nodes of a level share the split with the largest sum of scores; growing stops only
            where no candidate is left. ``"greedy"``: as GBRL's reference grows: depthwise, but with the score of the
            root taken as 0, and with empty sides.
        score: ``"l2"``: Σ s²/(w + λ) of both sides together; ``"cosine"``: its root, which matters where sums over
            nodes or feature weights are compared; ``"newton"``: as l2, for gradients and second derivatives.
        reg_lambda: λ.
        min_data_in_leaf: least ``count`` of a side. With 0, trees that are not depthwise may have empty sides, and no
            split then comes twice on a path.
        min_gain: least gain, of depthwise trees.
        count: what ``min_data_in_leaf`` counts, whole numbers ``[n]``; the last statistic if ``None``, which then must
            be whole numbers (for ``"newton"``, one for each row instead).
        weight_counts: says that the last statistic is whole numbers for ``"newton"`` as well, and saves time.
        feature_weights: factors of scores ``[D]``.
        feature_mask: columns that may be used ``[D]``.
        feature_fraction: share of columns, drawn anew for each node (each level of an oblivious tree).
        random_thresholds: one threshold for each node and column, drawn from those that are valid: extra-trees.
        categorical: ``False`` says that no column is, and saves time.
        key: of what is drawn.
        implementation: of `kernels_pallas.node_histogram`.
        ordered: ``spread(binned, B + 1)`` of `jaxaccel.boosting.trees.splitting`, where many trees share it.

    Returns:
        The tree, and the leaf of each row. Leaf values are s/w, or −s/(w + λ) for ``"newton"``.

    Raises:
        ValueError: for shapes that do not fit and settings out of range. Values of arrays are not looked at.

    Example:
        >>> from jaxaccel.boosting.trees import apply_bins, fit_bins
        >>> x, y = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([1.0, 1.0, 5.0, 5.0])
        >>> bins = fit_bins(x, n_bins=3)
        >>> tree, leaf = grow_tree(bins, apply_bins(bins, x), jnp.stack([y, jnp.ones(4)], 1), max_depth=1)
        >>> float(tree.threshold[0]), tree.leaf_value[:, 0].tolist(), leaf.tolist()
        (1.0, [1.0, 5.0], [0, 0, 1, 1])
    """
    counted = count is not None or (score == "newton" and not weight_counts)
    rules = Rules(max_depth, policy, score, reg_lambda, min_data_in_leaf, min_gain, counted, categorical,
                  bool(random_thresholds), implementation)  # fmt: skip
    check(bins, binned, stats, count, rules, key, feature_fraction)
    stats, weights, mask, drawn = prepare(bins, stats, count, counted, feature_weights, feature_mask, feature_fraction)
    ordered = spread(binned, bins.thresholds.shape[1] + 1) if ordered is None else ordered
    return _grow(bins, binned, ordered, stats, weights, mask, key, rules=rules, drawn=drawn)


@functools.partial(jax.jit, static_argnames=("rules", "drawn"))
def _grow(
    bins: Bins,
    binned: Array,
    ordered: Array,
    stats: Array,
    weights: Array,
    mask: Array,
    key: Any,
    *,
    rules: Rules,
    drawn: int,
) -> tuple[Tree, Array]:
    n = binned.shape[1]
    depth, candidates = rules.max_depth, bins.thresholds.shape[1]
    oblivious = rules.policy == "oblivious"
    heap = depth if oblivious else 2**depth - 1

    def level_step(level: Array, carry: Any, size: int) -> Any:
        node, feature, threshold, kind, gain = carry
        nodes = 1 if oblivious else size
        start = level if oblivious else (1 << level) - 1
        search = draw_columns(key, level, nodes, mask, weights, drawn, rules.random)
        # Splits above each node, for the rule that none comes twice.
        ancestor = jnp.arange(depth)
        if oblivious:
            above = jnp.where(ancestor < level, feature, -1)[None], threshold[None]
        else:
            shift = jnp.maximum(level - ancestor, 0)
            place = (1 << ancestor) - 1 + (jnp.arange(size)[:, None] >> shift)
            place = jnp.minimum(place, heap - 1)
            above = jnp.where(ancestor < level, feature[place], -1), threshold[place]
        active = jnp.arange(size) < (1 << level)
        best = best_splits(bins, ordered, node, stats, active, above, search, rules)
        found = best.score > -jnp.inf
        if rules.policy == "greedy":
            own = jnp.where(level == 0, 0, best.parent)
            found = found & (best.score >= own)
        elif not oblivious:
            found = found & (best.score - best.parent >= rules.min_gain - SLACK * jnp.abs(best.parent))
        chosen = jnp.where(found, best.feature, -1)
        at = bins.thresholds[best.feature, best.bin]
        news = (
            chosen,
            jnp.where(found, at, jnp.inf),
            found & bins.is_categorical[best.feature],
            jnp.where(found, jnp.maximum(best.score - best.parent, 0), 0),
        )
        feature, threshold, kind, gain = (
            jax.lax.dynamic_update_slice(a, b.astype(a.dtype), (start,))
            for a, b in zip((feature, threshold, kind, gain), news, strict=True)
        )
        limit = jnp.where(found, best.bin, candidates + 1)  # a bin that no row has
        if oblivious:
            cell = binned[best.feature[0]].astype(jnp.int32)
            right = jnp.where(news[2][0], cell == limit[0], cell > limit[0])
        else:
            cell = binned[best.feature[node], jnp.arange(n)].astype(jnp.int32)
            right = cell > limit[node]
            if rules.categorical:
                right = jnp.where(news[2][node], cell == limit[node], right)
        return 2 * node + right, feature, threshold, kind, gain

    carry = (
        jnp.zeros_like(binned[0], jnp.int32), jnp.full(heap, -1, jnp.int32), jnp.full(heap, jnp.inf),
        jnp.zeros(heap, bool), jnp.zeros(heap, stats.dtype),
    )  # fmt: skip
    for first, last in _groups(depth):
        step = functools.partial(level_step, size=2**last)
        carry = jax.lax.fori_loop(first, last + 1, step, carry)
    leaf, feature, threshold, kind, gain = carry
    sums = jax.ops.segment_sum(stats, leaf, num_segments=2**depth)
    return Tree(feature, threshold, kind, gain, leaf_values(sums, rules)), leaf
