"""Parts of the small decoder of the recall experiments, so that its attention can be cut open."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HEADS, KV_HEADS = 4, 2

Keep = Callable[[jax.Array], jax.Array]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _rotate(x: jax.Array, start: int = 0) -> jax.Array:
    """Rotary positions of ``[B, T, heads, size]``, half-split, from position ``start`` on."""
    half = x.shape[-1] // 2
    angle = (start + jnp.arange(x.shape[1]))[:, None] / 10_000 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def embed(params: Any, tokens: jax.Array) -> jax.Array:
    """Input of the layers, e(xₜ) + e'(xₜ₋₁): a value then carries its key, and recall is learned quickly."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    return params["embed"][tokens] + params["embed_previous"][before]


def project(layer: Any, x: jax.Array, start: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries ``[B, T, N, H]``, rotated keys and values ``[B, T, K, H]`` of positions from ``start`` on."""
    batch, length, width = x.shape
    size = width // HEADS
    y = _norm(x, layer["attention_norm"])
    q = (y @ layer["q"]).reshape(batch, length, HEADS, size)
    k, v = jnp.split((y @ layer["kv"]).reshape(batch, length, 2 * KV_HEADS, size), 2, axis=2)
    return _rotate(q, start), _rotate(k, start), v


def attend(layer: Any, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, keep: Keep) -> jax.Array:
    """The rest of a layer: attention where ``keep`` allows it, and the MLP. K may be any divisor of N."""
    k, v = (jnp.repeat(part, HEADS // part.shape[2], axis=2) for part in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    logits = jnp.where(keep(logits), logits, -jnp.inf)
    mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits, -1), v)
    x = x + mixed.reshape(x.shape) @ layer["out"]
    y = _norm(x, layer["mlp_norm"])
    return x + jax.nn.gelu(y @ layer["up"]) @ layer["down"]


def causal(logits: jax.Array) -> jax.Array:
    """The mask of dense attention."""
    return jnp.tril(jnp.ones(logits.shape[-2:], bool))


def unembed(params: Any, x: jax.Array) -> jax.Array:
    """Logits of the next token."""
    return _norm(x, params["norm"]) @ params["head"]
