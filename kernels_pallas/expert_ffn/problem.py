"""What every implementation of the union kernel needs: activations by name, and which experts run, in which order."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

Activation = Literal["silu", "gelu", "relu"]

ACTIVATIONS: MappingProxyType[str, Callable[[Array], Array]] = MappingProxyType(
    {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}
)
"""Functions by name; ``"gelu"`` is the tanh form, which the kernels' compilers have."""


class Active(NamedTuple):
    """The experts that run: the union over the tokens of a call.

    Attributes:
        ids: int32 [Ne], the active experts in ascending order; zeros after them.
        number: int32, how many are active.
    """

    ids: Int[Array, "Ne"]
    number: Int[Array, ""]


def check_activation(activation: str) -> None:
    """Raise ``ValueError`` for a name that is no activation."""
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(get_args(Activation))}")


def active_experts(active: Bool[Array, "Ne"]) -> Active:
    """The active experts, first to last.

    Two comparisons of all pairs, which every backend fuses, where a sort or a scatter would be a kernel of its own.

    >>> ids, number = active_experts(jnp.array([False, True, False, True]))
    >>> ids.tolist(), int(number)
    ([1, 3, 0, 0], 2)
    """
    expert = jnp.arange(active.shape[0], dtype=jnp.int32)
    rank = ((expert[None, :] < expert[:, None]) & active[None, :]).sum(1, dtype=jnp.int32)
    here = (rank[None, :] == expert[:, None]) & active[None, :]
    return Active(jnp.where(here, expert[None, :], 0).sum(1, dtype=jnp.int32), active.sum(dtype=jnp.int32))
