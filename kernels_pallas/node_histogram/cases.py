"""The kernels as cases for `kernels_pallas.prove`."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.node_histogram import gpu, tpu, xla
from kernels_pallas.node_histogram.pieces import PIECES
from kernels_pallas.prove.cases import Case, Program, Shape


def _arrays(shape: Shape) -> tuple[Any, ...]:
    rows, features, stats = (shape[name] for name in ("n", "F", "K"))
    return (
        jax.ShapeDtypeStruct((features, rows), jnp.uint8),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, stats), jnp.float32),
    )


def _bytes(shape: Shape, bin_bytes: int | float, stat_bytes: int | float) -> float:
    rows, features, nodes, bins, stats = (shape[name] for name in ("n", "F", "N", "B", "K"))
    return rows * (bin_bytes * features + 4 + stat_bytes * stats) + 4.0 * features * nodes * bins * stats


def _draw(shape: Shape) -> Callable[[jax.Array], tuple[Any, ...]]:
    rows, features, nodes, bins, stats = (shape[name] for name in ("n", "F", "N", "B", "K"))

    def draw(key: jax.Array) -> tuple[Any, ...]:
        of_bins, of_nodes, of_stats = jax.random.split(key, 3)
        return (
            jax.random.randint(of_bins, (features, rows), 0, bins).astype(jnp.uint8),
            jax.random.randint(of_nodes, (rows,), 0, nodes, jnp.int32),
            jax.random.normal(of_stats, (rows, stats)),
        )

    return draw


def _kernel(module: ModuleType) -> Callable[[Shape], Program]:
    def build(shape: Shape) -> Program:
        arrays, nodes, bins = _arrays(shape), shape["N"], shape["B"]
        if (reason := module.refusal(arrays[2], nodes, bins)) is not None:
            raise ValueError(reason)
        together = tpu.features_of_a_step(shape["F"], shape["K"], nodes, bins)
        padded = max(nodes, 16) * shape["K"] * bins
        return Program(
            lambda rows, node, stats: module.histogram(rows, node, stats, nodes, bins),
            arrays,
            flops=2.0 * PIECES * shape["n"] * shape["F"] * padded,
            # Bins are widened to int32, and statistics split, before the kernel reads them.
            bytes=_bytes(shape, 1 + 2 * 4, 4 + 2 * 2 * PIECES),
            trips={"node_histogram": (None, together)} if module is tpu else {},
            note="three passes of products with zeros and ones",
            draw=_draw(shape),
            equation=lambda rows, node, stats: xla.histogram(rows, node, stats, nodes, bins),
        )

    return build


def _scatter(shape: Shape) -> Program:
    """Segment sums, as XLA compiles them: the peer."""
    nodes, bins = shape["N"], shape["B"]
    return Program(
        lambda rows, node, stats: xla.histogram(rows, node, stats, nodes, bins),
        _arrays(shape),
        flops=0,
        bytes=_bytes(shape, 1, 4.0 * shape["F"]) + 4.0 * shape["n"] * (shape["F"] - 1),
        note="scatters; how long their additions take is not counted",
        draw=_draw(shape),
    )


_SIZES = (
    {"n": 20_000, "F": 20, "N": 32, "B": 256, "K": 3},
    {"n": 100_000, "F": 20, "N": 32, "B": 256, "K": 3},
    {"n": 100_000, "F": 20, "N": 1, "B": 256, "K": 3},
    {"n": 17_000, "F": 81, "N": 256, "B": 64, "K": 2},
)

CASES = (
    Case("node_histogram", "forward", "tpu", _kernel(tpu), _SIZES, ("v5e", "v6e"), {"scatter": _scatter}),
    Case("node_histogram", "forward", "gpu", _kernel(gpu), _SIZES, ("h100",), {"scatter": _scatter}),
)
