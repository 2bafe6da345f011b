"""The two losses that make neighbouring tokens use the same few experts, and which neighbours count.

    locality         L_al = mean over pairs (t, t+1) and experts of BCE(σ(α·A0[t]), σ(α·A0[t+1]))
    chunk sparsity   L_cs = 1 − mean over chunks and experts of Π_{k in chunk} (1 − p[k]),   p = H/Σ_e H

L_cs is the share of experts that a chunk would use if each token drew one expert from p. Both are per layer: average
over layers. The paper adds 2e-3·L_al (1e-3 for its 0.8B model) and a factor of 5e-2 on L_cs that `adaptive_factor`
moves.

The locality loss takes the raw logits, and gradient flows through both sides, target included. It is not zero where
neighbours are equal: the entropy that is left pushes logits away from 0. The chunk loss sees only p, so that by itself
it makes no logit negative (a token with one expert has p = 1 whatever the logit): zeros come from the ReLU.

Everything is worked in float32 at least, whatever the dtype of the arrays: 1 − p + 1e-5 has no meaning in bfloat16.

Song et al., BlockFFN, 2025, arXiv 2507.08771; where its code and its formulas differ (epsilons), the code is followed.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.moe._checks import check_count, check_routing, check_tokens

__all__ = ["activation_locality_loss", "chunk_sparsification_loss", "neighbour_mask"]


def neighbour_mask(
    tokens: tuple[int, ...], segment_ids: Int[Array, "*_"] | None = None, mask: Bool[Array, "*_"] | None = None
) -> Bool[Array, "*_"]:
    """Which pairs (t, t+1) are neighbours: both of one document, and both counted.

    Args:
        tokens: shape [..., T] of the tokens, T >= 1.
        segment_ids: int [..., T]; neighbours with different ids belong to different documents.
        mask: bool [..., T]; false for padding.

    Returns:
        bool [..., T − 1].

    >>> neighbour_mask((4,), jnp.array([0, 0, 1, 1])).tolist()
    [True, False, True]
    """
    pairs = jnp.ones((*tokens[:-1], tokens[-1] - 1), bool)
    if segment_ids is not None:
        pairs &= segment_ids[..., 1:] == segment_ids[..., :-1]
    if mask is not None:
        pairs &= mask[..., 1:] & mask[..., :-1]
    return pairs


def activation_locality_loss(
    logits: Float[Array, "*_ T Ne"],
    *,
    sharpness: float = 100.0,
    segment_ids: Int[Array, "*_"] | None = None,
    mask: Bool[Array, "*_"] | None = None,
) -> Float[Array, ""]:
    """How far each token's experts are from its neighbour's: binary cross-entropy of sharpened sigmoids.

        L = mean_{pairs,e} softplus(l) − σ(m)·l,   l = α·A0[t],   m = α·A0[t+1]

    Tokens that are not counted may hold anything, NaN included. NaN in a token that counts gives NaN.

    Args:
        logits: A0 of one layer, [..., T, Ne] with T >= 2; leading axes are separate sequences.
        sharpness: α > 0; 100 makes σ a step for logits of 0.05.
        segment_ids: documents of packed sequences, int [..., T]: no pair crosses from one to another.
        mask: bool [..., T], false for padding.

    Returns:
        A mean over all pairs, in float32 (float64 for float64); 0 with zero gradient where no pair counts.

    Raises:
        ValueError: for fewer than 2 tokens, ``segment_ids`` or ``mask`` of another length, a sharpness that is not
            positive and finite.
        TypeError: for logits that are not of a real floating type.

    >>> same = jnp.full((3, 2), 0.01)  # entropy of σ(1)
    >>> round(float(activation_locality_loss(same)), 3)
    0.582
    """
    check_routing("logits", logits)
    *_, length, _ = logits.shape
    if length < 2:
        raise ValueError(f"logits has shape {logits.shape}, expected at least 2 tokens: neighbours are compared")
    check_tokens("segment_ids", segment_ids, logits.shape[:-1], "logits")
    check_tokens("mask", mask, logits.shape[:-1], "logits")
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness is {sharpness}, expected a positive finite number")
    pairs = neighbour_mask(logits.shape[:-1], segment_ids, mask)[..., None]
    wide = sharpness * logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Set to 0 before and not only after: a product of 0 and NaN would reach gradients.
    left, right = (jnp.where(pairs, part, 0) for part in (wide[..., :-1, :], wide[..., 1:, :]))
    each = jax.nn.softplus(left) - jax.nn.sigmoid(right) * left
    count = jnp.sum(pairs) * logits.shape[-1]
    return jnp.sum(jnp.where(pairs, each, 0)) / jnp.maximum(count, 1).astype(wide.dtype)


def chunk_sparsification_loss(
    hidden: Float[Array, "*_ T Ne"],
    *,
    chunk_size: int = 64,
    mask: Bool[Array, "*_"] | None = None,
    eps: float = 1e-5,
    pad: bool = False,
) -> Float[Array, ""]:
    """Share of the experts that chunks of tokens use, softly.

        L = 1 − mean_{chunks,e} exp(Σ_{k in chunk} log(1 − p[k,e] + eps)),   p = H/(Σ_e H + eps)

    Values lie between 1/Ne, where all tokens of a chunk use one and the same expert, and 1 − (1 − 1/Ne)^L for even use.
    A chunk that uses nothing gives −L·eps.

    Chunks are cut by position. Where several documents share a sequence, begin each at a multiple of ``chunk_size``, or
    a chunk holds the end of one and the start of another.

    Args:
        hidden: H of one layer (before γ), [..., T, Ne]; leading axes are separate sequences.
        chunk_size: tokens L of a chunk. The paper's scripts have 64.
        mask: bool [..., T]; false tokens use nothing, p = 0, while their chunks stay in the mean.
        eps: 1e-5 in the reference, twice.
        pad: fill the last chunk with tokens that use nothing, where ``chunk_size`` does not divide T.

    Returns:
        The loss in float32 (float64 for float64).

    Raises:
        ValueError: for a ``chunk_size`` below 1 or one that does not divide T without ``pad``, a ``mask`` of another
            length, an ``eps`` that is not positive.
        TypeError: for ``hidden`` that is not of a real floating type, a ``chunk_size`` that is no integer.

    >>> one = jnp.zeros((8, 4)).at[:, 1].set(2.0)  # every token uses expert 1 of 4
    >>> round(float(chunk_sparsification_loss(one, chunk_size=8)), 3)
    0.25
    """
    check_routing("hidden", hidden)
    check_count("chunk_size", chunk_size)
    check_tokens("mask", mask, hidden.shape[:-1], "hidden")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}, expected a positive finite number")
    *batch, length, experts = hidden.shape
    if length % chunk_size and not pad:
        raise ValueError(
            f"chunk_size is {chunk_size}, which does not divide the {length} tokens of hidden; pass pad=True to fill up"
        )
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    if mask is not None:
        wide = jnp.where(mask[..., None], wide, 0)
    shares = wide / (jnp.sum(wide, -1, keepdims=True) + eps)
    missing = -length % chunk_size
    shares = jnp.pad(shares, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
    chunks = shares.reshape(*batch, (length + missing) // chunk_size, chunk_size, experts)
    return 1 - jnp.mean(jnp.exp(jnp.sum(jnp.log(1 - chunks + eps), -2)))
