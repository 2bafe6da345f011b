"""What transformers of diffusion models are made of: descriptions of places and times, and two branches.

    attention branch   W_o Attention(W_q h, W_k h, W_v h) + b,   all tokens see all
    MLP branch         W₂ GELU(W₁ h + b₁) + b₂,   GELU by its tanh formula

A branch takes what is normalised and modulated already, and does not add itself to the stream: that is left to those
who keep its output, weigh it by a gate, or reuse an older one.

Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxaccel.compression import linear

EPS = 1e-6
"""Added to the variance by `layer_norm`."""


def grid_positions(side: int, width: int) -> np.ndarray:
    """Fixed positions of side × side patches, row by row: sines and cosines of the column, then of the row.

    Args:
        side: patches of a row.
        width: D, a multiple of 4. The frequencies are 10000^(−4k/D), k < D/4.

    Returns:
        float64 [side², D], rounded to float32 as models are trained with.

    >>> grid_positions(2, 4).round(2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.84, 0.54, 0.0, 1.0], [0.0, 1.0, 0.84, 0.54], [0.84, 0.54, 0.84, 0.54]]
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, 0)
    return np.concatenate([columns, rows], -1).astype(np.float32).astype(np.float64)


def time_features(t: Num[Array, "..."], size: int, dtype: Any = jnp.float32) -> Float[Array, "... F"]:
    """Cosines, then sines, of t · 10000^(−2k/size), k < size/2.

    Args:
        t: time steps, of any shape.
        size: F, even.
        dtype: of the result; worked in float32 at least.

    >>> time_features(jnp.array([0.0]), 4).tolist()
    [[1.0, 1.0, 0.0, 0.0]]
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(size // 2) / (size // 2)), wide)
    angles = t.astype(wide)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1).astype(dtype)


def layer_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """(x − mean)/√(variance + 1e-6), without parameters, worked in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPS)).astype(x.dtype)


def attention_branch(block: Mapping[str, Any], h: Float[Array, "B N D"], heads: int) -> Float[Array, "B N D"]:
    """Attention of all tokens to all, with the output matrix.

    Args:
        block: has ``qkv`` [3·D, D], ``out`` [D, D] and their biases.
        h: normalised tokens.
        heads: which share D.

    Returns:
        What is added to the stream, before any gate. For float64 the softmax is float64, too.
    """
    batch, count, width = h.shape
    qkv = linear(h, block["qkv"], block["qkv_bias"]).reshape(batch, count, 3, heads, width // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if h.dtype == jnp.float64:  # jax.nn.dot_product_attention has its softmax in float32
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(width // heads)
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, -1), v)
    else:
        mixed = jax.nn.dot_product_attention(q, k, v)
    return linear(mixed.reshape(batch, count, width), block["out"], block["out_bias"])


def mlp_branch(block: Mapping[str, Any], h: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """The MLP of a block.

    Args:
        block: has ``up`` [F, D], ``down`` [D, F] and their biases.
        h: normalised tokens.

    Returns:
        What is added to the stream, before any gate.
    """
    hidden = jax.nn.gelu(linear(h, block["up"], block["up_bias"]), approximate=True)
    return linear(hidden, block["down"], block["down_bias"])


def to_patches(images: Float[Array, "B H W C"], patch: int) -> Float[Array, "B N P"]:
    """Patches row by row; the pixels of a patch row by row, channels last."""
    batch, rows, columns, channels = images.shape
    split = images.reshape(batch, rows // patch, patch, columns // patch, patch, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def from_patches(patches: Float[Array, "B N P"], side: int, patch: int) -> Float[Array, "B H W C"]:
    """The inverse of `to_patches` for side × side patches."""
    split = patches.reshape(patches.shape[0], side, side, patch, patch, -1)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(patches.shape[0], side * patch, side * patch, -1)
