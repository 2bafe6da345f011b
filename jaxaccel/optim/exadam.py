"""EXAdam: Adam with corrections that cross its two moments, and the raw gradient added to the numerator.

It is meant to make training cheaper by needing fewer epochs to a target loss, at Adam's memory.

With the gradient g, at step t = 1, 2, ...:

    m ← b1·m + (1 − b1)·g                     first moment
    v ← b2·v + (1 − b2)·g²                    second moment
    d1 = 1 + b2^t · v / (v + eps)             correction of the first moment, made from the second
    d2 = 1 + b1^t · m² / (m² + eps)           correction of the second moment, made from the first
    u = (m + g)·d1 / (1 − b1^t) / (√(v·d2 / (1 − b2^t)) + eps)
    θ ← θ − α_t·u                             version 2: α_t = lr;  version 1: α_t = lr·½·ln(2·(t + 1))

Ahmed M. Adly, *EXAdam: The Power of Adaptive Cross-Moments*, arXiv 2412.20302. Version 2 is the default here.

**Read this before replacing Adam.** For a constant gradient far above √eps, Adam's step is lr. EXAdam's is 15.95·lr at
t = 1, 9.30·lr at t = 2, 4.35·lr at t = 10, 3.92·lr at t = 40, and it falls to 2·lr as b2^t fades. At an equal learning
rate EXAdam is therefore a warmer Adam with a burst at the start; compare it with Adam at Adam's own best rate. When
replacing Adam, divide the learning rate by about four, or use a warm-up. The corrections also break Adam's indifference
to the scale of the gradient: where |g| is far below √eps (1e-4 by default) d1 and d2 fall to 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxaccel.optim import _checks

STEP_GROWTHS = ("none", "log")


class ScaleByExadamState(NamedTuple):
    """State of `scale_by_exadam`.

    Attributes:
        count: steps taken.
        mu: moving average of the gradient.
        nu: moving average of the squared gradient.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # int32; the name hides tuple.count, as in optax
    mu: Any  # the parameters' shapes; mu_dtype, else the parameters' dtypes
    nu: Any  # the parameters' shapes; float32, or the parameter's dtype where that is wider


def _scaled(
    numerator: Float[Array, "*shape"],
    nu: Float[Array, "*shape"],
    bias1: Float[ArrayLike, ""],
    bias2: Float[ArrayLike, ""],
    d1: Float[ArrayLike, "*#shape"],
    d2: Float[ArrayLike, "*#shape"],
    eps: Any,
) -> Float[Array, "*shape"]:
    """Return (numerator/bias1)·d1 / (√((nu/bias2)·d2) + eps); with numerator = m and d1 = d2 = 1 this is Adam."""
    second = (nu / bias2) * d2
    # √ has an infinite slope at 0, which would turn gradients taken through a training step into NaN at dead units.
    positive = second > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, second, 1.0)), 0.0)
    return (numerator / bias1) * d1 / (root + eps)


@functools.partial(jax.jit, inline=True)
def _power(decay: Any, count: Int[Array, ""]) -> Float[Array, ""]:
    """Return decay^count; compiled even when called eagerly, so that both agree, and agree with optax, to the bit."""
    return decay**count


def _log_growth(step: Float[Array, ""]) -> Float[Array, ""]:
    """Return version 1's factor ½·ln(2·(t + 1)); t is a float, because a saturated int32 counter would wrap around."""
    return 0.5 * jnp.log(2.0 * (step + 1.0))


def scale_by_exadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    step_growth: str = "none",
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """Rescale gradients to EXAdam's direction (not negated, without the learning rate).

        m ← b1·m + (1 − b1)·g,    v ← b2·v + (1 − b2)·g²
        d1 = 1 + b2^t · v/(v + eps),    d2 = 1 + b1^t · m²/(m² + eps)
        u = (m + g)·d1/(1 − b1^t) / (√(v·d2/(1 − b2^t)) + eps)

    Source: EXAdam, arXiv 2412.20302, version 2 (version 1 with ``step_growth="log"``).

    Use it inside an ``optax.chain`` of your own; `exadam` is the ready-made optimizer. Do not expect it to beat an Adam
    whose learning rate has been tuned: at an equal rate its steps are two to sixteen times larger (see the module).

    All arithmetic is at least float32, and so is ``nu``: near convergence v changes by a fraction 1 − b2 = 0.001 per
    step, less than half a unit in the last place of bfloat16, so a bfloat16 ``nu`` would stand still.

    Args:
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to three denominators, > 0. Zero is refused because v/(v + 0) is NaN at units that never fire.
        step_growth: ``"none"`` (version 2) or ``"log"``: multiply the direction by ½·ln(2·(t + 1)), without bound.
        mu_dtype: dtype of the stored first moment; ``None`` keeps the parameters' dtypes.

    Returns:
        A transformation with state `ScaleByExadamState`. Updates keep the dtypes of the gradients.

    Raises:
        ValueError: if a rate or eps is out of range, ``step_growth`` is unknown, or (in ``update``) the gradients do
            not match the state leaf by leaf.
        TypeError: if ``mu_dtype``, a parameter or a gradient is not real floating point; the leaf is named.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_exadam()
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> direction, state = tx.update({"w": jnp.array([0.5, -2.0])}, state)
    >>> [round(float(x), 1) for x in direction["w"]]  # the first step: about 16 learning rates per coordinate
    [16.0, -16.0]
    """
    _checks.check_beta("b1", b1)
    _checks.check_beta("b2", b2)
    _checks.check_positive("eps", eps, "; with eps=0 a unit without gradient gives 0/0")
    _checks.check_choice("step_growth", step_growth, STEP_GROWTHS)
    mu_dtype = _checks.floating_dtype("mu_dtype", mu_dtype)

    def init(params: Any) -> ScaleByExadamState:
        _checks.check_floating_tree("params", params)
        # zeros_like keeps the sharding of the parameters.
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params)
        return ScaleByExadamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: ScaleByExadamState, params: Any = None) -> tuple[Any, ScaleByExadamState]:
        del params
        _checks.check_floating_tree("updates", updates)
        _checks.check_same_structure("updates", updates, "the state", state.nu)
        count = optax.safe_increment(state.count)
        gradients = optax.tree.cast_like(updates, state.nu)  # fuses with what follows, costs nothing under jit
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        # The powers are formed once, at full precision; each leaf then reads scalars.
        power1, power2 = _power(b1, count), _power(b2, count)
        growth = _log_growth(jnp.asarray(count, float)) if step_growth == "log" else None

        def leaf(u: Array, g: Array, m: Array, v: Array) -> Array:
            p1, p2, e = (jnp.asarray(x, v.dtype) for x in (power1, power2, eps))
            bias1, bias2 = (jnp.asarray(1 - x, v.dtype) for x in (power1, power2))
            square = m * m
            d1 = 1 + p2 * (v / (v + e))
            d2 = 1 + p1 * (square / (square + e))
            direction = _scaled(m + g, v, bias1, bias2, d1, d2, e)
            if growth is not None:
                direction = direction * growth.astype(v.dtype)
            return direction.astype(u.dtype)

        # One pass over the leaves, so that each becomes one fused loop.
        direction = jax.tree.map(leaf, updates, gradients, mu, nu)
        return direction, ScaleByExadamState(
            count, optax.tree.cast_like(mu, state.mu), optax.tree.cast_like(nu, state.nu)
        )

    return optax.GradientTransformation(init, update)


def exadam(
    learning_rate: ArrayLike | optax.Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    step_growth: str = "none",
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    """Return the EXAdam optimizer, with decoupled weight decay.

        θ ← θ − lr·(u + weight_decay·θ),    u from `scale_by_exadam`

    Source: EXAdam, arXiv 2412.20302. Weight decay is the reference code's, the paper has none. With
    ``step_growth="log"`` the logarithm multiplies u but not the decay, so the decay weakens relative to the steps.

    When: a drop-in trial where Adam's learning rate was never tuned and is known to be low. When not: if you can tune
    the rate, or already did; Adam at three to four times the learning rate then does the same. The first step moves
    each coordinate by about 16 learning rates: use a warm-up, or a quarter of Adam's rate.

    Args:
        learning_rate: a number >= 0 or an optax schedule.
        b1: decay rate of the first moment, in [0, 1).
        b2: decay rate of the second moment, in [0, 1).
        eps: added to three denominators, > 0.
        step_growth: ``"none"`` (version 2 of the paper) or ``"log"`` (version 1: steps grow as ½·ln(2·(t + 1))).
        weight_decay: a number >= 0 or a schedule.
        mask: which leaves decay: a tree of booleans, or a function of the parameters, as in ``optax.adamw``.
        mu_dtype: dtype of the stored first moment; ``None`` keeps the parameters' dtypes.

    Returns:
        A transformation to be used with ``optax.apply_updates``. Under ``optax.inject_hyperparams`` name the arguments
        that are no numbers: ``static_args=("mask", "mu_dtype")``; with bfloat16 parameters also pass
        ``hyperparam_dtype=jnp.float32`` there, since 0.999 rounds to 1 in bfloat16.

    Raises:
        ValueError: if a number is out of range or ``step_growth`` is unknown.
        TypeError: if a parameter or gradient is not real floating point.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
    >>> tx, w = exadam(0.02), jnp.zeros(2)
    >>> state = tx.init(w)
    >>> step = jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
    >>> for _ in range(100):
    ...     updates, state = step(w, state)
    ...     w = optax.apply_updates(w, updates)
    >>> bool(loss(w) < 0.05)
    True
    """
    _checks.check_learning_rate(learning_rate)
    _checks.check_non_negative("weight_decay", weight_decay)
    # A weight decay that is known to be zero must not ask for parameters that it does not read.
    no_decay = mask is None and _checks.concrete(weight_decay) == 0.0
    return optax.chain(
        scale_by_exadam(b1, b2, eps, step_growth=step_growth, mu_dtype=mu_dtype),
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def exadam_v1_schedule(learning_rate: ArrayLike | optax.Schedule) -> optax.Schedule:
    """Return version 1's growing rate as a schedule, for use with another optimizer.

        count → lr·½·ln(2·(count + 2)),    count = t − 1 = 0, 1, ...

    Source: EXAdam, arXiv 2412.20302, version 1. The rate is 0.69·lr at first, 2.65·lr after 100 steps and grows
    without bound; version 2 of the paper dropped it. Use it to tell the growth's effect from the rest of EXAdam's; do
    not add it to ``exadam(..., step_growth="log")``, which has it already.

    Args:
        learning_rate: a number >= 0 or an optax schedule that is to be multiplied.

    Returns:
        An optax schedule: count, int [] → rate, float [].

    Raises:
        ValueError: if a learning rate given as a number is negative or not finite.

    >>> import optax
    >>> rate = exadam_v1_schedule(1e-3)
    >>> round(float(rate(0)), 6), round(float(rate(99)), 6)
    (0.000693, 0.002654)
    >>> tx = optax.adam(rate)
    """
    _checks.check_learning_rate(learning_rate)

    def schedule(count: Any) -> Any:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return rate * _log_growth(jnp.asarray(count, float) + 1.0)

    return schedule
