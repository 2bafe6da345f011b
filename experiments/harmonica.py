"""HarmoniCa: a diffusion transformer sampled with a learned table of what to reuse, beside simpler ways to save.

A small DiT is trained here on 8×8 digits. Tables are trained for several prices with both published ways to weigh
steps, and with equal weights as in Learning-to-Cache. They are compared with every n-th step computed (FORA), with a
schedule drawn at random, and with fewer DDIM steps. All start from the same noise; what counts is how far the sample is
from the one that computes everything. The full preset does it with DiT-XL/2 and the authors' settings.
"""

import dataclasses
import functools
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harmonica_model import Problem, load_problem, nearest_labels, train_digits
from experiments.harmonica_report import compare
from experiments.harmonica_routers import train_routers
from experiments.runner import cost
from experiments.runner.api import Comparison, Config, Experiment, Progress, check_rates
from experiments.runner.session import Session
from jaxaccel.caching import (
    ReuseSchedule,
    random_schedule,
    router_schedule,
    sample,
    save_schedule,
    soft_sample,
    uniform_schedule,
)
from jaxaccel.diffusion import double_batch
from jaxaccel.models import stack_blocks

DIGITS = "digits"
"""Name of the small model that is trained here."""
PROXIES = {"sequential λ": "sequential", "leave-one-out λ": "leave_one_out", "λ = 1 (Learning-to-Cache)": None}


@dataclasses.dataclass(frozen=True)
class HarmonicaConfig(Config):
    """Train a DiT and tables for it, and sample with all schedules."""

    model: str = DIGITS
    """digits: a small one, trained here. Else a name, hub id or path that `load_dit` knows."""
    dtype: str = "float32"
    """Of a published model's parameters."""
    width: int = 64
    """Of the small model."""
    depth: int = 4
    """Its blocks."""
    heads: int = 4
    """Its heads."""
    train_steps: int = 1000
    """Its training steps."""
    train_batch: int = 64
    """Images of a step."""
    learning_rate: float = 3e-3
    """Peak rate of Adam."""
    num_steps: int = 10
    """T, of DDIM."""
    scale: float = 1.5
    """Of guidance."""
    cfg_channels: int | None = None
    """Channels that are guided; all by default."""
    betas: tuple[float, ...] = (2e-7, 1e-6, 5e-6, 3e-5)
    """Prices with measured λ."""
    betas_equal: tuple[float, ...] = (3e-4, 1e-3, 4e-3, 1.6e-2)
    """Prices with λ = 1."""
    router_epochs: int = 60
    """Trajectories that a table learns from."""
    router_batch: int = 4
    """Samples of a trajectory, each with and without its label."""
    router_rate: float = 0.08
    """Rate of AdamW."""
    threshold: float = 0.1
    """Score above which a branch is computed."""
    refresh_every: int = 200
    """Router steps between measurements of λ, T to a trajectory."""
    intervals: tuple[int, ...] = (2, 3, 4, 5)
    """Of uniform schedules."""
    fewer_steps: tuple[int, ...] = (8, 6, 5, 4, 3)
    """Of DDIM, everything computed."""
    random_shares: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Shares of reused outputs of random schedules."""
    samples: int = 200
    """Samples that are compared, for each seed."""
    timed_batch: int = 32
    """Samples of a timed call."""
    repeats: int = 9
    """Turns of timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "depth", "heads", "train_steps", "train_batch", "router_epochs", "router_batch",
                     "refresh_every", "samples", "timed_batch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {self.num_steps}")
        if self.repeats < 3:
            raise ValueError(f"repeats must be at least 3 for a median with an interval, got {self.repeats}")
        for name in ("betas", "betas_equal"):
            check_rates(name, getattr(self, name))
        check_rates("learning_rate", (self.learning_rate,))
        check_rates("router_rate", (self.router_rate,))
        if not 0 < self.threshold < 0.99:
            raise ValueError(f"threshold must be in (0, 0.99), got {self.threshold}")
        if 2 not in self.intervals or min(self.intervals) < 2:
            raise ValueError(f"intervals must be at least 2, and 2 among them, got {self.intervals}")
        if not self.fewer_steps or not all(1 <= steps < self.num_steps for steps in self.fewer_steps):
            raise ValueError(f"fewer_steps must be between 1 and {self.num_steps - 1}, got {self.fewer_steps}")
        most = (self.num_steps - 1) / self.num_steps
        if not all(0 <= share <= most for share in self.random_shares):
            raise ValueError(f"random_shares must be in [0, {most:g}], got {self.random_shares}")


class Measuring:
    """Samples from one noise, and how far they are from those that compute everything."""

    def __init__(self, config: HarmonicaConfig, problem: Problem, params: Any, seed: int) -> None:
        self.config, self.problem, self.params = config, problem, params
        numbers = problem.config
        labels = jnp.arange(config.samples) % numbers.num_classes
        shape = (config.samples, numbers.image_size, numbers.image_size, numbers.channels)
        noise = jax.random.normal(jax.random.key(5000 + seed), shape)
        self.labels = np.asarray(labels)
        self.x, self.cond = double_batch(noise, labels, numbers.null_label)
        self.full = self.draw(uniform_schedule(config.num_steps, numbers.num_branches, interval=1))

    def draw(self, schedule: ReuseSchedule) -> np.ndarray:
        """Samples: one compiled program for all schedules of a number of steps."""
        network, sampler = self.problem.network(schedule.num_steps)
        out = sample(
            network, self.params, self.x, self.cond, schedule=schedule, sampler=sampler, implementation="cond"
        )  # fmt: skip
        return np.asarray(out[: len(self.labels)], np.float32)

    def point(self, schedule: ReuseSchedule, *, steps: int | None = None) -> dict[str, Any]:
        """Cost and quality; the cost is the share of branches that is computed, of T steps that compute all."""
        images = self.draw(schedule)
        computed = (1 - schedule.utilization) * schedule.num_steps / self.config.num_steps
        return {"computed": computed, "steps": steps, **self.quality(images)}

    def quality(self, images: np.ndarray) -> dict[str, Any]:
        """Distance from the full samples, and how many look like their label."""
        right = None
        if self.problem.images is not None:
            right = float((nearest_labels(self.problem, images) == self.labels).mean())
        return {"mse": float(((images - self.full) ** 2).mean()), "right": right}

    def soft(self, logits: np.ndarray) -> float:
        """Distance with the table's mixed outputs, as it was trained."""
        network, sampler = self.problem.network(self.config.num_steps)
        weights = jax.nn.sigmoid(jnp.asarray(logits))
        out = _soft(network, sampler)(self.params, self.x, self.cond, weights, self.config.threshold)[
            : len(self.labels)
        ]
        return float(((np.asarray(out) - self.full) ** 2).mean())


@functools.cache
def _soft(network: Any, sampler: Any) -> Any:
    def call(params: Any, x: Any, cond: Any, weights: Any, threshold: Any) -> Any:
        return soft_sample(network, params, x, cond, weights=weights, sampler=sampler, threshold=threshold)

    return jax.jit(call)


def measure(
    config: HarmonicaConfig, session: Session, problem: Problem, seed: int, tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """All contenders of one seed; tables [betas, T, NB] by arm."""
    branches, steps = problem.config.num_branches, config.num_steps
    measuring = Measuring(config, problem, stack_blocks(problem.params), seed)
    found: dict[str, Any] = {"full": measuring.quality(measuring.full)}
    found["uniform"] = [measuring.point(uniform_schedule(steps, branches, interval=n)) for n in config.intervals]
    found["random"] = [
        measuring.point(random_schedule(jax.random.key(100 * seed + n), steps, branches, utilization=share))
        for n, share in enumerate(config.random_shares)
    ]
    found["fewer steps"] = [
        measuring.point(uniform_schedule(n, branches, interval=1), steps=n) for n in config.fewer_steps
    ]
    for arm, logits in tables.items():
        points = []
        for number, table in enumerate(logits):
            schedule = router_schedule(table, threshold=config.threshold)
            save_schedule(session.directory / f"schedule-{_slug(arm)}-{number}-seed-{seed}.json", schedule)
            soft = {"soft_mse": measuring.soft(table), "rows": len(set(schedule.rows))}
            points.append(measuring.point(schedule) | soft | {"beta": _betas(config, arm)[number]})
        found[arm] = points
    learned = router_schedule(_middle(config, tables), threshold=config.threshold)
    pictures = {
        "everything computed": measuring.full,
        "every 2nd step": measuring.draw(uniform_schedule(steps, branches, interval=2)),
        "learned": measuring.draw(learned),
    }
    found["pictures"] = {
        name: np.round(np.asarray(images[:8, :, :, 0], np.float64), 2).tolist() for name, images in pictures.items()
    }
    return found


def _betas(config: HarmonicaConfig, arm: str) -> tuple[float, ...]:
    return config.betas_equal if PROXIES[arm] is None else config.betas


def _middle(config: HarmonicaConfig, tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """The table with sequential λ and the middle price: what is timed and shown."""
    return tables["sequential λ"][len(config.betas) // 2]


def _slug(arm: str) -> str:
    return {"sequential": "sequential", "leave_one_out": "leave-one-out", None: "equal"}[PROXIES[arm]]


def seconds(config: HarmonicaConfig, problem: Problem, table: np.ndarray) -> dict[str, Any]:
    """Seconds of sampling a batch, in turn, with compiled schedules; and those of each first call.

    Modulations of all steps are worked out ahead, for all contenders.
    """
    steps, branches = config.num_steps, problem.config.num_branches
    x, labels = problem.draw(jax.random.key(7), config.timed_batch)
    cond = problem.modulations(labels, steps)
    schedules = {
        "everything computed": uniform_schedule(steps, branches, interval=1),
        "every 2nd step": uniform_schedule(steps, branches, interval=2),
        "learned": router_schedule(table, threshold=config.threshold),
    }
    calls, compiling = {}, {}
    for name, schedule in schedules.items():
        network, sampler = problem.network(steps)
        calls[name] = functools.partial(
            sample, network, problem.params, x, cond, schedule=schedule, sampler=sampler, implementation="static"
        )
        began = time.perf_counter()
        jax.block_until_ready(calls[name]())
        compiling[name] = time.perf_counter() - began
    timed = cost.time_in_turn(calls, repeats=config.repeats)
    return {
        "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
        "compiling": compiling,
        "utilization": {name: schedule.utilization for name, schedule in schedules.items()},
    }


def run(config: HarmonicaConfig, session: Session) -> Generator[Progress, None, Comparison]:
    """Network, tables, samples, seconds; what is finished is kept when the run is interrupted."""
    if config.model == DIGITS:
        problem = yield from train_digits(
            width=config.width, depth=config.depth, heads=config.heads, steps=config.train_steps,
            batch_size=config.train_batch, rate=config.learning_rate, scale=config.scale,
        )  # fmt: skip
    else:
        yield Progress(f"loading {config.model}", 0, 1)
        problem = load_problem(
            config.model, scale=config.scale, cfg_channels=config.cfg_channels, dtype=config.dtype
        )  # fmt: skip
    tables: dict[str, np.ndarray] = {}
    stacked = stack_blocks(problem.params)
    for arm, proxy in PROXIES.items():
        saved = session.load(f"tables-{_slug(arm)}")
        if saved is None:
            began = time.perf_counter()
            logits = yield from train_routers(
                problem, stacked, proxy=proxy, betas=_betas(config, arm), seeds=session.seeds,
                num_steps=config.num_steps, epochs=config.router_epochs, batch=config.router_batch,
                rate=config.router_rate, threshold=config.threshold, refresh_every=config.refresh_every,
                task=f"tables, {arm}",
            )  # fmt: skip
            saved = {"logits": logits.tolist(), "seconds": time.perf_counter() - began}
            session.save(f"tables-{_slug(arm)}", saved)
        tables[arm] = np.asarray(saved["logits"])
    found = []
    for number, seed in enumerate(session.seeds):
        yield Progress("samples", number, len(session.seeds))
        found.append(measure(config, session, problem, seed, {arm: t[number] for arm, t in tables.items()}))
    yield Progress("samples", len(session.seeds), len(session.seeds))
    shown = _middle(config, {arm: t[0] for arm, t in tables.items()})
    yield Progress("seconds", 0, 1, "compiling")
    timed = seconds(config, problem, shown)
    yield Progress("seconds", 1, 1)
    return compare(config, problem.config, found, timed, shown, list(PROXIES))


EXPERIMENT = Experiment(
    name="harmonica",
    method="harmonica",
    claim="1.44 times faster DiT-XL/2 sampling at 256x256 and 1.69 times faster PixArt-alpha, nearly lossless; no "
    "images in training",
    config=HarmonicaConfig,
    presets={
        "quick": HarmonicaConfig(seeds=2),
        "full": HarmonicaConfig(
            seeds=1,
            model="facebook/DiT-XL-2-256",
            cfg_channels=3,
            betas=(7e-8,),
            betas_equal=(1e-4,),
            router_epochs=2000,
            router_batch=32,
            router_rate=0.01,
            refresh_every=500,
            samples=64,
            timed_batch=8,
        ),
    },
    run=run,
)
