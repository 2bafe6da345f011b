"""Evaluating programs with one compiled interpreter, against compiling each program."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.data.arrays import Epochs
from experiments.data.digits import load_digits
from experiments.lion_search import LionSearchConfig, proxy
from experiments.runner import stats
from experiments.tasks import functional
from jaxaccel.models import MLP
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, Program, as_transform, mutate


def programs(count: int) -> list[Program]:
    """Different valid programs: a chain of mutations of AdamW."""
    found = [ADAMW_PROGRAM]
    while len(found) < count:
        child = mutate(jax.random.key(len(found)), found[-1])
        found.append(child)
    return found[:count]


def train_compiled(config: LionSearchConfig, program: Program) -> float:
    """The same training as `proxy`, traced and compiled for this one program."""
    digits = load_digits(900, 500)
    init, apply = functional(lambda rngs: MLP([64, config.width, 10], rngs=rngs))
    params, state = init(jax.random.key(0))
    batches = Epochs({"x": digits.train.images - 0.5, "y": digits.train.labels}, config.batch_size)
    tx = as_transform(program, 1.0)

    @jax.jit
    def train(params, batches, images, labels):
        def step(carry, batch):
            params, opt = carry

            def loss(params):
                logits, _ = apply(params, state, batch["x"], train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

            updates, opt = tx.update(jax.grad(loss)(params), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return jnp.mean(jnp.argmax(apply(params, state, images - 0.5, train=False)[0], -1) == labels)

    held_out = digits.validation
    accuracy = train(params, batches.chunk(0, 0, config.steps), held_out.images[:300], held_out.labels[:300])
    return float(accuracy)


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Programs per second, each program seen once, as in a search."""
    config = dataclasses.replace(LionSearchConfig(), seeds=1)
    fitness = proxy(config, seed=0, split="search")
    fitness(ADAMW_PROGRAM)  # compiles the interpreter, once for all programs
    seconds: tuple[list[float], list[float]] = ([], [])
    # The persistent cache would answer for a program that an earlier run compiled; a search meets only new ones.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for program in programs(1 + options.repeats)[1:]:
            began = time.perf_counter()
            train_compiled(config, program)
            seconds[0].append(time.perf_counter() - began)
            began = time.perf_counter()
            fitness(program)
            seconds[1].append(time.perf_counter() - began)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    slow, fast = (float(np.median(s)) for s in seconds)
    yield Measurement(
        f"programs/s: one interpreter / compiling each program ({config.steps} steps, 64-{config.width}-10 network)",
        slow / fast,
        stats.bootstrap_ratio(*seconds),
        ">= 2",
        f"{1 / fast:.1f} / {1 / slow:.1f} programs/s",
    )
