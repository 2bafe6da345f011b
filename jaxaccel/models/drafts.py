"""What guesses ahead for a decoder: speculative heads, a smaller decoder, or the text itself.

    generate(params, prompts, config, drafts=DraftDecoder(small_params, small_config, num_tokens=4))

Each of them knows its tree, checks that it fits a model, and makes the source that the loop drives.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxaccel.compression import take_rows
from jaxaccel.decoding.drafts import DraftHeads, DraftModel, PromptLookup
from jaxaccel.decoding.generate import CachedModel
from jaxaccel.decoding.medusa import MedusaParams
from jaxaccel.decoding.tree import TreeBuffers, chain
from jaxaccel.models.decoder import decoder_forward, decoder_logits, float_dtype, output_matrix
from jaxaccel.models.decoder_config import DecoderConfig
from jaxaccel.models.kv_cache import KVCache, NewTokens, append, rewind
from jaxaccel.models.prompts import prefill


@functools.cache
def cached_model(config: DecoderConfig) -> CachedModel:
    """The functions that `jaxaccel.decoding.generate` drives, the same ones for equal configurations."""

    def forward(
        params: Any, tokens: Array, cache: KVCache, positions: Array, mask: Array, live: Array
    ) -> tuple[Array, NewTokens]:
        real = jnp.broadcast_to(live[:, None], tokens.shape)
        result = decoder_forward(params, tokens, config, positions=positions, cache=cache, mask=mask, real=real)
        return result.hidden, result.new

    def store(cache: KVCache, new: NewTokens, nodes: Array | None, count: Array | None) -> KVCache:
        return append(cache, new, nodes=nodes, count=count)

    return CachedModel(forward, decoder_logits, store, rewind)


@dataclasses.dataclass(frozen=True)
class Drafts:
    """Speculative heads and the tree that they fill."""

    heads: MedusaParams
    tree: TreeBuffers
    token_ids: Any = None
    """int32 [V'], the tokens that the heads guess among; the whole vocabulary by default. Heads with a matrix of their
    own have one row for each of these."""

    def check(self, config: DecoderConfig) -> None:
        """Raise a `ValueError` if heads belong to another model than that of ``config``."""
        width, words = self.heads.weight.shape[-1], config.vocab_size
        if self.token_ids is not None:  # they know a part of the vocabulary, and not how large it is
            words = max(words, int(np.max(self.token_ids)) + 1)
        elif self.heads.vocab is not None:
            words = self.heads.vocab.shape[1]
        if (width, words) != (config.hidden_size, config.vocab_size):
            raise ValueError(
                f"heads of another model, of width {width} with {words} tokens; this one has width "
                f"{config.hidden_size} and {config.vocab_size} tokens"
            )

    def source(self, params: Any, tokens: Array, length: Array, last: Array, room: int) -> tuple[DraftHeads, Any]:
        """The heads as the loop takes them, and what they remember of the prompts: nothing."""
        if self.token_ids is None:
            return DraftHeads(self.heads), ()
        ids = jnp.asarray(self.token_ids, jnp.int32)
        rows = None if self.heads.vocab is not None else take_rows(output_matrix(params), ids)
        return DraftHeads(self.heads, rows, ids), ()


@dataclasses.dataclass(frozen=True)
class DraftDecoder:
    """A smaller decoder with the same vocabulary, which writes a chain of tokens ahead.

    Raises:
        ValueError: for fewer than 1 token.
    """

    params: Any
    """`prepare` them once, as those of the large one."""
    config: DecoderConfig
    num_tokens: int = 4
    """Guesses per step. More pay where most of them stand."""

    def __post_init__(self) -> None:
        _check_count(self.num_tokens)

    @property
    def tree(self) -> TreeBuffers:
        """A chain."""
        return chain(self.num_tokens)

    def check(self, config: DecoderConfig) -> None:
        """Raise a `ValueError` if the two do not go together."""
        own = self.config
        if own.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has {own.vocab_size} tokens, and the target {config.vocab_size}: expected one "
                "vocabulary"
            )
        if own.attention == "block_topk":
            raise ValueError("the draft model reads its cache by blocks, which cannot forget guesses: expected dense")

    def source(self, params: Any, tokens: Array, length: Array, last: Array, room: int) -> tuple[DraftModel, Any]:
        """The model as the loop takes it, and its cache of the prompts."""
        most = self.config.max_positions
        longest, new = int(length.max()), room - self.num_tokens - 1
        if longest + new > most:
            raise ValueError(
                f"a prompt of {longest} tokens and {new} new ones do not fit into the {most} positions of the draft "
                "model"
            )
        tokens = tokens[:, :most]
        dtype = self.config.dtype or float_dtype(self.params)
        _, _, cache = prefill(self.params, tokens, length, self.config, room=room, cache_dtype=dtype)
        model = DraftModel(self.params, cached_model(self.config))
        previous = jnp.take_along_axis(tokens, (length - 1)[:, None], 1)[:, 0].astype(jnp.int32)
        return model, model.begin(cache, previous)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Guess what followed earlier in the text: see `jaxaccel.decoding.PromptLookup`.

    Raises:
        ValueError: for numbers below 1.
    """

    num_tokens: int = 4
    """Guesses per step."""
    ngram: int = 3
    """Tokens that are compared, at most."""

    def __post_init__(self) -> None:
        _check_count(self.num_tokens)
        PromptLookup(self.ngram)

    @property
    def tree(self) -> TreeBuffers:
        """A chain."""
        return chain(self.num_tokens)

    def check(self, config: DecoderConfig) -> None:
        """It fits every model."""

    def source(self, params: Any, tokens: Array, length: Array, last: Array, room: int) -> tuple[PromptLookup, Any]:
        """The rule as the loop takes it, and the text that it looks into."""
        rule = PromptLookup(self.ngram)
        return rule, rule.begin(tokens, length, last, room=room)


def _check_count(num_tokens: int) -> None:
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}, expected at least 1 guess")
