"""How rows, keys and their numbers lie in memory for the TPU kernels, and what each tile of rows has to visit."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.local_linear_attention.tpu_pieces import LANES, precision_of, split_input, to_lanes

HUGE = 1e30  # lse of rows that see no key: exp(logit − HUGE) is zero
MASKED = -1e30  # a logit that no key has: finite, so that differences of masked ones are not NaN
NUMBERS = 8  # numbers per row in one block of row numbers: the sublanes of a tile
DEFAULT_VMEM = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call.

    Rows of one key head are its group's queries, position by position (row = position · group + member): the group's
    heads share a tile, and with it every block of keys that the tile fetches.

    Attributes:
        batch: B.
        heads: key heads K.
        group: query heads per key head.
        positions: query positions T.
        keys: S.
        head: H.
        rows: rows of a key head, a multiple of the tile.
        tile: rows of a tile.
        padded_keys: S rounded up to whole blocks.
        block: keys of a block.
    """

    batch: int
    heads: int
    group: int
    positions: int
    keys: int
    head: int
    rows: int
    tile: int
    padded_keys: int
    block: int

    @property
    def tiles(self) -> int:
        """Tiles of rows per key head."""
        return self.rows // self.tile

    @property
    def blocks(self) -> int:
        """Blocks of keys."""
        return self.padded_keys // self.block


def layout_of(q_shape: tuple[int, ...], k_shape: tuple[int, ...], tile: int, block: int, multiple: int = 1) -> Layout:
    """Sizes for q [B, T, N, H] and k [B, S, K, H]; S is padded to ``multiple`` blocks."""
    batch, positions, heads, head = q_shape
    keys, key_heads = k_shape[1:3]
    group = heads // key_heads
    rows = positions * group
    tile = min(tile, -(-rows // LANES) * LANES)
    block = min(block, -(-keys // LANES) * LANES)
    whole = block * min(multiple, -(-keys // block))
    return Layout(
        batch=batch,
        heads=key_heads,
        group=group,
        positions=positions,
        keys=keys,
        head=head,
        rows=-(-rows // tile) * tile,
        tile=tile,
        padded_keys=-(-keys // whole) * whole,
        block=block,
    )


def pack_rows(x: jax.Array, layout: Layout, fill: float = 0.0) -> jax.Array:
    """[B, T, N, ...] -> [B, K, rows, ...].

    Numbers per row are gathered, and taken apart with a stride by `unpack_rows`: XLA's TPU compiler needs half a minute
    to reshape 2^18 numbers whose groups are not as long as a register.
    """
    tail, group, count = x.shape[3:], layout.group, layout.positions * layout.group
    if not tail and group > 1:
        row, head = jnp.arange(count), jnp.arange(layout.heads)[:, None] * group
        x = x[:, row // group, head + row % group]
    else:
        x = x.reshape(layout.batch, layout.positions, layout.heads, group, *tail)
        x = jnp.moveaxis(x, 2, 1).reshape(layout.batch, layout.heads, count, *tail)
    pad = [(0, 0), (0, 0), (0, layout.rows - count)] + [(0, 0)] * len(tail)
    return jnp.pad(x, pad, constant_values=fill)


def unpack_rows(x: jax.Array, layout: Layout) -> jax.Array:
    """[B, K, rows, ...] -> [B, T, N, ...]."""
    tail = x.shape[3:]
    x = x[:, :, : layout.positions * layout.group]
    if not tail and layout.group > 1:
        x = jnp.stack([x[:, :, member :: layout.group] for member in range(layout.group)], axis=2)
        return x.reshape(layout.batch, layout.heads * layout.group, layout.positions).swapaxes(1, 2)
    x = x.reshape(layout.batch, layout.heads, layout.positions, layout.group, *tail)
    return jnp.moveaxis(x, 1, 2).reshape(layout.batch, layout.positions, layout.heads * layout.group, *tail)


def pack_keys(x: jax.Array, layout: Layout) -> jax.Array:
    """[B, S, K, L] -> [B, K, pieces, S padded, L] bfloat16."""
    x = jnp.pad(x, [(0, 0), (0, layout.padded_keys - layout.keys), (0, 0), (0, 0)])
    return split_input(jnp.moveaxis(x, 2, 1), precision_of(x.dtype).given)


def pack_queries(q: jax.Array, layout: Layout) -> jax.Array:
    """[B, T, N, H] -> [B, K, rows, L], bfloat16 or float32 (a TPU's vector unit knows no float16)."""
    q = to_lanes(q)
    return pack_rows(q if q.dtype == jnp.bfloat16 else q.astype(jnp.float32), layout)


def last_keys(layout: Layout, offset: jax.Array, is_causal: bool) -> jax.Array:
    """Last key that each row sees, [B, rows] int32; −1 for rows that see none and for rows of the padding."""
    row = jnp.arange(layout.rows, dtype=jnp.int32)
    position = row // layout.group
    last = jnp.clip(position + offset[:, None], -1, layout.keys - 1) if is_causal else layout.keys - 1
    shape = (layout.batch, layout.rows)
    return jnp.where(position < layout.positions, jnp.broadcast_to(last, shape), -1).astype(jnp.int32)


def pack_numbers(numbers: list[jax.Array], layout: Layout) -> jax.Array:
    """Numbers per row, each [B, K, rows] or [B, rows] -> [B, K, 8, rows] float32."""
    shape = (layout.batch, layout.heads, layout.rows)
    full = [jnp.broadcast_to(n if n.ndim == 3 else n[:, None], shape).astype(jnp.float32) for n in numbers]
    stacked = jnp.stack(full, axis=2)
    return jnp.pad(stacked, [(0, 0), (0, 0), (0, NUMBERS - len(numbers)), (0, 0)])


def stack_rows(rows: list[jax.Array]) -> jax.Array:
    """Numbers per row of a tile, each [1, tile] -> [8, tile]."""
    return jnp.concatenate([*rows, jnp.zeros((NUMBERS - len(rows), rows[0].shape[1]), jnp.float32)], axis=0)


def key_bounds(last: jax.Array, layout: Layout) -> jax.Array:
    """What each tile visits, [B · tiles · 2] int32: blocks of keys that all of its rows see, and that any row sees."""
    per_tile = last.reshape(layout.batch, layout.tiles, layout.tile)
    full = (per_tile.min(axis=2) + 1) // layout.block
    some = -(-(per_tile.max(axis=2) + 1) // layout.block)
    return jnp.stack([full, some], axis=2).reshape(-1)


def vmem_capacity() -> int:
    """Bytes of VMEM of the chip that is compiled for; the newer chips' 128 MiB where none is known."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except Exception:  # no TPU and no description of one: interpret mode
        return DEFAULT_VMEM
