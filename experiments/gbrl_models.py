"""A network as actor and critic, with the four functions that boosted trees have in `jaxaccel.boosting.gbrl_agents`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class NetworkState(NamedTuple):
    """Weights and the optimizer's state."""

    weights: Any
    optimizer: Any
    rate: Any


@dataclasses.dataclass(frozen=True)
class MLPActorCritic:
    """Two networks of tanh layers, for the policy and the value, trained by Adam as PPO usually is.

    Gradients of rows are pulled back through the networks: their mean over the batch is what Adam gets.
    """

    rate: float = 3e-4
    """Adam's learning rate."""
    width: int = 64
    """Units of each of two hidden layers."""
    longest: float = 0.5
    """Norm that the gradient of all weights is clipped to."""
    categories: tuple[int, ...] = ()
    """Codes of each column, which are then fed one-hot; numbers as they are if empty."""

    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, then Adam; the rate is a part of the state."""
        return optax.chain(optax.clip_by_global_norm(self.longest), optax.scale_by_adam(eps=1e-5))

    def init(self, key: Any, n_features: int, outputs: int, categorical: tuple[int, ...]) -> NetworkState:
        """Orthogonal weights; small ones in the policy's last layer."""
        del categorical
        inputs = sum(self.categories) if self.categories else n_features
        weights = []
        for part, columns, last in zip(jax.random.split(key), (outputs - 1, 1), (0.01, 1.0), strict=True):
            sizes = (inputs, self.width, self.width, columns)
            layers = []
            for i, layer in enumerate(jax.random.split(part, 3)):
                gain = last if i == 2 else 2**0.5
                matrix = jax.nn.initializers.orthogonal(gain)(layer, (sizes[i], sizes[i + 1]), jnp.float32)
                layers.append((matrix, jnp.zeros(sizes[i + 1])))
            weights.append(layers)
        return NetworkState(weights, self.optimizer().init(weights), jnp.asarray(self.rate, jnp.float32))

    def _forward(self, weights: Any, obs: jax.Array) -> jax.Array:
        if self.categories:
            offset = np.concatenate([[0], np.cumsum(self.categories)[:-1]]).astype(np.int32)
            places = obs.astype(jnp.int32) + offset
            obs = jax.nn.one_hot(places, sum(self.categories)).sum(1)
        parts = []
        for layers in weights:
            hidden = obs
            for matrix, bias in layers[:-1]:
                hidden = jnp.tanh(hidden @ matrix + bias)
            parts.append(hidden @ layers[-1][0] + layers[-1][1])
        return jnp.concatenate(parts, 1)

    def apply(self, params: NetworkState, obs: jax.Array) -> jax.Array:
        """Outputs ``[n, A + 1]``."""
        return self._forward(params.weights, obs)

    def update(self, params: NetworkState, obs: jax.Array, gradients: jax.Array) -> NetworkState:
        """One step of Adam."""
        _, pull = jax.vjp(lambda weights: self._forward(weights, obs), params.weights)
        (slope,) = pull(gradients / len(obs))
        change, state = self.optimizer().update(slope, params.optimizer, params.weights)
        change = jax.tree.map(lambda c: -params.rate * c, change)
        return NetworkState(optax.apply_updates(params.weights, change), state, params.rate)

    def advance(self, params: NetworkState, obs: jax.Array, outputs: jax.Array) -> None:
        """A network has to be asked anew."""
        del params, obs, outputs

    def check(self, params: NetworkState, updates: int) -> None:
        """There is always room."""
        del params, updates
