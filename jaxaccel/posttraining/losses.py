"""Losses of alignment: supervised fine-tuning on responses (SFT) and direct preference optimisation (DPO).

They make alignment cheaper than learning from a reward model: DPO needs no reward model, no sampling and no critic,
only four log-probabilities per pair, of which two (the frozen reference's) can be computed once and stored.

    log π(y | x) = Σ_t m_t · (z_{t−1}[y_t] − logsumexp z_{t−1})          over the tokens of the response, m_t = 1
    SFT  L = −Σ log π(y | x) / Σ m                                       a mean over all response tokens of the batch
    DPO  L = −log σ(β·[(log π_c − log π_r) − (log ρ_c − log ρ_r)])       chosen c, rejected r, reference ρ

with logits z. Rafailov et al., *Direct Preference Optimization*, arXiv 2305.18290; used for GEB-1.3B, arXiv 2406.09900,
which states neither β nor the length of its responses.

Everything is summed in float32 at least. There is no one-hot of the logits' size, and nothing of that size but the
logits themselves is kept for the backward pass.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

Mask = Bool[Array, "B T"] | Int[Array, "B T"] | Float[Array, "B T"]


# A plain logsumexp keeps its exponentials, [B, T, V], for the backward pass; from two sums they are made again.
@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("largest", "total"))
def _token_logps(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Return log p(target) at every position."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    largest = jax.lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    largest = checkpoint_name(jnp.where(jnp.isfinite(largest), largest, 0.0), "largest")
    total = checkpoint_name(jnp.sum(jnp.exp(wide - largest), axis=-1), "total")
    # Gathered before it is widened: the gather then reads B·T numbers, whatever the dtype of the logits.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1).astype(wide.dtype)
    return (chosen - largest)[..., 0] - jnp.log(total)


def _check(logits: Array, tokens: Array) -> None:
    if logits.shape[1] < 2:
        raise ValueError(f"tokens have shape {tokens.shape}, expected at least 2 per sequence: one predicts the next")


def _masked_logps(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], mask: Mask
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return mask · log p of the token after each position, and the mask, both 0 at the last position."""
    _check(logits, tokens)
    # Tokens move instead of logits: slicing the logits would cost a copy of them, forwards and backwards.
    targets, weights = (jnp.roll(x, -1, axis=1) for x in (tokens, mask))
    weights = weights.astype(jnp.promote_types(logits.dtype, jnp.float32)).at[:, -1].set(0.0)
    # Not a product: a token outside the mask may have probability zero.
    return jnp.where(weights != 0, weights * _token_logps(logits, targets), 0.0), weights


def sequence_logps(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], mask: Mask) -> Float[Array, " B"]:
    """Return the summed log-probability of each sequence's response tokens.

        log π(y | x) = Σ_t m_t · log softmax(z_{t−1})[y_t],   t = 1, ..., T − 1

    Source: the log-probabilities of DPO, arXiv 2305.18290. Sums grow with the length of the response: DPO is meant with
    sums, while a length-normalised loss divides them by ``mask.sum(1)``.

    Args:
        logits: the model's outputs; ``logits[:, t]`` predict ``tokens[:, t + 1]``.
        tokens: prompt and response in one sequence.
        mask: true (or a weight) at the tokens that count. A mark on the first token has no effect: nothing predicts it.

    Returns:
        Sums in float32, or the logits' dtype where that is wider; 0 where a mask is empty.

    Raises:
        ValueError: for sequences of less than two tokens.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.array([[3, 1, 2]])
    >>> sequence_logps(jnp.zeros((1, 3, 4)), tokens, jnp.array([[False, True, True]])).round(4)  # 2·ln(1/4)
    Array([-2.7726], dtype=float32)
    """
    return jnp.sum(_masked_logps(logits, tokens, mask)[0], axis=1)


def sft_loss(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], loss_mask: Mask) -> Float[Array, ""]:
    """Return the next-token loss over response tokens only.

        L = −Σ m_t · log softmax(z_{t−1})[y_t] / Σ m_t

    Source: the usual loss of supervised fine-tuning, as in GEB-1.3B, arXiv 2406.09900.

    The mean is over all marked tokens of the batch, so long responses weigh more than short ones. Where a batch is
    split into micro-batches, average with the number of marked tokens as weights, or the parts count differently.

    Args:
        logits: the model's outputs; ``logits[:, t]`` predict ``tokens[:, t + 1]``.
        tokens: prompt and response in one sequence, padding at will.
        loss_mask: true (or a weight >= 0) at the response's tokens, false at prompt and padding. A mark on the first
            token has no effect.

    Returns:
        A mean in nats per token. A mask that selects nothing gives 0 with zero gradient, not NaN: a packed batch may
        well hold no response.

    Raises:
        ValueError: for sequences of less than two tokens.

    >>> import jax.numpy as jnp
    >>> tokens = jnp.array([[3, 1, 2]])
    >>> float(sft_loss(jnp.zeros((1, 3, 4)), tokens, jnp.array([[False, True, True]])).round(4))  # ln 4
    1.386...
    >>> float(sft_loss(jnp.zeros((1, 3, 4)), tokens, jnp.zeros((1, 3), bool)))
    0.0
    """
    logps, weights = _masked_logps(logits, tokens, loss_mask)
    total = jnp.sum(weights)
    return jnp.sum(-logps) / jnp.where(total > 0, total, 1.0)


def _check_beta(beta: ArrayLike) -> None:
    if isinstance(beta, (int, float, np.number)) and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number > 0, got beta={beta!r}")


def implicit_reward(
    policy: Float[Array, "*B"], reference: Float[Array, "*B"], *, beta: ArrayLike = 0.1
) -> Float[Array, "*B"]:
    """Return DPO's implicit reward of each response, up to a term of the prompt.

        r = β·(log π(y | x) − log ρ(y | x))

    Source: arXiv 2305.18290. The share of pairs whose chosen response has the larger reward is the usual accuracy.

    Args:
        policy: log-probabilities under the model being trained, from `sequence_logps`.
        reference: the same under the frozen reference; no gradient flows into them.
        beta: strength of the pull to the reference, > 0.

    Returns:
        Rewards.

    Raises:
        ValueError: if ``beta`` is a number that is not positive and finite.

    >>> import jax.numpy as jnp
    >>> implicit_reward(jnp.array([-3.0]), jnp.array([-5.0]), beta=0.5)
    Array([1.], dtype=float32)
    """
    _check_beta(beta)
    return jnp.asarray(beta * (policy - jax.lax.stop_gradient(reference)))


def dpo_loss(
    policy_chosen: Float[Array, "*B"],
    policy_rejected: Float[Array, "*B"],
    ref_chosen: Float[Array, "*B"],
    ref_rejected: Float[Array, "*B"],
    *,
    beta: ArrayLike = 0.1,
) -> Float[Array, "*B"]:
    """Return the loss of direct preference optimisation for each pair.

        L = −log σ(β·[(log π_c − log ρ_c) − (log π_r − log ρ_r)])

    Source: Rafailov et al., arXiv 2305.18290. Where the policy equals the reference the loss is ln 2, and its gradient
    −β/2 with respect to ``policy_chosen`` and β/2 with respect to ``policy_rejected``.

    When: pairs of a better and a worse response, and a model that has had SFT, which is also the reference. When not:
    to teach new behaviour; the loss only widens the gap between the two responses, and both may become less likely.

    Args:
        policy_chosen: summed log-probabilities of the better responses, from `sequence_logps`.
        policy_rejected: those of the worse responses.
        ref_chosen: those of the better responses under the frozen reference; no gradient flows into them.
        ref_rejected: those of the worse responses under the frozen reference.
        beta: strength of the pull to the reference, > 0; the smaller, the further the policy may go.

    Returns:
        One loss per pair; take their mean.

    Raises:
        ValueError: if ``beta`` is a number that is not positive and finite.

    >>> import jax.numpy as jnp
    >>> same = jnp.array([-4.0, -7.0])
    >>> dpo_loss(same, same - 1, same, same - 1).round(4)  # ln 2
    Array([0.6931, 0.6931], dtype=float32)
    """
    chosen = implicit_reward(policy_chosen, ref_chosen, beta=beta)
    return -jax.nn.log_sigmoid(chosen - implicit_reward(policy_rejected, ref_rejected, beta=beta))
