"""Denoising steps that reuse the last full step's blocks: one array is all there is to remember.

A head whose blocks have no gates (CogACT's: no adaLN, the condition is a token) adds its branches to the stream as they
are, z ← z + a_b + m_b. If all branches are reused, what is added is one sum,

    R = Σ_b (a_b + m_b) = z_out − z_in   of the last full step,

so that the cache is R, not two arrays a block, and a reused step is the last layer on embed(x) + R: no block is in it,
and the time step does not matter. It equals a cache of every branch up to rounding.

Step k = 0, 1, … is computed in full where k mod N = 0. The paper also writes "t mod N = 0", which is the same only
where N divides the number of steps; the steps counted from the start are meant.

For heads with gates (adaLN) R would change with the gates, z_out = z_in + Σ_b g_b(t) C_b: keep a cache of each branch
(`jaxaccel.caching.reuse`, with `uniform_schedule` of the same interval).

When to use it: few-step samplers of action heads, N = 2 … 5. When not: heads with gates; long samplers whose steps
differ much.

Yang et al., EfficientVLA, arXiv 2506.10100, section 3.4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.diffusion import NoiseSchedule, ddim_step, double_batch, guide


def cache_schedule(num_steps: Any, *, interval: Any) -> tuple[bool, ...]:
    """Which denoising steps are computed in full: 0, N, 2N and so on.

    Args:
        num_steps: T, at least 1.
        interval: N, at least 1; 1 computes all, T and more only the first.

    Raises:
        ValueError: for numbers below 1.

    >>> cache_schedule(5, interval=3)
    (True, False, False, True, False)
    """
    for name, value in (("num_steps", num_steps), ("interval", interval)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value}, expected a whole number of at least 1")
    return tuple(step % interval == 0 for step in range(num_steps))


def _groups(flags: tuple[bool, ...]) -> list[tuple[int, int]]:
    """Runs of equal groups: (number of groups, steps of each)."""
    starts = [k for k, full in enumerate(flags) if full]
    sizes = np.diff([*starts, len(flags)]).tolist()
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1] = (runs[-1][0] + 1, size)
        else:
            runs.append((1, size))
    return runs


@dataclasses.dataclass(frozen=True)
class DDIM:
    """A sampler with the steps of ``schedule`` and no fresh noise.

    Raises:
        ValueError: through `jaxaccel.diffusion.NoiseSchedule`.
    """

    schedule: NoiseSchedule
    """Noise levels and the network's time steps."""

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    def timestep(self, i: Array) -> Array:
        """The network's time step of step i."""
        return self.schedule.timestep(i)

    def step(self, x: Array, eps: Array, i: Array) -> Array:
        """From noise level i to i − 1."""
        return ddim_step(self.schedule, x, eps, i)


def sample_actions(
    apply_full: Callable[..., tuple[Any, Any]],
    apply_reuse: Callable[..., Any],
    params: Any,
    noise: Float[Array, "..."],
    cond: Any,
    *,
    schedule: Any,
    sampler: Any,
    cfg_scale: Any = None,
    null: Any = None,
) -> Float[Array, "..."]:
    """Sample with full and reused steps: a scan over groups of one full step and N − 1 cheap ones.

    Args:
        apply_full: ``(params, x, t, cond) -> (eps, residual)``; the residual may be any tree of arrays.
        apply_reuse: ``(params, x, residual) -> eps``.
        params: of both.
        noise: the start [B, ...].
        cond: a tree of arrays [B, ...].
        schedule: from `cache_schedule`: bools, first step to last; the first must be ``True``.
        sampler: has ``num_steps``, ``timestep(i)`` and ``step(x, eps, i)``, i = T − 1 … 0: `DDIM`.
        cfg_scale: s of classifier-free guidance; ``None`` for no second half. Both halves have the same noise, and a
            residual of their own.
        null: the condition that stands for none, as for `jaxaccel.diffusion.double_batch`; needed with ``cfg_scale``.

    Returns:
        As ``noise``.

    Raises:
        ValueError: for a schedule of another length than the sampler's, or one whose first step is not full;
            ``cfg_scale`` without ``null``.

    >>> from jaxaccel.diffusion import noise_schedule
    >>> full = lambda params, x, t, cond: (x + cond, cond)
    >>> reuse = lambda params, x, residual: x + residual
    >>> steps = dict(schedule=cache_schedule(2, interval=2), sampler=DDIM(noise_schedule([0.1, 0.2])))
    >>> sample_actions(full, reuse, None, jnp.ones((1, 2)), jnp.zeros((1, 2)), **steps).shape
    (1, 2)
    """
    flags = tuple(bool(flag) for flag in schedule)
    if len(flags) != sampler.num_steps:
        raise ValueError(f"schedule has {len(flags)} steps, expected {sampler.num_steps} as sampler")
    if not flags[0]:
        raise ValueError("schedule starts with a reused step, but there is nothing to reuse yet")
    if cfg_scale is not None and null is None:
        raise ValueError(f"cfg_scale is {cfg_scale}, but null is None: guidance needs a condition that stands for none")
    rows = noise.shape[0]
    if cfg_scale is not None:
        _, cond = double_batch(noise, cond, null)

    def both(x: Array) -> Array:
        return x if cfg_scale is None else jnp.concatenate([x, x])

    def advance(x: Array, eps: Array, i: Array) -> Array:
        eps = eps if cfg_scale is None else guide(eps, cfg_scale)[:rows]
        return sampler.step(x, eps.astype(x.dtype), i)

    x, done = noise, 0
    for count, size in _groups(flags):

        def group(x: Array, first: Array, size: int = size) -> tuple[Array, None]:
            t = jnp.broadcast_to(sampler.timestep(first), both(x).shape[:1])
            eps, residual = apply_full(params, both(x), t, cond)
            x = advance(x, eps, first)

            def cheap(k: Any, x: Array) -> Array:
                return advance(x, apply_reuse(params, both(x), residual), first - k)

            return (jax.lax.fori_loop(1, size, cheap, x) if size > 1 else x), None

        firsts = len(flags) - 1 - done - size * np.arange(count, dtype=np.int32)
        x, _ = group(x, jnp.int32(firsts[0])) if count == 1 else jax.lax.scan(group, x, jnp.asarray(firsts))
        done += count * size
    return x
