"""What can be known of a program without running it: shapes, a hash of what it computes, and which statements matter.

A search generates far more programs than it can train. Shapes reject the ill-typed ones, the hash finds the ones that
were already evaluated under other names, and liveness tells how much of a program is ballast. Nothing is
computed here.

Source: Chen et al., arXiv 2302.06675, section on abstract execution. The paper reports 89 % cache hits and 70 % dead
statements. Liveness across iterations is an extension.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccel.optim.symbolic.functions import FUNCTIONS
from jaxaccel.optim.symbolic.program import (
    INPUTS,
    Program,
    ProgramError,
    Statement,
    check_syntax,
    is_literal,
    statement_text,
)

Spec = tuple[Any, tuple[tuple[int, ...], ...]]
"""Structure and leaf shapes of a value; hashable."""

SCALAR: Spec = (jax.tree.structure(0.0), ((),))

# Two leaves of different shapes: scalars, numbers per leaf and parameter trees are told apart.
EXAMPLE_TREE = (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.float32))
"""The parameters that programs are checked against unless others are given."""


def spec_of(tree: Any) -> Spec:
    """Structure and leaf shapes of ``tree``.

    >>> spec_of(1.0) == SCALAR
    True
    """
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(tuple(jnp.shape(leaf)) for leaf in leaves)


@functools.lru_cache(maxsize=4096)
def _infer(op: str, args: tuple[Spec, ...]) -> Spec | str:
    """Spec of a call, or why there is none. Cached: a search asks the same few questions again and again."""
    for position in FUNCTIONS[op].scalar_arguments:
        if args[position] != SCALAR:
            return f"argument {position + 1} of {op!r} must be a scalar"
    trees = [treedef.unflatten(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes) for treedef, shapes in args]
    try:
        return spec_of(jax.eval_shape(FUNCTIONS[op].call, *trees))
    except (TypeError, ValueError) as error:
        return f"{op!r} does not accept these arguments: {str(error).splitlines()[0]}"


def infer_call(statement: Statement, scope: dict[str, Spec]) -> Spec | str:
    """Spec of a statement's value where its variables have the specs in ``scope``, or why it has none."""
    return _infer(statement.op, tuple(scope[a] if isinstance(a, str) else SCALAR for a in statement.args))


def input_specs(example_tree: Any = EXAMPLE_TREE) -> dict[str, Spec]:
    """Specs of the inputs for parameters like ``example_tree``."""
    tree = spec_of(example_tree)
    return dict(zip(INPUTS, (tree, tree, tree, tree, SCALAR), strict=True))


def infer(program: Program, example_tree: Any = EXAMPLE_TREE) -> tuple[Spec, ...]:
    """Infer the structure and shapes of every statement's value, by `jax.eval_shape`.

    Args:
        program: any program.
        example_tree: parameters, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
        One (tree structure, leaf shapes) per statement.

    Raises:
        ProgramError: (a ``ValueError``) naming the statement that is not well formed, or the returned value whose
            shapes are not those of the parameters.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> infer(LION_PROGRAM, jnp.zeros(5))[0][1]
    ((5,),)
    """
    check_syntax(program)
    scope = input_specs(example_tree)
    specs = []
    for index, statement in enumerate(program.statements):
        result = infer_call(statement, scope)
        if isinstance(result, str):
            raise ProgramError(f"statement {index} ({statement_text(statement)}): {result}")
        specs.append(result)
        scope[statement.target] = result
    wanted = spec_of(example_tree)
    for name, role in zip(program.outputs, ("update", "m", "v"), strict=True):
        if scope[name] != wanted:
            raise ProgramError(
                f"return: {role} is {name!r} with shapes {scope[name][1]}, expected the parameters' {wanted[1]}"
            )
    return tuple(specs)


def validate(program: Program, example_tree: Any = EXAMPLE_TREE) -> None:
    r"""Raise unless ``program`` is an optimizer for parameters like ``example_tree``.

    Source: arXiv 2302.06675, abstract execution, first stage. When: before storing or running a program that came from
    outside; `parse` checks names and numbers of arguments only.

    Args:
        program: any program.
        example_tree: parameters, or ``jax.ShapeDtypeStruct`` in their place. The default has two leaves of different
            shapes, so that a program that passes works with every tree.

    Raises:
        ProgramError: (a ``ValueError``) for an unknown function or variable, a wrong number of arguments, a function
            that does not accept its arguments' shapes, or a returned value without the parameters' shapes.

    >>> from jaxaccel.optim.symbolic.program import parse
    >>> validate(parse("def train(w, g, m, v, lr):\n u = global_norm(g)\n return u, m, v"))
    Traceback (most recent call last):
    jaxaccel.optim.symbolic.program.ProgramError: return: update is 'u' with shapes ((),), expected the parameters'...
    """
    infer(program, example_tree)


def _backward(program: Program, outputs: tuple[str, ...]) -> tuple[list[int], set[str]]:
    """Indices of the statements that ``outputs`` depend on, and the inputs that they read."""
    needed = set(outputs)
    live = []
    for index in range(len(program.statements) - 1, -1, -1):
        statement = program.statements[index]
        if statement.target in needed:
            needed.discard(statement.target)
            needed.update(arg for arg in statement.args if isinstance(arg, str))
            live.append(index)
    return live[::-1], needed


def live_outputs(program: Program) -> tuple[bool, bool, bool]:
    """Which of update, m, v can ever influence an update, in this iteration or in a later one.

    A state matters if its old value is read on the way to an update, or to another state that matters.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> live_outputs(LION_PROGRAM)  # Lion does not use v
    (True, True, False)
    """
    alive = {0}
    while True:
        _, read = _backward(program, tuple(program.outputs[i] for i in sorted(alive)))
        grown = alive | {i for i, name in ((1, "m"), (2, "v")) if name in read}
        if grown == alive:
            return (True, 1 in alive, 2 in alive)
        alive = grown


def reads(program: Program) -> set[str]:
    """The inputs that influence the updates.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> sorted(reads(LION_PROGRAM))
    ['g', 'lr', 'm', 'w']
    """
    kept = live_outputs(program)
    return _backward(program, tuple(n for n, alive in zip(program.outputs, kept, strict=True) if alive))[1]


def live_statements(program: Program, *, cross_iteration: bool = False) -> tuple[int, ...]:
    """Return the indices of the statements that the outputs depend on.

    Source: arXiv 2302.06675, abstract execution, third stage.

    Args:
        program: a program with known variables.
        cross_iteration: also drop what only feeds a state that no update ever depends on, as in the published
            derivation of Lion, where it removes v. The returned states then differ, the training does not.

    Returns:
        Indices, ascending.

    >>> from jaxaccel.optim.symbolic.program import parse
    >>> program = parse('''def train(w, g, m, v, lr):
    ...   junk = cosh(w)
    ...   v = v + g
    ...   u = g * lr
    ...   return u, m, v''')
    >>> live_statements(program), live_statements(program, cross_iteration=True)
    ((1, 2), (2,))
    """
    kept = live_outputs(program) if cross_iteration else (True, True, True)
    return tuple(_backward(program, tuple(n for n, k in zip(program.outputs, kept, strict=True) if k))[0])


def fresh_name(taken: set[str]) -> str:
    """The first of t0, t1, ... that is not taken."""
    return next(name for i in range(len(taken) + 1) if (name := f"t{i}") not in taken)


def simplify(program: Program, *, cross_iteration: bool = False) -> Program:
    """Remove the statements that do not matter.

    Source: arXiv 2302.06675, section on simplification, the first of its steps.

    Args:
        program: a program with known variables.
        cross_iteration: as in `live_statements`. States without influence are then returned as they came.

    Returns:
        A program with the same outputs and the same `program_hash`; with ``cross_iteration`` the same updates and the
        same hash with ``cross_iteration``.

    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> simplify(LION_PROGRAM) == LION_PROGRAM
    True
    """
    live = [program.statements[i] for i in live_statements(program, cross_iteration=cross_iteration)]
    outputs = list(program.outputs)
    if cross_iteration:
        for position, alive in enumerate(live_outputs(program)):
            if alive:
                continue
            state = INPUTS[position + 1]
            outputs[position] = state
            # Its name may serve as a temporary elsewhere; after the first assignment that is another variable.
            if any(statement.target == state for statement in live):
                live, outputs = _rename(live, outputs, state, position)
    return Program(tuple(live), (outputs[0], outputs[1], outputs[2]))


def _rename(live: list[Statement], outputs: list[str], old: str, keep: int) -> tuple[list[Statement], list[str]]:
    new = fresh_name({s.target for s in live} | {str(a) for s in live for a in s.args} | set(outputs) | set(INPUTS))
    renamed, assigned = [], False
    for s in live:
        args = tuple(new if assigned and a == old else a for a in s.args)
        assigned = assigned or s.target == old
        renamed.append(Statement(new if s.target == old else s.target, s.op, args))
    return renamed, [new if name == old and i != keep else name for i, name in enumerate(outputs)]


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(4, "big") + part)
    return state.digest()


def program_hash(program: Program, *, cross_iteration: bool = False) -> str:
    r"""Hash what a program computes, whatever its names, its order and its dead statements.

        H(input) = its position,  H(number) = its digits,  H(f(a, b)) = H(f, H(a), H(b)),  H(program) = H(update, m, v)

    Source: arXiv 2302.06675, abstract execution, second stage. When: as the key of a cache of fitness values. It knows
    no algebra: a·b and b·a have different hashes.

    Args:
        program: a program with known variables.
        cross_iteration: leave out states that no update ever depends on.

    Returns:
        32 hexadecimal digits, the same on every machine. Numbers count with nine significant digits, which is what
        float32 can tell apart.

    >>> from jaxaccel.optim.symbolic.program import parse
    >>> a = parse("def train(w, g, m, v, lr):\n u = g * lr\n return u, m, v")
    >>> b = parse("def train(w, g, m, v, lr):\n junk = cos(w)\n m2 = g * lr\n return m2, m, v")
    >>> program_hash(a) == program_hash(b)
    True
    """
    hashes = {name: _digest(b"input", str(position).encode()) for position, name in enumerate(INPUTS)}
    for statement in program.statements:
        parts = (_digest(b"number", f"{a:.8e}".encode()) if is_literal(a) else hashes[str(a)] for a in statement.args)
        hashes[statement.target] = _digest(b"call", statement.op.encode(), *parts)
    kept = live_outputs(program) if cross_iteration else (True, True, True)
    returned = [hashes[n] if k else b"unused" for n, k in zip(program.outputs, kept, strict=True)]
    return _digest(b"return", *returned).hex()
