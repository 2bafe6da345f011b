"""Noise schedules of diffusion models, and the few of their steps that a sampler visits.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε,   ᾱ_t = Π_{s≤t} (1 − β_s)

All numbers are worked in float64 on the host; a schedule is a hashable constant that compiled programs can close over.

Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239; Nichol and Dhariwal, Improved DDPM, 2102.09672.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels that a sampler visits, from the least noise (index 0) to the most (index T − 1).

    Raises:
        ValueError: for no steps, unequal lengths, ᾱ outside (0, 1] or not falling, time steps that do not rise.
    """

    alphas_cumprod: tuple[float, ...]
    """ᾱ of every kept step, T numbers; the share of the variance that is signal."""
    timesteps: tuple[int, ...]
    """The time step of the trained model that each kept step is, T numbers: what a network is told."""
    train_steps: int
    """Steps of the schedule that the model was trained with."""

    def __post_init__(self) -> None:
        if not self.timesteps or len(self.alphas_cumprod) != len(self.timesteps):
            raise ValueError(
                f"alphas_cumprod has {len(self.alphas_cumprod)} entries and timesteps {len(self.timesteps)}, "
                "expected the same number, at least 1"
            )
        alphas = np.asarray(self.alphas_cumprod)
        if not (np.all(alphas > 0) and np.all(alphas <= 1) and np.all(np.diff(alphas) < 0)):
            raise ValueError("alphas_cumprod must fall from step to step and lie in (0, 1]")
        if min(np.diff(self.timesteps), default=1) <= 0 or not 0 <= self.timesteps[0] <= self.timesteps[-1]:
            raise ValueError(f"timesteps must rise from 0 or more, got {self.timesteps}")
        if self.timesteps[-1] >= self.train_steps:
            raise ValueError(f"timesteps end with {self.timesteps[-1]}, expected less than {self.train_steps}")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.timesteps)

    def table(self, name: str) -> np.ndarray:
        """A column of numbers by step, float64 [T].

        Args:
            name: ``"signal"`` √ᾱ; ``"noise"`` √(1 − ᾱ); ``"alpha"`` ᾱ; ``"alpha_next"`` ᾱ of the step with less noise
                that follows when sampling, 1 after index 0.

        Raises:
            ValueError: for another name.
        """
        alphas = np.asarray(self.alphas_cumprod)
        columns = {
            "signal": np.sqrt(alphas),
            "noise": np.sqrt(1 - alphas),
            "alpha": alphas,
            "alpha_next": np.concatenate([[1.0], alphas[:-1]]),
        }
        if name not in columns:
            raise ValueError(f"name is {name!r}, expected one of {', '.join(columns)}")
        return columns[name]

    def look_up(self, column: np.ndarray, index: Any, like: Array) -> Float[Array, "..."]:
        """Entries of a column, shaped so that they multiply ``like``.

        Args:
            column: [T].
            index: step, a number or one per sample [B]. A traced one outside 0 … T − 1 gives NaN.
            like: [B, ...]; the result has its dtype, or float32 where that is narrower.

        Raises:
            ValueError: for a number outside 0 … T − 1, or an array that is neither a number nor [B].
        """
        self._check(index)
        index = jnp.asarray(index)
        if index.ndim and index.shape != like.shape[:1]:
            raise ValueError(f"i has shape {index.shape}, expected a number or one per sample {like.shape[:1]}")
        values = jnp.asarray(column, jnp.promote_types(like.dtype, jnp.float32))
        inside = (index >= 0) & (index < self.num_steps)
        found = jnp.where(inside, values[jnp.clip(index, 0, self.num_steps - 1)], jnp.nan)
        return found.reshape(index.shape + (1,) * (like.ndim - 1)) if index.ndim else found

    def _check(self, index: Any) -> None:
        if isinstance(index, (int, np.integer)) and not 0 <= index < self.num_steps:
            raise ValueError(f"i is {index}, expected a step from 0 to {self.num_steps - 1}")

    def timestep(self, index: Any) -> Int[Array, "..."]:
        """The model's time steps, int32, of steps 0 … T − 1.

        Args:
            index: a number, or an array of any shape. A traced one outside is taken as the nearest, as there is no
                whole number for "none"; the levels of `look_up` are NaN there.

        Raises:
            ValueError: for a number outside 0 … T − 1.
        """
        self._check(index)
        return jnp.asarray(self.timesteps, jnp.int32)[jnp.clip(jnp.asarray(index), 0, self.num_steps - 1)]


def _check_count(name: str, value: Any, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {low}")


def linear_betas(num_steps: Any = 1000, *, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """β from ``start`` to ``end`` in equal steps; the defaults are those of DDPM and DiT.

    Args:
        num_steps: of training.
        start: first β.
        end: last β.

    Returns:
        float64 [num_steps].

    Raises:
        ValueError: for no steps, or numbers outside 0 < start ≤ end < 1.

    >>> linear_betas(3, start=0.1, end=0.3).round(3).tolist()
    [0.1, 0.2, 0.3]
    """
    _check_count("num_steps", num_steps)
    if not 0 < start <= end < 1:
        raise ValueError(f"start and end are {start} and {end}, expected 0 < start <= end < 1")
    return np.linspace(start, end, num_steps, dtype=np.float64)


def cosine_betas(num_steps: Any = 1000, *, max_beta: float = 0.999) -> np.ndarray:
    """β for ᾱ along a squared cosine, ``squaredcos_cap_v2``: β_t = min(1 − f((t+1)/T)/f(t/T), ``max_beta``).

    f(u) = cos²(π/2 · (u + 0.008)/1.008). Nichol and Dhariwal, arXiv 2102.09672, equation 17.

    Args:
        num_steps: of training, T.
        max_beta: cap, in (0, 1); without it the last step would leave no signal at all.

    Returns:
        float64 [num_steps].

    Raises:
        ValueError: for no steps, or a cap outside (0, 1).

    >>> cosine_betas(100)[-1].item()
    0.999
    """
    _check_count("num_steps", num_steps)
    if not 0 < max_beta < 1:
        raise ValueError(f"max_beta is {max_beta}, expected a number in (0, 1)")
    levels = [math.cos((k / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(num_steps + 1)]
    return np.array([min(1 - levels[k + 1] / levels[k], max_beta) for k in range(num_steps)])


def noise_schedule(betas: Any) -> NoiseSchedule:
    """The schedule of all training steps.

    Args:
        betas: variances of the noise that each step adds, in (0, 1).

    Returns:
        A schedule with as many steps; thin it out with `respace`.

    Raises:
        ValueError: for none, more than one axis, or β outside (0, 1).

    >>> noise_schedule([0.5, 0.5]).alphas_cumprod
    (0.5, 0.25)
    """
    values = np.asarray(betas, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"betas has shape {values.shape}, expected one axis with at least 1 entry")
    if not (np.all(values > 0) and np.all(values < 1)):
        raise ValueError("betas must lie in (0, 1)")
    alphas = np.cumprod(1 - values)
    return NoiseSchedule(tuple(alphas.tolist()), tuple(range(values.size)), values.size)


def uniform_timesteps(train_steps: Any, num_steps: Any) -> tuple[int, ...]:
    """Steps from the first to the last: round(k·(train_steps − 1)/(num_steps − 1)), halves to the even number.

    A single step is the last one, the noise that sampling begins with (OpenAI's code takes step 0 there, where a
    network sees next to no noise).

    Raises:
        ValueError: for no steps, or more than there are.

    >>> uniform_timesteps(1000, 5)
    (0, 250, 500, 749, 999)
    """
    _check_count("train_steps", train_steps)
    _check_count("num_steps", num_steps)
    if num_steps > train_steps:
        raise ValueError(f"num_steps is {num_steps}, expected at most train_steps = {train_steps}")
    if num_steps == 1:
        return (int(train_steps) - 1,)
    return tuple(round(k * (train_steps - 1) / (num_steps - 1)) for k in range(num_steps))


def stride_timesteps(train_steps: Any, num_steps: Any) -> tuple[int, ...]:
    """Every s-th step from 0 on, as "ddimN" of OpenAI's code: the least whole s that keeps exactly ``num_steps``.

    Raises:
        ValueError: for no steps, or if no s keeps that many.

    >>> stride_timesteps(100, 10)
    (0, 10, 20, 30, 40, 50, 60, 70, 80, 90)
    """
    _check_count("train_steps", train_steps)
    _check_count("num_steps", num_steps)
    for stride in range(1, train_steps + 1):
        if len(range(0, train_steps, stride)) == num_steps:
            return tuple(range(0, train_steps, stride))
    raise ValueError(f"num_steps is {num_steps}: no whole stride keeps that many of {train_steps} steps")


def respace(schedule: NoiseSchedule, timesteps: Sequence[int]) -> NoiseSchedule:
    """Keep some steps of a schedule, with their ᾱ as they are.

    Args:
        schedule: to choose from.
        timesteps: of the trained model, rising; each must be in ``schedule``.

    Returns:
        The thinner schedule.

    Raises:
        ValueError: naming steps that the schedule does not have, or for none or steps that do not rise.

    >>> full = noise_schedule(linear_betas())
    >>> respace(full, uniform_timesteps(1000, 5)).timesteps
    (0, 250, 500, 749, 999)
    """
    where = {step: place for place, step in enumerate(schedule.timesteps)}
    kept = [int(step) for step in timesteps]
    unknown = [step for step in kept if step not in where]
    if unknown:
        raise ValueError(f"timesteps {unknown[:5]} are not in the schedule")
    alphas = tuple(schedule.alphas_cumprod[where[step]] for step in kept)
    if any(later <= earlier for earlier, later in itertools.pairwise(kept)):
        raise ValueError(f"timesteps must rise, got {tuple(kept)}")
    return NoiseSchedule(alphas, tuple(kept), schedule.train_steps)
