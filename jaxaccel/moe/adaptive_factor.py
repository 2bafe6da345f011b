"""The factor on the chunk-sparsification loss: it falls while that loss falls, and rises, up to a cap, when it rises.

For N_st steps the factor is constant. From then on, every N_adj steps, it is scaled by

    r = (mean loss of the last N_adj steps)/(mean loss of the N_adj steps before),   r ← max(min_ratio, r) if r > 1,
    r ← min(max_factor·λ₀/λ, r)

and the change is spread evenly over the N_adj steps that follow.

The paper's equation jumps, has no cap, and leaves open which loss goes in; its code is followed: linear, capped, and
the loss is L_cs without its factor (divided by the number of accumulation steps where gradients are accumulated).

Song et al., BlockFFN, 2025, arXiv 2507.08771, equation 7.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxaccel.moe._checks import check_count

__all__ = ["AdaptiveFactor", "AdaptiveFactorState", "adaptive_factor"]


class AdaptiveFactorState(NamedTuple):
    """Arrays only: it can be carried through ``jit`` and saved in a checkpoint."""

    step: Any  # i32[], steps done
    start: Any  # f32[], factor at the start of the current segment
    ratio: Any  # f32[], what the segment ends at, over its start
    origin: Any  # i32[], step at which the segment began
    length: Any  # i32[], its steps
    total: Any  # f32[], sum of the losses of the current window
    before: Any  # f32[], mean loss of the window before


class AdaptiveFactor(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[], AdaptiveFactorState]
    update: Callable[[AdaptiveFactorState, Any], tuple[Float[Array, ""], AdaptiveFactorState]]


def adaptive_factor(
    init_value: float = 5e-2,
    *,
    stable_steps: int = 1000,
    adjust_every: int = 100,
    max_factor: float = 4.0,
    min_ratio: float = 1.025,
) -> AdaptiveFactor:
    """Make the factor of `chunk_sparsification_loss`.

    ``init()`` gives the state; ``update(state, loss)`` takes the mean L_cs over layers of this step and gives the
    factor of this very step, and the state after. The factor of a step does not depend on the loss of that step, so
    that ``λ·loss`` may be differentiated with λ taken as a constant (use `jax.lax.stop_gradient` on ``loss``).

    Where the mean loss of the window before is not positive (no expert was used at all) there is no ratio, and the
    factor stays. A NaN loss makes the factor NaN from the next adjustment on: it shows.

    Args:
        init_value: λ₀ > 0; the paper has 5e-2, and 1e-1 for its 2.8B model.
        stable_steps: N_st, steps of a constant factor, at least 2·``adjust_every``: two windows are compared.
        adjust_every: N_adj, steps of a window.
        max_factor: the factor never exceeds ``max_factor``·λ₀; at least 1. The scripts have 4, the code's default is 2.
        min_ratio: the least rise, where the loss rises; at least 1.

    Returns:
        The pair (init, update).

    Raises:
        ValueError: for steps below 1, ``stable_steps`` below 2·``adjust_every``, numbers out of range.
        TypeError: for steps that are no integers.

    >>> factor = adaptive_factor(0.1, stable_steps=4, adjust_every=2)
    >>> state, values = factor.init(), []
    >>> for loss in (1.0, 1.0, 0.5, 0.5, 0.5, 0.5):
    ...     value, state = factor.update(state, jnp.float32(loss))
    ...     values.append(round(float(value), 3))
    >>> values  # half the loss: from step 4 on it goes to half within two steps
    [0.1, 0.1, 0.1, 0.1, 0.075, 0.05]
    """
    check_count("stable_steps", stable_steps)
    check_count("adjust_every", adjust_every)
    if stable_steps < 2 * adjust_every:
        raise ValueError(
            f"stable_steps is {stable_steps}, expected at least 2·adjust_every = {2 * adjust_every}: the first "
            "adjustment compares two windows"
        )
    if not 0 < init_value < math.inf:
        raise ValueError(f"init_value is {init_value}, expected a positive finite number")
    for name, number in (("max_factor", max_factor), ("min_ratio", min_ratio)):
        if not 1 <= number < math.inf:
            raise ValueError(f"{name} is {number}, expected a finite number of at least 1")

    def init() -> AdaptiveFactorState:
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return AdaptiveFactorState(
            count, zero + init_value, zero + 1, count, count + stable_steps, zero, jnp.full((), jnp.nan, jnp.float32)
        )

    def update(state: AdaptiveFactorState, loss: Any) -> tuple[Float[Array, ""], AdaptiveFactorState]:
        step = state.step + 1
        done = jnp.minimum((state.step - state.origin) / state.length, 1).astype(jnp.float32)
        value = state.start * (state.ratio + (1 - state.ratio) * (1 - done))
        total = state.total + jnp.asarray(loss, jnp.float32)
        mean = total / adjust_every
        window_ends = step % adjust_every == 0
        adjust = window_ends & (step >= stable_steps)
        ratio = jnp.where(state.before <= 0, 1, mean / state.before)  # NaN passes
        ratio = jnp.where(ratio > 1, jnp.maximum(ratio, min_ratio), ratio)
        ratio = jnp.minimum(ratio, init_value * max_factor / value)
        return value, AdaptiveFactorState(
            step,
            jnp.where(adjust, value, state.start),
            jnp.where(adjust, ratio, state.ratio),
            jnp.where(adjust, state.step, state.origin),
            jnp.where(adjust, adjust_every, state.length),
            jnp.where(window_ends, 0, total),
            jnp.where(window_ends, mean, state.before),
        )

    return AdaptiveFactor(init, update)
