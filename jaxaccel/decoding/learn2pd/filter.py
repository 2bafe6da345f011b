"""The filter: a network of 2b² + 2b parameters that says which positions of a block are final.

    z = W₂ relu(W₁ c + b₁) + b₂,   accept position i if it is masked and σ(z_i) > τ

Its input c are the confidences of all b positions of a block, those already revealed among them (there c is that of
the model's own prediction, not of the token that was kept). One filter serves all blocks and steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class FilterParams(NamedTuple):
    """Parameters of a filter for blocks of length b; matrices are [out, in]."""

    w1: Float[Array, "b b"]
    b1: Float[Array, "b"]
    w2: Float[Array, "b b"]
    b2: Float[Array, "b"]


def filter_init(key: Key[Array, ""], *, block_length: int) -> FilterParams:
    """Random parameters, uniform in ±1/√b: 2b(b + 1) numbers.

    Args:
        key: of the numbers.
        block_length: b, for which alone the filter will serve.

    Raises:
        ValueError: for a block length below 1.

    >>> params = filter_init(jax.random.key(0), block_length=32)
    >>> sum(leaf.size for leaf in params)
    2112
    """
    if block_length < 1:
        raise ValueError(f"block_length is {block_length}, expected at least 1")
    bound = 1 / math.sqrt(block_length)
    shapes = ((block_length, block_length), (block_length,)) * 2
    keys = jax.random.split(key, 4)
    return FilterParams(
        *(jax.random.uniform(k, s, minval=-bound, maxval=bound) for k, s in zip(keys, shapes, strict=True))
    )


def filter_apply(params: FilterParams, confidence: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
    """Logits of "this position is final".

    Args:
        params: of a filter for blocks of length b.
        confidence: of the positions of a block. A block that an end of text cut short is filled up with zeros.

    Returns:
        As many logits.

    Raises:
        ValueError: for more positions than the filter's block has.

    >>> params = filter_init(jax.random.key(0), block_length=4)
    >>> filter_apply(params, jnp.ones((2, 3))).shape
    (2, 3)
    """
    size, count = params.b1.shape[-1], confidence.shape[-1]
    if count > size:
        raise ValueError(f"confidence has {count} positions, but the filter was trained for block_length = {size}")
    padding = [(0, 0)] * (confidence.ndim - 1) + [(0, size - count)]
    padded = jnp.pad(confidence.astype(params.w1.dtype), padding)
    inner = jax.nn.relu(padded @ params.w1.T + params.b1)
    return (inner @ params.w2.T + params.b2)[..., :count]
