"""Classifier-free guidance: the prediction with a condition, pushed away from the one without.

    ε = ε_null + s (ε_cond − ε_null)

One pass over a batch of twice the size, [samples with conditions; the same samples with the null condition]. s = 1 is
no guidance, s = 0 ignores the condition. It doubles the cost of a step.

Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def double_batch(x: Float[Array, "B ..."], cond: Any, null: Any) -> tuple[Float[Array, "B2 ..."], Any]:
    """The batch that guidance wants: [x; x] and [cond; null].

    Args:
        x: samples.
        cond: a tree of arrays [B, ...]: labels, or embeddings.
        null: the condition that stands for none, a tree like ``cond`` whose leaves broadcast to its leaves: the number
            of classes for labels, a learned vector for embeddings.

    Returns:
        Samples and conditions of 2·B rows.

    Raises:
        ValueError: if ``null`` is ``None``, or a condition does not have B rows.

    >>> x, labels = double_batch(jnp.ones((2, 3)), jnp.array([4, 7]), 10)
    >>> x.shape, labels.tolist()
    ((4, 3), [4, 7, 10, 10])
    """
    if null is None:
        raise ValueError("null is None: guidance needs the condition that stands for none")

    def both(leaf: Any, empty: Any) -> Array:
        if not leaf.shape or leaf.shape[0] != x.shape[0]:
            raise ValueError(f"cond has a leaf of shape {leaf.shape}, expected {x.shape[0]} rows as x")
        return jnp.concatenate([leaf, jnp.broadcast_to(jnp.asarray(empty, leaf.dtype), leaf.shape)])

    return jnp.concatenate([x, x]), jax.tree.map(both, cond, null)


def guide(
    eps: Float[Array, "B2 ..."], scale: float | Float[Array, ""], *, cfg_channels: Any = None
) -> Float[Array, "B2 ..."]:
    """Guide a prediction for a doubled batch.

    Args:
        eps: [2·B, ..., C]: with conditions, then without.
        scale: s.
        cfg_channels: guide only so many of the first channels (the last axis); the others stay those of their half.
            DiT's code has 3 of 4, by which its published samples are made. All by default.

    Returns:
        [2·B, ..., C]; the guided channels are the same in both halves. Sampling needs the first half only.

    Raises:
        ValueError: for an odd number of rows, or ``cfg_channels`` outside 1 … C.

    >>> guide(jnp.array([[2.0, 5.0], [1.0, 1.0]]), 3.0, cfg_channels=1).tolist()
    [[4.0, 5.0], [4.0, 1.0]]
    """
    rows, channels = eps.shape[0], eps.shape[-1]
    if rows % 2:
        raise ValueError(f"eps has {rows} rows, expected an even number: with conditions, then without")
    count = channels if cfg_channels is None else cfg_channels
    if not isinstance(count, (int, np.integer)) or not 1 <= count <= channels or eps.ndim < 2:
        raise ValueError(f"cfg_channels is {cfg_channels}, expected 1 to {channels} of eps {eps.shape}")
    cond, null = eps[: rows // 2, ..., :count], eps[rows // 2 :, ..., :count]
    guided = (null + scale * (cond - null)).astype(eps.dtype)
    guided = jnp.concatenate([guided, guided])
    return guided if count == channels else jnp.concatenate([guided, eps[..., count:]], -1)


def with_guidance(
    eps_fn: Callable[[Any, Any, Any], Any], *, scale: Any, null: Any = None, cfg_channels: Any = None
) -> Callable[[Any, Any, Any], Any]:
    """A conditional network as one that is guided.

    Args:
        eps_fn: ``(x, i, cond) -> eps``; ``i`` is a number, or [B], which is doubled, too.
        scale: s; a Python number 1 costs no second half.
        null: the condition that stands for none, as for `double_batch`.
        cfg_channels: as for `guide`.

    Returns:
        ``(x, i, cond) -> eps`` for B samples, the half with conditions.

    Raises:
        ValueError: for ``scale`` other than 1 without ``null``.

    >>> shift = lambda x, i, label: x + label[:, None]
    >>> guided = with_guidance(shift, scale=2.0, null=0)
    >>> guided(jnp.zeros((1, 1)), 0, jnp.array([3])).tolist()
    [[6.0]]
    """
    plain = isinstance(scale, (int, float)) and scale == 1
    if null is None and not plain:
        raise ValueError(f"scale is {scale}, but null is None: guidance needs the condition that stands for none")
    if plain:
        return eps_fn

    def guided(x: Array, i: Any, cond: Any) -> Array:
        both, conditions = double_batch(x, cond, null)
        steps = jnp.concatenate([i, i]) if getattr(i, "ndim", 0) else i
        return guide(eps_fn(both, steps, conditions), scale, cfg_channels=cfg_channels)[: x.shape[0]]

    return guided


def guide_denoiser(apply_fn: Callable[..., Any], *, scale: Any, cfg_channels: Any = None) -> Callable[..., Any]:
    """Guide a network that reuses branches: its state, its cache and its prediction all have 2·B rows.

    Args:
        apply_fn: ``(params, x, i, cond, *, cache, weights, compute) -> (eps, outputs)``, as
            `jaxaccel.models.dit.dit_denoiser` makes it.
        scale: s.
        cfg_channels: as for `guide`.

    Returns:
        The same with guidance. ``x`` and ``cond`` are those of `double_batch`. The network always sees the first half
        of ``x`` twice; in channels that are not guided the second half drifts apart when sampling, and is ignored.

    >>> plain = lambda params, x, i, cond: (x + cond[:, None], None)
    >>> guided = guide_denoiser(plain, scale=2.0)
    >>> guided((), jnp.array([[1.0], [7.0]]), 0, jnp.array([3.0, 0.0]))[0].tolist()
    [[7.0], [7.0]]
    """

    def guided(params: Any, x: Array, i: Any, cond: Any, **options: Any) -> Any:
        if x.shape[0] % 2:
            raise ValueError(f"x has {x.shape[0]} rows, expected an even number: with conditions, then without")
        half = x[: x.shape[0] // 2]
        eps, outputs = apply_fn(params, jnp.concatenate([half, half]), i, cond, **options)
        return guide(eps, scale, cfg_channels=cfg_channels), outputs

    return guided
