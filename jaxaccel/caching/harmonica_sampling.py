"""Sampling with reused branch outputs: one schedule, three ways to execute it.

    implementation   what is compiled                            when
    "static"         one step for each *distinct* row            the fastest; a schedule that stays
    "cond"           one step, flags are data, `lax.cond`        schedules change from call to call
    "reference"      one step that computes all and selects      to check the other two; saves nothing

All three give the same samples bit for bit where the compiler treats the network's pieces alike, which the tests check
on CPU.

``"static"`` is a loop on the host over jitted steps. The row is a static argument and the step's number is data, so
that rows that are equal share one compiled step: compile time grows with the number of distinct rows, not with T. What
a row reuses is not in its program at all. The cache is handed on without a copy, as each step gives its own away.
Inside a ``jax.jit`` of the caller the loop is unrolled into that program, which then holds all T steps; leave the call
outside where compile time matters. Modulations that depend on time and label only are best worked out for all steps
ahead and passed as ``cond``, see `jaxaccel.models.dit_modulation`.

Source of the execution: Huang et al., HarmoniCa, arXiv 2410.01723, and Ma et al., Learning-to-Cache, arXiv 2406.01733.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.caching.reuse import Cache, DenoiseFn, ReuseSchedule, Sampler, empty_cache, write_cache

IMPLEMENTATIONS = ("static", "cond", "reference")


# The cache is given away: a step that writes a part of it does so in place.
@functools.partial(jax.jit, static_argnames=("apply_fn", "step", "row"), donate_argnames=("cache",))
def _static_step(
    params: Any, x: Array, i: Any, cond: Any, cache: Any, *, apply_fn: DenoiseFn, step: Any, row: tuple[bool, ...]
) -> tuple[Array, Any]:
    out, cache = apply_fn(params, x, i, cond, cache=cache, compute=row)
    return step(x, jax.lax.optimization_barrier(out), i), cache


@functools.partial(jax.jit, static_argnames=("apply_fn", "step", "select"))
def _scanned(params: Any, x: Array, cond: Any, flags: Array, *, apply_fn: DenoiseFn, step: Any, select: bool) -> Array:
    def body(carry: tuple[Array, Cache], now: tuple[Array, Array]) -> tuple[tuple[Array, Cache], None]:
        (x, cache), (i, row) = carry, now
        # Booleans as weights select; a compiler may round even c·0 + f·1 otherwise than f.
        how: dict[str, Any] = {"weights": row} if select else {"compute": row}
        out, cache = apply_fn(params, x, i, cond, cache=cache, **how)
        return (step(x, jax.lax.optimization_barrier(out), i), cache), None

    steps = jnp.arange(flags.shape[0], dtype=jnp.int32)
    start = (x, empty_cache(apply_fn, params, x, cond))
    return jax.lax.scan(body, start, (steps, flags), reverse=True)[0][0]


def sample(
    apply_fn: DenoiseFn,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    *,
    schedule: Any,
    sampler: Sampler,
    implementation: str = "static",
) -> Float[Array, "B ..."]:
    """Sample from noise, reusing branch outputs where the schedule says so.

    Args:
        apply_fn: the network, see `jaxaccel.caching.DenoiseFn`. It is a static argument of compiled functions, so pass
            the same object each time; guidance is its own matter.
        params: of the network.
        x: noise.
        cond: labels, prompts, or ``None``.
        schedule: a `ReuseSchedule`.
        sampler: its step, number of steps and name. Its ``step`` is a static argument as well.
        implementation: ``"static"``, ``"cond"`` or ``"reference"``, see the module.

    Returns:
        The sample. With a schedule that computes everything it is the plain sampler's.

    Raises:
        ValueError: if the schedule is for another number of steps or sampler, or ``implementation`` is unknown.

    Example:
        >>> from jaxaccel.caching import Sampler, reuse_branch, uniform_schedule
        >>> def network(params, x, i, cond, *, cache=None, weights=None, compute=None):
        ...     out = reuse_branch(lambda x: params * x, x, 0, cache=cache, weights=weights, compute=compute)
        ...     return out, (out,)
        >>> sampler = Sampler(lambda x, out, i: x - out, num_steps=3)
        >>> every_second = uniform_schedule(3, 1, interval=2)
        >>> sample(network, 0.5, jnp.ones(1), None, schedule=every_second, sampler=sampler).tolist()
        [0.0]
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if not isinstance(schedule, ReuseSchedule):
        raise ValueError(f"schedule must be a ReuseSchedule, got {type(schedule).__name__}")
    schedule.check(sampler)
    if implementation != "static":
        flags = jnp.asarray(np.asarray(schedule))
        select = implementation == "reference"
        return _scanned(params, x, cond, flags, apply_fn=apply_fn, step=sampler.step, select=select)
    cache = None
    for i in reversed(range(schedule.num_steps)):
        row = schedule.rows[i]
        # A row that computes everything reads no cache; without one it is the first step's program.
        before = None if all(row) else cache
        x, cache = _static_step(params, x, np.int32(i), cond, before, apply_fn=apply_fn, step=sampler.step, row=row)
    return x


def soft_sample(
    apply_fn: DenoiseFn,
    params: Any,
    x: Float[Array, "B ..."],
    cond: Any,
    *,
    weights: Float[Array, "T NB"],
    sampler: Sampler,
    threshold: Any = 0.1,
) -> Float[Array, "B ..."]:
    """Sample with branch outputs mixed by weights, as in training of a router.

    Args:
        apply_fn: the network.
        params: of the network.
        x: noise.
        cond: labels, prompts, or ``None``.
        weights: 1 takes the computed output, 0 the cached one; the first executed row, T − 1, counts as ones.
        sampler: with T steps.
        threshold: an entry of the cache is replaced by the mixed output where its weight is above.

    Raises:
        ValueError: if ``weights`` has another number of steps than the sampler.
    """
    if weights.shape[0] != sampler.num_steps:
        raise ValueError(f"weights must have {sampler.num_steps} rows, one a step, got shape {weights.shape}")
    weights = weights.at[-1].set(1)

    def body(carry: tuple[Array, Cache], now: tuple[Array, Array]) -> tuple[tuple[Array, Cache], None]:
        (x, cache), (i, row) = carry, now
        out, outputs = apply_fn(params, x, i, cond, cache=cache, weights=row)
        return (step(x, out, i), write_cache(row > threshold, outputs, cache)), None

    step = sampler.step
    steps = jnp.arange(sampler.num_steps, dtype=jnp.int32)
    start = (x, empty_cache(apply_fn, params, x, cond))
    return jax.lax.scan(body, start, (steps, weights), reverse=True)[0][0]
