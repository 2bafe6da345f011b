"""Random edits of programs: insert, delete or modify one statement, or change one number.

Source: Chen et al., arXiv 2302.06675, section on the search. New numbers are, with equal odds, drawn from N(0, 1) or 1;
existing ones are multiplied by 2^N(0, 1) or drawn anew. An edit is repeated until abstract execution accepts it.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxaccel.optim.symbolic import abstract
from jaxaccel.optim.symbolic.abstract import SCALAR, Spec
from jaxaccel.optim.symbolic.functions import FUNCTIONS
from jaxaccel.optim.symbolic.program import Argument, Program, ProgramError, Statement, clamp_literal, is_literal

MAX_ATTEMPTS = 200
"""Edits tried before a mutation gives up."""

# ``invert`` is part of the space and never valid on floating-point numbers; drawing it would only cost attempts.
_DRAWN = tuple(name for name in FUNCTIONS if name != "invert")


class MutationWeights(NamedTuple):
    """Relative odds of the four edits.

    ``MutationWeights(0, 0, 0, 1)`` changes numbers only: the constants-only baseline of the paper, a random search for
    hyper-parameters. ``MutationWeights(insert=0)`` never lengthens a program.

    >>> MutationWeights()
    MutationWeights(insert=1.0, delete=1.0, modify=1.0, literal=0.0)
    """

    insert: float = 1.0
    """A new statement at a random place; not done at the maximal length."""
    delete: float = 1.0
    """A random statement goes."""
    modify: float = 1.0
    """A random argument of a random statement changes: another variable of its shape, or another number."""
    literal: float = 0.0
    """A random number changes."""


ALL_EDITS = MutationWeights()
"""Insertion, deletion and modification with equal odds."""

CONSTANTS_ONLY = MutationWeights(0.0, 0.0, 0.0, 1.0)
"""Only numbers change."""


class MutationError(RuntimeError):
    """No valid edit was found within the allowed attempts."""


def check_weights(weights: MutationWeights) -> None:
    """Raise ``ValueError`` unless all weights are finite and >= 0 and one is positive."""
    if len(weights) != 4 or not all(math.isfinite(x) and x >= 0 for x in weights) or not sum(weights) > 0:
        raise ValueError(f"weights must be four finite numbers >= 0 with a positive sum, got weights={tuple(weights)}")


def _new_literal(rng: np.random.Generator) -> float:
    return float(rng.standard_normal()) if rng.random() < 0.5 else 1.0


def _other_literal(rng: np.random.Generator, value: float) -> float:
    if rng.random() < 0.5:
        return clamp_literal(value * 2.0 ** float(rng.standard_normal()))
    return float(rng.standard_normal())


def _scopes(program: Program) -> list[dict[str, Spec]]:
    """The variables before each statement, and after the last."""
    scope = abstract.input_specs()
    scopes = [dict(scope)]
    for statement in program.statements:
        result = abstract.infer_call(statement, scope)
        if isinstance(result, str):
            raise ProgramError(result)
        scope[statement.target] = result
        scopes.append(dict(scope))
    return scopes


def _insert(rng: np.random.Generator, program: Program, scopes: list[dict[str, Spec]]) -> Program | None:
    position = int(rng.integers(len(program) + 1))
    scope = scopes[position]
    op = _DRAWN[rng.integers(len(_DRAWN))]
    args: list[Argument] = []
    for i in range(FUNCTIONS[op].arity):
        only_scalars = i in FUNCTIONS[op].scalar_arguments
        names = [name for name, spec in scope.items() if not only_scalars or spec == SCALAR]
        drawn = int(rng.integers(len(names) + 1))  # one more: a number
        args.append(names[drawn] if drawn < len(names) else _new_literal(rng))
    value = abstract.infer_call(Statement("", op, tuple(args)), scope)
    if isinstance(value, str):
        return None
    target = abstract.fresh_name(set(scopes[-1]))
    same_shape = [name for name, spec in scope.items() if spec == value]
    if same_shape and rng.random() < 0.5:
        target = same_shape[rng.integers(len(same_shape))]
    return _with(program, position, position, (Statement(target, op, tuple(args)),))


def _with(program: Program, start: int, stop: int, replacement: tuple[Statement, ...]) -> Program:
    statements = program.statements
    return Program(statements[:start] + replacement + statements[stop:], program.outputs)


def _delete(rng: np.random.Generator, program: Program) -> Program | None:
    if not program.statements:
        return None
    index = int(rng.integers(len(program)))
    return _with(program, index, index + 1, ())


def _replace_argument(
    rng: np.random.Generator, program: Program, scopes: list[dict[str, Spec]], index: int, position: int
) -> Program | None:
    statement = program.statements[index]
    old = statement.args[position]
    new: Argument
    if isinstance(old, str):
        names = [name for name, spec in scopes[index].items() if name != old and spec == scopes[index][old]]
        if not names:
            return None
        new = names[rng.integers(len(names))]
    else:
        new = _other_literal(rng, old)
    args = (*statement.args[:position], new, *statement.args[position + 1 :])
    return _with(program, index, index + 1, (Statement(statement.target, statement.op, args),))


def _modify(rng: np.random.Generator, program: Program, scopes: list[dict[str, Spec]]) -> Program | None:
    if not program.statements:
        return None
    index = int(rng.integers(len(program)))
    arity = len(program.statements[index].args)
    return _replace_argument(rng, program, scopes, index, int(rng.integers(arity))) if arity else None


def _modify_literal(rng: np.random.Generator, program: Program, scopes: list[dict[str, Spec]]) -> Program | None:
    places = [(i, j) for i, s in enumerate(program.statements) for j, arg in enumerate(s.args) if is_literal(arg)]
    return _replace_argument(rng, program, scopes, *places[rng.integers(len(places))]) if places else None


def mutate_with(
    rng: np.random.Generator,
    program: Program,
    weights: MutationWeights,
    max_length: int,
    max_attempts: int = MAX_ATTEMPTS,
) -> Program:
    """`mutate` with a NumPy generator, for loops that make their own."""
    odds = np.asarray(weights, float)
    if len(program) >= max_length:
        odds[0] = 0.0
    if not odds.sum() > 0:
        raise MutationError(f"only insertion is allowed and the program has its maximal length {max_length}")
    bounds = np.cumsum(odds / odds.sum())
    scopes = _scopes(program)
    for _ in range(max_attempts):
        kind = min(int(np.searchsorted(bounds, rng.random(), side="right")), 3)
        if kind == 0:
            child = _insert(rng, program, scopes)
        elif kind == 1:
            child = _delete(rng, program)
        else:
            child = (_modify if kind == 2 else _modify_literal)(rng, program, scopes)
        if child is None:
            continue
        try:
            abstract.validate(child)
        except ProgramError:
            continue
        return child
    raise MutationError(f"no valid edit of a program of {len(program)} statements in {max_attempts} attempts")


def mutate(
    key: jax.Array,
    program: Program,
    *,
    weights: MutationWeights | tuple[float | int, ...] = ALL_EDITS,
    max_length: int = 60,
    max_attempts: int = MAX_ATTEMPTS,
) -> Program:
    """Return ``program`` with one random, valid edit.

    Source: arXiv 2302.06675. When: to build a search of your own; `evolve` calls it for you.

    Args:
        key: a random key, typed or uint32. The same key gives the same edit. Its words seed a NumPy generator, since
            the edits happen on the host.
        program: a valid program; it is checked against two leaves of different shapes.
        weights: odds of insert, delete, modify, and of changing a number only.
        max_length: a program of this many statements is not lengthened, >= 1.
        max_attempts: invalid edits allowed before giving up, >= 1.

    Returns:
        A valid program that differs by one statement, one argument or nothing (an edit may restore what was there).

    Raises:
        ValueError: for bad weights or limits, or a program that is not valid.
        MutationError: if no valid edit was found.

    >>> import jax
    >>> from jaxaccel.optim.symbolic.program import LION_PROGRAM
    >>> len(mutate(jax.random.key(0), LION_PROGRAM, weights=MutationWeights(1, 0, 0)))
    7
    """
    weights = MutationWeights(*weights)
    check_weights(weights)
    if max_length < 1 or max_attempts < 1:
        raise ValueError(f"max_length and max_attempts must be >= 1, got {max_length=} and {max_attempts=}")
    abstract.validate(program)
    return mutate_with(np.random.default_rng(key_words(key)), program, weights, max_length, max_attempts)


def key_words(key: Any) -> list[int]:
    """The words of a random key, typed or uint32."""
    data = jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return [int(word) for word in np.asarray(data).reshape(-1)]
