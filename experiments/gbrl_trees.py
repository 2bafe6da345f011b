"""Trees whose candidates are each scored by a pass over all rows, for comparison with histograms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccel.boosting.trees import fit_bins


@functools.partial(jax.jit, static_argnames=("n_bins", "max_depth"))
def passes_over_rows(obs: Any, gradients: Any, *, n_bins: int, max_depth: int) -> tuple[jax.Array, jax.Array]:
    """Splits of an oblivious tree by the cosine score: columns and thresholds of its levels.

    Each level costs rows·columns·bins·outputs, whichever the number of nodes.
    """
    bins = fit_bins(obs, n_bins=n_bins)
    columns, (n, outputs) = obs.shape[1], gradients.shape
    right = (obs.T[:, None, :] > bins.thresholds[:, :, None]).reshape(columns * n_bins, n)  # candidates
    stats = jnp.concatenate([gradients, jnp.ones((n, 1))], 1)
    node = jnp.zeros(n, jnp.int32)
    used = jnp.zeros(columns * n_bins, bool)
    chosen = []

    def worth(sums: jax.Array) -> jax.Array:  # [..., nodes, O + 1]
        return (sums[..., :outputs] ** 2).sum(-1) / jnp.maximum(sums[..., outputs], 1)

    for level in range(max_depth):
        nodes = 2**level
        spread = (jax.nn.one_hot(node, nodes)[:, :, None] * stats[:, None, :]).reshape(n, -1)
        sums = (right.astype(jnp.float32) @ spread).reshape(-1, nodes, outputs + 1)
        score = jnp.sqrt(worth(sums) + worth(spread.sum(0).reshape(nodes, outputs + 1) - sums)).sum(-1)
        best = jnp.argmax(jnp.where(used, -jnp.inf, score))
        same = (jnp.arange(columns * n_bins) // n_bins == best // n_bins) & (
            bins.thresholds.reshape(-1) == bins.thresholds.reshape(-1)[best]
        )
        used = used | same
        node = 2 * node + right[best]
        chosen.append(best)
    places = jnp.stack(chosen)
    return places // n_bins, bins.thresholds.reshape(-1)[places]
