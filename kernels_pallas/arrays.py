"""What the implementations of every op need to know about their arrays."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Shaped = jax.Array | jax.ShapeDtypeStruct
"""Anything with a shape and a dtype: what a kernel may refuse before there is an array."""


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Precision of logits, sums and solves: float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _varying(arrays: Sequence[jax.Array]) -> frozenset[str]:
    """The mesh axes that any of ``arrays`` varies over inside ``shard_map``.

    JAX calls the property ``vma``, and ``manual_axis_type`` since 0.10.
    """
    types = [jax.typeof(x) for x in arrays]
    if hasattr(types[0], "manual_axis_type"):
        return frozenset().union(*(t.manual_axis_type.varying for t in types))
    return frozenset().union(*(getattr(t, "vma", ()) for t in types))


def _vary(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """``x``, typed as different on each device along ``axes``; JAX calls this ``pvary`` in 0.8 and ``pcast`` since."""
    if not axes:
        return x
    if pvary := getattr(jax.lax, "pvary", None):
        return cast(jax.Array, pvary(x, tuple(axes)))
    return jax.lax.pcast(x, tuple(axes), to="varying")


def kernel_output(arrays: Sequence[jax.Array], shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's output that varies over the mesh axes that any of ``arrays`` varies over.

    Inside ``shard_map`` a kernel has to say so.
    """
    keywords: dict[str, Any] = {"vma": _varying(arrays)}
    if hasattr(kind := jax.typeof(arrays[0]), "manual_axis_type"):
        keywords = {"manual_axis_type": type(kind.manual_axis_type)(varying=keywords["vma"])}
    return jax.ShapeDtypeStruct(shape, dtype, **keywords)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, each varying over the mesh axes that any of them varies over; themselves outside ``shard_map``.

    A custom gradient must have the type of its argument, and that of weights all devices share varies with the tokens:
    after this the weights vary as well, and JAX sums their gradients over the devices.
    """
    axes = _varying(arrays)
    missing = [tuple(sorted(axes - _varying([x]))) for x in arrays]
    return tuple(_vary(x, m) for x, m in zip(arrays, missing, strict=True))


def varying_zeros(arrays: Sequence[jax.Array], shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Zeros that vary over the mesh axes that any of ``arrays`` varies over: what a loop starts with must say so."""
    return _vary(jnp.zeros(shape, dtype), sorted(_varying(arrays)))
