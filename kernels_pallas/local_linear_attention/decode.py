"""One query against a cache, in one pass over it: local linear attention from weighted moments of keys and values.

With w = exp(s·q·k − m) and Σ over the cache,

    o = v̄ + cov(v, k) · (cov(k, k) + ridge·1)⁻¹ (q − k̄)

and all of v̄, k̄, cov follow from Σw, Σwk, Σwv, Σwkkᵀ, Σwvkᵀ. K and V are read once, as in flash decoding, where
conjugate gradients would read K once an iteration; the system is H x H. Moments of parts of a cache add up once they
have the same m, so that a cache may be cut into parts, on several cores or devices.

Moments cost H + Hv products a key and head where an iteration costs 2: on a chip that waits for memory that is free, on
a CPU a short cache is read faster by the full call with T = 1.

The moments are raw, so cov(k, k) is a difference: where keys have a mean much larger than their spread, it loses
2·log₂(mean/spread) bits of the accumulator's 24 (float32). The full call, which shifts keys first, does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.local_linear_attention.cholesky import solve_positive
from kernels_pallas.local_linear_attention.problem import Options
from kernels_pallas.local_linear_attention.solve import HIGH, conjugate_gradient

CHUNK = 512  # keys that are worked on at once


class DecodeState(NamedTuple):
    """Moments of a part of the cache under a query's weights, relative to exp(m); *acc* is float32 or float64.

    An empty part has m = −inf and zeros.
    """

    m: Array  # [B, N] acc, largest logit
    weight: Array  # [B, N] acc, Σ w
    k_sum: Array  # [B, N, H] acc, Σ w k
    v_sum: Array  # [B, N, Hv] acc, Σ w v
    kk: Array  # [B, N, H, H] acc, Σ w k kᵀ
    vk: Array  # [B, N, Hv, H] acc, Σ w v kᵀ


def merge(a: DecodeState, b: DecodeState) -> DecodeState:
    """Moments of two disjoint parts of a cache together."""
    m = jnp.maximum(a.m, b.m)
    safe = jnp.where(m == -jnp.inf, 0, m)

    def scale(part: DecodeState, sums: Array) -> Array:
        factor = jnp.exp(part.m - safe)
        return factor.reshape(*factor.shape, *[1] * (sums.ndim - factor.ndim)) * sums

    return DecodeState(m, *(scale(a, x) + scale(b, y) for x, y in zip(a[1:], b[1:], strict=True)))


def _moments(q: Array, k: Array, v: Array, keep: Array, scale: Array) -> DecodeState:
    """One chunk: q [B, K, G, H], k [B, C, K, H], v [B, C, K, Hv], keep [B, C]."""
    acc, size = q.dtype, q.shape[-1]
    # What lies in unused slots may be anything, NaN as well: 0 · NaN would poison the sums.
    both = jnp.concatenate([k.astype(acc), v.astype(acc)], axis=-1)
    both = jnp.where(keep[:, :, None, None], both, 0).swapaxes(1, 2)  # [B, K, C, H + Hv]
    keys = both[..., :size]
    logits = scale * jnp.einsum("bkgh,bksh->bkgs", q, keys, precision=HIGH)
    logits = jnp.where(keep[:, None, None], logits, -jnp.inf)
    m = logits.max(-1)
    w = jnp.exp(logits - jnp.where(m == -jnp.inf, 0, m)[..., None])
    first = jnp.einsum("bkgs,bkse->bkge", w, both, precision=HIGH)
    # One product for all heads of a group and for keys and values: w k against [k | v].
    weighted = w.swapaxes(-1, -2)[..., None] * keys[:, :, :, None]  # [B, K, C, G, H]
    second = jnp.einsum("bksgh,bkse->bkghe", weighted, both, precision=HIGH)
    vk = second[..., size:].swapaxes(-1, -2)
    return DecodeState(m, w.sum(-1), first[..., :size], first[..., size:], second[..., :size], vk)


def partial_state(q: Array, k: Array, v: Array, length: Array, scale: Array) -> DecodeState:
    """Moments of the first ``length`` [B] of S keys and values [B, S, K, ...] under queries [B, N, H]."""
    batch, heads, size = q.shape
    keys, kv_heads = k.shape[1:3]
    acc = scale.dtype
    grouped = q.astype(acc).reshape(batch, kv_heads, heads // kv_heads, size)
    chunk = min(CHUNK, keys)
    whole = keys // chunk

    def moments(start: Array | int, width: int) -> DecodeState:
        keys_part, values_part = (jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) for x in (k, v))
        keep = start + jnp.arange(width) < length[:, None]
        return _moments(grouped, keys_part, values_part, keep, scale)

    state = moments(0, chunk)
    if whole > 1:
        step = lambda i, total: merge(total, moments(i * chunk, chunk))  # noqa: E731
        state = jax.lax.fori_loop(1, whole, step, state)
    if keys % chunk:
        state = merge(state, moments(whole * chunk, keys % chunk))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[3:]), state)


def refusal(q: Array, k: Array, v: Array, options: Options) -> None:
    """XLA's version takes every call."""


def decode(
    q: Array, k: Array, v: Array, length: Array, scale: Array, ridge: Array, options: Options
) -> tuple[Array, DecodeState]:
    """Output [B, N, Hv] in the precision of the moments, and the moments of the whole cache."""
    state = partial_state(q, k, v, length, scale)
    return finish(state, q, ridge, options)[0], state


def finish(state: DecodeState, q: Array, ridge: Array, options: Options) -> tuple[Array, Array]:
    """Output [B, N, Hv] and x [B, N, H] from the moments of the whole cache; zeros for an empty one."""
    total = state.weight[..., None]
    seen = total != 0
    safe = jnp.where(seen, total, 1)
    k_mean, v_mean = state.k_sum / safe, state.v_sum / safe
    size = q.shape[-1]
    cov = state.kk / safe[..., None] - k_mean[..., :, None] * k_mean[..., None, :]
    system = cov + ridge[..., None, None] * jnp.eye(size, dtype=cov.dtype)
    b = jnp.where(seen, q.astype(cov.dtype) - k_mean, 0)

    def apply(u: Array) -> Array:
        return jnp.einsum("...hg,...g->...h", system, u, precision=HIGH)

    def solve(_: Callable[[Array], Array], b: Array) -> Array:
        if options.solver == "cholesky":
            last = jnp.moveaxis(system, 1, -1), jnp.moveaxis(b, 1, -1)  # heads last
            return jnp.moveaxis(solve_positive(*last), -1, 1)
        inverse = None if options.preconditioner is None else 1 / jnp.diagonal(system, axis1=-2, axis2=-1)
        return conjugate_gradient(apply, b, options, inverse)[0]

    # The derivative of a solution is another solve, not the derivative of its iterations.
    x = jax.lax.custom_linear_solve(apply, b, solve, symmetric=True)
    cross = state.vk / safe[..., None] - v_mean[..., :, None] * k_mean[..., None, :]
    return v_mean + jnp.einsum("...vh,...h->...v", cross, x, precision=HIGH), x
