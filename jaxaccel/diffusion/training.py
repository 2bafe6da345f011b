"""How networks that predict noise are trained: a random step for each sample, and the squared error of the noise.

    loss = E ‖ε − ε_θ(√ᾱ_i x₀ + √(1−ᾱ_i) ε, i, c)‖²,   i uniform, ε normal; c is the null condition now and then

Ho et al., arXiv 2006.11239, equation 14; the dropped condition is what guidance needs (Ho and Salimans, 2207.12598).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxaccel.diffusion.ddim import add_noise
from jaxaccel.diffusion.schedules import NoiseSchedule


def drop_labels(key: Key[Array, ""], cond: Any, null: Any, rate: Any) -> Any:
    """Replace whole conditions by the one that stands for none, each with probability ``rate``.

    Args:
        key: of the choice.
        cond: a tree of arrays [B, ...].
        null: a tree like ``cond`` whose leaves broadcast to its leaves.
        rate: in [0, 1].

    Returns:
        As ``cond``.

    Raises:
        ValueError: for a rate outside [0, 1], or above 0 without ``null``.

    >>> drop_labels(jax.random.key(0), jnp.array([1, 2]), 10, 1.0).tolist()
    [10, 10]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, expected a probability")
    if rate == 0:
        return cond
    if null is None:
        raise ValueError(f"rate is {rate}, but null is None: what stands for no condition?")
    rows = jax.tree.leaves(cond)[0].shape[0]
    dropped = jax.random.bernoulli(key, rate, (rows,))

    def replace(leaf: Array, empty: Any) -> Array:
        return jnp.where(dropped.reshape(rows, *(1,) * (leaf.ndim - 1)), jnp.asarray(empty, leaf.dtype), leaf)

    return jax.tree.map(replace, cond, null)


def epsilon_loss(
    eps_fn: Callable[[Any, Any, Any], Any],
    schedule: NoiseSchedule,
    key: Key[Array, ""],
    x0: Float[Array, "B ..."],
    cond: Any,
    *,
    null: Any = None,
    dropout: Any = 0.1,
) -> Float[Array, ""]:
    """Mean squared error of the predicted noise at a random step for each sample.

    Args:
        eps_fn: ``(x, i, cond) -> eps`` with steps int32 [B]. If it gives more channels (last axis) than the data have,
            as networks that also predict variances do, the first ones count and the others are not trained.
        schedule: of training, all steps.
        key: of steps, noise and dropped conditions.
        x0: data [B, ..., C], about unit variance.
        cond: a tree of arrays [B, ...].
        null: the condition that stands for none.
        dropout: probability of it.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: for a dropout outside [0, 1] or above 0 without ``null``, or a prediction of another shape.

    >>> from jaxaccel.diffusion import linear_betas, noise_schedule
    >>> zero = lambda x, i, cond: jnp.zeros_like(x)
    >>> x0, labels = jnp.zeros((64, 8, 8, 1)), jnp.zeros(64, int)
    >>> loss = epsilon_loss(zero, noise_schedule(linear_betas()), jax.random.key(0), x0, labels, null=10)
    >>> abs(float(loss) - 1) < 0.1  # the noise has variance 1
    True
    """
    step_key, noise_key, drop_key = jax.random.split(key, 3)
    steps = jax.random.randint(step_key, x0.shape[:1], 0, schedule.num_steps)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    eps = eps_fn(add_noise(schedule, x0, noise, steps), steps, drop_labels(drop_key, cond, null, dropout))
    if eps.shape[:-1] != x0.shape[:-1] or eps.shape[-1] < x0.shape[-1]:
        raise ValueError(f"eps_fn gave shape {eps.shape}, expected {x0.shape}, or more channels")
    wide = jnp.promote_types(eps.dtype, jnp.float32)
    return jnp.mean((eps[..., : x0.shape[-1]].astype(wide) - noise.astype(wide)) ** 2)
