"""The diffusion transformer that HarmoniCa is shown on: trained here on digits, or read from the hub."""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.digits import load_digits
from experiments.runner.api import Progress
from jaxaccel.caching import Sampler
from jaxaccel.diffusion import (
    NoiseSchedule,
    ddim_step,
    double_batch,
    epsilon_loss,
    guide_denoiser,
    linear_betas,
    noise_schedule,
    respace,
    uniform_timesteps,
)
from jaxaccel.models import DiTConfig, dit_apply, dit_denoiser, dit_modulation, init_dit, load_dit

CHUNK = 100
"""Training steps in one compiled call."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A trained network, how many steps it is sampled with, and what is known about its data."""

    config: DiTConfig
    params: Any
    scale: float  # of guidance
    cfg_channels: int | None  # channels that are guided
    images: np.ndarray | None  # training images [N, H, W, C], for the nearest neighbour
    labels: np.ndarray | None

    def network(self, num_steps: int) -> tuple[Callable[..., Any], Sampler]:
        """The guided network and DDIM with so many steps."""
        return _network(self.config, self.scale, self.cfg_channels, num_steps)

    def draw(self, key: Any, batch: int) -> tuple[jax.Array, jax.Array]:
        """Noise and labels of a batch, doubled for guidance."""
        noise_key, label_key = jax.random.split(key)
        size, channels = self.config.image_size, self.config.channels
        noise = jax.random.normal(noise_key, (batch, size, size, channels))
        return double_batch(
            noise, jax.random.randint(label_key, (batch,), 0, self.config.num_classes), self.config.null_label
        )

    def modulations(self, labels: Any, num_steps: int) -> Any:
        """What labels and time do to the network at all steps, in place of the labels."""
        levels = _levels(num_steps)

        def work_out(params: Any, labels: Any) -> Any:
            steps = levels.timestep(jnp.arange(num_steps))
            return dit_modulation(params, steps[:, None], labels[None], self.config)

        return jax.jit(work_out)(self.params, labels)


def _levels(num_steps: int) -> NoiseSchedule:
    return respace(noise_schedule(linear_betas()), uniform_timesteps(1000, num_steps))


@functools.cache
def _network(
    config: DiTConfig, scale: float, cfg_channels: int | None, num_steps: int
) -> tuple[Callable[..., Any], Sampler]:
    # Cached: the same objects again mean the same compiled programs again.
    levels = _levels(num_steps)
    network = guide_denoiser(dit_denoiser(config, levels), scale=scale, cfg_channels=cfg_channels)
    return network, Sampler(lambda x, out, i: ddim_step(levels, x, out[..., : config.channels], i), num_steps)


def training(
    config: DiTConfig, images: Any, labels: Any, *, steps: int, batch_size: int, rate: float
) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """Training as ``start(params) -> carry`` and ``chunk(carry, keys) -> (carry, losses)``, a key for each step."""
    levels = noise_schedule(linear_betas())
    warm = min(100, steps // 4)
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0, rate, warm, steps, rate / 100), b2=0.99)

    def loss(params: Any, key: Any, x0: Any, cond: Any) -> Any:
        def network(x: Any, i: Any, cond: Any) -> Any:
            return dit_apply(params, x, i, cond, config)[0]

        return epsilon_loss(network, levels, key, x0, cond, null=config.null_label)

    @jax.jit
    def chunk(carry: Any, keys: Any) -> tuple[Any, Any]:
        def step(carry: Any, key: Any) -> tuple[Any, Any]:
            params, state = carry
            row_key, key = jax.random.split(key)
            rows = jax.random.randint(row_key, (batch_size,), 0, len(images))
            value, slope = jax.value_and_grad(loss)(params, key, images[rows], labels[rows])
            updates, state = tx.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, keys)

    return lambda params: (params, tx.init(params)), chunk


def train_digits(
    *, width: int, depth: int, heads: int, steps: int, batch_size: int, rate: float, scale: float, seed: int = 0
) -> Generator[Progress, None, Problem]:
    """Train a class-conditional DiT on the 8×8 digits, with labels left out now and then for guidance."""
    digits = load_digits()
    images = jnp.asarray(np.concatenate([digits.train.images, digits.validation.images]) * 2 - 1)
    labels = jnp.asarray(np.concatenate([digits.train.labels, digits.validation.labels]))
    config = DiTConfig.tiny(width=width, depth=depth, heads=heads)
    start, chunk = training(config, images, labels, steps=steps, batch_size=batch_size, rate=rate)
    # A published start suits hundreds of thousands of steps; conditions of unit size are learnt from in hundreds.
    params = init_dit(jax.random.key(seed), config)
    params |= {"labels": 50 * params["labels"], "time_in": 4 * params["time_in"], "time_out": 10 * params["time_out"]}
    carry, note = start(params), ""
    keys = jax.random.split(jax.random.key(seed + 1), steps)
    for done in range(0, steps, CHUNK):
        yield Progress("training the network", done, steps, note)
        carry, losses = chunk(carry, keys[done : done + CHUNK])
        note = f"loss {float(losses.mean()):.3f}"
    yield Progress("training the network", steps, steps, note)
    return Problem(config, carry[0], scale, None, np.asarray(images), np.asarray(labels))


def nearest_labels(problem: Problem, samples: np.ndarray) -> np.ndarray:
    """Labels of the training images that are nearest to samples."""
    assert problem.images is not None
    assert problem.labels is not None
    train = problem.images.reshape(len(problem.images), -1)
    flat = np.asarray(samples, np.float32).reshape(len(samples), -1)
    distance = (train**2).sum(1) - 2 * flat @ train.T
    return problem.labels[distance.argmin(1)]


def load_problem(name: str, *, scale: float, cfg_channels: int | None, dtype: str, **options: Any) -> Problem:
    """A published network, for which no images are read. ``options`` go to `load_dit`."""
    loaded = load_dit(name, dtype=jnp.dtype(dtype), **options)
    params = jax.tree.map(jnp.asarray, loaded.params)
    return Problem(loaded.config, params, scale, cfg_channels, None, None)
