"""GBRL: actors and critics as gradient-boosted trees, one tree for each step of gradient descent.

    θ_k(s) = bias − Σ_{t<k} lr_t·h_t(s)        h_t: a tree whose leaves hold the mean gradient of their rows

Boosting is gradient descent in function space: what an optimiser does to weights, a tree does to the function. That
replaces the network of an actor-critic where observations are structured or categorical; the paper finds it better
there, equal on classic control and worse on raw bytes of Atari. What is cheaper here is the tree: candidates are scored
from histograms, rows·columns·depth additions, where the reference passes over all rows for each of them.

When to use it: tables as observations, categories among them. When not: images, or long runs on a small budget of
memory: every step adds a tree, and predictions cost all of them.

Gradients are those of each row. Automatic differentiation of a mean over n rows gives 1/n of them: multiply by n.
One ensemble of ``n_outputs = actions + 1`` shares its trees between a policy and its value, with a learning rate for
each column. The cosine score then weighs columns by the size of their gradients, l2 by their direction alone.

Fuhrer, Tessler and Dalal, ICML 2025, arXiv 2407.08250; reference: NVlabs/gbrl. Two things differ from the reference:
control variates follow the paper's formula for any number of outputs, where the reference writes to wrong places for
more than one; and a tree that cannot be split has its mean gradient as value, where the reference loses it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.boosting.trees import Bins, Tree, apply_bins, fit_bins, fold_trees, grow_tree, predict_trees
from jaxaccel.boosting.trees.bins import METHODS, check_table

Schedule = Callable[[Any], Any]
OPTIMIZERS = ("sgd", "adam")
SMALL = 1e-8


@dataclasses.dataclass(frozen=True)
class LinearSchedule:
    """lr(t) = max(stop, init + t/trees·(stop − init)), t the number of a tree from 0: the first has ``init`` itself.

    That is what predictions of the reference's release 1.1.9 obey. Rates fall: ``init`` is at least ``stop``.
    """

    init: float
    stop: float
    trees: int

    def __post_init__(self) -> None:
        if not self.init >= self.stop >= 0 or self.trees < 1:
            raise ValueError(f"init, stop and trees are {self.init}, {self.stop} and {self.trees}, expected "
                             "init ≥ stop ≥ 0 and at least one tree")  # fmt: skip

    def __call__(self, t: Any) -> Any:
        """The rate of tree ``t``."""
        return jnp.maximum(self.stop, self.init + t / self.trees * (self.stop - self.init))


@dataclasses.dataclass(frozen=True)
class Config:
    """What does not change from step to step; hashable, so that steps are compiled once."""

    n_features: int
    max_depth: int
    n_bins: int
    method: str
    policy: str
    score: str
    min_data_in_leaf: int
    optimizer: tuple[str, ...]
    schedules: tuple[Schedule | None, ...]
    categorical: tuple[int, ...]
    control_variates: bool
    cv_beta: float
    adam: tuple[float, float, float]


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class GBRLState:
    """An ensemble: room for ``capacity`` trees, of which ``n_trees`` are grown.

    Attributes:
        trees: stacked, `Tree`.
        n_trees: int32; larger than the capacity if steps inside ``jit`` found no room, and were left out.
        bias: ``[O]``.
        rate: learning rates ``[O]``; schedules multiply them.
        feature_weights: factors of scores ``[D]``.
        config: static.
    """

    trees: Tree
    n_trees: Any
    bias: Any
    rate: Any
    feature_weights: Any
    config: Config = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Trees that there is room for."""
        return len(self.trees.feature)

    @property
    def n_outputs(self) -> int:
        """Columns O."""
        return len(self.bias)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")
    return int(value)


def _vector(name: str, value: Any, size: int) -> Array:
    array = jnp.asarray(value, jnp.float32)
    if array.shape not in ((), (size,)):
        raise ValueError(f"{name} has shape {array.shape}, expected a number or ({size},)")
    if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
        raise ValueError(f"{name} is {np.asarray(array).tolist()}, expected finite numbers")
    return jnp.broadcast_to(array, (size,))


def _rates(learning_rate: Any, outputs: int) -> tuple[Array, tuple[Schedule | None, ...]]:
    if callable(learning_rate):
        return jnp.ones(outputs), (learning_rate,) * outputs
    if isinstance(learning_rate, Sequence) and any(callable(r) for r in learning_rate):
        if len(learning_rate) != outputs:
            raise ValueError(f"learning_rate has {len(learning_rate)} entries, expected {outputs}, one for each output")
        return (
            jnp.asarray([1.0 if callable(r) else float(r) for r in learning_rate]),
            tuple(r if callable(r) else None for r in learning_rate),
        )
    return _vector("learning_rate", learning_rate, outputs), (None,) * outputs


def gbrl_init(
    n_features: Any,
    n_outputs: Any,
    *,
    capacity: Any,
    bias: Any = 0.0,
    learning_rate: Any = 0.1,
    optimizer: Any = "sgd",
    max_depth: Any = 4,
    n_bins: Any = 250,
    method: str = "quantile",
    policy: str = "oblivious",
    score: str = "cosine",
    min_data_in_leaf: Any = 0,
    categorical: Sequence[int] = (),
    feature_weights: Any = 1.0,
    control_variates: bool = False,
    cv_beta: float = 0.9,
    adam: tuple[float, float, float] = (0.9, 0.999, 1e-8),
) -> GBRLState:
    """An ensemble without trees.

    Args:
        n_features: D, columns of observations.
        n_outputs: O.
        capacity: trees that may be grown; memory is taken at once.
        bias: what predictions start from, ``[O]`` or a number.
        learning_rate: a number, ``[O]`` of numbers, or schedules: functions of a tree's number, such as
            `LinearSchedule`; a sequence may mix numbers and schedules.
        optimizer: ``"sgd"`` or ``"adam"``, or one for each output. Adam's prediction runs over trees in order.
        max_depth: 1 to 12.
        n_bins: candidates of a column in a step.
        method: ``"quantile"`` or ``"uniform"``, of the candidates: see `fit_bins`.
        policy: ``"oblivious"`` or ``"greedy"``: see `grow_tree`.
        score: ``"cosine"``, or ``"l2"``, which standardises each gradient column first.
        min_data_in_leaf: least rows of a leaf.
        categorical: columns of observations that are categories, coded as whole numbers below 2²⁴. Of more than
            ``n_bins`` categories in a step those with the largest mean squared gradient are candidates (each column has
            its own room; the reference's columns share theirs). A category never seen goes left.
        feature_weights: factors of scores, ``[D]`` or a number.
        control_variates: take out of gradients what past trees explain of their noise.
        cv_beta: β of the control variates.
        adam: β₁, β₂ and ε of Adam.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> state = gbrl_init(1, 1, capacity=8, max_depth=1, n_bins=4, learning_rate=1.0)
        >>> x, y = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([[1.0], [1.0], [5.0], [5.0]])
        >>> state = gbrl_step(state, x, gbrl_predict(state, x) - y)
        >>> gbrl_predict(state, x)[:, 0].tolist()
        [1.0, 1.0, 5.0, 5.0]
    """
    n_features, outputs = _integer("n_features", n_features, 1), _integer("n_outputs", n_outputs, 1)
    capacity, depth = _integer("capacity", capacity, 1), _integer("max_depth", max_depth, 1)
    names = (optimizer,) * outputs if isinstance(optimizer, str) else tuple(optimizer)
    if len(names) != outputs or any(name not in OPTIMIZERS for name in names):
        raise ValueError(f"optimizer is {optimizer!r}, expected {' or '.join(OPTIMIZERS)}, or {outputs} of them")
    if depth > 12:
        raise ValueError(f"max_depth is {depth}, expected 1 to 12")
    if method not in METHODS or policy not in ("oblivious", "greedy") or score not in ("cosine", "l2"):
        raise ValueError(
            f"method, policy and score are {method!r}, {policy!r} and {score!r}, expected one of {', '.join(METHODS)}, "
            f"one of oblivious, greedy, and one of cosine, l2"
        )
    if not 0 <= cv_beta < 1 or not (0 < adam[0] < 1 and 0 < adam[1] < 1 and adam[2] > 0):
        raise ValueError(f"cv_beta is {cv_beta} and adam {adam}, expected decays below 1 and a positive epsilon")
    columns = tuple(int(c) for c in categorical)
    if any(not 0 <= c < n_features for c in columns) or len(set(columns)) < len(columns):
        raise ValueError(f"categorical is {columns}, expected different columns of the {n_features}")
    rate, schedules = _rates(learning_rate, outputs)
    config = Config(
        n_features, depth, _integer("n_bins", n_bins, 1), method, policy, score,
        _integer("min_data_in_leaf", min_data_in_leaf, 0), names, schedules, columns, bool(control_variates),
        float(cv_beta), tuple(float(a) for a in adam),  # type: ignore[arg-type]
    )  # fmt: skip
    splits = depth if policy == "oblivious" else 2**depth - 1
    trees = Tree(
        jnp.full((capacity, splits), -1, jnp.int32), jnp.full((capacity, splits), jnp.inf),
        jnp.zeros((capacity, splits), bool), jnp.zeros((capacity, splits)), jnp.zeros((capacity, 2**depth, outputs)),
    )  # fmt: skip
    weights = _vector("feature_weights", feature_weights, n_features)
    return GBRLState(trees, jnp.zeros((), jnp.int32), _vector("bias", bias, outputs), rate, weights, config)


def clip_gradients(gradients: Any, max_norm: Any) -> Float[Array, "n *O"]:
    """Rows ``[n, O]`` no longer than ``max_norm``; numbers ``[n]`` clamped to ±``max_norm``.

    Example:
        >>> clip_gradients(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0).round(3).tolist()
        [[0.6..., 0.8...], [0.3..., 0.4...]]
    """
    if not isinstance(max_norm, jax.core.Tracer) and not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}, expected a positive number")
    gradients = jnp.asarray(gradients)
    if gradients.ndim == 1:
        return jnp.clip(gradients, -max_norm, max_norm)
    norm = jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    return gradients * jnp.where(norm > max_norm, max_norm / jnp.maximum(norm, max_norm), 1)


def _without_noise(state: GBRLState, obs: Array, gradients: Array) -> Array:
    """Gradients less what an average of past trees explains of them; themselves before the first tree."""
    beta, number, n = state.config.cv_beta, jnp.arange(state.capacity), len(obs)
    done = jnp.minimum(state.n_trees, state.capacity)
    decay = (1 - beta) * beta ** jnp.maximum(done - 1 - number, 0)
    mean = predict_trees(state.trees, obs, scale=decay[:, None], stop=done)
    mean = mean / jnp.sqrt(jnp.where(done > 0, 1 - beta ** done.astype(jnp.float32), 1))
    mean = mean - mean.mean(0)
    freedom = max(n - 1, 1)
    shared = (gradients * mean).sum(0) / freedom
    alpha = jnp.clip(shared / ((mean**2).sum(0) / freedom + SMALL), -1, 1)
    return gradients - alpha * mean


def _standardise(gradients: Array) -> Array:
    centred = gradients - gradients.mean(0)
    deviation = jnp.sqrt((centred**2).sum(0) / max(len(gradients) - 1, 1))
    return centred / jnp.where(deviation > 0, deviation, 1)


@jax.jit
def _step(state: GBRLState, obs: Array, gradients: Array, bins: Bins | None) -> GBRLState:
    config = state.config
    obs, gradients = obs.astype(jnp.float32), gradients.astype(jnp.float32)
    if config.control_variates:
        gradients = _without_noise(state, obs, gradients)
    build = _standardise(gradients) if config.score == "l2" else gradients
    if bins is None:
        bins = fit_bins(
            obs, n_bins=config.n_bins, method=config.method, categorical=config.categorical,
            category_weight=(build**2).sum(1),
        )  # fmt: skip
    ones = jnp.ones_like(build[:, :1])
    tree, leaf = grow_tree(
        bins, apply_bins(bins, obs), jnp.concatenate([build, ones], 1), max_depth=config.max_depth,
        policy=config.policy, score=config.score, min_data_in_leaf=config.min_data_in_leaf,
        feature_weights=state.feature_weights, categorical=bool(config.categorical),
    )  # fmt: skip
    sums = jax.ops.segment_sum(jnp.concatenate([gradients, ones], 1), leaf, num_segments=2**config.max_depth)
    tree = tree._replace(leaf_value=sums[:, :-1] / jnp.maximum(sums[:, -1:], 1))
    # Beyond the last tree nothing is written.
    trees = jax.tree.map(lambda all_, new: all_.at[state.n_trees].set(new, mode="drop"), state.trees, tree)
    return dataclasses.replace(state, trees=trees, n_trees=state.n_trees + 1)


def gbrl_step(state: GBRLState, obs: Any, gradients: Any, *, bins: Bins | None = None) -> GBRLState:
    """Grow one tree on the gradients of a batch.

    Args:
        state: the ensemble.
        obs: observations ``[n, D]``; NaN goes left. Another n than before compiles anew.
        gradients: of each row ``[n, O]``, or ``[n]`` for one output: not divided by n.
        bins: candidates, if they are not to come from ``obs``.

    Raises:
        ValueError: shapes that do not fit, gradients that are not finite, infinite observations, no room left. Under
            ``jit`` values cannot be looked at: a step without room is left out, and ``n_trees`` goes on counting.
    """
    config = state.config
    check_table(obs, config.n_features)
    shape = jnp.shape(gradients)
    if shape == (jnp.shape(obs)[0],) and state.n_outputs == 1:
        gradients = jnp.asarray(gradients)[:, None]
    elif shape != (jnp.shape(obs)[0], state.n_outputs):
        raise ValueError(f"gradients have shape {shape}, expected ({jnp.shape(obs)[0]}, {state.n_outputs})")
    if not isinstance(gradients, jax.core.Tracer) and not np.isfinite(np.asarray(gradients, np.float32)).all():
        raise ValueError("gradients must be finite, got NaN or infinity")
    if not isinstance(state.n_trees, jax.core.Tracer) and int(state.n_trees) >= state.capacity:
        raise ValueError(f"the ensemble is full: capacity is {state.capacity}, and so many trees are grown")
    return _step(state, jnp.asarray(obs), jnp.asarray(gradients), bins)


def learning_rates(state: GBRLState) -> Array:
    """Learning rates of every tree ``[capacity, O]``."""
    t = jnp.arange(state.capacity)
    columns = [
        jnp.ones(state.capacity) if schedule is None else jnp.broadcast_to(jax.vmap(schedule)(t), (state.capacity,))
        for schedule in state.config.schedules
    ]
    return jnp.stack(columns, 1) * state.rate


@jax.jit
def _predict(state: GBRLState, obs: Array, start: Array, stop: Array) -> Array:
    config, scale = state.config, learning_rates(state)
    obs = obs.astype(jnp.float32)
    adam = np.array([name == "adam" for name in config.optimizer])
    result = jnp.broadcast_to(state.bias, (len(obs), state.n_outputs))
    moved = jnp.zeros_like(result)
    if not adam.all():
        moved = predict_trees(state.trees, obs, scale=scale, start=start, stop=stop)
    if adam.any():
        b1, b2, epsilon = config.adam

        def missing(decay: float, turn: Array) -> Array:  # 1 − decay^turn, to all digits
            return -jnp.expm1(turn * jnp.log(decay))

        def one(carry: Any, tree: Any) -> tuple[Any, None]:
            m, s, total = carry
            value, number, inside = tree
            turn = (number - start + 1).astype(jnp.float32)
            new_m, new_s = b1 * m + (1 - b1) * value, b2 * s + (1 - b2) * value**2
            alpha = scale[number] * jnp.sqrt(missing(b2, turn)) / missing(b1, turn)
            news = new_m, new_s, total + alpha * new_m / (jnp.sqrt(new_s) + epsilon)
            return jax.tree.map(lambda a, b: jnp.where(inside, a, b), news, carry), None

        def chunk(carry: Any, value: Array, number: Array, inside: Array) -> Any:
            return jax.lax.scan(one, carry, (value, number, inside))[0]

        zeros = jnp.zeros_like(result)
        stepped = fold_trees(state.trees, obs, chunk, (zeros, zeros, zeros), start=start, stop=stop)[2]
        moved = jnp.where(adam, stepped, moved)
    return result - moved


def gbrl_predict(state: GBRLState, obs: Any, *, start: Any = 0, stop: Any = None) -> Float[Array, "n O"]:
    """The function's values ``[n, O]``, of trees ``start`` to ``stop`` only if asked; Adam then begins at ``start``.

    Raises:
        ValueError: other columns than the ensemble's, a range outside of the grown trees.
    """
    check_table(obs, state.config.n_features)
    grown = jnp.minimum(state.n_trees, state.capacity)
    stop = grown if stop is None else stop
    if not any(isinstance(v, jax.core.Tracer) for v in (start, stop, grown)) and not 0 <= start <= stop <= grown:
        raise ValueError(f"start and stop are {start} and {stop}, expected 0 ≤ start ≤ stop ≤ {grown}, the trees grown")
    return _predict(state, jnp.asarray(obs), jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32))


def gbrl_fit(state: GBRLState, x: Any, y: Any, *, steps: Any) -> tuple[GBRLState, Float[Array, ""]]:
    """Least squares on a whole table: ``steps`` trees with candidates that are chosen once.

    Args:
        state: an ensemble; without trees its bias becomes the mean of the targets.
        x: rows ``[n, D]``.
        y: targets ``[n, O]``.
        steps: trees to grow.

    Returns:
        The ensemble, and √(½·Σ(θ − y)²/n) after the last tree.
    """
    steps, config = _integer("steps", steps, 1), state.config
    check_table(x, config.n_features)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    if y.shape != (len(x), state.n_outputs):
        raise ValueError(f"y has shape {y.shape}, expected ({len(x)}, {state.n_outputs})")
    if int(state.n_trees) + steps > state.capacity:
        raise ValueError(f"steps is {steps}, and there is room for {state.capacity - int(state.n_trees)} trees")
    if int(state.n_trees) == 0:
        state = dataclasses.replace(state, bias=y.mean(0))
    bins = fit_bins(x, n_bins=config.n_bins, method=config.method, categorical=config.categorical)
    for _ in range(steps):
        state = gbrl_step(state, x, gbrl_predict(state, x) - y, bins=bins)
    return state, jnp.sqrt(0.5 * jnp.sum((gbrl_predict(state, x) - y) ** 2) / len(x))
