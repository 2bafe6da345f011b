"""float32 products on a bfloat16 matrix unit, and the layout of rows and keys that the TPU kernels share.

The matrix unit multiplies bfloat16 numbers exactly and sums in float32. A float32 number is the sum of three bfloat16
*pieces*, so a float32 product takes six passes (pieces i and j with i + j < 3). bfloat16 keys are one piece already:
two pieces of the other operand (16 bits, an error of 2⁻¹⁷) then make a product whose error is far below the rounding of
the keys, in two passes. `Precision` says how many pieces each dtype gets.

Heads of at most 64 lanes lie twice in a row of 128 lanes, ``[k | k]``. The matrix unit contracts 128 lanes at once, so
that the two pieces of a float32 operand, ``[x₀ | x₁]``, meet their keys in one pass instead of two half-empty ones.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128


@dataclasses.dataclass(frozen=True)
class Precision:
    """How operands are split.

    Attributes:
        given: pieces of an input (query, key, value, cotangent): exact.
        order: products of pieces i and j are formed where i + j < order.
    """

    given: int
    order: int


def precision_of(dtype: jnp.dtype) -> Precision:
    """Pieces for inputs of a dtype.

    >>> precision_of(jnp.dtype("bfloat16"))
    Precision(given=1, order=2)
    """
    return {"bfloat16": Precision(1, 2), "float16": Precision(2, 2)}.get(dtype.name, Precision(3, 3))


def lanes(size: int) -> int:
    """Lanes that a head of this size occupies: heads of at most 64 occupy 128, twice.

    >>> lanes(64), lanes(65), lanes(130)
    (128, 128, 256)
    """
    return -(-size // LANES) * LANES


def is_doubled(size: int) -> bool:
    """Whether a head lies twice in its lanes."""
    return size <= LANES // 2


def to_lanes(x: jax.Array) -> jax.Array:
    """[..., H] -> [..., lanes]: zeros behind the head, and the head twice where it fits twice."""
    size = x.shape[-1]
    half = LANES // 2 if is_doubled(size) else lanes(size)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, half - size)])
    return jnp.concatenate([x, x], axis=-1) if is_doubled(size) else x


def pad_lanes(x: jax.Array) -> jax.Array:
    """[..., H] -> [..., lanes] with zeros behind the head."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes(x.shape[-1]) - x.shape[-1])])


def split_input(x: jax.Array, pieces: int) -> jax.Array:
    """[B, K, S, L] -> [B, K, pieces, S, L] bfloat16, whose sum over pieces is x.

    ``reduce_precision`` and not a pair of casts: XLA may drop a pair of casts as excess precision.
    """
    if pieces == 1:
        return x.astype(jnp.bfloat16)[:, :, None]
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(pieces):
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.stack(parts, axis=2)


def split(x: jax.Array, pieces: int) -> list[jax.Array]:
    """float32 -> bfloat16-valued float32 pieces. Cuts bits off (two vector operations) and rounds the last piece.

    The caller casts; a mask of the bits cannot be optimised away, as a pair of casts can.
    """
    parts = []
    for _ in range(pieces - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part)
        x = x - part
    return [*parts, x]


def key_operands(x: jax.Array, order: int, given: int, *, pieces: int | None, doubled: bool) -> list[list[jax.Array]]:
    """Splits rows [R, L] for products with keys: for every piece of the keys, the bfloat16 chunks that it meets.

    Args:
        x: float32 rows; lanes doubled if ``doubled``.
        order: products of pieces i and j are formed where i + j < order.
        given: pieces of the keys.
        pieces: pieces that x has (inputs), ``None`` for ``order``.
        doubled: heads lie twice in their lanes, so that two pieces share a chunk.
    """
    parts = split(x, order if pieces is None else min(pieces, order))
    if doubled:
        first = lax.broadcasted_iota(jnp.int32, x.shape, 1) < LANES // 2
        zero = jnp.zeros_like(x)
    chunks = []
    for j in range(given):
        mine = parts[: order - j]
        if doubled:
            mine = [*mine, zero] if len(mine) % 2 else mine
            mine = [jnp.where(first, a, b) for a, b in zip(mine[::2], mine[1::2], strict=True)]
        chunks.append([m.astype(jnp.bfloat16) for m in mine])
    return chunks


def chunk_counts(precision: Precision, pieces: int | None, doubled: bool) -> list[int]:
    """Chunks that `key_operands` makes for every piece of the keys.

    >>> chunk_counts(Precision(3, 3), None, False), chunk_counts(Precision(3, 3), None, True)
    ([3, 2, 1], [2, 1, 1])
    """
    most = precision.order if pieces is None else min(pieces, precision.order)
    counts = [min(most, precision.order - j) for j in range(precision.given)]
    return [-(-n // 2) for n in counts] if doubled else counts


_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def _dot(a: jax.Array, b: jax.Array, dims: tuple) -> jax.Array:
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _sum(terms: Sequence[jax.Array]) -> jax.Array:
    """Adds small terms first: they come last in the order of pieces."""
    total = terms[-1]
    for term in terms[-2::-1]:
        total = total + term
    return total


def dot_keys(
    chunks: Sequence[Sequence[jax.Array]], keys: Sequence[jax.Array], *, keys_first: bool = False
) -> jax.Array:
    """Rows times keys, contracted over lanes: [R, S] from `key_operands` and the pieces [S, L] of the keys.

    With ``keys_first`` the result is [S, R].

    Two chunks of bfloat16 keys are contracted together, as newer matrix units are 256 deep. Otherwise chunks are summed
    in float32, small ones first, which loses less.
    """
    if len(keys) == 1 and len(chunks[0]) == 2:
        pairs = [(jnp.concatenate(chunks[0], axis=1), jnp.concatenate([*keys, *keys], axis=1))]
    else:
        pairs = [(chunk, key) for mine, key in zip(chunks, keys, strict=True) for chunk in mine]
    return _sum([_dot(key, chunk, _NT) if keys_first else _dot(chunk, key, _NT) for chunk, key in pairs])


def dot_weights(weights: jax.Array, keys: Sequence[jax.Array], order: int) -> jax.Array:
    """float32 weights [R, S] times pieces [S, L] of keys or values, contracted over keys: [R, L]."""
    parts = [part.astype(jnp.bfloat16) for part in split(weights, order)]
    return _sum([_dot(part, key, _NN) for j, key in enumerate(keys) for part in parts[: order - j]])


def columns(row: jax.Array) -> jax.Array:
    """[1, R] -> [R, 128]: one number per row of a tile, the same in all lanes.

    Row numbers lie along lanes in HBM, where a trailing axis of one would be padded to 128.
    """
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: jax.Array) -> jax.Array:
    """[R, 128] with equal lanes -> [1, R]."""
    return column.T[:1]


def widen(column: jax.Array, width: int) -> jax.Array:
    """[R, 128] -> [R, width] by repetition: no work, the same registers."""
    return column if width == LANES else jnp.concatenate([column] * (width // LANES), axis=1)


def row_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Σ over lanes of a·b: [R, 128] with equal lanes."""
    return jnp.broadcast_to(jnp.sum(a * b, axis=1, keepdims=True), (a.shape[0], LANES))


def fold(x: jax.Array) -> jax.Array:
    """[R, S] -> [R, 128]: sums of lanes that are 128 apart."""
    return _sum([x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])
