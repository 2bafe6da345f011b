"""Local linear attention: softmax attention upgraded from a local constant to a local linear estimate, blockwise.

Softmax attention answers a query with a weighted mean of values: the best constant near the query. Local linear
attention fits a line near the query instead, by weighted ridge regression of values on keys, and answers with the
line's value at the query. Per query q, with weights p = softmax(scale·q·k) over the keys that it sees and their mean
k̄ = Σ p k,

    A = Σⱼ pⱼ (kⱼ − k̄)(kⱼ − k̄)ᵀ + ridge·1          H x H, never built
    A x = q − k̄                                     conjugate gradients, or Cholesky factors
    o = Σⱼ pⱼ (1 + x·(kⱼ − k̄)) vⱼ                   weights sum to 1 and may be negative

which is the paper's estimator in centred form: the same numbers, without a denominator that can cancel. ridge → ∞
gives softmax attention (the difference falls as 1/ridge), scale → 0 ridge regression with an intercept.

Cost: a solve of n iterations is 2n + 3 products of queries and keys, against 2 of softmax attention; memory is linear
in T and S. Decoding reads the cache once (`local_linear_decode`).

When to use it: regression in context where the answer varies smoothly with the query, keys are few per query (softmax's
bias at the boundary of the data costs most there), or the world changes along the sequence. When not: as a faster
softmax attention, which it is not.

Numerics: float16 and bfloat16 inputs are worked on in float32 (also in the solve: rounding its operands to bfloat16
costs far more than rounding the inputs), float64 in float64. Truncated conjugate gradients are biased, and the gradient
is that of the exact solution: for ridge < 1 look at ``LLAState.iterations``, and raise ``max_iters`` or take
``solver="cholesky"``.

Gradients are exact for query, key, value, ridge, scale and probe, in reverse mode and once: second derivatives raise
``NotImplementedError``. The paper's code treats the ridge's scale as a constant; its gradients for query and key are
off by 9 to 35 % of their largest entry on the vectors in ``tests/data`` (``pytest -k the_papers_code``).

Source: Zuo, Yin, Zeng, Li, Zhu, Wang, Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention
For Test-Time Regression, arXiv 2510.01450.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from kernels_pallas.arrays import accumulator
from kernels_pallas.dispatch import resolve_implementation
from kernels_pallas.local_linear_attention import decode
from kernels_pallas.local_linear_attention.decode import DecodeState
from kernels_pallas.local_linear_attention.problem import (
    Inputs,
    Options,
    check_arrays,
    check_mask,
    check_options,
    check_ridge,
    is_known,
    unit,
)
from kernels_pallas.local_linear_attention.vjp import Step, attend, decode_step, decoding_module, implementation_module

__all__ = [
    "DecodeState",
    "LLAState",
    "lla_finish",
    "lla_merge",
    "lla_partial",
    "local_linear_attention",
    "local_linear_decode",
]

AVAILABLE = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",), "pallas_gpu": ("gpu",)}
"""Implementations and the platforms that they run on."""

_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


class LLAState(NamedTuple):
    """What the forward pass found, besides its output; ``x`` and ``lse`` can be differentiated through."""

    x: Float[Array, "B T N H"]  # float32 or 64: slope of the fit's weights, A⁻¹ (q − k̄), or the probe
    lse: Float[Array, "B T N"]  # float32 or 64: log Σ exp(scale·q·k); −inf for rows that see no key
    iterations: Int[Array, "B T N"]  # int32: solver iterations of the row's tile; 0 for Cholesky and probes


def _choose(implementation: str | None, refusal: Callable[[str], str | None]) -> str:
    """The implementation to run; kernels are asked for a ``refusal`` (and imported) only where they could run."""
    platform = jax.default_backend()
    wanted = {_KERNELS.get(platform)} if implementation is None else {implementation}
    refusals = {name: refusal(name) for name in _KERNELS.values() if name in wanted and platform in AVAILABLE[name]}
    return resolve_implementation(implementation, AVAILABLE, refusals=refusals)


def _scalar(name: str, value: ArrayLike, dtype: jnp.dtype) -> Array:
    if jnp.shape(value) != ():
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected a single number")
    if is_known(value) and not np.isfinite(np.asarray(value, np.float64)):
        raise ValueError(f"{name} is {value}, expected a finite number")
    return jnp.asarray(value, dtype)


def local_linear_attention(
    query: Float[Array, "B T _ _"],
    key: Float[Array, "_ S _ _"],
    value: Float[Array, "_ _ _ V"],
    *,
    ridge: ArrayLike = 1.0,
    scale: ArrayLike | None = None,
    is_causal: bool = True,
    mask: Bool[Array, "..."] | None = None,
    query_offset: ArrayLike = 0,
    solver: str = "cg",
    max_iters: int = 32,
    rtol: float | int = 1e-6,
    preconditioner: str | None = None,
    normalize_qk: bool = False,
    probe: Float[Array, "..."] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T _ V"] | tuple[Float[Array, "B T _ V"], LLAState]:
    """Local linear attention; see the module's text for the equations and when to use it.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; K divides N, query head n uses key head n // (N / K).
        value: [B, S, K, Hv].
        ridge: penalty on the slope, positive; broadcasts to [B, T, N]. Differentiable: a learned ridge per head is a
            softplus of [N].
        scale: of the logits, 1/√H if ``None``. Differentiable.
        is_causal: query i sees the keys j <= i + ``query_offset``.
        mask: booleans, True where a key is seen, four axes that broadcast to [B, N, T, S]; combined with ``is_causal``.
            Rows that see no key give zeros.
        query_offset: position of the first query among the keys, for a causal call; an integer, static if it is a
            Python integer (then keys above the diagonal are not read). −1 excludes a query's own key.
        solver: ``"cg"`` or ``"cholesky"``. Cholesky is exact whatever the ridge, and costs as much as several dozen
            iterations of the other for H = 64; more than linearly more for a larger H.
        max_iters: most iterations of conjugate gradients.
        rtol: they stop for a tile of rows once every row's residual is at most ``rtol`` of its right-hand side (of the
            norm, not of its square; with a preconditioner D, of the norm √(rᵀD⁻¹r)).
        preconditioner: ``"jacobi"`` helps only where key channels have very different sizes, else it slows.
        normalize_qk: divide queries and keys by their norm first; exp(scale·q·k) then is a radial kernel, as the
            paper's theory assumes. Take a larger ``scale`` then: logits lie within ±scale.
        probe: x itself [B, T, N, H]: nothing is solved and ``ridge`` is not used. Differentiable.
        return_state: also return `LLAState`.
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``, or ``None`` for the best one that takes the call.

    Returns:
        [B, T, N, Hv] in the dtype of ``query``; with ``return_state`` also the state.

    Raises:
        ValueError: if shapes do not fit, K does not divide N, S < T in a causal call with offset 0, a ridge is not
            positive, a solver, preconditioner or implementation is unknown or cannot take the call, or an option is
            out of range. Values of traced arrays are not checked: a traced ridge must be positive.
        TypeError: if an array has a dtype that does not fit.

    >>> import jax, jax.numpy as jnp
    >>> k = jax.random.normal(jax.random.key(0), (1, 64, 2, 3))
    >>> v = 2 * k + 1  # values that are linear in the keys: the fit is exact, softmax attention is biased
    >>> out = local_linear_attention(k[:, :5], k, v, ridge=1e-4, is_causal=False, max_iters=64)
    >>> bool(jnp.allclose(out, v[:, :5], atol=5e-3))
    True
    """
    check_arrays(query, key, value)
    check_options(solver, max_iters, rtol, preconditioner)
    batch, queries, heads, size = query.shape
    keys = key.shape[1]
    check_ridge(ridge, (batch, queries, heads))
    check_mask(mask, (batch, heads, queries, keys))
    if jnp.shape(query_offset) != () or not jnp.issubdtype(jnp.result_type(query_offset), jnp.integer):
        raise ValueError(f"query_offset is {query_offset!r}, expected one integer")
    static = int(query_offset) if isinstance(query_offset, int | np.integer) else None
    if is_causal and static == 0 and keys < queries:
        raise ValueError(
            f"key has {keys} positions, fewer than the {queries} of query, in a causal call with query_offset 0: "
            f"give query_offset (keys before the first query), such as {keys - queries}, or is_causal=False"
        )
    dtype = accumulator(jnp.result_type(query, key, value))
    if probe is not None and probe.shape != query.shape:
        raise ValueError(f"probe has shape {probe.shape}, expected that of query, {query.shape}")
    if normalize_qk:
        query, key = unit(query), unit(key)
    inputs = Inputs(
        q=query,
        k=key,
        v=value,
        scale=_scalar("scale", size**-0.5 if scale is None else scale, dtype),
        ridge=jnp.broadcast_to(jnp.asarray(ridge, dtype), (batch, queries, heads)),
        offset=jnp.asarray(query_offset, jnp.int32),
        mask=mask,
        probe=None if probe is None else probe.astype(dtype),
    )
    options = Options(is_causal, solver, max_iters, float(rtol), preconditioner, probe is None, static)
    name = _choose(implementation, lambda name: implementation_module(name).refusal(inputs, options))
    result = attend(name, options, False, inputs)
    if not return_state:
        return result.out
    return result.out, LLAState(result.x, result.lse, result.iterations)


def _lengths(length: ArrayLike | None, batch: int, keys: int) -> Int[Array, "B"]:
    if length is None:
        length = keys
    length = length if isinstance(length, jax.Array) else np.asarray(length)
    if not jnp.issubdtype(jnp.result_type(length), jnp.integer) or jnp.shape(length) not in ((), (batch,)):
        raise ValueError(f"length is {length}, expected an integer or [{batch}] of them")
    if is_known(length):
        known = np.asarray(length)
        if known.min() < 0 or known.max() > keys:
            raise ValueError(f"length is {known.tolist()}, expected 0 up to the {keys} positions of the cache")
    return jnp.broadcast_to(jnp.asarray(length, jnp.int32), (batch,))


def _step(implementation: str | None, options: Options, step: Step) -> Any:
    """Run a decoding step by the implementation that was asked for, or the best one."""
    name = _choose(implementation, lambda name: decoding_module(name).refusal(step.q, step.k, step.v, options))
    return decode_step(name, options, False, step)


def _check_step(query: Array, key: Array, value: Array) -> None:
    check_arrays(query, key, value)
    if query.shape[1] != 1:
        raise ValueError(f"query has {query.shape[1]} positions, expected one: local_linear_attention takes several")


def lla_partial(
    query: Float[Array, "B _ _ _"],
    key: Float[Array, "_ S _ _"],
    value: Float[Array, "_ _ _ V"],
    *,
    length: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    implementation: str | None = None,
) -> DecodeState:
    """What one part of a cache contributes to a decoding step: weighted moments, in one pass over the part.

    Args:
        query: [B, 1, N, H].
        key: a part of the cache [B, S, K, H].
        value: [B, S, K, Hv].
        length: used slots of the part, one number or [B]; all S if ``None``. What lies in the others is never used.
        scale: of the logits, 1/√H if ``None``.
        implementation: as in `local_linear_decode`.

    Returns:
        The moments, which `lla_merge` adds up and `lla_finish` turns into the output.

    Raises:
        ValueError: if shapes do not fit or a length is outside 0 to S.

    >>> import jax.numpy as jnp
    >>> k = jnp.arange(12.0).reshape(1, 6, 1, 2) / 10
    >>> whole = lla_partial(k[:, :1], k, k)
    >>> parts = lla_merge(lla_partial(k[:, :1], k[:, :2], k[:, :2]), lla_partial(k[:, :1], k[:, 2:], k[:, 2:]))
    >>> bool(jnp.allclose(lla_finish(whole, k[:, :1]), lla_finish(parts, k[:, :1])))
    True
    """
    _check_step(query, key, value)
    dtype = accumulator(jnp.result_type(query, key, value))
    factor = _scalar("scale", query.shape[-1] ** -0.5 if scale is None else scale, dtype)
    lengths = _lengths(length, query.shape[0], key.shape[1])
    return _step(implementation, Options(is_causal=False), Step(query[:, 0], key, value, lengths, factor))


def lla_merge(a: DecodeState, b: DecodeState) -> DecodeState:
    """Add up the moments of two disjoint parts of a cache; associative and commutative up to rounding.

    Raises:
        ValueError: if the parts belong to different sizes.
    """
    shapes = [[x.shape for x in state] for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the parts have shapes {shapes[0]} and {shapes[1]}, expected equal ones")
    return decode.merge(a, b)


def lla_finish(
    state: DecodeState,
    query: Float[Array, "B _ _ _"],
    *,
    ridge: ArrayLike = 1.0,
    solver: str = "cg",
    max_iters: int = 32,
    rtol: float | int = 1e-6,
    preconditioner: str | None = None,
) -> Float[Array, "B 1 _ V"]:
    """The output of a decoding step from the moments of the whole cache.

    Args:
        state: from `lla_partial` and `lla_merge`.
        query: [B, 1, N, H], the same as the moments were made with.
        ridge: positive, broadcasts to [B, 1, N].
        solver: of the H x H systems.
        max_iters: most iterations of conjugate gradients.
        rtol: relative residual at which they stop.
        preconditioner: as in `local_linear_attention`.

    Returns:
        [B, 1, N, Hv] in the dtype of ``query``; zeros for a sequence without keys.

    Raises:
        ValueError: as in `local_linear_attention`.
    """
    check_options(solver, max_iters, rtol, preconditioner)
    batch, _, heads, _ = query.shape
    if state.k_sum.shape != (batch, heads, query.shape[-1]) or query.shape[1] != 1:
        raise ValueError(f"query has shape {query.shape}, which does not fit moments of shape {state.k_sum.shape}")
    check_ridge(ridge, (batch, 1, heads))
    options = Options(False, solver, max_iters, float(rtol), preconditioner)
    full = jnp.broadcast_to(jnp.asarray(ridge, state.kk.dtype), (batch, 1, heads))[:, 0]
    out, _ = decode.finish(state, query[:, 0], full, options)
    return out[:, None].astype(query.dtype)


def local_linear_decode(
    query: Float[Array, "B _ _ _"],
    key: Float[Array, "_ S _ _"],
    value: Float[Array, "_ _ _ V"],
    *,
    length: ArrayLike | None = None,
    ridge: ArrayLike = 1.0,
    scale: ArrayLike | None = None,
    solver: str = "cg",
    max_iters: int = 32,
    rtol: float | int = 1e-6,
    preconditioner: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B 1 _ V"]:
    """One step of decoding: a query per sequence against its cache, which is read once.

    Equals the last row of a causal `local_linear_attention`. Query and keys are taken as they are: for a model that
    normalises them, normalise before caching.

    Args:
        query: [B, 1, N, H].
        key: cache [B, S, K, H].
        value: cache [B, S, K, Hv].
        length: used slots, one number or [B], may be traced; what lies in the others is never used.
        ridge: positive, broadcasts to [B, 1, N].
        scale: of the logits, 1/√H if ``None``.
        solver: of the H x H systems, ``"cg"`` or ``"cholesky"``.
        max_iters: most iterations of conjugate gradients.
        rtol: relative residual at which they stop.
        preconditioner: as in `local_linear_attention`.
        implementation: as in `local_linear_attention`. The gradient is that of XLA's version.

    Returns:
        [B, 1, N, Hv] in the dtype of ``query``.

    Raises:
        ValueError: as `local_linear_attention`; also for a length outside 0 to S.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    >>> last = local_linear_attention(q, k, v)[:, 5:6]
    >>> bool(jnp.allclose(local_linear_decode(q[:, 5:6], k, v, length=6), last, atol=1e-5))
    True
    """
    _check_step(query, key, value)
    check_options(solver, max_iters, rtol, preconditioner)
    batch, _, heads, size = query.shape
    check_ridge(ridge, (batch, 1, heads))
    lengths = _lengths(length, batch, key.shape[1])
    dtype = accumulator(jnp.result_type(query, key, value))
    factor = _scalar("scale", size**-0.5 if scale is None else scale, dtype)
    full = jnp.broadcast_to(jnp.asarray(ridge, dtype), (batch, 1, heads))[:, 0]
    options = Options(False, solver, max_iters, float(rtol), preconditioner)
    out = _step(implementation, options, Step(query[:, 0], key, value, lengths, factor, full))
    return out[:, None].astype(query.dtype)
