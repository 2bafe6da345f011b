"""How a call is cut up for the GPU kernels and how its arrays lie in memory, and which calls they refuse."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from kernels_pallas.arrays import kernel_output
from kernels_pallas.local_linear_attention import tpu_rows
from kernels_pallas.local_linear_attention.problem import Inputs, Options, refused_option
from kernels_pallas.local_linear_attention.tpu_pieces import Precision, precision_of, split_input
from kernels_pallas.local_linear_attention.tpu_rows import Layout

MIN_SIZE = 16  # of every side of a product on tensor cores
MAX_SIZE = 256  # of a head
SLACK = 10 * 1024  # bytes of shared memory for what moves between threads, and a block that is not on its way
HOPPER = ("H100", "H200", "H800", "H20", "GH200")
SHARED_MEMORY = {**dict.fromkeys(HOPPER, 227 * 1024), "A100": 163 * 1024, "A800": 163 * 1024}
OTHER_SHARED_MEMORY = 99 * 1024  # what a program may have on any GPU since Ampere

# Tile (of rows, or of keys where a program handles keys), block (of what passes by) and stages, best first.
WHOLE = 64  # what they divide
SIZES = ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 32, 2), (32, 32, 1), (32, 16, 1), (16, 16, 1))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    Attributes:
        layout: sizes, with the tiles of rows and the blocks of keys of programs that handle rows.
        precision: pieces of operands.
        head: H rounded up to a power of two.
        value_head: Hv rounded up to a power of two.
        is_masked: whether there are keys that a row does not see.
        num_warps: warps of a program.
        num_stages: blocks that are on their way at once.
        shared_memory: bytes that a program needs, estimated from above.
    """

    layout: Layout
    precision: Precision
    head: int
    value_head: int
    is_masked: bool
    num_warps: int
    num_stages: int
    shared_memory: int


def power_of_two(size: int) -> int:
    """The size that a side of a product is padded to."""
    return max(MIN_SIZE, pl.next_power_of_2(size))


def _device_kind() -> str:
    """The GPU that is compiled for; an H100 where none is known."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else "H100"


def is_hopper() -> bool:
    """Whether the GPU that is compiled for multiplies by groups of four warps."""
    return any(name in _device_kind() for name in HOPPER)


def shared_memory_limit() -> int:
    """Bytes of shared memory that a program may have on the GPU that is compiled for."""
    kind = _device_kind()
    return next((size for name, size in SHARED_MEMORY.items() if name in kind), OTHER_SHARED_MEMORY)


def _shared_memory(sizes: tuple[int, int, int], precision: Precision, head: int, value_head: int, kernel: str) -> int:
    """Bytes for the operands that stay for a pass, and for the blocks of it that are on their way."""
    tile, block, stages = sizes
    given, made = precision.given, precision.order
    inputs, vectors = given * (head + value_head), 2 * made * head
    stays, passes = {
        "forward": (given * head + made * head, inputs),
        "rows": (inputs + vectors, inputs),
        "keys": (inputs, inputs + vectors),
    }[kernel]
    return 2 * (tile * stays + stages * block * passes) + SLACK


def plan_of(
    inputs: Inputs,
    options: Options,
    kernel: str = "forward",
    /,
    tile: int | None = None,
    block: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Plan:
    """The first of `SIZES` that fits into shared memory; what is given is taken, as far as the call is not smaller.

    Args:
        inputs: the call.
        options: its options.
        kernel: ``"forward"``, or of the backward pass ``"rows"`` or ``"keys"``.
        tile: see `SIZES`.
        block: see `SIZES`.
        num_warps: warps of a program.
        num_stages: see `SIZES`.
    """
    batch, positions, heads, head = inputs.q.shape
    keys, key_heads = inputs.k.shape[1:3]
    precision = precision_of(jnp.result_type(inputs.q, inputs.k, inputs.v))
    widths = power_of_two(head), power_of_two(inputs.v.shape[-1])
    rows, hopper = positions * (heads // key_heads), is_hopper()
    # What fits into registers, found by compiling. Hopper multiplies by groups of four warps that want 64 rows each;
    # elsewhere, and for wide heads, eight warps share the sums of a tile.
    is_light = precision.given == 1 and max(widths) <= 64
    is_heavy = max(widths) > 128 or (precision.given == 3 and max(widths) > 64 and not hopper)
    first = SIZES.index((64, 64, 2) if is_light and kernel != "keys" else (64, 32, 2))
    if is_heavy and (kernel == "keys" or not hopper):
        first = SIZES.index((32, 16, 1) if kernel == "keys" else (32, 32, 2))
    warps = 4 if is_light or (hopper and not is_heavy) or (is_heavy and precision.given == 3) else 8
    for sizes in SIZES[first:]:
        shared_memory = _shared_memory(sizes, precision, *widths, kernel)
        if shared_memory <= shared_memory_limit():
            break
    tile, block, num_stages = (mine or found for mine, found in zip((tile, block, num_stages), sizes, strict=True))
    if kernel == "keys":
        tile, block = block, tile
    tile, block = min(tile, power_of_two(rows)), min(block, power_of_two(keys))
    # All kernels of a call pad to the same sizes.
    whole_rows, whole_keys = (max(part, min(WHOLE, power_of_two(size))) for part, size in ((tile, rows), (block, keys)))
    layout = Layout(
        batch=batch,
        heads=key_heads,
        group=heads // key_heads,
        positions=positions,
        keys=keys,
        head=head,
        rows=-(-rows // whole_rows) * whole_rows,
        tile=tile,
        padded_keys=-(-keys // whole_keys) * whole_keys,
        block=block,
    )
    return Plan(
        layout=layout,
        precision=precision,
        head=widths[0],
        value_head=widths[1],
        is_masked=options.is_causal or layout.padded_keys != keys,
        num_warps=num_warps or warps,
        num_stages=num_stages,
        shared_memory=shared_memory,
    )


def refusal(inputs: Inputs, options: Options) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if (reason := refused_option(inputs, options)) is not None:
        return reason
    for name in ("q", "k", "v"):
        array = getattr(inputs, name)
        if array.dtype.name not in ("bfloat16", "float16", "float32"):
            return f"{name} is {array.dtype.name}; this kernel knows bfloat16, float16 and float32"
        if array.shape[-1] > MAX_SIZE:
            return f"{name} has head size {array.shape[-1]}; this kernel knows sizes up to {MAX_SIZE}"
    limit = shared_memory_limit()
    for kernel in ("forward", "rows", "keys"):
        if (needed := plan_of(inputs, options, kernel).shared_memory) > limit:
            return f"the tiles of a program do not fit into shared memory: {needed} bytes of {limit}"
    return None


def pad_last(x: jax.Array, width: int) -> jax.Array:
    """[..., H] -> [..., width] with zeros behind."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def pack_rows(x: jax.Array, plan: Plan, width: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, rows, width] with zeros where there is nothing."""
    return tpu_rows.pack_rows(pad_last(x, width), plan.layout)


def pack_keys(x: jax.Array, seen: jax.Array, plan: Plan, width: int) -> jax.Array:
    """[B, S, K, H] -> [B, K, pieces, padded S, width].

    Keys that no row sees become zero, whatever they were: NaN times a weight of zero would be NaN.
    """
    layout = plan.layout
    x = jnp.where(jnp.arange(layout.keys)[:, None, None] < seen, x, jnp.zeros_like(x))
    x = jnp.pad(x, [(0, 0), (0, layout.padded_keys - layout.keys), (0, 0), (0, 0)])
    return split_input(pad_last(jnp.moveaxis(x, 2, 1), width), plan.precision.given)


class Packed(NamedTuple):
    """A call's arrays as the kernels read them."""

    scale: jax.Array  # [B]
    last: jax.Array  # [B, rows] int32, last key that a row sees, −1 for none
    ridge: jax.Array  # [B, K, rows]
    q: jax.Array  # [B, K, pieces, rows, head]
    k: jax.Array  # [B, K, pieces, S, head]
    v: jax.Array  # [B, K, pieces, S, value_head]


def pack(inputs: Inputs, options: Options, plan: Plan) -> Packed:
    """Bring a call's arrays into the kernels' layout."""
    layout = plan.layout
    offset = jnp.broadcast_to(inputs.offset, (layout.batch,))
    last = tpu_rows.last_keys(layout, offset, options.is_causal)
    seen = 1 + jnp.max(last, axis=1)[:, None, None, None]
    return Packed(
        scale=jnp.broadcast_to(inputs.scale, (layout.batch,)).astype(jnp.float32),
        last=last,
        ridge=tpu_rows.pack_rows(inputs.ridge, layout, fill=1.0),
        q=split_input(pack_rows(inputs.q, plan, plan.head), plan.precision.given),
        k=pack_keys(inputs.k, seen, plan, plan.head),
        v=pack_keys(inputs.v, seen, plan, plan.value_head),
    )


class Rows(NamedTuple):
    """An array with something for every row, [B, K, (pieces,) rows, (width)]."""

    dtype: DTypeLike
    width: int | None = None
    pieces: int | None = None

    def _shape(self, rows: int) -> list[int]:
        return [*([] if self.pieces is None else [self.pieces]), rows, *([] if self.width is None else [self.width])]

    def shape(self, plan: Plan) -> tuple[int, ...]:
        """Its shape."""
        return (plan.layout.batch, plan.layout.heads, *self._shape(plan.layout.rows))

    def tile(self, plan: Plan) -> pl.BlockSpec:
        """The tile of it that a program handles; the last ones, which see the most keys, come first."""
        before, after = [0] * (self.pieces is not None), [0] * (self.width is not None)
        return pl.BlockSpec(
            (None, None, *self._shape(plan.layout.tile)),
            lambda b, h, i: (b, h, *before, plan.layout.tiles - 1 - i, *after),
        )


def call_rows(
    kernel: Callable[..., None],
    plan: Plan,
    packed: Packed,
    rows: Sequence[tuple[jax.Array, Rows]],
    outputs: Sequence[Rows],
    *,
    name: str,
    interpret: bool,
) -> Sequence[jax.Array]:
    """Run a kernel with a program for every tile of rows: (scale, last, ridge, q, k, v, *rows, *outputs)."""
    layout, given = plan.layout, plan.precision.given
    arrays = (*packed, *(array for array, _ in rows))
    specs = [
        pl.BlockSpec((1,), lambda b, h, i: (b,)),
        pl.BlockSpec((None, layout.tile), lambda b, h, i: (b, layout.tiles - 1 - i)),
        Rows(jnp.float32).tile(plan),
        Rows(jnp.bfloat16, plan.head, given).tile(plan),
        of_keys(plan, plan.head),
        of_keys(plan, plan.value_head),
        *[kind.tile(plan) for _, kind in rows],
    ]
    return pl.pallas_call(
        kernel,
        grid=(layout.batch, layout.heads, layout.tiles),
        in_specs=specs,
        out_specs=[kind.tile(plan) for kind in outputs],
        out_shape=[kernel_output(arrays, kind.shape(plan), kind.dtype) for kind in outputs],
        compiler_params=plt.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name=name,
    )(*arrays)


def of_keys(plan: Plan, width: int) -> pl.BlockSpec:
    """All keys or values [B, K, pieces, S, width] of a program's head."""
    return pl.BlockSpec(
        (None, None, plan.precision.given, plan.layout.padded_keys, width), lambda b, h, i: (b, h, 0, 0, 0)
    )
