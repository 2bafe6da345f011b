"""GBNN: one hidden layer grown a few units at a time by gradient boosting, whose last units can be left out.

Cheaper: inference. Units that were trained first carry most of the function, so that a quarter of them is often as good
as all, and which share is used can be chosen at each call. Training is sequential and costs more than fitting the same
network at once.

    F₀ = constant of least loss
    for t = 1..T:
        r      = −∂L/∂F at F_{t−1}                                             all rows
        h_t(x) = act(x·W1 + b1)·W2 + b2, fitted to (x, r) by least squares     a random part of the rows
                 minimise 1/(2m)·Σ‖h − r‖² + l2/(2m)·(‖W1‖² + ‖W2‖²)
        ρ_t    = learning_rate · (one Newton step of min_ρ Σ L(F_{t−1} + ρ·h_t); 1 for squared loss)
        F_t    = F_{t−1} + ρ_t·h_t                                             all rows

The sum is one network with T·J hidden units (`gbnn_to_mlp`). Its first m steps are the network of its first m·J units
*with the output bias of these steps*, F₀ + Σ_{t≤m} ρ_t·b2_t: cutting units and keeping the whole bias is wrong.

Use it where a shallow network on tabular inputs, or in place of the last layers of a frozen one (pass its features as
``x``), must meet budgets that change from call to call. Where the budget is fixed, train a network of that size.
Inputs should be standardised.

Where we differ from the reference code (GAA-UAM/GBNN):

- Its default step of 1 diverges on noisy regression, since each step is fitted almost exactly to half of the rows and
  then added in full; the default here is 0.1.
- Its inner solver gets a loss that is averaged over outputs with a gradient that is not; here both are those above.
- Newton steps are 0 where their denominator vanishes; there they become NaN. Rows are drawn from ``key``; there from
  NumPy's global state, whatever seed was given.

Source: Emami and Martinez-Munoz, arXiv 1909.12098.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from jaxaccel.boosting.losses import Loss, check_weight, encode_targets, get_loss, mean_loss, newton_step, residuals

Activation = Callable[[Any], Any]


class GBNNParams(NamedTuple):
    """T steps of J hidden units, d inputs, K outputs."""

    f0: Float[Array, "K"]  # what boosting started from
    w1: Float[Array, "T d J"]
    b1: Float[Array, "T J"]
    w2: Float[Array, "T J K"]
    b2: Float[Array, "T K"]
    rho: Float[Array, "T"]  # length of each step, learning rate included

    @property
    def num_steps(self) -> int:
        """T."""
        return self.w1.shape[0]


class GBNNFit(NamedTuple):
    """A trained network and how training went."""

    params: GBNNParams
    train_loss: Float[Array, "T"]  # mean loss over all rows after each step


class Unit(NamedTuple):
    """What one step adds, before its length."""

    w1: Float[Array, "d J"]
    b1: Float[Array, "J"]
    w2: Float[Array, "J K"]
    b2: Float[Array, "K"]

    def __call__(self, x: Float[Array, "n d"], activation: Activation) -> Float[Array, "n K"]:
        """Outputs."""
        return activation(x @ self.w1 + self.b1) @ self.w2 + self.b2


def inner_objective(
    unit: Unit,
    x: Float[Array, "m d"],
    r: Float[Array, "m K"],
    weight: Float[Array, "m"],
    *,
    l2: ArrayLike,
    activation: Activation = jax.nn.sigmoid,
) -> Float[Array, ""]:
    """1/(2m)·Σ w·‖h − r‖² + l2/(2m)·(‖W1‖² + ‖W2‖²), m = Σ w; biases are free."""
    error = jnp.sum(weight * jnp.sum((unit(x, activation) - r) ** 2, -1))
    return (error + l2 * (jnp.sum(unit.w1**2) + jnp.sum(unit.w2**2))) / (2 * weight.sum())


def _start(key: Key[Array, ""], d: int, units: int, outputs: int, activation: Activation, dtype: Any) -> Unit:
    gain = 2.0 if activation is jax.nn.sigmoid else 6.0
    first, second = (gain / (d + units)) ** 0.5, (gain / (units + outputs)) ** 0.5
    keys = jax.random.split(key, 4)
    shapes, bounds = ((d, units), (units,), (units, outputs), (outputs,)), (first, first, second, second)
    return Unit(*(jax.random.uniform(k, s, dtype, -b, b) for k, s, b in zip(keys, shapes, bounds, strict=True)))


def fit_unit(
    unit: Unit,
    x: Float[Array, "m d"],
    r: Float[Array, "m K"],
    weight: Float[Array, "m"],
    *,
    l2: ArrayLike = 1e-4,
    steps: int = 200,
    tol: ArrayLike = 0.0,
    activation: Activation = jax.nn.sigmoid,
    optimizer: optax.GradientTransformation | None = None,
) -> Unit:
    """Least squares from a start, by L-BFGS or any optax transform.

    Args:
        unit: where to start.
        x: inputs.
        r: what to fit.
        weight: of the rows, >= 0.
        l2: penalty of both matrices.
        steps: at most so many.
        tol: stop when no entry of the gradient is larger; also when an update changes nothing.
        activation: of the hidden units.
        optimizer: ``None`` for `optax.lbfgs` with a memory of 10.
    """
    tx = optax.with_extra_args_support(optax.lbfgs(memory_size=10) if optimizer is None else optimizer)
    objective = functools.partial(inner_objective, x=x, r=r, weight=weight, l2=l2, activation=activation)
    # L-BFGS keeps value and slope of its last line search, which saves one evaluation a step.
    value_and_grad = optax.value_and_grad_from_state(objective) if optimizer is None else None

    def body(carry: tuple[Unit, Any, Array, Array]) -> tuple[Unit, Any, Array, Array]:
        unit, state, step, _ = carry
        if value_and_grad is None:
            value, slope = jax.value_and_grad(objective)(unit)
        else:
            value, slope = value_and_grad(unit, state=state)
        updates, state = tx.update(slope, state, unit, value=value, grad=slope, value_fn=objective)
        steep = jnp.max(jnp.array([jnp.max(jnp.abs(g)) for g in slope])) > tol
        moved = jnp.any(jnp.array([jnp.any(u != 0) for u in updates]))
        new = Unit(*optax.apply_updates(unit, updates))
        sound = jnp.all(jnp.array([jnp.all(jnp.isfinite(p)) for p in new]))  # False also ends a diverging fit
        kept = Unit(*(jnp.where(sound, a, b) for a, b in zip(new, unit, strict=True)))
        return kept, state, step + 1, steep & moved & sound

    going = (unit, tx.init(unit), jnp.zeros((), jnp.int32), jnp.ones((), bool))
    return jax.lax.while_loop(lambda c: c[3] & (c[2] < steps), body, going)[0]


def subsample_weights(key: Key[Array, ""], rows: int, share: ArrayLike, dtype: Any) -> Float[Array, "rows"]:
    """1 for ⌊share·rows⌋ rows drawn without replacement, 0 for the others; the share may be traced."""
    rank = jnp.zeros(rows, jnp.int32).at[jax.random.permutation(key, rows)].set(jnp.arange(rows, dtype=jnp.int32))
    return (rank < jnp.floor(share * rows + 1e-6)).astype(dtype)


@functools.partial(
    jax.jit,
    static_argnames=("loss", "num_steps", "units", "subsample_rows", "activation", "inner_steps", "optimizer"),
)
def _grow(
    x: Array,
    y: Array,
    weight: Array,
    f: Array,
    key: Array,
    first: ArrayLike,
    learning_rate: ArrayLike,
    subsample: ArrayLike,
    l2: ArrayLike,
    inner_tol: ArrayLike,
    *,
    loss: Loss,
    num_steps: int,
    units: int,
    subsample_rows: int | None,
    activation: Activation,
    inner_steps: int,
    optimizer: optax.GradientTransformation | None,
) -> tuple[Array, Unit, Array, Array]:
    """``num_steps`` steps from outputs ``f``; step t draws from ``fold_in(key, t)``, whatever the blocks."""
    n, outputs = f.shape

    def step(f: Array, t: Any) -> tuple[Array, tuple[Unit, Array, Array]]:
        drawing, starting = jax.random.split(jax.random.fold_in(key, t))
        r = residuals(loss, f, y)
        if subsample_rows is None:  # a traced share: the same rows, by weight
            rows_x, rows_r, rows_w = x, r, weight * subsample_weights(drawing, n, subsample, x.dtype)
        elif subsample_rows == n:
            rows_x, rows_r, rows_w = x, r, weight
        else:
            rows = jax.random.permutation(drawing, n)[:subsample_rows]
            rows_x, rows_r, rows_w = x[rows], r[rows], weight[rows]
        unit = fit_unit(
            _start(starting, x.shape[1], units, outputs, activation, x.dtype), rows_x, rows_r, rows_w,
            l2=l2, steps=inner_steps, tol=inner_tol, activation=activation, optimizer=optimizer,
        )  # fmt: skip
        h = unit(x, activation)
        rho = jnp.asarray(learning_rate * newton_step(loss, f, y, h, weight))
        f = f + rho * h
        return f, (unit, rho, mean_loss(loss, f, y, weight))

    f, (unit, rho, losses) = jax.lax.scan(step, f, first + jnp.arange(num_steps))
    return f, unit, rho, losses


def _check_settings(
    n_steps: int,
    units_per_step: int,
    learning_rate: ArrayLike,
    subsample: ArrayLike,
    inner_steps: int,
    block: int | None,
) -> None:
    for name, value in (("n_steps", n_steps), ("units_per_step", units_per_step), ("inner_steps", inner_steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if isinstance(learning_rate, (int, float)) and not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if isinstance(subsample, (int, float)) and not 0 < subsample <= 1:
        raise ValueError(f"subsample must be in (0, 1], got {subsample}")


def _check_arrays(x: Any, y: Any, weight: Any) -> None:
    if jnp.ndim(x) != 2 or 0 in jnp.shape(x):
        raise ValueError(f"x must be [rows, inputs] with at least one of each, got shape {jnp.shape(x)}")
    if len(y) != len(x):
        raise ValueError(f"x has {len(x)} rows and y {len(y)}; they must be equal")
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x, np.float64)).all():
        raise ValueError("x must be finite, got NaN or infinity: impute missing inputs first")
    check_weight(weight, len(x))


def gbnn_fit(
    x: ArrayLike,
    y: ArrayLike,
    *,
    key: Key[Array, ""],
    loss: str | Loss = "squared",
    n_steps: int = 200,
    units_per_step: int = 1,
    learning_rate: ArrayLike = 0.1,
    subsample: ArrayLike = 0.5,
    activation: Activation = jax.nn.sigmoid,
    l2: ArrayLike = 1e-4,
    inner_steps: int = 200,
    inner_tol: ArrayLike = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    num_classes: int | None = None,
    sample_weight: ArrayLike | None = None,
    initial: GBNNParams | None = None,
    block: int | None = None,
    callback: Callable[[int, np.ndarray], bool | None] | None = None,
) -> GBNNFit:
    """Train, one step of ``units_per_step`` units after another.

    Args:
        x: standardised inputs ``[n, d]``; features of a frozen network for the deep variant.
        y: targets of the loss, see `encode_targets`.
        key: draws rows and starts; step t uses ``fold_in(key, t)``.
        loss: ``"squared"`` (one or several outputs), ``"logistic"`` (labels 0 and 1), ``"softmax"`` (class numbers), or
            a `Loss` of your own.
        n_steps: T, steps to add.
        units_per_step: J, hidden units of a step.
        learning_rate: what each step is scaled by; may be traced. 1, the reference's, diverges on noisy regression.
        subsample: share of rows that a step is fitted to, in (0, 1]; a traced value draws the same rows by weight,
            which costs what all rows cost but lets a whole grid run under one ``vmap``.
        activation: of the hidden units.
        l2: penalty of each step's matrices.
        inner_steps: at most so many steps of the inner fit.
        inner_tol: largest gradient at which the inner fit ends.
        optimizer: of the inner fit; ``None`` for L-BFGS.
        num_classes: of ``"softmax"``.
        sample_weight: weights ``[n]`` of the rows, >= 0; rows of weight 0 may be drawn, but are not learnt from.
        initial: continue these steps, with the same key as a single fit would use.
        block: steps in one compiled call; ``None`` for all. Compile time and result do not depend on it.
        callback: ``(steps so far, losses of the block)``, called after each block; a true result ends training.

    Returns:
        All steps, those of ``initial`` included, and the loss after each new one.

    Raises:
        ValueError: settings out of range, shapes that differ, values that are not finite, labels of one class.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (64, 3))
        >>> fit = gbnn_fit(x, x[:, 0] * x[:, 1], key=jax.random.key(1), n_steps=4, inner_steps=20)
        >>> gbnn_apply(fit.params, x).shape, bool(fit.train_loss[-1] < fit.train_loss[0])
        ((64, 1), True)
    """
    _check_settings(n_steps, units_per_step, learning_rate, subsample, inner_steps, block)
    _check_arrays(x, y, sample_weight)
    rule = get_loss(loss)
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = encode_targets(y, loss, num_classes=num_classes, dtype=x.dtype)
    weight = jnp.ones(len(x), x.dtype) if sample_weight is None else jnp.asarray(sample_weight, x.dtype)
    if initial is None:
        f0 = rule.initial(y, weight)
        f, done = jnp.broadcast_to(f0, (len(x), len(f0))), 0
    else:
        if initial.w1.shape[1:] != (x.shape[1], units_per_step):
            expected = f"[T, {x.shape[1]}, {units_per_step}]"
            raise ValueError(f"initial.w1 must be {expected} to be continued, got {initial.w1.shape}")
        f0, f, done = initial.f0, gbnn_apply(initial, x, activation=activation), initial.num_steps
    rows = max(1, int(subsample * len(x) + 1e-6)) if isinstance(subsample, (int, float)) else None
    parts: list[tuple[Unit, Array, Array]] = []
    block, last = n_steps if block is None else block, done + n_steps
    while done < last:
        size = min(block, last - done)
        f, unit, rho, losses = _grow(
            x, y, weight, f, key, done, learning_rate, subsample, l2, inner_tol,
            loss=rule, num_steps=size, units=units_per_step, subsample_rows=rows,
            activation=activation, inner_steps=inner_steps, optimizer=optimizer,
        )  # fmt: skip
        parts.append((unit, rho, losses))
        done += size
        if callback is not None and callback(done, np.asarray(losses)):
            break
    unit, rho, losses = parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    params = GBNNParams(f0, unit.w1, unit.b1, unit.w2, unit.b2, rho)
    if initial is not None:
        params = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), initial, params)._replace(f0=f0)
    return GBNNFit(params, losses)


def _check_active(params: GBNNParams, n_active: Any) -> None:
    if isinstance(n_active, (int, np.integer)) and not 0 <= n_active <= params.num_steps:
        raise ValueError(f"n_active must be 0 to {params.num_steps}, the number of steps, got {n_active}")


def gbnn_apply(
    params: GBNNParams,
    x: Float[Array, "n d"],
    *,
    n_active: ArrayLike | Int[Array, ""] | None = None,
    activation: Activation = jax.nn.sigmoid,
) -> Float[Array, "n K"]:
    """Outputs F of the first ``n_active`` steps; the probability is σ(2·F) for logistic, softmax(F) for softmax loss.

    A number that is traced switches steps off by their length, and saves nothing; a Python number computes only the
    units that are used.

    Raises:
        ValueError: ``n_active`` out of range.
    """
    if n_active is None or isinstance(n_active, (int, np.integer)):
        m = None if n_active is None else int(n_active)
        return mlp_apply(gbnn_to_mlp(params, n_active=m), x, activation=activation)
    used = jnp.arange(params.num_steps) < n_active
    return mlp_apply(gbnn_to_mlp(params._replace(rho=jnp.where(used, params.rho, 0))), x, activation=activation)


def gbnn_staged(
    params: GBNNParams, x: Float[Array, "n d"], *, activation: Activation = jax.nn.sigmoid
) -> Float[Array, "T n K"]:
    """Outputs after each step, all at once: [t] is ``gbnn_apply(params, x, n_active=t + 1)``."""

    def contribution(unit: Unit, rho: Array) -> Array:
        return rho * unit(x, activation)

    return params.f0 + jnp.cumsum(jax.vmap(contribution)(Unit(*params[1:5]), params.rho), 0)


def gbnn_to_mlp(
    params: GBNNParams, *, n_active: int | None = None, loss: str | Loss = "squared"
) -> dict[str, Float[Array, "..."]]:
    """One network of the first ``n_active`` steps: ``w1 [d, m·J]``, ``b1 [m·J]``, ``w2 [m·J, K]``, ``b2 [K]``.

    Args:
        params: all steps.
        n_active: m, how many to keep; ``None`` for all. The bias is that of these steps.
        loss: ``"logistic"`` doubles the output layer, so that a plain sigmoid of the output is the probability.

    Raises:
        ValueError: ``n_active`` out of range.
    """
    _check_active(params, n_active)
    m = params.num_steps if n_active is None else int(n_active)
    d, units = params.w1.shape[1:]
    rho = params.rho[:m]
    scale = 2 if loss == "logistic" else 1
    return {
        "w1": params.w1[:m].swapaxes(0, 1).reshape(d, m * units),
        "b1": params.b1[:m].reshape(m * units),
        "w2": scale * (rho[:, None, None] * params.w2[:m]).reshape(m * units, len(params.f0)),
        "b2": scale * (params.f0 + rho @ params.b2[:m]),
    }


def mlp_apply(
    mlp: dict[str, Array], x: Float[Array, "n d"], *, activation: Activation = jax.nn.sigmoid
) -> Float[Array, "n K"]:
    """Outputs of a merged network."""
    return activation(x @ mlp["w1"] + mlp["b1"]) @ mlp["w2"] + mlp["b2"]
