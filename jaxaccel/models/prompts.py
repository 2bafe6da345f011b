"""Prompts into a cache: layer by layer, so that one layer is compiled, not all, and only one is held uncompressed."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxaccel.attention import extend, init_cache
from jaxaccel.caching.snapkv import compress, snapkv_select
from jaxaccel.models.decoder import (
    block,
    decoder_forward,
    decoder_logits,
    default_sparse,
    embed,
    is_stacked,
    prompt_context,
    rms_norm,
)
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.kv_cache import BlockTopK, KVCache

PROMPT_STEP = 32
"""Prompts are padded to a multiple of this, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """How a prompt is compressed: see `jaxaccel.caching.snapkv_select`."""

    capacity: int = 1024
    """Tokens that remain of a prompt in each layer and head; shorter prompts stay whole."""
    window: int = 32
    """Latest tokens, which vote and always remain."""
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"
    aggregate: Literal["mean", "none"] = "mean"
    """``"mean"``: a group's heads keep the same tokens; ``"none"``: each its own, which takes N/K times the memory."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.capacity <= self.window:
            raise ValueError(f"capacity is {self.capacity}, expected more than window = {self.window}, at least 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")


def pad_prompts(prompts: Sequence[Sequence[int]], *, multiple: int = PROMPT_STEP) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one array [B, T], padded on the right with 0, and their lengths [B].

    Raises:
        ValueError: for no prompts, or an empty one.

    >>> tokens, length = pad_prompts([[5, 6, 7], [8]], multiple=4)
    >>> tokens.tolist(), length.tolist()
    ([[5, 6, 7, 0], [8, 0, 0, 0]], [3, 1])
    """
    if not prompts:
        raise ValueError("there are no prompts")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty, expected at least one token")
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-int(length.max()) // multiple) * multiple), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, length


# Each of these is compiled on its own, or becomes a part of what a caller compiles.


@functools.partial(jax.jit, static_argnames="config")
def _enter(params: Any, tokens: Array, *, config: DecoderConfig) -> Array:
    return embed(params, tokens, config)


@functools.partial(jax.jit, static_argnames=("config", "snapkv", "size", "dtype", "sparse"), donate_argnames=("x",))
def _pass_layer(
    layer: Any,
    x: Array,
    length: Array,
    *,
    config: DecoderConfig,
    snapkv: SnapKV | None,
    size: int,
    dtype: Any,
    sparse: BlockTopK | None,
) -> tuple[Array, Any, Array]:
    """One layer: the residual stream after it, what it caches, and how many tokens of each prompt count there."""
    rows = None
    if snapkv is not None:
        rows = jnp.maximum(length[:, None] - snapkv.window, 0) + jnp.arange(snapkv.window)
    real = jnp.arange(x.shape[1]) < length[:, None]
    x, (keys, values, queries, _) = block(layer, x, None, prompt_context(x, config, rows, real), config)
    kept = length
    if snapkv is not None:
        selection = snapkv_select(
            queries, keys.swapaxes(1, 2), capacity=snapkv.capacity, window=snapkv.window,
            kernel_size=snapkv.kernel_size, pooling=snapkv.pooling, aggregate=snapkv.aggregate, length=length,
        )  # fmt: skip
        keys, values = compress(keys, selection, axis=2), compress(values, selection, axis=2)
        kept = selection.kept
    if sparse is None:
        # What padding left in slots from `kept` on does not count, and is written over.
        room = ((0, 0), (0, 0), (0, size - keys.shape[2]), (0, 0))
        return x, tuple(jnp.pad(part.astype(dtype), room) for part in (keys, values)), kept
    empty = init_cache(
        len(x), size, keys.shape[1], config.head_dim, block_size=sparse.block_size, dtype=dtype, layout="BKSH"
    )
    return x, extend(empty, keys.swapaxes(1, 2), values.swapaxes(1, 2), kept), kept


@functools.partial(jax.jit, static_argnames=("config", "size", "dtype"))
def _pass_stacked(
    params: Any, tokens: Array, length: Array, *, config: DecoderConfig, size: int, dtype: Any
) -> tuple[Array, Any]:
    """All layers of a model that scans over them."""
    real = jnp.arange(tokens.shape[1]) < length[:, None]
    result = decoder_forward(params, tokens, config, real=real)
    room = (*((0, 0),) * 3, (0, size - tokens.shape[1]), (0, 0))
    return result.hidden, tuple(jnp.pad(part.astype(dtype), room) for part in result.new)


@functools.partial(jax.jit, static_argnames=("config", "normed"))
def _leave(params: Any, x: Array, length: Array, *, config: DecoderConfig, normed: bool) -> tuple[Array, Array]:
    last = jnp.take_along_axis(x, (length - 1)[:, None, None], 1)[:, 0]
    last = last if normed else rms_norm(last, params["final_norm"], config.norm_eps)
    return decoder_logits(params, last), last


def prefill(
    params: Any,
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    config: DecoderConfig,
    *,
    room: int,
    cache_dtype: Any = jnp.float32,
    snapkv: SnapKV | None = None,
    sparse: BlockTopK | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "B D"], KVCache]:
    """Pass prompts through the model and fill a cache.

    Call it outside ``jit``: all layers then run one compiled function, so that a fraction is compiled, and a layer's
    keys and values are compressed before those of the next layer exist. Inside ``jit`` it gives the same.

    Args:
        params: of the decoder.
        tokens: prompts, padded on the right.
        length: real tokens of each, at least 1.
        config: of the model.
        room: slots for tokens to come.
        cache_dtype: of keys and values.
        snapkv: keep a part of each prompt. Positions go on from its true length.
        sparse: read the cache by blocks; where the budget is not less than the cache, it is dense.

    Returns:
        Logits and hidden states after each prompt's last token, and the cache.

    Raises:
        ValueError: for ``snapkv`` or ``sparse`` with stacked layers, more tokens than the model has positions.
    """
    total = tokens.shape[1]
    if not 1 <= total <= config.max_positions:
        raise ValueError(f"tokens has {total} positions, expected 1 to max_positions = {config.max_positions}")
    snapkv = None if snapkv is None or total <= snapkv.capacity else snapkv
    size = (total if snapkv is None else snapkv.capacity) + room
    sparse = default_sparse(config) if sparse is None else sparse
    sparse = None if sparse is None or sparse.budget >= size else sparse
    if sparse is not None:
        size = -(-size // sparse.block_size) * sparse.block_size
    dtype, kept = jnp.dtype(cache_dtype), length
    if is_stacked(params):
        for name, given in (("snapkv", snapkv), ("sparse", sparse)):
            if given is not None:
                raise ValueError(f"{name} needs layers apart: unstack them, with prepare")
        x, layers = _pass_stacked(params, tokens, length, config=config, size=size, dtype=dtype)
    else:
        x, filled = _enter(params, tokens, config=config), []
        for i in range(config.num_layers):
            x, cached, kept = _pass_layer(
                params["layers"][i], x, length, config=config, snapkv=snapkv, size=size, dtype=dtype,
                sparse=None if sparse is None or i < sparse.dense_layers else sparse,
            )  # fmt: skip
            filled.append(cached)
        layers = tuple(filled)
    logits, hidden = _leave(params, x, length, config=config, normed=is_stacked(params))
    # Copies: a caller gives the cache away, and keeps its own lengths.
    return logits, hidden, KVCache(layers, jnp.array(kept), jnp.array(length), sparse)
