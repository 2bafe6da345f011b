"""The contenders of the GBNN experiment: one hidden layer, grown by boosting or trained at once.

All are tuned over as many settings each on the validation rows, and all seeds and rates of one table run under one
``vmap``. Networks trained at once also choose when to stop, from sixteen points along training.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.tables import TaskKind
from jaxaccel.boosting import GBNNParams, gbnn_fit, gbnn_to_mlp, mlp_apply

LOSSES: dict[TaskKind, str] = {"regression": "squared", "binary": "logistic", "classes": "softmax"}
STOPS = 16
"""Points along training where a network trained at once is looked at."""


def score(kind: TaskKind, f: jax.Array, y: jax.Array) -> jax.Array:
    """Root of the mean squared error, or accuracy, of outputs ``[n, K]``."""
    if kind == "regression":
        return jnp.sqrt(jnp.mean((f[:, 0] - y) ** 2))
    found = (f[:, 0] > 0).astype(y.dtype) if kind == "binary" else jnp.argmax(f, -1)
    return jnp.mean(found == y)


def sign(kind: TaskKind) -> int:
    """What to multiply a score with, so that more is better."""
    return -1 if kind == "regression" else 1


# Grown --------------------------------------------------------------------------------------------------------------


@functools.cache
def grower(
    kind: TaskKind, classes: int, steps: int, units: int, inner_steps: int, subsample: float
) -> Callable[..., Any]:
    """A compiled ``(x [S, n, d], y [S, n], keys [S], rates [R]) -> GBNNParams [S, R, ...]``."""

    def fit(x: Any, y: Any, key: Any, rate: Any) -> GBNNParams:
        return gbnn_fit(
            x, y, key=key, loss=LOSSES[kind], n_steps=steps, units_per_step=units, learning_rate=rate,
            subsample=subsample, inner_steps=inner_steps, num_classes=classes,
        ).params  # fmt: skip

    over_rates = jax.vmap(fit, (None, None, None, 0))
    return jax.jit(jax.vmap(over_rates, (0, 0, 0, None)))


@functools.partial(jax.jit, static_argnames=("kind", "kept"))
def kept_scores(params: GBNNParams, x: jax.Array, y: jax.Array, *, kind: TaskKind, kept: tuple[int, ...]) -> jax.Array:
    """Scores [S, R, len(kept)] of the first steps of each network on rows ``x [S, n, d]``."""

    def one(params: GBNNParams, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.stack([score(kind, mlp_apply(gbnn_to_mlp(params, n_active=m), x), y) for m in kept])

    return jax.vmap(lambda p, x, y: jax.vmap(lambda q: one(q, x, y))(p))(params, x, y)


# Trained at once -----------------------------------------------------------------------------------------------------


def init_mlp(key: jax.Array, d: int, units: int, outputs: int) -> dict[str, jax.Array]:
    """Glorot's uniform start, as scikit-learn has it for logistic units."""
    keys = jax.random.split(key, 4)
    first, second = (2 / (d + units)) ** 0.5, (2 / (units + outputs)) ** 0.5
    shapes = {"w1": (d, units), "b1": (units,), "w2": (units, outputs), "b2": (outputs,)}
    bounds = {"w1": first, "b1": first, "w2": second, "b2": second}
    return {
        n: jax.random.uniform(k, shapes[n], jnp.float32, -bounds[n], bounds[n])
        for k, n in zip(keys, shapes, strict=True)
    }


def mlp_loss(mlp: Any, x: jax.Array, y: jax.Array, kind: TaskKind, l2: Any) -> jax.Array:
    """Mean loss of rows, and scikit-learn's penalty of the matrices."""
    f = mlp_apply(mlp, x)
    if kind == "regression":
        value = 0.5 * jnp.mean((f[:, 0] - y) ** 2)
    elif kind == "binary":
        value = jnp.mean(jax.nn.softplus(-(2 * y - 1) * f[:, 0]))
    else:
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y))
    return value + l2 / (2 * len(x)) * sum(jnp.sum(mlp[name] ** 2) for name in ("w1", "w2"))


@functools.cache
def adam_trainer(kind: TaskKind, classes: int, units: int, epochs: int, batch: int) -> Callable[..., Any]:
    """A compiled ``(x, y, keys [S], rates [R]) -> networks [S, R, STOPS, ...]`` of minibatch Adam."""
    outputs = 1 if kind == "binary" else classes

    def fit(x: Any, y: Any, key: Any, rate: Any) -> Any:
        size = min(batch, len(x))
        per_epoch = len(x) // size
        tx = optax.adam(rate)
        mlp = init_mlp(key, x.shape[1], units, outputs)

        def epoch(carry: Any, e: Any) -> Any:
            order = jax.random.permutation(jax.random.fold_in(key, e), len(x))[: per_epoch * size]

            def step(carry: Any, rows: Any) -> Any:
                mlp, state = carry
                slope = jax.grad(mlp_loss)(mlp, x[rows], y[rows], kind, 1e-4)
                updates, state = tx.update(slope, state, mlp)
                return (optax.apply_updates(mlp, updates), state), None

            return jax.lax.scan(step, carry, order.reshape(per_epoch, size))[0], None

        def part(carry: Any, p: Any) -> Any:
            carry = jax.lax.scan(epoch, carry, p * (epochs // STOPS) + jnp.arange(epochs // STOPS))[0]
            return carry, carry[0]

        return jax.lax.scan(part, (mlp, tx.init(mlp)), jnp.arange(STOPS))[1]

    return jax.jit(jax.vmap(jax.vmap(fit, (None, None, None, 0)), (0, 0, 0, None)))


@functools.cache
def lbfgs_trainer(kind: TaskKind, classes: int, units: int, steps: int) -> Callable[..., Any]:
    """A compiled ``(x, y, keys [S], penalties [R]) -> networks [S, R, STOPS, ...]`` of full-batch L-BFGS."""
    outputs = 1 if kind == "binary" else classes

    def fit(x: Any, y: Any, key: Any, l2: Any) -> Any:
        tx = optax.lbfgs()

        def objective(mlp: Any) -> jax.Array:
            return mlp_loss(mlp, x, y, kind, l2)

        def step(carry: Any, _: Any) -> Any:
            mlp, state = carry
            value, slope = optax.value_and_grad_from_state(objective)(mlp, state=state)
            updates, state = tx.update(slope, state, mlp, value=value, grad=slope, value_fn=objective)
            return (optax.apply_updates(mlp, updates), state), None

        def part(carry: Any, _: Any) -> Any:
            carry = jax.lax.scan(step, carry, length=steps // STOPS)[0]
            return carry, carry[0]

        mlp = init_mlp(key, x.shape[1], units, outputs)
        return jax.lax.scan(part, (mlp, tx.init(mlp)), length=STOPS)[1]

    return jax.jit(jax.vmap(jax.vmap(fit, (None, None, None, 0)), (0, 0, 0, None)))


@functools.partial(jax.jit, static_argnames=("kind",))
def mlp_scores(mlps: Any, x: jax.Array, y: jax.Array, *, kind: TaskKind) -> jax.Array:
    """Scores [S, ...] on rows ``x [S, n, d]`` of networks with leading axes [S, ...]."""

    def one(mlp: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        if mlp["b2"].ndim > 1:
            return jax.vmap(lambda m: one(m, x, y))(mlp)
        return score(kind, mlp_apply(mlp, x), y)

    return jax.vmap(one)(mlps, x, y)


def cut(mlps: Any, units: int) -> Any:
    """The first ``units`` hidden units of networks trained at once, with their whole bias: nothing better is known."""
    return mlps | {"w1": mlps["w1"][..., :units], "b1": mlps["b1"][..., :units], "w2": mlps["w2"][..., :units, :]}


def best(kind: TaskKind, validation: np.ndarray) -> list[tuple[int, ...]]:
    """For each seed (leading axis) the place of the best validation score; NaN is never best."""
    better = np.nan_to_num(sign(kind) * np.asarray(validation, np.float64), nan=-np.inf)
    return [tuple(int(i) for i in np.unravel_index(np.argmax(part), part.shape)) for part in better]
