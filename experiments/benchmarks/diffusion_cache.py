"""HarmoniCa's schedules: seconds of sampling beside the share of work that is left, and what training a table costs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.harmonica_model import Problem, training
from experiments.runner import cost
from jaxaccel.caching import (
    ReuseSchedule,
    cache_utilization,
    harmonica,
    sample,
    schedule_from_array,
    uniform_schedule,
)
from jaxaccel.diffusion import linear_betas, noise_schedule, respace, uniform_timesteps
from jaxaccel.models import (
    DiTConfig,
    dit_admit,
    dit_requests,
    dit_serve_step,
    init_dit,
    rows_needed,
    stack_blocks,
)

STEPS = 10
BATCH = 8
"""Samples, each with and without its label."""
SLOTS = 8
"""Requests that are served together, each with and without its label."""
EPOCHS = 20
"""Of the table's training: enough that branches differ."""
SHARES = (0.5, 0.65)
"""Reused shares that are timed."""
QUICK = {"epochs": 60, "batch": 4, "steps": 1000, "train_batch": 64}
"""Of the experiment's quick preset: what training of the table and of the network take together."""


@dataclasses.dataclass(frozen=True)
class _Table:
    logits: np.ndarray
    epoch: Callable[[], Any]


def problem() -> Problem:
    """A network of random weights, whose branches all do something."""
    config = DiTConfig.tiny(width=128, depth=4, image_size=16)
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda a: 0.05 * jax.random.normal(jax.random.fold_in(key, a.size), a.shape), init_dit(key, config)
    )
    return Problem(config, params, 1.5, None, None, None)


def train_table(subject: Problem) -> _Table:
    """A table after a few trajectories, and an epoch more as a call."""
    network, sampler = subject.network(STEPS)
    tx = optax.adamw(0.1, weight_decay=0.0)
    table = harmonica(
        network, sampler, num_branches=subject.config.num_branches, beta=1e-4, proxy=None, optimizer=tx
    )  # fmt: skip
    epoch, params = jax.jit(table.epoch), stack_blocks(subject.params)
    state = table.init(jax.random.key(1))
    for number in range(EPOCHS):
        drawn = subject.draw(jax.random.key(number), QUICK["batch"])
        state, _ = epoch(state, params, *drawn)
    return _Table(np.asarray(state.logits), lambda: epoch(state, params, *drawn))


def at_share(logits: np.ndarray, share: float) -> ReuseSchedule:
    """The schedule that reuses the given share of branches, those of the lowest scores."""
    flags = np.ones(logits.shape, bool)
    order = np.argsort(logits[:-1], axis=None, kind="stable")
    flags.reshape(-1)[order[: round(share * logits.size)]] = False
    return schedule_from_array(flags)


def _serving(subject: Problem, options: BenchOptions) -> Measurement:
    """Samples at two different steps of every-second-step reuse: one half computes, the other reuses everything."""
    config, params = subject.config, stack_blocks(subject.params)
    levels = respace(noise_schedule(linear_betas()), uniform_timesteps(1000, STEPS))
    noise, labels = subject.draw(jax.random.key(5), SLOTS)
    requests = dit_requests(config, SLOTS, is_guided=True)
    requests = dit_admit(requests, np.arange(SLOTS), noise[:SLOTS], labels[:SLOTS], num_steps=STEPS)
    requests = requests._replace(step=requests.step - jnp.arange(SLOTS) % 2)
    step = jax.jit(
        functools.partial(dit_serve_step, config=config, schedule=levels, scale=subject.scale), static_argnames="limit"
    )  # fmt: skip
    flags = [np.asarray(uniform_schedule(STEPS, config.num_branches, interval=interval)) for interval in (1, 2)]
    needed = [rows_needed(table, requests.step, is_guided=True) for table in flags]
    calls = {
        name: functools.partial(step, params, requests, table, limit=limit)
        for name, table, limit in zip(("whole", "rows"), flags, needed, strict=True)
    }
    timings = cost.time_in_turn(calls, repeats=options.repeats)
    ratio, interval = cost.ratio(timings, "whole", "rows")
    ideal = needed[0] / needed[1]
    return Measurement(
        f"a step of {SLOTS} samples at steps of their own, everything computed / {needed[1]} of {needed[0]} rows, as a "
        f"share of {ideal:.2f}",
        ratio / ideal,
        None if interval is None else (interval[0] / ideal, interval[1] / ideal),
        "",
        f"{1e3 * timings['whole'].median:.1f} / {1e3 * timings['rows'].median:.1f} ms; {ratio:.2f} times faster",
    )


def training_step(subject: Problem) -> Callable[[], Any]:
    """A step of training the network, as a call."""
    images = jax.random.normal(jax.random.key(2), (256, 16, 16, 1))
    labels = jnp.arange(256) % 10
    start, chunk = training(
        subject.config, images, labels, steps=1000, batch_size=QUICK["train_batch"], rate=1e-3
    )  # fmt: skip
    carry, keys = start(subject.params), jax.random.split(jax.random.key(3), 1)
    return lambda: chunk(carry, keys)


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Static, conditional and selecting execution at two shares; then the costs of training."""
    subject = problem()
    table = train_table(subject)
    network, sampler = subject.network(STEPS)
    x, labels = subject.draw(jax.random.key(4), BATCH)
    cond = subject.modulations(labels, STEPS)
    schedules = {share: at_share(table.logits, share) for share in SHARES}
    whole = uniform_schedule(STEPS, subject.config.num_branches, interval=1)
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, schedule: ReuseSchedule, how: str) -> None:
        calls[name] = functools.partial(
            sample, network, subject.params, x, cond, schedule=schedule, sampler=sampler, implementation=how
        )

    add("whole", whole, "static")
    for share, schedule in schedules.items():
        for how in ("static", "cond", "reference"):
            add(f"{how} {share}", schedule, how)
    timings = cost.time_in_turn(calls, repeats=options.repeats)
    for share, schedule in schedules.items():
        reused = cache_utilization(schedule)
        ideal = 1 / (1 - reused)
        for how, name in (("static", "static"), ("cond", "lax.cond"), ("reference", "select (jnp.where)")):
            ratio, interval = cost.ratio(timings, "whole", f"{how} {share}")
            yield Measurement(
                f"diffusion cache, everything computed / {name}, CUR {reused:.3f}, as a share of {ideal:.2f}",
                ratio / ideal,
                None if interval is None else (interval[0] / ideal, interval[1] / ideal),
                ">= 0.85" if how == "static" else "",
                f"{1e3 * timings['whole'].median:.1f} / {1e3 * timings[f'{how} {share}'].median:.1f} ms; "
                f"{ratio:.2f} times faster; {len(set(schedule.rows))} distinct rows",
            )
    yield _serving(subject, options)
    costs = cost.time_in_turn({"epoch": table.epoch, "step": training_step(subject)}, repeats=options.repeats)
    ratio, interval = cost.ratio(costs, "epoch", "step")
    factor = QUICK["epochs"] / QUICK["steps"]
    yield Measurement(
        f"training a table ({QUICK['epochs']} trajectories of {QUICK['batch']}) / the network "
        f"({QUICK['steps']} steps of {QUICK['train_batch']})",
        factor * ratio,
        None if interval is None else (factor * interval[0], factor * interval[1]),
        "",
        f"{1e3 * costs['epoch'].median:.0f} ms a trajectory without measuring λ / {1e3 * costs['step'].median:.0f} ms "
        "a step",
    )
