"""How a call is cut up for the TPU's row kernels, and which calls they refuse."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels_pallas.local_linear_attention import tpu_rows
from kernels_pallas.local_linear_attention.problem import Inputs, Options, refused_option
from kernels_pallas.local_linear_attention.tpu_pieces import LANES, lanes, precision_of
from kernels_pallas.local_linear_attention.tpu_rows import Layout

TILE = 256
BLOCK = 512
VALUE_BLOCKS = 4  # blocks of keys per grid step that reads values


class Plan(NamedTuple):
    """How a call is cut up.

    Attributes:
        layout: sizes.
        values: blocks of keys per grid step that reads values.
        value_lanes: lanes of a value.
        is_cached: whether a tile's weights stay in VMEM.
        vmem: bytes of VMEM that it needs, estimated from above.
        vmem_limit: bytes that the compiler may take.
    """

    layout: Layout
    values: int
    value_lanes: int
    is_cached: bool
    vmem: int
    vmem_limit: int


def plan_of(
    inputs: Inputs,
    tile: int | None = None,
    block: int = BLOCK,
    is_cached: bool | None = None,
    is_backward: bool = False,
) -> Plan:
    """The largest tile that fits, with the weights in VMEM if they fit too."""
    capacity = tpu_rows.vmem_capacity()
    dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    precision = precision_of(dtype)
    plan = None
    for cached, rows in ((True, TILE), (True, TILE // 2), (False, TILE), (False, TILE // 2)):
        if (is_cached is not None and cached != is_cached) or (tile is not None and rows != TILE):
            continue
        layout = tpu_rows.layout_of(inputs.q.shape, inputs.k.shape, tile or rows, block, VALUE_BLOCKS)
        values = min(VALUE_BLOCKS, layout.blocks)
        L, Lv = lanes(layout.head), lanes(inputs.v.shape[-1])
        chunks = 2 * precision.order * precision.given * 3
        per_row = 4 * (10 * L + 4 * Lv + 9 * LANES) + chunks * L
        if is_backward:
            per_row += 4 * 4 * L + chunks * Lv
        vmem = (
            2 * precision.given * layout.padded_keys * L
            + 4 * precision.given * values * layout.block * Lv
            + layout.tile * per_row
            + (4 * layout.tile * layout.padded_keys if cached else 0)
            + 6 * 4 * layout.tile * layout.block  # what one block's products pass through
        )
        plan = Plan(layout, values, Lv, cached, vmem, int(capacity * 0.95))
        if vmem <= 0.85 * capacity:
            return plan
    assert plan is not None
    return plan


def refusal(inputs: Inputs, options: Options) -> str | None:
    """Why this kernel cannot take a call, or None."""
    if (reason := refused_option(inputs, options)) is not None:
        return reason
    for name in ("q", "k", "v"):
        dtype = getattr(inputs, name).dtype
        if dtype.name not in ("bfloat16", "float16", "float32"):
            return f"{name} is {dtype.name}; a TPU's matrix unit knows bfloat16 and float32"
    plan = plan_of(inputs)
    if plan.vmem > plan.vmem_limit:
        return (
            f"the keys of a head ({inputs.k.shape[1]} of size {inputs.k.shape[3]}) do not fit into VMEM: "
            f"{plan.vmem} bytes of {plan.vmem_limit}"
        )
    return None
