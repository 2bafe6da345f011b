"""A tile of rows of one key head inside a GPU kernel: products, weights, and conjugate gradients with its covariance.

Vectors that are only needed between two passes over the keys (solution, residual, direction, mean) lie in GPU memory,
which a pass of a thousand times their size hardly notices; registers are for what a pass needs at every block.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.local_linear_attention.gpu_plan import Plan
from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.tpu_pieces import split

LOG2E = math.log2(math.e)
LOWEST = -1e30  # starts a maximum; finite, so that differences with it are not NaN
NT = (((1,), (1,)), ((), ()))  # contracts the last axes
NN = (((1,), (0,)), ((), ()))

COLUMNS = 32  # of vectors that are worked on at once

# Slots of a tile's vectors.
MEAN, SOLUTION, RESIDUAL, DIRECTION, IMAGE, DIAGONAL = range(6)

Carry = tuple[jax.Array, ...]

Pieces = Sequence[jax.Array]


def pieces_of(x: jax.Array, order: int) -> list[jax.Array]:
    """float32 numbers as operands."""
    return [part.astype(jnp.bfloat16) for part in split(x, order)]


def add_product(total: jax.Array | None, a: Pieces, b: Pieces, order: int, dims: Any) -> jax.Array:
    """``total`` and the product of numbers in pieces, small terms first; tensor cores add to ``total`` in place."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < order]
    for i, j in sorted(pairs, key=sum, reverse=True):
        term = lax.dot_general(a[i], b[j], dims, preferred_element_type=jnp.float32)
        total = term if total is None else total + term
    assert total is not None
    return total


def row_sum(x: jax.Array) -> jax.Array:
    """[R, H] -> [R]."""
    return jnp.sum(x, axis=1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a pass over the keys needs.

    Attributes:
        plan: sizes.
        scale: of the logits, in units of log 2.
        last: last key that each row sees, [R].
        q_ref: pieces of the queries, [pieces, R, H].
        k_ref: pieces of the keys, [pieces, S, H].
        vectors: of the rows, [slots, R, H].
        pieces: of the vector that is worked on, [pieces, R, H].
        shift: its products with the mean keys, [R].
        sync: makes what the program's threads wrote visible to each other.
    """

    plan: Plan
    scale: jax.Array
    last: jax.Array
    q_ref: Any
    k_ref: Any
    vectors: Any
    pieces: Any
    shift: Any
    sync: Callable[[], None]

    @property
    def order(self) -> int:
        """Pieces of numbers made on the way."""
        return self.plan.precision.order

    def blocks(self) -> jax.Array:
        """Blocks of keys that any row sees."""
        if not self.plan.is_masked:
            return jnp.int32(self.plan.layout.blocks)
        return lax.div(jnp.max(self.last) + self.plan.layout.block, self.plan.layout.block)

    def load(self, ref: Any, j: jax.Array) -> list[jax.Array]:
        """Pieces of block j of keys or values, each [block, H]."""
        block = self.plan.layout.block
        return [ref[n, pl.ds(j * block, block), :] for n in range(self.plan.precision.given)]

    def columns(self, body: Callable[..., Any], *carry: Any) -> Any:
        """Run ``body`` (columns, *carry) -> carry on a few columns at a time of vectors that lie in GPU memory."""
        width = min(COLUMNS, self.plan.head)
        result = lax.fori_loop(
            0, self.plan.head // width, lambda c, carry: body(pl.ds(c * width, width), *carry), carry
        )
        self.sync()
        return result

    def aim(self, vector: Callable[[Any], jax.Array], pieces_ref: Any, shift_ref: Any) -> None:
        """Make rows ready for products with c = k − mean: their pieces, and their products with the mean.

        The products pass through memory on purpose: handed over in registers, they make the compiler lay out what is
        computed with them for the sums over columns, and move a whole tile from thread to thread for every block.

        Args:
            vector: some columns of the rows.
            pieces_ref: receives the pieces [pieces, R, H].
            shift_ref: receives the products with the mean [R].
        """

        def some(at: Any, shift: jax.Array) -> tuple[jax.Array]:
            x = vector(at)
            for n, part in enumerate(pieces_of(x, self.order)):
                pieces_ref[n, :, at] = part
            return (shift + row_sum(x * self.vectors[MEAN, :, at]),)

        (shift_ref[...],) = self.columns(some, jnp.zeros(shift_ref.shape, jnp.float32))
        self.sync()

    def operand(self, ref: Any) -> list[jax.Array]:
        """Pieces of rows, [R, H] each."""
        return [ref[n] for n in range(ref.shape[0])]

    def project(self, rows: Pieces, keys: Pieces) -> jax.Array:
        """Products of rows with a block of keys or values, [R, block]."""
        return add_product(None, rows, keys, self.order, NT)

    def gather(self, total: jax.Array, weights: jax.Array, keys: Pieces) -> jax.Array:
        """``total`` and the sums of keys or values with float32 weights, [R, H]."""
        return add_product(total, pieces_of(weights, self.order), keys, self.order, NN)

    def logits(self, j: jax.Array, queries: Pieces, keys: Pieces) -> jax.Array:
        """Logits of block j in units of log 2, −inf for keys that a row does not see."""
        s = self.project(queries, keys) * self.scale
        if not self.plan.is_masked:
            return s
        key = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        return jnp.where(key <= (self.last - j * self.plan.layout.block)[:, None], s, -jnp.inf)

    def weights(self, j: jax.Array, queries: Pieces, keys: Pieces, base: jax.Array) -> jax.Array:
        """2^(logits − base) of block j."""
        return jnp.exp2(self.logits(j, queries, keys) - base[:, None])

    def empty(self, width: int) -> jax.Array:
        """Sums that start at zero."""
        return jnp.zeros((self.plan.layout.tile, width), jnp.float32)

    def solve(
        self,
        options: Options,
        base: jax.Array,
        inverse: jax.Array,
        ridge: jax.Array,
    ) -> jax.Array:
        """Solve A x = r with A = Σ w c cᵀ · inverse + ridge, c = k − mean, by conjugate gradients.

        ``vectors`` holds r (RESIDUAL) and the mean keys, and receives x (SOLUTION).

        A row has converged when r·z ≤ rtol² r₀·z₀ (z = r, or r over the diagonal); it is then left alone, and the loop
        ends when all rows have. NaN counts as converged: such a row does not keep the others waiting.

        Args:
            options: of the solver.
            base: what is subtracted from the logits, [R].
            inverse: what makes the weights sum to one, [R].
            ridge: [R].

        Returns:
            Iterations.
        """
        blocks, vectors, is_jacobi = self.blocks(), self.vectors, options.preconditioner == "jacobi"

        def product() -> jax.Array:
            """Puts Σ w (p·c) k for the direction p into IMAGE, and returns Σ w (p·c)."""
            rows, queries, shift = self.operand(self.pieces), self.operand(self.q_ref), self.shift[...]

            def body(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                total, rest = carry
                keys = self.load(self.k_ref, j)
                u = self.weights(j, queries, keys, base) * (self.project(rows, keys) - shift[:, None])
                return self.gather(total, u, keys), rest + row_sum(u)

            vectors[IMAGE], rest = lax.fori_loop(0, blocks, body, (self.empty(self.plan.head), jnp.zeros_like(shift)))
            self.sync()
            return rest

        if is_jacobi:
            queries = self.operand(self.q_ref)

            def squares(j: jax.Array, total: jax.Array) -> jax.Array:  # any positive diagonal will do: one piece
                keys = self.load(self.k_ref, j)
                w, k = self.weights(j, queries, keys, base), keys[0].astype(jnp.float32)
                return add_product(total, [w.astype(jnp.bfloat16)], [(k * k).astype(jnp.bfloat16)], 1, NN)

            vectors[DIAGONAL] = lax.fori_loop(0, blocks, squares, self.empty(self.plan.head)) * inverse[:, None]
            self.sync()

        none = jnp.zeros_like(base)

        def start(at: Any, rz: jax.Array) -> tuple[jax.Array]:
            r = z = vectors[RESIDUAL, :, at]
            if is_jacobi:
                mean = vectors[MEAN, :, at]
                diagonal = jnp.maximum(vectors[DIAGONAL, :, at] - mean * mean, 0.0) + ridge[:, None]
                vectors[DIAGONAL, :, at] = 1.0 / diagonal
                z = r / diagonal
            vectors[SOLUTION, :, at] = jnp.zeros_like(r)
            vectors[DIRECTION, :, at] = z
            return (rz + row_sum(r * z),)

        (rz,) = self.columns(start, none)
        self.aim(lambda at: vectors[DIRECTION, :, at], self.pieces, self.shift)
        goal = rz * (options.rtol * options.rtol)

        def unconverged(rz: jax.Array) -> jax.Array:
            # A number: booleans cannot be carried through a loop.
            return jnp.max(jnp.where(rz > goal, 1, 0))

        def precondition(r: jax.Array, at: Any) -> jax.Array:
            return r * vectors[DIAGONAL, :, at] if is_jacobi else r

        def step(carry: Carry) -> Carry:
            count, _, rz = carry
            rest = product()

            def bend(at: Any, curvature: jax.Array) -> tuple[jax.Array]:
                # Σ w (p·c) is zero but for rounding, which large keys would multiply.
                p, image = vectors[DIRECTION, :, at], vectors[IMAGE, :, at] - rest[:, None] * vectors[MEAN, :, at]
                image = image * inverse[:, None] + ridge[:, None] * p
                vectors[IMAGE, :, at] = image
                return (curvature + row_sum(p * image),)

            (curvature,) = self.columns(bend, none)
            active = (rz > goal) & (curvature > 0)
            alpha = jnp.where(active, rz / jnp.where(active, curvature, 1.0), 0.0)

            def walk(at: Any, new: jax.Array) -> tuple[jax.Array]:
                vectors[SOLUTION, :, at] += alpha[:, None] * vectors[DIRECTION, :, at]
                r = vectors[RESIDUAL, :, at] - alpha[:, None] * vectors[IMAGE, :, at]
                vectors[RESIDUAL, :, at] = r
                return (new + row_sum(r * precondition(r, at)),)

            (new,) = self.columns(walk, none)
            # A row whose curvature is no longer positive has reached its precision: it is finished as well.
            new = jnp.where(active, new, jnp.minimum(rz, goal))
            beta = jnp.where(active, new / jnp.where(active, rz, 1.0), 0.0)

            def turn(at: Any) -> jax.Array:
                p = precondition(vectors[RESIDUAL, :, at], at) + beta[:, None] * vectors[DIRECTION, :, at]
                vectors[DIRECTION, :, at] = p
                return p

            self.aim(turn, self.pieces, self.shift)
            return count + 1, unconverged(new), new

        # Not a `while_loop`: Triton's compiler crashes on one that carries vectors. Turns after the last cost nothing.
        count, *_ = lax.fori_loop(
            0,
            options.max_iters,
            lambda _, carry: lax.cond(carry[1] > 0, step, lambda carry: carry, carry),
            (jnp.int32(0), unconverged(rz), rz),
        )
        return count


def barrier(interpret: bool) -> Callable[[], None]:
    """What makes a program's writes visible to its threads; nothing in interpret mode, which has no threads."""
    return (lambda: None) if interpret else plt.debug_barrier
