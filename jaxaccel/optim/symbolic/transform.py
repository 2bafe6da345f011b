"""Any program as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxaccel.optim import _checks
from jaxaccel.optim.symbolic import abstract
from jaxaccel.optim.symbolic.functions import FUNCTIONS
from jaxaccel.optim.symbolic.program import INPUTS, Program


def execute(program: Program, w: Any, g: Any, m: Any, v: Any, lr: Any) -> tuple[Any, Any, Any]:
    """Run one iteration of a program on arrays.

    Source: arXiv 2302.06675. When: inside ``jit`` for a program that is used often (XLA fuses its statements into one
    loop), or outside to look at values. When not: for many programs that run briefly; compiling each takes longer than
    training it, so use `jaxaccel.optim.symbolic.make_fitness`, which compiles once for all.

    Args:
        program: a program that `validate` accepts for a tree like ``w``; not checked again here.
        w: parameters, a tree of floating arrays.
        g: gradient, of the same structure and shapes.
        m: first state, of the same structure and shapes.
        v: second state, of the same structure and shapes.
        lr: a scalar, the schedule's value.

    Returns:
        The update, to be subtracted from ``w``, and the new m and v.

    Raises:
        KeyError: for a variable or function that does not exist: call `validate` first.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> update, m, v = execute(LION_PROGRAM, jnp.ones(2), jnp.array([3.0, -3.0]), jnp.zeros(2), jnp.zeros(2), 0.5)
    >>> [round(float(x), 4) for x in update]  # 0.5·(sign + 0.1·w)
    [0.55, -0.45]
    """
    values = dict(zip(INPUTS, (w, g, m, v, lr), strict=True))
    for statement in program.statements:
        args = (values[arg] if isinstance(arg, str) else arg for arg in statement.args)
        values[statement.target] = FUNCTIONS[statement.op](*args)
    update, new_m, new_v = (values[name] for name in program.outputs)
    return update, new_m, new_v


class ProgramState(NamedTuple):
    """State of a program used as a transformation.

    Attributes:
        count: steps taken.
        m: first state, or None where no update ever depends on it.
        v: second state, or None where no update ever depends on it.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # int32; the name hides tuple.count, as in optax
    m: optax.Updates | None  # the parameters' shapes; float32, or the parameter's dtype where that is wider
    v: optax.Updates | None  # as m


def as_transform(program: Program, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Turn a program into an optimizer.

        (update, m, v) = program(w, g, m, v, lr),    w ← w − update,    m and v start at 0

    Source: arXiv 2302.06675. When: to train with what a search has found; ``as_transform(LION_PROGRAM, lr)`` is
    ``optax.lion(lr, weight_decay=0.1)`` to rounding, in time and memory as well: statements and states without
    influence on any update are dropped first, so that Lion does not keep a v. When not: where optax has the optimizer.

    Arithmetic is float32 at least, and so are the states.

    Args:
        program: a valid program. Its weight decay and constants are part of it.
        learning_rate: value of the program's ``lr``, a number >= 0 or a schedule. It is not multiplied anywhere else.

    Returns:
        A transformation with state `ProgramState`. Updates keep the dtypes of the gradients; they are ready for
        ``optax.apply_updates``.

    Raises:
        ValueError: if the program is not valid, a rate given as a number is negative or not finite, or (in ``update``)
            the program reads the parameters and they are not given, or the trees do not match.
        TypeError: if a parameter or gradient is not real floating point.

    >>> import jax.numpy as jnp, optax
    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> tx = as_transform(LION_PROGRAM, 0.01)
    >>> w = jnp.ones(2)
    >>> updates, state = tx.update(jnp.array([3.0, -3.0]), tx.init(w), w)
    >>> [round(float(x), 4) for x in optax.apply_updates(w, updates)], state.v
    ([0.989, 1.009], None)
    """
    abstract.validate(program)
    _checks.check_learning_rate(learning_rate)
    program = abstract.simplify(program, cross_iteration=True)
    _, keeps_m, keeps_v = abstract.live_outputs(program)
    needed = abstract.reads(program)

    def wide(x: Any, *others: Any) -> Any:
        return x.astype(jnp.result_type(jnp.float32, x.dtype, *(other.dtype for other in others)))

    def init(params: Any) -> ProgramState:
        _checks.check_floating_tree("params", params)

        def zeros() -> Any:
            # zeros_like keeps the sharding of the parameters.
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params)

        return ProgramState(jnp.zeros([], jnp.int32), zeros() if keeps_m else None, zeros() if keeps_v else None)

    def update(updates: Any, state: ProgramState, params: Any = None) -> tuple[Any, ProgramState]:
        _checks.check_floating_tree("updates", updates)
        if params is None and "w" in needed:
            raise ValueError("this program reads the parameters: call update(updates, state, params), got params=None")
        for name, tree in (("params", params), ("the state", state.m), ("the state", state.v)):
            if tree is not None:
                _checks.check_same_structure("updates", updates, name, tree)
        # One precision for all four, the widest of them.
        given = [tree for tree in (updates, params, state.m, state.v) if tree is not None]
        g = jax.tree.map(wide, *given)
        # What is not read may be anything; the gradients have the right shapes.
        w, m, v = (
            g if x is None else jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), x, g)
            for x in (params, state.m, state.v)
        )
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        step, new_m, new_v = execute(program, w, g, m, v, lr)
        return jax.tree.map(lambda u, x: (-u).astype(x.dtype), step, updates), ProgramState(
            optax.safe_increment(state.count),
            optax.tree.cast_like(new_m, state.m) if keeps_m else None,
            optax.tree.cast_like(new_v, state.v) if keeps_v else None,
        )

    return optax.GradientTransformation(init, update)
