"""Sums of row statistics for each node of a tree, feature and bin: the pass over data that growing trees consists of.

    H[f, j, b, k] = Σ_i stats[i, k]·[node_i = j]·[bins[f, i] = b]

With it the gain of every split is a running sum over bins: a level of a tree costs rows·features additions, where
scoring each candidate by a pass over all rows costs rows·features·bins.

When to use it: to grow trees, or for any sums by two integer keys. When not: for one key alone, `jax.ops.segment_sum`.

Only the features of the call are summed: a caller with many features passes a few at a time and keeps what it needs.
Rows whose node is not 0 to ``n_nodes − 1`` are left out, as are bins that do not exist. Sums are in float32 (float64 of
float64), in the order of rows on CPU. The Pallas kernels sum by products with zeros and ones (see `pieces`): they give
the same bits at every call, where a GPU's atomic additions do not, and a NaN among the statistics of a node spoils all
bins of that node. On an H200 the additions were 16 to 79 times as fast, so that the GPU kernel runs only where it is
named. There are no gradients: asking for one raises.

Over several devices: shard rows; the Pallas kernels need `jax.shard_map` and a sum of what the devices found.

Ke et al., LightGBM, NeurIPS 2017; Chen and Guestrin, XGBoost, 2016, arXiv 1603.02754.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.node_histogram import gpu, tpu, xla

__all__ = ["node_histogram"]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""
SLOWER = ("pallas_gpu",)
"""Measured at 1 to 256 nodes: see docs/proving.md."""
RUN = {"xla": xla.histogram, "pallas_tpu": tpu.histogram, "pallas_gpu": gpu.histogram}


def _check(bins: Array, node: Array, stats: Array, n_nodes: Any, n_bins: Any) -> None:
    for name, array in (("bins", bins), ("node", node)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {array.dtype}, expected an integer type")
    if not jnp.issubdtype(stats.dtype, jnp.floating):
        raise TypeError(f"stats has dtype {stats.dtype}, expected a real floating type")
    for name, value in (("n_nodes", n_nodes), ("n_bins", n_bins)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if n_nodes * n_bins >= 2**31:
        raise ValueError(f"n_nodes·n_bins is {n_nodes * n_bins}, expected less than 2**31")
    if bins.ndim != 2 or bins.shape[0] < 1:
        raise ValueError(f"bins has shape {bins.shape}, expected [features, rows] with at least one feature")
    rows = bins.shape[1]
    if node.shape != (rows,):
        raise ValueError(f"node has shape {node.shape}, expected ({rows},) as bins is {bins.shape}")
    if stats.ndim != 2 or stats.shape[0] != rows or stats.shape[1] < 1:
        raise ValueError(f"stats has shape {stats.shape}, expected [{rows}, K] as bins is {bins.shape}")


@functools.cache
def _op(name: str, n_nodes: int, n_bins: int, interpret: Any) -> Any:
    @jax.custom_jvp
    def op(bins: Array, node: Array, stats: Array) -> Array:
        return RUN[name](bins, node, stats, n_nodes, n_bins, interpret=interpret)

    @op.defjvp
    def _no_gradient(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
        raise TypeError("node_histogram has no gradient; sums by jax.ops.segment_sum have")

    return op


def node_histogram(
    bins: Shaped[Array, "*_"],
    node: Shaped[Array, "*_"],
    stats: Shaped[Array, "*_"],
    *,
    n_nodes: Any,
    n_bins: Any,
    implementation: str | None = None,
) -> Shaped[Array, "F N B K"]:
    """Sums of ``stats`` for each feature, node and bin: see the module.

    Args:
        bins: bin of each feature and row [F, n], integers; uint8 reads least.
        node: node of each row [n], integers.
        stats: what is summed [n, K].
        n_nodes: N, static.
        n_bins: B, static.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        Sums [F, N, B, K] in float32, or float64 of float64.

    Raises:
        ValueError: for shapes that do not fit, sizes below 1, an implementation that is unknown or cannot take
            the call.
        TypeError: for dtypes other than integers and reals, and where a gradient is asked for.

    >>> bins, node = jnp.array([[0, 1, 1]]), jnp.array([0, 0, 1])
    >>> node_histogram(bins, node, jnp.array([[1.0], [2.0], [4.0]]), n_nodes=2, n_bins=2)[0, :, :, 0].tolist()
    [[1.0, 2.0], [0.0, 4.0]]
    """
    _check(bins, node, stats, n_nodes, n_bins)
    kernels = (("pallas_tpu", tpu), ("pallas_gpu", gpu))
    refusals = {name: module.refusal(stats, n_nodes, n_bins) for name, module in kernels}
    name = resolve_implementation(implementation, AVAILABLE, refusals=refusals, slower=SLOWER)
    return _op(name, n_nodes, n_bins, False)(bins, node.astype(jnp.int32), stats)
