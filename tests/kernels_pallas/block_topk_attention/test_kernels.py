"""The kernels, interpreted, equal the XLA formulation, which equals the equation; what they cannot take they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import block_topk_attention as op
from kernels_pallas.block_topk_attention.plan import Plan
from tests.kernels_pallas.block_topk_attention.test_xla import expected, random

# Float32: rounding of a few dozen operations. The others: weights are rounded to the format before they meet values.
TOLERANCE = {jnp.float32: 3e-6, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}
SIZE = 256
LENGTHS = jnp.array([0, 1, 15, 16, 37, 100, 201, 256])


@functools.partial(jax.jit, static_argnames=("name", "plan", "layout", "interpret"))
def interpreted(q, k, v, length, *, name, plan, layout, interpret=True):
    return op._attend(q, k, v, None, 1.0, length, plan, None, layout, name, interpret=interpret)


def arranged(k, v, layout):
    """Keys and values as a layout holds them."""
    if layout == "BSKH":
        return k, v
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return (k, v) if layout == "BKSH" else (jnp.concatenate([k, v], -1), None)


def compare(
    name, layout, dtype, width=128, value=128, size=SIZE, lengths=LENGTHS, poison=False, interpret=True, **options
):
    q, k, v = random(11, len(lengths), size, 4, 2, width, value, dtype)
    options = {"num_sink": 4, "num_local": 0, "block_offset": None, **options}
    want = np.asarray(expected(q, k, v, lengths, **options), np.float64)
    if poison:
        unused = (jnp.arange(size) >= lengths[:, None])[:, :, None, None]
        k, v = jnp.where(unused, jnp.nan, k).astype(dtype), jnp.where(unused, jnp.inf, v).astype(dtype)
    plan = Plan.make(size, **options)
    out = interpreted(q, *arranged(k, v, layout), lengths, name=name, plan=plan, layout=layout, interpret=interpret)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["BKSH", "BKSHV"])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16, "num_blocks": 3},
        {"block_size": 16, "num_blocks": 2, "num_sink": 20, "num_local": 21},
        {"block_size": 32, "num_blocks": 4, "num_sink": 0},
    ],
)
def test_tpu_kernel(layout, options):
    compare("pallas_tpu", layout, jnp.float32, poison=True, **options)


def test_tpu_kernel_in_bfloat16_with_heads_of_64():
    compare("pallas_tpu", "BKSHV", jnp.bfloat16, width=64, value=64, poison=True, block_size=16, num_blocks=3)


def test_tpu_kernel_waits_for_its_copies():
    """The simulator runs copies as late as it can, and memory that was never written is NaN."""
    simulator = pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
    lengths = jnp.array([9, 200, 256])
    compare(
        "pallas_tpu",
        "BKSHV",
        jnp.float32,
        lengths=lengths,
        interpret=simulator,
        block_size=16,
        num_blocks=3,
        num_local=2,
    )


@pytest.mark.parametrize("layout", ["BSKH", "BKSH", "BKSHV"])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16, "num_blocks": 3},
        {"block_size": 16, "num_blocks": 2, "num_sink": 20, "num_local": 21, "block_offset": 23},
        {"block_size": 64, "num_blocks": 2, "num_sink": 0},
        {"block_size": 1, "num_blocks": 80},
    ],
)
def test_gpu_kernel(layout, options):
    compare("pallas_gpu", layout, jnp.float32, width=64, value=32, poison=True, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gpu_kernel_in_sixteen_bits(dtype):
    compare("pallas_gpu", "BSKH", dtype, width=64, value=64, block_size=16, num_blocks=5)
