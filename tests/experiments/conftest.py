"""A tiny training task and a command-line driver that the runner's tests share."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.arrays import Epochs
from experiments.runner.train import Task

ROOT = pathlib.Path(__file__).resolve().parents[2]


def linear_task(steps: int = 40, eval_every: int = 10, **changes: object) -> Task:
    """Least squares on 64 fixed points, solvable exactly; eight rows per step."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 4)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5, 3.0], np.float32)

    def loss(params, state, batch, key):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), state

    fields = {
        "name": "linear",
        "init": lambda key: ({"w": 0.1 * jax.random.normal(key, (4,))}, ()),
        "loss": loss,
        "evaluate": lambda params, state, data, key: {"val_loss": loss(params, state, data, key)[0]},
        "batches": Epochs({"x": x, "y": y}, 8),
        "validation": {"x": x[:16], "y": y[:16]},
        "test": {"x": x[16:32], "y": y[16:32]},
        "steps": steps,
        "eval_every": eval_every,
        "metric": "val_loss",
        "higher_is_better": False,
        "batch_size": 8,
        "description": {"kind": "training"},
        "model": {"family": "linear", "params": 4},
    }
    return Task(**(fields | changes))


@pytest.fixture
def task() -> Callable[..., Task]:
    return linear_task


def start_cli(*words: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    """Start ``python -m experiments`` in a process of its own, on one device."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "experiments", *words],
        cwd=ROOT,
        env=cli_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cli(*words: str, prefix: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
    """Run ``python -m experiments`` to its end; returns the exit code and what it printed."""
    process = start_cli(*words, prefix=prefix, **environment)
    printed, errors = process.communicate(timeout=240)
    return process.returncode, printed, errors


def cli_environment(**more: str) -> dict[str, str]:
    """Environment of a child process: one CPU device, the suite's compilation cache."""
    cache = os.environ.get("JAXACCEL_TEST_CACHE", str(ROOT / ".cache" / "jax-tests"))
    return (
        os.environ
        | {
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "COLUMNS": "120",
        }
        | more
    )


# Small enough for seconds, large enough to be killed in the middle: five trials of twelve evaluations.
TINY = (
    *("--batch-sizes", "8", "--steps", "96", "--evaluations", "12", "--seeds", "2"),
    *("--adamw-learning-rates", "0.003", "--lion-learning-rates", "0.001", "0.003"),
)
