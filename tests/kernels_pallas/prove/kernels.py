"""Small kernels for the prover's tests: sound ones, and ones with the faults that interpret mode lets pass."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.prove import Case, Program

GPU = plt.CompilerParams(num_warps=4, num_stages=2)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def double(rows, block, family="tpu", interpret=False):
    """Twice a [rows, 128] array, ``block`` rows at a time."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

    spec = pl.BlockSpec((block, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel, grid=(rows // block,), in_specs=[spec], out_specs=spec, out_shape=struct(rows, 128), name="double",
        compiler_params=GPU if family == "gpu" else None, interpret=interpret,
    )  # fmt: skip


def product(block, interpret=False):
    """A matrix product whose blocks sit in shared memory."""

    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(
        kernel, out_shape=struct(block, block), name="product", compiler_params=GPU, interpret=interpret
    )  # fmt: skip


def odd_blocks(interpret=False):
    """Blocks of 6 x 100 out of 12 x 200: neither multiples of the (8, 128) tile nor the whole array."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1.0

    spec = pl.BlockSpec((6, 100), lambda i, j: (i, j))
    return pl.pallas_call(
        kernel, grid=(2, 2), in_specs=[spec], out_specs=spec, out_shape=struct(12, 200), interpret=interpret
    )  # fmt: skip


def floor_division(divide, interpret=False):
    """Rows picked by a traced index that is divided inside the kernel."""

    def kernel(x_ref, o_ref):
        def body(i, total):
            return total + x_ref[pl.ds(divide(i, 2) * 8, 8), :]

        o_ref[...] = jax.lax.fori_loop(0, 8, body, jnp.zeros((8, 128), jnp.float32))

    return pl.pallas_call(kernel, out_shape=struct(8, 128), name="halves", interpret=interpret)


def high_precision(interpret=False):
    """A product of bf16 operands at the highest precision, which Mosaic knows for float32 alone."""

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], x_ref[...], precision="highest", preferred_element_type=jnp.float32)

    return pl.pallas_call(kernel, out_shape=struct(128, 128), interpret=interpret)


def odd_sizes(interpret=False):
    """Arrays of 12 x 100 in a Triton kernel, which has powers of two only."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 3.0

    return pl.pallas_call(kernel, out_shape=struct(12, 100), compiler_params=GPU, interpret=interpret)


def boolean_carry(interpret=False):
    """A loop that carries a vector of booleans."""

    def kernel(x_ref, o_ref):
        def body(carry):
            x, active = carry
            x = jnp.where(active, x * 0.5, x)
            return x, x > 1.0

        x = x_ref[...]
        o_ref[...] = jax.lax.while_loop(lambda carry: jnp.max(carry[0]) > 1.0, body, (x, x > 1.0))[0]

    return pl.pallas_call(kernel, out_shape=struct(8, 128), name="carry", interpret=interpret)


def nested_loops(tiles, passes):
    """A grid of 4 steps, in each a loop of ``tiles`` that the compiler knows and a loop of as many as the data says."""

    def kernel(x_ref, y_ref, o_ref):
        def tile(i, total):
            y = y_ref[pl.ds(pl.multiple_of(i * 128, 128), 128), :]
            return total + jnp.dot(x_ref[...], y, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, tiles, tile, jnp.zeros((128, 128), jnp.float32))
        total = jax.lax.while_loop(lambda t: jnp.max(t) > 1.0, lambda t: t * 0.5, total)
        o_ref[...] = total

    def build(shape):
        rows = pl.BlockSpec((128, 128), lambda i: (i, 0))
        whole = pl.BlockSpec((tiles * 128, 128), lambda i: (0, 0))
        call = pl.pallas_call(
            kernel, grid=(4,), in_specs=[rows, whole], out_specs=rows, out_shape=struct(512, 128), name="nested"
        )  # fmt: skip
        return Program(
            call, (struct(512, 128), struct(tiles * 128, 128)), flops=2.0 * 512 * tiles * 128 * 128, bytes=1e6,
            trips={"nested": (None, None, passes)} if passes else {}, note="a test",
        )  # fmt: skip

    return build


def program(call, *arguments, **work):
    """A maker of one program that asks for no sizes."""
    return lambda shape: Program(call, arguments, **{"flops": 1e6, "bytes": 1e6, **work})


def _own(family):
    return lambda s: Program(double(s["rows"], s["block"], family), (struct(s["rows"], 128),), 0.0, 1e6)


OWN = (
    Case("double", "forward", "tpu", _own("tpu"),
         ({"rows": 1024, "block": 256},), ("v5e", "v6e")),
    Case("double", "forward", "gpu", _own("gpu"),
         ({"rows": 1024, "block": 32},), ("h100",)),
)  # fmt: skip
