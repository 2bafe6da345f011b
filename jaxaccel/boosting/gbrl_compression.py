"""Smaller ensembles of GBRL: distilled into fewer trees, cut to some of them, or with equal trees merged.

A run adds a tree at every step, and predictions cost all of them. Three ways back:

| | trees | keeps the function | optimizer |
| --- | --- | --- | --- |
| `gbrl_distil` | new ones, fitted to predictions | as well as they can fit | any |
| `gbrl_compress` | some of the old ones, leaves refitted | up to what the dropped ones added | SGD |
| `gbrl_merge` | old ones, those with equal splits as one | to rounding | SGD |

When to use them: before deployment, and in runs that would outgrow their memory. When not: on few observations; what is
kept is kept where the observations lie.

Fuhrer, Tessler and Dalal, arXiv 2407.08250, and release 1.1.9 of its code, which calls compression experimental. There
the kept trees may also be learned by straight-through gradients; here they are those that contribute most.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel.boosting.gbrl import GBRLState, _integer, _predict, _step, gbrl_predict, learning_rates
from jaxaccel.boosting.trees import fit_bins, tree_leaves
from jaxaccel.boosting.trees.bins import check_table

SELECTIONS = ("largest", "last", "first")


def _grown(state: GBRLState, who: str) -> int:
    if isinstance(state.n_trees, jax.core.Tracer):
        raise ValueError(f"{who} counts trees, which cannot be done under jit, expected an ensemble outside of it")
    return min(int(state.n_trees), state.capacity)


def _additive(state: GBRLState, who: str) -> None:
    if "adam" in state.config.optimizer:
        raise ValueError(
            f"optimizer is {state.config.optimizer}, expected sgd for {who}: Adam's steps depend on all trees before; "
            "use gbrl_distil"
        )


def gbrl_resize(state: GBRLState, capacity: Any) -> GBRLState:
    """The same ensemble with room for another number of trees.

    Raises:
        ValueError: if the trees that are grown do not fit.

    Example:
        >>> from jaxaccel.boosting import gbrl_init
        >>> gbrl_resize(gbrl_init(2, 1, capacity=4), 9).capacity
        9
    """
    capacity, grown = _integer("capacity", capacity, 1), _grown(state, "gbrl_resize")
    if capacity < grown:
        raise ValueError(f"capacity is {capacity}, expected at least {grown}, the trees grown")
    empty = (-1, jnp.inf, False, 0.0, 0.0)
    trees = type(state.trees)(*(
        jnp.concatenate([a[:grown], jnp.full((capacity - grown, *a.shape[1:]), fill, a.dtype)])
        for a, fill in zip(state.trees, empty, strict=True)
    ))  # fmt: skip
    return dataclasses.replace(state, trees=trees, n_trees=jnp.asarray(grown, jnp.int32))


def gbrl_distil(
    teacher: GBRLState, student: GBRLState, obs: Any, *, steps: Any, tolerance: Any = 0.0
) -> tuple[GBRLState, Float[Array, ""]]:
    """Fit an ensemble without trees to the predictions of another one, by least squares.

        min over the student of Σ ½‖θ_student(s) − θ_teacher(s)‖²,  bias: the mean of the teacher's predictions

    Args:
        teacher: the ensemble to follow.
        student: from `gbrl_init`, without trees; its own learning rates, depth and score hold. The reference takes
            ``score="l2"``, a rate of 0.1 and a depth of 6.
        obs: observations ``[n, D]``, such as the last rollouts.
        steps: most trees to grow.
        tolerance: no more trees once √(½·Σ(θ − y)²/n) is as small.

    Returns:
        The student and that error. Under ``jit`` and ``vmap`` too.

    Raises:
        ValueError: columns or outputs that differ, a student with trees, or too many steps for its room.

    Example:
        >>> from jaxaccel.boosting import gbrl_init, gbrl_step
        >>> x = jnp.arange(8.0)[:, None]
        >>> big = gbrl_step(gbrl_init(1, 1, capacity=4), x, jnp.where(x > 3, 1.0, 0.0))
        >>> _, error = gbrl_distil(big, gbrl_init(1, 1, capacity=2, learning_rate=1.0, max_depth=1), x, steps=2)
        >>> bool(error < 1e-6)
        True
    """
    steps, config = _integer("steps", steps, 1), student.config
    check_table(obs, teacher.config.n_features)
    if (config.n_features, student.n_outputs) != (teacher.config.n_features, teacher.n_outputs):
        raise ValueError(
            f"student has {config.n_features} columns and {student.n_outputs} outputs, expected the teacher's "
            f"{teacher.config.n_features} and {teacher.n_outputs}"
        )
    if steps > student.capacity:
        raise ValueError(f"steps is {steps}, and student has room for {student.capacity} trees")
    if not isinstance(student.n_trees, jax.core.Tracer) and int(student.n_trees):
        raise ValueError(f"student has {int(student.n_trees)} trees, expected none")
    if not isinstance(tolerance, jax.core.Tracer) and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, expected 0 or more")
    obs = jnp.asarray(obs, jnp.float32)
    target = gbrl_predict(teacher, obs)
    bins = fit_bins(
        obs, n_bins=config.n_bins, method=config.method, categorical=config.categorical,
        category_weight=(target**2).sum(1),
    )  # fmt: skip
    student = dataclasses.replace(student, bias=target.mean(0))

    def error(gap: Array) -> Array:
        return jnp.sqrt(0.5 * jnp.sum(gap**2) / len(obs))

    def going(carry: tuple[GBRLState, Array]) -> Array:
        state, gap = carry
        return (state.n_trees < steps) & (error(gap) > tolerance)

    def grow(carry: tuple[GBRLState, Array]) -> tuple[GBRLState, Array]:
        state = _step(carry[0], obs, carry[1], bins)
        return state, _predict(state, obs, jnp.zeros((), jnp.int32), state.n_trees) - target

    first = jnp.broadcast_to(student.bias, target.shape) - target
    student, gap = jax.lax.while_loop(going, grow, (student, first))
    return student, error(gap)


def _kept(state: GBRLState, keep: Any, select: Any, contribution: np.ndarray) -> np.ndarray:
    grown = len(contribution)
    if isinstance(select, str):
        if select not in SELECTIONS:
            raise ValueError(f"select is {select!r}, expected one of {', '.join(SELECTIONS)}, or numbers of trees")
        keep = _integer("keep", keep, 1)
        if keep > grown:
            raise ValueError(f"keep is {keep}, expected at most {grown}, the trees grown")
        order = {"largest": np.argsort(-contribution, kind="stable"), "first": np.arange(grown)}
        order["last"] = order["first"][::-1]
        return np.sort(order[select][:keep])
    kept = np.unique(np.asarray(select, np.int64))
    if kept.size != np.size(select) or kept.size == 0 or kept[0] < 0 or kept[-1] >= grown:
        raise ValueError(f"select is {select}, expected different numbers of trees from 0 to {grown - 1}")
    return kept


def _renumbered(state: GBRLState, kept: np.ndarray, values: Array, bias: Array, capacity: int | None) -> GBRLState:
    """Those trees alone, whose leaves add ``values [K, L, O]`` times −1: rates of their new numbers are divided out."""
    rate = learning_rates(state)[: len(kept)]
    if not bool((rate != 0).all()):
        raise ValueError("a learning rate is 0, expected others: leaves cannot carry what must be added")
    trees = jax.tree.map(lambda a: a[kept], state.trees)._replace(leaf_value=values / rate[:, None])
    small = dataclasses.replace(state, trees=trees, n_trees=jnp.asarray(len(kept), jnp.int32), bias=bias)
    return small if capacity is None else gbrl_resize(small, capacity)


def gbrl_compress(
    state: GBRLState,
    obs: Any,
    *,
    keep: Any = None,
    select: Any = "largest",
    reg_lambda: Any = 1.0,
    refit: bool = True,
    capacity: Any = None,
) -> tuple[GBRLState, Float[Array, ""]]:
    """Keep some trees, and let their leaves and the bias take over what the others added.

        W = (AᵀA + λ·I)⁻¹ Aᵀ R,   A [n, 1 + leaves]: which kept leaf a row is in, R [n, O]: what dropped trees add

    which is the least-squares correction of the kept leaves.

    Args:
        state: an ensemble whose optimizer is SGD.
        obs: observations ``[n, D]`` where the function is to be kept.
        keep: trees to keep.
        select: ``"largest"``: those that move predictions most; ``"last"``, ``"first"``; or numbers of trees, and then
            ``keep`` is not looked at.
        reg_lambda: λ, in rows. Leaves of all trees cover the same rows, so that 0 has no single solution.
        refit: ``False`` only drops.
        capacity: room of the result; as many trees as are kept if ``None``.

    Returns:
        The smaller ensemble, and the root mean square of what its predictions on ``obs`` differ by. Outside ``jit``.

    Raises:
        ValueError: for Adam, a tree that does not exist, a negative λ, a learning rate of 0.

    Example:
        >>> from jaxaccel.boosting import gbrl_init, gbrl_step
        >>> x = jnp.arange(8.0)[:, None]
        >>> state = gbrl_init(1, 1, capacity=4, max_depth=1)
        >>> for _ in range(4):
        ...     state = gbrl_step(state, x, jnp.where(x > 3, 1.0, 0.0))
        >>> small, error = gbrl_compress(state, x, keep=1, reg_lambda=1e-3)
        >>> int(small.n_trees), bool(error < 1e-3)
        (1, True)
    """
    grown = _grown(state, "gbrl_compress")
    _additive(state, "gbrl_compress")
    check_table(obs, state.config.n_features)
    if not 0 < reg_lambda < float("inf"):
        raise ValueError(f"reg_lambda is {reg_lambda}, expected a positive number")
    obs = jnp.asarray(obs, jnp.float32)
    trees = jax.tree.map(lambda a: a[:grown], state.trees)
    leaf = tree_leaves(trees, obs)
    added = trees.leaf_value * learning_rates(state)[:grown, None]  # [T, L, O]
    moves = jax.lax.map(lambda p: jnp.mean((p[0][p[1]] - p[0][p[1]].mean(0)) ** 2), (added, leaf))
    kept = _kept(state, keep, select, np.asarray(moves))
    before, values, bias = gbrl_predict(state, obs), added[kept], state.bias
    parts = jax.vmap(lambda v, place: v[place])(values, leaf[kept]).sum(0)
    if refit:
        rest = before - (bias - parts)
        leaves = values.shape[1]
        table = jax.nn.one_hot(leaf[kept].T, leaves).reshape(len(obs), -1)
        table = jnp.concatenate([jnp.ones((len(obs), 1)), table], 1)
        gram = table.T @ table + reg_lambda * jnp.eye(table.shape[1])
        correction = jax.scipy.linalg.solve(gram, table.T @ rest, assume_a="pos")
        bias, values = bias + correction[0], values - correction[1:].reshape(values.shape)
    small = _renumbered(state, kept, values, bias, capacity)
    return small, jnp.sqrt(jnp.mean((gbrl_predict(small, obs) - before) ** 2))


def gbrl_merge(state: GBRLState, *, capacity: Any = None) -> GBRLState:
    """Trees with the same splits as one, whose leaves are their sums: the same function to rounding.

    Steps on few distinct observations, such as cells of a small grid, choose the same splits again and again.

    Args:
        state: an ensemble whose optimizer is SGD.
        capacity: room of the result; as many trees as are left if ``None``.

    Raises:
        ValueError: for Adam, and for an ensemble without trees.

    Example:
        >>> from jaxaccel.boosting import gbrl_init, gbrl_step
        >>> x = jnp.arange(8.0)[:, None]
        >>> state = gbrl_init(1, 1, capacity=4, max_depth=1)
        >>> for _ in range(4):
        ...     state = gbrl_step(state, x, jnp.where(x > 3, 1.0, 0.0))
        >>> int(gbrl_merge(state).n_trees)
        1
    """
    grown = _grown(state, "gbrl_merge")
    _additive(state, "gbrl_merge")
    if not grown:
        raise ValueError("the ensemble has no trees, expected at least one")
    feature, threshold, kind = (np.asarray(a[:grown]) for a in state.trees[:3])
    same = np.concatenate([feature, threshold.view(np.int32), kind], 1)
    _, kept, group = np.unique(same, axis=0, return_index=True, return_inverse=True)
    added = state.trees.leaf_value[:grown] * learning_rates(state)[:grown, None]
    values = jax.ops.segment_sum(added, jnp.asarray(group.reshape(-1)), num_segments=len(kept))
    order = np.argsort(kept)
    return _renumbered(state, kept[order], values[order], state.bias, capacity)
