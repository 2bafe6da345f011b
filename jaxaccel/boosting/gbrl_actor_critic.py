"""What an agent is made of: an environment in JAX, and a model as actor and critic; boosted trees as such a model.

A model has a column for each output of the policy and a last one for the value. Trees of one ensemble may serve both,
each column with its own learning rate, as in Fuhrer, Tessler and Dalal, arXiv 2407.08250.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxaccel.boosting.gbrl import (
    GBRLState,
    Schedule,
    clip_gradients,
    gbrl_init,
    gbrl_predict,
    gbrl_step,
    learning_rates,
)
from jaxaccel.boosting.gbrl_losses import Policy
from jaxaccel.boosting.trees import tree_leaves


@runtime_checkable
class Environment(Protocol):
    """An environment in JAX; hashable, as programs are compiled for it."""

    n_features: int
    """Columns of an observation ``[D]``."""
    categorical: tuple[int, ...]
    """Those that are categories."""
    policy: Policy
    """`Categorical` or `Gaussian`: what actions are."""

    def reset(self, key: Any) -> tuple[Any, Array]:
        """State and observation of a new episode."""

    def step(self, key: Any, state: Any, action: Array) -> tuple[Any, Array, Array, Array, Array]:
        """State, observation, reward, whether the episode ended by itself, whether it was cut short. No reset."""


@runtime_checkable
class ActorCritic(Protocol):
    """A model with a column for each output of the policy and a last one for the value; hashable."""

    def init(self, key: Any, n_features: int, outputs: int, categorical: tuple[int, ...]) -> Any:
        """Parameters."""

    def apply(self, params: Any, obs: Array) -> Array:
        """Outputs ``[n, A + 1]``."""

    def update(self, params: Any, obs: Array, gradients: Array) -> Any:
        """Parameters after a step on gradients of each row ``[n, A + 1]``."""

    def advance(self, params: Any, obs: Array, outputs: Array) -> Array | None:
        """Outputs after an update, from those before it, or ``None`` where that is not cheaper than `apply`."""

    def check(self, params: Any, updates: int) -> None:
        """Raise ``ValueError`` where there is no room for so many updates."""


@dataclasses.dataclass(frozen=True)
class TreeActorCritic:
    """`ActorCritic` of boosted trees.

    Example:
        >>> model = TreeActorCritic(capacity=4)
        >>> params = model.init(None, 3, 2, ())
        >>> model.apply(model.update(params, jnp.ones((8, 3)), jnp.ones((8, 2))), jnp.ones((1, 3))).round(3).tolist()
        [[-0.029..., -0.015...]]
    """

    capacity: int
    """Trees of a run (of each ensemble if they are not shared)."""
    policy_rate: float | Schedule = 0.029
    """Learning rate of the policy's columns; a schedule is a function of a tree's number."""
    value_rate: float | Schedule = 0.015
    """Learning rate of the value's column."""
    shared: bool = True
    """One ensemble for both; two otherwise."""
    optimizer: str = "sgd"
    """``"sgd"`` or ``"adam"``."""
    policy_clip: float | None = 100.0
    """Longest gradient of a row, of the policy's columns."""
    value_clip: float | None = 10.0
    """Largest gradient of a row, of the value's column."""
    max_depth: int = 4
    n_bins: int = 250
    method: str = "quantile"
    growth: str = "oblivious"
    """``policy`` of `gbrl_init`: how trees grow."""
    score: str = "cosine"
    min_data_in_leaf: int = 0
    control_variates: bool = False

    def init(self, key: Any, n_features: int, outputs: int, categorical: tuple[int, ...]) -> tuple[GBRLState, ...]:
        """Ensembles without trees: one, or the policy's and the value's."""
        del key
        settings: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("capacity", "optimizer", "max_depth", "n_bins", "method", "score", "min_data_in_leaf",
                         "control_variates")
        } | {"policy": self.growth, "categorical": categorical}  # fmt: skip
        policy = [self.policy_rate] * (outputs - 1)
        if self.shared:
            return (gbrl_init(n_features, outputs, learning_rate=[*policy, self.value_rate], **settings),)
        return (
            gbrl_init(n_features, outputs - 1, learning_rate=policy, **settings),
            gbrl_init(n_features, 1, learning_rate=[self.value_rate], **settings),
        )

    def apply(self, params: tuple[GBRLState, ...], obs: Array) -> Array:
        """Outputs ``[n, A + 1]``."""
        return jnp.concatenate([gbrl_predict(state, obs) for state in params], 1)

    def update(self, params: tuple[GBRLState, ...], obs: Array, gradients: Array) -> tuple[GBRLState, ...]:
        """One tree more, in each ensemble."""
        policy, value = gradients[:, :-1], gradients[:, -1:]
        policy = policy if self.policy_clip is None else clip_gradients(policy, self.policy_clip)
        value = value if self.value_clip is None else clip_gradients(value, self.value_clip)
        parts = (jnp.concatenate([policy, value], 1),) if self.shared else (policy, value)
        return tuple(gbrl_step(state, obs, part) for state, part in zip(params, parts, strict=True))

    def advance(self, params: tuple[GBRLState, ...], obs: Array, outputs: Array) -> Array | None:
        """What the newest trees change; ``None`` for Adam, whose steps are no sum."""
        if self.optimizer == "adam":
            return None
        moved = []
        for state in params:
            number = state.n_trees - 1
            tree = jax.tree.map(lambda a, i=number: a[jnp.minimum(i, len(a) - 1)], state.trees)
            value = tree.leaf_value[tree_leaves(tree, obs)] * learning_rates(state)[number]
            moved.append(jnp.where(number < state.capacity, value, 0))
        return outputs - jnp.concatenate(moved, 1)

    def check(self, params: tuple[GBRLState, ...], updates: int) -> None:
        """Raise where trees would be left out."""
        for state in params:
            grown = int(state.n_trees)
            if grown + updates > state.capacity:
                raise ValueError(
                    f"capacity is {state.capacity}, and {grown} trees are grown: expected room for {updates} more; "
                    "see gbrl_resize, gbrl_merge and gbrl_distil"
                )
