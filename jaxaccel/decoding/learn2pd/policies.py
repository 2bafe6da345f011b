"""Which predictions of a step are revealed: by a threshold, by the learned filter, by rank, or by an oracle.

All but the oracle also reveal the ``num_min`` most confident masked positions, so that every step makes progress.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxaccel.decoding.learn2pd.filter import FilterParams, filter_apply


class TopK(NamedTuple):
    """The fixed schedule alone: with steps = gen_length LLaDA's own decoding, a token per pass."""


class Threshold(NamedTuple):
    """Reveal what is more confident than ``value``: Fast-dLLM's parallel decoding (arXiv 2505.22618)."""

    value: Any  # a number in (0, 1)


class Filter(NamedTuple):
    """Reveal what the learned filter holds for final with a probability above ``tau``."""

    params: FilterParams
    tau: Any = 0.96  # a number in (0, 1)


class Oracle(NamedTuple):
    """Reveal what equals a known answer, and nothing else: how few passes the model could do with.

    Where a step predicts the same as the one before, the rest of the block is copied from the answer.
    """

    reference: Any  # int32 [B, G]


Policy = TopK | Threshold | Filter | Oracle


def check_policy(policy: Any, *, block_length: int, batch: int | None = None, gen_length: int | None = None) -> None:
    """Raise unless a policy can serve.

    Raises:
        ValueError: for a threshold outside (0, 1), a filter for another block length, a reference of another shape.
        TypeError: for anything that is no policy.
    """
    if isinstance(policy, Threshold):
        _check_fraction("threshold", policy.value)
    elif isinstance(policy, Filter):
        _check_fraction("tau", policy.tau)
        trained = policy.params.b1.shape[-1]
        if trained != block_length:
            raise ValueError(f"block_length is {block_length}, but the filter was trained for {trained}")
    elif isinstance(policy, Oracle):
        if batch is not None and policy.reference.shape != (batch, gen_length):
            raise ValueError(f"reference has shape {policy.reference.shape}, expected {(batch, gen_length)}")
    elif not isinstance(policy, TopK):
        raise TypeError(f"policy is a {type(policy).__name__}, expected TopK, Threshold, Filter or Oracle")


def _check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 < float(np.asarray(value)) < 1:
        raise ValueError(f"{name} is {value}, expected a number in (0, 1)")


def num_transfer_tokens(num_masked: Int[Array, "B"], *, steps: int) -> Int[Array, "B steps"]:
    """How many tokens each step of a block reveals: as equal as can be, the first steps one more.

    Args:
        num_masked: masks in the block.
        steps: of the block.

    Returns:
        int32; a row sums to its number of masks.

    Raises:
        ValueError: for fewer than 1 step.

    >>> num_transfer_tokens(jnp.array([10, 8]), steps=4).tolist()
    [[3, 3, 2, 2], [2, 2, 2, 2]]
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    base, rest = jnp.divmod(num_masked[:, None], steps)
    return (base + (jnp.arange(steps) < rest)).astype(jnp.int32)


def most_confident(
    confidence: Float[Array, "B b"], candidates: Bool[Array, "B b"], count: Int[Array, "B"]
) -> Bool[Array, "B b"]:
    """The ``count`` most confident candidates of each row; all, where there are fewer. Of equal ones the first."""
    size = confidence.shape[-1]
    score = jnp.where(candidates, confidence, -jnp.inf)
    mine, other = score[:, :, None], score[:, None, :]
    before = jnp.arange(size) < jnp.arange(size)[:, None]
    rank = jnp.sum((other > mine) | ((other == mine) & before), -1)
    return candidates & (rank < count[:, None])


def chosen_by(
    policy: Policy,
    confidence: Float[Array, "B b"],
    masked: Bool[Array, "B b"],
    *,
    tokens: Any = None,
    reference: Any = None,
) -> Bool[Array, "B b"]:
    """What the policy itself accepts, without the positions that a step reveals in any case."""
    if isinstance(policy, Threshold):
        return masked & (confidence > policy.value)
    if isinstance(policy, Filter):
        return masked & (jax.nn.sigmoid(filter_apply(policy.params, confidence)) > policy.tau)
    if isinstance(policy, Oracle):
        return masked & (tokens == reference)
    return jnp.zeros_like(masked)


def accept_mask(
    policy: Policy,
    confidence: Float[Array, "B b"],
    masked: Bool[Array, "B b"],
    *,
    num_min: int | Int[Array, "B"],
    tokens: Int[Array, "B b"] | None = None,
) -> Bool[Array, "B b"]:
    """Which masked positions of a block are revealed in a step.

    Args:
        policy: the rule. An `Oracle` here has the reference [B, b] of the block.
        confidence: of all positions of the block. Shorter than the filter's block where an end of text cut it.
        masked: which of them are masked.
        num_min: so many of the most confident masked ones are revealed in any case, fewer only if fewer are masked.
        tokens: predictions, which an oracle compares.

    Returns:
        A subset of ``masked``.

    Raises:
        ValueError: for an invalid policy, a filter for shorter blocks, an oracle without tokens.

    >>> confidence, masked = jnp.array([[0.9, 0.99, 0.5, 0.3]]), jnp.array([[True, False, True, True]])
    >>> accept_mask(Threshold(0.8), confidence, masked, num_min=1).tolist()
    [[True, False, False, False]]
    >>> accept_mask(TopK(), confidence, masked, num_min=9).tolist()  # never what is not masked
    [[True, False, True, True]]
    """
    reference = None
    if isinstance(policy, Filter):
        _check_fraction("tau", policy.tau)  # a short block is no other block length: filter_apply checks that it fits
    else:
        check_policy(policy, block_length=confidence.shape[-1])
    if isinstance(policy, Oracle):
        if tokens is None:
            raise ValueError("tokens is None: an oracle compares them with its reference")
        reference = policy.reference
    count = jnp.broadcast_to(jnp.asarray(num_min), masked.shape[:1])
    own = chosen_by(policy, confidence, masked, tokens=tokens, reference=reference)
    return own | most_confident(confidence, masked, count)
