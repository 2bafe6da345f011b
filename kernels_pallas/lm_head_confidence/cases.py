"""The kernels as cases for `kernels_pallas.prove`."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.lm_head_confidence import gpu, tpu
from kernels_pallas.lm_head_confidence.reference import naive
from kernels_pallas.prove.cases import Case, Program, Shape, normals


def _draw(key: jax.Array, hidden: jax.ShapeDtypeStruct, weight: jax.ShapeDtypeStruct) -> tuple[jax.Array, jax.Array]:
    """Logits with a spread of about 3: the likeliest tokens have a probability that can be read."""
    rows, matrix = normals(key, (hidden, weight))
    return rows, (matrix.astype(jnp.float32) * 3 * weight.shape[1] ** -0.5).astype(weight.dtype)


def _confidence(module: ModuleType) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        rows, size, width = (shape[axis] for axis in "RVD")
        dtype = jnp.dtype(shape["dtype"])
        arguments = jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((size, width), dtype)
        if (reason := module.refusal(*arguments)) is not None:
            raise ValueError(reason)
        return Program(
            lambda hidden, weight: module.confidence(hidden, weight, size - 1),
            arguments,
            flops=2.0 * rows * size * width,
            bytes=float(dtype.itemsize * width * (size + rows)),
            note="the matrix read once, no logits written",
            draw=lambda key: _draw(key, *arguments),
            equation=lambda hidden, weight: naive(hidden, weight, size - 1),
        )

    return build


def _logits(shape: Shape) -> Program:
    """The same by a product and a softmax, which XLA compiles: the peer."""
    rows, size, width = (shape[axis] for axis in "RVD")
    dtype = jnp.dtype(shape["dtype"])

    def function(hidden: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        # In float32 as in the kernel: GPUs would round operands to 10 bits by default.
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        logits = jnp.einsum("rd,vd->rv", hidden, weight, precision=precision, preferred_element_type=jnp.float32)
        token = jnp.argmax(logits.at[:, size - 1].set(-jnp.inf), -1)
        return token, jnp.take_along_axis(jax.nn.softmax(logits), token[:, None], -1)[:, 0]

    arguments = jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((size, width), dtype)
    return Program(
        function,
        arguments,
        flops=2.0 * rows * size * width,
        bytes=float(dtype.itemsize * width * (size + rows) + 8 * rows * size),
        note="logits written in float32 and read again once",
        draw=lambda key: _draw(key, *arguments),
    )


_SIZES = (
    {"R": 32, "V": 126464, "D": 4096, "dtype": "bfloat16"},  # a block of LLaDA-8B
    {"R": 64, "V": 126464, "D": 4096, "dtype": "bfloat16"},
    {"R": 32, "V": 49152, "D": 576, "dtype": "bfloat16"},  # SmolLM2
    {"R": 16, "V": 49152, "D": 576, "dtype": "float32"},
)

CASES = (
    Case("lm_head_confidence", "forward", "tpu", _confidence(tpu), _SIZES, ("v5e", "v6e"), {"logits": _logits}),
    Case("lm_head_confidence", "forward", "gpu", _confidence(gpu), _SIZES, ("h100",), {"logits": _logits}),
)
