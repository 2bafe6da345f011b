"""Text from a decoder: prompts in, tokens out, with any of the ways to decode faster, alone or together.

    params = prepare(params)                                  # once: fused products, smaller weights
    out = generate(params, tokens, config, max_new_tokens=64)

What composes: weights in 16 or 8 bits (`prepare`), a prompt compressed to its important tokens (`SnapKV`), a long cache
read by blocks (`BlockTopK`), guesses of speculative heads (`Drafts`), of a smaller model (`DraftDecoder`) or of the
text itself (`Lookup`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxaccel.compression import quantize_weights
from jaxaccel.decoding.generate import PLAIN, GenerationState, Rules, Typical, run, start
from jaxaccel.decoding.sampling import Sampling
from jaxaccel.models.decoder import float_dtype, fuse, has_experts, is_stacked, unstack_layers
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.drafts import DraftDecoder, Drafts, Lookup, cached_model
from jaxaccel.models.kv_cache import BlockTopK
from jaxaccel.models.prompts import PROMPT_STEP, SnapKV, pad_prompts, prefill


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Any  # int32 [B, max_new_tokens], with the stop token; padding after `count`
    count: Any  # int32 [B]
    steps: Any  # int32, passes through the model after the prompt
    histogram: Any  # int32 [max_depth + 1], steps in which 0, 1, ... guesses stood, of sequences not finished


def prepare(params: Any, dtype: Literal["float32", "bfloat16", "int8"] = "float32") -> Any:
    """Parameters as decoding likes them: layers apart, joined products, and weights of fewer bits.

    Args:
        params: of a decoder, in any form.
        dtype: ``"bfloat16"`` converts everything, activations with it; ``"int8"`` the matrices.

    Raises:
        ValueError: for another ``dtype``, or sparse experts in ``"int8"``: their kernels read float slabs.
    """
    params = jax.tree.map(jnp.asarray, params)  # files give NumPy arrays
    params = unstack_layers(params) if is_stacked(params) else params
    if dtype == "int8" and has_experts(params):
        raise ValueError("dtype is 'int8', but the parameters hold sparse experts: expected 'float32' or 'bfloat16'")
    return quantize_weights(fuse(params), dtype)


@functools.partial(jax.jit, static_argnames=("rules", "max_new_tokens"))
def _start(
    logits: Array, hidden: Array, tokens: Array, length: Array, key: Any, *, rules: Rules, max_new_tokens: int
) -> GenerationState:
    """The state after the prompts, without their cache."""
    seen = None
    if rules.sampling.repetition_penalty != 1:
        vocab = logits.shape[-1]
        real = jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], tokens, vocab)
        seen = jnp.zeros((len(tokens), vocab), bool).at[jnp.arange(len(tokens))[:, None], real].set(True, mode="drop")
    return start(logits, hidden, None, rules=rules, max_new_tokens=max_new_tokens, key=key, seen=seen)


def _check_prompts(tokens: np.ndarray, length: np.ndarray, config: DecoderConfig, new: int) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"prompts have shape {tokens.shape} and dtype {tokens.dtype}, expected integers [B, T]")
    if length.shape != (len(tokens),) or length.min() < 1 or length.max() > tokens.shape[1]:
        raise ValueError(f"length is {length.tolist()}, expected a number from 1 to {tokens.shape[1]} for each prompt")
    longest = int(length.max())
    if longest + new > config.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones do not fit into the {config.max_positions} positions "
            "of the model"
        )
    real = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, 0)
    if real.min() < 0 or real.max() >= config.vocab_size:
        raise ValueError(f"prompts hold ids from {real.min()} to {real.max()}, expected 0 to {config.vocab_size - 1}")


def generate(
    params: Any,
    prompts: Sequence[Sequence[int]] | Int[Array, "B T"] | np.ndarray,
    config: DecoderConfig,
    *,
    length: Int[Array, "B"] | np.ndarray | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    key: Key[Array, ""] | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    drafts: Drafts | DraftDecoder | Lookup | None = None,
    typical: Typical | None = None,
    snapkv: SnapKV | None = None,
    sparse: BlockTopK | None = None,
    cache_dtype: Any = None,
    callback: Callable[[np.ndarray, np.ndarray], None] | None = None,
    every: int = 8,
) -> Generation:
    """Continue prompts.

    Args:
        params: of the decoder; `prepare` them once.
        prompts: lists of ids, or an array [B, T] padded on the right with ``length`` given.
        config: of the model.
        length: real tokens of each row of an array; all by default.
        max_new_tokens: most tokens for each prompt.
        sampling: greedy by default.
        key: for sampling: the same key gives the same text.
        stop_ids: a sequence ends with the first of these.
        pad_id: fills the rest of its row.
        drafts: where guesses come from. Greedy text stays what it is without, up to ties in the last bit, and sampled
            text keeps its law.
        typical: accept drafts by the typical rule, with a temperature.
        snapkv: compress prompts.
        sparse: read the cache by blocks.
        cache_dtype: of keys and values; that of the model by default.
        callback: is told tokens and counts as they come (see `jaxaccel.decoding.generate.run`).
        every: steps between two calls of it.

    Returns:
        Tokens, counts, and how many steps they took.

    Raises:
        ValueError: for an empty prompt, ids that the model does not have, a prompt that does not fit, numbers out of
            range, heads of another model, a draft model with another vocabulary.

    >>> from jaxaccel.models.decoder import init_params
    >>> config = DecoderConfig.tiny()
    >>> params = prepare(init_params(jax.random.key(0), config))
    >>> out = generate(params, [[1, 2, 3], [4]], config, max_new_tokens=5)
    >>> out.tokens.shape, int(out.steps)
    ((2, 5), 4)
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if isinstance(prompts, jax.Array | np.ndarray):
        tokens = np.asarray(prompts)
        count = np.full(len(tokens), tokens.shape[-1], np.int32) if length is None else np.asarray(length, np.int32)
    else:
        if length is not None:
            raise ValueError("length is given with lists of ids, which have their own lengths")
        tokens, count = pad_prompts(prompts, multiple=min(PROMPT_STEP, config.max_positions))
        tokens = tokens[:, : max(config.max_positions, int(count.max()))]
    _check_prompts(tokens, count, config, max_new_tokens)
    if drafts is not None:
        drafts.check(config)
    tree = PLAIN if drafts is None else drafts.tree
    rules = Rules(sampling or Sampling(), tuple(stop_ids), pad_id, tree, typical)
    dtype = jnp.dtype(cache_dtype or config.dtype or float_dtype(params))
    ids, real = jnp.asarray(tokens), jnp.asarray(count)
    room = max_new_tokens + tree.max_depth + 1
    logits, hidden, cache = prefill(
        params, ids, real, config, room=room, cache_dtype=dtype, snapkv=snapkv, sparse=sparse
    )
    state = _start(logits, hidden, ids, real, key, rules=rules, max_new_tokens=max_new_tokens)
    source, draft = (None, ()) if drafts is None else drafts.source(params, ids, real, state.last, room)
    state = state._replace(cache=cache, draft=draft)
    state = run(params, state, model=cached_model(config), rules=rules, source=source, callback=callback, every=every)
    return Generation(state.tokens, state.count, state.steps, state.histogram)
