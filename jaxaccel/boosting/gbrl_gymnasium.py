"""Agents on vectorised environments of Gymnasium's interface, which need not be installed.

Environments run on the host, a step at a time; acting and learning are compiled. What is asked of them is
``reset(seed=)``, ``step(actions)``, ``single_action_space`` and, for their number, what ``reset`` returns.
Both ways of starting anew are understood: in the step after an episode's end (Gymnasium's default from 1.0 on), or in
the same step with the last observation in the infos.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel.boosting.gbrl_agents import (
    Agent,
    AgentState,
    Metrics,
    Rollout,
    act,
    begin,
    check_sizes,
    learn,
    limited,
)
from jaxaccel.boosting.gbrl_losses import Policy, policy_of

LARGEST_CODE = 2**24


class CategoryEncoder:
    """Whole numbers for the categories of a table's columns, such as strings; what is new gets the next number.

    Example:
        >>> encode = CategoryEncoder()
        >>> encode(np.array([["wall", "key"], ["goal", "key"]])).tolist(), encode(np.array([["key", "door"]])).tolist()
        ([[0.0, 0.0], [1.0, 0.0]], [[2.0, 1.0]])
    """

    def __init__(self) -> None:
        self.codes: list[dict[Any, int]] = []

    def __call__(self, table: Any) -> np.ndarray:
        """Codes ``[n, D]``, float32.

        Raises:
            ValueError: for what is no table, or has another number of columns than before.
        """
        table = np.asarray(table)
        if table.ndim != 2:
            raise ValueError(f"the table has shape {table.shape}, expected [rows, columns]")
        self.codes = self.codes or [{} for _ in range(table.shape[1])]
        if len(self.codes) != table.shape[1]:
            raise ValueError(f"the table has {table.shape[1]} columns, expected {len(self.codes)}")
        result = np.empty(table.shape, np.float32)
        for i, codes in enumerate(self.codes):
            result[:, i] = [codes.setdefault(value, len(codes)) for value in table[:, i].tolist()]
        return result


@functools.partial(jax.jit, static_argnames=("model", "policy"))
def _act(model: Any, policy: Policy, params: Any, log_std: Any, obs: Any, key: Any) -> Any:
    action, log_prob = act(model, policy, params, log_std, obs, key)
    return action, log_prob, limited(policy, action)


_learn = jax.jit(learn, static_argnames=("model", "agent", "policy"))


def _same_step(envs: Any, infos: Any) -> bool:
    mode = str(getattr(envs, "metadata", {}).get("autoreset_mode", "")).upper()
    if "DISABLED" in mode:
        raise ValueError("autoreset_mode is disabled, expected environments that start anew by themselves")
    if "SAME" in mode or "NEXT" in mode:
        return "SAME" in mode
    return "final_obs" in infos or "final_observation" in infos


def gbrl_gymnasium(
    envs: Any,
    model: Any,
    agent: Agent,
    *,
    iterations: Any,
    seed: Any = 0,
    encode: Callable[[Any], Any] = np.asarray,
    categorical: Sequence[int] = (),
) -> Iterator[tuple[AgentState, Metrics]]:
    """Train on Gymnasium vector environments: one rollout and its updates for each item.

    Args:
        envs: ``agent.envs`` environments, such as ``gymnasium.make_vec("CartPole-v1", num_envs=8)``.
        model: `TreeActorCritic`, or another `ActorCritic`.
        agent: `PPO`, `A2C` or `AWR`.
        iterations: rollouts.
        seed: of the environments and of what is drawn.
        encode: observations to tables ``[N, D]`` of numbers; `CategoryEncoder` for strings.
        categorical: columns that are categories.

    Yields:
        The state, and metrics of the rollout.

    Raises:
        UnsupportedActionSpaceError: for action spaces other than Discrete and one-axis boxes.
        ValueError: for another number of environments than ``agent.envs``, at the start or in mid-run; for observations
            that are not finite; where the trees of a rollout have no room.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}, expected a positive integer")
    policy = policy_of(envs.single_action_space)
    columns: list[int] = []

    def table(observed: Any) -> np.ndarray:
        rows = np.asarray(encode(observed), np.float32)
        if rows.ndim != 2 or len(rows) != agent.envs or (columns and rows.shape[1] != columns[0]):
            raise ValueError(
                f"observations have shape {rows.shape}, expected ({agent.envs}, "
                f"{columns[0] if columns else 'columns'}) at every step: batch sizes must not change in a run"
            )
        if not np.isfinite(rows).all():
            raise ValueError("observations must be finite, got NaN or infinity")
        columns[:] = [rows.shape[1]]
        return rows

    observed, _ = envs.reset(seed=int(seed))
    obs = table(observed)
    state = begin(model, agent, policy, jax.random.key(seed), None, jnp.asarray(obs), tuple(categorical))
    running, resetting = np.zeros(agent.envs), np.zeros(agent.envs, bool)
    for _ in range(iterations):
        check_sizes(state, agent)
        model.check(state.params, agent.updates_per_step)
        key, acting = jax.random.split(state.key)
        rows, episodes, returns = [], 0, 0.0
        for key_of_step in jax.random.split(acting, agent.steps):
            action, log_prob, given = _act(model, policy, state.params, state.log_std, obs, key_of_step)
            observed, reward, terminated, truncated, infos = envs.step(np.asarray(given))
            following, reward = table(observed), np.asarray(reward, np.float32)
            terminated, done = np.asarray(terminated, bool), np.asarray(terminated, bool) | np.asarray(truncated, bool)
            same = _same_step(envs, infos)
            last = following.copy()
            if same and done.any():
                final = infos.get("final_obs", infos.get("final_observation"))
                for i in np.flatnonzero(done):
                    last[i] = np.asarray(encode(np.asarray(final[i])[None]), np.float32)[0]
            row = Rollout(obs, action, log_prob, reward, last, terminated, done, ~resetting)
            rows.append(jax.tree.map(np.asarray, row))
            running = np.where(resetting, 0, running + reward)
            ended = done & ~resetting
            episodes, returns = episodes + int(ended.sum()), returns + float(running[ended].sum())
            running = np.where(ended, 0, running)
            obs, resetting = following, np.zeros_like(done) if same else ended
        rollout = jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *rows)
        state, loss = _learn(model, agent, policy, dataclasses.replace(state, key=key, obs=jnp.asarray(obs)), rollout)
        yield state, Metrics(loss, episodes, returns)
