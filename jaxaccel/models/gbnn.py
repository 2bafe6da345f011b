"""The network that `jaxaccel.boosting.gbnn` grows, as a Flax NNX module."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxaccel.boosting.gbnn import GBNNParams, gbnn_apply


class SwitchableNetwork(nnx.Module):
    """One hidden layer whose last units can be switched off at each call; in place of a head, or fine-tuned.

    Args:
        params: trained by `jaxaccel.boosting.gbnn_fit`.
        activation: what it was trained with.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxaccel.boosting import gbnn_fit
        >>> x = jnp.linspace(-1, 1, 16)[:, None]
        >>> fit = gbnn_fit(x, x[:, 0] ** 2, key=jax.random.key(0), n_steps=3, inner_steps=5)
        >>> network = SwitchableNetwork(fit.params)
        >>> network(x).shape, network(x, n_active=1).shape
        ((16, 1), (16, 1))
    """

    def __init__(self, params: GBNNParams, *, activation: Callable[[Any], Any] = jax.nn.sigmoid) -> None:
        self.activation = activation
        for name, value in params._asdict().items():
            setattr(self, name, nnx.Param(value))

    def params(self) -> GBNNParams:
        """The parameters as the functions of `jaxaccel.boosting` take them."""
        return GBNNParams(*(getattr(self, name)[...] for name in GBNNParams._fields))

    def __call__(self, x: Float[Array, "n d"], *, n_active: ArrayLike | None = None) -> Float[Array, "n K"]:
        """Outputs of the first ``n_active`` steps."""
        return gbnn_apply(self.params(), x, n_active=n_active, activation=self.activation)
