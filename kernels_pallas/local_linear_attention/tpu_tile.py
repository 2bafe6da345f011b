"""A tile of rows of one key head inside a TPU kernel: its logits, its weights, and products with the covariance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.tpu_pieces import (
    LANES,
    Precision,
    chunk_counts,
    dot_keys,
    dot_weights,
    fold,
    is_doubled,
    key_operands,
    row_dot,
    widen,
)
from kernels_pallas.local_linear_attention.tpu_rows import MASKED, Layout
from kernels_pallas.local_linear_attention.tpu_solve import conjugate_gradient

# Numbers per row that a tile keeps, equal in all lanes: the last key that the row sees; what is subtracted from its
# logits; the factor that makes its weights sum to one; the product of the current vector with the mean key, later sums
# of a pass; r·z and its goal in the solver; two more for the backward pass.
LAST, TOP, NORMAL, SHIFT, RZ, GOAL, SHIFT_Y, GRAD = range(8)
COLUMNS = 8


def loop(start: Any, stop: Any, body: Callable[[jax.Array], None]) -> None:
    """A loop without carry: what it sums lies in VMEM, where the registers would spill it anyway."""

    def step(j: jax.Array, _: jax.Array) -> jax.Array:
        body(j)
        return jnp.int32(0)

    lax.fori_loop(start, stop, step, jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class Tile:
    """References of a tile.

    Attributes:
        layout: sizes.
        precision: pieces of keys and queries.
        is_cached: whether ``w`` holds the weights of all blocks.
        scale: of the logits.
        keys: pieces of the keys, [1, 1, pieces, S, L].
        w: logits, later weights, [blocks, tile, block].
        queries: chunks of the queries.
        columns: numbers per row, [8, tile, 128].
        total: sums of a pass, [tile, L].
    """

    layout: Layout
    precision: Precision
    is_cached: bool
    scale: jax.Array
    keys: Any
    w: Any
    queries: Any
    columns: Any
    total: Any

    @property
    def half(self) -> float:
        """Sums over lanes count a doubled head twice."""
        return 0.5 if is_doubled(self.layout.head) else 1.0

    def load_keys(self, j: jax.Array) -> list[jax.Array]:
        """The pieces of block j, each [block, L]."""
        return load_block(self.keys, j, self.layout.block)

    def store(self, ref: Any, x: jax.Array, pieces: int | None = None) -> None:
        """Split rows for products with keys. ``pieces`` for inputs, which have fewer."""
        store_chunks(ref, x, self.precision, pieces, is_doubled(self.layout.head))

    def project(self, ref: Any, keys: list[jax.Array], pieces: int | None = None) -> jax.Array:
        """Products of stored rows with a block of keys, [tile, block]."""
        return project(ref, keys, self.precision, pieces, is_doubled(self.layout.head))

    def logits(self, j: jax.Array, is_edge: bool) -> jax.Array:
        """Logits of block j; ``is_edge`` if there may be keys in it that a row does not see."""
        s = self.project(self.queries, self.load_keys(j), self.precision.given) * self.scale
        if is_edge:
            key = (lax.broadcasted_iota(jnp.int32, s.shape, 1) + j * self.layout.block).astype(jnp.float32)
            s = jnp.where(key <= widen(self.columns[LAST], s.shape[1]), s, MASKED)
        return s

    def exponentials(self, j: jax.Array, is_edge: bool = True) -> jax.Array:
        """Weights of block j, computed."""
        return jnp.exp(self.logits(j, is_edge) - widen(self.columns[TOP], self.layout.block))

    def weights(self, j: jax.Array) -> jax.Array:
        """Weights of block j, from VMEM where they are kept."""
        return self.w[j] if self.is_cached else self.exponentials(j)

    def solve(
        self,
        options: Options,
        blocks: jax.Array,
        mean: Any,
        ridge: jax.Array,
        x: Any,
        r: Any,
        p: Any,
        inverse: Any,
        sums: Any,
        chunks: Any,
    ) -> jax.Array:
        """Solve A x = r with A = Σ p c cᵀ + ridge, c = k − mean: see `conjugate_gradient`.

        Args:
            options: of the solver.
            blocks: blocks of keys that the tile sees.
            mean: mean keys, [tile, L].
            ridge: [tile, 128].
            x: receives the solution.
            r: right-hand side, overwritten.
            p: scratch [tile, L].
            inverse: scratch [tile, L] for Jacobi's preconditioner.
            sums: scratch [tile, 128].
            chunks: scratch for the direction's pieces.

        Returns:
            Iterations.
        """
        layout, order = self.layout, self.precision.order
        L = mean.shape[1]

        def matvec(direction: jax.Array) -> jax.Array:
            self.store(chunks, direction)
            self.columns[SHIFT] = row_dot(direction, mean[...]) * self.half
            self.total[...] = jnp.zeros_like(self.total)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

            def body(j: jax.Array) -> None:
                keys = self.load_keys(j)
                u = self.project(chunks, keys) - widen(self.columns[SHIFT], layout.block)
                u = self.weights(j) * u
                sums[...] += fold(u)
                self.total[...] += dot_weights(u, keys, order)

            loop(0, blocks, body)
            rest = jnp.sum(sums[...], axis=1, keepdims=True)  # zero but for rounding, which large keys would multiply
            normal = widen(self.columns[NORMAL], L)
            return (self.total[...] - rest * mean[...]) * normal + widen(ridge, L) * direction

        if options.preconditioner == "jacobi":
            self.total[...] = jnp.zeros_like(self.total)

            def squares(j: jax.Array) -> None:  # any positive diagonal will do: bfloat16 is enough
                k = self.load_keys(j)[0].astype(jnp.float32)
                self.total[...] += dot_weights(self.weights(j), [(k * k).astype(jnp.bfloat16)], 1)

            loop(0, blocks, squares)
            variance = self.total[...] * widen(self.columns[NORMAL], L) - mean[...] * mean[...]
            inverse[...] = 1.0 / (jnp.maximum(variance, 0.0) + widen(ridge, L))
        return conjugate_gradient(
            matvec,
            x,
            r,
            p,
            self.columns.at[RZ],
            self.columns.at[GOAL],
            max_iters=options.max_iters,
            rtol=options.rtol,
            inverse_diagonal=inverse if options.preconditioner == "jacobi" else None,
        )


def load_block(ref: Any, j: jax.Array, block: int) -> list[jax.Array]:
    """The pieces of block j of keys or values [1, 1, pieces, S, L]."""
    start = pl.multiple_of(j * block, block)
    return [ref[0, 0, i, pl.ds(start, block), :] for i in range(ref.shape[2])]


def store_chunks(ref: Any, x: jax.Array, precision: Precision, pieces: int | None, doubled: bool) -> None:
    """Split rows for products with keys or values and keep the chunks."""
    chunks = key_operands(x, precision.order, precision.given, pieces=pieces, doubled=doubled)
    for i, chunk in enumerate(c for mine in chunks for c in mine):
        ref[i] = chunk


def project(ref: Any, keys: list[jax.Array], precision: Precision, pieces: int | None, doubled: bool) -> jax.Array:
    """Products of kept rows with a block of keys or values, [rows, block]."""
    counts = chunk_counts(precision, pieces, doubled)
    starts = [sum(counts[:j]) for j in range(len(counts))]
    return dot_keys([[ref[i] for i in range(a, a + n)] for a, n in zip(starts, counts, strict=True)], keys)


def row_sum(x: jax.Array) -> jax.Array:
    """[tile, 128] -> the sum over lanes, in all lanes."""
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (x.shape[0], LANES))
