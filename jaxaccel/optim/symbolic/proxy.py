"""Fitness by a short training run, with one compilation for all programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxaccel.optim import _checks
from jaxaccel.optim.symbolic.interpreter import EncodedProgram, encode, interpret, leaf_sizes
from jaxaccel.optim.symbolic.program import Program


def make_fitness(
    loss_fn: Callable[[Any, Any], jax.Array],
    accuracy_fn: Callable[[Any, Any], jax.Array],
    init_params: Any,
    batches: Any,
    valid: Any,
    steps: int,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    max_statements: int = 60,
) -> Callable[[Program], float]:
    """Return a function that trains a small model with a program and reports how well it then does.

        for t in 0 … steps − 1:  (u, m, v) = program(w, ∇loss(w, batch_t), m, v, lr_t),  w ← w − u

    Source: the proxy tasks of arXiv 2302.06675, of any model. Programs are data of one compiled function (see
    `interpret`), parameters one flat vector. When: models of up to some 100,000 parameters, where compiling a program
    takes longer than training with it. When not: large models, where `as_transform` makes the faster step.

    Every program sees the same start and the same batches in the same order: noise in the fitness would be overfitted.
    Programs run one after the other; vectorising over them would compute all 45 functions for every statement.

    Args:
        loss_fn: (parameters, batch) → scalar to be minimised.
        accuracy_fn: (parameters, ``valid``) → scalar, higher is better; a loss must be negated.
        init_params: parameters at the start, floating arrays.
        batches: a tree of arrays whose first axis is the batch, at least one; used in order, again from the first when
            ``steps`` is larger.
        valid: handed to ``accuracy_fn``.
        steps: training steps, >= 1.
        learning_rate: value of the program's ``lr``, a number or a schedule. The AdamW program multiplies it by 0.001.
        max_statements: most live statements a program may have.

    Returns:
        program → fitness; a program that diverges returns NaN, which a search takes as −inf. It raises ``ValueError``
        for a program that is not valid or too long.

    Raises:
        ValueError: if ``steps`` or a given rate is out of range, or ``batches`` do not share a first axis.
        TypeError: if a parameter is not real floating point.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> loss = lambda w, x: jnp.sum((w - x) ** 2)
    >>> fitness = make_fitness(loss, lambda w, x: -loss(w, x), jnp.zeros(2), jnp.ones((1, 2)), jnp.ones(2), 20,
    ...                        learning_rate=0.1)
    >>> fitness(LION_PROGRAM) > -0.5  # from -2.0
    True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got steps={steps!r}")
    _checks.check_learning_rate(learning_rate)
    _checks.check_floating_tree("init_params", init_params)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or () in counts or (0,) in counts:
        raise ValueError(f"batches must share a first axis of at least 1, got first axes {sorted(counts)}")
    (count,) = counts.pop()
    start, unravel = ravel_pytree(init_params)
    sizes = leaf_sizes(init_params)
    rates = jnp.stack([jnp.asarray(learning_rate(t) if callable(learning_rate) else learning_rate, start.dtype)
                       for t in range(steps)])  # fmt: skip

    @jax.jit
    def train(program: EncodedProgram, start: jax.Array, rates: jax.Array, batches: Any, valid: Any) -> jax.Array:
        def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
            w, m, v = carry
            batch = jax.tree.map(lambda x: x[t % count], batches)
            g = jax.grad(lambda flat: loss_fn(unravel(flat), batch))(w)
            update, m, v = interpret(program, w, g, m, v, rates[t], sizes)
            return (w - update, m, v), None

        zeros = jnp.zeros_like(start)
        (w, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), jnp.arange(steps))
        score = jnp.asarray(accuracy_fn(unravel(w), valid))
        # An accuracy of NaN parameters is a number, often that of one class.
        return jnp.where(jnp.all(jnp.isfinite(w)), score, jnp.nan)

    batches, valid = jax.tree.map(jnp.asarray, (batches, valid))  # once, not in every call

    def fitness(program: Program) -> float:
        return float(train(encode(program, max_statements), start, rates, batches, valid))

    return fitness
