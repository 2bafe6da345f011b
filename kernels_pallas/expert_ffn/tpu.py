"""The union kernel as one Pallas kernel for TPUs: up product, activation, scores and down product of an expert a step.

The ids of the active experts are prefetched as scalars and say which slabs a grid step reads, so that the pipeline
copies the next expert from HBM while this one computes. A step past the last active expert names the same slab again,
which copies nothing, and does nothing: the traffic is that of the active experts. The sum stays in VMEM in float32.

Experts of less than 128 rows are taken two a step, so that both products of a step are independent of each other.
Slabs that do not fit twice in VMEM are read in parts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import ArrayLike

from kernels_pallas.arrays import Shaped, kernel_output
from kernels_pallas.expert_ffn.problem import ACTIVATIONS, Activation, Active

LANES = 128
VMEM_BYTES = 12 * 2**20  # of the 16 MiB that a kernel may use by default on the smallest chip


def _sublanes(dtype: jnp.dtype) -> int:
    """Rows of a tile."""
    return 32 // jnp.dtype(dtype).itemsize


def _padded(tokens: int, dtype: jnp.dtype) -> int:
    return -(-max(tokens, 1) // _sublanes(dtype)) * _sublanes(dtype)


def _resident(x: Shaped, experts: int) -> int:
    """Bytes of tokens and scores (twice buffered), output and sum."""
    rows = _padded(x.shape[0], x.dtype)
    lanes = -(-experts // LANES) * LANES
    return rows * (x.shape[1] * (4 * x.dtype.itemsize + 4) + 8 * lanes)


def _parts(x: Shaped, up: Shaped, experts: int) -> int | None:
    """In how many parts a slab is read, the fewest that fit; ``None`` if none do."""
    size, width = up.shape[1:]
    for parts in (p for p in range(1, size + 1) if size % p == 0 and size // p % _sublanes(up.dtype) == 0):
        if (
            _resident(x, experts) + 4 * _together(size // parts) * size // parts * width * up.dtype.itemsize
            <= VMEM_BYTES
        ):
            return parts
    return None


def _together(size: int) -> int:
    """Slabs a step."""
    return 2 if size < LANES else 1


def refusal(x: Shaped, up: Shaped, down: Shaped, experts: int) -> str | None:
    """Why the kernel cannot take a call, or ``None``."""
    dtypes = [a.dtype for a in (x, up, down)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (jnp.float32, jnp.bfloat16):
        return f"dtypes are {', '.join(map(str, dtypes))}, expected all float32 or all bfloat16"
    if up.shape[2] % LANES:
        return f"D is {up.shape[2]}, expected a multiple of {LANES}"
    if up.shape[1] % _sublanes(up.dtype):
        return f"de is {up.shape[1]}, expected a multiple of {_sublanes(up.dtype)} for {up.dtype}"
    if _parts(x, up, experts) is None:
        return f"{x.shape[0]} tokens of {x.shape[1]} and a slab beside them do not fit in {VMEM_BYTES} bytes of VMEM"
    return None


def _body(
    ids_ref: Any, scalars_ref: Any, x_ref: Any, scores_ref: Any, *refs: Any, together: int, parts: int, act: Any
) -> None:
    ups, downs, (out_ref, sum_ref) = refs[:together], refs[together : 2 * together], refs[2 * together :]
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for slot, (up_ref, down_ref) in enumerate(zip(ups, downs, strict=True)):
        turn = jax.lax.div(together * step + slot, parts)

        @pl.when(turn < scalars_ref[0])
        def _(turn: Array = turn, up_ref: Any = up_ref, down_ref: Any = down_ref) -> None:
            x, expert = x_ref[...], ids_ref[turn]
            precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
            dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision)
            lane = jax.lax.broadcasted_iota(jnp.int32, scores_ref.shape, 1)
            score = jnp.where(lane == expert, scores_ref[...], 0).sum(1, keepdims=True)
            hidden = act(dot(x, up_ref[0], (((1,), (1,)), ((), ())))) * score
            sum_ref[...] += dot(hidden.astype(x.dtype), down_ref[0], (((1,), (0,)), ((), ())))

    @pl.when(step == pl.num_programs(0) - 1)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


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
    experts = scores.shape[1]
    parts = _parts(x, up, experts)
    assert parts is not None, "refusal() is asked first"
    rows, size = _padded(tokens, x.dtype), up.shape[1] // parts
    together = _together(size)
    padded = jnp.pad(x, ((0, rows - tokens), (0, 0)))
    columns = jnp.pad(scores.astype(jnp.float32), ((0, rows - tokens), (0, -experts % LANES)))
    slabs = [w.reshape(-1, size, width) for w in (up, down)]

    def slab(slot: int, step: Any, ids: Any, scalars: Any) -> tuple[Any, int, int]:
        place = jnp.minimum(together * step + slot, jnp.maximum(scalars[0] * parts - 1, 0))
        expert = scalars[1] + ids[jax.lax.div(place, parts)]
        return expert * parts + jax.lax.rem(place, parts), 0, 0

    def whole(*_: Any) -> tuple[int, int]:
        return 0, 0

    blocks = [pl.BlockSpec((1, size, width), functools.partial(slab, slot)) for slot in range(together)]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(-(-max_active * parts // together),),
        in_specs=[pl.BlockSpec(padded.shape, whole), pl.BlockSpec(columns.shape, whole), *blocks, *blocks],
        out_specs=pl.BlockSpec(padded.shape, whole),
        scratch_shapes=[pltpu.VMEM(padded.shape, jnp.float32)],
    )
    out = pl.pallas_call(
        functools.partial(_body, together=together, parts=parts, act=ACTIVATIONS[activation]),
        grid_spec=grid_spec,
        out_shape=kernel_output([x, up, down, scores, union.number], padded.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="expert_ffn",
    )(
        union.ids,
        jnp.stack([union.number, jnp.asarray(first, jnp.int32)]),
        padded,
        columns,
        *[slabs[0]] * together,
        *[slabs[1]] * together,
    )
    return out[:tokens]
