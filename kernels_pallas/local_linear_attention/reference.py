"""Local linear attention, naively: every row's system is built, [B, N, T, H, H], and solved directly."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas.local_linear_attention.problem import Forward, Inputs, Options


def visible(inputs: Inputs, options: Options) -> Array:
    """Which keys each row sees, [B, N, T, S] bool."""
    batch, queries, heads, _ = inputs.q.shape
    keys = inputs.k.shape[1]
    keep = jnp.ones((batch, heads, queries, keys), bool)
    if options.is_causal:
        keep &= jnp.arange(keys) <= jnp.arange(queries)[:, None] + inputs.offset
    return keep if inputs.mask is None else keep & inputs.mask


def forward(inputs: Inputs, options: Options) -> Forward:
    """The equations in the order of the paper's derivation; the solver's options do not matter here.

    p = softmax(scale·q·k), k̄ = Σ p k, A = Σ p (k − k̄)(k − k̄)ᵀ + ridge·1, A x = q − k̄, o = Σ p (1 + x·(k − k̄)) v.
    """
    acc = inputs.ridge.dtype
    group = inputs.q.shape[2] // inputs.k.shape[2]
    q = inputs.q.astype(acc).swapaxes(1, 2)  # [B, N, T, H]
    k, v = (jnp.repeat(a.astype(acc), group, 2).swapaxes(1, 2) for a in (inputs.k, inputs.v))
    keep = visible(inputs, options)
    seen = keep.any(-1, keepdims=True)
    high = jax.lax.Precision.HIGHEST
    logits = jnp.where(keep, inputs.scale * jnp.einsum("bnth,bnsh->bnts", q, k, precision=high), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    p = jnp.where(keep, jnp.exp(logits - jnp.where(seen, lse, 0)), 0)
    mean = jnp.einsum("bnts,bnsh->bnth", p, k, precision=high)
    centred = k[:, :, None] - mean[:, :, :, None]  # [B, N, T, S, H]
    if inputs.probe is not None:
        x = inputs.probe.astype(acc).swapaxes(1, 2)
    else:
        size = q.shape[-1]
        system = jnp.einsum("bnts,bntsh,bntsg->bnthg", p, centred, centred, precision=high)
        system += inputs.ridge.swapaxes(1, 2)[..., None, None] * jnp.eye(size, dtype=acc)
        x = jnp.linalg.solve(system, (q - mean)[..., None])[..., 0]
    x = jnp.where(seen, x, 0)
    weights = p * (1 + jnp.einsum("bnth,bntsh->bnts", x, centred, precision=high))
    out = jnp.einsum("bnts,bnsv->bntv", weights, v, precision=high).swapaxes(1, 2).astype(inputs.q.dtype)
    iterations = jnp.zeros(inputs.q.shape[:3], jnp.int32)
    return Forward(out, x.swapaxes(1, 2), mean.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2), iterations)


def naive(query: Array, key: Array, value: Array, ridge: float, is_causal: bool = True) -> Array:
    """How one writes it first: einsums over [B, T, S, N] and [B, N, T, H, H]. The benchmark's baseline.

    Unlike `forward` it does not build centred keys for every row, [B, N, T, S, H], but subtracts k̄k̄ᵀ afterwards, which
    is the cheapest form that einsum alone gives; the query heads must be as many as the key heads.
    """
    size = query.shape[-1]
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * size**-0.5
    if is_causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    p = jax.nn.softmax(logits, axis=-1)
    mean = jnp.einsum("bnts,bsnh->bnth", p, key)
    system = jnp.einsum("bnts,bsnh,bsng->bnthg", p, key, key) - mean[..., :, None] * mean[..., None, :]
    system += ridge * jnp.eye(size)
    x = jnp.linalg.solve(system, (query.swapaxes(1, 2) - mean)[..., None])[..., 0]
    weights = p * (1 + jnp.einsum("bnth,bsnh->bnts", x, key) - jnp.sum(x * mean, -1)[..., None])
    return jnp.einsum("bnts,bsnv->btnv", weights, value)
