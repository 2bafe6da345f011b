"""SnapKV: keep only the part of a prompt's keys and values that the end of the prompt attends to.

What it makes cheaper: decoding after a long prompt, whose cache shrinks from T to ``capacity`` entries per head and
layer. Prefill itself is as it was, and sees everything. Nothing is trained.

    A = softmax over all T keys of (q_w · k / √H)            the last W queries, causal, at least float32
    vote_j = Σ over these W queries of A[w, j]               for the T − W keys before them
    vote ← pool(vote)                                        kernel s, stride 1: average (zeros beyond the ends) or max
    kept = the capacity − W positions with most votes, and the last W

    window = snapkv_window(query, 32)                                       # rotated queries of the prompt
    selection = snapkv_select(window, key, capacity=1024)                   # rotated keys, [B, T, K, H]
    key, value = compress(key, selection), compress(value, selection)       # [B, 1024, K, H]

With grouped queries the votes of a group are averaged (``aggregate="mean"``), so that the cache keeps its K heads. The
reference code selects for every query head, and stores N (``aggregate="none"``).

When to use it: one question at the end of one long prompt. When not: if the prefix is reused for another question or
the conversation goes on, as the selection depended on the last W tokens; and on keys that are not yet rotated. After
it, positions go on from the true length T, not from the cache's.

Equal votes are settled by `jax.lax.top_k`: the lowest position wins. That is no corner case: max pooling makes plateaus
of equal votes, and the limit of the capacity falls into one nearly always.

Source: Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469; surveyed in Huang et
al., arXiv 2406.10903.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

POOLINGS = ("avg", "max")
AGGREGATES = ("mean", "none")


class SnapKVSelection(NamedTuple):
    """What is kept of each row and head."""

    indices: Int[Array, "B heads capacity"]  # int32, positions in rising order; from kept[b] on they mean nothing
    kept: Int[Array, "B"]  # int32, entries in use: min(length, capacity)


def _check_window(query_window: Array, key: Array, length: Array | None) -> None:
    batch, window, heads, _ = query_window.shape
    tokens, kv_heads = key.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"key must have a number of heads that divides the queries' {heads}, got {kv_heads}")
    if not 1 <= window <= tokens:
        raise ValueError(f"query_window must hold between 1 and T = {tokens} queries, got {window}")
    if key.shape[0] != batch or key.shape[3] != query_window.shape[3]:
        raise ValueError(f"key must agree with query_window {query_window.shape} in B and H, got {key.shape}")
    if length is not None and length.shape != (batch,):
        raise ValueError(f"length must have shape ({batch},), got {length.shape}")


def _check_choices(kernel_size: int, pooling: str) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")


def snapkv_window(
    query: Float[Array, "B T N H"], window: int, *, length: Int[Array, "B"] | None = None
) -> Float[Array, "B W N H"]:
    """Take the last queries of each prompt.

    Args:
        query: rotated queries; prompts are padded on the right.
        window: W, how many to take.
        length: true lengths of the prompts; all T if ``None``.

    Returns:
        Queries at positions length − W to length − 1. Those of prompts shorter than W start with repetitions of the
        first query, which voting does not look at.

    Raises:
        ValueError: if ``window`` is not between 1 and T.

    >>> import jax.numpy as jnp
    >>> query = jnp.arange(6.0).reshape(1, 6, 1, 1)
    >>> snapkv_window(query, 2, length=jnp.array([5])).ravel().tolist()
    [3.0, 4.0]
    """
    if not 1 <= window <= query.shape[1]:
        raise ValueError(f"window must be between 1 and T = {query.shape[1]}, got {window}")
    if length is None:
        return query[:, -window:]
    positions = jnp.maximum(length[:, None] - window + jnp.arange(window), 0)
    return jax.vmap(lambda rows, places: rows[places])(query, positions)


def snapkv_votes(
    query_window: Float[Array, "B W N H"],
    key: Float[Array, "B T K H"],
    *,
    length: Int[Array, "B"] | None = None,
    kernel_size: int = 5,
    pooling: str = "avg",
) -> Float[Array, "B N P"]:
    """How much the end of a prompt attends to the places around each earlier position.

    Args:
        query_window: rotated queries of the last W tokens, of `snapkv_window`. Query head n reads key head n // (N/K).
        key: rotated keys; prompts are padded on the right.
        length: true lengths of the prompts, at least 1; all T if ``None``.
        kernel_size: s, odd; 1 does not pool.
        pooling: ``"avg"``, where edges count zeros, or ``"max"``.

    Returns:
        Pooled votes of the P = T − W positions before the window, at least float32. Positions that lie in a shorter
        prompt's window or after it have −∞.

    Raises:
        ValueError: if shapes do not agree, the window is longer than T, ``kernel_size`` is even or not positive, or
            ``pooling`` is unknown.

    >>> import jax.numpy as jnp
    >>> votes = snapkv_votes(jnp.ones((1, 2, 1, 4)), jnp.zeros((1, 4, 1, 4)), kernel_size=1)
    >>> [round(float(x), 3) for x in votes[0, 0]]  # shares 1/3 and 1/4: each query sees itself and what is before it
    [0.583, 0.583]
    """
    _check_window(query_window, key, length)
    _check_choices(kernel_size, pooling)
    batch, window, heads, size = query_window.shape
    tokens, kv_heads = key.shape[1:3]
    prefix = tokens - window
    dtype = jnp.promote_types(jnp.result_type(query_window, key), jnp.float32)
    grouped = query_window.reshape(batch, window, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("bwkgh,btkh->bkgwt", grouped, key, preferred_element_type=dtype) / size**0.5
    lengths = jnp.full((batch,), tokens) if length is None else length
    own = lengths[:, None] - window + jnp.arange(window)  # the queries' positions
    seen = (jnp.arange(tokens) <= own[..., None])[:, None, None]
    # Finite, so that queries before the start of a short prompt give numbers, which are masked below, and not NaN.
    attention = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(dtype).min), -1)
    votes = attention[..., :prefix].sum(-2).reshape(batch, heads, prefix)

    inside = (jnp.arange(prefix) < (lengths - window)[:, None])[:, None]
    start, combine, none = (0.0, jax.lax.add, 0.0) if pooling == "avg" else (-jnp.inf, jax.lax.max, -jnp.inf)
    # What is outside counts as padding does at the end of a prompt that has no padding.
    half = kernel_size // 2
    pooled = jax.lax.reduce_window(
        jnp.where(inside, votes, none),
        jnp.asarray(start, dtype),
        combine,
        (1, 1, kernel_size),
        (1, 1, 1),
        ((0, 0), (0, 0), (half, half)),
    )
    return jnp.where(inside, pooled / kernel_size if pooling == "avg" else pooled, -jnp.inf)


def snapkv_select(
    query_window: Float[Array, "B W N H"],
    key: Float[Array, "B T K H"],
    *,
    capacity: int,
    window: int = 32,
    kernel_size: int = 5,
    pooling: str = "avg",
    aggregate: str = "mean",
    length: Int[Array, "B"] | None = None,
) -> SnapKVSelection:
    """Choose which positions of a prompt to keep, for each head that the cache stores.

    Args:
        query_window: rotated queries of the last ``window`` tokens of each prompt, of `snapkv_window`.
        key: rotated keys; prompts are padded on the right.
        capacity: entries to keep, the window's among them; must be greater than ``window``.
        window: W, the number of last tokens that vote, and that are always kept.
        kernel_size: of the pooling, odd. The authors use 5, and 7 with ``"max"`` on LongBench.
        pooling: ``"avg"`` or ``"max"``.
        aggregate: ``"mean"``: pooled votes are averaged over the query heads of a group, one selection for each of the
            K key heads; ``"none"``: one for each of the N query heads, and a cache N/K times as large.
        length: true lengths of the prompts, at least 1; all T if ``None``.

    Returns:
        The selection. Prompts that fit into the capacity are kept whole, with indices 0, 1, 2, ... Shapes depend on
        arguments' shapes only, so this runs under ``jax.jit``.

    Raises:
        ValueError: if shapes do not agree, the window is not the one that was given, longer than T or not below
            ``capacity``, ``kernel_size`` is even or not positive, or a choice is unknown.

    >>> import jax, jax.numpy as jnp
    >>> key = jax.random.normal(jax.random.key(0), (1, 10, 2, 4))
    >>> query = 20.0 * jnp.repeat(key[:, 3:4], 2, axis=1)  # the last two tokens ask for what is at position 3
    >>> selection = snapkv_select(query, key, capacity=3, window=2, kernel_size=1)
    >>> selection.indices.tolist(), selection.kept.tolist()
    ([[[3, 8, 9], [3, 8, 9]]], [3])
    """
    _check_window(query_window, key, length)
    _check_choices(kernel_size, pooling)
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(map(repr, AGGREGATES))}, got {aggregate!r}")
    if query_window.shape[1] != window:
        raise ValueError(f"query_window must hold window = {window} queries, got {query_window.shape[1]}")
    if capacity <= window:
        raise ValueError(f"capacity must be greater than window = {window}, got {capacity}")
    batch, tokens, kv_heads, _ = key.shape
    heads = kv_heads if aggregate == "mean" else query_window.shape[2]
    lengths = jnp.full((batch,), tokens, jnp.int32) if length is None else length.astype(jnp.int32)
    kept = jnp.minimum(lengths, capacity)
    everything = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, heads, capacity))
    if tokens <= capacity:
        return SnapKVSelection(everything, kept)

    votes = snapkv_votes(query_window, key, length=length, kernel_size=kernel_size, pooling=pooling)
    if aggregate == "mean":
        votes = votes.reshape(batch, kv_heads, -1, votes.shape[-1]).mean(2)
    chosen = jnp.sort(jax.lax.top_k(votes, capacity - window)[1].astype(jnp.int32), -1)
    last = lengths[:, None, None] - window + jnp.arange(window, dtype=jnp.int32)
    indices = jnp.concatenate([chosen, jnp.broadcast_to(last, (batch, heads, window))], -1)
    return SnapKVSelection(jnp.where((lengths <= capacity)[:, None, None], everything, indices), kept)


def compress(array: Shaped[Array, "B ..."], selection: SnapKVSelection, *, axis: int = 1) -> Shaped[Array, "B ..."]:
    """Keep what was selected of keys or values.

    Args:
        array: [B, S, K, H], or [B, K, S, H] with ``axis=2``; S may exceed the selection's T.
        selection: of `snapkv_select`, for K heads or for a multiple N of them.
        axis: where S is, 1 or 2.

    Returns:
        The same with ``capacity`` in place of S and, for a selection per query head, N heads in place of K. Those from
        ``selection.kept[b]`` on are copies of some token: mask them, or write the next tokens over them.

    Raises:
        ValueError: if ``array`` is not of rank 4, ``axis`` is neither 1 nor 2, or B or the heads do not agree.

    >>> import jax.numpy as jnp
    >>> selection = SnapKVSelection(jnp.array([[[0, 3]]]), jnp.array([2]))
    >>> compress(jnp.arange(8.0).reshape(1, 4, 1, 2), selection).tolist()
    [[[[0.0, 1.0]], [[6.0, 7.0]]]]
    """
    if array.ndim != 4:
        raise ValueError(f"array must have 4 axes, [B, S, K, H] or [B, K, S, H], got shape {array.shape}")
    if axis not in (1, 2):
        raise ValueError(f"axis must be 1 or 2, got {axis}")
    batch, heads, capacity = selection.indices.shape
    kv_heads = array.shape[3 - axis]
    if array.shape[0] != batch or heads % kv_heads:
        raise ValueError(f"array must agree with selection.indices {(batch, heads, capacity)}, got {array.shape}")
    groups = selection.indices.reshape(batch, kv_heads, -1, capacity)

    def gather(rows: Shaped[Array, "S H"], indices: Int[Array, "G capacity"]) -> Shaped[Array, "G capacity H"]:
        return jnp.take(rows, indices, axis=0, mode="clip")  # beyond ``kept`` indices may exceed S

    over_heads = jax.vmap(gather, in_axes=(2 - axis, 0))  # rows are never repeated for a group's heads
    out = jax.vmap(over_heads)(array, groups).reshape(batch, heads, capacity, array.shape[3])
    return out if axis == 2 else out.swapaxes(1, 2)
