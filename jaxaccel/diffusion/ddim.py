"""DDIM: samples from a network that predicts noise, in as many steps as one pays for.

    x̂₀ = (x − √(1−ᾱ) ε) / √ᾱ,   σ² = η² (1−ᾱ′)/(1−ᾱ) (1 − ᾱ/ᾱ′)
    x′ = √ᾱ′ x̂₀ + √(1−ᾱ′−σ²) ε + σ z,   ᾱ′ of the next step; ᾱ′ = 1 at the end

Steps are counted by noise: sampling visits i = T−1, …, 0. With η = 0 (the default) nothing is random but the start, and
the same start gives nearly the same sample with more steps or fewer; η = 1 is DDPM's ancestral sampling.

When to use it: 10 to 50 steps, or where two ways of computing the network are compared from equal noise. When not:
higher-order solvers need fewer steps still for the same samples.

Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, equations 12 and 16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxaccel.diffusion.schedules import NoiseSchedule


def _check_clip(clip: Any) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, expected None or a positive number")


def _same(x: Array, eps: Array, name: str = "eps") -> None:
    if eps.shape != x.shape:
        raise ValueError(
            f"{name} has shape {eps.shape}, expected that of x {x.shape}; of a network that also gives variances, "
            "take the first channels"
        )


def add_noise(
    schedule: NoiseSchedule, x0: Float[Array, "B ..."], noise: Float[Array, "..."], i: Any
) -> Float[Array, "B ..."]:
    """Noisy samples of a step: x = √ᾱ x₀ + √(1−ᾱ) ε.

    Args:
        schedule: noise levels.
        x0: data.
        noise: standard normal, as ``x0``.
        i: step, a number or one per sample [B]; a traced one out of range gives NaN.

    Returns:
        As ``x0``; half precision is worked in float32.

    Raises:
        ValueError: for a step out of range, or another shape of noise.

    >>> from jaxaccel.diffusion import noise_schedule
    >>> print(jnp.round(10 * add_noise(noise_schedule([0.36]), jnp.ones((1, 2)), jnp.ones((1, 2)), 0)))
    [[14. 14.]]
    """
    _same(x0, noise, "noise")
    signal = schedule.look_up(schedule.table("signal"), i, x0)
    level = schedule.look_up(schedule.table("noise"), i, x0)
    return (signal * x0 + level * noise).astype(x0.dtype)


def predict_x0(
    schedule: NoiseSchedule, x: Float[Array, "B ..."], eps: Float[Array, "..."], i: Any, *, clip: Any = None
) -> Float[Array, "B ..."]:
    """What the sample would be if ε were right: x̂₀ = (x − √(1−ᾱ) ε)/√ᾱ.

    At the noisiest step √ᾱ is 0.006 for linear β: errors of ε grow 157 times there.

    Args:
        schedule: noise levels.
        x: noisy samples.
        eps: predicted noise.
        i: step, a number or one per sample [B]; a traced one out of range gives NaN.
        clip: keep x̂₀ in [−clip, clip]; not at all by default.

    Returns:
        As ``x``.

    Raises:
        ValueError: for a step out of range, another shape of ``eps``, ``clip`` ≤ 0.

    >>> from jaxaccel.diffusion import noise_schedule
    >>> x = jnp.array([[1.4]])
    >>> predict_x0(noise_schedule([0.36]), x, jnp.ones((1, 1)), 0).round(3).tolist()
    [[1.0]]
    """
    return _wide_x0(schedule, x, eps, i, clip).astype(x.dtype)


def _wide_x0(schedule: NoiseSchedule, x: Array, eps: Array, i: Any, clip: Any) -> Array:
    _check_clip(clip)
    _same(x, eps)
    noise = schedule.look_up(schedule.table("noise"), i, x)
    x0 = (x - noise * eps) / schedule.look_up(schedule.table("signal"), i, x)
    return x0 if clip is None else jnp.clip(x0, -clip, clip)


def ddim_step(
    schedule: NoiseSchedule,
    x: Float[Array, "B ..."],
    eps: Float[Array, "..."],
    i: Any,
    *,
    eta: Any = 0.0,
    key: Key[Array, ""] | None = None,
    clip: Any = None,
) -> Float[Array, "B ..."]:
    """One step of DDIM from noise level i to i − 1, or to the sample from i = 0.

    Args:
        schedule: the steps that sampling visits; a constant, not an argument, of a compiled function.
        x: noisy samples [B, ...].
        eps: predicted noise, as ``x``.
        i: step, a number or one per sample [B]; a traced one out of range gives NaN.
        eta: share of fresh noise, 0 … 1; static.
        key: of the fresh noise; needed if ``eta`` > 0.
        clip: keep x̂₀ in [−clip, clip], and use the ε that belongs to it; not at all by default.

    Returns:
        As ``x``; half precision is worked in float32.

    Raises:
        ValueError: for a step out of range, ``eta`` outside [0, 1] or without a key, ``clip`` ≤ 0, another shape of
            ``eps``.

    >>> from jaxaccel.diffusion import noise_schedule
    >>> ddim_step(noise_schedule([0.36]), jnp.array([[1.4]]), jnp.ones((1, 1)), 0).round(3).tolist()
    [[1.0]]
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number in [0, 1]")
    if eta > 0 and key is None:
        raise ValueError(f"eta is {eta}, but there is no key for its noise")
    x0 = _wide_x0(schedule, x, eps, i, clip)
    if clip is not None:
        signal, noise = (schedule.look_up(schedule.table(name), i, x) for name in ("signal", "noise"))
        eps = (x - signal * x0) / noise
    alpha, later = schedule.table("alpha"), schedule.table("alpha_next")
    variance = eta**2 * (1 - later) / (1 - alpha) * (1 - alpha / later)
    # The rounding of 1 − ᾱ′ − σ² may end below 0 where η is 1.
    direction = np.sqrt(np.maximum(1 - later - variance, 0))
    out = schedule.look_up(np.sqrt(later), i, x) * x0 + schedule.look_up(direction, i, x) * eps
    if eta > 0:
        assert key is not None
        out = out + schedule.look_up(np.sqrt(variance), i, x) * jax.random.normal(key, x.shape, out.dtype)
    return out.astype(x.dtype)


def ddim_sample(
    eps_fn: Callable[[Any, Any], Any],
    schedule: NoiseSchedule,
    noise: Float[Array, "B ..."],
    *,
    eta: Any = 0.0,
    key: Key[Array, ""] | None = None,
    clip: Any = None,
) -> Float[Array, "B ..."]:
    """All steps, i = T−1 … 0, as one loop whose body is compiled once.

    Args:
        eps_fn: ``(x, i) -> eps``, ``i`` a traced int32 step; `NoiseSchedule.timestep` is the network's time step.
        schedule: the steps to visit.
        noise: standard normal [B, ...], the start.
        eta: as for `ddim_step`.
        key: as for `ddim_step`.
        clip: as for `ddim_step`.

    Returns:
        Samples, as ``noise``.

    Raises:
        ValueError: as `ddim_step`.

    >>> from jaxaccel.diffusion import linear_betas, noise_schedule, respace, uniform_timesteps
    >>> schedule = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, 4))
    >>> alphas = jnp.asarray(schedule.alphas_cumprod)
    >>> exact = lambda x, i: (x - jnp.sqrt(alphas[i]) * 3.0) / jnp.sqrt(1 - alphas[i])  # all data are 3
    >>> ddim_sample(exact, schedule, jnp.array([[0.5, -1.0]])).round(2).tolist()
    [[3.0, 3.0]]
    """
    if eta and key is None:
        raise ValueError(f"eta is {eta}, but there is no key for its noise")

    def step(x: Array, i: Array) -> tuple[Array, None]:
        own = None if key is None else jax.random.fold_in(key, i)
        return ddim_step(schedule, x, eps_fn(x, i), i, eta=eta, key=own, clip=clip), None

    return jax.lax.scan(step, noise, jnp.arange(schedule.num_steps - 1, -1, -1, dtype=jnp.int32))[0]
