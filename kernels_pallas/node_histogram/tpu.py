"""Pallas kernel for TPUs: sums on the matrix unit, kept in VMEM while rows stream by.

A grid step takes a run of rows for a block of features. The rows' statistics, spread over nodes, are made once and
multiplied with the zeros and ones of each feature's bins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.node_histogram import pieces
from kernels_pallas.node_histogram.pieces import PIECES, pad_rows, split, up_to

LANES = 128
ROWS = 512  # of a step
SUBLANES = 16  # of bfloat16
OUT_BYTES = 6 * 2**20  # of sums, twice buffered
MOST = 1024  # nodes times statistics


def _sizes(n_nodes: int, n_bins: int) -> tuple[int, int]:
    return up_to(n_nodes, SUBLANES), up_to(n_bins, LANES)


def refusal(stats: Shaped, n_nodes: int, n_bins: int) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    if reason := pieces.refusal(stats, n_nodes, MOST):
        return reason
    nodes, columns = _sizes(n_nodes, n_bins)
    if 8 * stats.shape[1] * nodes * columns > OUT_BYTES:
        return f"sums of a feature, {stats.shape[1]} x {nodes} x {columns}, do not fit in {OUT_BYTES} bytes of VMEM"
    return None


def features_of_a_step(features: int, count: int, n_nodes: int, n_bins: int) -> int:
    """As many as their sums fit in VMEM."""
    nodes, columns = _sizes(n_nodes, n_bins)
    return max(1, min(features, OUT_BYTES // (8 * count * nodes * columns)))


def _body(bins_ref: Any, node_ref: Any, stats_ref: Any, out_ref: Any, spread_ref: Any) -> None:
    count, rows = stats_ref.shape
    nodes = spread_ref.shape[0] // count
    sums, columns = out_ref.shape[1:]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    here = node_ref[...] == jax.lax.broadcasted_iota(jnp.int32, (nodes, rows), 0)
    for k in range(count):
        spread = jnp.where(here, stats_ref[k : k + 1].astype(jnp.float32), 0)
        spread_ref[k * nodes : (k + 1) * nodes] = spread.astype(jnp.bfloat16)
    column = jax.lax.broadcasted_iota(jnp.int32, (columns, rows), 0)

    def feature(index: Array, carry: None) -> None:
        ones = jnp.where(bins_ref[index] == column, 1.0, 0.0).astype(jnp.bfloat16)
        found = jax.lax.dot_general(spread_ref[...], ones, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        total = found[2 * sums :] + found[sums : 2 * sums] + found[:sums]  # small terms first
        out_ref[index] += total

    jax.lax.fori_loop(0, out_ref.shape[0], feature, None)


def histogram(bins: Array, node: Array, stats: Array, n_nodes: int, n_bins: int, *, interpret: Any = False) -> Array:
    """Sums [F, N, B, K]; see `refusal` for what it takes."""
    features, count = bins.shape[0], stats.shape[1]
    nodes, columns = _sizes(n_nodes, n_bins)
    bins, node, stats = pad_rows(bins, node, stats, ROWS)
    rows = bins.shape[1]
    together = features_of_a_step(features, count, n_nodes, n_bins)
    blocks = -(-features // together)
    bins = jnp.pad(bins, ((0, blocks * together - features), (0, 0)))
    out = pl.pallas_call(
        _body,
        grid=(blocks, rows // ROWS),
        in_specs=[
            pl.BlockSpec((together, 1, ROWS), lambda f, r: (f, 0, r)),
            pl.BlockSpec((1, ROWS), lambda f, r: (0, r)),
            pl.BlockSpec((PIECES * count, ROWS), lambda f, r: (0, r)),
        ],
        out_specs=pl.BlockSpec((together, count * nodes, columns), lambda f, r: (f, 0, 0)),
        out_shape=kernel_output([bins, node, stats], (blocks * together, count * nodes, columns), jnp.float32),
        scratch_shapes=[pltpu.VMEM((PIECES * count * nodes, ROWS), jnp.bfloat16)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="node_histogram",
    )(bins[:, None], node[None], split(stats))
    parts = out.reshape(-1, count, nodes, columns)
    return jnp.moveaxis(parts[:features, :, :n_nodes, :n_bins], 1, 3)
