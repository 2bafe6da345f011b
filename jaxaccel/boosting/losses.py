"""Losses that gradient boosting descends: their start, their residuals, and one Newton step along a direction.

    r   = −∂L/∂F                                       pseudo-residuals
    ρ   = Σ w·r·h / Σ w·h·(∂²L/∂F²)·h                  one step of Newton's method for min_ρ Σ w·L(F + ρ·h)

Residuals and second derivatives come from automatic differentiation of ``value``, so that a loss of your own is one
function of outputs and targets; the three that everyone needs are `squared`, `logistic` and `softmax`.

Source of the three and their steps: Emami and Martinez-Munoz, arXiv 1909.12098; Friedman, Annals of Statistics
29 (2001).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

TINY = 1e-30
"""A Newton step whose denominator is smaller is no step: nothing is left to fit along that direction."""


class Loss(NamedTuple):
    """A loss of outputs ``f [n, K]`` and targets ``y [n, ...]``.

    Attributes:
        value: ``(f, y) -> [n]``, the loss of each row, twice differentiable in ``f``.
        initial: ``(y, weight) -> [K]``, the constant that boosting starts from; ``weight [n]`` are row weights.
        newton: whether the length of a step is found by Newton's method; ``False`` takes 1, right for least squares.
        curvature: ``(f, y) -> [n, K]``, a diagonal in place of the exact second derivative; ``None`` for the exact one.
    """

    value: Callable[[Any, Any], Any]
    initial: Callable[[Any, Any], Any]
    newton: bool = True
    curvature: Callable[[Any, Any], Any] | None = None


def _mean(values: Num[Array, "n *K"], weight: Float[Array, "n"]) -> Float[Array, "*K"]:
    # The selection keeps XLA from fusing products of [n, 1] with their sum, which on CPU is twenty times as slow.
    weights = weight.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(weights > 0, weights * values, 0).sum(0) / weight.sum()


def _squared_value(f: Float[Array, "n K"], y: Float[Array, "n K"]) -> Float[Array, "n"]:
    return 0.5 * jnp.sum((y - f) ** 2, -1)


def _logistic_value(f: Float[Array, "n 1"], y: Float[Array, "n"]) -> Float[Array, "n"]:
    return jax.nn.softplus(-2 * y * f[:, 0])


def _logistic_initial(y: Float[Array, "n"], weight: Float[Array, "n"]) -> Float[Array, "1"]:
    return jnp.arctanh(_mean(y, weight))[None]


def _softmax_value(f: Float[Array, "n K"], y: Num[Array, "n K"]) -> Float[Array, "n"]:
    return jax.nn.logsumexp(f, -1) - jnp.sum(y * f, -1)


def _softmax_initial(y: Num[Array, "n K"], weight: Float[Array, "n"]) -> Float[Array, "K"]:
    return jnp.zeros(y.shape[-1], weight.dtype)


def _softmax_curvature(f: Float[Array, "n K"], y: Num[Array, "n K"]) -> Float[Array, "n K"]:
    p = jax.nn.softmax(f)
    return p * (1 - p)


squared = Loss(_squared_value, _mean, newton=False)
"""½·Σₖ (y − F)², targets ``[n, K]``; starts from their mean."""
logistic = Loss(_logistic_value, _logistic_initial)
"""log(1 + exp(−2·y·F)), targets −1 and +1; starts from ½·log((1 + ȳ)/(1 − ȳ)); the probability of +1 is σ(2·F)."""
softmax = Loss(_softmax_value, _softmax_initial, curvature=_softmax_curvature)
"""Cross-entropy of softmax(F) with one-hot targets ``[n, K]``; starts from zeros; Newton with the diagonal alone."""

LOSSES: dict[str, Loss] = {"squared": squared, "logistic": logistic, "softmax": softmax}
"""The losses by name."""


def get_loss(loss: str | Loss) -> Loss:
    """The loss of a name, or a loss as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a Loss, got {loss!r}")
    return LOSSES[loss]


def check_weight(weight: Any, rows: int) -> None:
    """Refuse row weights that are not ``[rows]``, not finite, negative, or zero for all rows; ``None`` is all ones."""
    if weight is None:
        return
    if jnp.shape(weight) != (rows,):
        raise ValueError(f"sample_weight must have shape ({rows},), got {jnp.shape(weight)}")
    if not isinstance(weight, jax.core.Tracer):
        values = np.asarray(weight)
        if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
            raise ValueError("sample_weight must be finite and >= 0, and not zero for all rows")


def _concrete(y: Any) -> np.ndarray | None:
    return None if isinstance(y, jax.core.Tracer) else np.asarray(y)


def encode_targets(y: Any, loss: str | Loss, *, num_classes: int | None = None, dtype: Any = jnp.float32) -> Array:
    """Targets in the form that a loss takes: ``[n, K]`` reals, −1 and +1, or one-hot rows.

    Args:
        y: ``[n]`` or ``[n, K]`` reals for ``"squared"``; 0 and 1, or booleans, for ``"logistic"``; class numbers from 0
            for ``"softmax"``. A loss of your own gets them unchanged.
        loss: name, or a `Loss`.
        num_classes: of ``"softmax"``; ``None`` for the largest class number and one, which needs values, not tracers.
        dtype: of the outcome.

    Raises:
        ValueError: for targets that are not finite, labels other than 0 and 1, or labels of one class only.

    Example:
        >>> encode_targets([0, 1, 1], "logistic")
        Array([-1.,  1.,  1.], dtype=float32)
    """
    values = _concrete(y)
    if values is not None and values.dtype.kind not in "biuf":
        raise TypeError(f"y must be numbers, got dtype {values.dtype}")
    if values is not None and not np.isfinite(values).all():
        raise ValueError("y must be finite, got NaN or infinity")
    y = values if values is not None else y
    if loss == "squared":
        y = jnp.asarray(y, dtype)
        if y.ndim not in (1, 2):
            raise ValueError(f"y must be [n] or [n, K], got shape {y.shape}")
        return y[:, None] if y.ndim == 1 else y
    if loss in ("logistic", "softmax"):
        if np.ndim(y) != 1:
            raise ValueError(f"y must be labels [n], got shape {np.shape(y)}")
        if values is not None and len(np.unique(values)) < 2:
            raise ValueError(f"y must hold at least two classes, got {np.unique(values).tolist()} only")
    if loss == "logistic":
        if values is not None and not np.isin(values, (0, 1)).all():
            raise ValueError(f"labels of the logistic loss must be 0 and 1, got {np.unique(values)[:5].tolist()}")
        return 2 * jnp.asarray(y, dtype) - 1
    if loss == "softmax":
        if values is not None and values.dtype.kind not in "iu":
            raise TypeError(f"labels of the softmax loss must be integers, got dtype {values.dtype}")
        if values is None and num_classes is None:
            raise ValueError("num_classes must be given when labels are traced")
        largest = num_classes or int(values.max()) + 1  # type: ignore[union-attr]
        if values is not None and not 0 <= values.min() <= values.max() < largest:
            raise ValueError(f"labels must be 0 to {largest - 1}, got {values.min()} to {values.max()}")
        return jax.nn.one_hot(y, largest, dtype=dtype)
    return jnp.asarray(y)


def residuals(loss: Loss, f: Float[Array, "n K"], y: Num[Array, "n *t"]) -> Float[Array, "n K"]:
    """Pseudo-residuals −∂L/∂F of every row."""
    return -jax.grad(lambda f: loss.value(f, y).sum())(f)


def curvatures(loss: Loss, f: Float[Array, "n K"], y: Num[Array, "n *t"]) -> Float[Array, "n K"]:
    """Second derivatives ∂²L/∂F_k² of every row; ones for a loss that takes no Newton step."""
    if not loss.newton:
        return jnp.ones_like(f)
    if loss.curvature is not None:
        return loss.curvature(f, y)
    slope = jax.grad(lambda f: loss.value(f, y).sum())

    def one(k: Array) -> Array:
        return jax.jvp(slope, (f,), (jnp.zeros_like(f).at[:, k].set(1),))[1][:, k]

    return jax.vmap(one, out_axes=1)(jnp.arange(f.shape[1]))


def newton_step(
    loss: Loss,
    f: Float[Array, "n K"],
    y: Num[Array, "n *t"],
    h: Float[Array, "n K"],
    weight: Float[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """How far to go along ``h``: 1 for a loss without a search, else one Newton step from 0.

    0 where the second derivative along ``h`` is smaller than `TINY` or not a number: nothing is left to fit, or ``h``
    is broken, and boosting must not carry that on.

    Example:
        >>> y = encode_targets([0, 1], "logistic")
        >>> float(newton_step(logistic, jnp.zeros((2, 1)), y, y[:, None]))
        1.0
    """
    if not loss.newton:
        return jnp.ones((), f.dtype)
    weight = jnp.ones(len(f), f.dtype) if weight is None else weight
    slope = jax.grad(lambda f: loss.value(f, y).sum())
    if loss.curvature is None:
        gradient, bend = jax.jvp(slope, (f,), (h,))
    else:
        gradient, bend = slope(f), loss.curvature(f, y) * h
    top, bottom = -jnp.sum(weight[:, None] * gradient * h), jnp.sum(weight[:, None] * bend * h)
    usable = jnp.abs(bottom) > TINY  # False for NaN
    return jnp.where(usable, top / jnp.where(usable, bottom, 1), 0)


def mean_loss(loss: Loss, f: Float[Array, "n K"], y: Num[Array, "n *t"], weight: Float[Array, "n"]) -> Float[Array, ""]:
    """Mean loss over rows."""
    return _mean(loss.value(f, y), weight)
