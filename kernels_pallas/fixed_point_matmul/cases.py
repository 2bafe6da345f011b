"""The kernels as cases for `kernels_pallas.prove`."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.fixed_point_matmul import gpu, tpu, xla
from kernels_pallas.fixed_point_matmul.epilogue import finish
from kernels_pallas.fixed_point_matmul.xla import int_dot
from kernels_pallas.prove.cases import Case, Program, Shape

MODES: dict[str, Any] = {"shift": 9, "rounding": "rnd", "overflow": "sat", "word": 8}


def _arrays(shape: Shape) -> tuple[Any, ...]:
    m, k, n = (shape[name] for name in ("M", "K", "N"))
    return (
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((k, n), jnp.int8),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )


def _bytes(shape: Shape, x_reads: float | int, w_reads: float | int) -> float:
    m, k, n = (shape[name] for name in ("M", "K", "N"))
    return float(m * k * x_reads + k * n * w_reads + m * n + 4 * n)


def _draw(shape: Shape) -> Callable[[jax.Array], tuple[Any, ...]]:
    def draw(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        x, w, b = _arrays(shape)
        small = [
            jax.random.randint(k, a.shape, -128, 128, jnp.int32).astype(a.dtype)
            for k, a in zip(keys, (x, w), strict=False)
        ]
        return *small, jax.random.randint(keys[2], b.shape, -(2**14), 2**14, b.dtype)

    return draw


def _equation(x: Any, w: Any, b: Any) -> Any:
    return finish(int_dot(x, w), b, **MODES)


def _kernel(module: ModuleType) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        m, k, n = (shape[name] for name in ("M", "K", "N"))
        if module is tpu:
            rows, terms, columns = tpu.blocks_of(m, k, n)
            # The product stands twice in a step, for the last block of terms and for all others.
            busy = 1.0 if terms == k else 0.5
            x_reads, w_reads, least = -(-n // columns), -(-m // rows), 32
        else:
            busy, least, x_reads, w_reads = (
                1.0,
                gpu.blocks_of(m, n)[0],
                1,
                1,
            )  # level 2 has the rest
        return Program(
            lambda x, w, b: module.matmul(x, w, b, **MODES),
            _arrays(shape),
            # int8 runs at twice the bf16 peak that the table divides by.
            flops=1.0 * -(-m // least) * least * k * n,
            bytes=_bytes(shape, x_reads, w_reads),
            busy=busy,
            note="an int8 operation counts as half a FLOP of bf16",
            draw=_draw(shape),
            equation=_equation,
        )

    return build


def _xla(shape: Shape) -> Program:
    """What runs without a kernel, XLA's product of int8 and the same epilogue: the peer."""
    return Program(
        lambda x, w, b: xla.matmul(x, w, b, **MODES),
        _arrays(shape),
        flops=1.0 * shape["M"] * shape["K"] * shape["N"],
        bytes=_bytes(shape, 1, 1),
        note="what XLA makes of the equation",
        draw=_draw(shape),
    )


_SIZES = (
    {"M": 4096, "K": 4096, "N": 4096},
    {"M": 512, "K": 4096, "N": 11008},
    {"M": 512, "K": 11008, "N": 4096},
    {"M": 8, "K": 4096, "N": 11008},
    {"M": 1, "K": 4096, "N": 4096},
)

CASES = (
    Case("fixed_point_matmul", "forward", "tpu", _kernel(tpu), _SIZES, ("v5e", "v6e"), {"xla": _xla}),
    Case("fixed_point_matmul", "forward", "gpu", _kernel(gpu), _SIZES, ("h100",), {"xla": _xla}),
)
