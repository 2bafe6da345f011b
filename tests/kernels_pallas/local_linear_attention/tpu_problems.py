"""Problems for the TPU kernels' tests: small inputs, and the reference's answers to them in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.local_linear_attention import reference
from kernels_pallas.local_linear_attention.problem import Cotangents, Forward, Inputs, Options


def problem(dtype: str, sizes: tuple[int, ...], *, ridge: float = 1.0, offset: int = 0, probe: bool = False) -> Inputs:
    """Normal numbers in ``dtype`` with a ridge that differs from row to row; sizes are B, T, S, N, K, H, Hv."""
    batch, queries, keys, heads, key_heads, head, value_head = sizes
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return Inputs(
        q=normal(batch, queries, heads, head),
        k=normal(batch, keys, key_heads, head),
        v=normal(batch, keys, key_heads, value_head),
        scale=jnp.float32(head**-0.5),
        ridge=jnp.asarray(ridge * (0.5 + rng.random((batch, queries, heads))), jnp.float32),
        offset=jnp.int32(offset),
        mask=None,
        probe=normal(batch, queries, heads, head).astype(jnp.float32) * 0.3 if probe else None,
    )


def cotangents(inputs: Inputs) -> Cotangents:
    """Normal cotangents of all differentiable outputs."""
    rng = np.random.default_rng(1)
    batch, queries, heads, head = inputs.q.shape
    return Cotangents(
        out=jnp.asarray(rng.standard_normal((batch, queries, heads, inputs.v.shape[-1])), inputs.q.dtype),
        x=jnp.asarray(rng.standard_normal((batch, queries, heads, head)), jnp.float32) * 0.1,
        lse=jnp.asarray(rng.standard_normal((batch, queries, heads)), jnp.float32),
    )


def wide(tree: Any) -> Any:
    """Every floating array in float64; call it inside ``jax.enable_x64(True)``."""
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a), jnp.float64 if jnp.issubdtype(a.dtype, jnp.floating) else None), tree
    )


def expected(inputs: Inputs, options: Options) -> Forward:
    """The reference's result in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(reference.forward, static_argnums=1)(wide(inputs), options))


def expected_gradients(inputs: Inputs, options: Options, cot: Cotangents) -> dict[str, np.ndarray]:
    """Gradients of the reference in float64 by automatic differentiation."""
    with jax.enable_x64(True):
        given, cot = wide(inputs), wide(cot)

        def loss(arrays: dict[str, jax.Array]) -> jax.Array:
            result = reference.forward(given._replace(**arrays), options)
            lse = jnp.where(jnp.isfinite(result.lse), result.lse, 0)
            return (result.out * cot.out).sum() + (result.x * cot.x).sum() + (lse * cot.lse).sum()

        names = ["q", "k", "v", "scale", *(["ridge"] if options.solve else ["probe"])]
        grads = jax.jit(jax.grad(loss))({name: getattr(given, name) for name in names})
        return jax.tree.map(np.asarray, grads)


def error(actual: Any, wanted: np.ndarray) -> float:
    """Largest difference over the largest magnitude; infinite entries have to be the same ones."""
    actual = np.asarray(actual, np.float64)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(actual), finite)
    difference = np.abs(actual[finite] - wanted[finite])
    return float(np.max(difference, initial=0) / np.max(np.abs(wanted[finite]), initial=1e-30))
