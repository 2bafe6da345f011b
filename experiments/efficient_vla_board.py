"""A miniature of robot control with real images: go to the digit on a 5 × 5 board, or to the mirrored place.

One tile holds a handwritten digit, the others are noise. A tile is an image token: what a network that was trained on
single tiles makes of it, and where it is. Actions are way-points of a straight line from the middle.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.digits import load_digits
from jaxaccel.diffusion import epsilon_loss
from jaxaccel.models import VLAConfig, head_full, init_vla, vla_cognition

SIDE = 5
FEATURES = 24
VISUAL = FEATURES + 2 * SIDE
WORDS = {"digit": 0, "mirror": 1, "go": 2, "act": 3}
HALF = 1 / SIDE
"""Half a tile, on a board that is [−1, 1]²."""


class Boards(NamedTuple):
    """A batch of tasks."""

    tiles: Any  # [B, 25, 64], real digits or noise, row by row
    place: Any  # int32 [B], the digit's tile
    text: Any  # int32 [B, 3]: what to go to, "go", "act"
    goal: Any  # [B, 2], middle of the tile to go to


def make_boards(key: jax.Array, digits: jax.Array, count: int) -> Boards:
    """Draw tasks with digits [N, 64] of one split."""
    keys = jax.random.split(key, 4)
    tiles = jnp.clip(0.25 * jax.random.normal(keys[0], (count, SIDE**2, 64)) + 0.2, 0, 1)
    place = jax.random.randint(keys[1], (count,), 0, SIDE**2)
    chosen = digits[jax.random.randint(keys[2], (count,), 0, len(digits))]
    tiles = tiles.at[jnp.arange(count), place].set(chosen)
    mirror = jax.random.bernoulli(keys[3], 0.5, (count,))
    row, column = place // SIDE, place % SIDE
    column = jnp.where(mirror, SIDE - 1 - column, column)
    goal = jnp.stack([column, row], -1) * (2 / SIDE) - 1 + HALF
    text = jnp.stack([mirror.astype(jnp.int32), jnp.full(count, 2), jnp.full(count, 3)], -1)
    return Boards(tiles, place, text, goal)


def path(goal: jax.Array, window: int) -> jax.Array:
    """Way-points [B, W, 2] from the middle to the goal."""
    return goal[:, None] * (jnp.arange(1, window + 1) / window)[:, None]


def units(window: int) -> np.ndarray:
    """What the policy takes as 1, [W, 1]: the deviation of each way-point.

    Without it a head that removes noise of unit variance would learn the first way-points, which hardly differ, at the
    cost of the last one, which must be right.
    """
    middles = np.arange(SIDE) * (2 / SIDE) - 1 + HALF
    return (middles.std() * np.arange(1, window + 1) / window).astype(np.float32)[:, None]


def end_points(actions: jax.Array) -> jax.Array:
    """Where actions [B, W, 2] of the policy lead to, [B, 2]."""
    return actions[:, -1] * units(actions.shape[1])[-1]


def train_encoder(key: jax.Array, digits: jax.Array, labels: jax.Array, *, steps: int = 300) -> tuple[Any, float]:
    """A network of single tiles, trained to tell the ten digits and noise apart; returns it and its accuracy."""
    first, second, third = jax.random.split(key, 3)
    params = {
        "in": 0.15 * jax.random.normal(first, (64, 64)), "in_bias": jnp.zeros(64),
        "out": 0.15 * jax.random.normal(second, (64, FEATURES)), "out_bias": jnp.zeros(FEATURES),
        "classes": 0.2 * jax.random.normal(third, (FEATURES, 11)),
    }  # fmt: skip
    optimizer = optax.adam(3e-3)

    def loss(params: Any, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = jnp.clip(0.25 * jax.random.normal(own, (128, 64)) + 0.2, 0, 1)
        rows = jax.random.randint(own, (256,), 0, len(digits))
        x = jnp.concatenate([digits[rows], noise])
        y = jnp.concatenate([labels[rows], jnp.full(128, 10)])
        logits = encode_tiles(params, x) @ params["classes"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), jnp.mean(logits.argmax(-1) == y)

    def step(carry: Any, own: jax.Array) -> Any:
        params, state = carry
        grads, right = jax.grad(loss, has_aux=True)(params, own)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), right

    run = jax.jit(lambda p, keys: jax.lax.scan(step, (p, optimizer.init(p)), keys))
    (params, _), right = run(params, jax.random.split(key, steps))
    return params, float(right[-10:].mean())


def encode_tiles(params: Any, tiles: jax.Array) -> jax.Array:
    """Features [..., FEATURES] of tiles."""
    hidden = jax.nn.gelu(tiles @ params["in"] + params["in_bias"])
    return jnp.tanh(hidden @ params["out"] + params["out_bias"])


def visual_tokens(encoder: Any, tiles: jax.Array) -> jax.Array:
    """Image tokens: a tile's features, and which row and column it is in, as encoders of images add it."""
    where = np.arange(SIDE**2)
    places = np.concatenate([np.eye(SIDE)[where // SIDE], np.eye(SIDE)[where % SIDE]], -1).astype(np.float32)
    known = jnp.broadcast_to(jnp.asarray(places), (*tiles.shape[:-1], 2 * SIDE))
    return jnp.concatenate([encode_tiles(encoder, tiles), known], -1)


def split_digits(seed: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Training images and labels; held-out images."""
    data = load_digits(seed=seed)
    flat = lambda split: jnp.asarray(split.images.reshape(-1, 64))  # noqa: E731
    return (flat(data.train), jnp.asarray(data.train.labels)), flat(data.test)


class Trained(NamedTuple):
    """Policies of several seeds, stacked, after some steps."""

    params: Any
    state: Any
    loss: Any


@functools.cache
def trainer(config: VLAConfig, batch: int, draws: int, rate: float, total: int, chunk: int) -> tuple[Any, Any]:
    """``init(keys)`` and ``advance(params, state, encoder, digits, keys)`` for stacked seeds."""
    schedule = config.noise()
    learning = optax.warmup_cosine_decay_schedule(0, rate, max(1, total // 20), total)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning))

    def loss(trained: Any, encoder: Any, boards: Boards, key: jax.Array) -> jax.Array:
        visual = visual_tokens(encoder, boards.tiles)
        cognition, _ = vla_cognition(trained["vla"], visual, boards.text, config)
        tile = (boards.goal + 1 - HALF) * SIDE / 2
        target = jnp.round(tile[:, 1] * SIDE + tile[:, 0]).astype(jnp.int32)
        extra = optax.softmax_cross_entropy_with_integer_labels(cognition @ trained["tile"], target).mean()
        many = jnp.repeat(cognition, draws, 0)
        window = config.head.window
        x0 = jnp.repeat(path(boards.goal, window) / units(window), draws, 0)
        head = trained["vla"]["head"]

        def eps(x: jax.Array, i: jax.Array, cond: jax.Array) -> jax.Array:
            return head_full(head, x, schedule.timestep(i), cond, config=config.head)[0]

        return epsilon_loss(eps, schedule, key, x0, many, null=head["null"]) + extra

    def init(key: jax.Array) -> tuple[Any, Any]:
        vla = init_vla(key, config)
        # Deviations of 0.02 are meant for widths of thousands.
        matrices = vla["decoder"]["layers"]
        grown = [{n: w * (3 if w.ndim == 2 else 1) for n, w in layer.items()} for layer in matrices]
        vla = vla | {"decoder": vla["decoder"] | {"layers": grown, "embedding": 30 * vla["decoder"]["embedding"]}}
        params = {"vla": vla, "tile": jnp.zeros((config.decoder.hidden_size, SIDE**2))}
        return params, optimizer.init(params)

    def advance(params: Any, state: Any, encoder: Any, digits: jax.Array, keys: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            first, second = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, encoder, make_boards(first, digits, batch), second)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = jax.lax.scan(step, (params, state), keys)
        return params, state, values.mean()

    return jax.jit(jax.vmap(init)), jax.jit(jax.vmap(advance), donate_argnums=(0, 1))
