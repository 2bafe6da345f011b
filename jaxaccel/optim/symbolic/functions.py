"""The 45 functions of which programs are made.

A value is a scalar or a tree: the parameters' tree, or that tree with one number per leaf, which is what ``norm``
returns. Functions of one value act on every element; those of two broadcast scalars and numbers per leaf. These are the
ones that differ from their namesakes in NumPy:

    a / b = a / (b + 1e-8)        log, log2, log10, sqrt act on |x|        log1p(x) = log |1 + x|
    interpolate(x, y, a) = (1 − a)·x + a·y        clip_by_global_norm(x, c) = x·min(1, c / ‖x‖), a and c scalars
    norm: per leaf        global_norm, dot, cosine_sim: over the whole tree

Source: Chen et al., arXiv 2302.06675, and the functions of the search space that its authors published. There the cube
root returns a function instead of a number; here it is the cube root. ``invert``, the bitwise complement, is in the
list but accepts no floating-point number, so that no valid program has it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIVISION_EPS = 1e-8


def _divide(x: Any, y: Any) -> Any:
    return jnp.divide(x, jnp.add(y, DIVISION_EPS))


def _interpolate(x: Any, y: Any, a: Any) -> Any:
    # 1 − a is formed from the literal itself where there is one, before anything is rounded to the arrays' precision.
    return jnp.add(jnp.multiply(1 - a, x), jnp.multiply(a, y))


CONSTANTS: dict[str, float] = {"get_pi": float(np.pi), "get_e": float(np.e), "get_eps": 1e-8}

ELEMENTWISE: dict[str, tuple[int, Callable[..., Any]]] = {
    "+": (2, jnp.add),
    "-": (2, jnp.subtract),
    "*": (2, jnp.multiply),
    "/": (2, _divide),
    "max": (2, jnp.maximum),
    "min": (2, jnp.minimum),
    "abs": (1, jnp.abs),
    "cos": (1, jnp.cos),
    "sin": (1, jnp.sin),
    "tan": (1, jnp.tan),
    "arcsin": (1, jnp.arcsin),
    "arccos": (1, jnp.arccos),
    "arctan": (1, jnp.arctan),
    "sinh": (1, jnp.sinh),
    "cosh": (1, jnp.cosh),
    "tanh": (1, jnp.tanh),
    "arcsinh": (1, jnp.arcsinh),
    "arccosh": (1, jnp.arccosh),
    "arctanh": (1, jnp.arctanh),
    "exp": (1, jnp.exp),
    "exp2": (1, jnp.exp2),
    "exp10": (1, lambda x: jnp.power(10.0, x)),
    "expm1": (1, jnp.expm1),
    "log": (1, lambda x: jnp.log(jnp.abs(x))),
    "log10": (1, lambda x: jnp.log10(jnp.abs(x))),
    "log2": (1, lambda x: jnp.log2(jnp.abs(x))),
    "log1p": (1, lambda x: jnp.log(jnp.abs(jnp.add(1.0, x)))),
    "square": (1, jnp.square),
    "sqrt": (1, lambda x: jnp.sqrt(jnp.abs(x))),
    "cube": (1, lambda x: jnp.multiply(jnp.square(x), x)),
    "cbrt": (1, jnp.cbrt),
    "sign": (1, jnp.sign),
    "reciprocal": (1, jnp.reciprocal),
    "negative": (1, jnp.negative),
    "invert": (1, jnp.invert),
    "interpolate": (3, _interpolate),
    "power": (2, jnp.power),
}


def _is_leaf(x: Any) -> bool:
    return jax.tree_util.all_leaves([x])


def _map(function: Callable[..., Any], *values: Any) -> Any:
    """Apply ``function`` leaf by leaf; bare arrays and numbers meet every leaf of a tree."""
    trees = [x for x in values if not _is_leaf(x)]
    if not trees:
        return function(*values)
    spread = [jax.tree.map(lambda _, x=x: x, trees[0]) if _is_leaf(x) else x for x in values]
    return jax.tree.map(function, *spread)


def _norm(x: Any) -> Any:
    return _map(lambda leaf: jnp.sqrt(jnp.sum(jnp.square(leaf))), x)


def _dot(x: Any, y: Any) -> Any:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(_map(jnp.multiply, x, y)))


def _global_norm(x: Any) -> Any:
    return jnp.sqrt(_dot(x, x))


def _cosine_sim(x: Any, y: Any) -> Any:
    return _dot(x, y) / (_global_norm(x) * _global_norm(y))


def clip_factor(norm: Any, bound: Any) -> Any:
    """The number in [0, 1] that brings a norm down to ``bound``."""
    return jnp.minimum(1.0, jnp.divide(bound, norm))


def _clip_by_global_norm(x: Any, bound: Any) -> Any:
    return _map(jnp.multiply, clip_factor(_global_norm(x), bound), x)


REDUCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "norm": (1, _norm),
    "global_norm": (1, _global_norm),
    "dot": (2, _dot),
    "cosine_sim": (2, _cosine_sim),
    "clip_by_global_norm": (2, _clip_by_global_norm),
}


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of the program space.

    >>> FUNCTIONS["/"](1.0, 4.0 - 1e-8).item()
    0.25
    """

    name: str
    """As written in programs; the four arithmetic ones are written between their arguments."""
    arity: int
    """Number of arguments."""
    call: Callable[..., Any]
    """Its action on scalars and trees."""
    scalar_arguments: tuple[int, ...] = ()
    """Positions at which only a scalar is allowed."""

    def __call__(self, *args: Any) -> Any:
        """Apply it to scalars and trees."""
        return self.call(*args)


def _table() -> dict[str, Function]:
    table = {name: Function(name, 0, lambda value=value: value) for name, value in CONSTANTS.items()}
    for name, (arity, call) in ELEMENTWISE.items():
        scalars = (2,) if name == "interpolate" else ()
        table[name] = Function(name, arity, lambda *args, call=call: _map(call, *args), scalars)
    for name, (arity, call) in REDUCTIONS.items():
        table[name] = Function(name, arity, call, (1,) if name == "clip_by_global_norm" else ())
    return table


FUNCTIONS: dict[str, Function] = _table()
"""All 45 functions by name."""

INFIX = ("+", "-", "*", "/")
"""The functions written between their two arguments."""
