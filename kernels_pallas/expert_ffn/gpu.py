"""The union kernel as two Pallas kernels for GPUs (Triton): programs find the slabs of active experts by their address.

The first gives act(x·upₑᵀ)·score of every active expert; its programs, one for each slot of the union and tile of de,
end at once where the slot is empty. The second sums the down products: a program owns a tile of D and every P-th active
expert, so that few tokens fill the GPU as well; the P partial sums are added by XLA. No program waits for another one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import ArrayLike

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.expert_ffn.problem import ACTIVATIONS, Activation, Active

WIDE = 128  # elements of D that a turn of the up product takes
TILE = 64  # elements of D that a program of the down product owns
ROWS = 32  # rows of a slab at a time
PROGRAMS = 264  # two for each multiprocessor of an H100
MIN_TOKENS = 16  # rows of a product on tensor cores
MAX_TOKENS = 128


def refusal(x: Shaped, up: Shaped, down: Shaped, experts: int) -> str | None:
    """Why the kernels cannot take a call, or ``None``."""
    del experts
    dtypes = [a.dtype for a in (x, up, down)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtypes are {', '.join(map(str, dtypes))}, expected all float32, all bfloat16 or all float16"
    if up.shape[2] % WIDE:
        return f"D is {up.shape[2]}, expected a multiple of {WIDE}"
    if up.shape[1] % ROWS:
        return f"de is {up.shape[1]}, expected a multiple of {ROWS}"
    if x.shape[0] > MAX_TOKENS:
        return f"x has {x.shape[0]} tokens, expected at most {MAX_TOKENS}: the dense form is faster with more"
    return None


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32, precision=precision
    )


def _up(ids_ref: Any, scalars_ref: Any, x_ref: Any, up_ref: Any, scores_ref: Any, hidden_ref: Any, *, act: Any) -> None:
    slot, tile = pl.program_id(0), pl.program_id(1)

    @pl.when(slot < scalars_ref[0])
    def _() -> None:
        expert = ids_ref[slot]
        slab = scalars_ref[1] + expert

        def turn(index: Array, out: Array) -> Array:
            columns = pl.ds(index * WIDE, WIDE)
            return out + _dot(x_ref[:, columns], up_ref[slab, pl.ds(tile * ROWS, ROWS), columns], (1, 1))

        zeros = jnp.zeros((x_ref.shape[0], ROWS), jnp.float32)
        hidden = act(jax.lax.fori_loop(0, x_ref.shape[1] // WIDE, turn, zeros)) * scores_ref[expert, :][:, None]
        hidden_ref[slot, :, pl.ds(tile * ROWS, ROWS)] = hidden.astype(hidden_ref.dtype)


def _down(ids_ref: Any, scalars_ref: Any, hidden_ref: Any, down_ref: Any, out_ref: Any, *, parts: int) -> None:
    tile, part = pl.program_id(0), pl.program_id(1)
    columns = pl.ds(tile * TILE, TILE)
    pieces = down_ref.shape[1] // ROWS

    def turn(index: Array, out: Array) -> Array:
        slot = part + parts * jax.lax.div(index, pieces)
        rows = pl.ds(jax.lax.rem(index, pieces) * ROWS, ROWS)
        slab = scalars_ref[1] + ids_ref[slot]
        return out + _dot(hidden_ref[slot, :, rows], down_ref[slab, rows, columns], (1, 0))

    turns = jax.lax.div(scalars_ref[0] - part + parts - 1, parts) * pieces
    out_ref[part, :, columns] = jax.lax.fori_loop(
        0, turns, turn, jnp.zeros((hidden_ref.shape[1], TILE), jnp.float32)
    )  # fmt: skip


def forward(
    x: Array,
    up: Array,
    down: Array,
    scores: Array,
    union: Active,
    first: ArrayLike,
    *,
    activation: Activation,
    max_active: int,
    interpret: Any = False,
) -> Array:
    """The sum over the experts of ``union`` [T, D], at most ``max_active`` of them; see `refusal` for what it takes."""
    tokens, width = x.shape
    size = up.shape[1]
    rows = max(MIN_TOKENS, pl.next_power_of_2(max(tokens, 1)))
    padded = jnp.pad(x, ((0, rows - tokens), (0, 0)))
    columns = jnp.pad(scores.astype(jnp.float32), ((0, rows - tokens), (0, 0))).T
    scalars = jnp.stack([union.number, jnp.asarray(first, jnp.int32)])
    shape = functools.partial(kernel_output, [x, up, down, scores, union.number])
    hidden = pl.pallas_call(
        functools.partial(_up, act=ACTIVATIONS[activation]),
        grid=(max_active, size // ROWS),
        out_shape=shape((max_active, rows, size), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="expert_ffn_up",
    )(union.ids, scalars, padded, up, columns)
    parts = min(max_active, -(-PROGRAMS * TILE // width))
    out = pl.pallas_call(
        functools.partial(_down, parts=parts),
        grid=(width // TILE, parts),
        out_shape=shape((parts, rows, width), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="expert_ffn_down",
    )(union.ids, scalars, hidden, down)
    return out.sum(0)[:tokens].astype(x.dtype)
