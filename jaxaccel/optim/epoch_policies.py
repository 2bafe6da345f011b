"""Learning rates as functions of the epoch: the fixed policies that AccelAT is compared with.

Each policy returns a function `epoch -> rate` of the epoch e = 0, 1, ... (a number or an integer array), and
`epoch_schedule` turns such a function into an optax schedule of the step. Rates may be traced, so that a sweep over
start rates needs one compilation.

The formulas are those of the AccelAT reference code (Nikfam et al., arXiv 2210.06888), pinned by test vectors. optax
has schedules of similar names: ``optax.linear_onecycle_schedule`` peaks elsewhere and ends differently.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxaccel.optim import _checks

EpochFn = Callable[[Any], Any]


def constant(learning_rate: ArrayLike) -> EpochFn:
    """Return the same rate for every epoch.

    >>> float(constant(0.1)(7).round(3))
    0.1...
    """
    _checks.check_learning_rate(learning_rate)
    return lambda epoch: jnp.asarray(learning_rate, float)


def piecewise(
    learning_rate: ArrayLike, epochs: int, *, middle: ArrayLike | None = None, final: ArrayLike | None = None
) -> EpochFn:
    """Lower the rate after one and after two thirds of the epochs.

        rate = learning_rate;  middle where e > E/3;  final where e > 2E/3

    Args:
        learning_rate: rate of the first third, >= 0.
        epochs: E, the number of epochs >= 1.
        middle: rate of the second third; ``None`` is a tenth of ``learning_rate``.
        final: rate of the last third; ``None`` is a hundredth of ``learning_rate``.

    Returns:
        epoch → rate.

    Raises:
        ValueError: if a rate is negative or not finite, or epochs < 1.

    >>> policy = piecewise(1.0, epochs=9)
    >>> [round(float(policy(e)), 2) for e in (0, 3, 4, 7)]
    [1.0, 1.0, 0.1, 0.01]
    """
    _checks.check_learning_rate(learning_rate)
    _check_epochs(epochs)
    middle = learning_rate * 0.1 if middle is None else middle
    final = learning_rate * 0.01 if final is None else final
    _checks.check_learning_rate(middle, "middle")
    _checks.check_learning_rate(final, "final")

    def rate(epoch: Any) -> Any:
        # In integers, so that the borders do not depend on the rounding of E/3.
        later = jnp.where(3 * epoch > 2 * epochs, final, middle)
        return jnp.where(3 * epoch > epochs, later, learning_rate)

    return rate


def cyclic_linear(learning_rate: ArrayLike, epochs: int, *, final: ArrayLike | None = None, cycles: int = 5) -> EpochFn:
    """Fall linearly to ``final`` in every cycle; each tooth starts lower than the one before.

        T = E/cycles,    rate = (learning_rate − final)·(1 − (e + 1) / (T·⌈(e + 1)/T⌉)) + final

    Args:
        learning_rate: where the first tooth would start at e = −1, >= 0.
        epochs: E, the number of epochs >= 1.
        final: the lowest rate; ``None`` is a tenth of ``learning_rate``.
        cycles: number of teeth >= 1.

    Returns:
        epoch → rate.

    Raises:
        ValueError: if a rate is negative or not finite, epochs < 1 or cycles < 1.

    >>> policy = cyclic_linear(1.0, epochs=10, final=0.0)
    >>> [round(float(policy(e)), 2) for e in range(4)]
    [0.5, 0.0, 0.25, 0.0]
    """
    _checks.check_learning_rate(learning_rate)
    _check_epochs(epochs)
    _check_epochs(cycles, "cycles")
    final = learning_rate * 0.1 if final is None else final
    _checks.check_learning_rate(final, "final")

    def rate(epoch: Any) -> Any:
        # T·⌈(e + 1)/T⌉ = ⌈(e + 1)·cycles/E⌉·E/cycles, with the ceiling taken in integers.
        tooth = -(-(epoch + 1) * cycles // epochs)
        return jnp.subtract(learning_rate, final) * (1 - (epoch + 1) * cycles / (tooth * epochs)) + final

    return rate


def polynomial(learning_rate: ArrayLike, epochs: int, *, final: ArrayLike = 0.0, power: ArrayLike = 1.0) -> EpochFn:
    """Fall once from the first rate to the last (the reference's linear policy without cycles).

        rate = (learning_rate − final)·(1 − min(e, E)/E)^power + final

    Args:
        learning_rate: rate at e = 0, >= 0.
        epochs: E, the number of epochs >= 1.
        final: rate from epoch E on.
        power: 1 is a straight line; larger falls faster at first. Must be > 0.

    Returns:
        epoch → rate.

    Raises:
        ValueError: if a rate is negative or not finite, power <= 0 or epochs < 1.

    >>> policy = polynomial(1.0, epochs=4, power=2.0)
    >>> [round(float(policy(e)), 4) for e in (0, 2, 4, 9)]
    [1.0, 0.25, 0.0, 0.0]
    """
    _checks.check_learning_rate(learning_rate)
    _checks.check_learning_rate(final, "final")
    _checks.check_positive("power", power)
    _check_epochs(epochs)
    return lambda epoch: jnp.subtract(learning_rate, final) * (1 - jnp.minimum(epoch, epochs) / epochs) ** power + final


def exponential(learning_rate: ArrayLike, epochs: int, *, base: ArrayLike = 10.0, decades: ArrayLike = 10.0) -> EpochFn:
    """Multiply the rate by ``base`` every E/decades epochs: by default a range test over ten powers of ten.

        rate = learning_rate · base^(e·decades/E)

    This is a diagnostic that ends in divergence, not a way to train: look where the loss stops falling.

    Args:
        learning_rate: rate at e = 0, >= 0; the reference starts at 1e-8.
        epochs: E, the number of epochs >= 1.
        base: growth per E/decades epochs, > 0; less than 1 decays.
        decades: how many times the rate grows by ``base`` in all.

    Returns:
        epoch → rate.

    Raises:
        ValueError: if the rate is negative or not finite, base <= 0 or epochs < 1.

    >>> policy = exponential(1e-8, epochs=50)
    >>> f"{float(policy(0)):.0e}, {float(policy(40)):.0e}"
    '1e-08, 1e+00'
    """
    _checks.check_learning_rate(learning_rate)
    _checks.check_positive("base", base)
    _check_epochs(epochs)
    return lambda epoch: learning_rate * jnp.asarray(base, float) ** (epoch * decades / epochs)


def one_cycle(
    learning_rate: ArrayLike, epochs: int, *, peak: ArrayLike | None = None, final: ArrayLike | None = None
) -> EpochFn:
    """Rise to the peak, fall back, then fall almost to zero, in straight lines.

        learning_rate at e = 0;  peak at 0.4·E;  learning_rate at 0.8·E;  final at E

    Args:
        learning_rate: rate at both ends of the triangle, >= 0.
        epochs: E, the number of epochs >= 1.
        peak: highest rate; ``None`` is ten times ``learning_rate``.
        final: rate at epoch E; ``None`` is a hundredth of ``learning_rate``.

    Returns:
        epoch → rate.

    Raises:
        ValueError: if a rate is negative or not finite, or epochs < 1.

    >>> policy = one_cycle(0.1, epochs=10)
    >>> [round(float(policy(e)), 3) for e in (0, 2, 4, 8, 10)]
    [0.1, 0.55, 1.0, 0.1, 0.001]
    """
    _checks.check_learning_rate(learning_rate)
    _check_epochs(epochs)
    peak = learning_rate * 10.0 if peak is None else peak
    final = learning_rate * 0.01 if final is None else final
    _checks.check_learning_rate(peak, "peak")
    _checks.check_learning_rate(final, "final")
    knots = (0.0, 0.4 * epochs, 0.8 * epochs, float(epochs))

    def rate(epoch: Any) -> Any:
        values = jnp.stack([jnp.asarray(v, float) for v in (learning_rate, peak, learning_rate, final)])
        return jnp.interp(jnp.asarray(epoch, float), jnp.array(knots), values)

    return rate


def epoch_schedule(epoch_fn: EpochFn, steps_per_epoch: int) -> optax.Schedule:
    """Turn a function of the epoch into an optax schedule that is constant within each epoch.

        count → epoch_fn(⌊count / steps_per_epoch⌋)

    Args:
        epoch_fn: epoch → rate, such as the policies of this module.
        steps_per_epoch: optimizer steps per epoch >= 1.

    Returns:
        An optax schedule: count, int [] → rate, float [].

    Raises:
        ValueError: if steps_per_epoch < 1.

    >>> import optax
    >>> schedule = epoch_schedule(polynomial(1.0, epochs=4), steps_per_epoch=100)
    >>> [float(schedule(count)) for count in (0, 99, 100, 250)]
    [1.0, 1.0, 0.75, 0.5]
    >>> tx = optax.sgd(schedule)
    """
    _check_epochs(steps_per_epoch, "steps_per_epoch")
    return lambda count: epoch_fn(count // steps_per_epoch)


def _check_epochs(value: int, name: str = "epochs") -> None:
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {name}={value}")
