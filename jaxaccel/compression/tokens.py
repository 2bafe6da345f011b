"""Visual tokens left out of a language model's sequence, chosen once by the attention of the task's words.

    r_i = Σ_j mean_h A_h[j, i],   s = (r − min)/(max − min)
    kept = K_key highest s  ∪  next ⌊α (K − K_key)⌋ by s  ∪  the rest by 1 − max_{k in key} cos(v_j, v_k)

A is attention from the words (queries j) to the images' tokens (keys i). The paper words it the other way round, which
is zero in a causal model whose image comes first. Diversity is distance to the key tokens only, in one go, as the
paper's equation has it; ``diversity="greedy"`` counts chosen tokens, too, as its prose does.

When to use it: many visual tokens, few of them on the task; choose after the second layer or later, as earlier
attention says little. When not: tasks that read all of an image.

Yang et al., EfficientVLA, arXiv 2506.10100, equations 2 to 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def token_relevance(attention: Any, *, query_mask: Any = None, normalize: bool = True) -> Float[Array, "..."]:
    """How much the words attend to each visual token.

    Args:
        attention: softmax weights [B, H, Q, N] of the words' rows and the visual columns; rows need not sum to 1.
        query_mask: bool [B, Q], words that count; all by default.
        normalize: scale to [0, 1]; zeros where all are equal, or where no word counts.

    Returns:
        Relevance [B, N], float32 at least.

    Raises:
        ValueError: for other shapes, or a concrete ``query_mask`` that leaves a sample without words (zeros under
            `jax.jit`).

    >>> token_relevance(jnp.array([[[[0.1, 0.5, 0.3]]]])).round(2).tolist()
    [[0.0, 1.0, 0.5]]
    """
    attention = jnp.asarray(attention)
    if attention.ndim != 4 or 0 in attention.shape:
        raise ValueError(f"attention has shape {attention.shape}, expected [B, H, Q, N], none of them 0")
    wide = attention.astype(jnp.promote_types(attention.dtype, jnp.float32))
    rows = jnp.mean(wide, 1)
    if query_mask is None:
        relevance = jnp.sum(rows, 1)
    else:
        mask = jnp.asarray(query_mask, bool)
        if mask.shape != (rows.shape[0], rows.shape[1]):
            raise ValueError(f"query_mask has shape {mask.shape}, expected {rows.shape[:2]} as attention")
        if not isinstance(mask, jax.core.Tracer) and not bool(jnp.all(jnp.any(mask, -1))):
            raise ValueError("query_mask leaves a sample without queries, so that its relevance is not known")
        # Rows that are masked may hold NaN, which 0 · NaN would keep.
        relevance = jnp.sum(jnp.where(mask[:, :, None], rows, 0), 1)
    if not normalize:
        return relevance
    low, high = jnp.min(relevance, -1, keepdims=True), jnp.max(relevance, -1, keepdims=True)
    span = high - low
    return jnp.where(span == 0, 0, (relevance - low) / jnp.where(span == 0, 1, span))


def _unit(x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _top(scores: Array, count: int, taken: Array) -> Array:
    """``taken`` and the ``count`` highest of the others; `jax.lax.top_k` puts the lower of equal indices first."""
    if not count:
        return taken
    # Two keys, not one score with −inf for those that are taken: a score may be −inf itself.
    order = jnp.lexsort((jnp.arange(scores.shape[0]), -scores, taken))
    return taken.at[order[:count]].set(True)


def select_visual_tokens(
    relevance: Float[Array, "..."],
    features: Float[Array, "..."],
    *,
    num_keep: Any,
    num_key: Any = 4,
    task_ratio: Any = 0.5,
    diversity: Any = "key",
) -> Int[Array, "..."]:
    """Choose exactly K tokens: key tokens, further relevant ones, and ones unlike the key tokens.

    Args:
        relevance: [B, N], from `token_relevance`. NaN raises on the host; under `jax.jit` it counts as 0.
        features: [B, N, D], hidden states of the visual tokens at the same layer.
        num_keep: K, 1 … N.
        num_key: K_key, 0 … K; at least 1 if any token is chosen for diversity.
        task_ratio: α in [0, 1], share of the rest that goes by relevance, rounded down.
        diversity: ``"key"``, distance to the key tokens; or ``"greedy"``, one after the other, to all chosen so far.

    Returns:
        Indices int32 [B, K], ascending and distinct; of equal scores the lower index is taken.

    Raises:
        ValueError: for numbers out of range, shapes that do not fit, NaN.

    >>> features = jnp.array([[[1.0, 0], [1, 0], [0, 1], [1, 0]]])
    >>> relevance = jnp.array([[0.2, 1.0, 0.0, 0.3]])
    >>> select_visual_tokens(relevance, features, num_keep=2, num_key=1, task_ratio=0).tolist()
    [[1, 2]]
    """
    if relevance.ndim != 2 or features.ndim != 3 or features.shape[:2] != relevance.shape:
        raise ValueError(f"features has shape {features.shape}, expected {relevance.shape} and D as relevance")
    total = relevance.shape[1]
    for name, value, low, high in (("num_keep", num_keep, 1, total), ("num_key", num_key, 0, num_keep)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low} to {high}")
    if not 0 <= task_ratio <= 1:
        raise ValueError(f"task_ratio is {task_ratio}, expected a number in [0, 1]")
    if diversity not in ("key", "greedy"):
        raise ValueError(f"diversity is {diversity!r}, expected 'key' or 'greedy'")
    rest = num_keep - num_key
    task = int(np.floor(task_ratio * rest + 1e-9))
    if not num_key and task < rest:
        raise ValueError(f"num_key is 0, expected at least 1: {rest - task} tokens go by distance to them")
    if not isinstance(relevance, jax.core.Tracer) and bool(jnp.isnan(relevance).any()):
        raise ValueError("relevance has NaN: are all queries masked?")
    relevance = jnp.where(jnp.isnan(relevance), 0, relevance)

    def one(scores: Array, vectors: Array) -> Array:
        key = _top(scores, num_key, jnp.zeros(total, bool))
        taken = _top(scores, task, key)
        unit = _unit(vectors)
        near = unit @ unit.T
        if diversity == "key":
            apart = 1 - jnp.max(jnp.where(key[None, :], near, -jnp.inf), -1)
            taken = _top(apart, rest - task, taken)
        else:

            def add(_: Any, taken: Array) -> Array:
                return _top(1 - jnp.max(jnp.where(taken[None, :], near, -jnp.inf), -1), 1, taken)

            taken = jax.lax.fori_loop(0, rest - task, add, taken)
        return jnp.nonzero(taken, size=num_keep)[0].astype(jnp.int32)

    return jax.vmap(one)(relevance, features)


def prune_tokens(
    x: Float[Array, "..."], indices: Int[Array, "..."], *, num_visual: Any, visual_start: Any = 0
) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """Leave out all visual tokens but the chosen ones. The others stay, before and after.

    Args:
        x: residual stream [B, S, D].
        indices: [B, K], from `select_visual_tokens`: counted from the first visual token.
        num_visual: N.
        visual_start: place of the first.

    Returns:
        The stream [B, S − N + K, D]; and each token's old place [B, S − N + K] int32, which is its position for the
        layers that follow (rotations stay as they were).

    Raises:
        ValueError: for shapes that do not fit, or more indices than tokens.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> prune_tokens(x, jnp.array([[0, 2]]), num_visual=3, visual_start=1)[1].tolist()
    [[0, 1, 3, 4]]
    """
    if x.ndim != 3 or indices.ndim != 2 or indices.shape[0] != x.shape[0]:
        raise ValueError(f"indices has shape {indices.shape}, expected [B, K] with the rows of x {x.shape}")
    if num_visual < 1 or visual_start < 0 or visual_start + num_visual > x.shape[1]:
        raise ValueError(
            f"num_visual is {num_visual} and visual_start {visual_start}, expected a part of {x.shape[1]} tokens"
        )
    if indices.shape[1] > num_visual:
        raise ValueError(f"indices has {indices.shape[1]} tokens, expected at most num_visual = {num_visual}")
    batch, count = x.shape[:2]
    before = jnp.broadcast_to(jnp.arange(visual_start), (batch, visual_start))
    end = visual_start + num_visual
    after = jnp.broadcast_to(jnp.arange(end, count), (batch, count - end))
    positions = jnp.concatenate([before, indices + visual_start, after], 1).astype(jnp.int32)
    return jnp.take_along_axis(x, positions[:, :, None], 1), positions
