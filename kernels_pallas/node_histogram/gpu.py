"""Pallas kernel for GPUs (Triton): sums on tensor cores, in registers while a program's rows stream by.

A program takes one feature, a block of nodes, a block of bins and every P-th run of rows; XLA adds the P parts. There
are no atomic additions, so that the same call gives the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.node_histogram import pieces
from kernels_pallas.node_histogram.pieces import PIECES, pad_rows, split, up_to

ROWS = 64  # of a product
LEAST = 16  # nodes and bins of a product on tensor cores
NODES = 32  # of a program, at most
BINS = 128  # of a program, at most
PROGRAMS = 528  # four for each multiprocessor of an H100
MOST = 1024  # nodes times statistics
MAX_STATS = 8


def refusal(stats: Shaped, n_nodes: int, n_bins: int) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    del n_bins
    if stats.shape[1] > MAX_STATS:
        return f"there are {stats.shape[1]} statistics, expected at most {MAX_STATS}: their sums stay in registers"
    return pieces.refusal(stats, n_nodes, MOST)


def _body(bins_ref: Any, node_ref: Any, stats_ref: Any, out_ref: Any, *, nodes: int, columns: int, blocks: int) -> None:
    feature, block, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    count = stats_ref.shape[0] // PIECES
    parts, turns = out_ref.shape[0], stats_ref.shape[1] // ROWS
    first_node, first_bin = jax.lax.div(block, blocks) * nodes, jax.lax.rem(block, blocks) * columns
    own_nodes = first_node + jnp.arange(nodes)[:, None]
    own_bins = first_bin + jnp.arange(columns)[:, None]

    def turn(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = pl.ds((part + index * parts) * ROWS, ROWS)
        ones = (bins_ref[feature, at][None] == own_bins).astype(jnp.bfloat16)
        here = node_ref[at][None] == own_nodes
        new = []
        for k, total in enumerate(sums):
            for piece in reversed(range(PIECES)):  # small terms first
                spread = jnp.where(here, stats_ref[piece * count + k, at][None].astype(jnp.float32), 0)
                total = total + jax.lax.dot_general(
                    spread.astype(jnp.bfloat16), ones, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
            new.append(total)
        return tuple(new)

    start = tuple(jnp.zeros((nodes, columns), jnp.float32) for _ in range(count))
    own_turns = jax.lax.div(turns - part + parts - 1, parts)
    for k, total in enumerate(jax.lax.fori_loop(0, own_turns, turn, start)):
        out_ref[part, feature, k, pl.ds(first_node, nodes), pl.ds(first_bin, columns)] = total


def histogram(bins: Array, node: Array, stats: Array, n_nodes: int, n_bins: int, *, interpret: Any = False) -> Array:
    """Sums [F, N, B, K]; see `refusal` for what it takes."""
    features, count = bins.shape[0], stats.shape[1]
    nodes = max(LEAST, min(NODES, int(pl.next_power_of_2(n_nodes))))
    columns = max(LEAST, min(BINS, int(pl.next_power_of_2(n_bins))))
    all_nodes, all_bins = up_to(n_nodes, nodes), up_to(n_bins, columns)
    node_blocks, bin_blocks = all_nodes // nodes, all_bins // columns
    bins, node, stats = pad_rows(bins, node, stats, ROWS)
    turns = bins.shape[1] // ROWS
    parts = max(1, min(turns, PROGRAMS // (features * node_blocks * bin_blocks)))
    out = pl.pallas_call(
        functools.partial(_body, nodes=nodes, columns=columns, blocks=bin_blocks),
        grid=(features, node_blocks * bin_blocks, parts),
        out_shape=kernel_output([bins, node, stats], (parts, features, count, all_nodes, all_bins), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8 if nodes * columns >= 4096 else 4, num_stages=2),
        interpret=interpret,
        name="node_histogram",
    )(bins, node, split(stats))
    return jnp.moveaxis(out.sum(0)[:, :, :n_nodes, :n_bins], 1, 3)
