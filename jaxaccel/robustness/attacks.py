"""Adversarial attacks in the maximum norm: FGSM, PGD and DeepFool, for any classifier given as a function.

Each attack looks for an input near x, within a radius ε in every coordinate, that the classifier gets wrong:

    FGSM      x' = clip(x + ε·sign ∇ₓL(f(x), y))
    PGD       x₀ = x + U(−ε, ε);  xₖ₊₁ = clip(x + clip(xₖ + s·sign ∇ₓL − x, −ε, ε)), repeated
    DeepFool  steps to the nearest of the linearised decision boundaries between the predicted class and its rivals

with the cross-entropy L and clipping to the allowed range of pixels. Goodfellow et al., arXiv 1412.6572; Madry et al.,
arXiv 1706.06083; Moosavi-Dezfooli et al., arXiv 1511.04599. Step sizes, order of operations and defaults are those of
the attacks that AccelAT (arXiv 2210.06888) trains with, so results agree with theirs to float rounding.

The classifier is ``logits_fn(x [B, ...]) -> [B, C]`` and must return logits. Fed with probabilities, the cross-entropy
applies a second softmax, gradients shrink and the attacks look weaker than they are.

Only gradients with respect to x are taken: close over the parameters. Under ``jax.grad`` of a training loss wrap the
result in ``jax.lax.stop_gradient``, as adversarial training does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

LogitsFn = Callable[[Any], Any]
Bounds = tuple[float, float]


def fgsm(
    logits_fn: LogitsFn,
    x: Float[Array, "B *shape"],
    y: Int[Array, "B"],
    *,
    epsilon: float | Array,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Array, "B *shape"]:
    """Fast gradient sign method: one step of size ``epsilon``, without a random start.

        x' = clip(x + ε·sign ∇ₓL(f(x), y))

    Source: arXiv 1412.6572. The cheapest attack (one gradient); for measuring robustness use `pgd_linf`, which is never
    weaker by more than chance. Coordinates whose gradient is exactly zero do not move.

    Args:
        logits_fn: ``x [B, ...] -> logits [B, C]``.
        x: inputs inside ``bounds``.
        y: true classes.
        epsilon: radius in the units of x, >= 0.
        bounds: smallest and largest allowed value of x.

    Returns:
        Attacked inputs, same shape and dtype as x.

    Raises:
        ValueError: if an argument that is known outside ``jit`` is out of range.

    >>> import jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> fgsm(linear, jnp.array([[0.5, 0.5]]), jnp.array([0]), epsilon=0.1)
    Array([[0.4, 0.4]], dtype=float32)
    """
    _check(logits_fn, x, y, epsilon, bounds)
    low, high = bounds
    moved = x + epsilon * jnp.sign(_loss_gradient(logits_fn, x, y))
    return jnp.clip(moved, low, high).astype(x.dtype)


def pgd_linf(
    logits_fn: LogitsFn,
    x: Float[Array, "B *shape"],
    y: Int[Array, "B"],
    *,
    epsilon: float | Array,
    steps: int = 40,
    rel_step: float = 1 / 30,
    step_size: float | Array | None = None,
    random_start: bool = True,
    key: PRNGKeyArray | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Array, "B *shape"]:
    """Projected gradient ascent on the loss, in a box of half-width ``epsilon`` around x.

        x₀ = clip(x + U(−ε, ε));   xₖ₊₁ = clip(x + clip(xₖ + s·sign ∇ₓL(f(xₖ), y) − x, −ε, ε))

    Source: arXiv 1706.06083. The standard measure of robustness and the standard attack to train with (5 to 7 steps).
    Costs ``steps`` forward and backward passes. The projection may leave the box by one unit in the last place.

    Args:
        logits_fn: ``x [B, ...] -> logits [B, C]``.
        x: inputs inside ``bounds``.
        y: true classes.
        epsilon: radius, >= 0; 0 returns x.
        steps: gradient steps, >= 1.
        rel_step: step size as a fraction of ``epsilon``.
        step_size: step size in the units of x; replaces ``rel_step``.
        random_start: start at a uniformly random point of the box; needs ``key``.
        key: randomness of the start.
        bounds: smallest and largest allowed value of x.

    Returns:
        Attacked inputs, same shape and dtype as x.

    Raises:
        ValueError: if an argument that is known outside ``jit`` is out of range, or the key is missing.

    >>> import jax, jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
    >>> attacked = pgd_linf(linear, x, y, epsilon=0.1, rel_step=0.1, key=jax.random.key(0))
    >>> [[round(float(value), 4) for value in row] for row in attacked]
    [[0.4, 0.4]]
    """
    _check(logits_fn, x, y, epsilon, bounds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got steps={steps}")
    if random_start and key is None:
        raise ValueError("random_start needs a key: pass key=jax.random.key(...), or random_start=False")
    low, high = bounds
    step = rel_step * epsilon if step_size is None else step_size
    start = x
    if random_start and key is not None:
        noise = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
        start = jnp.clip(x + epsilon * noise, low, high).astype(x.dtype)

    def ascend(_: Any, current: Array) -> Array:
        moved = current + step * jnp.sign(_loss_gradient(logits_fn, current, y))
        near = x + jnp.clip(moved - x, -epsilon, epsilon)
        return jnp.clip(near, low, high).astype(x.dtype)

    return jax.lax.fori_loop(0, steps, ascend, start)


def deepfool_linf(
    logits_fn: LogitsFn,
    x: Float[Array, "B *shape"],
    y: Int[Array, "B"],
    *,
    epsilon: float | Array | None = None,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Array, "B *shape"]:
    """DeepFool in the maximum norm: the smallest step over a linearised decision boundary, repeated.

    With the predicted class i₀ and a rival k, let l_k = z_k − z_{i₀}:

        k* = argmin_k |l_k| / (‖∇l_k‖₁ + 1e-8);   p ← p + (|l_{k*}| / (‖∇l_{k*}‖₁ + 1e-8) + 1e-4)·sign ∇l_{k*}
        x' = clip(x + (1 + overshoot)·p)

    A sample stops moving once it is misclassified; one that is wrong from the start stays where it is. Source: arXiv
    1511.04599. Finds small perturbations and so estimates distances to the boundary; for robustness at a fixed radius
    use `pgd_linf`. Costs ``candidates`` − 1 backward passes a step.

    Args:
        logits_fn: ``x [B, ...] -> logits [B, C]``.
        x: inputs inside ``bounds``.
        y: true classes.
        epsilon: clip the perturbation to this radius at the end; ``None`` leaves it as found.
        steps: largest number of steps, >= 1.
        candidates: classes considered, the highest logits at x including the predicted one; >= 2.
        overshoot: relative overshoot, >= 0.
        bounds: smallest and largest allowed value of x.

    Returns:
        Attacked inputs, same shape and dtype as x.

    Raises:
        ValueError: if an argument that is known outside ``jit`` is out of range.

    >>> import jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> moved = deepfool_linf(linear, jnp.array([[0.1, 0.1]]), jnp.array([0]), bounds=(-1.0, 1.0))
    >>> bool(jnp.argmax(linear(moved)) == 1), bool(jnp.abs(moved - 0.1).max() < 0.11)
    (True, True)
    """
    _check(logits_fn, x, y, 0.0 if epsilon is None else epsilon, bounds)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got steps={steps}")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, got candidates={candidates}")
    if not overshoot >= 0:
        raise ValueError(f"overshoot must not be negative, got overshoot={overshoot}")
    low, high = bounds
    logits = logits_fn(x)
    # Descending; a stable sort, so that equal logits keep the order of their classes.
    order = jnp.argsort(-logits, axis=-1)[:, : min(candidates, logits.shape[-1])]
    predicted, rivals = order[:, 0], order[:, 1:]

    def differences(inputs: Array) -> tuple[Array, Array]:
        """Logit differences [K, B] and their gradients [K, B, ...], K rivals."""

        def total(inputs: Array, rival: Array) -> tuple[Array, Array]:
            z = logits_fn(inputs)
            gap = jnp.take_along_axis(z, rival[:, None], 1)[:, 0] - jnp.take_along_axis(z, predicted[:, None], 1)[:, 0]
            return gap.sum(), gap

        gradients, gaps = jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 1))(inputs, rivals)
        return gaps, gradients

    axes = tuple(range(2, x.ndim + 1))

    def advance(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        current, perturbation = carry
        active = jnp.argmax(logits_fn(current), -1) == y
        gaps, gradients = differences(current)
        distances = jnp.abs(gaps) / (jnp.sum(jnp.abs(gradients), axes) + 1e-8)
        best = jnp.argmin(distances, 0)
        rows = jnp.arange(x.shape[0])
        distance, gradient = distances[best, rows], gradients[best, rows]
        wide = (slice(None),) + (None,) * (x.ndim - 1)
        step = (distance + 1e-4)[wide] * jnp.sign(gradient)
        perturbation = jnp.where(active[wide], perturbation + step, perturbation)
        moved = jnp.clip(x + (1 + overshoot) * perturbation, low, high)
        return jnp.where(active[wide], moved, current).astype(x.dtype), perturbation.astype(x.dtype)

    found, _ = jax.lax.fori_loop(0, steps, advance, (x, jnp.zeros_like(x)))
    if epsilon is None:
        return found
    return jnp.clip(x + jnp.clip(found - x, -epsilon, epsilon), low, high).astype(x.dtype)


def robust_accuracy(
    logits_fn: LogitsFn,
    x: Float[Array, "B *shape"],
    y: Int[Array, "B"],
    attack: Callable[..., Any],
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """Fraction of inputs that are classified right after ``attack(logits_fn, x, y, key=key)``.

    Args:
        logits_fn: ``x [B, ...] -> logits [B, C]``.
        x: inputs.
        y: true classes.
        attack: an attack with its settings bound, e.g. ``functools.partial(pgd_linf, epsilon=0.1)``. Without ``key``
            it is called without that argument.
        key: randomness of the attack.

    >>> import functools, jax, jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> x, y = jnp.array([[0.5, 0.5], [0.05, 0.0]]), jnp.array([0, 0])
    >>> attack = functools.partial(pgd_linf, epsilon=0.1, bounds=(-1.0, 1.0))
    >>> float(robust_accuracy(linear, x, y, attack, jax.random.key(0)))
    0.5
    """
    attacked = attack(logits_fn, x, y) if key is None else attack(logits_fn, x, y, key=key)
    return jnp.mean(jnp.argmax(logits_fn(attacked), -1) == y)


def _loss_gradient(logits_fn: LogitsFn, x: Array, y: Array) -> Array:
    """Gradient of the summed cross-entropy: the sum keeps samples apart, a mean would scale by the batch size."""

    def total(inputs: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(inputs), y).sum()

    return jax.grad(total)(x)


def _known(value: Any) -> Any:
    """The value as NumPy, or ``None`` while it is being traced."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _check(logits_fn: LogitsFn, x: Shaped[Array, "B *shape"], y: Any, epsilon: Any, bounds: Bounds) -> None:
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got bounds={bounds}")
    radius = _known(epsilon)
    if radius is not None and not (np.isfinite(radius).all() and (radius >= 0).all()):
        raise ValueError(f"epsilon must be finite and >= 0, got epsilon={epsilon}")
    values = _known(x)
    if values is not None and values.size and not ((values >= low).all() and (values <= high).all()):
        raise ValueError(f"x must lie inside bounds={bounds}, got values from {values.min()} to {values.max()}")
    labels = _known(y)
    if labels is not None and labels.size:
        classes = jax.eval_shape(logits_fn, x).shape[-1]
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"y must lie in [0, {classes}) for {classes} classes, got labels from {labels.min()} to {labels.max()}"
            )
