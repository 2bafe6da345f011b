"""Block top-k attention: a decoding step that reads the most relevant blocks of the KV cache instead of all of it.

For each KV head, with the queries q₁..qᵣ of its group and the scaled logits sᵢⱼ = scale·qᵢ·kⱼ over the cache's
``length`` tokens (the current one included):

    score_b = meanᵢ meanⱼ∈b sᵢⱼ = scale·(meanᵢ qᵢ)·(meanⱼ∈b kⱼ)          one product per block, from cached sums of keys
    kept    = sink ∪ tail ∪ the num_blocks blocks with the largest score
    oᵢ      = Σⱼ∈kept exp(sᵢⱼ) vⱼ / Σⱼ∈kept exp(sᵢⱼ)                      softmax over the kept logits only

The group's heads keep the same blocks. The sink is the first tokens, the tail the latest ``num_local`` and the block
that they cut (at most num_local + block_size − 1 tokens). A sequence whose blocks all fit is attended densely.

Traffic per step and KV head, in rows: S/block_size means and 2·(num_blocks·block_size + sink + tail) keys and values,
against 2·S for dense attention: at S = 32768 and 64 blocks of 16 about 4.2 thousand against 65.5 thousand. (Means are
kept in float32: beside a cache of 16 bits a row of them counts twice.)

Where blocks start: by default at multiples of ``block_size``, so that a block is a page of the cache; the sink then is
rounded up to whole blocks. ``block_offset=num_sink`` gives the layout of the paper's code, blocks that start right
after the sink.

Over several devices: shard batch and heads, which do not need each other. Under automatic sharding XLA gathers the
scores of all blocks (never keys or values) before it takes the largest; `jax.shard_map` sends nothing, and is what the
Pallas kernels need.

When to use it: decoding from long caches (from about 4 thousand tokens), where reading the cache is what costs. When
not: prefill and training (dense is better there: `jax.nn.dot_product_attention`, or `prefill` here, which also fills
the cache), short contexts, and the first layer of a network, which the authors keep dense.

"Kinetics: Rethinking Test-Time Scaling Laws", Sadhukhan et al., 2025, arXiv 2506.05333 (block top-k is the variant it
proposes; the semantics here are those of its accuracy experiments, the page layout that of its benchmark).
"""

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Float, Int

from kernels_pallas.block_topk_attention import gpu, tpu, xla
from kernels_pallas.block_topk_attention.cache import (
    BlockTopKCache,
    append,
    extend,
    init_cache,
    plan_of,
    prefill,
    update_centroids,
)
from kernels_pallas.block_topk_attention.plan import Layout, Plan, check_layout
from kernels_pallas.block_topk_attention.reference import block_topk_mask, local_mask, masked_attention, topk_mask
from kernels_pallas.block_topk_attention.select import block_means, choose
from kernels_pallas.dispatch import raise_refusal, resolve_implementation

__all__ = [
    "BlockTopKCache",
    "append",
    "block_topk_attention",
    "block_topk_decode",
    "block_topk_mask",
    "block_topk_partial",
    "extend",
    "init_cache",
    "local_mask",
    "masked_attention",
    "prefill",
    "select_blocks",
    "topk_mask",
    "update_centroids",
]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""


def _check_query(query: Array, key: Array, layout: Layout) -> None:
    check_layout(layout)
    if query.ndim != 4 or query.shape[1] != 1:
        raise ValueError(f"query has shape {query.shape}, expected [B, 1, N, H]: one token per sequence")
    if key.ndim != 4 or key.shape[0] != query.shape[0]:
        raise ValueError(f"key has shape {key.shape}, expected {layout} with B = {query.shape[0]} as query has it")
    if layout == "BKSHV" and key.shape[-1] <= query.shape[-1]:
        raise ValueError(
            f"key has last axis {key.shape[-1]}, expected more than the head size {query.shape[-1]} of query"
        )
    if layout != "BKSHV" and key.shape[-1] != query.shape[-1]:
        raise ValueError(f"query has head size {query.shape[-1]}, but key has {key.shape[-1]}: expected equal ones")
    heads = key.shape[layout.index("K")]
    if query.shape[2] % heads:
        raise ValueError(f"query has {query.shape[2]} heads, which the {heads} heads of key do not divide")
    for name, array in (("query", query), ("key", key)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")


def _check_value(key: Array, value: Array | None, layout: Layout) -> None:
    if (value is None) != (layout == "BKSHV"):
        raise ValueError(f"value is {'None' if value is None else 'given'} with layout {layout}: BKSHV holds it in key")
    if value is None:
        return
    if value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value has shape {value.shape}, expected {key.shape[:3]} before its last axis, as key has")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"value has dtype {value.dtype}, expected a real floating type")


def _check_centroids(centroids: Array, heads: int, query: Array, plan: Plan) -> None:
    expected = (query.shape[0], heads, plan.total, query.shape[-1])
    if centroids.shape != expected:
        raise ValueError(
            f"centroids has shape {centroids.shape}, expected {expected}: the means of {plan.total} blocks of each head"
        )


def _lengths(length: ArrayLike | None, batch: int, size: int) -> Int[Array, "B"]:
    """Lengths as int32 [B], checked where they are known."""
    if length is None:
        length = size
    if isinstance(length, numbers.Integral | np.ndarray | list | tuple) or (
        isinstance(length, jax.Array) and not isinstance(length, jax.core.Tracer)
    ):
        known = np.asarray(length)
        if known.size and (known.min() < 0 or known.max() > size):
            raise ValueError(f"length is {known.tolist()}, expected 0 up to the {size} positions of the cache")
    array = jnp.asarray(length)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"length has dtype {array.dtype}, expected integers")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"length has shape {array.shape}, expected () or ({batch},)")
    # A traced length cannot be checked; it must at least not reach outside of the cache.
    return jnp.broadcast_to(jnp.clip(array, 0, size), (batch,)).astype(jnp.int32)


def select_blocks(
    query: Float[Array, "B _ N _"],
    centroids: Float[Array, "B _ _ _"],
    *,
    size: int,
    length: ArrayLike | None = None,
    block_size: int = 16,
    num_blocks: int = 64,
    num_sink: int = 4,
    num_local: int = 0,
    block_offset: int | None = None,
) -> Int[Array, "B K num_blocks"]:
    """The blocks that a step reads besides sink and tail, the best first.

    Args:
        query: the current token's queries [B, 1, N, H].
        centroids: mean key of every block [B, K, M, H], M = ⌊(S − phase)/block_size⌋; block i holds the positions from
            phase + i·block_size on, phase = block_offset mod block_size. Blocks that are not full are passed over.
        size: positions S of the cache.
        length: tokens in the cache, a number or [B], the current one included; S by default.
        block_size: positions of a block; divides S.
        num_blocks: blocks to choose.
        num_sink: first tokens that are always read.
        num_local: latest tokens that are always read.
        block_offset: where blocks to choose from start; ``num_sink`` rounded up to whole blocks by default.

    Returns:
        Block numbers, −1 where there are fewer candidates. The heads of a group share them.

    Raises:
        ValueError: for shapes or numbers that do not fit.

    >>> centroids = jnp.array([0.0, 1.0, 3.0, 2.0]).reshape(1, 1, 4, 1)
    >>> select_blocks(jnp.ones((1, 1, 1, 1)), centroids, size=16, block_size=4, num_blocks=2).tolist()
    [[[2, 3]]]
    """
    _check_query(query, centroids, "BKSH")
    plan = Plan.make(size, block_size, num_blocks, num_sink, num_local, block_offset)
    _check_centroids(centroids, centroids.shape[1], query, plan)
    return choose(query, centroids, _lengths(length, query.shape[0], size), plan, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _kernel(
    name: str,
    plan: Plan,
    layout: Layout,
    interpret: Any,
    query: Array,
    key: Array,
    value: Array | None,
    blocks: Array,
    length: Array,
    scale: Array,
) -> Array:
    module = tpu if name == "pallas_tpu" else gpu
    return module.attend(query, key, value, blocks, length, plan, scale, layout, interpret=interpret)


def _kernel_forward(
    name: str, plan: Plan, layout: Layout, interpret: Any, *arrays: Any
) -> tuple[Array, tuple[Any, ...]]:
    return _kernel(name, plan, layout, interpret, *arrays), arrays


def _kernel_backward(
    name: str, plan: Plan, layout: Layout, interpret: Any, arrays: tuple[Any, ...], grad: Array
) -> tuple[Array | None, ...]:
    """Decoding is rarely differentiated: the gradient is that of the XLA formulation at the same blocks."""
    query, key, value, blocks, length, scale = arrays

    def attend(q: Array, k: Array, v: Array | None, s: Array) -> Array:
        return xla.attend(q, k, v, blocks, length, plan, s, layout)[0]

    _, pull = jax.vjp(attend, query, key, value, scale)
    dq, dk, dv, dscale = pull(grad)
    return dq, dk, dv, None, None, dscale


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _attend(
    query: Array,
    key: Array,
    value: Array | None,
    centroids: Array | None,
    centroid_scale: float,
    length: Array,
    plan: Plan,
    scale: ArrayLike | None,
    layout: Layout,
    implementation: str | None,
    interpret: Any = False,
) -> Array:
    refusals = {
        "pallas_tpu": tpu.refusal(query, key, value, plan, layout),
        "pallas_gpu": gpu.refusal(query, key, value, plan, layout),
    }
    name = implementation if interpret else resolve_implementation(implementation, AVAILABLE, refusals=refusals)
    if interpret:
        raise_refusal(str(name), refusals.get(str(name)))
    factor = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale)
    if centroids is None:
        keys = key[..., : query.shape[-1]]  # all of them, but for BKSHV
        centroids = block_means(jax.lax.stop_gradient(keys), plan, layout)
    selecting = jax.lax.stop_gradient(factor) * centroid_scale
    blocks = choose(query, centroids, length, plan, selecting)
    if name == "xla":
        return xla.attend(query, key, value, blocks, length, plan, factor, layout)[0]
    return _kernel(str(name), plan, layout, interpret, query, key, value, blocks, length, factor)


def block_topk_attention(
    query: Float[Array, "B _ N _"],
    key: Float[Array, "B _ _ _"],
    value: Float[Array, "B _ _ _"] | None,
    *,
    length: ArrayLike | None = None,
    block_size: int = 16,
    num_blocks: int = 64,
    num_sink: int = 4,
    num_local: int = 0,
    block_offset: int | None = None,
    scale: ArrayLike | None = None,
    centroids: Float[Array, "B _ _ _"] | None = None,
    layout: Layout = "BSKH",
    implementation: str | None = None,
) -> Float[Array, "B 1 N _"]:
    """Attention of one query token per sequence to the best blocks of its cache: see the module for the equations.

    Gradients flow through the kept logits and values; choosing has none.

    Args:
        query: the current token's queries [B, 1, N, H].
        key: cached keys [B, S, K, H], position encoding applied, the current token's among them; K divides N.
        value: cached values [B, S, K, V].
        length: tokens in the cache, a number or [B], the current one included; S by default. Slots from there on may
            hold anything, NaN as well. A length of 0 gives zeros. It may be traced.
        block_size: positions of a block; divides S.
        num_blocks: blocks to choose.
        num_sink: first tokens that are always read, rounded up to whole blocks unless ``block_offset`` is given.
        num_local: latest tokens that are always read.
        block_offset: position where blocks to choose from start, at least ``num_sink``; everything before is read.
        scale: of the logits; 1/√H by default.
        centroids: mean key of every block, as `select_blocks` takes it. Without it the means are computed from all
            keys, so that the step reads S keys: pass them, or use `block_topk_decode` with a cache that keeps them.
        layout: ``"BSKH"``; ``"BKSH"`` for key [B, K, S, H] and value [B, K, S, V]; ``"BKSHV"`` for both side by side in
            key [B, K, S, H + V], and no value.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``; the best for the platform by default.

    Returns:
        [B, 1, N, V] in the dtype of ``query``; logits and sums are float32, or float64 for float64.

    Raises:
        ValueError: for shapes that do not fit, a K that does not divide N, a ``block_size`` that does not divide S, a
            budget (sink + blocks + local) of more than S, a length outside 0..S where it is known, numbers out of
            range, an implementation that is unknown or cannot take the call.
        TypeError: for arrays that are not of a real floating type, or a length that is not of integers.

    >>> q, k = jnp.ones((1, 1, 4, 8)), jnp.ones((1, 64, 2, 8))
    >>> v = jnp.arange(64.0).reshape(1, 64, 1, 1) * jnp.ones((1, 64, 2, 8))
    >>> out = block_topk_attention(q, k, v, length=48, block_size=8, num_blocks=2)
    >>> out.shape, float(out[0, 0, 0, 0])  # all blocks are equal: it reads the sink's and the first two after it
    ((1, 1, 4, 8), 11.5)
    """
    _check_query(query, key, layout)
    _check_value(key, value, layout)
    size = key.shape[layout.index("S")]
    plan = Plan.make(size, block_size, num_blocks, num_sink, num_local, block_offset)
    if centroids is not None:
        _check_centroids(centroids, key.shape[layout.index("K")], query, plan)
    lengths = _lengths(length, query.shape[0], size)
    return _attend(query, key, value, centroids, 1.0, lengths, plan, scale, layout, implementation)


def block_topk_decode(
    query: Float[Array, "B _ N _"],
    cache: BlockTopKCache,
    *,
    num_blocks: int = 64,
    num_sink: int = 4,
    num_local: int = 0,
    scale: ArrayLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "B 1 N _"]:
    """`block_topk_attention` on a cache that keeps the sums of its blocks: one step of decoding after `append`.

    Args:
        query: the current token's queries [B, 1, N, H]; its key and value are in the cache already.
        cache: from `init_cache`, `prefill`, `append`.
        num_blocks: blocks to choose.
        num_sink: first tokens that are always read, rounded up to where the cache's blocks start.
        num_local: latest tokens that are always read.
        scale: of the logits; 1/√H by default.
        implementation: as for `block_topk_attention`.

    Returns:
        [B, 1, N, V].

    Raises:
        ValueError: as `block_topk_attention`.

    >>> cache = init_cache(1, 64, num_kv_heads=1, head_dim=4, block_size=8)
    >>> cache = append(cache, jnp.ones((1, 1, 1, 4)), jnp.full((1, 1, 1, 4), 3.0))
    >>> block_topk_decode(jnp.ones((1, 1, 2, 4)), cache, num_blocks=2)[0, 0, :, 0].tolist()
    [3.0, 3.0]
    """
    _check_query(query, cache.k, cache.layout)
    plan = plan_of(cache, num_blocks, num_sink, num_local)
    lengths = _lengths(cache.length, query.shape[0], cache.size)
    return _attend(
        query, cache.k, cache.v, cache.centroid_sum, 1 / cache.block_size, lengths, plan, scale, cache.layout,
        implementation,
    )  # fmt: skip


def block_topk_partial(
    query: Float[Array, "B n N H"],
    cache: BlockTopKCache,
    *,
    num_blocks: int = 64,
    num_sink: int = 4,
    num_local: int = 0,
    scale: ArrayLike | None = None,
) -> tuple[Float[Array, "B n N _"], Float[Array, "B n N"]]:
    """Attention of several queries per sequence to the same blocks, as one part of a softmax.

    For drafts of speculative decoding, whose own keys are not in the cache yet: they are the other part, and with the
    logarithms of both sums the parts merge. Blocks are read once, those that the first query chooses, so that the
    first query attends to what `block_topk_decode` would read, its own token aside.

    Args:
        query: queries of n tokens [B, n, N, H].
        cache: earlier tokens.
        num_blocks: blocks to choose.
        num_sink: first tokens that are always read, rounded up to where the cache's blocks start.
        num_local: latest tokens that are always read.
        scale: of the logits; 1/√H by default.

    Returns:
        Attention [B, n, N, V], and log Σ exp of the kept logits [B, n, N] (−inf for an empty cache).

    Raises:
        ValueError: as `block_topk_attention`.

    >>> cache = init_cache(1, 64, num_kv_heads=1, head_dim=4, block_size=8)
    >>> cache = append(cache, jnp.zeros((1, 1, 1, 4)), jnp.full((1, 1, 1, 4), 3.0))
    >>> out, lse = block_topk_partial(jnp.ones((1, 5, 2, 4)), cache, num_blocks=2)
    >>> out.shape, float(out[0, 4, 1, 0]), float(lse[0, 4, 1])
    ((1, 5, 2, 4), 3.0, 0.0)
    """
    _check_query(query[:, :1], cache.k, cache.layout)
    plan = plan_of(cache, num_blocks, num_sink, num_local)
    lengths = _lengths(cache.length, query.shape[0], cache.size)
    factor = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale)
    selecting = jax.lax.stop_gradient(factor) / cache.block_size
    blocks = choose(query[:, :1], cache.centroid_sum, lengths, plan, selecting)
    # The queries of a group, of all n tokens, side by side: as more heads of the same group.
    batch, count, heads, size = query.shape
    groups = cache.centroid_sum.shape[1]
    split = query.reshape(batch, count, groups, heads // groups, size).swapaxes(1, 2)
    joined = split.reshape(batch, 1, count * heads, size)
    out, lse = xla.attend(joined, cache.k, cache.v, blocks, lengths, plan, factor, cache.layout)

    def apart(rows: Array) -> Array:
        split = rows.reshape(batch, groups, count, heads // groups, *rows.shape[3:]).swapaxes(1, 2)
        return split.reshape(batch, count, heads, *rows.shape[3:])

    return apart(out), apart(lse)
