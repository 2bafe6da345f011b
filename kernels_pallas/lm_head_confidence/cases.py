"""The kernels as cases for `kernels_pallas.prove`."""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.lm_head_confidence import gpu, tpu
from kernels_pallas.prove.cases import Case, Program, Shape


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
        )

    return build


_SIZES = (
    {"R": 32, "V": 126464, "D": 4096, "dtype": "bfloat16"},  # a block of LLaDA-8B
    {"R": 64, "V": 126464, "D": 4096, "dtype": "bfloat16"},
    {"R": 32, "V": 49152, "D": 576, "dtype": "bfloat16"},  # SmolLM2
    {"R": 16, "V": 49152, "D": 576, "dtype": "float32"},
)

CASES = (
    Case("lm_head_confidence", "forward", "tpu", _confidence(tpu), _SIZES, ("v5e", "v6e")),
    Case("lm_head_confidence", "forward", "gpu", _confidence(gpu), _SIZES, ("h100",)),
)
