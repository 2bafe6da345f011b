"""Problems for the kernels' tests: small inputs, and the reference's answers to them in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.local_linear_attention import decode, reference
from kernels_pallas.local_linear_attention.decode import DecodeState
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


Case = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def cache(dtype: str, sizes: tuple[int, ...], lengths: list[int], ridge: float = 1.0) -> Case:
    """q, k, v, length, scale, ridge; unused slots hold NaN and infinity."""
    batch, keys, heads, key_heads, head, value_head = sizes
    rng = np.random.default_rng(0)
    unused = (np.arange(keys) >= np.asarray(lengths)[:, None])[:, :, None, None]
    q = jnp.asarray(rng.standard_normal((batch, heads, head)), dtype)
    k = jnp.asarray(np.where(unused, np.nan, rng.standard_normal((batch, keys, key_heads, head))), dtype)
    v = jnp.asarray(np.where(unused, np.inf, rng.standard_normal((batch, keys, key_heads, value_head))), dtype)
    ridges = jnp.asarray(ridge * (0.5 + rng.random((batch, heads))), jnp.float32)
    return q, k, v, jnp.asarray(lengths, jnp.int32), jnp.float32(head**-0.5), ridges


def expected_step(case: Case) -> tuple[DecodeState, np.ndarray]:
    """Moments and output of a decoding step by XLA's version in float64, solved by Cholesky factors."""

    @jax.jit  # one by one, its operations would compile one by one
    def decoded(q, k, v, length, scale, ridge):
        state = decode.partial_state(q, k, v, length, scale)
        return state, decode.finish(state, q, ridge, Options(solver="cholesky"))[0]

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, decoded(*wide(case)))
