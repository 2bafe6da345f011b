"""The fastest formulations without Pallas: segment sums, of one feature after the other or of all at once.

On one core a loop over features reads and adds in 1 to 3 ns for a row; `vmap` over features and one scatter over all of
them take several times as long, a product with one-hot rows a hundred times. A GPU adds many features at once: launches
of one feature each would take longer than the additions. Its additions to one cell wait for each other: where there are
few nodes, rows are dealt out to copies of the sums.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.arrays import accumulator

NODES = 32
"""So many nodes, or copies of fewer, keep a GPU's additions out of each other's way."""
MOST = 2**26
"""Rows or cells of the features that are added at once: 256 MiB for each statistic, and no index beyond int32."""


def histogram(
    bins: Int[Array, "F n"] | Any, node: Int[Array, "n"], stats: Float[Array, "n K"], n_nodes: int, n_bins: int,
    *, interpret: Any = False,
) -> Float[Array, "F N B K"]:  # fmt: skip
    """Sums of all nodes."""
    del interpret
    return jax.lax.platform_dependent(
        bins,
        node,
        stats.astype(accumulator(stats.dtype)),
        cuda=functools.partial(several_at_once, n_nodes=n_nodes, n_bins=n_bins),
        default=functools.partial(_in_turn, n_nodes=n_nodes, n_bins=n_bins),
    )


def _starts(node: Array, n_nodes: int, n_bins: int) -> Array:
    """First cell of each row's node, or −1: the same for all features."""
    return jnp.where((node >= 0) & (node < n_nodes), node * n_bins, -1)


def _cell(bins: Array, start: Array, n_bins: int) -> Array:
    """Where rows are added to, or −1, a segment that does not exist and is left out."""
    column = bins.astype(jnp.int32)
    return jnp.where((start >= 0) & (column >= 0) & (column < n_bins), start + column, -1)


def _in_turn(bins: Array, node: Array, stats: Array, n_nodes: int, n_bins: int) -> Array:
    start = _starts(node, n_nodes, n_bins)

    def one(row: Array) -> Array:
        cell = _cell(row, start, n_bins)
        sums = jax.ops.segment_sum(stats, cell, num_segments=n_nodes * n_bins)
        return sums.reshape(n_nodes, n_bins, stats.shape[1])

    return one(bins[0])[None] if bins.shape[0] == 1 else jax.lax.map(one, bins)


def several_at_once(bins: Array, node: Array, stats: Array, n_nodes: int, n_bins: int) -> Array:
    """All features by as few scatters as memory and int32 allow: what runs on GPUs."""
    features, rows = bins.shape
    cells = max(1, NODES // n_nodes) * n_nodes * n_bins
    together = max(1, min(features, MOST // max(rows, cells)))
    if together == features:
        return at_once(bins, node, stats, n_nodes, n_bins)
    whole = features // together
    blocks = bins[: whole * together].reshape(whole, together, rows)
    sums = jax.lax.map(lambda block: at_once(block, node, stats, n_nodes, n_bins), blocks)
    sums = sums.reshape(whole * together, *sums.shape[2:])
    rest = [at_once(bins[whole * together :], node, stats, n_nodes, n_bins)] if features % together else []
    return jnp.concatenate([sums, *rest])


def at_once(bins: Array, node: Array, stats: Array, n_nodes: int, n_bins: int) -> Array:
    """All features by one scatter, with copies of the sums where nodes are few."""
    (features, rows), count = bins.shape, stats.shape[1]
    copies = max(1, NODES // n_nodes)
    cell = _cell(bins, _starts(node, n_nodes, n_bins), n_bins)
    slab = jnp.arange(features)[:, None] * copies + jnp.arange(rows) % copies
    cell = jnp.where(cell < 0, -1, slab * (n_nodes * n_bins) + cell).reshape(-1)
    each = jnp.broadcast_to(stats, (features, rows, count)).reshape(-1, count)
    sums = jax.ops.segment_sum(each, cell, num_segments=features * copies * n_nodes * n_bins)
    return sums.reshape(features, copies, n_nodes, n_bins, count).sum(1)
