"""PPO, A2C and AWR with boosted trees, or any other model of the same four functions, as actor and critic.

    rollout (envs·steps rows) → advantages → updates, each of which is one tree

`train_step` does that in one compiled program where the environment is written in JAX; `gbrl_gymnasium` drives
vectorised environments of Gymnasium's interface with the same updates. While a rollout is learned from, what the
ensemble says about its rows is kept up to date tree by tree, so that an update costs one tree and not all of them.

What an environment must have is `Environment`, and what a model must have `ActorCritic`.

Fuhrer, Tessler and Dalal, arXiv 2407.08250.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxaccel.boosting import gbrl_losses as losses
from jaxaccel.boosting.gbrl_actor_critic import Environment
from jaxaccel.boosting.gbrl_losses import Batch, Categorical, Gaussian, Policy, UnsupportedActionSpaceError, gae

# Agents ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Agent:
    """What PPO, A2C and AWR share."""

    envs: int = 8
    """Environments side by side."""
    steps: int = 128
    """Steps of each in a rollout."""
    gamma: float = 0.99
    """Discount."""
    lam: float = 0.95
    """λ of `gae`."""
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    normalise: bool = False
    """Whether advantages of an update are scaled to a deviation of 1."""
    log_std: float = -2.0
    """Initial log deviation of Gaussian policies."""
    log_std_rate: float | Callable[[Any], Any] = 1.7e-3
    """Adam's rate for it; an optax schedule may be given."""
    buffer: ClassVar[int] = 0
    """Rollouts that are kept."""

    def __post_init__(self) -> None:
        for name in ("envs", "steps", "batch_size", "epochs", "updates", "rollouts"):
            value = getattr(self, name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise ValueError(f"gamma and lam are {self.gamma} and {self.lam}, expected 0 to 1")
        rest = self.rows % getattr(self, "batch_size", 1)
        if rest or self.batch > self.rows:
            raise ValueError(
                f"batch_size is {self.batch}, expected a divisor of the {self.rows} rows of a rollout (envs·steps)"
            )

    @property
    def rows(self) -> int:
        """Rows of a rollout."""
        return self.envs * self.steps

    @property
    def batch(self) -> int:
        """Rows of an update."""
        return int(getattr(self, "batch_size", self.rows))

    @property
    def updates_per_step(self) -> int:
        """Trees of a `train_step`."""
        return 1

    @property
    def loss(self) -> Callable[..., Array]:
        """Of an update."""
        shared = {n: getattr(self, n) for n in ("value_coefficient", "entropy_coefficient", "normalise")}
        return functools.partial(losses.a2c_loss, **shared)


@dataclasses.dataclass(frozen=True)
class A2C(Agent):
    """One update of each rollout."""

    steps: int = 8


@dataclasses.dataclass(frozen=True)
class PPO(Agent):
    """Epochs of minibatches of each rollout."""

    batch_size: int = 64
    """Rows of a minibatch: of a tree."""
    epochs: int = 4
    """Passes over a rollout."""
    clip: float = 0.2
    """ε."""
    normalise: bool = True

    @property
    def updates_per_step(self) -> int:
        """Trees of a `train_step`."""
        return self.epochs * (self.rows // self.batch_size)

    @property
    def loss(self) -> Callable[..., Array]:
        """Of an update."""
        shared = {n: getattr(self, n) for n in ("value_coefficient", "entropy_coefficient", "normalise", "clip")}
        return functools.partial(losses.ppo_loss, **shared)


@dataclasses.dataclass(frozen=True)
class AWR(Agent):
    """Minibatches of the last rollouts, whose advantages are estimated anew after each."""

    batch_size: int = 256
    """Rows of a minibatch."""
    updates: int = 16
    """Minibatches after each rollout."""
    rollouts: int = 8
    """Rollouts that are kept."""
    beta: float = 0.05
    """Temperature of weights."""
    largest: float = 20.0
    """Largest weight."""
    value_coefficient: float = 0.872

    @property
    def buffer(self) -> int:  # type: ignore[override]
        """Rollouts that are kept."""
        return self.rollouts

    @property
    def updates_per_step(self) -> int:
        """Trees of a `train_step`."""
        return self.updates

    @property
    def loss(self) -> Callable[..., Array]:
        """Of an update."""
        names = ("value_coefficient", "entropy_coefficient", "normalise", "beta", "largest")
        return functools.partial(losses.awr_loss, **{n: getattr(self, n) for n in names})


class Rollout(NamedTuple):
    """What happened, ``[T, N, ...]``."""

    obs: Any
    action: Any
    log_prob: Any
    reward: Any
    next_obs: Any  # before any reset
    terminated: Any
    done: Any
    valid: Any  # False where an environment was only being reset


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class AgentState:
    """A run.

    Attributes:
        params: of the model.
        log_std: of a Gaussian policy ``[A]``, else empty.
        spread: state of its optimizer.
        key: of what is drawn next.
        env: states of the environments.
        obs: what they show ``[N, D]``.
        running: returns of unfinished episodes ``[N]``.
        memory: rollouts that are kept ``[B, T, N, ...]``, or ``None``.
        rollouts: how many there were.
        sizes: envs, steps and rows of an update; static.
    """

    params: Any
    log_std: Any
    spread: Any
    key: Any
    env: Any
    obs: Any
    running: Any
    memory: Any
    rollouts: Any
    sizes: tuple[int, int, int] = dataclasses.field(metadata={"static": True})


class Metrics(NamedTuple):
    """Of a `train_step`."""

    loss: Any  # mean over updates
    episodes: Any  # finished in its rollout
    returns: Any  # the sum of their returns


def _sizes(agent: Agent) -> tuple[int, int, int]:
    return agent.envs, agent.steps, agent.batch


def check_sizes(state: AgentState, agent: Agent) -> None:
    """Raise ``ValueError`` where an agent's sizes are not those that the run began with."""
    if state.sizes != _sizes(agent):
        raise ValueError(
            f"envs, steps and rows of an update are {_sizes(agent)}, expected {state.sizes}, which the run began with: "
            "batch sizes must not change in a run"
        )


def check_policy(policy: Any) -> None:
    """Raise `UnsupportedActionSpaceError` for what is no policy of this library."""
    if not isinstance(policy, (Categorical, Gaussian)):
        raise UnsupportedActionSpaceError(f"policy is {policy!r}, expected Categorical or Gaussian")


def begin(
    model: Any, agent: Agent, policy: Policy, key: Any, env: Any, obs: Any, categorical: tuple[int, ...]
) -> AgentState:
    """A run whose environments are in ``env`` and show ``obs [N, D]``."""
    check_policy(policy)
    first, key = jax.random.split(key)
    params = model.init(first, obs.shape[1], policy.outputs + 1, categorical)
    log_std = jnp.full(policy.outputs if isinstance(policy, Gaussian) else 0, agent.log_std)
    memory = None
    if agent.buffer:
        shape = (agent.buffer, agent.steps, agent.envs)
        action = jnp.zeros(shape, jnp.int32) if isinstance(policy, Categorical) else jnp.zeros((*shape, policy.outputs))
        columns, flags = jnp.zeros((*shape, obs.shape[1])), jnp.zeros(shape, bool)
        memory = Rollout(columns, action, jnp.zeros(shape), jnp.zeros(shape), columns, flags, flags, flags)
    spread = optax.adam(agent.log_std_rate).init(log_std)
    running, rollouts = jnp.zeros(agent.envs), jnp.zeros((), jnp.int32)
    state = AgentState(params, log_std, spread, key, env, obs, running, memory, rollouts, _sizes(agent))
    # Literal numbers are of a weak type, which the state after a step no longer has: it would be compiled for twice.
    return jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), state)


def agent_init(env: Environment, model: Any, agent: Agent, key: Any) -> AgentState:
    """A run in JAX environments.

    Raises:
        UnsupportedActionSpaceError: for an environment whose policy is none of this library.
    """
    check_policy(env.policy)
    first, key = jax.random.split(key)
    state, obs = jax.vmap(env.reset)(jax.random.split(first, agent.envs))
    return begin(model, agent, env.policy, key, state, jnp.asarray(obs, jnp.float32), tuple(env.categorical))


def act(model: Any, policy: Policy, params: Any, log_std: Any, obs: Array, key: Any) -> tuple[Array, Array]:
    """Actions of rows, drawn, and their log likelihood."""
    theta = model.apply(params, obs)[:, :-1]
    action = policy.sample(key, theta, log_std)
    return action, policy.log_prob(theta, action, log_std)


def limited(policy: Policy, action: Array) -> Array:
    """What environments are given."""
    return jnp.clip(action, policy.low, policy.high) if isinstance(policy, Gaussian) else action


def _collect(env: Any, model: Any, agent: Agent, state: AgentState, key: Any) -> tuple[Any, Rollout, Array, Array]:
    def one(carry: Any, key: Any) -> Any:
        inner, obs, running = carry
        draw, moving, again = jax.random.split(key, 3)
        action, log_prob = act(model, env.policy, state.params, state.log_std, obs, draw)
        moved, seen, reward, terminated, truncated = jax.vmap(env.step)(
            jax.random.split(moving, agent.envs), inner, limited(env.policy, action)
        )
        seen, done, running = jnp.asarray(seen, jnp.float32), terminated | truncated, running + reward
        fresh = jax.vmap(env.reset)(jax.random.split(again, agent.envs))
        following = jax.tree.map(
            lambda new, old: jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), new, old), fresh, (moved, seen)
        )
        row = Rollout(obs, action, log_prob, reward, seen, terminated, done, jnp.ones_like(done))
        finished = jnp.where(done, running, 0)
        return (following[0], jnp.asarray(following[1], jnp.float32), jnp.where(done, 0, running)), (row, finished)

    start = state.env, state.obs, state.running
    carry, (rollout, finished) = jax.lax.scan(one, start, jax.random.split(key, agent.steps))
    return carry, rollout, rollout.done.sum(), finished.sum()


def _advantages(model: Any, agent: Agent, params: Any, rollout: Rollout, outputs: Array) -> tuple[Array, Array]:
    """Advantages and returns ``[T, N]`` of a rollout about which the model says ``outputs [T, N, A + 1]``."""
    value = outputs[..., -1]
    last = model.apply(params, rollout.next_obs[-1])[None, :, -1]
    following = jnp.concatenate([value[1:], last])
    cut = rollout.done & ~rollout.terminated

    def look(following: Array) -> Array:
        flat = rollout.next_obs.reshape(-1, rollout.next_obs.shape[-1])
        return jnp.where(cut, model.apply(params, flat)[:, -1].reshape(cut.shape), following)

    following = jax.lax.cond(cut[:-1].any(), look, lambda f: f, following)
    following = following.at[-1].set(last[0])
    return gae(
        rollout.reward, value, following, rollout.terminated, rollout.done | ~rollout.valid,
        gamma=agent.gamma, lam=agent.lam,
    )  # fmt: skip


def _flat(a: Array, axes: int) -> Array:
    return a.reshape(-1, *a.shape[axes:])


def learn(model: Any, agent: Agent, policy: Policy, state: AgentState, rollout: Rollout) -> tuple[AgentState, Array]:
    """Updates of a rollout; the state of environments is not touched. Returns the mean loss."""
    key, order_key, fill_key = jax.random.split(state.key, 3)
    memory: Any = state.memory
    limit: Any = agent.rows
    if agent.buffer:
        memory = jax.tree.map(lambda all_, new: all_.at[state.rollouts % agent.buffer].set(new), memory, rollout)
        limit = agent.rows * jnp.minimum(state.rollouts + 1, agent.buffer)
    else:
        memory = None
    known = jax.tree.map(lambda a: a[None], rollout) if memory is None else memory
    obs, total = _flat(known.obs, 3), known.valid.size
    outputs = model.apply(state.params, obs)
    by_step = outputs.reshape(*known.valid.shape, -1)
    advantage, target = jax.vmap(lambda r, o: _advantages(model, agent, state.params, r, o))(known, by_step)
    data = Batch(_flat(known.action, 3), _flat(known.log_prob, 3), advantage.reshape(-1), target.reshape(-1))
    # Rows of mere resets are replaced by others, drawn anew.
    valid = known.valid.reshape(-1)
    usable, drawn = jnp.argsort(~valid, stable=True), jax.random.uniform(fill_key, (total,))
    others = usable[(drawn * valid.sum()).astype(jnp.int32)]
    updates, size = agent.updates_per_step, agent.batch
    if agent.buffer:
        rows = jax.random.randint(order_key, (updates, size), 0, limit)
    elif size == total:
        rows = jnp.broadcast_to(jnp.arange(total), (updates, total))
    else:
        orders = jax.random.split(order_key, updates * size // total)
        rows = jax.vmap(lambda k: jax.random.permutation(k, total))(orders).reshape(updates, size)
    rows = jnp.where(valid[rows], rows, others[rows])
    spread_optimizer = optax.adam(agent.log_std_rate)

    def update(carry: Any, rows: Array) -> Any:
        params, log_std, spread, outputs = carry
        part = jax.tree.map(lambda a: a[rows], data)
        said = model.apply(params, obs[rows]) if outputs is None else outputs[rows]
        gradients, slope, loss = losses.row_gradients(agent.loss, said, part, log_std=log_std, policy=policy)
        params = model.update(params, obs[rows], gradients)
        outputs = None if outputs is None else model.advance(params, obs, outputs)
        change, spread = spread_optimizer.update(slope, spread, log_std)
        return (params, optax.apply_updates(log_std, change), spread, outputs), loss

    # Whether a model can advance is known from a trace that computes nothing.
    cheap = jax.eval_shape(lambda p, o: model.advance(p, obs, o), state.params, outputs) is not None
    start = (state.params, state.log_std, state.spread, outputs if cheap else None)
    (params, log_std, spread, _), loss = jax.lax.scan(update, start, rows)
    state = dataclasses.replace(
        state, params=params, log_std=log_std, spread=spread, key=key, memory=memory, rollouts=state.rollouts + 1
    )
    return state, loss.mean()


@functools.partial(jax.jit, static_argnames=("env", "model", "agent"))
def _train_step(state: AgentState, env: Any, model: Any, agent: Agent) -> tuple[AgentState, Metrics]:
    key, rolling = jax.random.split(state.key)
    (inner, obs, running), rollout, episodes, returns = _collect(env, model, agent, state, rolling)
    state, loss = learn(model, agent, env.policy, dataclasses.replace(state, key=key), rollout)
    return dataclasses.replace(state, env=inner, obs=obs, running=running), Metrics(loss, episodes, returns)


def train_step(state: AgentState, env: Environment, model: Any, agent: Agent) -> tuple[AgentState, Metrics]:
    """One rollout and its updates, wholly compiled; may be scanned, and mapped over seeds.

    Args:
        state: of `agent_init`.
        env: the environment; static, as the next two.
        model: `TreeActorCritic`, or another `ActorCritic`.
        agent: `PPO`, `A2C` or `AWR`.

    Raises:
        ValueError: sizes that changed in the run; no room for the trees of a step. Under ``jit`` the latter cannot be
            seen: trees without room are left out, and ``n_trees`` goes on counting.
    """
    check_sizes(state, agent)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state.params)):
        model.check(state.params, agent.updates_per_step)
    return _train_step(state, env, model, agent)
