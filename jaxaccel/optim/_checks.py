"""Argument checks shared by the optimizers of this folder.

Static mistakes are reported where they are made; values that are only known at run time (traced values, arrays on a
device) are left alone, so that the same constructors work under ``jax.jit``, ``jax.vmap`` and
``optax.inject_hyperparams``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def concrete(value: Any) -> float | None:
    """Return a Python or NumPy number as a float, and ``None`` for anything whose value must not be looked at.

    A ``jax.Array`` counts as unknown even outside ``jit``: reading it would wait for the device in every training step.

    >>> concrete(0.5), concrete(np.float32(2.0)), concrete(jnp.ones(())), concrete(lambda step: step)
    (0.5, 2.0, None, None)
    """
    if isinstance(value, (int, float, np.number)) or (isinstance(value, np.ndarray) and value.ndim == 0):
        # .real: a complex NumPy number is nobody's hyper-parameter, and must not crash before the real error is raised.
        return float(np.real(value))
    return None


def _require(ok: Callable[[float], bool], name: str, value: Any, expected: str) -> None:
    number = concrete(value)
    if number is not None and not (math.isfinite(number) and ok(number)):
        raise ValueError(f"{name} must be {expected}, got {name}={value!r}")


def check_beta(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless a decay rate lies in [0, 1)."""
    _require(lambda x: 0.0 <= x < 1.0, name, value, "in [0, 1)")


def check_fraction(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` lies strictly between 0 and 1."""
    _require(lambda x: 0.0 < x < 1.0, name, value, "in (0, 1)")


def check_positive(name: str, value: Any, why: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is finite and > 0; ``why`` is appended to the expectation."""
    _require(lambda x: x > 0.0, name, value, "a finite number > 0" + why)


def check_non_negative(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and >= 0."""
    _require(lambda x: x >= 0.0, name, value, "a finite number >= 0")


def check_learning_rate(value: Any, name: str = "learning_rate") -> None:
    """Raise ``ValueError`` for a negative, infinite or NaN rate; schedules and traced rates pass."""
    check_non_negative(name, value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")


def floating_dtype(name: str, dtype: Any) -> np.dtype | None:
    """Return ``dtype`` in canonical form (``None`` stays ``None``); raise ``TypeError`` unless it is real floating."""
    if dtype is None:
        return None
    result = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(f"{name} must be a real floating dtype, got {name}={result.name}")
    return result


def check_floating_tree(name: str, tree: Any) -> None:
    """Raise ``TypeError`` naming the first leaf that is not of a real floating type."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            hint = "freeze it with optax.masked or optax.partition"
            if jnp.issubdtype(dtype, jnp.complexfloating):
                hint = "optimise its real and imaginary parts as two leaves"
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be real floating point, got dtype {dtype.name}; {hint}"
            )


def check_same_structure(name: str, tree: Any, reference_name: str, reference: Any) -> None:
    """Raise ``ValueError`` naming the first leaf in which two trees differ in place or shape."""
    leaves = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    expected = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(reference)}
    for path in expected:
        if path not in leaves:
            raise ValueError(f"{name} must match {reference_name}: leaf {name}{path} is missing")
    for path, shape in leaves.items():
        if path not in expected:
            raise ValueError(f"{name} must match {reference_name}: leaf {name}{path} is not in {reference_name}")
        if shape != expected[path]:
            raise ValueError(
                f"{name} must match {reference_name}: {name}{path} has shape {shape}, expected {expected[path]}"
            )
    got, wanted = str(jax.tree.structure(tree)), str(jax.tree.structure(reference))
    if got != wanted:  # the same leaves in other containers
        raise ValueError(f"{name} must match {reference_name}: got tree {got}, expected {wanted}")
