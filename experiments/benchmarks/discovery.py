"""Evaluating programs with one compiled interpreter, against compiling each program."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.lion_search import DigitsProblem, LionSearchConfig, digits_problem, proxy
from experiments.runner import stats
from jaxaccel.optim.symbolic import ADAMW_PROGRAM, Program, as_transform, mutate


def programs(count: int) -> list[Program]:
    """Different valid programs: a chain of mutations of AdamW."""
    found = [ADAMW_PROGRAM]
    while len(found) < count:
        child = mutate(jax.random.key(len(found)), found[-1])
        found.append(child)
    return found[:count]


def train_compiled(problem: DigitsProblem, program: Program) -> float:
    """The same training as the interpreter's, traced and compiled for this one program."""
    tx = as_transform(program, 1.0)

    @jax.jit
    def train(params: Any, batches: Any, held_out: Any) -> jax.Array:
        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, opt = carry
            updates, opt = tx.update(jax.grad(problem.loss)(params, batch), opt, params)
            return (optax.apply_updates(params, updates), opt), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return problem.accuracy(params, held_out)

    return float(train(problem.params, problem.batches, problem.held_out))


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """Programs per second, each program seen once, as in a search."""
    config = dataclasses.replace(LionSearchConfig(), seeds=1)
    problem = digits_problem(config, seed=0, split="search")
    fitness = proxy(config, seed=0, split="search")
    fitness(ADAMW_PROGRAM)  # compiles the interpreter, once for all programs
    seconds: tuple[list[float], list[float]] = ([], [])
    # The persistent cache would answer for a program that an earlier run compiled; a search meets only new ones.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for program in programs(1 + options.repeats)[1:]:
            began = time.perf_counter()
            train_compiled(problem, program)
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
