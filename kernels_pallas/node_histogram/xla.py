"""The fastest formulation without Pallas: one segment sum for each feature, one feature after the other.

On one core a loop over features reads and adds in 1 to 3 ns for a row; `vmap` over features and one scatter over all of
them take several times as long, a product with one-hot rows a hundred times.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.arrays import accumulator


def histogram(
    bins: Int[Array, "F n"] | Any, node: Int[Array, "n"], stats: Float[Array, "n K"], n_nodes: int, n_bins: int,
    *, interpret: Any = False,
) -> Float[Array, "F N B K"]:  # fmt: skip
    """Sums of all nodes."""
    del interpret
    stats = stats.astype(accumulator(stats.dtype))
    start = jnp.where((node >= 0) & (node < n_nodes), node * n_bins, -1)

    def one(row: Array) -> Array:
        column = row.astype(jnp.int32)
        here = (start >= 0) & (column >= 0) & (column < n_bins)
        cell = jnp.where(here, start + column, -1)  # a segment that does not exist is left out
        sums = jax.ops.segment_sum(stats, cell, num_segments=n_nodes * n_bins)
        return sums.reshape(n_nodes, n_bins, stats.shape[1])

    return one(bins[0])[None] if bins.shape[0] == 1 else jax.lax.map(one, bins)
