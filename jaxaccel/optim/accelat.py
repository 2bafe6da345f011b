"""AccelAT: lower the learning rate when the moving average of the accuracy stops rising.

It is meant to make adversarial training cheaper: fewer epochs to a robust accuracy. Nothing in it is special to
adversarial training; it needs one validation accuracy per epoch.

At the end of epoch n = 1, 2, ..., with the validation accuracy aₙ, window W, quiet time Q and threshold τ:

    Mₙ = mean of the last W accuracies
    lower the rate if  n > W + 1  and more than Q epochs passed since the last time  and  Mₙ − Mₙ₋₁ < τ:
        lr ← max(ρ·lr, lr_min)

Once the window is full, Mₙ − Mₙ₋₁ = (aₙ − aₙ₋W)/W: the "accuracy gradient" is the slope of a secant over W epochs.
With the defaults the rate falls when accuracy rose by less than 2.5 points in five epochs, and also when it fell. Rates
never rise again.

F. Nikfam, A. Marchisio, M. Martina, M. Shafique, *AccelAT: A Framework for Accelerating the Adversarial Training of
Deep Neural Networks through Accuracy Gradient*, IEEE Access 10, 2022, arXiv 2210.06888.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxaccel.optim import _checks

# A rise that misses the threshold only by the rounding of float32 accuracies (half a unit in the last place below 1 for
# each of two) counts as reaching it.
ROUNDING = 2.0**-22


@dataclasses.dataclass(frozen=True)
class AccelATConfig:
    """When and how much to lower the learning rate; the defaults are the reference code's.

    Attributes:
        learning_rate: start rate, > 0.
        factor: ρ, what the rate is multiplied with, in (0, 1).
        min_learning_rate: the rate never falls below this; in [0, learning_rate].
        window: W, epochs in the moving average, >= 1.
        quiet: Q, fewest epochs between two reductions, >= 0.
        threshold: τ, lower the rate if the moving average rises by less than this per epoch. Accuracies are fractions.

    Raises:
        ValueError: if a value is out of its range.

    >>> AccelATConfig(learning_rate=0.1).factor
    0.8
    """

    learning_rate: float = 1e-3
    factor: float = 0.8
    min_learning_rate: float = 1e-6
    window: int = 5
    quiet: int = 5
    threshold: float = 0.005

    def __post_init__(self) -> None:
        _checks.check_positive("learning_rate", self.learning_rate)
        _checks.check_fraction("factor", self.factor)
        _checks.check_non_negative("min_learning_rate", self.min_learning_rate)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be at most learning_rate={self.learning_rate}, "
                f"got min_learning_rate={self.min_learning_rate}"
            )
        if self.window < 1:
            raise ValueError(f"window must be >= 1, got window={self.window}")
        if self.quiet < 0:
            raise ValueError(f"quiet must be >= 0, got quiet={self.quiet}")
        if not np.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, got threshold={self.threshold}")


class AccelATState(NamedTuple):
    """State of the controller: plain arrays, so that any checkpoint library can store it.

    Attributes:
        learning_rate: the rate to use in the coming epoch.
        history: ring buffer of the last ``window`` accuracies; epoch n is in place (n − 1) mod window.
        prev_mean: mean of the accuracies in the buffer (0 before the first epoch).
        epoch: epochs counted so far.
        quiet: epochs since the last reduction, plus one; starts at ``cfg.quiet``.
        ignored: accuracies that were NaN or outside [0, 1] and changed nothing; should be 0.
    """

    learning_rate: Float[Array, ""]  # float32
    history: Float[Array, " window"]  # float32
    prev_mean: Float[Array, ""]  # float32
    epoch: Int[Array, ""]  # int32
    quiet: Int[Array, ""]  # int32
    ignored: Int[Array, ""]  # int32


def accelat_init(cfg: AccelATConfig) -> AccelATState:
    """Return the state before the first epoch.

    Args:
        cfg: the controller's parameters.

    Returns:
        A state whose ``learning_rate`` is to be used in the first epoch.

    >>> float(accelat_init(AccelATConfig(learning_rate=0.5)).learning_rate)
    0.5
    """
    return AccelATState(
        learning_rate=jnp.asarray(cfg.learning_rate, jnp.float32),
        history=jnp.zeros(cfg.window, jnp.float32),
        prev_mean=jnp.zeros([], jnp.float32),
        epoch=jnp.zeros([], jnp.int32),
        quiet=jnp.asarray(cfg.quiet, jnp.int32),
        ignored=jnp.zeros([], jnp.int32),
    )


def _check_accuracy(accuracy: Any) -> None:
    """Raise ``ValueError`` for a known accuracy that is NaN or no fraction."""
    if isinstance(accuracy, jax.core.Tracer):
        return
    value = float(accuracy)
    if not 0.0 <= value <= 1.0:
        hint = ", a fraction and not a percentage" if value > 1.0 else ""
        raise ValueError(f"accuracy must be in [0, 1]{hint}, got accuracy={value}")


def _advance(state: AccelATState, accuracy: Any, cfg: AccelATConfig) -> AccelATState:
    value = jnp.asarray(accuracy, jnp.float32)
    slot = state.epoch % cfg.window
    rise = value - state.history[slot]  # the entry that is about to be replaced is W epochs old
    history = state.history.at[slot].set(value)
    epoch, quiet = state.epoch + 1, state.quiet + 1
    lower = (epoch > cfg.window + 1) & (quiet > cfg.quiet) & (rise < cfg.window * cfg.threshold - ROUNDING)
    rate = jnp.where(lower, state.learning_rate * cfg.factor, state.learning_rate)
    after = AccelATState(
        learning_rate=jnp.maximum(rate, cfg.min_learning_rate),
        history=history,
        prev_mean=jnp.sum(history) / jnp.minimum(epoch, cfg.window),  # places not yet used hold zeros
        epoch=epoch,
        quiet=jnp.where(lower, 1, quiet),
        ignored=state.ignored,
    )
    # NaN compares as false: without this, a diverged run would keep its rate for ever and nobody would know why.
    valid = (value >= 0.0) & (value <= 1.0)
    kept = state._replace(ignored=state.ignored + 1)
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old).astype(old.dtype), after, kept)


def accelat_update(state: AccelATState, accuracy: ArrayLike, *, cfg: AccelATConfig) -> AccelATState:
    """Count one epoch and lower the rate if accuracy has stopped rising.

        lr ← max(ρ·lr, lr_min)  if  (aₙ − aₙ₋W)/W < τ,  n > W + 1  and the last reduction is at least Q epochs ago

    Source: AccelAT, arXiv 2210.06888; the reference code's controller, without its partial windows (which never change
    the rate).

    When: the start rate may be too large and nobody can watch the run. When not: if a good rate or schedule is known;
    then it does not fire before the target is reached. Feed it a validation split: the reference feeds the test split,
    and its final test accuracy is therefore a selected one. Skip the call for epochs without validation.

    Args:
        state: from `accelat_init` or the call before.
        accuracy: validation accuracy of the epoch, a fraction in [0, 1].
        cfg: the controller's parameters (static under ``jit``).

    Returns:
        The new state. Under ``jit`` an accuracy that is NaN or outside [0, 1] only raises the count ``ignored``.

    Raises:
        ValueError: outside ``jit``, if the accuracy is NaN or outside [0, 1].

    >>> cfg = AccelATConfig(learning_rate=1.0, factor=0.5)
    >>> state = accelat_init(cfg)
    >>> for epoch in range(7):
    ...     state = accelat_update(state, 0.25, cfg=cfg)  # no progress at all
    >>> float(state.learning_rate)  # lowered after window + 2 epochs
    0.5
    """
    _check_accuracy(accuracy)
    return _advance(state, accuracy, cfg)


def scale_by_accuracy_gradient(cfg: AccelATConfig) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by −lr, with the learning rate controlled by AccelAT.

    Source: AccelAT, arXiv 2210.06888. It takes the place of ``optax.scale_by_learning_rate`` at the end of a chain, and
    two extra arguments of ``update``, as ``optax.contrib.reduce_on_plateau`` takes ``value``:

    - ``accuracy``: float [], the latest validation accuracy; read only when an epoch has ended.
    - ``epoch_end``: bool [], true in the first step after an accuracy was measured; the new rate applies at once.

    ``optax.contrib.reduce_on_plateau`` is not equivalent: it compares with the best value so far, this with the value W
    epochs ago, so that this also lowers the rate while accuracy creeps to new records.

    Args:
        cfg: the controller's parameters.

    Returns:
        A transformation with state `AccelATState`; updates keep their dtypes.

    Raises:
        ValueError: in ``update``, if ``epoch_end`` is a known true and ``accuracy`` a known NaN or outside [0, 1].

    >>> import jax.numpy as jnp, optax
    >>> cfg = AccelATConfig(learning_rate=0.1)
    >>> tx = optax.chain(optax.trace(decay=0.9), scale_by_accuracy_gradient(cfg))
    >>> params = jnp.ones(2)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(jnp.ones(2), state, params, accuracy=0.0, epoch_end=False)
    >>> updates.tolist()
    [-0.1..., -0.1...]
    >>> float(state[1].learning_rate.round(3))
    0.1...
    """

    def init(params: Any) -> AccelATState:
        del params
        return accelat_init(cfg)

    def update(
        updates: Any,
        state: AccelATState,
        params: Any = None,
        *,
        accuracy: ArrayLike,
        epoch_end: ArrayLike,
        **extra: Any,
    ) -> tuple[Any, AccelATState]:
        del params, extra
        if isinstance(epoch_end, (bool, np.bool_)) and epoch_end and not isinstance(accuracy, jax.Array):
            _check_accuracy(accuracy)
        state = jax.lax.cond(jnp.asarray(epoch_end, bool), lambda s: _advance(s, accuracy, cfg), lambda s: s, state)
        # In float32: a bfloat16 rate would lose two of its three digits.
        return jax.tree.map(lambda u: (u * -state.learning_rate).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)
