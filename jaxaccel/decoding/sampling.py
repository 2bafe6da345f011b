"""How the next token is taken from logits: greedily, or drawn after the usual filters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxaccel.decoding.verify import nucleus_logits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Rules for drawing a token, applied in this order, that of Hugging Face's generation.

    Raises:
        ValueError: for numbers out of range.

    >>> Sampling(temperature=0.3, top_k=5, top_p=0.5, repetition_penalty=1.15).greedy
    False
    """

    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it where positive, multiplied where negative (arXiv 1909.05858)."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token, and the filters below have no say."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability (arXiv 1904.09751)."""
    vocab_size: int | None = None
    """Ids from here on are never taken: rows of the output matrix that the tokenizer has no word for."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1], or None")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 1, or None")

    @property
    def greedy(self) -> bool:
        """Whether no randomness is needed."""
        return self.temperature == 0


def penalise(logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float) -> Float[Array, "*B V"]:
    """Logits of tokens that occurred, made smaller by a factor.

    >>> penalise(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def law_logits(
    logits: Float[Array, "*B V"], sampling: Sampling, *, seen: Bool[Array, "*B V"] | None = None
) -> Float[Array, "*B V"]:
    """Logits whose softmax is the law of the next token; greedily, their argmax is that token.

    Args:
        logits: in any float type.
        sampling: the rules.
        seen: which tokens occurred; needed for a repetition penalty.

    Returns:
        At least float32; -inf for tokens that are never taken.

    Raises:
        ValueError: if ``seen`` is missing, or ``top_k`` or ``vocab_size`` exceeds V.

    >>> law_logits(jnp.array([0.0, 3.0, 1.0]), Sampling(temperature=0.5, top_k=2)).tolist()
    [-inf, 6.0, 2.0]
    """
    vocab = logits.shape[-1]
    for name in ("top_k", "vocab_size"):
        if (getattr(sampling, name) or 0) > vocab:
            raise ValueError(f"{name} is {getattr(sampling, name)}, but logits have {vocab} entries")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if sampling.vocab_size is not None and sampling.vocab_size < vocab:
        logits = jnp.where(jnp.arange(vocab) < sampling.vocab_size, logits, -jnp.inf)
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs seen: which tokens occurred")
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return nucleus_logits(logits, temperature=sampling.temperature, top_p=top_p)


def next_tokens(
    logits: Float[Array, "*B V"],
    sampling: Sampling,
    *,
    key: Key[Array, ""] | None = None,
    seen: Bool[Array, "*B V"] | None = None,
) -> Int[Array, "*B"]:
    """A token for each row of logits.

    Args:
        logits: in any float type.
        sampling: the rules.
        key: needed unless they are greedy.
        seen: which tokens occurred; needed for a repetition penalty.

    Returns:
        int32 ids.

    Raises:
        ValueError: if ``key`` or ``seen`` is missing, or ``top_k`` or ``vocab_size`` exceeds V.

    >>> next_tokens(jnp.array([[0.0, 3.0, 1.0]]), Sampling()).tolist()
    [1]
    """
    kept = law_logits(logits, sampling, seen=seen)
    if sampling.greedy:
        return jnp.argmax(kept, -1).astype(jnp.int32)
    if key is None:
        raise ValueError("sampling with a temperature needs a key")
    return jax.random.categorical(key, kept).astype(jnp.int32)
