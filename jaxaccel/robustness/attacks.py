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

Only gradients with respect to x are taken: close over the parameters. They are constants of the attack, also under
``jax.grad`` of a training loss: nothing of an attack's loop is kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

LogitsFn = Callable[[Any], Any]
Bounds = tuple[float, float]


def fgsm(
    logits_fn: LogitsFn,
    x: Float[Array | np.ndarray, "B *shape"],
    y: Int[Array | np.ndarray, "B"],
    *,
    epsilon: ArrayLike,
    bounds: Bounds = (0.0, 1.0),
    key: PRNGKeyArray | None = None,
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
        key: ignored, there is no randomness; accepted so that all attacks can be called alike.

    Returns:
        Attacked inputs, same shape and dtype as x.

    Raises:
        ValueError: if shapes do not fit, or an argument that is known outside ``jit`` is out of range.
        TypeError: if x is not floating point or y is not of an integer dtype.

    >>> import jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> fgsm(linear, jnp.array([[0.5, 0.5]]), jnp.array([0]), epsilon=0.1)
    Array([[0.4, 0.4]], dtype=float32)
    """
    del key
    logits, start = _prepare(logits_fn, x, y, epsilon, bounds)
    low, high = bounds
    moved = start + epsilon * jnp.sign(_loss_gradient(logits, start, y))
    return jnp.clip(moved, low, high).astype(x.dtype)


def pgd_linf(
    logits_fn: LogitsFn,
    x: Float[Array | np.ndarray, "B *shape"],
    y: Int[Array | np.ndarray, "B"],
    *,
    epsilon: ArrayLike,
    steps: int = 40,
    rel_step: ArrayLike = 1 / 30,
    step_size: ArrayLike | None = None,
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
        ValueError: if shapes do not fit, an argument that is known outside ``jit`` is out of range, or the key is
            missing.
        TypeError: if x is not floating point or y is not of an integer dtype.

    >>> import jax, jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([0])
    >>> attacked = pgd_linf(linear, x, y, epsilon=0.1, rel_step=0.1, key=jax.random.key(0))
    >>> [[round(float(value), 4) for value in row] for row in attacked]
    [[0.4, 0.4]]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got steps={steps}")
    if random_start and key is None:
        raise ValueError("random_start needs a key: pass key=jax.random.key(...), or random_start=False")
    logits, origin = _prepare(logits_fn, x, y, epsilon, bounds)
    low, high = bounds
    step = jnp.multiply(rel_step, epsilon) if step_size is None else step_size
    start = origin
    if random_start and key is not None:
        noise = jax.random.uniform(key, origin.shape, origin.dtype, -1.0, 1.0)
        start = jnp.clip(origin + epsilon * noise, low, high).astype(origin.dtype)

    def ascend(_: Any, current: Array) -> Array:
        moved = current + step * jnp.sign(_loss_gradient(logits, current, y))
        near = origin + jnp.clip(moved - origin, jnp.negative(epsilon), epsilon)
        return jnp.clip(near, low, high).astype(origin.dtype)

    return jax.lax.fori_loop(0, steps, ascend, start).astype(x.dtype)


def deepfool_linf(
    logits_fn: LogitsFn,
    x: Float[Array | np.ndarray, "B *shape"],
    y: Int[Array | np.ndarray, "B"],
    *,
    epsilon: ArrayLike | None = None,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    bounds: Bounds = (0.0, 1.0),
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B *shape"]:
    """DeepFool in the maximum norm: the smallest step over a linearised decision boundary, repeated.

    With the predicted class i₀ and a rival k, let l_k = z_k − z_{i₀}:

        k* = argmin_k |l_k| / (‖∇l_k‖₁ + 1e-8);   p ← p + (|l_{k*}| / (‖∇l_{k*}‖₁ + 1e-8) + 1e-4)·sign ∇l_{k*}
        x' = clip(x + (1 + overshoot)·p)

    A sample stops moving once it is misclassified; one that is wrong from the start stays where it is. Source: arXiv
    1511.04599. Finds small perturbations and so estimates distances to the boundary; for robustness at a fixed radius
    use `pgd_linf`. Costs one forward and ``candidates`` − 1 backward passes a step, until all are fooled.

    Args:
        logits_fn: ``x [B, ...] -> logits [B, C]``.
        x: inputs inside ``bounds``.
        y: true classes.
        epsilon: clip the perturbation to this radius at the end; ``None`` leaves it as found.
        steps: largest number of steps, >= 1.
        candidates: classes considered, the highest logits at x including the predicted one; >= 2.
        overshoot: relative overshoot, >= 0.
        bounds: smallest and largest allowed value of x.
        key: ignored, there is no randomness; accepted so that all attacks can be called alike.

    Returns:
        Attacked inputs, same shape and dtype as x.

    Raises:
        ValueError: if shapes do not fit, or an argument that is known outside ``jit`` is out of range.
        TypeError: if x is not floating point or y is not of an integer dtype.

    >>> import jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> moved = deepfool_linf(linear, jnp.array([[0.1, 0.1]]), jnp.array([0]), bounds=(-1.0, 1.0))
    >>> bool(jnp.argmax(linear(moved)) == 1), bool(jnp.abs(moved - 0.1).max() < 0.11)
    (True, True)
    """
    del key
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got steps={steps}")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, got candidates={candidates}")
    if not overshoot >= 0:
        raise ValueError(f"overshoot must not be negative, got overshoot={overshoot}")
    logits, origin = _prepare(logits_fn, x, y, 0.0 if epsilon is None else epsilon, bounds)
    low, high = bounds
    scores = logits(origin)
    if scores.shape[-1] < 2:
        raise ValueError(f"logits_fn must return at least two classes, got {scores.shape[-1]}")
    # Descending; a stable sort, so that equal logits keep the order of their classes.
    order = jnp.argsort(-scores, axis=-1)[:, :candidates]

    def gaps_to_rivals(inputs: Array) -> Array:
        """Logits of the rivals less that of the class first predicted, [B, K]."""
        chosen = jnp.take_along_axis(logits(inputs), order, axis=1)
        return chosen[:, 1:] - chosen[:, :1]

    wide = (slice(None),) + (None,) * (origin.ndim - 1)
    axes = tuple(range(2, origin.ndim + 1))
    rows = jnp.arange(origin.shape[0])

    def advance(carry: tuple[Any, Array, Array, Array]) -> tuple[Any, Array, Array, Array]:
        count, current, perturbation, active = carry
        # The forward pass is shared: the backward passes of the rivals differ in the cotangent only.
        gaps, pullback = jax.vjp(gaps_to_rivals, current)
        rivals = jnp.eye(gaps.shape[1], dtype=gaps.dtype)
        gradients = jax.vmap(lambda row: pullback(jnp.broadcast_to(row, gaps.shape))[0])(rivals)  # [K, B, ...]
        distances = jnp.abs(gaps.T) / (jnp.sum(jnp.abs(gradients), axes) + 1e-8)
        best = jnp.argmin(distances, 0)
        step = (distances[best, rows] + 1e-4)[wide] * jnp.sign(gradients[best, rows])
        perturbation = jnp.where(active[wide], perturbation + step, perturbation)
        moved = jnp.clip(origin + (1 + overshoot) * perturbation, low, high)
        current = jnp.where(active[wide], moved, current).astype(origin.dtype)
        return count + 1, current, perturbation, jnp.argmax(logits(current), -1) == y

    def unfinished(carry: tuple[Any, Array, Array, Array]) -> Array:
        return (carry[0] < steps) & jnp.any(carry[3])

    found = jax.lax.while_loop(unfinished, advance, (0, origin, jnp.zeros_like(origin), order[:, 0] == y))[1]
    if epsilon is not None:
        found = jnp.clip(origin + jnp.clip(found - origin, jnp.negative(epsilon), epsilon), low, high)
    return found.astype(x.dtype)


def robust_accuracy(
    logits_fn: LogitsFn,
    x: Float[Array | np.ndarray, "B *shape"],
    y: Int[Array | np.ndarray, "B"],
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

    Returns:
        A scalar in [0, 1], an upper bound of the robust accuracy: a stronger attack can only lower it.

    >>> import functools, jax, jax.numpy as jnp
    >>> linear = lambda x: x @ jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> x, y = jnp.array([[0.5, 0.5], [0.05, 0.0]]), jnp.array([0, 0])
    >>> attack = functools.partial(pgd_linf, epsilon=0.1, bounds=(-1.0, 1.0))
    >>> float(robust_accuracy(linear, x, y, attack, jax.random.key(0)))
    0.5
    """
    attacked = attack(logits_fn, x, y) if key is None else attack(logits_fn, x, y, key=key)
    return jnp.mean(jnp.argmax(logits_fn(attacked), -1) == y, dtype=jnp.float32)


def _loss_gradient(logits_fn: LogitsFn, x: Array, y: Any) -> Array:
    """Gradient of the summed cross-entropy: the sum keeps samples apart, a mean would scale by the batch size."""

    def total(inputs: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(inputs), y).sum()

    return jax.grad(total)(x)


def _known(value: Any) -> Any:
    """The value as NumPy, or ``None`` while it is being traced or where parts of it are on other hosts."""
    hidden = isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True)
    return None if hidden else np.asarray(value)


def _prepare(logits_fn: LogitsFn, x: Any, y: Any, epsilon: Any, bounds: Bounds) -> tuple[LogitsFn, Array]:
    """Check the arguments; return a logits function whose parameters are constants, and x in a working dtype."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"x must be real floating point, got dtype {jnp.result_type(x).name}")
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise TypeError(f"y must hold integer labels, got dtype {jnp.result_type(y).name}")
    if jnp.ndim(x) < 1 or jnp.shape(y) != jnp.shape(x)[:1]:
        raise ValueError(f"y must have one label per row of x: expected shape {jnp.shape(x)[:1]}, got {jnp.shape(y)}")
    output = jax.eval_shape(logits_fn, x)
    if getattr(output, "ndim", None) != 2 or output.shape[0] != jnp.shape(x)[0]:
        raise ValueError(f"logits_fn must return logits of shape [{jnp.shape(x)[0]}, classes], got {output}")
    classes = output.shape[1]
    # What can be read is checked with NumPy: traced values pass, and nothing is added to a compiled function.
    low, high = map(_known, bounds)
    if low is not None and high is not None and not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got bounds={bounds}")
    radius = _known(epsilon)
    if radius is not None and not (np.isfinite(radius).all() and (radius >= 0).all()):
        raise ValueError(f"epsilon must be finite and >= 0, got epsilon={epsilon}")
    values = _known(x)
    inside = values is None or low is None or high is None or ((values >= low) & (values <= high)).all()
    if not inside:
        raise ValueError(f"x must lie inside bounds={bounds}, got values from {values.min()} to {values.max()}")
    labels = _known(y)
    if labels is not None and labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"y must lie in [0, {classes}) for {classes} classes, got labels from {labels.min()} to {labels.max()}"
        )

    # Parameters that are differentiated outside must not drag the steps of the attack into that backward pass.
    x = jax.lax.stop_gradient(jnp.asarray(x))
    closed, constants = jax.closure_convert(logits_fn, x)
    constants = jax.lax.stop_gradient(constants)
    # Steps are often less than half a unit in the last place of bfloat16 and would round to nothing.
    dtype, working = x.dtype, jnp.promote_types(x.dtype, jnp.float32)

    def logits(inputs: Array) -> Array:
        return closed(inputs.astype(dtype), *constants).astype(working)

    return logits, x.astype(working)
