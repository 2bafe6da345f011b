"""Environments in JAX: CartPole with Gymnasium's constants, and a grid of categories with a key and a door.

Their episodes run inside compiled programs; `jaxaccel.boosting.gbrl_agents.Environment` is what they obey.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccel.boosting.gbrl_losses import Categorical, Policy


class Pole(NamedTuple):
    """State of CartPole."""

    x: Any
    x_dot: Any
    theta: Any
    theta_dot: Any
    time: Any


@dataclasses.dataclass(frozen=True)
class CartPole:
    """CartPole-v1: a cart is pushed left (0) or right (1) so that its pole stays up; 1 for every step.

    Barto, Sutton and Anderson, 1983. Constants, limits and the explicit Euler step are those of Gymnasium.
    """

    limit: int = 500
    """Steps until an episode is cut short."""

    n_features: ClassVar[int] = 4
    categorical: ClassVar[tuple[int, ...]] = ()
    categories: ClassVar[tuple[int, ...]] = ()
    policy: ClassVar[Policy] = Categorical(2)
    gravity: ClassVar[float] = 9.8
    cart_mass: ClassVar[float] = 1.0
    pole_mass: ClassVar[float] = 0.1
    half_length: ClassVar[float] = 0.5
    force: ClassVar[float] = 10.0
    seconds: ClassVar[float] = 0.02
    x_limit: ClassVar[float] = 2.4
    theta_limit: ClassVar[float] = 12 * 2 * math.pi / 360

    @staticmethod
    def observe(state: Pole) -> jax.Array:
        """Position, speed, angle and its speed."""
        return jnp.stack([state.x, state.x_dot, state.theta, state.theta_dot])

    def reset(self, key: Any) -> tuple[Pole, jax.Array]:
        """Uniform between −0.05 and 0.05."""
        start = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        state = Pole(start[0], start[1], start[2], start[3], jnp.zeros((), jnp.int32))
        return state, self.observe(state)

    def step(self, key: Any, state: Pole, action: Any) -> tuple[Pole, jax.Array, jax.Array, jax.Array, jax.Array]:
        """One step of 0.02 s."""
        del key
        push = jnp.where(action == 1, self.force, -self.force)
        cosine, sine = jnp.cos(state.theta), jnp.sin(state.theta)
        mass, moment = self.cart_mass + self.pole_mass, self.pole_mass * self.half_length
        thrust = (push + moment * state.theta_dot**2 * sine) / mass
        turn = (self.gravity * sine - cosine * thrust) / (
            self.half_length * (4 / 3 - self.pole_mass * cosine**2 / mass)
        )
        acceleration = thrust - moment * turn * cosine / mass
        state = Pole(
            state.x + self.seconds * state.x_dot, state.x_dot + self.seconds * acceleration,
            state.theta + self.seconds * state.theta_dot, state.theta_dot + self.seconds * turn, state.time + 1,
        )  # fmt: skip
        fell = (jnp.abs(state.x) > self.x_limit) | (jnp.abs(state.theta) > self.theta_limit)
        return state, self.observe(state), jnp.ones(()), fell, state.time >= self.limit


EMPTY, WALL, KEY, DOOR, GOAL = range(5)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
SIDE = 5


class Room(NamedTuple):
    """State of the grid."""

    cells: Any  # [5, 5]
    place: Any  # [2]
    carries: Any
    time: Any


@dataclasses.dataclass(frozen=True)
class KeyDoor:
    """A 5x5 grid: fetch the key, open the door in the wall, reach the goal behind it.

    Actions are up, down, left and right. The key is taken by walking on it; the door lets pass whoever has it. The goal
    gives 1 − 0.9·t/limit. What is seen are names of cells as codes: the 5x5 cells around oneself, what one carries, and
    the row and column one is in. They are categories: a code is no larger than another.
    """

    limit: int = 60
    """Steps until an episode is cut short."""

    n_features: ClassVar[int] = SIDE * SIDE + 3
    categorical: ClassVar[tuple[int, ...]] = tuple(range(SIDE * SIDE + 3))
    categories: ClassVar[tuple[int, ...]] = (*[5] * (SIDE * SIDE), 2, SIDE, SIDE)
    """Codes of each column."""
    policy: ClassVar[Policy] = Categorical(4)

    @staticmethod
    def observe(state: Room) -> jax.Array:
        """Codes ``[28]``."""
        around = jax.lax.dynamic_slice(
            jnp.pad(state.cells, 2, constant_values=WALL), (state.place[0], state.place[1]), (SIDE, SIDE)
        )
        rest = jnp.stack([state.carries.astype(jnp.int32), *state.place])
        return jnp.concatenate([around.reshape(-1), rest]).astype(jnp.float32)

    def reset(self, key: Any) -> tuple[Room, jax.Array]:
        """The wall is in the middle; the door, the goal behind it, the key and the start before it are drawn."""
        keys = jax.random.split(key, 3)
        cells = jnp.full((SIDE, SIDE), EMPTY).at[:, 2].set(WALL)
        cells = cells.at[jax.random.randint(keys[0], (), 0, SIDE), 2].set(DOOR)
        goal = jax.random.randint(keys[1], (), 0, 2 * SIDE)
        start, found = jax.random.choice(keys[2], 2 * SIDE, (2,), replace=False)
        cells = cells.at[goal // 2, 3 + goal % 2].set(GOAL).at[found // 2, found % 2].set(KEY)
        state = Room(cells, jnp.stack([start // 2, start % 2]), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
        return state, self.observe(state)

    def step(self, key: Any, state: Room, action: Any) -> tuple[Room, jax.Array, jax.Array, jax.Array, jax.Array]:
        """One move; into walls, the edge, or the door without a key nobody moves."""
        del key
        wanted = state.place + jnp.array(MOVES)[action]
        inside = ((wanted >= 0) & (wanted < SIDE)).all()
        wanted = jnp.clip(wanted, 0, SIDE - 1)
        cell = state.cells[wanted[0], wanted[1]]
        moves = inside & (cell != WALL) & ((cell != DOOR) | state.carries)
        place = jnp.where(moves, wanted, state.place)
        taken = moves & (cell == KEY)
        cells = state.cells.at[wanted[0], wanted[1]].set(jnp.where(taken, EMPTY, cell))
        state = Room(cells, place, state.carries | taken, state.time + 1)
        there = moves & (cell == GOAL)
        reward = jnp.where(there, 1 - 0.9 * state.time / self.limit, 0.0)
        return state, self.observe(state), reward, there, state.time >= self.limit
