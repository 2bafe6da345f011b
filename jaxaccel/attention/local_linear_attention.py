"""Local linear attention: a line is fitted near each query, where softmax attention fits a constant.

What it buys: a better answer from the same context, where values vary smoothly with keys. Softmax attention is the
Nadaraya-Watson estimate of the value at the query, a weighted mean, and is biased wherever keys lie to one side of the
query; linear attention and its relatives fit one line to everything and cannot bend. Local linear attention is
weighted ridge regression around each query: as good as the line where the world is a line, as local as softmax where it
is not. What is made cheaper is this estimate itself: memory falls from Θ(n²d) + Θ(nd²), for centred keys and systems,
to Θ(nd).

When to use it: regression in context, few keys per query, a world that changes along the sequence. When not: to save
time. It costs 2·iterations + 3 products of queries and keys where softmax attention costs 2, and a tuned softmax is
close behind where values jump more than they slope (``python -m experiments run local_linear_regression``). Small
ridges need many iterations; ``LLAState.iterations`` shows how many ran.

    out = local_linear_attention(q, k, v, ridge=0.1)                       # in place of dot_product_attention
    out = local_linear_decode(q1, k_cache, v_cache, length=n, ridge=0.1)   # one token, cache read once
    layer = LocalLinearAttention(256, 4, rngs=nnx.Rngs(0))                 # a Flax NNX layer, ridge learned per head

The op is `kernels_pallas.local_linear_attention`, with its equations. The gradient of the paper's released code is off
by 9 to 35 % for queries and keys on the vectors in ``tests/data``; the one here is exact, also for the ridge, which
makes the ridge worth learning.

Source: Zuo, Yin, Zeng, Li, Zhu, Wang, Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention
For Test-Time Regression, arXiv 2510.01450.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.local_linear_attention import (
    DecodeState,
    LLAState,
    lla_finish,
    lla_merge,
    lla_partial,
    local_linear_attention,
    local_linear_decode,
)
from kernels_pallas.local_linear_attention.problem import unit

__all__ = [
    "DecodeState",
    "LLACache",
    "LLAState",
    "LocalLinearAttention",
    "lla_finish",
    "lla_merge",
    "lla_partial",
    "local_linear_attention",
    "local_linear_decode",
]

Rotate = Callable[[Array, Array], Array]
"""Position encoding of queries and keys: ``([B, T, heads, H], positions i32[B, T]) -> [B, T, heads, H]``."""


class LLACache(NamedTuple):
    """Keys and values of the tokens so far; slots from ``length`` on are unused and may hold anything."""

    key: Float[Array, "B S K H"]  # as the op takes them: normalised and rotated, if the layer does that
    value: Float[Array, "B S K H"]  # dtype of the activations, as ``key``
    length: Int[Array, "B"]  # int32, used slots


class LocalLinearAttention(nnx.Module):
    """Multi-head local linear attention with a ridge that is learned for every head.

    ridge_n = min_ridge + softplus(log_ridge_n), which is about exp(log_ridge_n) below 1 and grows linearly above.
    Parameters besides ``log_ridge`` [N] are the projections ``query`` [D, N·H], ``key``, ``value`` [D, K·H] and ``out``
    [N·H, D], so that weights of a softmax layer can be taken over.

    With ``normalize_qk`` queries and keys have length 1 and exp(scale·q·k) is a radial kernel, as in the paper's
    theory. Logits then lie within ±scale, and variances of key channels are about 1/H: take a ridge that much
    smaller.

    Args:
        width: D, size of the activations.
        heads: N, query heads.
        kv_heads: K, heads of keys and values; must divide N. N if ``None``.
        head_dim: H; D/N if ``None``.
        causal: whether a token sees only itself and what comes before it. Decoding needs it.
        ridge: its initial value, greater than ``min_ridge``; one number or one for each head.
        min_ridge: what the learned ridge cannot fall below, positive.
        scale: of the logits; if ``None``, 1/√H, or √H with ``normalize_qk``, the same for queries and keys of
            length √H.
        normalize_qk: divide queries and keys by their length.
        rotate: position encoding of queries and keys, see `Rotate`; none by default.
        use_bias: whether the projections have biases.
        solver: as in `local_linear_attention`, also the next four.
        max_iters: most iterations of conjugate gradients.
        rtol: relative residual at which they stop.
        preconditioner: ``None`` or ``"jacobi"``.
        implementation: which implementation runs; the best for the platform if ``None``.
        dtype: of the computation outside of the op's sums; that of the inputs and parameters if ``None``.
        param_dtype: of the projections; the ridge is kept in float32.
        rngs: source of initial parameters.

    Raises:
        ValueError: if K does not divide N, N does not divide D while ``head_dim`` is ``None``, a size is not positive,
            or a ridge is not above ``min_ridge`` > 0.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = LocalLinearAttention(16, 4, kv_heads=2, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 16))
    >>> layer(x).shape
    (2, 5, 16)
    >>> _, cache = layer.prefill(x[:, :4], layer.init_cache(2, 8))
    >>> step, cache = layer.decode(x[:, 4:], cache)
    >>> step.shape, cache.length.tolist()
    ((2, 1, 16), [5, 5])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        ridge: float | tuple[float, ...] = 1.0,
        min_ridge: float = 1e-3,
        scale: float | None = None,
        normalize_qk: bool = False,
        rotate: Rotate | None = None,
        use_bias: bool = False,
        solver: str = "cg",
        max_iters: int = 32,
        rtol: float = 1e-6,
        preconditioner: str | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        if min(width, heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads ({kv_heads}) must divide heads ({heads}), and width ({width}) be positive")
        if head_dim is None and width % heads:
            raise ValueError(f"heads ({heads}) do not divide width ({width}): give head_dim")
        size = width // heads if head_dim is None else head_dim
        if size < 1:
            raise ValueError(f"head_dim is {size}, expected at least 1")
        start = np.broadcast_to(np.asarray(ridge, np.float64), (heads,)) if np.size(ridge) in (1, heads) else None
        if start is None:
            raise ValueError(f"ridge has {np.size(ridge)} values, expected one, or one for each of {heads} heads")
        if not (0 < min_ridge < np.inf and np.isfinite(start).all() and (start > min_ridge).all()):
            raise ValueError(f"ridge is {ridge} and min_ridge {min_ridge}, expected 0 < min_ridge < ridge, all finite")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, size
        self.causal, self.normalize_qk, self.rotate, self.min_ridge = causal, normalize_qk, rotate, min_ridge
        self.scale = (size**0.5 if normalize_qk else size**-0.5) if scale is None else scale
        self.options: dict[str, Any] = {
            "solver": solver,
            "max_iters": max_iters,
            "rtol": rtol,
            "preconditioner": preconditioner,
            "implementation": implementation,
        }
        self.dtype = dtype

        def project(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.query = project(width, heads * size)
        self.key = project(width, kv_heads * size)
        self.value = project(width, kv_heads * size)
        self.out = project(heads * size, width)
        # The inverse of softplus, in a form that neither overflows nor cancels.
        above = start - min_ridge
        self.log_ridge = nnx.Param(jnp.asarray(above + np.log(-np.expm1(-above)), jnp.float32))

    @property
    def ridge(self) -> Float[Array, "N"]:
        """The ridge of every head."""
        return self.min_ridge + jax.nn.softplus(self.log_ridge[...])

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values of tokens at ``positions``, as the op takes them."""
        lead = x.shape[:2]
        q = self.query(x).reshape(*lead, self.heads, self.head_dim)
        k = self.key(x).reshape(*lead, self.kv_heads, self.head_dim)
        v = self.value(x).reshape(*lead, self.kv_heads, self.head_dim)
        if self.normalize_qk:
            q, k = unit(q), unit(k)
        if self.rotate is not None:
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        return q, k, v

    def attend(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Array | None
    ) -> Float[Array, "B T N H"]:
        """The attention between the projections; a subclass may replace it to compare mechanisms."""
        out = local_linear_attention(
            q, k, v, ridge=self.ridge, scale=self.scale, is_causal=self.causal, mask=mask, **self.options
        )
        assert isinstance(out, jax.Array)  # a pair only with return_state
        return out

    def __call__(self, x: Float[Array, "B T D"], *, mask: Bool[Array, "..."] | None = None) -> Float[Array, "B T D"]:
        """Apply the layer to whole sequences.

        Args:
            x: activations.
            mask: True where a key is seen, broadcastable to [B, N, T, T]; combined with causality.

        Returns:
            Mixed activations; zeros (before the output's bias) where a token sees nothing.
        """
        q, k, v = self.project(x, _positions(x))
        return self._finish(self.attend(q, k, v, mask))

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> LLACache:
        """An empty cache for ``length`` tokens of ``batch`` sequences.

        Args:
            batch: sequences.
            length: most tokens of a sequence.
            dtype: of the stored numbers; by default what the layer computes in.

        Raises:
            ValueError: if a size is not positive.
        """
        if min(batch, length) < 1:
            raise ValueError(f"batch ({batch}) and length ({length}) must be at least 1")
        dtype = dtype or self.dtype or self.key.kernel[...].dtype
        empty = jnp.zeros((batch, length, self.kv_heads, self.head_dim), dtype)
        return LLACache(empty, empty, jnp.zeros((batch,), jnp.int32))

    def prefill(self, x: Float[Array, "B T D"], cache: LLACache) -> tuple[Float[Array, "B T D"], LLACache]:
        """Apply the layer to prompts of one length and put them into an empty cache.

        Raises:
            ValueError: if the prompt does not fit, the cache is known not to be empty, or the layer is not causal.
        """
        self._check_cache(x, cache, cache.length, fresh=True)
        q, k, v = self.project(x, _positions(x))
        cache = LLACache(
            cache.key.at[:, : x.shape[1]].set(k.astype(cache.key.dtype)),
            cache.value.at[:, : x.shape[1]].set(v.astype(cache.value.dtype)),
            jnp.full_like(cache.length, x.shape[1]),
        )
        return self._finish(self.attend(q, k, v, None)), cache

    def decode(self, x: Float[Array, "B 1 D"], cache: LLACache) -> tuple[Float[Array, "B 1 D"], LLACache]:
        """One token of every sequence: add it to the cache and attend to all of it, in one pass.

        Equals the last position of the layer applied to the whole sequence. Under ``jit`` a full cache is not
        noticed: the last slot would be overwritten, so count the steps.

        Raises:
            ValueError: if the cache is known to be full, or the layer is not causal.
        """
        self._check_cache(x, cache, cache.length, fresh=False)
        q, k, v = self.project(x, cache.length[:, None])
        write = jax.vmap(lambda store, new, at: jax.lax.dynamic_update_slice_in_dim(store, new, at, 0))
        cache = LLACache(
            write(cache.key, k.astype(cache.key.dtype), cache.length),
            write(cache.value, v.astype(cache.value.dtype), cache.length),
            cache.length + 1,
        )
        out = local_linear_decode(
            q, cache.key, cache.value, length=cache.length, ridge=self.ridge, scale=self.scale, **self.options
        )
        return self._finish(out), cache

    def _finish(self, mixed: Array) -> Array:
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def _check_cache(self, x: Array, cache: LLACache, length: Array, *, fresh: bool) -> None:
        if not self.causal:
            raise ValueError("causal is False: only a causal layer can work token by token")
        if cache.key.shape[0] != x.shape[0]:
            raise ValueError(f"cache holds {cache.key.shape[0]} sequences, x has {x.shape[0]}")
        known = None if isinstance(length, jax.core.Tracer) else np.asarray(length)
        if fresh and known is not None and known.any():
            raise ValueError(f"cache has lengths {known.tolist()}, expected an empty one: go on with decode")
        used = 0 if known is None or fresh else int(known.max())
        if used + x.shape[1] > cache.key.shape[1]:
            slots = cache.key.shape[1]
            raise ValueError(f"cache has {slots} slots, of which {used} are used: no room for {x.shape[1]} tokens")


def _positions(x: Array) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
