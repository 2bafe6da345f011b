"""Test-time regression: streams and tables to predict, and estimators that answer a query from its context.

All estimators answer "what is the value at this key?" from pairs of keys and values that came before, and learn nothing
across streams. Each has a grid of settings, of one size for all, from which an experiment picks on other data.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel.attention import local_linear_attention

NOISE = 0.1
"""Standard deviation of the noise on a stream's values."""


class Pairs(NamedTuple):
    """Streams of keys [B, T, d] and values [B, T, d] f32."""

    keys: np.ndarray
    values: np.ndarray


def piecewise_streams(seed: int, streams: int, *, segments: int, length: int, size: int) -> Pairs:
    """Streams whose keys move and whose linear map changes at every segment.

    Keys of a segment: its centre N(0, 1) + 0.5 N(0, 1), scaled to length 1. Values: A k + 0.1 N(0, 1) with a new
    A ~ N(0, 1/d) per segment.
    """
    if length % segments:
        raise ValueError(f"segments ({segments}) must divide length ({length})")
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(streams, segments, 1, size))
    keys = centres + 0.5 * rng.normal(size=(streams, segments, length // segments, size))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    maps = rng.normal(size=(streams, segments, size, size)) / np.sqrt(size)
    values = keys @ maps + NOISE * rng.normal(size=keys.shape)
    return Pairs(*(x.reshape(streams, length, size).astype(np.float32) for x in (keys, values)))


# Estimators on streams: position i is answered from the pairs before it -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One way to answer.

    Attributes:
        name: for tables.
        settings: names of its hyper-parameters.
        grid: their values.
        predict: ``(keys, values, setting) -> predictions``, all [B, T, d].
    """

    name: str
    settings: tuple[str, ...]
    grid: tuple[tuple[float, ...], ...]
    predict: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def words(self, index: int) -> str:
        """One setting in words."""
        return ", ".join(f"{name} {value:.3g}" for name, value in zip(self.settings, self.grid[index], strict=True))

    @functools.cached_property
    def errors(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Squared error of every setting at every position, ``(keys, values) -> [settings, T]``, compiled."""

        def one(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
            return jnp.mean((self.predict(keys, values, setting) - values) ** 2, axis=(0, 2))

        grid = jnp.asarray(self.grid)
        return jax.jit(lambda keys, values: jax.lax.map(lambda setting: one(keys, values, setting), grid))


def softmax(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
    """Nadaraya-Watson: the mean of values with weights exp(scale·q·k)."""
    seen = jnp.tril(jnp.ones((keys.shape[1],) * 2, bool), -1)
    logits = jnp.where(seen, setting[0] * jnp.einsum("bth,bsh->bts", keys, keys), -jnp.inf)
    weights = jnp.where(seen.any(-1)[:, None], jax.nn.softmax(jnp.where(seen.any(-1)[:, None], logits, 0), -1), 0)
    return weights @ values


def local_linear(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
    """Local linear attention with (scale, ridge); the offset of −1 hides a query's own pair."""
    q, v = keys[:, :, None], values[:, :, None]
    out = local_linear_attention(q, q, v, scale=setting[0], ridge=setting[1], query_offset=-1, max_iters=64)
    assert isinstance(out, jax.Array)
    return out[:, :, 0]


def ridge_regression(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
    """Recursive ridge regression with (ridge, forgetting): pair j counts forgetting^(i − j)."""
    size = keys.shape[-1]
    ridge, forgetting = setting

    def step(state: Any, pair: Any) -> tuple[Any, jax.Array]:
        gram, cross = state
        key, value = pair
        answer = cross @ jnp.linalg.solve(gram + ridge * jnp.eye(size), key)
        return (forgetting * gram + jnp.outer(key, key), forgetting * cross + jnp.outer(value, key)), answer

    return _scan(step, (jnp.zeros((size, size)), jnp.zeros((values.shape[-1], size))), keys, values)


def linear_attention(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
    """Linear attention with (gain,): gain · mean of v (k·q)."""
    count = jnp.maximum(1, jnp.arange(keys.shape[1]))[:, None]
    scores = jnp.tril(jnp.einsum("bth,bsh->bts", keys, keys), -1)
    return setting[0] * (scores @ values) / count


def delta_rule(keys: jax.Array, values: jax.Array, setting: jax.Array) -> jax.Array:
    """Gated delta rule with (rate, decay): W ← decay·W + rate·(v − decay·W k) kᵀ."""
    rate, decay = setting

    def step(fast: jax.Array, pair: Any) -> tuple[jax.Array, jax.Array]:
        key, value = pair
        answer, kept = fast @ key, decay * fast
        return kept + rate * jnp.outer(value - kept @ key, key), answer

    return _scan(step, jnp.zeros((values.shape[-1], keys.shape[-1])), keys, values)


def _scan(step: Any, start: Any, keys: jax.Array, values: jax.Array) -> jax.Array:
    one: Callable[..., jax.Array] = lambda k, v: jax.lax.scan(step, start, (k, v))[1]  # noqa: E731
    return jax.vmap(one)(keys, values)


def _logspace(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(np.geomspace(low, high, count).tolist())


def estimators() -> tuple[Estimator, ...]:
    """All of them, each with 24 settings.

    Grids are so wide that, for 1 to 16 pieces of 512, what is picked lies inside, or at the limit that one piece asks
    for: no forgetting, and the smallest scale, where local linear attention becomes ridge regression.
    """
    product = lambda *axes: tuple(itertools.product(*axes))  # noqa: E731
    return (
        Estimator("softmax", ("scale",), product(_logspace(1, 256, 24)), softmax),
        Estimator("linear attention", ("gain",), product(_logspace(0.5, 32, 24)), linear_attention),
        Estimator(
            "delta rule", ("rate", "decay"), product((0.2, 0.4, 0.6, 0.8), (1, 0.99, 0.98, 0.97, 0.95, 0.9)), delta_rule
        ),
        Estimator("ridge", ("ridge", "forgetting"), product(_logspace(1e-3, 1e2, 24), (1.0,)), ridge_regression),
        Estimator(
            "forgetting ridge",
            ("ridge", "forgetting"),
            product((0.01, 0.03, 0.1, 0.3), (1, 0.98, 0.95, 0.9, 0.8, 0.7)),
            ridge_regression,
        ),
        Estimator("LLA", ("scale", "ridge"), product((0.25, 1, 4, 16, 32, 64), (1e-4, 1e-3, 1e-2, 1e-1)), local_linear),
    )


# Tables: rows of a test set are answered from a training set ---------------------------------------------------------


class Rows(NamedTuple):
    """Features [rows, d] and targets [rows] f64."""

    features: np.ndarray
    targets: np.ndarray


def load_rows(name: str, seed: int) -> Rows:
    """A table by its name.

    ``diabetes``: 442 patients, ten features. ``friedman1``: synthetic, 600 rows, five features, noise 1.
    ``california``: 20,640 districts, eight features, fetched by scikit-learn.
    """
    from sklearn import datasets

    if name == "diabetes":
        return Rows(*datasets.load_diabetes(return_X_y=True))
    if name == "friedman1":
        return Rows(*datasets.make_friedman1(600, n_features=5, noise=1.0, random_state=seed))
    if name == "california":
        return Rows(*datasets.fetch_california_housing(return_X_y=True))
    raise ValueError(f"unknown table {name!r}, expected diabetes, friedman1 or california")


SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
KERNEL_WIDTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
KERNEL_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FINE = tuple(np.geomspace(1e-4, 1e2, len(SCALES) * len(RIDGES)).tolist())
TABLE_METHODS = ("softmax", "ridge", "kernel ridge", "LLA")


def _standardise(rows: Rows, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = rows
    x = (x - x[train].mean(0)) / x[train].std(0)
    return x, (y - y[train].mean()) / y[train].std()


def on_sphere(x: np.ndarray) -> np.ndarray:
    """Rows [x, √d] scaled to length √(2d): exp(scale·q·k) then falls with distance, as a kernel should."""
    size = x.shape[1]
    lifted = np.concatenate([x, np.full((len(x), 1), np.sqrt(size))], axis=1)
    return np.sqrt(2 * size) * lifted / np.linalg.norm(lifted, axis=1, keepdims=True)


def _answer(query: jax.Array, key: jax.Array, value: jax.Array, scale: jax.Array, ridge: jax.Array) -> jax.Array:
    out = local_linear_attention(
        query[None, :, None],
        key[None, :, None],
        value[None, :, None, None],
        scale=scale,
        ridge=ridge,
        is_causal=False,
        max_iters=64,
    )
    assert isinstance(out, jax.Array)
    return out[0, :, 0, 0]


@jax.jit
def _attention_errors(parts: Any) -> dict[str, jax.Array]:
    """Test error of every setting of softmax and local linear attention."""
    sphere, y = parts["sphere"], parts["y"]

    def error(prediction: jax.Array) -> jax.Array:
        return jnp.mean((prediction - y[1]) ** 2)

    def nadaraya_watson(scale: jax.Array) -> jax.Array:
        return error(jax.nn.softmax(scale * sphere[1] @ sphere[0].T, -1) @ y[0])

    def local(setting: jax.Array) -> jax.Array:
        return error(_answer(sphere[1], sphere[0], y[0], setting[0], setting[1]))

    settings = jnp.asarray(list(itertools.product(SCALES, RIDGES)))
    return {
        "softmax": jax.lax.map(nadaraya_watson, jnp.asarray(FINE)),
        "LLA": jax.lax.map(local, settings),
    }


@jax.jit
def _ridge_errors(parts: Any) -> dict[str, jax.Array]:
    """Test error of every setting of ridge and kernel ridge regression; float64, for their smallest ridges."""
    (x, x_test), (y, y_test) = parts["plain"], parts["y"]

    def distances(a: jax.Array) -> jax.Array:
        return jnp.sum((a[:, None] - x) ** 2, -1)

    between, to_test = distances(x), distances(x_test)

    def error(weights: jax.Array, features: jax.Array) -> jax.Array:
        return jnp.mean((features @ weights - y_test) ** 2)

    def linear(ridge: jax.Array) -> jax.Array:  # columns and targets of the training part have mean 0: no intercept
        system = x.T @ x / len(x) + ridge * jnp.eye(x.shape[1])
        return error(jnp.linalg.solve(system, x.T @ y / len(x)), x_test)

    def kernel(setting: jax.Array) -> jax.Array:
        width, ridge = setting
        factor = jax.scipy.linalg.cho_factor(jnp.exp(-width * between) + ridge * jnp.eye(len(x)))
        return error(jax.scipy.linalg.cho_solve(factor, y), jnp.exp(-width * to_test))

    settings = jnp.asarray(list(itertools.product(KERNEL_WIDTHS, KERNEL_RIDGES)))
    return {"ridge": jax.lax.map(linear, jnp.asarray(FINE)), "kernel ridge": jax.lax.map(kernel, settings)}


def table_errors(rows: Rows, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Mean squared error on ``test`` of every method's every setting, in variances of the training targets."""
    x, y = _standardise(rows, train)
    sphere = on_sphere(x)
    arrays = {"plain": (x[train], x[test]), "sphere": (sphere[train], sphere[test]), "y": (y[train], y[test])}
    found = _attention_errors(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays))
    with jax.enable_x64(True):
        found |= _ridge_errors(jax.tree.map(jnp.asarray, arrays))
    return {name: np.asarray(values) for name, values in found.items()}


def split_errors(name: str, seed: int) -> dict[str, float]:
    """Test error of every method on one random split, 3 : 1, its settings picked on a split of the training part."""
    rows = load_rows(name, seed)
    order = np.random.default_rng(seed).permutation(len(rows.targets))
    train, test = np.split(order, [3 * len(order) // 4])
    fit, check = np.split(train, [3 * len(train) // 4])
    inner, outer = table_errors(rows, fit, check), table_errors(rows, train, test)
    return {method: float(outer[method][int(np.nanargmin(inner[method]))]) for method in TABLE_METHODS}


# The solver -----------------------------------------------------------------------------------------------------------


def solver_errors(ridge: float, *, length: int, size: int, seed: int = 0) -> dict[str, float]:
    """Iterations and largest errors (relative to the largest output) on random data, against float64.

    ``rounding`` is the error that rounding the inputs to bfloat16 makes by itself.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (np.asarray(jax.random.normal(key, (1, length, 1, size)), np.float64) for key in keys)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    with jax.enable_x64(True):
        exact, of_rounded = (
            np.asarray(local_linear_attention(*map(jnp.asarray, inputs), ridge=ridge, solver="cholesky"))
            for inputs in ((q, k, v), [np.asarray(x, np.float64) for x in low])
        )
    single = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]

    def error(out: Any, true: np.ndarray = exact) -> float:
        return float(np.max(np.abs(np.asarray(out, np.float64) - true)) / np.max(np.abs(true)))

    converged, state = local_linear_attention(*single, ridge=ridge, max_iters=512, return_state=True)
    assert not isinstance(converged, tuple)
    return {
        "iterations": float(np.mean(state.iterations)),
        "most iterations": float(np.max(state.iterations)),
        "float32, 32 iterations": error(local_linear_attention(*single, ridge=ridge)),
        "float32, converged": error(converged),
        "float32, Cholesky": error(local_linear_attention(*single, ridge=ridge, solver="cholesky")),
        "bfloat16, converged": error(local_linear_attention(*low, ridge=ridge, max_iters=512)),
        "rounding": error(of_rounded),
    }
