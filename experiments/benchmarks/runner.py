"""What the runner costs over a bare jitted loop that trains the same model on the same batches."""

import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmarks import BenchOptions, Measurement
from experiments.runner import stats
from experiments.runner.devices import Placement
from experiments.runner.interrupt import Interrupt
from experiments.runner.train import Arm, Task, init_state, train_chunk
from experiments.runner.trial import compile_programs, run_trial
from experiments.tasks import digits_task, python_topics_task


def bare_loop(task: Task, arm: Arm) -> Any:
    """The loop a person would write: jitted step, donated state, evaluation where the task asks for one."""
    key, rate = jax.random.key(0), np.float32(arm.learning_rates[0])
    chunk = jax.jit(lambda s, b, e: train_chunk(task, arm, s, b, rate, key, e), donate_argnums=0)
    evaluate = jax.jit(task.evaluate)
    init = jax.jit(lambda: init_state(task, arm, key, rate))

    def run() -> float:
        state = init()
        losses, evaluations = [], []
        began = time.perf_counter()
        for start in range(0, task.steps, task.sync):
            batches = task.batches.chunk(0, start, task.sync)
            for i in range(0, task.sync, task.dispatch):
                part = jax.tree.map(lambda a, i=i: a[i : i + task.dispatch], batches)
                state, loss = chunk(state, part, np.bool_(False))
                losses.append(loss)
            if (start + task.sync) % task.eval_every == 0:
                evaluations.append(evaluate(state.params, state.model_state, task.validation, key))
        jax.block_until_ready((state, losses, evaluations))
        return time.perf_counter() - began

    return run


def driven(task: Task, arm: Arm, scratch: pathlib.Path) -> Any:
    """The same through the runner, with its checkpoints, history and progress."""
    placement = Placement.over_all_devices(count=1)
    programs = compile_programs(task, arm, placement)
    count = [0]

    def run() -> float:
        count[0] += 1
        began = time.perf_counter()
        for _ in run_trial(
            task,
            arm,
            arm.learning_rates[0],
            0,
            programs=programs,
            placement=placement,
            directory=scratch / str(count[0]),
            identity={},
            interrupt=Interrupt(),
        ):
            pass
        return time.perf_counter() - began

    return run


def tasks() -> tuple[Task, ...]:
    """A task whose steps are scanned and one whose steps are dispatched one by one."""
    return (
        python_topics_task(batch_size=64, steps=100, evaluations=10),
        digits_task("cnn", batch_size=64, epochs=60),
    )


def measure(options: BenchOptions) -> Iterator[Measurement]:
    """The runner's whole wall time of a trial, result file included, over the bare loop's."""
    arm = Arm("adam", optax.adam, (1e-3,))
    for task in tasks():
        seconds: tuple[list[float], list[float]] = ([], [])
        with tempfile.TemporaryDirectory() as scratch:
            bare, runner = bare_loop(task, arm), driven(task, arm, pathlib.Path(scratch))
            bare(), runner()  # compile
            for _ in range(max(3, options.repeats // 2)):
                seconds[0].append(runner())
                seconds[1].append(bare())
        top, bottom = (float(np.median(s)) for s in seconds)
        yield Measurement(
            f"runner / bare jitted loop, {task.name}, {task.steps} steps",
            top / bottom,
            stats.bootstrap_ratio(*seconds),
            "<= 1.03",
            f"{top:.3f} s / {bottom:.3f} s",
        )
