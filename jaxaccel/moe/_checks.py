"""Argument checks shared by this family."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def check_tokens(name: str, array: Any, expected: tuple[int, ...], of: str) -> None:
    """Raise ``ValueError`` unless ``array`` has one entry for each token of ``of``."""
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}: one for each token of {of}")


def check_routing(name: str, array: Array) -> None:
    """Raise unless ``array`` is [..., T, Ne] of a real floating type."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, expected a real floating type")
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected [..., T, Ne], none of them zero")


def check_count(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
