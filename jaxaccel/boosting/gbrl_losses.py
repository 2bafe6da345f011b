"""What actors and critics descend: losses of PPO, A2C and AWR, and their gradients for each row.

Trees take the gradient of every row, where networks take one for their weights. So losses here are pure functions of
what a model says about n states, θ ``[n, A]`` for the policy and ``[n]`` for the value, and `row_gradients` is n times
the gradient of their mean. A network's gradient is the same array pulled back through it.

With r = π(a|s)/π_old(a|s), advantages Â and returns R:

    PPO   −mean min(r·Â, clip(r, 1 ± ε)·Â) + c·½·mean (V − R)² − e·mean H        arXiv 1707.06347
    A2C   −mean log π(a|s)·Â               + c·mean (V − R)²   − e·mean H        arXiv 1602.01783
    AWR   −mean min(exp(Â/β), 20)·log π(a|s) + c·mean (V − R)²                   arXiv 1910.00177

as in GBRL, arXiv 2407.08250. Advantages are constants of the gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_2PI = 1.8378770664093453


class UnsupportedActionSpaceError(ValueError):
    """Neither a finite set of actions nor a vector of numbers."""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Actions 0 to n − 1, whose logits θ are.

    Example:
        >>> Categorical(2).log_prob(jnp.zeros((1, 2)), jnp.array([1]), None).round(3).tolist()
        [-0.693...]
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 2:
            raise UnsupportedActionSpaceError(f"a policy chooses among {self.n!r} actions, expected at least 2")

    @property
    def outputs(self) -> int:
        """Columns A of θ."""
        return self.n

    def log_prob(self, theta: Any, action: Any, log_std: Any) -> Float[Array, "n"]:
        """The policy's log π(a|s)."""
        del log_std
        logits = jax.nn.log_softmax(theta)
        return jnp.take_along_axis(logits, action[:, None], 1)[:, 0]

    def entropy(self, theta: Any, log_std: Any) -> Float[Array, "n"]:
        """H of each row's distribution."""
        del log_std
        logits = jax.nn.log_softmax(theta)
        return -(jnp.exp(logits) * logits).sum(1)

    def sample(self, key: Any, theta: Any, log_std: Any) -> Array:
        """An action of each row, int32."""
        del log_std
        return jax.random.categorical(key, theta).astype(jnp.int32)

    def best(self, theta: Any) -> Array:
        """The most likely action of each row."""
        return jnp.argmax(theta, 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Vectors of ``size`` numbers around the mean θ; the spread does not depend on the state: exp(log_std) ``[size]``.

    Attributes:
        size: numbers of an action.
        low: least one; actions are clipped for the environment, their likelihood is that of what was drawn.
        high: largest one.
    """

    size: int
    low: float = -float("inf")
    high: float = float("inf")

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1 or not self.low < self.high:
            raise UnsupportedActionSpaceError(
                f"a policy draws {self.size!r} numbers between {self.low} and {self.high}, expected at least one, and "
                "limits in order"
            )

    @property
    def outputs(self) -> int:
        """Columns A of θ."""
        return self.size

    def log_prob(self, theta: Any, action: Any, log_std: Any) -> Float[Array, "n"]:
        """The policy's log π(a|s)."""
        scaled = (action - theta) * jnp.exp(-log_std)
        return -(0.5 * scaled**2 + log_std + 0.5 * LOG_2PI).sum(1)

    def entropy(self, theta: Any, log_std: Any) -> Float[Array, "n"]:
        """H of each row's distribution."""
        return jnp.broadcast_to((log_std + 0.5 * (1 + LOG_2PI)).sum(), theta.shape[:1])

    def sample(self, key: Any, theta: Any, log_std: Any) -> Array:
        """An action of each row."""
        return theta + jnp.exp(log_std) * jax.random.normal(key, theta.shape)

    def best(self, theta: Any) -> Array:
        """The most likely action of each row."""
        return theta


Policy = Categorical | Gaussian


def policy_of(space: Any) -> Policy:
    """The policy for an action space of Gymnasium's interface, which need not be installed.

    ``Discrete`` from 0 is `Categorical`, ``Box`` of one axis `Gaussian` between the least and the largest limit.

    Raises:
        UnsupportedActionSpaceError: for any other, by name.
    """
    kinds = {kind.__name__ for kind in type(space).__mro__}
    if "Discrete" in kinds and int(getattr(space, "start", 0)) == 0:
        return Categorical(int(space.n))
    if "Box" in kinds and len(space.shape) == 1 and jnp.issubdtype(space.dtype, jnp.floating):
        return Gaussian(int(space.shape[0]), float(jnp.min(space.low)), float(jnp.max(space.high)))
    raise UnsupportedActionSpaceError(
        f"the action space is {space!r}, expected Discrete starting at 0, or a Box of floats with one axis"
    )


class Batch(NamedTuple):
    """What losses look at besides the model."""

    action: Any  # [n] int32, or [n, A]
    log_prob: Any  # [n], of the policy that acted
    advantage: Any  # [n]
    target: Any  # [n], returns that the value should predict


def gae(
    reward: Float[Array, "T *N"],
    value: Float[Array, "T *N"],
    next_value: Float[Array, "T *N"],
    terminated: Any,
    done: Any,
    *,
    gamma: Any,
    lam: Any,
) -> tuple[Float[Array, "T *N"], Float[Array, "T *N"]]:
    """Generalised advantage estimation, arXiv 1506.02438.

        δ_t = r_t + γ·V(s'_t)·(1 − terminated_t) − V(s_t),   Â_t = δ_t + γ·λ·(1 − done_t)·Â_{t+1}

    Args:
        reward: r.
        value: V(s).
        next_value: V(s') of the state that the step led to, before any reset: a truncated episode has a future.
        terminated: the episode ended by itself.
        done: it ended, or was truncated.
        gamma: γ.
        lam: λ.

    Returns:
        Advantages, and returns Â + V.

    Example:
        >>> one, zero = jnp.ones(2), jnp.zeros(2)
        >>> gae(one, zero, zero, jnp.array([False, True]), jnp.array([False, True]), gamma=0.5, lam=1.0)[0].tolist()
        [1.5, 1.0]
    """
    delta = reward + gamma * next_value * (1 - jnp.asarray(terminated, value.dtype)) - value
    going = gamma * lam * (1 - jnp.asarray(done, value.dtype))

    def back(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        advantage = now[0] + now[1] * later
        return advantage, advantage

    advantage = jax.lax.scan(back, jnp.zeros_like(value[0]), (delta, going), reverse=True)[1]
    return advantage, advantage + value


def _normalised(advantage: Array) -> Array:
    centred = advantage - advantage.mean()
    return centred / (jnp.sqrt((centred**2).sum() / max(len(advantage) - 1, 1)) + 1e-8)


def ppo_loss(
    theta: Any,
    value: Any,
    batch: Batch,
    *,
    policy: Policy,
    log_std: Any = None,
    clip: Any = 0.2,
    value_coefficient: Any = 0.5,
    entropy_coefficient: Any = 0.0,
    normalise: bool = True,
) -> Float[Array, ""]:
    """PPO's clipped loss of a minibatch; ``normalise`` scales its advantages to a deviation of 1."""
    advantage = _normalised(batch.advantage) if normalise else batch.advantage
    ratio = jnp.exp(policy.log_prob(theta, batch.action, log_std) - batch.log_prob)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    error = 0.5 * jnp.mean((value - batch.target) ** 2)
    return -gain.mean() + value_coefficient * error - entropy_coefficient * policy.entropy(theta, log_std).mean()


def a2c_loss(
    theta: Any,
    value: Any,
    batch: Batch,
    *,
    policy: Policy,
    log_std: Any = None,
    value_coefficient: Any = 0.5,
    entropy_coefficient: Any = 0.0,
    normalise: bool = False,
) -> Float[Array, ""]:
    """A2C's loss of a rollout."""
    advantage = _normalised(batch.advantage) if normalise else batch.advantage
    gain = policy.log_prob(theta, batch.action, log_std) * advantage
    error = jnp.mean((value - batch.target) ** 2)
    return -gain.mean() + value_coefficient * error - entropy_coefficient * policy.entropy(theta, log_std).mean()


def awr_loss(
    theta: Any,
    value: Any,
    batch: Batch,
    *,
    policy: Policy,
    log_std: Any = None,
    beta: Any = 0.05,
    largest: Any = 20.0,
    value_coefficient: Any = 0.872,
    entropy_coefficient: Any = 0.0,
    normalise: bool = False,
) -> Float[Array, ""]:
    """AWR's loss of a batch of its replay buffer: likelihood weighted by exponentials of advantages, at most 20."""
    advantage = _normalised(batch.advantage) if normalise else batch.advantage
    weight = jnp.exp(jnp.minimum(advantage / beta, jnp.log(largest)))
    gain = policy.log_prob(theta, batch.action, log_std) * weight
    error = jnp.mean((value - batch.target) ** 2)
    return -gain.mean() + value_coefficient * error - entropy_coefficient * policy.entropy(theta, log_std).mean()


def row_gradients(
    loss: Callable[..., Array], outputs: Any, batch: Batch, *, log_std: Any = None, **settings: Any
) -> tuple[Float[Array, "n O"], Any, Float[Array, ""]]:
    """Gradients of each row: n times those of a loss that is a mean over n rows.

    Args:
        loss: `ppo_loss`, `a2c_loss`, `awr_loss`, or one with their arguments.
        outputs: of the model ``[n, A + 1]``, the value last.
        batch: of n rows.
        log_std: ``[A]`` of a `Gaussian`.
        **settings: of the loss, ``policy`` among them.

    Returns:
        ``[n, A + 1]``, the gradient of ``log_std`` (of the mean, not n times it), and the loss.

    Raises:
        ValueError: for outputs that do not fit the batch or the policy.

    Example:
        >>> batch = Batch(jnp.array([0, 1]), jnp.log(jnp.full(2, 0.5)), jnp.array([1.0, -1.0]), jnp.array([0.0, 2.0]))
        >>> policy = Categorical(2)
        >>> row_gradients(a2c_loss, jnp.zeros((2, 3)), batch, policy=policy, value_coefficient=0.5)[0].tolist()
        [[-0.5, 0.5, 0.0], [-0.5, 0.5, -2.0]]
    """
    policy: Policy = settings["policy"]
    n = len(batch.advantage)
    if jnp.shape(outputs) != (n, policy.outputs + 1):
        raise ValueError(f"outputs have shape {jnp.shape(outputs)}, expected ({n}, {policy.outputs + 1})")
    if isinstance(policy, Gaussian) and (log_std is None or jnp.shape(log_std) != (policy.size,)):
        found = None if log_std is None else f"of shape {jnp.shape(log_std)}"
        raise ValueError(f"log_std is {found}, expected shape ({policy.size},)")

    def whole(outputs: Array, log_std: Any) -> Array:
        return loss(outputs[:, :-1], outputs[:, -1], batch, log_std=log_std, **settings)

    value, (gradient, spread) = jax.value_and_grad(whole, (0, 1))(outputs, log_std)
    return n * gradient, spread, value
