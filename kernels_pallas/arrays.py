"""What the implementations of every op need to know about their arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Precision of logits, sums and solves: float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def kernel_output(arrays: Sequence[jax.Array], shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's output that varies over the mesh axes that any of ``arrays`` varies over.

    Inside ``shard_map`` a kernel has to say so; JAX calls the property ``vma``, and ``manual_axis_type`` since 0.10.
    """
    types = [jax.typeof(x) for x in arrays]
    keywords: dict[str, Any]
    if hasattr(types[0], "manual_axis_type"):
        axes = [t.manual_axis_type for t in types]
        keywords = {"manual_axis_type": type(axes[0])(varying=frozenset().union(*(a.varying for a in axes)))}
    else:
        keywords = {"vma": frozenset().union(*(getattr(t, "vma", ()) for t in types))}
    return jax.ShapeDtypeStruct(shape, dtype, **keywords)
