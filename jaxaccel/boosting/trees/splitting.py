"""The best split of every node of a level: features come one after the other, and only the best so far is kept.

Histograms of all features at once would be features·nodes·bins·K numbers; here a few features are summed, scored and
forgotten. Candidates lie as `spread` says, [8, G] for G groups of eight bins.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

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
    """What is known of the columns of a level: what the search runs over."""

    bins: Shaped[Array, "D n"]  # spread
    thresholds: Float[Array, "D B"]
    n_valid: Int[Array, "D"]
    is_categorical: Bool[Array, "D"]
    weight: Float[Array, "D"]
    number: Int[Array, "D"]
    allowed: Bool[Array, "D N"]
    chance: Float[Array, "D N"]


class Best(NamedTuple):
    """The best split of each node so far; of the whole level if trees are oblivious (N is 1 then)."""

    score: Float[Array, "N"]
    feature: Int[Array, "N"]
    bin: Int[Array, "N"]
    parent: Float[Array, "N"]  # score of the node undivided
    categorical: Bool[Array, "N"]


def _value(sums: Float[Array, "K *s"], rules: Rules) -> Float[Array, "*s"]:
    """Σ s²/(w + λ) of sums whose first axis is the statistics'; 0 of no rows."""
    sums = sums[:-1] if rules.counted else sums
    weight = sums[-1] + rules.reg_lambda
    positive = weight > 0
    return jnp.where(positive, jnp.sum(sums[:-1] ** 2, 0) / jnp.where(positive, weight, 1), 0)


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
    nodes, candidates = len(active), columns.thresholds.shape[1]
    groups = -(-(candidates + 1) // 8)
    sums = node_histogram(
        columns.bins, node, stats, n_nodes=nodes, n_bins=8 * groups, implementation=rules.implementation
    )
    sums = jnp.moveaxis(sums, -1, 0).reshape(stats.shape[1], -1, nodes, 8, groups)
    left = running_sums(sums)
    total = left[..., -1:, -1:]
    if rules.categorical:
        left = jnp.where(columns.is_categorical[:, None, None, None], sums, left)
    right = total - left
    # What is left of an empty side by rounding must not look like a row.
    left, right = (jnp.where(side[-1] > 0.5 if rules.counted else side[-1] > 0, side, 0) for side in (left, right))
    score = _score(rules, left, right) * columns.weight[:, None, None, None]
    number = cells(jnp.arange(candidates, dtype=jnp.int32), groups, candidates)
    valid = number < columns.n_valid[:, None, None, None]
    if not rules.empties:
        least = jnp.minimum(left[-1], right[-1])
        enough = (least >= rules.min_data_in_leaf) & ((least > 0) | (rules.policy != "depthwise"))
        valid = valid & (enough | ~active[:, None, None] if rules.policy == "oblivious" else enough)
    valid = valid & columns.allowed[..., None, None]
    if rules.empties:
        features, thresholds = used  # [N or 1, depth]
        same = (features[None] == columns.number[:, None, None])[..., None, None] & (
            thresholds[None, ..., None, None] == cells(columns.thresholds, groups, jnp.nan)[:, None, None]
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
    columns: Columns,
    node: Int[Array, "n"],
    stats: Float[Array, "n K"],
    active: Bool[Array, "N"],
    used: tuple[Array, Array],
    rules: Rules,
    block: int,
) -> Best:
    """The best split of every node; ``score`` is −∞ where there is none."""
    features = len(columns.number)
    size = 1 if rules.policy == "oblivious" else len(active)
    zeros = varying_zeros((stats, columns.bins), (size,), stats.dtype)
    whole = zeros.astype(jnp.int32)
    best = Best(zeros - jnp.inf, whole, whole, zeros, zeros > 0)
    missing = -features % block
    if missing:  # columns that nothing may be split at
        columns = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1]).repeat(missing, 0)]), columns)
    blocks = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), columns)
    return jax.lax.scan(lambda b, c: (_block(b, c, node, stats, active, used, rules), None), best, blocks)[0]
