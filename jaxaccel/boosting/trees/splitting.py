"""The best split of every node of a level: features come one after the other, and only the best so far is kept.

Histograms of all features at once would be features·nodes·bins·K numbers; here a few features are summed, scored and
forgotten. Candidates lie as `spread` says, [8, G] for G groups of eight bins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxaccel.boosting.trees.bins import Bins
from kernels_pallas.arrays import varying_zeros
from kernels_pallas.node_histogram import node_histogram

SCORES = ("l2", "cosine", "newton")


class Rules(NamedTuple):
    """What does not change while a tree grows; all static."""

    max_depth: int
    policy: str
    score: str
    reg_lambda: float
    min_data_in_leaf: float
    min_gain: float
    counted: bool  # whether the last statistic counts rows and is no weight
    categorical: bool  # whether any column may be
    random: bool  # one random threshold for each node and feature
    implementation: str | None

    @property
    def empties(self) -> bool:
        """Whether a split that leaves one side empty is one: so GBRL's reference has it."""
        return self.policy != "depthwise" and self.min_data_in_leaf == 0


class Columns(NamedTuple):
    """What is known of the columns of a level: what the search runs over. X is 1, or N if nodes see columns apart."""

    bins: Shaped[Array, "D n"]  # spread
    thresholds: Float[Array, "D X B"]
    n_valid: Int[Array, "D X"]
    is_categorical: Bool[Array, "D X"]
    weight: Float[Array, "D X"]
    number: Int[Array, "D X"]
    allowed: Bool[Array, "D N"]
    chance: Float[Array, "D N"]


class Best(NamedTuple):
    """The best split of each node so far; of the whole level if trees are oblivious (N is 1 then)."""

    score: Float[Array, "N"]
    feature: Int[Array, "N"]
    bin: Int[Array, "N"]
    parent: Float[Array, "N"]  # score of the node undivided
    categorical: Bool[Array, "N"]


class Search(NamedTuple):
    """Which columns a level's nodes see."""

    weights: Float[Array, "D"]
    """Factors of scores."""
    drawn: Int[Array, "J N"] | None
    """Columns of each node; ``None`` if all see all."""
    allowed: Bool[Array, "J N"]
    """Whether a node may be split there. J is D where ``drawn`` is ``None``."""
    chance: Float[Array, "J N"]
    """Which of the thresholds a random one is."""


def draw_columns(
    key: Any, level: Any, nodes: int, mask: Bool[Array, "D"], weights: Float[Array, "D"], drawn: int, random: bool
) -> Search:
    """``drawn`` of the columns of ``mask`` for each node, and thresholds if they are ``random``."""
    columns = len(mask)
    chosen, allowed = None, jnp.broadcast_to(mask[:, None], (columns, nodes))
    if drawn < columns:
        order = jax.random.uniform(jax.random.fold_in(key, 2 * level), (columns, nodes))
        order = jnp.where(mask[:, None], order, 2.0)  # of the columns that may be used, the smallest
        if 2 * drawn <= columns:  # looking up rows costs as much as a second column
            smallest, chosen = jax.lax.top_k(-order.T, drawn)
            # In the order of columns: of equal splits the first is taken.
            chosen, smallest = jax.lax.sort((chosen.T, smallest.T), dimension=0, num_keys=1)
            allowed = smallest > -2
        else:
            allowed = allowed & (jnp.argsort(jnp.argsort(order, 0), 0) < drawn)
    chance = jnp.zeros(allowed.shape)
    if random:
        chance = jax.random.uniform(jax.random.fold_in(key, 2 * level + 1), allowed.shape)
    return Search(weights, chosen, allowed, chance)


def _value(sums: Float[Array, "K *s"], rules: Rules) -> Float[Array, "*s"]:
    """Σ s²/(w + λ) of sums whose first axis is the statistics'; 0 of no rows."""
    sums = sums[:-1] if rules.counted else sums
    weight = sums[-1] + rules.reg_lambda
    positive = weight > 0
    squares = sum((s**2 for s in sums[1:-1]), sums[0] ** 2)  # as terms: a reduction would be one more pass
    return jnp.where(positive, squares / jnp.where(positive, weight, 1), 0)


def _score(rules: Rules, *sums: Float[Array, "K *s"]) -> Float[Array, "*s"]:
    """Score of a node's parts together."""
    value = sum((_value(part, rules) for part in sums[1:]), _value(sums[0], rules))
    return jnp.sqrt(value) if rules.score == "cosine" else value


def spread(bins: Shaped[Array, "*s"], n_bins: int) -> Shaped[Array, "*s"]:
    """Bins in the order in which histograms are summed up: bin 8g + i is at iG + g, of G groups of eight.

    Sums within groups then add whole rows of G numbers. A CPU does that several times as fast as sums along a row.
    """
    groups = -(-n_bins // 8)
    wide = bins.astype(jnp.int32)
    return ((wide & 7) * groups + (wide >> 3)).astype(
        jnp.uint8 if groups <= 32 else jnp.int16 if groups <= 4096 else jnp.int32
    )


def cells(x: Shaped[Array, "*s B"], groups: int, fill: Any) -> Shaped[Array, "*s 8 G"]:
    """What belongs to each bin, where `spread` puts it."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, 8 * groups - x.shape[-1])]
    return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:-1], groups, 8).swapaxes(-1, -2)


def running_sums(x: Float[Array, "*s 8 G"]) -> Float[Array, "*s 8 G"]:
    """Sums over bins up to each one: within groups of eight, then over groups."""
    inner = jnp.cumsum(x, -2)
    whole = inner[..., -1, :]
    groups = whole.shape[-1]
    if groups <= 8:
        before = jnp.cumsum(whole, -1)
    else:
        before = running_sums(cells(whole, -(-groups // 8), 0))
        before = before.swapaxes(-1, -2).reshape(*whole.shape[:-1], -1)
    before = jnp.pad(before[..., : groups - 1], [(0, 0)] * (whole.ndim - 1) + [(1, 0)])
    return inner + before[..., None, :]


def _random(valid: Bool[Array, "F N 8 G"], chance: Float[Array, "F N"]) -> Bool[Array, "F N 8 G"]:
    """One of the valid candidates of each node and feature."""
    place = running_sums(valid.astype(jnp.float32))
    wanted = jnp.floor(chance * place[..., -1, -1]) + 1  # chance is below 1
    return valid & (place == wanted[..., None, None])


def _block(
    best: Best,
    columns: Columns,
    node: Int[Array, "n"],
    stats: Float[Array, "n K"],
    active: Bool[Array, "N"],
    used: tuple[Array, Array],
    rules: Rules,
) -> Best:
    """Score all candidates of a few columns and keep the best."""
    nodes, candidates = len(active), columns.thresholds.shape[2]
    groups = -(-(candidates + 1) // 8)
    sums = node_histogram(
        columns.bins, node, stats, n_nodes=nodes, n_bins=8 * groups, implementation=rules.implementation
    )
    sums = jnp.moveaxis(sums, -1, 0).reshape(stats.shape[1], -1, nodes, 8, groups)
    left = running_sums(sums)
    total = left[..., -1:, -1:]
    if rules.categorical:
        left = jnp.where(columns.is_categorical[..., None, None], sums, left)
    right = total - left
    # What is left of an empty side by rounding must not look like a row.
    left, right = (jnp.where(side[-1] > 0.5 if rules.counted else side[-1] > 0, side, 0) for side in (left, right))
    score = _score(rules, left, right) * columns.weight[..., None, None]
    number = cells(jnp.arange(candidates, dtype=jnp.int32), groups, candidates)
    valid = number < columns.n_valid[..., None, None]
    if not rules.empties:
        least = jnp.minimum(left[-1], right[-1])
        enough = (least >= rules.min_data_in_leaf) & ((least > 0) | (rules.policy != "depthwise"))
        valid = valid & (enough | ~active[:, None, None] if rules.policy == "oblivious" else enough)
    valid = valid & columns.allowed[..., None, None]
    if rules.empties:
        features, thresholds = used  # [N or 1, depth]
        same = (features[None] == columns.number[..., None])[..., None, None] & (
            thresholds[None, ..., None, None] == cells(columns.thresholds, groups, jnp.nan)[:, :, None]
        )
        valid = valid & ~same.any(2)
    if rules.random:
        valid = _random(jnp.broadcast_to(valid, score.shape), columns.chance)
    score = jnp.where(valid, score, -jnp.inf)
    parent = _score(rules, total[..., 0, 0])  # [F, N]
    if rules.policy == "oblivious":
        score = jnp.where(active[:, None, None], score, 0).sum(1, keepdims=True)
        parent = parent.sum(1, keepdims=True)
    # Of equals the first; two reductions cost a fraction of an argmax.
    top = score.max((-2, -1))
    place = jnp.where(score == top[..., None, None], number, candidates - 1).min((-2, -1))
    for f in range(len(columns.number)):
        # Numeric candidates come before categorical ones, whatever the order of columns.
        first = (top[f] == best.score) & best.categorical & ~columns.is_categorical[f]
        better = (top[f] > best.score) | (first & (top[f] > -jnp.inf))
        found = Best(top[f], jnp.broadcast_to(columns.number[f], top[f].shape), place[f], parent[f],
                     jnp.broadcast_to(columns.is_categorical[f], top[f].shape))  # fmt: skip
        best = Best(*(jnp.where(better, a, b) for a, b in zip(found, best, strict=True)))
    return best


def best_splits(
    bins: Bins,
    ordered: Shaped[Array, "D n"],
    node: Int[Array, "n"],
    stats: Float[Array, "n K"],
    active: Bool[Array, "N"],
    used: tuple[Array, Array],
    search: Search,
    rules: Rules,
) -> Best:
    """The best split of every node; ``score`` is −∞ where there is none. Rows outside of ``range(N)`` are left out."""
    nodes = len(active)
    size = 1 if rules.policy == "oblivious" else nodes
    apart = search.drawn is not None
    features = len(search.allowed)
    zeros = varying_zeros((stats, ordered), (size,), stats.dtype)
    whole = zeros.astype(jnp.int32)
    best = Best(zeros - jnp.inf, whole, whole, zeros, zeros > 0)
    block = _block_size(features, nodes * bins.thresholds.shape[1] * stats.shape[1])
    number = jnp.arange(features, dtype=jnp.int32)[:, None] if search.drawn is None else search.drawn
    known = (number, search.allowed, search.chance)
    # Rows of columns that all nodes see are passed on as they are; others are looked up.
    rows = None if apart else ordered
    missing = -features % block
    if missing:  # columns that nothing may be split at
        known, rows = jax.tree.map(
            lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1]).repeat(missing, 0)]), (known, rows)
        )
    blocks = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), (known, rows))

    def step(best: Best, parts: Any) -> tuple[Best, None]:
        (number, allowed, chance), rows = parts
        if rows is None:
            place = number[:, jnp.clip(node, 0, size - 1)] if size > 1 else number
            rows = ordered[place, jnp.arange(ordered.shape[1])]
        columns = Columns(rows, bins.thresholds[number], bins.n_valid[number], bins.is_categorical[number],
                          search.weights[number], number, allowed, chance)  # fmt: skip
        return _block(best, columns, node, stats, active, used, rules), None

    return jax.lax.scan(step, best, blocks)[0]


def _block_size(columns: int, cells: int) -> int:
    """Columns of a step of the search: as many as stay in a CPU's cache, on GPUs as many as there is memory for.

    On CPU the step must be one of several: XLA unrolls a loop of one, and then compiles it worse.
    """
    if (platform := jax.default_backend()) != "cpu":
        return min(columns, 8 if platform == "tpu" else max(8, 2**24 // cells))
    return max(1, min(10, columns // 2, 2**19 // cells))
