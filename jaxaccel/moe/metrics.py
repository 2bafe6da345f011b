"""How sparse the routing of a mixture of experts is: per token, per chunk, and between neighbours.

An expert is active for a token where its score is not 0, whatever its sign; NaN counts as active. These are the numbers
that decide what decoding reads: `chunk_sparsity` with L tokens is 1 − |union|/Ne of a step of L tokens.

Song et al., BlockFFN, 2025, arXiv 2507.08771 (TLS, CLS and the reuse ratio).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.moe._checks import check_count, check_routing, check_tokens
from jaxaccel.moe.losses import neighbour_mask

__all__ = ["chunk_sparsity", "dead_experts", "reuse_ratio", "token_sparsity"]


def _active(scores: Array, mask: Array | None) -> tuple[Array, Array]:
    """Active pairs [..., T, Ne], none at uncounted tokens, and the tokens that count [..., T]."""
    check_routing("scores", scores)
    check_tokens("mask", mask, scores.shape[:-1], "scores")
    counted = jnp.ones(scores.shape[:-1], bool) if mask is None else mask
    return (scores != 0) & counted[..., None], counted


def token_sparsity(scores: Float[Array, "*_ T Ne"], mask: Bool[Array, "*_"] | None = None) -> Float[Array, ""]:
    """TLS: the share of experts that a token does not use, averaged over tokens.

    Args:
        scores: A of one layer [..., T, Ne].
        mask: bool [..., T], the tokens that count; all by default, as in the reference (padding among them).

    Returns:
        float32, from 0 (dense) to 1; NaN where no token counts.

    Raises:
        ValueError: for a ``mask`` of another length.
        TypeError: for scores that are not of a real floating type.

    >>> float(token_sparsity(jnp.array([[0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 2.0]])))
    0.625
    """
    active, counted = _active(scores, mask)
    return 1 - jnp.sum(active, dtype=jnp.float32) / (jnp.sum(counted, dtype=jnp.float32) * scores.shape[-1])


def chunk_sparsity(
    scores: Float[Array, "*_ T Ne"], *, chunk_size: int = 8, mask: Bool[Array, "*_"] | None = None
) -> Float[Array, ""]:
    """CLS: the share of experts that no token of a chunk uses, averaged over chunks.

    Counted tokens of a sequence are put next to each other, then cut into chunks; an incomplete last chunk is dropped.
    With L = 1 it is `token_sparsity`. Twice the length never gives more on the same tokens.

    The reference counts only tokens that have a left neighbour in their document: pass `neighbour_mask`, with a false
    in front, as ``mask`` for its numbers.

    Args:
        scores: A of one layer [..., T, Ne]; leading axes are separate sequences.
        chunk_size: tokens L of a chunk, at most T.
        mask: bool [..., T], the tokens that count; all by default.

    Returns:
        float32; NaN where no sequence has ``chunk_size`` tokens that count.

    Raises:
        ValueError: for a ``chunk_size`` below 1 or above T, a ``mask`` of another length.
        TypeError: for scores that are not of a real floating type, a ``chunk_size`` that is no integer.

    >>> scores = jnp.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    >>> float(chunk_sparsity(scores, chunk_size=2))
    0.5
    """
    active, counted = _active(scores, mask)
    check_count("chunk_size", chunk_size)
    *batch, length, experts = scores.shape
    if chunk_size > length:
        raise ValueError(f"chunk_size is {chunk_size}, expected at most the {length} tokens of scores")
    if mask is not None:
        order = jnp.argsort(~mask, axis=-1, stable=True)
        active = jnp.take_along_axis(active, order[..., None], -2)
    windows = length // chunk_size
    used = active[..., : windows * chunk_size, :].reshape(*batch, windows, chunk_size, experts).any(-2)
    whole = (jnp.arange(windows) + 1) * chunk_size <= jnp.sum(counted, -1, keepdims=True)
    total = jnp.sum(whole, dtype=jnp.float32) * experts
    return 1 - jnp.sum(used & whole[..., None], dtype=jnp.float32) / total


def reuse_ratio(
    scores: Float[Array, "*_ T Ne"],
    mask: Bool[Array, "*_"] | None = None,
    *,
    segment_ids: Int[Array, "*_"] | None = None,
) -> Float[Array, ""]:
    """The share of a token's experts that the next token uses too: mean over t of |S_t ∩ S_{t+1}|/|S_t|.

    Tokens without any expert have no ratio and are left out.

    Args:
        scores: A of one layer [..., T, Ne].
        mask: bool [..., T], the tokens that count; all by default.
        segment_ids: int [..., T], documents; pairs of two documents are left out.

    Returns:
        float32; NaN where there is no pair to look at.

    Raises:
        ValueError: for a ``mask`` or ``segment_ids`` of another length.
        TypeError: for scores that are not of a real floating type.

    >>> float(reuse_ratio(jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])))
    0.5
    """
    active, _ = _active(scores, mask)
    check_tokens("segment_ids", segment_ids, scores.shape[:-1], "scores")
    pairs = neighbour_mask(scores.shape[:-1], segment_ids, mask)
    left, right = active[..., :-1, :], active[..., 1:, :]
    used = jnp.sum(left, -1, dtype=jnp.float32)
    pairs &= used > 0
    ratios = jnp.sum(left & right, -1, dtype=jnp.float32) / jnp.maximum(used, 1)
    return jnp.sum(jnp.where(pairs, ratios, 0)) / jnp.sum(pairs, dtype=jnp.float32)


def dead_experts(scores: Float[Array, "*_ T Ne"], mask: Bool[Array, "*_"] | None = None) -> Float[Array, ""]:
    """The share of experts that no token at all uses. Nothing revives them: look at it while training.

    Args:
        scores: A of one layer [..., T, Ne], over as many tokens as possible.
        mask: bool [..., T], the tokens that count; all by default.

    Returns:
        float32.

    Raises:
        ValueError: for a ``mask`` of another length.
        TypeError: for scores that are not of a real floating type.

    >>> float(dead_experts(jnp.array([[1.0, 0.0], [-1.0, 0.0]])))
    0.5
    """
    active, _ = _active(scores, mask)
    return 1 - jnp.mean(active.reshape(-1, scores.shape[-1]).any(0), dtype=jnp.float32)
